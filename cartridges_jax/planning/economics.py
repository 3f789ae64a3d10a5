"""When a cartridge has paid for itself: device-seconds to make it, and those it saves with every query.

Everything is counted by the roofline of `costs.py`, on one device whose memory were large enough: no plan's
communication and no idle device is in it, on either side.
"""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp

from cartridges_jax.command_line.errors import UserError
from cartridges_jax.models.config import ModelConfig
from cartridges_jax.planning.chips import Chip

CONTEXT_TOKENS = 2048  # that self-study has before it
CONVERSATION_TOKENS = 512  # question and answer, of which training reads all


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
    cached: float  # one query, behind the document's cache
    uncached: float  # one query that reads the document
    queries_cached: float
    queries_uncached: float


def economics(
    model: ModelConfig, chip: Chip, dtype: str, slots: int, query: Query, trained: float, tokens: int, together: int
) -> Economics:
    """Args:
    trained: device-seconds of training.
    tokens: of self-study, each of which is generated once.
    together: requests that are decoded at once, and read the weights together.
    """
    width = jnp.dtype(dtype).itemsize

    def prefill(count: int, before: int) -> float:
        flops = 2 * model.matrix_weights + model.attention_flops(before + count / 2)
        return flops * count / chip.flops

    def decode(count: int, before: int) -> float:
        """Each request reads its own context, a document's or a cartridge's included: the fewest are of one text."""
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
    once = prefill(query.document, 0)  # that whoever caches has paid, too

    def after(cost: float, saved: float) -> float:
        return max(cost, 0.0) / saved if saved > 0 else math.inf

    made = trained + study
    return Economics(study, ours, cached, uncached, after(made - once, cached - ours), after(made, uncached - ours))
