"""The four kernels of `gpu.py` compute the output and the gradients of queries, of own keys and values, and of slots.

Own keys are those of the rows themselves. A program owns one block of its result and loops over what that depends on:
for a block of queries of one head, the blocks of slots that the head has and the own keys that it sees; for a block of
own keys, the queries that see it; for a block of slots, all queries of some rows. Every sum stays in registers, in
float32 and in a fixed order: nothing is added atomically.
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

MIN_PROGRAMS = 256  # so that every multiprocessor of a large GPU has work


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """How many queries of one head and how many keys a block has, both powers of two."""

    queries: int
    keys: int
    warps: int = 4
    interpret: bool = False  # interpreted, the kernels run on every platform


class Inputs(NamedTuple):
    """The arguments of attention, padded to whole blocks; the queries are scaled."""

    q: Float[Array, "b t n h"]
    k: Float[Array, "b t k h"]
    v: Float[Array, "b t k h"]
    slot_k: Float[Array, "p k h"]
    slot_v: Float[Array, "p k h"]
    bias: Float[Array, "k p"]
    lengths: Int[Array, " k"]  # how many slots a head has
    first_key: Int[Array, "b t"]  # of each query, the first key it sees
    last_query: Int[Array, "b t"]  # of each key, the last query that sees it


def attend(
    sizes: BlockSizes, inputs: Inputs
) -> tuple[Float[Array, "b t n h"], Float[Array, "b n t"], Float[Array, "b n t"]]:
    """Computes the output and, for each query, the softmax's maximum and its denominator relative to that."""
    b, t, n, _ = inputs.q.shape
    stats = jax.ShapeDtypeStruct((b, n, t), jnp.float32)
    o, running_max, denominator = _over_keys(_attend_kernel, sizes, inputs, [], [inputs.q, stats, stats])
    return o, running_max, denominator


def query_gradient(
    sizes: BlockSizes,
    inputs: Inputs,
    do: Float[Array, "b t n h"],
    running_max: Float[Array, "b n t"],
    delta: Float[Array, "b n t"],
) -> Float[Array, "b t n h"]:
    """Computes the gradient of q.

    Args:
      do: the output's gradient divided by the denominators, here and in the functions below.
      running_max: the maximum of each query's scores.
      delta: the product of each query's o and do.
    """
    return _over_keys(_query_gradient_kernel, sizes, inputs, [do, running_max, delta], [inputs.q])[0]


