"""This is the definition of `prefix_attention`, dense and in the inputs' own precision; tests hold the rest to it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def reference_attention(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b t k h"],
    v: Float[Array, "b t k h"],
    prefix_k: Float[Array, "p k h"],
    prefix_v: Float[Array, "p k h"],
    segment_ids: Int[Array, "b t"],
    bias: Float[Array, "p k"] | None,
    window: int | None,
) -> Float[Array, "b t n h"]:
    b, t, n, h = q.shape
    p, kv_heads, _ = prefix_k.shape
    keys_bskh = jnp.concatenate([jnp.broadcast_to(prefix_k, (b, *prefix_k.shape)).astype(k.dtype), k], axis=1)
    values_bskh = jnp.concatenate([jnp.broadcast_to(prefix_v, (b, *prefix_v.shape)).astype(v.dtype), v], axis=1)
    bias_ks = jnp.zeros((kv_heads, p + t), q.dtype)
    if bias is not None:
        bias_ks = bias_ks.at[:, :p].set(bias.T.astype(q.dtype))
    q_btkgh = q.reshape(b, t, kv_heads, n // kv_heads, h)
    scores_bkgts = jnp.einsum("btkgh,bskh->bkgts", q_btkgh, keys_bskh) * h**-0.5 + bias_ks[None, :, None, None]
    causal_bts = (segment_ids[:, :, None] == segment_ids[:, None]) & jnp.tril(jnp.ones((t, t), bool))
    if window is not None:
        causal_bts &= jnp.triu(jnp.ones((t, t), bool), 1 - window)
    mask_bts = jnp.concatenate([jnp.ones((b, t, p), bool), causal_bts], axis=-1)
    probs_bkgts = jax.nn.softmax(jnp.where(mask_bts[:, None, None], scores_bkgts, -jnp.inf), axis=-1)
    return jnp.einsum("bkgts,bskh->btkgh", probs_bkgts, values_bskh).reshape(b, t, n, h)
