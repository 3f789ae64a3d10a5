"""Self-study: conversations of two sides about a chunk of text, planned first and run later.

Side A asks as a seed prompt tells it, side B answers, and the log-probabilities of B's answers are what a student
learns from. The chunk stands in the system prompt that both sides see, and never in the messages, so that the student
learns how the model answers *because* it sees the chunk. The recipe is the paper's (arXiv 2506.06266). A and B may be
two models.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import math
import random
import re
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any, TypeVar

from synth import existing, given, seed_prompts
from synth.chunkers import Chunk, Chunker
from synth.clients.base import Client, Completion
from synth.config import SamplingConfig, Side, SynthConfig
from synth.conversation import Conversation, Message, flatten
from synth.seed_prompts import SeedPrompt
from synth.tools.base import Tool
from synth.tools.use import as_context, call_tools

ATTEMPTS = 3  # to get a question or an answer that is not empty
GOLDEN_RATIO = (math.sqrt(5) - 1) / 2

T = TypeVar("T")
ChatMessage = dict[str, str]


@dataclasses.dataclass(frozen=True)
class PlannedConversation:
    """A conversation that is not begun yet: what it begins with, and a function that runs it to its end."""

    index: int
    system_prompt: str
    prompt: SeedPrompt
    run: Callable[[], Coroutine[Any, Any, Conversation]]


async def plan_batch(
    index: int,
    count: int,
    answer_client: Client,
    question_client: Client,
    chunker: Chunker,
    config: SynthConfig,
    tools: Sequence[Tool] = (),
) -> list[PlannedConversation]:
    """Plans batch `index`: `count` conversations about one chunk.

    Each of them depends on the config and on its own index alone, so any of them may be run, in any order.
    """
    given.check(config)
    rng = random.Random(f"{config.seed}/{index}")
    chunks = await _chunks(index, rng, chunker, config)
    text = "\n\n".join(chunk.text for chunk in chunks)
    context = "\n\n".join(_described(chunk.text, config) for chunk in chunks)
    sides = _Sides(answer_client, question_client, tools, config)
    planned: list[PlannedConversation] = []
    asked: _FirstQuestions | None = None
    first = index * config.conversations_per_chunk
    for number in range(first, first + count):
        if asked is None or asked.is_full:
            prompt = seed_prompts.draw(config.seed_prompts, text, rng, config.seed_prompt_weights)
            asked = _FirstQuestions(prompt, 1 if prompt.is_question else config.questions_per_call, number)
        instruction = rng.choice(config.instructions)
        if plan := _existing(number, context, sides) or _given(number, sides):
            planned.append(plan)
            continue
        metadata = _metadata(number, asked.prompt, config) | {
            "chunk_span": [chunks[0].start, chunks[0].end],
            "resource": chunks[0].resource,
        }
        if len(chunks) > 1:
            metadata["chunk_spans"] = [[chunk.start, chunk.end] for chunk in chunks]
        if config.question_client:
            metadata["question_model"] = config.question_client.model
        system_prompt = config.system_prompt.replace("{chunk}", context)
        run = functools.partial(_converse, sides, system_prompt, asked, asked.join(), instruction, metadata)
        planned.append(PlannedConversation(number, system_prompt, asked.prompt, run))
    return planned


def _existing(number: int, context: str, sides: _Sides) -> PlannedConversation | None:
    """Plans conversation `number` if it exists already, so that only its answers are scored."""
    found = existing.conversation_of(number, sides.config)
    if found is None:
        return None
    opening = SeedPrompt("existing", found.messages[0]["content"], is_question=True)
    system_prompt = existing.system_prompt(found, context, sides.config)
    metadata = _metadata(number, opening, sides.config)
    run = functools.partial(existing.score, sides.answer_client, found.messages, system_prompt, sides.config, metadata)
    return PlannedConversation(number, system_prompt, opening, run)


def _given(number: int, sides: _Sides) -> PlannedConversation | None:
    """Plans conversation `number` if its question is given. It is about the chunk that the question names."""
    config = sides.config
    found = given.question_of(number, config)
    if found is None:
        return None
    opening = SeedPrompt("given", found.question, is_question=True)
    system_prompt = config.system_prompt.replace("{chunk}", _described(found.text, config))
    metadata = _metadata(number, opening, config) | {"chunk": found.chunk}
    if found.answer is None:
        asked = _FirstQuestions(opening, 1, number)
        run = functools.partial(_converse, sides, system_prompt, asked, asked.join(), "{question}", metadata)
    else:
        messages = ({"role": "user", "content": found.question}, {"role": "assistant", "content": found.answer})
        run = functools.partial(existing.score, sides.answer_client, messages, system_prompt, config, metadata)
    return PlannedConversation(number, system_prompt, opening, run)


def _metadata(number: int, prompt: SeedPrompt, config: SynthConfig) -> dict[str, Any]:
    return {
        "seed_prompt": prompt.text,
        "seed_prompt_type": prompt.kind,
        "conversation_index": number,
        "model": config.client.model,
    }


def _described(chunk: str, config: SynthConfig) -> str:
    return f"{config.description}\n\n{chunk}" if config.description else chunk


async def _chunks(index: int, rng: random.Random, chunker: Chunker, config: SynthConfig) -> list[Chunk]:
    # Steps of the golden ratio spread any number of batches evenly over the document; uniform draws would leave holes.
    position = (random.Random(f"{config.seed}/position").random() + index * GOLDEN_RATIO) % 1.0
    share = 1 / config.chunks_per_context
    return [await chunker.chunk(rng, (position + i * share) % 1.0) for i in range(config.chunks_per_context)]


@dataclasses.dataclass(frozen=True)
class _Sides:
    answer_client: Client
    question_client: Client
    tools: Sequence[Tool]
    config: SynthConfig

    def thinks(self, side: Side, where: str) -> bool | None:
        """Whether a side thinks before it writes, in the conversation named `where`; None leaves it to the template."""
        likely = self._of(side)[1].thinking
        return None if likely is None else random.Random(f"{where}/{side}/thinking").random() < likely

    def instructed(self, side: Side, text: str, thinks: bool | None) -> str:
        """The text that a side is to answer, with the instruction to think if it has one and is to think."""
        instruction = self._of(side)[1].thinking_instruction
        return f"{text}\n\n{instruction}" if thinks and instruction else text

    async def say(
        self,
        side: Side,
        seen: list[ChatMessage],
        where: str,
        thinks: bool | None,
        top_logprobs: int = 0,
        scale: int = 1,
    ) -> Completion:
        """A side's next message, asked for again while it is empty; it may be `scale` times as long as usual."""
        client, sampling = self._of(side)
        mode = None if thinks is None else float(thinks)
        sampling = dataclasses.replace(sampling, thinking=mode, max_tokens=sampling.max_tokens * scale)
        completion = await client.complete(seen, sampling, _seed(f"{where}/0"), top_logprobs)
        for attempt in range(1, ATTEMPTS):
            if completion.text.strip():
                break
            completion = await client.complete(seen, sampling, _seed(f"{where}/{attempt}"), top_logprobs)
        return completion

    async def call_tools(self, side: Side, seen: list[ChatMessage], where: str) -> list[dict[str, Any]]:
        """Lets a side call tools before it writes, and returns a record of each call."""
        if not self.tools or side not in self.config.tools.sides:
            return []
        client, sampling = self._of(side)
        return await call_tools(client, self.tools, seen, self.config.tools, sampling, _seed(f"{where}/tools"))

    def _of(self, side: Side) -> tuple[Client, SamplingConfig]:
        if side == "question":
            return self.question_client, self.config.question
        return self.answer_client, self.config.answer


