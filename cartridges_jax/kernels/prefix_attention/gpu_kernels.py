"""The four kernels of `gpu.py`: output, and the gradients of queries, of own keys and values, and of slots.

A program owns one block of what it computes and loops over what that needs: a block of queries of one head over the
slots and its visible keys, a block of own keys over the queries that see it, a block of slots over all queries of some
rows. Every sum stays in registers, in float32 and in a fixed order: nothing is added atomically.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from cartridges_jax.kernels.prefix_attention.blockwise import MASKED

PROGRAMS = 256  # enough for every multiprocessor of a large GPU; fewer would leave some idle


@dataclasses.dataclass(frozen=True)
class Plan:
    """Queries of one head, and keys, of a block: powers of two. Interpreted, the kernels run anywhere."""

    queries: int
    keys: int
    warps: int = 4
    interpret: bool = False


class Inputs(NamedTuple):
    q: Float[Array, "b t n h"]
    k: Float[Array, "b t k h"]
    v: Float[Array, "b t k h"]
    slot_k: Float[Array, "p k h"]
    slot_v: Float[Array, "p k h"]
    bias: Float[Array, "k p"]
    first: Int[Array, "b t"]  # of each query, the first key it sees
    last: Int[Array, "b t"]  # of each key, the last query that sees it


def attend(plan: Plan, inputs: Inputs) -> tuple[Float[Array, "b t n h"], Float[Array, "b n t"], Float[Array, "b n t"]]:
    """The output and, of each query, the maximum of its scores and the sum of its weights relative to that."""
    b, t, n, _ = inputs.q.shape
    stats = jax.ShapeDtypeStruct((b, n, t), jnp.float32)
    o, top, total = _over_keys(_attend_kernel, plan, inputs, [], [inputs.q, stats, stats])
    return o, top, total


def query_gradient(
    plan: Plan, inputs: Inputs, do: Float[Array, "b t n h"], top: Float[Array, "b n t"], delta: Float[Array, "b n t"]
) -> Float[Array, "b t n h"]:
    """Here and below `do` is divided by the sums of weights; `delta` are its products with o."""
    return _over_keys(_query_gradient_kernel, plan, inputs, [do, top, delta], [inputs.q])[0]


def own_gradients(
    plan: Plan, inputs: Inputs, do: Array, top: Array, delta: Array
) -> tuple[Float[Array, "b t k h"], Float[Array, "b t k h"]]:
    b, t, n, h = inputs.q.shape
    kv_heads = inputs.k.shape[2]
    g = n // kv_heads
    of_q = pl.BlockSpec((None, t, g, h), lambda j, head, row: (row, 0, head, 0))
    of_k = pl.BlockSpec((None, plan.keys, None, h), lambda j, head, row: (row, j, head, 0))
    of_last = pl.BlockSpec((None, plan.keys), lambda j, head, row: (row, j))
    of_stats = pl.BlockSpec((None, g, t), lambda j, head, row: (row, head, 0))
    return pl.pallas_call(
        functools.partial(_own_gradients_kernel, plan),
        [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (inputs.k, inputs.v)],
        grid=(t // plan.keys, kv_heads, b),
        in_specs=[of_q, of_k, of_k, of_last, of_q, of_stats, of_stats],
        out_specs=[of_k, of_k],
        **_how(plan),
    )(inputs.q, inputs.k, inputs.v, inputs.last, do, top, delta)


def slot_gradients(
    plan: Plan, inputs: Inputs, do: Array, top: Array, delta: Array
) -> tuple[Float[Array, "p k h"], Float[Array, "p k h"], Float[Array, "k p"]]:
    """In float32. A program sums over as many rows of the batch as leave programs enough; one sum adds up the rest."""
    b, t, n, h = inputs.q.shape
    p, kv_heads, _ = inputs.slot_k.shape
    if not p:
        return jnp.zeros((0, kv_heads, h)), jnp.zeros((0, kv_heads, h)), jnp.zeros((kv_heads, 0))
    rows = -(-b // min(b, -(-PROGRAMS * plan.keys // (p * kv_heads))))
    parts = -(-b // rows)
    g = n // kv_heads
    of_q = pl.BlockSpec((b, t, g, h), lambda j, head, part: (0, 0, head, 0))
    of_slots = pl.BlockSpec((plan.keys, None, h), lambda j, head, part: (j, head, 0))
    of_bias = pl.BlockSpec((None, plan.keys), lambda j, head, part: (head, j))
    of_stats = pl.BlockSpec((b, g, t), lambda j, head, part: (0, head, 0))
    outputs = (inputs.slot_k, inputs.slot_v, inputs.bias)
    sums = pl.pallas_call(
        functools.partial(_slot_gradients_kernel, plan, rows),
        [jax.ShapeDtypeStruct((parts, *a.shape), jnp.float32) for a in outputs],
        grid=(p // plan.keys, kv_heads, parts),
        in_specs=[of_q, of_slots, of_slots, of_bias, of_q, of_stats, of_stats],
        out_specs=[
            pl.BlockSpec((None, plan.keys, None, h), lambda j, head, part: (part, j, head, 0)),
            pl.BlockSpec((None, plan.keys, None, h), lambda j, head, part: (part, j, head, 0)),
            pl.BlockSpec((None, None, plan.keys), lambda j, head, part: (part, head, j)),
        ],
        **_how(plan),
    )(inputs.q, *outputs, do, top, delta)
    return tuple(a.sum(0) for a in sums)


def _over_keys(
    kernel: Callable[..., None], plan: Plan, inputs: Inputs, of_queries: Sequence[Array], outputs: Sequence[Any]
) -> Sequence[Array]:
    """Runs a kernel for each block of queries of each head."""
    b, t, n, h = inputs.q.shape
    p, kv_heads, _ = inputs.slot_k.shape
    slots = (inputs.slot_k, inputs.slot_v, inputs.bias)
    if not p:  # no argument may be empty: a block that no loop visits
        slot_pkh = jnp.zeros((plan.keys, kv_heads, h), inputs.k.dtype)
        slots = slot_pkh, slot_pkh, jnp.zeros((kv_heads, plan.keys))
    g = n // kv_heads
    of_q = pl.BlockSpec((None, plan.queries, None, h), lambda i, head, row: (row, i, head, 0))
    of_k = pl.BlockSpec((None, t, None, h), lambda i, head, row: (row, 0, jax.lax.div(head, g), 0))
    of_slots = pl.BlockSpec((max(p, plan.keys), None, h), lambda i, head, row: (0, jax.lax.div(head, g), 0))
    of_bias = pl.BlockSpec((None, max(p, plan.keys)), lambda i, head, row: (jax.lax.div(head, g), 0))
    of_first = pl.BlockSpec((None, plan.queries), lambda i, head, row: (row, i))
    of_stats = pl.BlockSpec((None, None, plan.queries), lambda i, head, row: (row, head, i))
    per_query = [of_q, of_stats, of_stats]
    return pl.pallas_call(
        functools.partial(kernel, plan, p // plan.keys),
        [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in outputs],
        grid=(t // plan.queries, n, b),
        in_specs=[
            of_q,
            of_k,
            of_k,
            of_slots,
            of_slots,
            of_bias,
            of_first,
            *per_query[: len(of_queries)],
        ],
        out_specs=per_query[: len(outputs)],
        **_how(plan),
    )(inputs.q, inputs.k, inputs.v, *slots, inputs.first, *of_queries)


def _how(plan: Plan) -> dict[str, Any]:
    return {"compiler_params": plgpu.CompilerParams(num_warps=plan.warps, num_stages=2), "interpret": plan.interpret}


def _attend_kernel(
    plan: Plan,
    slot_blocks: int,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    slot_k_ref: Any,
    slot_v_ref: Any,
    bias_ref: Any,
    first_ref: Any,
    o_ref: Any,
    top_ref: Any,
    total_ref: Any,
) -> None:
    q_qh = q_ref[...]

    def visit(carry: Any, scores_qs: Array, k_sh: Array, v_sh: Array) -> Any:
        top_q, total_q, o_qh = carry
        new_top_q = jnp.maximum(top_q, scores_qs.max(1))
        weights_qs = jnp.exp(scores_qs - new_top_q[:, None])
        old_q = jnp.exp(top_q - new_top_q)
        o_qh = o_qh * old_q[:, None] + _dot(weights_qs.astype(v_sh.dtype), v_sh)
        return new_top_q, total_q * old_q + weights_qs.sum(1), o_qh

    zeros_q = jnp.zeros(plan.queries, jnp.float32)
    carry = zeros_q + MASKED, zeros_q, jnp.zeros(q_qh.shape, jnp.float32)
    refs = k_ref, v_ref, slot_k_ref, slot_v_ref, bias_ref, first_ref
    top_q, total_q, o_qh = _visit_keys(plan, slot_blocks, q_qh, refs, visit, carry)
    o_ref[...] = (o_qh / total_q[:, None]).astype(o_ref.dtype)
    top_ref[...], total_ref[...] = top_q, total_q


def _query_gradient_kernel(
    plan: Plan,
    slot_blocks: int,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    slot_k_ref: Any,
    slot_v_ref: Any,
    bias_ref: Any,
    first_ref: Any,
    do_ref: Any,
    top_ref: Any,
    delta_ref: Any,
    dq_ref: Any,
) -> None:
    q_qh, do_qh, top_q, delta_q = q_ref[...], do_ref[...], top_ref[...], delta_ref[...]

    def visit(dq_qh: Array, scores_qs: Array, k_sh: Array, v_sh: Array) -> Array:
        weights_qs = jnp.exp(scores_qs - top_q[:, None])
        d_scores_qs = weights_qs * (_dot(do_qh, v_sh.T) - delta_q[:, None])
        return dq_qh + _dot(d_scores_qs.astype(k_sh.dtype), k_sh)

    refs = k_ref, v_ref, slot_k_ref, slot_v_ref, bias_ref, first_ref
    dq_qh = _visit_keys(plan, slot_blocks, q_qh, refs, visit, jnp.zeros(q_qh.shape, jnp.float32))
    dq_ref[...] = dq_qh.astype(dq_ref.dtype)


def _visit_keys(
    plan: Plan, slot_blocks: int, q_qh: Array, refs: Sequence[Any], visit: Callable[..., Any], carry: Any
) -> Any:
    """Folds `visit(carry, scores, keys, values)` over the slots, then over the own keys that the block sees."""
    k_ref, v_ref, slot_k_ref, slot_v_ref, bias_ref, first_ref = refs
    start, first_q = pl.program_id(0) * plan.queries, first_ref[...]
    query_q = start + jnp.arange(plan.queries)

    def slots(j: Array, carry: Any) -> Any:
        at = pl.ds(j * plan.keys, plan.keys)
        k_sh = slot_k_ref[at]
        return visit(carry, _dot(q_qh, k_sh.T) + bias_ref[at], k_sh, slot_v_ref[at])

    def own(j: Array, carry: Any) -> Any:
        at = pl.ds(j * plan.keys, plan.keys)
        k_sh, v_sh = k_ref[at], v_ref[at]
        key_s = j * plan.keys + jnp.arange(plan.keys)
        seen_qs = (key_s >= first_q[:, None]) & (key_s <= query_q[:, None])
        return visit(carry, jnp.where(seen_qs, _dot(q_qh, k_sh.T), MASKED), k_sh, v_sh)

    carry = jax.lax.fori_loop(0, slot_blocks, slots, carry)
    blocks = jax.lax.div(first_q.min(), plan.keys), jax.lax.div(start + plan.queries - 1, plan.keys) + 1
    return jax.lax.fori_loop(*blocks, own, carry)


def _own_gradients_kernel(
    plan: Plan,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    last_ref: Any,
    do_ref: Any,
    top_ref: Any,
    delta_ref: Any,
    dk_ref: Any,
    dv_ref: Any,
) -> None:
    k_sh, v_sh, last_s = k_ref[...], v_ref[...], last_ref[...]
    g = q_ref.shape[1]
    start = pl.program_id(0) * plan.keys
    key_s = start + jnp.arange(plan.keys)

    def visit(step: Array, carry: Any) -> Any:
        i, head = jax.lax.div(step, g), jax.lax.rem(step, g)
        at = pl.ds(i * plan.queries, plan.queries)
        q_qh, do_qh = q_ref[at, head], do_ref[at, head]
        query_q = i * plan.queries + jnp.arange(plan.queries)
        seen_sq = (query_q >= key_s[:, None]) & (query_q <= last_s[:, None])
        scores_sq = jnp.where(seen_sq, _dot(k_sh, q_qh.T), MASKED)
        dk, dv, _ = _key_gradients(scores_sq, v_sh, q_qh, do_qh, top_ref[head, at], delta_ref[head, at])
        return carry[0] + dk, carry[1] + dv

    zeros_sh = jnp.zeros(k_sh.shape, jnp.float32)
    steps = jax.lax.div(start, plan.queries) * g, (jax.lax.div(last_s.max(), plan.queries) + 1) * g
    dk_sh, dv_sh = jax.lax.fori_loop(*steps, visit, (zeros_sh, zeros_sh))
    dk_ref[...], dv_ref[...] = dk_sh.astype(dk_ref.dtype), dv_sh.astype(dv_ref.dtype)


def _slot_gradients_kernel(
    plan: Plan,
    rows: int,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    bias_ref: Any,
    do_ref: Any,
    top_ref: Any,
    delta_ref: Any,
    dk_ref: Any,
    dv_ref: Any,
    d_bias_ref: Any,
) -> None:
    b, t, g, _ = q_ref.shape
    blocks = t // plan.queries
    first = pl.program_id(2) * rows
    k_sh, v_sh, bias_s = k_ref[...], v_ref[...], bias_ref[...]

    def visit(step: Array, carry: Any) -> Any:
        head, i = jax.lax.rem(step, g), jax.lax.rem(jax.lax.div(step, g), blocks)
        row, at = first + jax.lax.div(step, g * blocks), pl.ds(i * plan.queries, plan.queries)
        q_qh, do_qh = q_ref[row, at, head], do_ref[row, at, head]
        scores_sq = _dot(k_sh, q_qh.T) + bias_s[:, None]
        found = _key_gradients(scores_sq, v_sh, q_qh, do_qh, top_ref[row, head, at], delta_ref[row, head, at])
        return tuple(a + b for a, b in zip(carry, found, strict=True))

    zeros_sh = jnp.zeros(k_sh.shape, jnp.float32)
    steps = jnp.minimum(rows, b - first) * blocks * g
    carry = zeros_sh, zeros_sh, jnp.zeros(plan.keys, jnp.float32)
    dk_ref[...], dv_ref[...], d_bias_ref[...] = jax.lax.fori_loop(0, steps, visit, carry)


def _key_gradients(
    scores_sq: Array, v_sh: Array, q_qh: Array, do_qh: Array, top_q: Array, delta_q: Array
) -> tuple[Float[Array, "s h"], Float[Array, "s h"], Float[Array, " s"]]:
    """What a block of queries of one head adds to the gradients of keys, values and bias."""
    weights_sq = jnp.exp(scores_sq - top_q)
    d_scores_sq = weights_sq * (_dot(v_sh, do_qh.T) - delta_q)
    dk_sh = _dot(d_scores_sq.astype(q_qh.dtype), q_qh)
    return dk_sh, _dot(weights_sq.astype(do_qh.dtype), do_qh), d_scores_sq.sum(1)


def _dot(a: Array, b: Array) -> Array:
    return jnp.dot(a, b, preferred_element_type=jnp.float32)
