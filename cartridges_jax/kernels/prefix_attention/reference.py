"""This is the definition of `prefix_attention`, dense and in the inputs' own precision; tests hold the rest to it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from cartridges_jax.kernels.prefix_attention.blockwise import soft_capped


def reference_attention(
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
    bias_pk = jnp.zeros((p, kv_heads), q.dtype) if bias is None else bias.astype(q.dtype)
    if lengths is not None:  # where a head has no slot, nothing is read of what stands there
        is_slot_pk = jnp.arange(p)[:, None] < lengths
        prefix_k, prefix_v = (jnp.where(is_slot_pk[..., None], a, 0) for a in (prefix_k, prefix_v))
        bias_pk = jnp.where(is_slot_pk, bias_pk, -jnp.inf)
    keys_bskh = jnp.concatenate([jnp.broadcast_to(prefix_k, (b, *prefix_k.shape)).astype(k.dtype), k], axis=1)
    values_bskh = jnp.concatenate([jnp.broadcast_to(prefix_v, (b, *prefix_v.shape)).astype(v.dtype), v], axis=1)
    bias_ks = jnp.zeros((kv_heads, p + t), q.dtype).at[:, :p].set(bias_pk.T)
    q_btkgh = q.reshape(b, t, kv_heads, n // kv_heads, h)
    products_bkgts = jnp.einsum("btkgh,bskh->bkgts", q_btkgh, keys_bskh) * jnp.asarray(scale, q.dtype)
    scores_bkgts = soft_capped(products_bkgts, soft_cap) + bias_ks[None, :, None, None]
    causal_bts = (segment_ids[:, :, None] == segment_ids[:, None]) & jnp.tril(jnp.ones((t, t), bool))
    if window is not None:
        causal_bts &= jnp.arange(t)[:, None] - jnp.arange(t) < window
    mask_bts = jnp.concatenate([jnp.ones((b, t, p), bool), causal_bts], axis=-1)
    scores_bkgts = jnp.where(mask_bts[:, None, None], scores_bkgts, -jnp.inf)
    if sinks is not None:  # one more key, which has no value
        sinks_bkgt1 = jnp.broadcast_to(sinks.reshape(1, kv_heads, -1, 1, 1), (*scores_bkgts.shape[:-1], 1))
        scores_bkgts = jnp.concatenate([scores_bkgts, sinks_bkgt1.astype(q.dtype)], axis=-1)
    probs_bkgts = jax.nn.softmax(scores_bkgts, axis=-1)[..., : p + t]
    return jnp.einsum("bkgts,bskh->btkgh", probs_bkgts, values_bskh).reshape(b, t, n, h)
