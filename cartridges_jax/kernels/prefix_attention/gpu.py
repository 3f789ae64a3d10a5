"""`prefix_attention` in Pallas for GPUs (Triton): one online softmax over the slots and over the keys that are visible.

This file owns the layout and puts the gradient together; `gpu_kernels.py` does the work. As in `xla.py`, the softmax's
maximum and denominator are saved instead of their log-sum-exp, whose rounding would shift a query's probabilities.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from cartridges_jax.kernels.block_sizes import of_kernel
from cartridges_jax.kernels.prefix_attention import gpu_kernels
from cartridges_jax.kernels.prefix_attention.blockwise import (
    MASKED,
    cast_slots,
    first_key,
    last_query,
    pad_to_multiple,
    visible_slots,
)
from cartridges_jax.kernels.prefix_attention.gpu_kernels import BlockSizes, Inputs

PassSizes = tuple[BlockSizes, BlockSizes]  # those of the forward and of the backward pass


def default_block_sizes(h: int, dtype: Any) -> PassSizes:
    """Gives what the table has for this device, by the width of what a block holds."""
    is_wide = h > 128 or jnp.dtype(dtype).itemsize > 2
    forward, backward = of_kernel("gpu").prefix["wide" if is_wide else "usual"]
    warps = 4 if h == 64 else 8
    return BlockSizes(*forward, warps), BlockSizes(*backward, warps)


def gpu_attention(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b t k h"],
    v: Float[Array, "b t k h"],
    prefix_k: Float[Array, "p k h"],
    prefix_v: Float[Array, "p k h"],
    segment_ids: Int[Array, "b t"],
    bias: Float[Array, "p k"] | None,
    lengths: Int[Array, " k"] | None,
    window: int | Array | None,
    scale: float | Array | None = None,
    block_sizes: PassSizes | None = None,
) -> Float[Array, "b t n h"]:
    """Does what `prefix_attention` says, on a GPU or interpreted. `block_sizes` are chosen if they are not given."""
    _, t, _, h = q.shape
    p, kv_heads, _ = prefix_k.shape
    block_sizes = block_sizes or default_block_sizes(h, q.dtype)
    scale = h**-0.5 if scale is None else scale
    size = max(max(sizes.queries, sizes.keys) for sizes in block_sizes)
    rows = (pad_to_multiple(a, 1, size) for a in ((q * scale).astype(q.dtype), k, v))
    *slots, bias_pk = visible_slots(prefix_k, prefix_v, bias, lengths)
    slots = (pad_to_multiple(a, 0, size) for a in slots)
    bias_kp = pad_to_multiple(bias_pk, 0, size, constant_values=MASKED).T
    ranges = (pad_to_multiple(a(segment_ids, window), 1, size, mode="edge") for a in (first_key, last_query))
    lengths_k = jnp.full(kv_heads, p, jnp.int32) if lengths is None else lengths.astype(jnp.int32)
    return _attention(block_sizes, Inputs(*rows, *slots, bias_kp, lengths_k, *ranges))[:, :t]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(block_sizes: PassSizes, inputs: Inputs) -> Float[Array, "b t n h"]:
    return _forward(block_sizes, inputs)[0]


def _forward(block_sizes: PassSizes, inputs: Inputs) -> tuple[Float[Array, "b t n h"], Any]:
    found = gpu_kernels.attend(block_sizes[0], cast_slots(inputs))
    o, running_max, denominator = (checkpoint_name(a, "attention") for a in found)
    return o, (inputs, o, running_max, denominator)


def _backward(block_sizes: PassSizes, saved: Any, do: Float[Array, "b t n h"]) -> tuple[Inputs]:
    inputs, o, running_max, denominator = saved
    # the kernels' probabilities lack their denominator: dividing the gradient of o once makes up for it
    do = do.astype(jnp.float32) / denominator.transpose(0, 2, 1)[..., None]
    delta = (o.astype(jnp.float32) * do).sum(-1).transpose(0, 2, 1)
    arguments = block_sizes[1], cast_slots(inputs), do.astype(o.dtype), running_max, delta
    dk, dv = gpu_kernels.own_gradients(*arguments)
    d_slot_k, d_slot_v, d_bias = gpu_kernels.slot_gradients(*arguments)
    d_slots = d_slot_k.astype(inputs.slot_k.dtype), d_slot_v.astype(inputs.slot_v.dtype), d_bias
    return (Inputs(gpu_kernels.query_gradient(*arguments), dk, dv, *d_slots, None, None, None),)


_attention.defvjp(_forward, _backward)
