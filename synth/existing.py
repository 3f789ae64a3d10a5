"""Conversations that exist already (logs, or a better model's): the teacher writes nothing, it only scores the answers.

A teacher that sees the context teaches what self-study would, with other people's questions. One that does not see it
teaches the model to stay as it was: a few per cent of general instructions of this kind keep a cartridge from doing
harm when a question is about something else.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

from cartridges_jax.command_line import files
from cartridges_jax.command_line.errors import UserError
from synth.clients.base import Client
from synth.config import SynthConfig
from synth.conversation import Conversation, Message, flatten


@dataclasses.dataclass(frozen=True)
class Existing:
    """A line of the file."""

    messages: tuple[dict[str, str], ...]
    context: str | None  # the line's own, in place of the chunk


def conversation_of(number: int, config: SynthConfig) -> Existing | None:
    """The existing conversation that number `number` of the dataset is, or None: they are spread evenly over it."""
    given = config.distill_existing
    if given is None:
        return None
    found = place(number, given.share)
    return None if found is None else read(given.path)[found]


def place(number: int, share: float) -> int | None:
    """Spreads a share of all conversations evenly: which of these number `number` is, or None if it is another."""
    before, after = math.floor(number * share), math.floor((number + 1) * share)
    return before if after > before else None


def system_prompt(given: Existing, chunk: str, config: SynthConfig) -> str:
    """What the teacher sees before the messages: nothing, if the config withholds the context from it."""
    assert config.distill_existing is not None
    if not config.distill_existing.context:
        return ""
    return config.system_prompt.replace("{chunk}", chunk if given.context is None else given.context)


async def score(
    client: Client, given: Sequence[dict[str, str]], context: str, config: SynthConfig, metadata: dict[str, Any]
) -> Conversation:
    """The messages as a conversation, with the teacher's probabilities of the answers behind the system prompt."""
    seen = [{"role": "system", "content": context}] if context else []
    messages: list[Message] = []
    for message in given:
        seen.append(message)
        if message["role"] == "user":
            messages.append(Message(message["content"], "user"))
            continue
        scored = await client.score(seen, config.top_logprobs)
        top_logprobs = flatten(scored.top_logprobs or (), config.min_prob_mass)
        messages.append(Message(message["content"], "assistant", scored.token_ids, top_logprobs))
    metadata |= {
        "context": bool(context),
        "thinking": False,  # as `Client.score` renders them
        "finish_reasons": ["given"] * len(messages),
        "completion_tokens": [len(message.token_ids or ()) for message in messages],
    }
    return Conversation(tuple(messages), context, metadata, type="distill_existing")


@functools.lru_cache(maxsize=2)
def read(path: str) -> tuple[Existing, ...]:
    """The conversations of a file. Raises: FileNotFoundError, UserError: it is not there, or holds something else."""
    lines = files.read_json_lines(path, "a JSONL file of conversations, as config.distill_existing.path")
    return tuple(_parse(line, f"{path}:{number}") for number, line in lines)


def _parse(line: str, where: str) -> Existing:
    expected = 'expected {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}, ...]}'
    try:
        record = files.parse_json(line, where)
        messages = tuple({"role": m["role"], "content": m["content"]} for m in record["messages"])
        context = record.get("context")
    except (UserError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{where} is no conversation: {expected}") from error
    if not messages or len(messages) % 2 or not all(isinstance(m["content"], str) and m["content"] for m in messages):
        raise UserError(f"{where} does not end with an answer, or has an empty message: {expected}")
    if [m["role"] for m in messages] != ["user", "assistant"] * (len(messages) // 2):
        raise UserError(f"{where} is not one of user and assistant in turn: {expected}")
    if context is not None and not isinstance(context, str):
        raise UserError(f"{where} has a context that is no text")
    return Existing(messages, context)