def own_gradients(
    sizes: BlockSizes, inputs: Inputs, do: Array, running_max: Array, delta: Array
) -> tuple[Float[Array, "b t k h"], Float[Array, "b t k h"]]:
    """Computes the gradients of k and v."""
    b, t, n, h = inputs.q.shape
    kv_heads = inputs.k.shape[2]
    g = n // kv_heads
    of_q = pl.BlockSpec((None, t, g, h), lambda j, head, row: (row, 0, head, 0))
    of_k = pl.BlockSpec((None, sizes.keys, None, h), lambda j, head, row: (row, j, head, 0))
    of_last_query = pl.BlockSpec((None, sizes.keys), lambda j, head, row: (row, j))
    of_stats = pl.BlockSpec((None, g, t), lambda j, head, row: (row, head, 0))
    return pl.pallas_call(
        functools.partial(_own_gradients_kernel, sizes),
        [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (inputs.k, inputs.v)],
        grid=(t // sizes.keys, kv_heads, b),
        in_specs=[of_q, of_k, of_k, of_last_query, of_q, of_stats, of_stats],
        out_specs=[of_k, of_k],
        **_options(sizes),
    )(inputs.q, inputs.k, inputs.v, inputs.last_query, do, running_max, delta)


def slot_gradients(
    sizes: BlockSizes, inputs: Inputs, do: Array, running_max: Array, delta: Array
) -> tuple[Float[Array, "p k h"], Float[Array, "p k h"], Float[Array, "k p"]]:
    """Computes the gradients of the slots' keys, values and bias in float32.

    A program adds up as many rows of the batch as still leave `MIN_PROGRAMS`; one sum over the programs follows.
    """
    b, t, n, h = inputs.q.shape
    p, kv_heads, _ = inputs.slot_k.shape
    if not p:
        return jnp.zeros((0, kv_heads, h)), jnp.zeros((0, kv_heads, h)), jnp.zeros((kv_heads, 0))
    rows = -(-b // min(b, -(-MIN_PROGRAMS * sizes.keys // (p * kv_heads))))
    parts = -(-b // rows)
    g = n // kv_heads
    of_q = pl.BlockSpec((b, t, g, h), lambda j, head, part: (0, 0, head, 0))
    of_slots = pl.BlockSpec((sizes.keys, None, h), lambda j, head, part: (j, head, 0))
    of_bias = pl.BlockSpec((None, sizes.keys), lambda j, head, part: (head, j))
    of_length = pl.BlockSpec((None,), lambda j, head, part: (head,))
    of_stats = pl.BlockSpec((b, g, t), lambda j, head, part: (0, head, 0))
    of_sums = pl.BlockSpec((None, sizes.keys, None, h), lambda j, head, part: (part, j, head, 0))
    of_bias_sums = pl.BlockSpec((None, None, sizes.keys), lambda j, head, part: (part, head, j))
    outputs = (inputs.slot_k, inputs.slot_v, inputs.bias)
    sums = pl.pallas_call(
        functools.partial(_slot_gradients_kernel, sizes, rows),
        [jax.ShapeDtypeStruct((parts, *a.shape), jnp.float32) for a in outputs],
        grid=(p // sizes.keys, kv_heads, parts),
        in_specs=[of_q, of_slots, of_slots, of_bias, of_length, of_q, of_stats, of_stats],
        out_specs=[of_sums, of_sums, of_bias_sums],
        **_options(sizes),
    )(inputs.q, *outputs, inputs.lengths, do, running_max, delta)
    return tuple(a.sum(0) for a in sums)


def _over_keys(
    kernel: Callable[..., None], sizes: BlockSizes, inputs: Inputs, of_queries: Sequence[Array], outputs: Sequence[Any]
) -> Sequence[Array]:
    """Runs a kernel for each block of queries of each head."""
    b, t, n, h = inputs.q.shape
    p, kv_heads, _ = inputs.slot_k.shape
    slots = (inputs.slot_k, inputs.slot_v, inputs.bias)
    if not p:  # no argument may be empty: a block that no loop visits
        slot_pkh = jnp.zeros((sizes.keys, kv_heads, h), inputs.k.dtype)
        slots = slot_pkh, slot_pkh, jnp.zeros((kv_heads, sizes.keys))
    g = n // kv_heads
    of_q = pl.BlockSpec((None, sizes.queries, None, h), lambda i, head, row: (row, i, head, 0))
    of_k = pl.BlockSpec((None, t, None, h), lambda i, head, row: (row, 0, jax.lax.div(head, g), 0))
    of_slots = pl.BlockSpec((max(p, sizes.keys), None, h), lambda i, head, row: (0, jax.lax.div(head, g), 0))
    of_bias = pl.BlockSpec((None, max(p, sizes.keys)), lambda i, head, row: (jax.lax.div(head, g), 0))
    of_length = pl.BlockSpec((None,), lambda i, head, row: (jax.lax.div(head, g),))
    of_first_key = pl.BlockSpec((None, sizes.queries), lambda i, head, row: (row, i))
    of_stats = pl.BlockSpec((None, None, sizes.queries), lambda i, head, row: (row, head, i))
    per_query = [of_q, of_stats, of_stats]
    return pl.pallas_call(
        functools.partial(kernel, sizes),
        [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in outputs],
        grid=(t // sizes.queries, n, b),
        in_specs=[
            *[of_q, of_k, of_k, of_slots, of_slots, of_bias, of_length, of_first_key],
            *per_query[: len(of_queries)],
        ],
        out_specs=per_query[: len(outputs)],
        **_options(sizes),
    )(inputs.q, inputs.k, inputs.v, *slots, inputs.lengths, inputs.first_key, *of_queries)


def _options(sizes: BlockSizes) -> dict[str, Any]:
    return {"compiler_params": plgpu.CompilerParams(num_warps=sizes.warps, num_stages=2), "interpret": sizes.interpret}


def _attend_kernel(sizes: BlockSizes, *refs: Any) -> None:
    q_ref, *key_refs, o_ref, running_max_ref, denominator_ref = refs
    q_qh = q_ref[...]

    def visit(carry: Any, scores_qs: Array, k_sh: Array, v_sh: Array) -> Any:
        running_max_q, denominator_q, o_qh = carry
        new_max_q = jnp.maximum(running_max_q, scores_qs.max(1))
        probs_qs = jnp.exp(scores_qs - new_max_q[:, None])
        rescale_q = jnp.exp(running_max_q - new_max_q)
        o_qh = o_qh * rescale_q[:, None] + _dot(probs_qs.astype(v_sh.dtype), v_sh)
        return new_max_q, denominator_q * rescale_q + probs_qs.sum(1), o_qh

    zeros_q = jnp.zeros(sizes.queries, jnp.float32)
    carry = zeros_q + MASKED, zeros_q, jnp.zeros(q_qh.shape, jnp.float32)
    running_max_q, denominator_q, o_qh = _visit_keys(sizes, q_qh, key_refs, visit, carry)
    o_ref[...] = (o_qh / denominator_q[:, None]).astype(o_ref.dtype)
    running_max_ref[...], denominator_ref[...] = running_max_q, denominator_q


def _query_gradient_kernel(sizes: BlockSizes, *refs: Any) -> None:
    q_ref, *key_refs, do_ref, running_max_ref, delta_ref, dq_ref = refs
    q_qh, do_qh, running_max_q, delta_q = q_ref[...], do_ref[...], running_max_ref[...], delta_ref[...]

    def visit(dq_qh: Array, scores_qs: Array, k_sh: Array, v_sh: Array) -> Array:
        probs_qs = jnp.exp(scores_qs - running_max_q[:, None])
        d_scores_qs = probs_qs * (_dot(do_qh, v_sh.T) - delta_q[:, None])
        return dq_qh + _dot(d_scores_qs.astype(k_sh.dtype), k_sh)

    dq_qh = _visit_keys(sizes, q_qh, key_refs, visit, jnp.zeros(q_qh.shape, jnp.float32))
    dq_ref[...] = dq_qh.astype(dq_ref.dtype)


def _visit_keys(sizes: BlockSizes, q_qh: Array, refs: Sequence[Any], visit: Callable[..., Any], carry: Any) -> Any:
    """Folds `visit(carry, scores, keys, values)` over the slots, then over the own keys that the block sees."""
    k_ref, v_ref, slot_k_ref, slot_v_ref, bias_ref, length_ref, first_key_ref = refs
    start, first_key_q = pl.program_id(0) * sizes.queries, first_key_ref[...]
    query_q = start + jnp.arange(sizes.queries)

    def slots(j: Array, carry: Any) -> Any:
        at = pl.ds(j * sizes.keys, sizes.keys)
        k_sh = slot_k_ref[at]
        return visit(carry, _dot(q_qh, k_sh.T) + bias_ref[at], k_sh, slot_v_ref[at])

    def own(j: Array, carry: Any) -> Any:
        at = pl.ds(j * sizes.keys, sizes.keys)
        k_sh, v_sh = k_ref[at], v_ref[at]
        key_s = j * sizes.keys + jnp.arange(sizes.keys)
        seen_qs = (key_s >= first_key_q[:, None]) & (key_s <= query_q[:, None])
        return visit(carry, jnp.where(seen_qs, _dot(q_qh, k_sh.T), MASKED), k_sh, v_sh)

    carry = jax.lax.fori_loop(0, pl.cdiv(length_ref[...], sizes.keys), slots, carry)
    blocks = jax.lax.div(first_key_q.min(), sizes.keys), jax.lax.div(start + sizes.queries - 1, sizes.keys) + 1
    return jax.lax.fori_loop(*blocks, own, carry)


def _own_gradients_kernel(sizes: BlockSizes, *refs: Any) -> None:
    q_ref, k_ref, v_ref, last_query_ref, do_ref, running_max_ref, delta_ref, dk_ref, dv_ref = refs
    k_sh, v_sh, last_query_s = k_ref[...], v_ref[...], last_query_ref[...]
    g = q_ref.shape[1]
    start = pl.program_id(0) * sizes.keys
    key_s = start + jnp.arange(sizes.keys)

    def visit(step: Array, carry: Any) -> Any:
        i, head = jax.lax.div(step, g), jax.lax.rem(step, g)
        at = pl.ds(i * sizes.queries, sizes.queries)
        q_qh, do_qh = q_ref[at, head], do_ref[at, head]
        query_q = i * sizes.queries + jnp.arange(sizes.queries)
        seen_sq = (query_q >= key_s[:, None]) & (query_q <= last_query_s[:, None])
        scores_sq = jnp.where(seen_sq, _dot(k_sh, q_qh.T), MASKED)
        dk, dv, _ = _key_gradients(scores_sq, v_sh, q_qh, do_qh, running_max_ref[head, at], delta_ref[head, at])
        return carry[0] + dk, carry[1] + dv

    zeros_sh = jnp.zeros(k_sh.shape, jnp.float32)
    steps = jax.lax.div(start, sizes.queries) * g, (jax.lax.div(last_query_s.max(), sizes.queries) + 1) * g
    dk_sh, dv_sh = jax.lax.fori_loop(*steps, visit, (zeros_sh, zeros_sh))
    dk_ref[...], dv_ref[...] = dk_sh.astype(dk_ref.dtype), dv_sh.astype(dv_ref.dtype)


def _slot_gradients_kernel(sizes: BlockSizes, rows: int, *refs: Any) -> None:
    q_ref, k_ref, v_ref, bias_ref, length_ref, do_ref, running_max_ref, delta_ref, dk_ref, dv_ref, d_bias_ref = refs
    b, t, g, _ = q_ref.shape
    blocks = t // sizes.queries
    first = pl.program_id(2) * rows
    k_sh, v_sh, bias_s = k_ref[...], v_ref[...], bias_ref[...]

    def visit(step: Array, carry: Any) -> Any:
        head, i = jax.lax.rem(step, g), jax.lax.rem(jax.lax.div(step, g), blocks)
        row, at = first + jax.lax.div(step, g * blocks), pl.ds(i * sizes.queries, sizes.queries)
        q_qh, do_qh = q_ref[row, at, head], do_ref[row, at, head]
        scores_sq = _dot(k_sh, q_qh.T) + bias_s[:, None]
        found = _key_gradients(scores_sq, v_sh, q_qh, do_qh, running_max_ref[row, head, at], delta_ref[row, head, at])
        return tuple(a + b for a, b in zip(carry, found, strict=True))

    zeros_sh = jnp.zeros(k_sh.shape, jnp.float32)
    is_empty = pl.program_id(0) * sizes.keys >= length_ref[...]
    steps = jnp.where(is_empty, 0, jnp.minimum(rows, b - first) * blocks * g)
    carry = zeros_sh, zeros_sh, jnp.zeros(sizes.keys, jnp.float32)
    dk_ref[...], dv_ref[...], d_bias_ref[...] = jax.lax.fori_loop(0, steps, visit, carry)


def _key_gradients(
    scores_sq: Array, v_sh: Array, q_qh: Array, do_qh: Array, running_max_q: Array, delta_q: Array
) -> tuple[Float[Array, "s h"], Float[Array, "s h"], Float[Array, " s"]]:
    """Computes what a block of queries of one head adds to the gradients of keys, values and bias."""
    probs_sq = jnp.exp(scores_sq - running_max_q)
    d_scores_sq = probs_sq * (_dot(v_sh, do_qh.T) - delta_q)
    dk_sh = _dot(d_scores_sq.astype(q_qh.dtype), q_qh)
    return dk_sh, _dot(probs_sq.astype(do_qh.dtype), do_qh), d_scores_sq.sum(1)


def _dot(a: Array, b: Array) -> Array:
    return jnp.dot(a, b, preferred_element_type=jnp.float32)
