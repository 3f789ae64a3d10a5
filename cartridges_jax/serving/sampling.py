"""From logits to a token, per row: greedy, temperature, top-k and top-p, reproducible from (seed, step)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

NEVER = -1e30  # the logit of a token that is never drawn
SORTED = 256  # so many best tokens are sorted first, in the hope that top-p or top-k ends among them

T = TypeVar("T")


@flax.struct.dataclass
class SamplingParams:
    """How each row's token is chosen: temperature 0 is greedy, top_p 1 and top_k 0 keep every token."""

    temperature: Float[Array, " b"]
    top_p: Float[Array, " b"]
    top_k: Int[Array, " b"]
    seed: Int[Array, " b"]
    step: Int[Array, " b"]  # counts a request's tokens: the same seed gives the same answer whatever shares the batch
    num_top: Int[Array, " b"]  # how many alternatives the row wants; they are found if any row wants some


class Wants(NamedTuple):
    """What rows of a batch want, as a host knows it.

    A program for it has no branch: a GPU's host would have to wait for numbers of the device in order to take one.
    """

    draws: bool = False  # of tokens
    filters: bool = False  # top-p or top-k
    alternatives: bool = False


GREEDY = Wants()
KINDS = (GREEDY, Wants(True), Wants(True, True), Wants(alternatives=True), Wants(True, True, True))  # by what they cost


def kind_for(wants: Wants) -> Wants:
    """Returns the first of the `KINDS`, for which programs are compiled, that does all that is wanted."""
    return next(kind for kind in KINDS if all(has or not is_wanted for has, is_wanted in zip(kind, wants, strict=True)))


def sample(
    logits: Float[Array, "b v"],
    params: SamplingParams,
    num_top: int,
    wants: Wants | None = None,
    processed: Float[Array, "b v"] | None = None,
) -> tuple[Int[Array, " b"], Float[Array, " b"], Int[Array, "b j"], Float[Array, "b j"]]:
    """Returns token ids, their log-probabilities, and the `num_top` best ids and theirs, best first.

    Log-probabilities are those of the model, before temperature, top-k and top-p: what distillation needs. Where no row
    wants alternatives, theirs are meaningless. A row of logits that are no numbers has NaN for its token's
    log-probability, and changes nothing about the others.

    Args:
      wants: the most that rows want; by default branches find it out, which cost a CPU nothing.
      processed: what tokens are drawn from, if requests have had their logits changed.
    """
    normalizer_b1 = normalizer(logits)
    is_broken_b = jnp.isnan(normalizer_b1)[:, 0]
    drawn_from = logits if processed is None else processed

    def whole(logits: Array) -> Array:
        """A broken row taken to be certain of its first token, so that it costs the others no further search."""
        certain_v = jnp.where(jnp.arange(logits.shape[1]) == 0, 0, NEVER)
        return jnp.where(is_broken_b[:, None], certain_v, logits)

    # logits are mended where a branch needs them so: most steps take neither, and a copy of all costs time
    nothing = jnp.zeros((len(logits), num_top)), jnp.zeros((len(logits), num_top), jnp.int32)
    top_logits_bj, top_ids_bj = _if(
        (params.num_top > 0).any() if wants is None else wants.alternatives,
        lambda: tuple(jax.lax.top_k(whole(logits), num_top)),
        lambda: nothing,
    )
    best_b, is_random_b = jnp.where(is_broken_b, 0, _best(drawn_from)), params.temperature > 0
    token_b = _if(
        is_random_b.any() if wants is None else wants.draws,
        lambda: jnp.where(is_random_b, _draw(whole(drawn_from), params, wants), best_b),
        lambda: best_b,
    )
    logprob_b = (jnp.take_along_axis(logits, token_b[:, None], axis=-1) - normalizer_b1)[:, 0]
    return token_b, logprob_b, top_ids_bj, top_logits_bj - normalizer_b1


def _if(condition: Array | bool, then: Callable[[], T], otherwise: Callable[[], T]) -> T:
    """Takes a branch on the device, or now where the condition is known."""
    if isinstance(condition, bool):
        return then() if condition else otherwise()
    return jax.lax.cond(condition, then, otherwise)


def normalizer(logits_bv: Float[Array, "b v"]) -> Float[Array, "b 1"]:
    """What makes logits log-probabilities when it is subtracted; NaN for a row with NaN, infinity or no weight at all.

    A single logit of -inf is a token that is left out.
    """
    sum_b1 = jax.nn.logsumexp(logits_bv, axis=-1, keepdims=True)
    return jnp.where(jnp.isfinite(sum_b1), sum_b1, jnp.nan)


