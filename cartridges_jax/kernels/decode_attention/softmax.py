"""What the implementations have in common beside the pages: how queries lie, and a softmax that is computed online.

Partial results are merged by their running maxima and denominators as they come.

Axis letters beyond those of `pages.py`: m the queries of a request that share a kv head (t times n / k).
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from cartridges_jax.kernels.prefix_attention.blockwise import MASKED

State = tuple[Array, Array, Array]  # a softmax so far: running maximum, denominator, sum of the weighted values


class Options(NamedTuple):
    """How queries see keys, as `decode_attention` is asked for it."""

    window: int | None = None
    scale: float | None = None
    soft_cap: float | None = None
    sinks: Float[Array, " n"] | None = None


def started(q_rkmh: Float[Array, "r k m h"], t: int, sinks: Float[Array, " n"] | None) -> State:
    """A softmax over no key yet, or over the sink of each head: one more key, which has no value."""
    none_rkm, o_rkmh = jnp.zeros(q_rkmh.shape[:3], jnp.float32), jnp.zeros(q_rkmh.shape, jnp.float32)
    if sinks is None:
        return none_rkm + MASKED, none_rkm, o_rkmh
    return none_rkm + sinks_together(sinks, q_rkmh.shape[1], t), none_rkm + 1, o_rkmh


def finished(state: State, t: int) -> Float[Array, "r t n h"]:
    """The result of a softmax over all keys; of rows that pad a batch and see nothing, zeros."""
    _, denominator_rkm, o_rkmh = state
    return heads_apart(o_rkmh / jnp.maximum(denominator_rkm, 1e-30)[..., None], t)


def scale_of(scale: float | None, h: int) -> float:
    """What a query's products with the keys are multiplied by."""
    return h**-0.5 if scale is None else scale


def largest_divisor(number: int, most: int) -> int:
    """Into how many a number can be cut evenly, at most so many: of tokens, of chunks or of requests."""
    return max(i for i in range(1, max(most, 1) + 1) if number % i == 0)


def heads_together(q: Float[Array, "*r t n h"], k: int, scale: float | None) -> Float[Array, "*r k m h"]:
    """Scales the queries and puts those of each kv head side by side: m is t times n / k, with t first."""
    *r, t, n, h = q.shape
    q = (q * scale_of(scale, h)).reshape(*r, t, k, n // k, h)
    return jnp.moveaxis(q, -3, -4).reshape(*r, k, t * (n // k), h)


def heads_apart(o: Float[Array, "*r k m h"], t: int) -> Float[Array, "*r t n h"]:
    """Turns back what `heads_together` did to the queries."""
    *r, k, m, h = o.shape
    return jnp.moveaxis(o.reshape(*r, k, t, m // t, h), -4, -3).reshape(*r, t, k * (m // t), h)


def sinks_together(sinks: Float[Array, " n"], k: int, t: int) -> Float[Array, "k m"]:
    """The sinks' scores as `heads_together` lays the queries."""
    return jnp.tile(sinks.reshape(k, 1, -1), (1, t, 1)).reshape(k, -1)
