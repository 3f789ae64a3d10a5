"""When a cartridge pays for itself: the device-seconds that making it takes, and those that every query saves.

Both are computed by the roofline of `costs.py`, as if one device had memory enough: communication and idle devices are
left out on either side.
"""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp

from cartridges_jax.command_line.errors import UserError
from cartridges_jax.models.config import ModelConfig
from cartridges_jax.planning.chips import Chip

CONTEXT_TOKENS = 2048  # of the text, in the prompt of a conversation of self-study
CONVERSATION_TOKENS = 512  # of a conversation's question and answer, all of which training reads


@dataclasses.dataclass(frozen=True)
class Query:
    """What the cartridge is for: a document's length, and what one question about it reads and writes, in tokens."""

    document: int = 100_000
    question: int = 64
    answer: int = 256

    def __post_init__(self) -> None:
        if min(self.document, self.question, self.answer) < 1:
            raise UserError(
                f"a document of {self.document} tokens, a question of {self.question} and an answer of {self.answer}: "
                "expected at least 1"
            )


@dataclasses.dataclass(frozen=True)
class Economics:
    """Device-seconds, and the number of queries after which training and self-study are paid back."""

    self_study: float
    with_cartridge: float  # one query
    cached: float  # one query behind the document's cache
    uncached: float  # one query that reads the document
    queries_cached: float
    queries_uncached: float


def economics(
    model: ModelConfig, chip: Chip, dtype: str, slots: int, query: Query, trained: float, tokens: int, together: int
) -> Economics:
    """Weighs a cartridge of `slots` slots against its document in every prompt.

    Args:
      trained: device-seconds of training.
      tokens: how many tokens self-study generates.
      together: how many requests are decoded at once, and so read the weights together.
    """
    width = jnp.dtype(dtype).itemsize

    def prefill(count: int, before: int) -> float:
        flops = 2 * model.matrix_weights + model.attention_flops(before + count / 2)
        return flops * count / chip.flops

    def decode(count: int, before: int) -> float:
        """Each request reads its whole context, the document or the cartridge too: few requests share a text."""
        weights = model.matrix_weights + model.head_weights
        context = before + count / 2
        position = model.kv_numbers * width
        flops = 2 * weights + model.attention_flops(context)
        read = weights * width / together + position * context
        return count * max(flops / chip.flops, read / chip.bandwidth)

    def ask(before: int) -> float:
        return prefill(query.question, before) + decode(query.answer, before + query.question)

    conversations = tokens / CONVERSATION_TOKENS
    study = conversations * (prefill(CONTEXT_TOKENS, 0) + decode(CONVERSATION_TOKENS, CONTEXT_TOKENS))
    ours, cached = ask(slots), ask(query.document)
    uncached = prefill(query.document, 0) + cached
    once = prefill(query.document, 0)  # who caches the document has paid for reading it, too

    def after(cost: float, saved: float) -> float:
        return max(cost, 0.0) / saved if saved > 0 else math.inf

    made = trained + study
    return Economics(study, ours, cached, uncached, after(made - once, cached - ours), after(made, uncached - ours))