class _FirstQuestions:
    """The first questions of `size` conversations. Side A writes several as one list, and a single one as a message."""

    def __init__(self, prompt: SeedPrompt, size: int, first: int):
        self.prompt, self._size, self._first = prompt, size, first
        self._joined = 0
        self._lock = asyncio.Lock()
        self._questions: list[str] | None = None

    @property
    def is_full(self) -> bool:
        return self._joined >= self._size

    @property
    def is_shared(self) -> bool:
        return self._size > 1

    def join(self) -> int:
        """Reserves a question of the list for the caller, and returns its place."""
        self._joined += 1
        return self._joined - 1

    async def question(self, place: int, sides: _Sides, system: ChatMessage) -> str:
        """The question at a place, or nothing if the list is too short. The first caller has side A write the list."""
        async with self._lock:
            if self._questions is None:
                self._questions = await self._ask(sides, system)
        return self._questions[place] if place < len(self._questions) else ""

    async def _ask(self, sides: _Sides, system: ChatMessage) -> list[str]:
        task = f"{self.prompt.text}\n\nDo this {self._size} times, each time about something else."
        task += " Number the results from 1, each on one line of its own, and write nothing else."
        best: list[str] = []
        thinks = sides.thinks("question", f"{sides.config.seed}/questions/{self._first}")
        seen = [system, {"role": "user", "content": sides.instructed("question", task, thinks)}]
        for attempt in range(ATTEMPTS):
            where = f"{sides.config.seed}/questions/{self._first}/{attempt}"
            said = await sides.say("question", seen, where, thinks, scale=self._size)
            best = max(best, _listed(strip_thinking(said.text)), key=len)
            if len(best) >= self._size:
                break
        return best


