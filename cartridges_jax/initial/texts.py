"""Texts that a cartridge may start from: chunks of its corpus, a summary of it, or an unrelated text."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

import numpy as np

from cartridges_jax.command_line.addresses import without_credentials
from cartridges_jax.command_line.errors import UserError
from cartridges_jax.interop.engines import post

CHUNK = 64  # tokens of a sampled chunk (arXiv 2508.17032)
WORDS_PER_TOKEN = 0.75  # of English text; a server is asked for a number of words


@dataclasses.dataclass(frozen=True)
class SummaryConfig:
    """The server that writes the summary, which has to speak OpenAI's chat completions, and what it is asked."""

    base_url: str | None = None  # such as http://127.0.0.1:8000/v1
    model: str = "smollm2-135m"
    instruction: str = "Summarize the text above in about {words} words. Keep names, numbers and every other fact."


def sampled_chunks(tokens: Sequence[int], num_tokens: int, seed: int) -> list[int]:
    """Returns chunks of 64 tokens from random places of a text, none of them twice, in the text's order.

    Raises:
      UserError: the text has fewer than `num_tokens` tokens.
    """
    left_out = len(tokens) - num_tokens
    if left_out < 0:
        raise UserError(f"the corpus has {len(tokens)} tokens, expected {num_tokens}: lower init.num_slots")
    skipped = np.sort(np.random.default_rng(seed).integers(left_out + 1, size=-(-num_tokens // CHUNK)))
    starts = [CHUNK * i + int(skip) for i, skip in enumerate(skipped)]
    return [token for start in starts for token in tokens[start : start + CHUNK]][:num_tokens]


def summary(corpus: str, num_tokens: int, config: SummaryConfig) -> str:
    """Asks the server for a summary of the corpus, in about `num_tokens` tokens.

    Raises:
      UserError: the server refuses (if the corpus exceeds its window, say) or writes nothing.
      ConnectionError: the server cannot be reached.
    """
    instruction = config.instruction.replace("{words}", str(max(1, round(num_tokens * WORDS_PER_TOKEN))))
    body = {
        "model": config.model,
        "messages": [{"role": "system", "content": corpus}, {"role": "user", "content": instruction}],
        "max_tokens": num_tokens,
        "temperature": 0.0,
    }
    url = f"{str(config.base_url).rstrip('/')}/chat/completions"
    try:
        text = post(url, body)["choices"][0]["message"]["content"]
    except (LookupError, TypeError):
        text = None
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{without_credentials(url)} answers without a text: expected a summary to start from")
    return text


def unrelated_text(num_words: int) -> str:
    """Returns English sentences about nothing in particular, the same at every call, at least `num_words` words."""
    rng = random.Random(0)
    sentences: list[str] = []
    while sum(map(len, sentences)) < 6 * num_words:
        person, place, thing = rng.choice(PEOPLE), rng.choice(PLACES), rng.choice(THINGS)
        sentences.append(rng.choice(SENTENCES).format(person=person, place=place, thing=thing, time=rng.choice(TIMES)))
    return " ".join(sentences)


PEOPLE = ("the gardener", "an old sailor", "my neighbour", "the baker's son", "a young teacher", "the postman", "Ada")
PLACES = ("by the river", "in the market", "at the station", "behind the mill", "on the hill", "under the bridge")
THINGS = ("a red umbrella", "two apples", "a letter", "the broken clock", "a blue bicycle", "some warm bread", "a map")
TIMES = ("in the morning", "after lunch", "late in the evening", "every Thursday", "when it rained", "last winter")
SENTENCES = (
    "{time}, {person} found {thing} {place}.",
    "Nobody knew why {person} always carried {thing} {time}.",
    "If you wait long enough {place}, you may see {person} with {thing}.",
    "It was {time} that {person} sold {thing} {place} and went home.",
    "There is little to say about {thing}, except that {person} left it {place} {time}.",
    "Do you remember how {person} laughed {place}?",
)
