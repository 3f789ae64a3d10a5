"""`prefix_attention` in plain XLA: an online softmax over blocks. CPUs use it, and every platform falls back on it.

A block of queries visits the slots, then the blocks of keys that hold its own segments; no array is larger than the
scores of one block. The backward pass computes a block's probabilities again from the saved maximum and denominator
(FlashAttention-2, arXiv 2307.08691, saves their log-sum-exp, whose rounding in float32 shifts all probabilities of a
query). The slots are held once, in float32; so is their gradient, added up block after block in a fixed order.

Axis letters beyond the usual ones: m the queries of a block times the g heads that share their keys, c blocks.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from cartridges_jax.kernels.prefix_attention.blockwise import MASKED, first_key, soft_capped

BLOCK = 256  # how many queries a block has, and how many keys of their rows
SLOT_BLOCK = 512  # how many slots: SmolLM2's float32 scores of a block are then 256 x 3 x 512, 1.5 MB, for each kv head


def xla_attention(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b t k h"],
    v: Float[Array, "b t k h"],
    prefix_k: Float[Array, "p k h"],
    prefix_v: Float[Array, "p k h"],
    segment_ids: Int[Array, "b t"],
    bias: Float[Array, "p k"] | None,
    window: int | Array | None,
    scale: float | Array,
    soft_cap: float | None,
    sinks: Float[Array, " n"] | None,
) -> Float[Array, "b t n h"]:
    b, t, n, h = q.shape
    kv_heads = k.shape[2]
    c = -(-t // BLOCK)
    size = -(-t // c)
    padding = c * size - t
    q, k, v = (jnp.pad(a, ((0, 0), (0, padding), (0, 0), (0, 0))) for a in (q, k, v))
    first_bt = first_key(jnp.pad(segment_ids, ((0, 0), (0, padding))), window)
    g = n // kv_heads
    q_bckmh = (q * scale).astype(q.dtype).reshape(b, c, size, kv_heads, g, h).transpose(0, 1, 3, 2, 4, 5)
    q_bckmh = q_bckmh.reshape(b, c, kv_heads, size * g, h)
    k_bkth, v_bkth = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    slots = _slot_blocks(prefix_k, prefix_v, bias)
    sinks_km = None if sinks is None else jnp.tile(sinks.astype(jnp.float32).reshape(kv_heads, g), (1, size))
    o_bckmh = _attention(soft_cap, q_bckmh, k_bkth, v_bkth, *slots, first_bt, sinks_km)
    o = o_bckmh.reshape(b, c, kv_heads, size, g, h).transpose(0, 1, 3, 2, 4, 5).reshape(b, t + padding, n, h)
    return o[:, :t]


def _slot_blocks(
    prefix_k: Float[Array, "p k h"], prefix_v: Float[Array, "p k h"], bias: Float[Array, "p k"] | None
) -> tuple[Float[Array, "c k s h"], Float[Array, "c k s h"], Float[Array, "c k s"]]:
    """Cuts the slots into equal blocks; those that fill up the last one get a bias that hides them."""
    p, kv_heads, h = prefix_k.shape
    blocks = -(-p // SLOT_BLOCK)
    size = -(-p // max(blocks, 1))
    padding = blocks * size - p
    bias = jnp.zeros((p, kv_heads)) if bias is None else bias
    bias_ck = jnp.pad(bias.astype(jnp.float32), ((0, padding), (0, 0)), constant_values=MASKED)
    k, v = (jnp.pad(a, ((0, padding), (0, 0), (0, 0))) for a in (prefix_k, prefix_v))
    k_cksh, v_cksh = (a.reshape(blocks, size, kv_heads, h).transpose(0, 2, 1, 3) for a in (k, v))
    return k_cksh, v_cksh, bias_ck.reshape(blocks, size, kv_heads).transpose(0, 2, 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(soft_cap: float | None, *inputs: Array | None) -> Array:
    return _forward(soft_cap, *inputs)[0]


def _forward(
    soft_cap: float | None,
    q: Float[Array, "b c k m h"],
    k: Float[Array, "b k t h"],
    v: Float[Array, "b k t h"],
    slot_k: Float[Array, "c k s h"],
    slot_v: Float[Array, "c k s h"],
    bias: Float[Array, "c k s"],
    first: Int[Array, "b t"],
    sinks: Float[Array, "k m"] | None,
) -> tuple[Float[Array, "b c k m h"], Any]:
    size = k.shape[2] // q.shape[1]
    slot_blocks = slot_k.astype(k.dtype), slot_v.astype(v.dtype), bias

    def row(_: None, inputs: Any) -> tuple[None, Any]:
        q_ckmh, k_kth, v_kth, first_t = inputs

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

            def slots(carry: Any, block: Any) -> tuple[Any, None]:
                slot_k_ksh, slot_v_ksh, bias_ks = block
                return visit(carry, slot_k_ksh, slot_v_ksh, lambda scores: scores + bias_ks[:, None]), None

            def own(j: Array, carry: Any) -> Any:
                hidden_ms = _hidden_keys(first_t, i, j, size, q_kmh.shape[1])
                k_ksh, v_ksh = _block(k_kth, j, size), _block(v_kth, j, size)
                return visit(carry, k_ksh, v_ksh, lambda scores: jnp.where(hidden_ms, MASKED, scores))

            zeros_km = jnp.zeros(q_kmh.shape[:2])
            # a sink is a key without a value, from which the softmax starts
            start = (zeros_km + MASKED, zeros_km) if sinks is None else (sinks, zeros_km + 1)
            carry = (*start, jnp.zeros(q_kmh.shape))
            carry, _ = jax.lax.scan(slots, carry, slot_blocks)
            running_max_km, denominator_km, o_kmh = jax.lax.fori_loop(first_t[i * size] // size, i + 1, own, carry)
            return None, ((o_kmh / denominator_km[..., None]).astype(q.dtype), running_max_km, denominator_km)

        return None, jax.lax.scan(block, None, (q_ckmh, jnp.arange(q.shape[1])))[1]

    results = jax.lax.scan(row, None, (q, k, v, first))[1]
    o, running_max, denominator = (checkpoint_name(a, "attention") for a in results)
    return o, (q, k, v, slot_k, slot_v, bias, first, o, running_max, denominator)


def _backward(soft_cap: float | None, saved: Any, do: Float[Array, "b c k m h"]) -> tuple[Array | None, ...]:
    q, k, v, slot_k, slot_v, bias, first, o, running_max, denominator = saved
    size = k.shape[2] // q.shape[1]
    slot_blocks = slot_k.astype(k.dtype), slot_v.astype(v.dtype), bias
    zeros = functools.partial(jnp.zeros, dtype=jnp.float32)

    def row(d_slots: Any, inputs: Any) -> tuple[Any, Any]:
        q_ckmh, k_kth, v_kth, first_t, *saved_c = inputs

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

            def slots(dq_khm: Array, block: Any) -> tuple[Array, Any]:
                slot_k_ksh, slot_v_ksh, bias_ks, *sums = block
                dk, dv, dq, ds = visit(slot_k_ksh, slot_v_ksh, lambda scores: scores + bias_ks[..., None])
                return dq_khm + dq, tuple(a + b for a, b in zip(sums, (dk, dv, ds.sum(-1)), strict=True))

            def own(j: Array, carry: Any) -> Any:
                dq_khm, dk_kth, dv_kth = carry
                hidden_sm = _hidden_keys(first_t, i, j, size, q_kmh.shape[1]).T
                k_ksh, v_ksh = _block(k_kth, j, size), _block(v_kth, j, size)
                dk, dv, dq, _ = visit(k_ksh, v_ksh, lambda scores: jnp.where(hidden_sm, MASKED, scores))
                return dq_khm + dq, _add_to_block(dk_kth, dk, j, size), _add_to_block(dv_kth, dv, j, size)

            dk_kth, dv_kth, *d_slots = carry
            dq_khm = zeros((q.shape[2], q.shape[4], q.shape[3]))
            dq_khm, d_slots = jax.lax.scan(slots, dq_khm, (*slot_blocks, *d_slots))
            dq_khm, dk_kth, dv_kth = jax.lax.fori_loop(first_t[i * size] // size, i + 1, own, (dq_khm, dk_kth, dv_kth))
            return (dk_kth, dv_kth, *d_slots), dq_khm.transpose(0, 2, 1).astype(q.dtype)

        carry = (zeros(k_kth.shape), zeros(v_kth.shape), *d_slots)
        steps = (q_ckmh, jnp.arange(q.shape[1]), *saved_c)
        (dk_kth, dv_kth, *d_slots), dq_ckmh = jax.lax.scan(block, carry, steps)
        return tuple(d_slots), (dq_ckmh, dk_kth.astype(k.dtype), dv_kth.astype(v.dtype))

    d_slots = zeros(slot_k.shape), zeros(slot_v.shape), zeros(bias.shape)
    d_slots, (dq, dk, dv) = jax.lax.scan(row, d_slots, (q, k, v, first, o, do, running_max, denominator))
    return dq, dk, dv, d_slots[0].astype(slot_k.dtype), d_slots[1].astype(slot_v.dtype), d_slots[2], None, None


_attention.defvjp(_forward, _backward)


def _einsum(spec: str, a: Array, b: Array) -> Array:
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)


def _hidden_keys(first: Int[Array, " t"], i: Array, j: Array, size: int, m: int) -> Array:
    """Gives as [m, s] which keys of block j the queries of block i do not see."""
    within = jnp.arange(size)
    query_m, key_s = jnp.repeat(i * size + within, m // size), j * size + within
    return (key_s > query_m[:, None]) | (key_s < first[query_m][:, None])


def _block(a_kth: Array, j: Array, size: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(a_kth, j * size, size, axis=1)


def _add_to_block(a_kth: Array, b_ksh: Array, j: Array, size: int) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(a_kth, _block(a_kth, j, size) + b_ksh, j * size, axis=1)