async def _converse(
    sides: _Sides,
    system_prompt: str,
    asked: _FirstQuestions,
    place: int,
    instruction: str,
    metadata: dict[str, Any],
) -> Conversation:
    """Runs a conversation. It ends early with an empty message, and is left to the filters then.

    The messages are kept as the answering side sees them, because the student will be asked the same: an instruction to
    think is part of a question, and earlier answers are given to the chat template with their thoughts, which it shows
    or hides.
    """
    config = sides.config
    name = f"{config.seed}/conversation/{metadata['conversation_index']}"
    asker_thinks, answerer_thinks = (sides.thinks(side, name) for side in ("question", "answer"))
    if answerer_thinks is not None:
        metadata["thinking"] = answerer_thinks
    asked_plainly: list[str] = []
    system = {"role": "system", "content": system_prompt}
    task = {"role": "user", "content": asked.prompt.text}
    messages: list[Message] = []
    turns: list[tuple[str, int]] = []  # for every message, why it ended and how many tokens were written
    calls: list[dict[str, Any]] = []

    async def call_tools_of(side: Side, seen: list[ChatMessage], where: str) -> list[ChatMessage]:
        """Lets a side call tools, and puts what they say into the context that both sides see from here on."""
        nonlocal system
        made = await sides.call_tools(side, seen, where)
        calls.extend(made)
        if text := as_context(made):
            system = {"role": "system", "content": f"{system['content']}\n\n{text}"}
        return [system, *seen[1:]]

    for number in range(config.rounds):
        where = f"{name}/{number}"

        if asked.prompt.is_question and not messages:
            messages.append(Message(asked.prompt.text, "user"))
            turns.append(("given", 0))
        elif asked.is_shared and not messages:
            text = await asked.question(place, sides, system)
            messages.append(Message(text and instruction.replace("{question}", text), "user"))
            turns.append(("listed", 0))
        else:
            seen = [system, task]
            for plain, answered in zip(asked_plainly, messages[1::2], strict=True):
                seen.append({"role": "assistant", "content": plain})
                seen.append({"role": "user", "content": strip_thinking(answered.content)})
            seen = await call_tools_of("question", seen, f"{where}/question")
            seen[-1] = seen[-1] | {"content": sides.instructed("question", seen[-1]["content"], asker_thinks)}
            question = await sides.say("question", seen, f"{where}/question", asker_thinks)
            text = strip_thinking(question.text)
            if text.strip() and not messages and instruction != "{question}":
                text = instruction.replace("{question}", text.strip())
            # the ids that were sampled are the text's only if nothing was added and nothing cut off
            is_whole = text == question.text and not config.question.stop
            is_ours = config.question_client is None  # another model's ids mean nothing here
            messages.append(Message(text, "user", question.token_ids if is_whole and is_ours else None))
            turns.append((question.finish_reason, question.completion_tokens))
        if not messages[-1].content.strip():
            break
        asked_plainly.append(messages[-1].content)
        told = sides.instructed("answer", messages[-1].content, answerer_thinks)
        if told != messages[-1].content:
            messages[-1] = Message(told, "user")

        seen = [system, *({"role": m.role, "content": m.content} for m in messages)]
        seen = await call_tools_of("answer", seen, f"{where}/answer")
        answer = await sides.say("answer", seen, f"{where}/answer", answerer_thinks, config.top_logprobs)
        top_logprobs = flatten(answer.top_logprobs or (), config.min_prob_mass)
        messages.append(Message(answer.text, "assistant", answer.token_ids, top_logprobs))
        turns.append((answer.finish_reason, answer.completion_tokens))
        if not answer.text.strip():
            break
    metadata |= {
        "finish_reasons": [reason for reason, _ in turns],
        "completion_tokens": [tokens for _, tokens in turns],
    }
    if sides.tools:
        metadata["tool_calls"] = calls
    return Conversation(tuple(messages), system["content"], metadata, type="self_study")


def strip_thinking(text: str) -> str:
    """A message without the thoughts before it; nothing, if it was cut off while the model was still thinking."""
    _, end, said = text.rpartition("</think>")
    if end:
        return said.lstrip("\n")
    return "" if text.lstrip().startswith("<think>") else text


def _listed(text: str) -> list[str]:
    return [found.strip() for found in re.findall(r"^\W{0,3}\d+\W{1,3}(.*\w.*)$", text, re.MULTILINE)]


def _seed(where: str) -> int:
    return random.Random(where).getrandbits(31)


async def all_or_none(coroutines: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Like `asyncio.gather`, but the first error stops the others. Unlike a TaskGroup, it raises that error itself."""
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
