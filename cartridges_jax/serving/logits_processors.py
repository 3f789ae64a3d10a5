"""What requests may ask to be done to their logits before a token is drawn: penalties, biases, bans and masks.

A program of its own runs it, after the forward pass, and only when some request of the batch asks for it. What is known
of a sequence for every token of the vocabulary lies on the device; a row of it is written when the sequence begins.
"""

from __future__ import annotations

import functools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from cartridges_jax.serving.sampling import NEVER
from cartridges_jax.serving.scheduler import LogitsRules

IN_PROMPT, ENDS = 1, 2  # bits of `LogitsState.flags`


@flax.struct.dataclass
class LogitsState:
    """What is known of every sequence of the engine: a bias, how often each token was drawn, and flags of tokens."""

    bias: Float[Array, "seqs v"]
    counts: Int[Array, "seqs v"]
    flags: UInt8[Array, "seqs v"]  # whether a token is in the prompt, and whether it ends the answer


@flax.struct.dataclass
class LogitsParams:
    """The numbers of each row; those of a row that asks for nothing are 0, 0, 1, 0 and 0."""

    frequency_penalty: Float[Array | np.ndarray, " b"]
    presence_penalty: Float[Array | np.ndarray, " b"]
    repetition_penalty: Float[Array | np.ndarray, " b"]
    min_p: Float[Array | np.ndarray, " b"]
    min_tokens: Int[Array | np.ndarray, " b"]

    @classmethod
    def of(cls, rules: LogitsRules) -> LogitsParams:
        """One row's, as numbers of numpy."""
        floats = (rules.frequency_penalty, rules.presence_penalty, rules.repetition_penalty, rules.min_p)
        return cls(*map(np.float32, floats), np.int32(rules.min_tokens))


@functools.partial(jax.jit, static_argnums=(0, 1))
def empty_state(max_num_seqs: int, vocab_size: int) -> LogitsState:
    shape = max_num_seqs, vocab_size
    return LogitsState(jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.uint8))


@functools.partial(jax.jit, donate_argnums=0)
def begin_row(state: LogitsState, index: Int[Array, ""], row: LogitsState) -> LogitsState:
    """Puts a sequence in the place of the one that has had its index."""
    return jax.tree.map(lambda of_all, own: of_all.at[index].set(own), state, row)


def row_of(rules: LogitsRules, vocab_size: int) -> LogitsState:
    """A sequence's row of the state, [v] each. Token ids that the model does not have are left out."""
    bias = np.zeros(vocab_size, np.float32)
    if rules.allowed is not None:
        bias[:] = NEVER
        bias[_known(rules.allowed, vocab_size)] = 0
    for token, added in rules.bias:
        if token < vocab_size:
            bias[token] += added
    flags = np.zeros(vocab_size, np.uint8)
    flags[_known(rules.prompt, vocab_size)] |= IN_PROMPT
    flags[_known(tuple(rules.stop_ids), vocab_size)] |= ENDS
    counts = np.bincount(_known(rules.answer, vocab_size), minlength=vocab_size).astype(np.int32)
    return LogitsState(bias, counts, flags)  # type: ignore[arg-type]


def _known(tokens: tuple[int, ...], vocab_size: int) -> np.ndarray:
    ids = np.array(tokens, np.int64)
    return ids[ids < vocab_size]


def process(
    logits: Float[Array, "b v"],
    state: LogitsState,
    params: LogitsParams,
    temperature: Float[Array, " b"],
    step: Int[Array, " b"],
    mask: Int[Array, "b words"],
) -> Float[Array, "b v"]:
    """The logits that tokens are drawn from.

    Args:
      state: the rows' own.
      step: how many tokens of the answer there are.
      mask: bits of the tokens that may be drawn, 32 in a word, the lowest first. It counts for more than any bias, so
        that there is always a token to draw.
    """
    bias_bv, counts_bv, flags_bv = state.bias, state.counts, state.flags
    repetition_b1 = params.repetition_penalty[:, None]
    is_seen_bv = (counts_bv > 0) | (flags_bv & IN_PROMPT > 0)
    logits = jnp.where(is_seen_bv, jnp.where(logits > 0, logits / repetition_b1, logits * repetition_b1), logits)
    logits -= params.frequency_penalty[:, None] * counts_bv + params.presence_penalty[:, None] * (counts_bv > 0)
    logits += bias_bv
    may_end_b1 = (step >= params.min_tokens)[:, None]
    logits = jnp.where((flags_bv & ENDS > 0) & ~may_end_b1, NEVER, logits)
    logits = jnp.where(allowed(mask, logits.shape[1]), logits, 2 * NEVER)
    # behind the temperature, probabilities are at least so much of the best one's
    floor_b1 = logits.max(-1, keepdims=True) + temperature[:, None] * jnp.log(params.min_p)[:, None]
    is_rare_bv = (params.min_p > 0)[:, None] & (logits < floor_b1)
    return jnp.where(is_rare_bv, jnp.minimum(logits, NEVER), logits)


def allowed(mask: Int[Array, "b words"], vocab_size: int) -> Array:
    """The bits of a mask, [b, v]."""
    bits = (mask[..., None] >> jnp.arange(32)) & 1
    return bits.reshape(len(mask), -1)[:, :vocab_size] == 1
