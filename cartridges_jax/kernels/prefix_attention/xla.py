"""Blocks of queries in plain XLA: a good CPU citizen and the fallback everywhere.

A block sees the slots and only those keys that come before its end, so the upper triangle is never computed and no
array grows beyond a block of queries. The slots enter one matmul for all rows together: they are not copied per row,
and their gradient is summed over the batch by that matmul. The backward pass recomputes a block's weights.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

BLOCK = 256  # queries; 256 x (p + keys) float32 scores of a head group stay near a CPU's caches
MASKED = -1e30  # finite, so that a fully masked row gives no NaN


def xla_attention(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b t k h"],
    v: Float[Array, "b t k h"],
    prefix_k: Float[Array, "p k h"],
    prefix_v: Float[Array, "p k h"],
    segment_ids: Int[Array, "b t"],
    bias: Float[Array, "p k"] | None,
) -> Float[Array, "b t n h"]:
    b, t, n, h = q.shape
    kv_heads = k.shape[2]
    q_kbtgh = (q.reshape(b, t, kv_heads, n // kv_heads, h) * h**-0.5).transpose(2, 0, 1, 3, 4)
    k_kbsh, v_kbsh = k.transpose(2, 0, 1, 3), v.transpose(2, 0, 1, 3)
    prefix_k_kph = prefix_k.transpose(1, 0, 2).astype(k.dtype)
    prefix_v_kph = prefix_v.transpose(1, 0, 2).astype(v.dtype)
    bias_kp = jnp.zeros(prefix_k_kph.shape[:2], jnp.float32) if bias is None else bias.T.astype(jnp.float32)
    blocks = [
        _block(
            start,
            q_kbtgh[:, :, start : start + BLOCK],
            k_kbsh[:, :, : start + BLOCK],
            v_kbsh[:, :, : start + BLOCK],
            prefix_k_kph,
            prefix_v_kph,
            bias_kp,
            segment_ids[:, : start + BLOCK],
        )
        for start in range(0, t, BLOCK)
    ]
    o_kbtgh = jnp.concatenate(blocks, axis=2)
    return o_kbtgh.transpose(1, 2, 0, 3, 4).reshape(b, t, n, h)


@functools.partial(jax.checkpoint, static_argnums=(0,))
def _block(
    start: int,
    q: Float[Array, "k b q g h"],
    k: Float[Array, "k b s h"],
    v: Float[Array, "k b s h"],
    prefix_k: Float[Array, "k p h"],
    prefix_v: Float[Array, "k p h"],
    bias: Float[Array, "k p"],
    segment_ids: Int[Array, "b s"],
) -> Float[Array, "k b q g h"]:
    scores = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    slot_scores = scores("kbqgh,kph->kbqgp", q, prefix_k) + bias[:, None, None, None]
    own_scores = scores("kbqgh,kbsh->kbqgs", q, k)
    index_q = start + jnp.arange(q.shape[2])
    visible_bqs = (index_q[:, None] >= jnp.arange(k.shape[2])) & (
        segment_ids[:, start:, None] == segment_ids[:, None, :]
    )
    own_scores = jnp.where(visible_bqs[None, :, :, None], own_scores, MASKED)
    top = jnp.maximum(jnp.max(own_scores, axis=-1), jnp.max(slot_scores, axis=-1, initial=MASKED))
    top = jax.lax.stop_gradient(top)[..., None]  # it cancels: a shift of the exponent only
    slot_weights, own_weights = jnp.exp(slot_scores - top), jnp.exp(own_scores - top)
    total = jnp.sum(slot_weights, axis=-1, keepdims=True) + jnp.sum(own_weights, axis=-1, keepdims=True)
    o = scores("kbqgp,kph->kbqgh", slot_weights.astype(v.dtype), prefix_v)
    o = o + scores("kbqgs,kbsh->kbqgh", own_weights.astype(v.dtype), v)
    return (o / total).astype(q.dtype)
