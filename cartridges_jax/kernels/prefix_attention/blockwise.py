"""What the implementations that go block by block share.

Which keys of its row a query sees is a range, since segments lie side by side and a window only cuts its start. They
mask by these ranges and skip blocks by them; no mask of queries times keys exists.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

MASKED = -1e30  # the score of what is not seen: finite, so that a fully masked block gives no NaN


def first_seen(segment_ids: Int[Array, "b t"], window: int | None) -> Int[Array, "b t"]:
    """Of each query, the first key that it sees; the last one is its own. Never falls along a row."""
    index_t = jnp.arange(segment_ids.shape[1])
    begins_bt = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
    first_bt = jax.lax.cummax(jnp.where(begins_bt, index_t, 0), axis=1)
    return first_bt if window is None else jnp.maximum(first_bt, index_t - (window - 1))


def last_seer(segment_ids: Int[Array, "b t"], window: int | None) -> Int[Array, "b t"]:
    """Of each key, the last query that sees it; the first one is its own. Never falls along a row."""
    return segment_ids.shape[1] - 1 - first_seen(segment_ids[:, ::-1], window)[:, ::-1]


def padded(a: Array, axis: int, multiple: int, **how: Any) -> Array:
    """The array with its axis filled up to a multiple, as `jnp.pad` does it."""
    return jnp.pad(a, [(0, -size % multiple if i == axis else 0) for i, size in enumerate(a.shape)], **how)


def as_read(inputs: Any) -> Any:
    """With the slots in the rows' dtype, cast once for all kernels; their gradients stay in float32."""
    slot_k, slot_v = inputs.slot_k.astype(inputs.k.dtype), inputs.slot_v.astype(inputs.v.dtype)
    return inputs._replace(slot_k=slot_k, slot_v=slot_v)
