"""Two sides of one model talk about a chunk: A asks as a seed prompt says, B answers, and its logprobs are the lesson.

The chunk stands in the system prompt that both see, and never in the messages: what is distilled is how the model
answers *because* it sees the chunk. The recipe is the paper's (arXiv 2506.06266).
"""

from __future__ import annotations

import asyncio
import dataclasses
import math
import random
from collections.abc import Coroutine, Iterable
from typing import Any, TypeVar

from synth import seed_prompts
from synth.chunkers import Chunker
from synth.clients.base import Client, Completion
from synth.config import SamplingConfig, SynthConfig
from synth.conversation import Conversation, Message, flatten
from synth.seed_prompts import SeedPrompt

ATTEMPTS = 3  # at a question or an answer that is not empty
GOLDEN_RATIO = (math.sqrt(5) - 1) / 2

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Batch:
    conversations: list[Conversation]
    dropped: int  # left out, because a question or an answer stayed empty


async def study(index: int, count: int, client: Client, chunker: Chunker, config: SynthConfig) -> Batch:
    """Batch `index`: `count` conversations about one chunk. It depends on its index alone, so any order will do."""
    rng = random.Random(f"{config.seed}/{index}")
    # Steps of the golden ratio spread any number of batches evenly over the document; uniform draws would leave holes.
    position = (random.Random(f"{config.seed}/position").random() + index * GOLDEN_RATIO) % 1.0
    chunk = await chunker.chunk(rng, position)
    system_prompt = config.system_prompt.replace("{chunk}", chunk.text)
    conversations = []
    for i in range(count):
        prompt = seed_prompts.draw(config.seed_prompts, chunk.text, rng)
        metadata = {
            "seed_prompt": prompt.text,
            "seed_prompt_type": prompt.kind,
            "chunk_span": [chunk.start, chunk.end],
            "resource": chunk.resource,
            "conversation_index": index * config.conversations_per_chunk + i,
            "model": config.client.model,
        }
        instruction = rng.choice(config.instructions)
        conversations.append(_converse(client, config, system_prompt, prompt, instruction, metadata))
    results = await all_or_none(conversations)
    kept = [conversation for conversation in results if conversation is not None]
    return Batch(kept, len(results) - len(kept))


async def _converse(
    client: Client,
    config: SynthConfig,
    system_prompt: str,
    prompt: SeedPrompt,
    instruction: str,
    metadata: dict[str, Any],
) -> Conversation | None:
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
            question = await _say_something(client, seen, config.question, f"{where}/question")
            if question is None:
                return None
            text = question.text
            if not messages and instruction != "{question}":
                text = instruction.replace("{question}", text.strip())
            # the ids that were sampled are the text's only if nothing was added and nothing cut off
            is_whole = text == question.text and not config.question.stop
            messages.append(Message(text, "user", question.token_ids if is_whole else None))
            turns.append((question.finish_reason, question.completion_tokens))

        seen = [system, *({"role": m.role, "content": m.content} for m in messages)]
        answer = await _say_something(client, seen, config.answer, f"{where}/answer", config.top_logprobs)
        if answer is None:
            return None
        top_logprobs = flatten(answer.top_logprobs or (), config.min_prob_mass)
        messages.append(Message(answer.text, "assistant", answer.token_ids, top_logprobs))
        turns.append((answer.finish_reason, answer.completion_tokens))
    metadata |= {
        "finish_reasons": [reason for reason, _ in turns],
        "completion_tokens": [tokens for _, tokens in turns],
    }
    return Conversation(tuple(messages), system_prompt, metadata, type="self_study")


async def _say_something(
    client: Client, messages: list[dict[str, str]], sampling: SamplingConfig, where: str, top_logprobs: int = 0
) -> Completion | None:
    for attempt in range(ATTEMPTS):
        seed = random.Random(f"{where}/{attempt}").getrandbits(31)
        completion = await client.complete(messages, sampling, seed, top_logprobs)
        if completion.text.strip():
            return completion
    return None


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
