"""Moves a head's keys, too, where its values and biases cannot make up for the tokens that were left out.

Attention matching solves for values and biases behind keys that stay those of tokens. Of a head that has few slots for
what it looks at, they leave much of the output wrong; a few steps of Adam on keys, values and biases together mend a
part of that. They make a fit take half as long again, and overfit to its queries where little is wrong: heads whose
error is small are left alone (benchmarks/ablations.md).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

STEPS = 60
RATE = 0.03  # of the root mean square of what is moved, at first; it falls to 0
# A step looks at every eleventh query, and the next one at those behind them: a prime, so that every step looks at
# all query heads of the group, which lie behind one another.
STRIDE = 11
TOTAL_WEIGHT = 0.1  # of the total weight's error, in nats, beside that of the output
TOLERATED = 0.03  # squared error, relative to the output's size, of a head that is left alone

HeadSlots = tuple[Float[Array, "p h"], Float[Array, "p h"], Float[Array, " p"]]


def move_keys(
    slots: HeadSlots,
    q: Float[Array, "m h"],
    total: Float[Array, " m"],
    output: Float[Array, "m h"],
    is_query: Array,
    is_slot: Array,
    scale: float | Array,
) -> HeadSlots:
    """Brings the attention of one kv head's slots nearer to that of the document, unless it is near already.

    The first slot, the attention sink, keeps its key.

    Args:
      slots: keys, values and biases as attention matching solved for them.
      total: the logarithm of the document's total weight for each query, before normalization.
      output: what attention to the document gives each query.
      is_slot: which of the p slots there are; the others stay as they are.
    """
    parts = tuple(_in_parts(a) for a in (q, total, output, is_query.astype(q.dtype)))
    spread = jnp.sqrt((output**2).mean(where=is_query[:, None]))
    units = _units(slots, is_slot)

    def moved(moves: HeadSlots) -> HeadSlots:
        return tuple(a + unit * move for a, unit, move in zip(slots, units, moves, strict=True))

    def error(moves: HeadSlots, step: Array | int) -> Float[Array, ""]:
        keys_ph, values_ph, bias_p = moved(moves)
        q_mh, total_m, output_mh, asked_m = (part[step % STRIDE] for part in parts)
        scores_mp = jnp.where(is_slot, q_mh @ keys_ph.T * scale + bias_p, -jnp.inf)
        missed_mh = (jax.nn.softmax(scores_mp, -1) @ values_ph - output_mh) / spread
        missed_m = jax.nn.logsumexp(scores_mp, -1) - total_m
        return (((missed_mh**2).mean(-1) + TOTAL_WEIGHT * missed_m**2) * asked_m).sum() / jnp.maximum(asked_m.sum(), 1)

    optimizer = optax.adam(optax.linear_schedule(RATE, 0.0, STEPS))

    def update(step: Array, carry: Any) -> Any:
        moves, state = carry
        changes, state = optimizer.update(jax.grad(error)(moves, step), state)
        return optax.apply_updates(moves, changes), state

    def descend(moves: HeadSlots) -> HeadSlots:
        return jax.lax.fori_loop(0, STEPS, update, (moves, optimizer.init(moves)))[0]

    still: Any = jax.tree.map(jnp.zeros_like, slots)
    return moved(jax.lax.cond(error(still, 0) > TOLERATED, descend, lambda moves: moves, still))


def _units(slots: HeadSlots, is_slot: Array) -> HeadSlots:
    """Returns in what unit each number moves: the root mean square of keys and of values, and a nat; 0 to stay."""
    keys_ph, values_ph, bias_p = slots
    is_slot_p1 = is_slot[:, None]

    def size(a_ph: Array) -> Array:
        return jnp.sqrt((a_ph**2).mean(where=is_slot_p1))

    is_moved_p1 = is_slot_p1.at[0].set(False)
    return is_moved_p1 * size(keys_ph), is_slot_p1 * size(values_ph), is_slot.astype(bias_p.dtype)


def _in_parts(of_queries: Float[Array, "m ..."]) -> Float[Array, "stride n ..."]:
    """Returns every STRIDE-th query, for each place to begin at; what is added to the end is 0."""
    missing = -len(of_queries) % STRIDE
    padded = jnp.pad(of_queries, [(0, missing)] + [(0, 0)] * (of_queries.ndim - 1))
    return padded.reshape(-1, STRIDE, *padded.shape[1:]).swapaxes(0, 1)
