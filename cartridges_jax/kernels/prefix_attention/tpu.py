"""Pallas for TPU (Mosaic): online softmax over the slots, then over the keys that a block of queries sees.

Here are the layout, the ranges of blocks that are visited, and the gradient as a whole; `tpu_kernels.py` does the work.
As in `xla.py`, maximum and sum are saved instead of their log-sum-exp, whose rounding would shift a query's weights.

Axis letters beyond the README's: m the queries of a row times the g heads that share their keys, c blocks.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from cartridges_jax.kernels.prefix_attention.blockwise import MASKED, as_read, first_seen, last_seer, padded
from cartridges_jax.kernels.prefix_attention.tpu_kernels import (
    Inputs,
    Plan,
    Range,
    attend,
    own_gradients,
    query_gradient,
    slot_gradients,
)


def default_plan(t: int, g: int, p: int) -> Plan:
    """About 1,024 lanes of queries by 512 keys: 2 MB for each float32 array of scores."""
    queries, slot_blocks = max(1024 // g // 128, 1) * 128, max(-(-p // 512), 1)
    return Plan(g, min(_aligned(t), queries), min(_aligned(t), 512), _aligned(-(-p // slot_blocks)))


def _aligned(size: int) -> int:
    """The next multiple of a register's 128 lanes, at least one."""
    return max(-(-size // 128), 1) * 128


def tpu_attention(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b t k h"],
    v: Float[Array, "b t k h"],
    prefix_k: Float[Array, "p k h"],
    prefix_v: Float[Array, "p k h"],
    segment_ids: Int[Array, "b t"],
    bias: Float[Array, "p k"] | None,
    window: int | None,
    plan: Plan | None = None,
) -> Float[Array, "b t n h"]:
    b, t, n, h = q.shape
    p, kv_heads, _ = prefix_k.shape
    g = n // kv_heads
    plan = plan or default_plan(t, g, p)
    first_bt, last_bt = first_seen(segment_ids, window), last_seer(segment_ids, window)
    bounds_b2t = jnp.stack([first_bt, jnp.broadcast_to(jnp.arange(t), (b, t))], axis=1)
    bounds_b2m = jnp.repeat(padded(bounds_b2t, 2, plan.queries, mode="edge"), g, axis=2)
    q_btkgh = padded(q * h**-0.5, 1, plan.queries).reshape(b, -1, kv_heads, g, h)
    q_bkmh = q_btkgh.transpose(0, 2, 1, 3, 4).reshape(b, kv_heads, -1, h)
    k_bkth, v_bkth = (padded(a, 1, plan.keys).transpose(0, 2, 1, 3) for a in (k, v))
    slot_k_kph, slot_v_kph = (padded(a, 0, plan.slots).transpose(1, 0, 2) for a in (prefix_k, prefix_v))
    bias_pk = jnp.zeros((p, kv_heads)) if bias is None else bias.astype(jnp.float32)
    bias_k1p = padded(bias_pk, 0, plan.slots, constant_values=MASKED).T[:, None]
    inputs = Inputs(q_bkmh, k_bkth, v_bkth, slot_k_kph, slot_v_kph, bias_k1p, bounds_b2m)
    o_bkmh = _attention(plan, inputs, *_ranges(first_bt, last_bt, plan))
    o_btkgh = o_bkmh.reshape(b, kv_heads, -1, g, h).transpose(0, 2, 1, 3, 4)
    return o_btkgh.reshape(b, -1, n, h)[:, :t]


def _ranges(first: Int[Array, "b t"], last: Int[Array, "b t"], plan: Plan) -> tuple[Range, Range]:
    """The first and last own block that each block of queries visits, and the same the other way round."""
    b, t = first.shape
    queries, keys = jnp.arange(0, t, plan.queries), jnp.arange(0, t, plan.keys)
    last_query, last_key = (jnp.minimum(s + n, t) - 1 for s, n in ((queries, plan.queries), (keys, plan.keys)))
    own = first[:, queries] // plan.keys, last_query // plan.keys
    seers = keys // plan.queries, last[:, last_key] // plan.queries
    own_first, own_last, seers_first, seers_last = (jnp.broadcast_to(a, (b, a.shape[-1])) for a in own + seers)
    return (own_first, own_last), (seers_first, seers_last)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(plan: Plan, inputs: Inputs, own: Range, seers: Range) -> Float[Array, "b k m h"]:
    return _forward(plan, inputs, own, seers)[0]


def _forward(plan: Plan, inputs: Inputs, own: Range, seers: Range) -> tuple[Float[Array, "b k m h"], Any]:
    o, stats = (checkpoint_name(a, "attention") for a in attend(plan, own, as_read(inputs)))
    return o, (inputs, own, seers, o, stats)


def _backward(plan: Plan, saved: Any, do: Float[Array, "b k m h"]) -> tuple[Inputs, None, None]:
    inputs, own, seers, o, stats = saved
    # the weights' common divisor is taken out of their sums, and put into what they are multiplied with
    top_bkm, total_bkm = stats[:, :, 0], stats[:, :, 1]
    do = do.astype(jnp.float32) / total_bkm[..., None]
    stats = jnp.stack([top_bkm, (o.astype(jnp.float32) * do).sum(-1)], axis=2)
    given = as_read(inputs), do.astype(o.dtype), stats
    dk, dv = own_gradients(plan, seers, *given)
    d_slot_k, d_slot_v, d_bias = slot_gradients(plan, *given)
    d_slots = d_slot_k.astype(inputs.slot_k.dtype), d_slot_v.astype(inputs.slot_v.dtype), d_bias
    return Inputs(query_gradient(plan, own, *given), dk, dv, *d_slots, None), None, None


_attention.defvjp(_forward, _backward)
