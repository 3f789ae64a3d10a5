"""Pallas for GPU (Triton): online softmax over the slots, then over the keys that a block of queries sees.

Here are the layout and the gradient as a whole; `gpu_kernels.py` does the work. As in `xla.py`, maximum and sum are
saved instead of their log-sum-exp, whose rounding would shift a query's weights.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from cartridges_jax.kernels.prefix_attention.blockwise import MASKED, as_read, first_seen, last_seer, padded
from cartridges_jax.kernels.prefix_attention.gpu_kernels import (
    Inputs,
    Plan,
    attend,
    own_gradients,
    query_gradient,
    slot_gradients,
)


def default_plans(h: int, dtype: Any) -> tuple[Plan, Plan]:
    """For the forward and the backward pass: what fits the registers and the shared memory of an H100."""
    narrow = h > 128 or jnp.dtype(dtype).itemsize > 2
    warps = 4 if h == 64 else 8
    return (Plan(64, 32, warps), Plan(32, 32, warps)) if narrow else (Plan(128, 64, warps), Plan(64, 64, warps))


def gpu_attention(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b t k h"],
    v: Float[Array, "b t k h"],
    prefix_k: Float[Array, "p k h"],
    prefix_v: Float[Array, "p k h"],
    segment_ids: Int[Array, "b t"],
    bias: Float[Array, "p k"] | None,
    window: int | None,
    plans: tuple[Plan, Plan] | None = None,
) -> Float[Array, "b t n h"]:
    _, t, _, h = q.shape
    p, kv_heads, _ = prefix_k.shape
    plans = plans or default_plans(h, q.dtype)
    size = max(max(plan.queries, plan.keys) for plan in plans)
    rows = (padded(a, 1, size) for a in (q * h**-0.5, k, v))
    slots = (padded(a, 0, size) for a in (prefix_k, prefix_v))
    bias_pk = jnp.zeros((p, kv_heads)) if bias is None else bias.astype(jnp.float32)
    bias_kp = padded(bias_pk, 0, size, constant_values=MASKED).T
    ranges = (padded(a(segment_ids, window), 1, size, mode="edge") for a in (first_seen, last_seer))
    return _attention(plans, Inputs(*rows, *slots, bias_kp, *ranges))[:, :t]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(plans: tuple[Plan, Plan], inputs: Inputs) -> Float[Array, "b t n h"]:
    return _forward(plans, inputs)[0]


def _forward(plans: tuple[Plan, Plan], inputs: Inputs) -> tuple[Float[Array, "b t n h"], Any]:
    o, top, total = (checkpoint_name(a, "attention") for a in attend(plans[0], as_read(inputs)))
    return o, (inputs, o, top, total)


def _backward(plans: tuple[Plan, Plan], saved: Any, do: Float[Array, "b t n h"]) -> tuple[Inputs]:
    inputs, o, top, total = saved
    # the weights' common divisor is taken out of their sums, and put into what they are multiplied with
    do = do.astype(jnp.float32) / total.transpose(0, 2, 1)[..., None]
    delta = (o.astype(jnp.float32) * do).sum(-1).transpose(0, 2, 1)
    given = plans[1], as_read(inputs), do.astype(o.dtype), top, delta
    d_slot_k, d_slot_v, d_bias = slot_gradients(*given)
    d_slots = d_slot_k.astype(inputs.slot_k.dtype), d_slot_v.astype(inputs.slot_v.dtype), d_bias
    return (Inputs(query_gradient(*given), *own_gradients(*given), *d_slots, None, None),)


_attention.defvjp(_forward, _backward)
