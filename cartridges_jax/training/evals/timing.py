"""How long a model takes behind a prefix, one request at a time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

from cartridges_jax.cartridge.arrays import Cartridge
from cartridges_jax.serving.cache import Prefix
from cartridges_jax.serving.engine import Engine
from cartridges_jax.serving.scheduler import Chunk, SequenceInput

TIMED_TOKENS = 16  # an answer's tokens, over whose decoding the rate is measured


def time_answers(engine: Engine, prefix: Cartridge | None, prompts: Sequence[Sequence[int]]) -> dict[str, float]:
    """Returns the seconds to an answer's first token and the tokens per second behind it, medians over the prompts.

    The seconds include those in which the prefix is loaded. No request may be under way in the engine.
    """
    held = None if prefix is None else Prefix.of("timed", prefix)
    block_table = engine.block_table(held, range(engine.pages_each))

    first_token, rate = [], []
    for prompt in [prompts[0], *prompts]:  # the first run compiles
        start = time.perf_counter()
        if held is not None:
            engine.load(held, block_table.slots)
        engine.prefill([Chunk(prompt[:-1], 0, block_table)])
        engine.begin(SequenceInput(0, prompt[-1], len(prompt) - 1, block_table, 0.0, 1.0, 0, 0, 0))
        engine.harvest(engine.decode([0]))
        first_token.append(time.perf_counter() - start)
        start = time.perf_counter()
        for _ in range(1, TIMED_TOKENS):
            engine.harvest(engine.decode([0]))
        rate.append((TIMED_TOKENS - 1) / (time.perf_counter() - start))
    return {
        "seconds_to_first_token": statistics.median(first_token[1:]),
        "decode_tokens_per_second": statistics.median(rate[1:]),
    }
