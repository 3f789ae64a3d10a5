"""The implementations that work block by block share these functions.

The keys of its row that a query sees are a range, since segments lie side by side and a window only cuts off its
start. Blocks are masked and skipped by these ranges; no mask of queries times keys exists.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

MASKED = -1e30  # the score of a key that a query does not see: finite, so that a fully masked block gives no NaN


def first_key(segment_ids: Int[Array, "b t"], window: int | Array | None) -> Int[Array, "b t"]:
    """Gives the first key that each query sees; the last is its own. The result never falls along a row."""
    index_t = jnp.arange(segment_ids.shape[1])
    begins_bt = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
    first_bt = jax.lax.cummax(jnp.where(begins_bt, index_t, 0), axis=1)
    return first_bt if window is None else jnp.maximum(first_bt, index_t - (window - 1))


def last_query(segment_ids: Int[Array, "b t"], window: int | Array | None) -> Int[Array, "b t"]:
    """Gives the last query that sees each key; the first is its own. The result never falls along a row."""
    return segment_ids.shape[1] - 1 - first_key(segment_ids[:, ::-1], window)[:, ::-1]


def visible_slots(
    slot_k: Float[Array, "p k h"],
    slot_v: Float[Array, "p k h"],
    bias: Float[Array, "p k"] | None,
    lengths: Int[Array, " k"] | None,
) -> tuple[Float[Array, "p k h"], Float[Array, "p k h"], Float[Array, "p k"]]:
    """Gives the slots and their bias in float32; where a head has no slot, with zeros and a bias that hides them.

    What stood there may have been any number, and gets a gradient of zero.
    """
    p, kv_heads, _ = slot_k.shape
    bias_pk = jnp.zeros((p, kv_heads), jnp.float32) if bias is None else bias.astype(jnp.float32)
    if lengths is None:
        return slot_k, slot_v, bias_pk
    is_slot_pk = jnp.arange(p)[:, None] < lengths
    slot_k, slot_v = (jnp.where(is_slot_pk[..., None], a, 0) for a in (slot_k, slot_v))
    return slot_k, slot_v, jnp.where(is_slot_pk, bias_pk, MASKED)


def soft_capped(scores: Array, cap: float | None) -> Array:
    """Bends scores so that none exceeds the cap."""
    return scores if cap is None else cap * jnp.tanh(scores / cap)


def pad_to_multiple(a: Array, axis: int, multiple: int, **how: Any) -> Array:
    """Pads the end of an axis until its length is a multiple; `how` goes to `jnp.pad`."""
    return jnp.pad(a, [(0, -size % multiple if i == axis else 0) for i, size in enumerate(a.shape)], **how)


def cast_slots(inputs: Any) -> Any:
    """Casts the slots to the rows' dtype, once for all kernels; their gradients stay in float32."""
    slot_k, slot_v = inputs.slot_k.astype(inputs.k.dtype), inputs.slot_v.astype(inputs.v.dtype)
    return inputs._replace(slot_k=slot_k, slot_v=slot_v)
