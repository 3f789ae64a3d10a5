"""Makes `dataset.parquet` from a config, with bounded memory, in a run that may be stopped and resumed at any moment.

One task cuts chunks and plans the conversations about them. A fixed number of workers run these, each from its first
question to its last answer, and what they finish is on disk within seconds. A conversation depends on the config and on
its index alone, so a later run makes just those that are missing.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pyarrow as pa

from cartridges_jax.command_line import files
from cartridges_jax.command_line.errors import UserError
from cartridges_jax.command_line.progress import Progress
from synth import chunkers, conversation, given
from synth.chunkers import Chunker, LocalTokenizer
from synth.clients.base import Unavailable
from synth.config import SynthConfig
from synth.conversation import Conversation
from synth.filters import Filter
from synth.fleet import Fleet
from synth.folder import claim
from synth.parts import Parts
from synth.resources import reading
from synth.resources.reading import Corpus
from synth.self_study import PlannedConversation, all_or_none, plan_batch
from synth.summary import Summary
from synth.tools import toolbox
from synth.tools.base import Tool

GIVE_UP_AFTER = 8  # conversations that failed in a row
SECONDS_TO_DISK, ROWS_PER_PART = 2.0, 256  # a part is written after so long, or as soon as it has so many rows

log = logging.getLogger(__name__)


async def synthesize(config: SynthConfig) -> Path:
    """Makes the dataset, or what is missing of it, and returns its path.

    Raises:
      UserError: the document, the server's model or the output folder does not fit the config.
      Unavailable: some conversations failed after all retries; calling again goes on from there.
    """
    output = Path(config.output_dir)
    dataset = output / "dataset.parquet"
    corpus = reading.read(config.resource, output)
    for resource in corpus.resources:
        print(resource.told)
    given.check(config)
    if config.given_questions:
        print(given.told(config))
    with files.locked(output):
        claim(output, config, corpus.to_string())
        reading.keep(config.resource, corpus, output)
        if _is_complete(dataset, config):
            print(f"{dataset} is complete")
            return dataset
        parts = Parts(output / "parts", config.num_conversations)
        if parts.finished < parts.count:
            await _make(parts, corpus, config)
        print(f"{dataset}: {_finish(parts, dataset, config)}")
    return dataset


async def _make(parts: Parts, corpus: Corpus, config: SynthConfig) -> None:
    if parts.finished:
        print(f"{config.output_dir} holds {parts.finished} of {parts.count} conversations, going on from there")
    async with contextlib.AsyncExitStack() as stack:
        answers = questions = await stack.enter_async_context(Fleet(config.client, config.seed))
        await answers.check()
        if config.question_client:
            questions = await stack.enter_async_context(Fleet(config.question_client, config.seed))
            await questions.check()
        tools = await stack.enter_async_context(toolbox.opened(config, corpus.to_string()))
        route = answers.route()
        tokenizer = LocalTokenizer(config.chunker.tokenizer) if config.chunker.tokenizer else route
        chunker = await chunkers.create(config.chunker, tokenizer, corpus)
        await _Run(parts, answers, questions, chunker, config, tools).run()


class _Run:
    def __init__(
        self,
        parts: Parts,
        answers: Fleet,
        questions: Fleet,
        chunker: Chunker,
        config: SynthConfig,
        tools: Sequence[Tool],
    ):
        self._parts, self._answers, self._questions = parts, answers, questions
        self._chunker, self._config, self._tools = chunker, config, tools
        self._planned: asyncio.Queue[PlannedConversation | None] = asyncio.Queue(config.conversations_per_chunk)
        self._finished: list[tuple[int, Conversation]] = []
        self._failures, self._failed_in_a_row, self._last_failure = 0, 0, ""
        self._is_over = asyncio.Event()
        self._start = time.monotonic()
        self._progress = Progress("synth", parts.count, "conversations", done=parts.finished)

    async def run(self) -> None:
        """Makes what is missing. Raises: Unavailable, if some is still missing then; the sentence says how much."""
        try:
            await all_or_none([self._converse(), self._record_regularly()])
        except _GivenUp:
            pass
        finally:
            self._record()
            self._progress.close(self._note())
        missing = self._parts.count - self._parts.finished
        if missing:
            raise Unavailable(
                f"{missing} of {self._parts.count} conversations are missing, {self._failures} failed and "
                f"{missing - self._failures} were not finished: the same command makes only those "
                f"(last failure: {self._last_failure})"
            )

    async def _converse(self) -> None:
        number = self._config.max_chunks_in_flight * self._config.conversations_per_chunk
        await all_or_none([self._plan(number), *(self._work() for _ in range(number))])
        self._is_over.set()

    async def _plan(self, workers: int) -> None:
        size = self._config.conversations_per_chunk
        for first in range(0, self._parts.count, size):
            missing = {i for i in range(first, min(first + size, self._parts.count)) if not self._parts.has(i)}
            if not missing:
                continue
            answers = self._answers.route()
            questions = answers if self._questions is self._answers else self._questions.route()
            try:
                planned = await plan_batch(
                    first // size,
                    max(missing) - first + 1,
                    answers,
                    questions,
                    self._chunker,
                    self._config,
                    self._tools,
                )
            except Unavailable as error:
                self._fail(error, len(missing), f"the chunk of conversations {first} to {max(missing)}")
                continue
            for plan in planned:
                if plan.index in missing:
                    await self._planned.put(plan)
        for _ in range(workers):
            await self._planned.put(None)

    async def _work(self) -> None:
        while plan := await self._planned.get():
            try:
                made = await plan.run()
            except Unavailable as error:
                self._fail(error, 1, f"conversation {plan.index}")
                continue
            self._failed_in_a_row = 0
            self._finished.append((plan.index, made))
            if len(self._finished) >= ROWS_PER_PART:
                self._record()
            self._progress.advance(1, self._note())

    def _fail(self, error: Unavailable, count: int, what: str) -> None:
        log.error("%s failed: %s", what, error)
        self._failures += count
        self._failed_in_a_row += 1
        self._last_failure = str(error)
        if self._failed_in_a_row >= GIVE_UP_AFTER:
            raise _GivenUp  # the servers are gone, and waiting in vain for everything that is left would take hours

    async def _record_regularly(self) -> None:
        while not self._is_over.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._is_over.wait(), SECONDS_TO_DISK)
            self._record()

    def _record(self) -> None:
        finished, self._finished = self._finished, []
        if finished:
            self._parts.add(finished)

    def _note(self) -> str:
        seconds = max(time.monotonic() - self._start, 1e-9)
        fleets = {self._answers, self._questions}
        tokens_in, tokens_out = sum(f.prompt_tokens for f in fleets), sum(f.completion_tokens for f in fleets)
        errors = sum((fleet.errors for fleet in fleets), Counter())
        failed = "".join(f", {kind} {count}" for kind, count in errors.most_common())
        return f"tokens/s {tokens_in / seconds:.0f} in, {tokens_out / seconds:.0f} out{failed}"


class _GivenUp(Exception):
    pass


def _finish(parts: Parts, dataset: Path, config: SynthConfig) -> Summary:
    """Writes the conversations that the filters keep, in the order of their indices.

    Raises:
      UserError: the filters keep none.
    """
    filters, summary = Filter(config.filters), Summary(config.filters)

    def kept() -> Iterator[pa.Table]:
        for table in parts.tables():
            stay = []
            for outline in conversation.outlines(table):
                found, stays = filters.check(outline)
                summary.add(outline, found, stays)
                stay.append(stays)
            yield table.filter(pa.array(stay))
        if not summary.kept:
            raise UserError(
                f"the filters leave none of {summary.total} conversations ({summary.findings}): switch one off, or "
                "try another model or config.system_prompt with another config.output_dir"
            )

    conversation.write_tables(dataset, kept(), lambda: _notes(config))
    return summary


def _notes(config: SynthConfig) -> Mapping[str, str]:
    return {"requested": str(config.num_conversations), "filters": json.dumps(dataclasses.asdict(config.filters))}


def _is_complete(dataset: Path, config: SynthConfig) -> bool:
    if not dataset.exists():
        return False
    try:
        notes = conversation.read_notes(dataset)[1]
    except UserError as error:
        log.warning("%s: making it again", error)
        return False
    return all(notes.get(key) == value for key, value in _notes(config).items())
