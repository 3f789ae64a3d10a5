"""`prefix_attention` in plain XLA: an online softmax over blocks. CPUs use it, and every platform falls back on it.

A block of queries visits the slots, then the blocks of keys that hold its own segments; no array is larger than the
scores of one block. The backward pass computes a block's probabilities again from the saved maximum and denominator
(FlashAttention-2, arXiv 2307.08691, saves their log-sum-exp, whose rounding in float32 shifts all probabilities of a
query). The slots are held once, in float32; so is their gradient, added up block after block in a fixed order.

The kv heads of a row are computed together, since they have as many slots each. Heads that have `lengths` of their own
are computed one after the other, and each visits the blocks of slots that it has.

Axis letters beyond the usual ones: x the rows, or each head of each row; k the kv heads that are computed together;
m the queries of a block times the g heads that share their keys; c blocks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from cartridges_jax.kernels.prefix_attention.blockwise import MASKED, first_key, soft_capped

BLOCK = 256  # how many queries a block has, and how many keys of their rows
SLOT_BLOCK = 256  # how many slots: SmolLM2's float32 scores of a block are then 256 x 3 x 256, 0.8 MB, for each kv head
# if heads have lengths of their own: blocks of the first size while they are full, then one that just holds the rest
RAGGED_SLOT_BLOCKS = 192, 128, 96, 64, 32, 16


class Inputs(NamedTuple):
    """The arguments of attention; the queries are scaled."""

    q: Float[Array, "x c k m h"]
    k: Float[Array, "x k t h"]
    v: Float[Array, "x k t h"]
    slot_k: Float[Array, "kv p h"]
    slot_v: Float[Array, "kv p h"]
    bias: Float[Array, "kv p"]
    first_key: Int[Array, "x t"]  # of each query, the first key it sees
    head: Int[Array, " x"]  # the first of the kv heads
    length: Int[Array, " x"] | None  # how many slots they have; None means all p
    sinks: Float[Array, "x k m"] | None


class SlotBlock(NamedTuple):
    """The slots from `start` on, `size` of them, of `num_heads` heads from `head` on.

    These have `length` slots; None means all p.
    """

    start: Array
    size: int
    head: Array
    num_heads: int
    length: Array | None

    def begin(self, p: int) -> Array:
        """Gives where the block is read: it overlaps the one before if it would reach beyond all p slots."""
        return jnp.minimum(self.start, p - self.size)

    def of(self, a: Float[Array, "kv p ..."]) -> Float[Array, "k s ..."]:
        rest = a.shape[2:]
        sizes = self.num_heads, self.size, *rest
        return jax.lax.dynamic_slice(a, (self.head, self.begin(a.shape[1]), *[0] * len(rest)), sizes)

    def added_to(self, a: Float[Array, "kv p ..."], b: Float[Array, "k s ..."]) -> Float[Array, "kv p ..."]:
        at = self.head, self.begin(a.shape[1]), *[0] * (a.ndim - 2)
        return jax.lax.dynamic_update_slice(a, self.of(a) + b, at)


def xla_attention(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b t k h"],
    v: Float[Array, "b t k h"],
    prefix_k: Float[Array, "p k h"],
    prefix_v: Float[Array, "p k h"],
    segment_ids: Int[Array, "b t"],
    bias: Float[Array, "p k"] | None,
    lengths: Int[Array, " k"] | None,
    window: int | Array | None,
    scale: float | Array,
    soft_cap: float | None,
    sinks: Float[Array, " n"] | None,
) -> Float[Array, "b t n h"]:
    b, t, n, h = q.shape
    p, kv_heads, _ = prefix_k.shape
    g, c = n // kv_heads, -(-t // BLOCK)
    size = -(-t // c)
    padding = c * size - t
    q, k, v = (jnp.pad(a, ((0, 0), (0, padding), (0, 0), (0, 0))) for a in (q, k, v))
    first_bt = first_key(jnp.pad(segment_ids, ((0, 0), (0, padding))), window)
    together = kv_heads if lengths is None else 1
    parts = kv_heads // together  # of a row
    q_bcspkgh = (q * scale).astype(q.dtype).reshape(b, c, size, parts, together, g, h)
    q_xckmh = q_bcspkgh.transpose(0, 3, 1, 4, 2, 5, 6).reshape(b * parts, c, together, size * g, h)
    k_xkth, v_xkth = (a.transpose(0, 2, 1, 3).reshape(b * parts, together, -1, h) for a in (k, v))
    bias_kp = jnp.zeros((kv_heads, p)) if bias is None else bias.astype(jnp.float32).T
    inputs = Inputs(
        q_xckmh,
        k_xkth,
        v_xkth,
        prefix_k.swapaxes(0, 1),
        prefix_v.swapaxes(0, 1),
        bias_kp,
        jnp.repeat(first_bt, parts, axis=0),
        head=jnp.tile(jnp.arange(0, kv_heads, together), b),
        length=None if lengths is None else jnp.tile(lengths, b),
        sinks=None if sinks is None else jnp.tile(sinks.astype(jnp.float32).reshape(parts, together, g), (b, 1, size)),
    )
    o_xckmh = _attention(soft_cap, _slot_block_sizes(p, lengths is not None), inputs)
    o_bcspkgh = o_xckmh.reshape(b, parts, c, together, size, g, h).transpose(0, 2, 4, 1, 3, 5, 6)
    return o_bcspkgh.reshape(b, t + padding, n, h)[:, :t]


def _slot_block_sizes(p: int, is_ragged: bool) -> tuple[int, ...]:
    """Gives the sizes that a block of slots can have, the largest first: only one, if all heads have p slots."""
    if not p:
        return ()
    if not is_ragged:
        return (-(-p // -(-p // SLOT_BLOCK)),)
    return min(p, RAGGED_SLOT_BLOCKS[0]), *(size for size in RAGGED_SLOT_BLOCKS[1:] if size < p)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(soft_cap: float | None, slot_sizes: tuple[int, ...], inputs: Inputs) -> Float[Array, "x c k m h"]:
    return _forward(soft_cap, slot_sizes, inputs)[0]


def _forward(
    soft_cap: float | None, slot_sizes: tuple[int, ...], inputs: Inputs
) -> tuple[Float[Array, "x c k m h"], Any]:
    q, k, v, slot_k, slot_v, bias, *of_rows = inputs
    size = k.shape[2] // q.shape[1]
    all_slots = slot_k.astype(k.dtype), slot_v.astype(v.dtype), bias

    def row(_: None, inputs: Any) -> tuple[None, Any]:
        q_ckmh, k_kth, v_kth, first_t, head, length, sinks_km = inputs

        def block(_: None, inputs: Any) -> tuple[None, Any]:
            q_kmh, i = inputs

            def visit(carry: Any, k_ksh: Array, v_ksh: Array, mask: Any) -> Any:
                """Adds one block of keys to the softmax; `mask` adds a bias to its scores or hides some of them."""
                running_max_km, denominator_km, o_kmh = carry
                scores_kms = mask(soft_capped(_einsum("kmh,ksh->kms", q_kmh, k_ksh), soft_cap))
                new_max_km = jnp.maximum(running_max_km, scores_kms.max(-1, initial=MASKED))
                probs_kms = jnp.exp(scores_kms - new_max_km[..., None])
                rescale_km = jnp.exp(running_max_km - new_max_km)
                o_kmh = o_kmh * rescale_km[..., None] + _einsum("kms,ksh->kmh", probs_kms.astype(v.dtype), v_ksh)
                return new_max_km, denominator_km * rescale_km + probs_kms.sum(-1), o_kmh

            def slots(size: int, start: Array, carry: Any) -> Any:
                at = SlotBlock(start, size, head, q.shape[2], length)
                k_ksh, v_ksh, bias_ks = _slots(all_slots, at)
                return visit(carry, k_ksh, v_ksh, lambda scores: scores + bias_ks[:, None])

            def own(j: Array, carry: Any) -> Any:
                hidden_ms = _hidden_keys(first_t, i, j, size, q_kmh.shape[1])
                k_ksh, v_ksh = _block(k_kth, j, size), _block(v_kth, j, size)
                return visit(carry, k_ksh, v_ksh, lambda scores: jnp.where(hidden_ms, MASKED, scores))

            zeros_km = jnp.zeros(q_kmh.shape[:2])
            # a sink is a key without a value, from which the softmax starts
            start = (zeros_km + MASKED, zeros_km) if sinks_km is None else (sinks_km, zeros_km + 1)
            carry = _over_slots(slot_sizes, slot_k.shape[1], length, slots, (*start, jnp.zeros(q_kmh.shape)))
            running_max_km, denominator_km, o_kmh = jax.lax.fori_loop(first_t[i * size] // size, i + 1, own, carry)
            return None, ((o_kmh / denominator_km[..., None]).astype(q.dtype), running_max_km, denominator_km)

        return None, jax.lax.scan(block, None, (q_ckmh, jnp.arange(q.shape[1])))[1]

    results = jax.lax.scan(row, None, (q, k, v, *of_rows))[1]
    o, running_max, denominator = (checkpoint_name(a, "attention") for a in results)
    return o, (inputs, o, running_max, denominator)


def _backward(
    soft_cap: float | None, slot_sizes: tuple[int, ...], saved: Any, do: Float[Array, "x c k m h"]
) -> tuple[Inputs]:
    inputs, o, running_max, denominator = saved
    q, k, v, slot_k, slot_v, bias, first, heads, lengths, _ = inputs
    size = k.shape[2] // q.shape[1]
    all_slots = slot_k.astype(k.dtype), slot_v.astype(v.dtype), bias
    zeros = functools.partial(jnp.zeros, dtype=jnp.float32)

    def row(d_slots: Any, inputs: Any) -> tuple[Any, Any]:
        q_ckmh, k_kth, v_kth, first_t, head, length, *saved_c = inputs

        def block(carry: Any, inputs: Any) -> tuple[Any, Array]:
            q_kmh, i, o_kmh, do_kmh, running_max_km, denominator_km = inputs
            # the probabilities below lack their denominator: dividing the gradient of o once makes up for it
            do_kmh = do_kmh.astype(jnp.float32) / denominator_km[..., None]
            delta_km = (o_kmh.astype(jnp.float32) * do_kmh).sum(-1)
            do_kmh = do_kmh.astype(do.dtype)

            def visit(k_ksh: Array, v_ksh: Array, mask: Any) -> tuple[Array, Array, Array, Array]:
                """Computes the gradients of a block's keys and values, its part of the queries', and the scores'."""
                # scores lie as [s, m]: both gradients of the keys' side are then plain matrix products
                capped_ksm = soft_capped(_einsum("ksh,kmh->ksm", k_ksh, q_kmh), soft_cap)
                probs_ksm = jnp.exp(mask(capped_ksm) - running_max_km[:, None])
                d_scores_ksm = probs_ksm * (_einsum("ksh,kmh->ksm", v_ksh, do_kmh) - delta_km[:, None])
                dv_ksh = _einsum("ksm,kmh->ksh", probs_ksm.astype(do.dtype), do_kmh)
                d_products_ksm = d_scores_ksm
                if soft_cap is not None:
                    d_products_ksm = d_scores_ksm * (1 - (capped_ksm / soft_cap) ** 2)
                dk_ksh = _einsum("ksm,kmh->ksh", d_products_ksm.astype(q.dtype), q_kmh)
                dq_khm = _einsum("khs,ksm->khm", k_ksh.transpose(0, 2, 1), d_products_ksm.astype(k.dtype))
                return dk_ksh, dv_ksh, dq_khm, d_scores_ksm

            def slots(size: int, start: Array, carry: Any) -> Any:
                dq_khm, *sums = carry
                at = SlotBlock(start, size, head, q.shape[2], length)
                k_ksh, v_ksh, bias_ks = _slots(all_slots, at)
                dk, dv, dq, ds = visit(k_ksh, v_ksh, lambda scores: scores + bias_ks[..., None])
                found = dk, dv, ds.sum(-1)
                return dq_khm + dq, *(at.added_to(*pair) for pair in zip(sums, found, strict=True))

            def own(j: Array, carry: Any) -> Any:
                dq_khm, dk_kth, dv_kth = carry
                hidden_sm = _hidden_keys(first_t, i, j, size, q_kmh.shape[1]).T
                k_ksh, v_ksh = _block(k_kth, j, size), _block(v_kth, j, size)
                dk, dv, dq, _ = visit(k_ksh, v_ksh, lambda scores: jnp.where(hidden_sm, MASKED, scores))
                return dq_khm + dq, _add_to_block(dk_kth, dk, j, size), _add_to_block(dv_kth, dv, j, size)

            dk_kth, dv_kth, *d_slots = carry
            dq_khm = zeros((q.shape[2], q.shape[4], q.shape[3]))
            dq_khm, *d_slots = _over_slots(slot_sizes, slot_k.shape[1], length, slots, (dq_khm, *d_slots))
            dq_khm, dk_kth, dv_kth = jax.lax.fori_loop(first_t[i * size] // size, i + 1, own, (dq_khm, dk_kth, dv_kth))
            return (dk_kth, dv_kth, *d_slots), dq_khm.transpose(0, 2, 1).astype(q.dtype)

        carry = (zeros(k_kth.shape), zeros(v_kth.shape), *d_slots)
        steps = (q_ckmh, jnp.arange(q.shape[1]), *saved_c)
        (dk_kth, dv_kth, *d_slots), dq_ckmh = jax.lax.scan(block, carry, steps)
        return tuple(d_slots), (dq_ckmh, dk_kth.astype(k.dtype), dv_kth.astype(v.dtype))

    d_slots = zeros(slot_k.shape), zeros(slot_v.shape), zeros(bias.shape)
    rows = (q, k, v, first, heads, lengths, o, do, running_max, denominator)
    (d_slot_k, d_slot_v, d_bias), d_rows = jax.lax.scan(row, d_slots, rows)
    d_slots = d_slot_k.astype(slot_k.dtype), d_slot_v.astype(slot_v.dtype), d_bias
    return (Inputs(*d_rows, *d_slots, None, None, None, None),)


_attention.defvjp(_forward, _backward)


def _einsum(spec: str, a: Array, b: Array) -> Array:
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


def _over_slots(sizes: Sequence[int], p: int, length: Array | None, visit: Callable[..., Any], carry: Any) -> Any:
    """Folds `visit(size, start, carry)` over blocks that hold the first `length` of p slots."""
    if not sizes:
        return carry

    def step(size: int, first: Array | int, i: Array, carry: Any) -> Any:
        return visit(size, first + i * size, carry)

    if length is None:  # a number of blocks that the compiler knows
        return jax.lax.fori_loop(0, -(-p // sizes[0]), functools.partial(step, sizes[0], 0), carry)
    largest = sizes[0]
    rest = length % largest
    for size, smaller in zip(sizes, (*sizes[1:], 0), strict=True):
        first, count = length - rest, ((smaller < rest) & (rest <= size)).astype(jnp.int32)
        if size == largest:
            first, count = 0, length // largest + count
        carry = jax.lax.fori_loop(0, count, functools.partial(step, size, first), carry)
    return carry


def _slots(slots: tuple[Array, Array, Array], block: SlotBlock) -> tuple[Array, Array, Array]:
    """Gives the keys [k,s,h], values [k,s,h] and bias [k,s] of a block, with what is no slot of it hidden."""
    p = slots[0].shape[1]
    k_ksh, v_ksh, bias_ks = map(block.of, slots)
    if block.length is None and p % block.size == 0:
        return k_ksh, v_ksh, bias_ks
    index_s = block.begin(p) + jnp.arange(block.size)
    is_slot_s = index_s >= block.start
    if block.length is not None:
        is_slot_s &= index_s < block.length
    k_ksh, v_ksh = (jnp.where(is_slot_s[:, None], a_ksh, 0) for a_ksh in (k_ksh, v_ksh))
    return k_ksh, v_ksh, jnp.where(is_slot_s, bias_ks, MASKED)


def _hidden_keys(first: Int[Array, " t"], i: Array, j: Array, size: int, m: int) -> Array:
    """Gives as [m, s] which keys of block j the queries of block i do not see."""
    within = jnp.arange(size)
    query_m, key_s = jnp.repeat(i * size + within, m // size), j * size + within
    return (key_s > query_m[:, None]) | (key_s < first[query_m][:, None])


def _block(a_kth: Array, j: Array, size: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(a_kth, j * size, size, axis=1)


def _add_to_block(a_kth: Array, b_ksh: Array, j: Array, size: int) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(a_kth, _block(a_kth, j, size) + b_ksh, j * size, axis=1)