def _best(logits_bv: Array) -> Array:
    """The first of the best: `argmax`, of which XLA makes a loop without vectors on a CPU."""
    ids_v = jnp.arange(logits_bv.shape[1])
    return jnp.where(logits_bv == logits_bv.max(-1, keepdims=True), ids_v, logits_bv.shape[1]).min(-1)


def _draw(logits_bv: Array, params: SamplingParams, wants: Wants | None) -> Array:
    temperature_b1 = jnp.where(params.temperature > 0, params.temperature, 1.0)[:, None]
    # the best logit becomes 0 first, so that a temperature near zero cannot overflow
    probs_bv = jax.nn.softmax((logits_bv - logits_bv.max(-1, keepdims=True)) / temperature_b1, axis=-1)
    threshold = _threshold if wants is None else _bisected
    probs_bv = _if(
        ((params.top_p < 1) | (params.top_k > 0)).any() if wants is None else wants.filters,
        lambda: jnp.where(probs_bv >= threshold(probs_bv, params), probs_bv, 0.0),
        lambda: probs_bv,
    )
    cumulative_bv = jnp.cumsum(probs_bv, axis=-1)
    uniform_b = jax.vmap(lambda seed, step: jax.random.uniform(jax.random.fold_in(jax.random.key(seed), step)))(
        params.seed, params.step
    )
    # the first id whose cumulative mass exceeds the draw: one random number a row instead of one a vocabulary entry;
    # a parallel sum wobbles by a rounding also where nothing is added, so ids that are left out are asked for as well
    ids_v, possible_bv = jnp.arange(probs_bv.shape[1]), probs_bv > 0
    reached_bv = possible_bv & (cumulative_bv > (uniform_b * cumulative_bv[:, -1])[:, None])
    first_b = jnp.where(reached_bv, ids_v, probs_bv.shape[1]).min(-1)
    return jnp.minimum(first_b, jnp.where(possible_bv, ids_v, 0).max(-1))


def _threshold(probs_bv: Array, params: SamplingParams) -> Array:
    """The largest probability such that the tokens at or above it are enough for top-p and for top-k.

    Read off the best `SORTED`, if they are enough for every row, as they nearly always are. Equal ones stay together.
    """
    best_bj = jax.lax.top_k(probs_bv, min(SORTED, probs_bv.shape[1]))[0]
    enough_bj = (jnp.cumsum(best_bj, axis=-1) >= jnp.where(params.top_p < 1, params.top_p, 2.0)[:, None]) | (
        jnp.arange(1, best_bj.shape[1] + 1) >= jnp.where(params.top_k > 0, params.top_k, probs_bv.shape[1] + 1)[:, None]
    )
    keeps_all_b = (params.top_p >= 1) & (params.top_k <= 0)
    last_b1 = jnp.take_along_axis(best_bj, jnp.argmax(enough_bj, axis=-1, keepdims=True), axis=-1)
    return jax.lax.cond(
        (enough_bj.any(-1) | keeps_all_b).all(),
        lambda: jnp.where(keeps_all_b[:, None], 0.0, last_b1),
        lambda: _bisected(probs_bv, params),
    )


def _bisected(probs_bv: Array, params: SamplingParams) -> Array:
    """The threshold by bisection: sorting a vocabulary costs a CPU twenty times more.

    Positive floats are ordered as their bits are, and halving those ends at the exact value.
    """
    bits_bv = jax.lax.bitcast_convert_type(probs_bv, jnp.int32)
    top_p_b1 = jnp.where(params.top_p < 1, params.top_p, 2.0)[:, None]  # 2 is never reached: no limit
    top_k_b1 = jnp.where(params.top_k > 0, params.top_k, probs_bv.shape[1] + 1)[:, None]

    def halve(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low_b1, high_b1 = bounds
        middle_b1 = low_b1 + (high_b1 - low_b1) // 2
        kept_bv = bits_bv >= middle_b1
        enough_b1 = (jnp.where(kept_bv, probs_bv, 0).sum(-1, keepdims=True) >= top_p_b1) | (
            kept_bv.sum(-1, keepdims=True) >= top_k_b1
        )
        return jnp.where(enough_b1, middle_b1, low_b1), jnp.where(enough_b1, high_b1, middle_b1)

    bounds = (jnp.zeros_like(bits_bv[:, :1]), bits_bv.max(-1, keepdims=True) + 1)  # all are enough, none are not
    return jax.lax.bitcast_convert_type(jax.lax.fori_loop(0, 31, halve, bounds)[0], jnp.float32)
