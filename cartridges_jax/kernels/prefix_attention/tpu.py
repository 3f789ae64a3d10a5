"""`prefix_attention` in Pallas for TPUs (Mosaic): one online softmax over the slots and over the keys that are visible.

This file owns the layout and the ranges of blocks that are visited, and puts the gradient together; `tpu_kernels.py`
does the work. As in `xla.py`, the softmax's maximum and denominator are saved instead of their log-sum-exp, whose
rounding would shift a query's probabilities.

Axis letters beyond the usual ones: m the queries of a row times the g heads that share their keys, c blocks.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from cartridges_jax.kernels.block_sizes import of_kernel
from cartridges_jax.kernels.prefix_attention import tpu_kernels
from cartridges_jax.kernels.prefix_attention.blockwise import (
    MASKED,
    cast_slots,
    first_key,
    last_query,
    pad_to_multiple,
    visible_slots,
)
from cartridges_jax.kernels.prefix_attention.tpu_kernels import BlockSizes, Inputs, Range


def default_block_sizes(t: int, g: int, p: int, is_ragged: bool = False) -> BlockSizes:
    """Gives what the table has for this device, or less where there is less.

    If heads have lengths of their own, their blocks of slots are as small as blocks can be.
    """
    most = of_kernel("tpu").prefix
    queries, slot_blocks = max(most["queries"] // g // 128, 1) * 128, max(-(-p // most["slots"]), 1)
    slots = _aligned(1 if is_ragged else -(-p // slot_blocks))
    return BlockSizes(g, min(_aligned(t), queries), min(_aligned(t), most["keys"]), slots)


def _aligned(size: int) -> int:
    """Rounds up to a multiple of a register's 128 lanes, and to at least one."""
    return max(-(-size // 128), 1) * 128


def tpu_attention(
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
    block_sizes: BlockSizes | None = None,
) -> Float[Array, "b t n h"]:
    """Does what `prefix_attention` says, on a TPU or interpreted. `block_sizes` are chosen if they are not given."""
    b, t, n, h = q.shape
    p, kv_heads, _ = prefix_k.shape
    g = n // kv_heads
    block_sizes = block_sizes or default_block_sizes(t, g, p, lengths is not None)
    scale = h**-0.5 if scale is None else scale
    first_bt, last_bt = first_key(segment_ids, window), last_query(segment_ids, window)
    bounds_b2t = jnp.stack([first_bt, jnp.broadcast_to(jnp.arange(t), (b, t))], axis=1)
    bounds_b2m = jnp.repeat(pad_to_multiple(bounds_b2t, 2, block_sizes.queries, mode="edge"), g, axis=2)
    q_btkgh = pad_to_multiple((q * scale).astype(q.dtype), 1, block_sizes.queries).reshape(b, -1, kv_heads, g, h)
    q_bkmh = q_btkgh.transpose(0, 2, 1, 3, 4).reshape(b, kv_heads, -1, h)
    k_bkth, v_bkth = (pad_to_multiple(a, 1, block_sizes.keys).transpose(0, 2, 1, 3) for a in (k, v))
    *slots_pkh, bias_pk = visible_slots(prefix_k, prefix_v, bias, lengths)
    slot_k_kph, slot_v_kph = (pad_to_multiple(a, 0, block_sizes.slots).transpose(1, 0, 2) for a in slots_pkh)
    bias_k1p = pad_to_multiple(bias_pk, 0, block_sizes.slots, constant_values=MASKED).T[:, None]
    inputs = Inputs(q_bkmh, k_bkth, v_bkth, slot_k_kph, slot_v_kph, bias_k1p, bounds_b2m)
    slot_blocks_k = -(-(jnp.full(kv_heads, p) if lengths is None else lengths) // block_sizes.slots)
    o_bkmh = _attention(block_sizes, inputs, slot_blocks_k, *_ranges(first_bt, last_bt, block_sizes))
    o_btkgh = o_bkmh.reshape(b, kv_heads, -1, g, h).transpose(0, 2, 1, 3, 4)
    return o_btkgh.reshape(b, -1, n, h)[:, :t]


def _ranges(first: Int[Array, "b t"], last: Int[Array, "b t"], block_sizes: BlockSizes) -> tuple[Range, Range]:
    """Gives the own key blocks that each block of queries visits, and the query blocks that each block of keys does."""
    b, t = first.shape
    queries, keys = jnp.arange(0, t, block_sizes.queries), jnp.arange(0, t, block_sizes.keys)
    query_ends = jnp.minimum(queries + block_sizes.queries, t) - 1
    key_ends = jnp.minimum(keys + block_sizes.keys, t) - 1
    last_keys = jnp.broadcast_to(query_ends // block_sizes.keys, (b, len(queries)))
    first_queries = jnp.broadcast_to(keys // block_sizes.queries, (b, len(keys)))
    key_blocks = first[:, queries] // block_sizes.keys, last_keys
    return key_blocks, (first_queries, last[:, key_ends] // block_sizes.queries)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(
    block_sizes: BlockSizes, inputs: Inputs, slot_blocks: Int[Array, " k"], *ranges: Range
) -> Float[Array, "b k m h"]:
    return _forward(block_sizes, inputs, slot_blocks, *ranges)[0]


def _forward(
    block_sizes: BlockSizes, inputs: Inputs, slot_blocks: Int[Array, " k"], key_blocks: Range, query_blocks: Range
) -> tuple[Float[Array, "b k m h"], Any]:
    found = tpu_kernels.attend(block_sizes, slot_blocks, key_blocks, cast_slots(inputs))
    o, stats = (checkpoint_name(a, "attention") for a in found)
    return o, (inputs, slot_blocks, key_blocks, query_blocks, o, stats)


def _backward(block_sizes: BlockSizes, saved: Any, do: Float[Array, "b k m h"]) -> tuple[Inputs, None, None, None]:
    inputs, slot_blocks, key_blocks, query_blocks, o, stats = saved
    # the kernels' probabilities lack their denominator: dividing the gradient of o once makes up for it
    running_max_bkm, denominator_bkm = stats[:, :, 0], stats[:, :, 1]
    do = do.astype(jnp.float32) / denominator_bkm[..., None]
    stats = jnp.stack([running_max_bkm, (o.astype(jnp.float32) * do).sum(-1)], axis=2)
    arguments = cast_slots(inputs), do.astype(o.dtype), stats
    dk, dv = tpu_kernels.own_gradients(block_sizes, query_blocks, *arguments)
    d_slot_k, d_slot_v, d_bias = tpu_kernels.slot_gradients(block_sizes, slot_blocks, *arguments)
    d_slots = d_slot_k.astype(inputs.slot_k.dtype), d_slot_v.astype(inputs.slot_v.dtype), d_bias
    dq = tpu_kernels.query_gradient(block_sizes, slot_blocks, key_blocks, *arguments)
    return Inputs(dq, dk, dv, *d_slots, None), None, None, None


_attention.defvjp(_forward, _backward)
