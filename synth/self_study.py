"""Two sides of one model talk about a chunk: A asks as a seed prompt says, B answers, and its logprobs are the lesson.

The chunk stands in the system prompt that both see, and never in the messages: what is distilled is how the model
answers *because* it sees the chunk. The recipe is the paper's (arXiv 2506.06266).
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import itertools
import math
import random
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any, TypeVar

from synth import seed_prompts
from synth.chunkers import TokenChunker
from synth.clients.base import Client, Completion
from synth.config import SamplingConfig, SynthConfig
from synth.conversation import Conversation, Message, flatten
from synth.seed_prompts import SeedPrompt
from synth.tools.base import Tool

ATTEMPTS = 3  # at a question or an answer that is not empty
GOLDEN_RATIO = (math.sqrt(5) - 1) / 2

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Talk:
    """One conversation that may be held: how it begins, and what holds it."""

    index: int
    system_prompt: str
    prompt: SeedPrompt
    hold: Callable[[], Coroutine[Any, Any, Conversation]]


async def study(
    index: int,
    count: int,
    answer_client: Client,
    question_client: Client,
    chunker: TokenChunker,
    config: SynthConfig,
    tools: Sequence[Tool] = (),
) -> list[Talk]:
    """Batch `index`: `count` conversations about one chunk, none of them begun.

    Each depends on its own index alone, so any of them may be held, in any order.
    """
    rng = random.Random(f"{config.seed}/{index}")
    # Steps of the golden ratio spread any number of batches evenly over the document; uniform draws would leave holes.
    position = (random.Random(f"{config.seed}/position").random() + index * GOLDEN_RATIO) % 1.0
    chunk = await chunker.chunk(rng, position)
    system_prompt = config.system_prompt.replace("{chunk}", chunk.text)
    talks = []
    for i in range(count):
        prompt = seed_prompts.draw(config.seed_prompts, chunk.text, rng)
        number = index * config.conversations_per_chunk + i
        metadata = {
            "seed_prompt": prompt.text,
            "seed_prompt_type": prompt.kind,
            "chunk_span": [chunk.start, chunk.end],
            "conversation_index": number,
            "model": config.client.model,
        }
        instruction = rng.choice(config.instructions)
        hold = functools.partial(
            _converse, answer_client, question_client, config, system_prompt, prompt, instruction, metadata
        )
        talks.append(Talk(number, system_prompt, prompt, hold))
    return talks


async def _converse(
    answer_client: Client,
    question_client: Client,
    config: SynthConfig,
    system_prompt: str,
    prompt: SeedPrompt,
    instruction: str,
    metadata: dict[str, Any],
) -> Conversation:
    """One that ends early, with an empty message, is one for the filters."""
    system = {"role": "system", "content": system_prompt}
    task = {"role": "user", "content": prompt.text}
    messages: list[Message] = []
    turns: list[tuple[str, int]] = []  # of every message: why it ended and how many tokens were written
    for number in range(config.rounds):
        where = f"{config.seed}/conversation/{metadata['conversation_index']}/{number}"

        if prompt.is_question and not messages:
            messages.append(Message(prompt.text, "user"))
            turns.append(("given", 0))
        else:
            seen = [system, task, *({"role": _other(m.role), "content": m.content} for m in messages)]
            question = await _say_something(question_client, seen, config.question, f"{where}/question")
            text = question.text
            if text.strip() and not messages and instruction != "{question}":
                text = instruction.replace("{question}", text.strip())
            # the ids that were sampled are the text's only if nothing was added and nothing cut off
            is_whole = text == question.text and not config.question.stop
            messages.append(Message(text, "user", question.token_ids if is_whole else None))
            turns.append((question.finish_reason, question.completion_tokens))
            if not text.strip():
                break

        seen = [system, *({"role": m.role, "content": m.content} for m in messages)]
        answer = await _say_something(answer_client, seen, config.answer, f"{where}/answer", config.top_logprobs)
        top_logprobs = flatten(answer.top_logprobs or (), config.min_prob_mass)
        messages.append(Message(answer.text, "assistant", answer.token_ids, top_logprobs))
        turns.append((answer.finish_reason, answer.completion_tokens))
        if not answer.text.strip():
            break
    metadata |= {
        "finish_reasons": [reason for reason, _ in turns],
        "completion_tokens": [tokens for _, tokens in turns],
    }
    return Conversation(tuple(messages), system_prompt, metadata, type="self_study")


async def _say_something(
    client: Client, messages: list[dict[str, str]], sampling: SamplingConfig, where: str, top_logprobs: int = 0
) -> Completion:
    """Asks again, with another seed, while nothing comes; empty at last."""
    for attempt in itertools.count(1):
        seed = random.Random(f"{where}/{attempt - 1}").getrandbits(31)
        completion = await client.complete(messages, sampling, seed, top_logprobs)
        if completion.text.strip() or attempt == ATTEMPTS:
            return completion
    raise AssertionError("unreachable")


def _other(role: str) -> str:
    return "assistant" if role == "user" else "user"


async def all_or_none(coroutines: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Like `asyncio.gather`, but the first error stops the others, and leaves bare (a TaskGroup would wrap it)."""
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
