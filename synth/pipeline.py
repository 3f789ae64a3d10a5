"""From a config to `dataset.parquet`: bounded, and resumable at any moment.

A batch (the conversations about one chunk) depends on the config and on its index alone, and is one file in `parts/`,
whole or absent. So those files are all that a killed run has to leave behind; the next run makes the others.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import hashlib
import json
import logging
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

from command_line import files
from command_line.progress import Progress
from synth import conversation, tools
from synth.chunkers import LocalTokenizer, TokenChunker
from synth.clients import connect
from synth.clients.base import Busy, ChatMessages, Client, Completion, Unavailable
from synth.config import ClientConfig, SamplingConfig, SynthConfig
from synth.resources.text import TextFile
from synth.self_study import all_or_none, study
from synth.tools.base import Tool

FIRST_BACKOFF_SECONDS, LONGEST_BACKOFF_SECONDS = 0.5, 30.0
GIVE_UP_AFTER = 8  # batches that failed in a row

T = TypeVar("T")

log = logging.getLogger(__name__)

# What may change between a run and its continuation: where things are and how fast they go, not what comes out.
FREE_KEYS = (
    "output_dir",
    "num_conversations",
    "max_chunks_in_flight",
    "resource.path",
    *(
        f"{client}.{key}"
        for client in ("client", "question_client")
        for key in ("base_url", "timeout_seconds", "max_retries")
    ),
)


async def synthesize(config: SynthConfig) -> Path:
    """Makes the dataset, or what is missing of it, and returns its path.

    Raises:
      ValueError: the document, the server's model or the output folder does not fit the config.
      Unavailable: some batches failed after all retries; calling again goes on from there.
    """
    output = Path(config.output_dir)
    dataset = output / "dataset.parquet"
    text = TextFile(config.resource).read()
    _claim(output, config, text)
    if _is_complete(dataset, config):
        print(f"{dataset} is complete")
        return dataset

    sizes = _batch_sizes(config)
    done = {index for index, size in enumerate(sizes) if _is_done(_part(output, index), size)}
    missing = [index for index in range(len(sizes)) if index not in done]
    if missing:
        finished = sum(sizes[index] for index in done)
        if finished:
            print(f"{output} holds {finished} of {config.num_conversations} conversations, going on from there")
        answers, questions = config.client, config.question_client or config.client
        async with (
            _Retrying(connect(answers, answers.urls[0]), answers, config.seed) as client,
            _Retrying(connect(questions, questions.urls[0]), questions, config.seed) as question_client,
            tools.opened(config, text) as toolbox,
        ):
            await client.check()
            if config.question_client:
                await question_client.check()
            tokenizer = LocalTokenizer(config.chunker.tokenizer) if config.chunker.tokenizer else client
            chunker = await TokenChunker.create(config.chunker, tokenizer, text)
            await _work(missing, sizes, client, question_client, chunker, config, toolbox)

    parts = [_part(output, index) for index in range(len(sizes))]
    dropped = sum(int(conversation.read_notes(part)[1]["dropped"]) for part in parts)
    if dropped == config.num_conversations:
        raise ValueError(
            f"all {dropped} conversations came out empty: try another model or config.system_prompt, "
            "with another config.output_dir"
        )
    notes = {"requested": str(config.num_conversations), "dropped": str(dropped)}
    conversation.merge(parts, dataset, notes)
    print(_summary(dataset, dropped))
    return dataset


class _Retrying:
    """A client that tries a call again, after growing waits, and counts the tokens that pass."""

    def __init__(self, client: Client, config: ClientConfig, seed: int):
        self._client, self._attempts = client, config.max_retries + 1
        self._rng = random.Random(f"{seed}/retries")
        self.prompt_tokens = self.completion_tokens = 0

    async def __aenter__(self) -> Self:
        await self._client.__aenter__()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._client.__aexit__(*error)

    async def check(self) -> None:
        await self._client.check()

    async def complete(
        self, messages: ChatMessages, sampling: SamplingConfig, seed: int, top_logprobs: int = 0
    ) -> Completion:
        return self._count(await self._try(lambda: self._client.complete(messages, sampling, seed, top_logprobs)))

    async def score(self, messages: ChatMessages, top_logprobs: int) -> Completion:
        return self._count(await self._try(lambda: self._client.score(messages, top_logprobs)))

    async def tokenize(self, text: str) -> list[int]:
        return await self._try(lambda: self._client.tokenize(text))

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        return await self._try(lambda: self._client.detokenize(token_ids))

    def _count(self, completion: Completion) -> Completion:
        self.prompt_tokens += completion.prompt_tokens
        self.completion_tokens += completion.completion_tokens
        return completion

    async def _try(self, call: Callable[[], Awaitable[T]]) -> T:
        for attempt in range(1, self._attempts):
            try:
                return await call()
            except Unavailable as error:
                backoff = min(FIRST_BACKOFF_SECONDS * 2 ** (attempt - 1), LONGEST_BACKOFF_SECONDS)
                asked = error.retry_after if isinstance(error, Busy) else 0.0
                wait = max(asked, backoff * self._rng.uniform(0.5, 1.0))
                log.warning("%s; retry %d of %d in %.1f s", error, attempt, self._attempts - 1, wait)
                await asyncio.sleep(wait)
        return await call()


async def _work(
    missing: list[int],
    sizes: list[int],
    client: _Retrying,
    question_client: _Retrying,
    chunker: TokenChunker,
    config: SynthConfig,
    toolbox: Sequence[Tool],
) -> None:
    output = Path(config.output_dir)
    total, to_do = sum(sizes), sum(sizes[index] for index in missing)
    progress = Progress("synth", total, "conversations", done=total - to_do)
    queue = collections.deque(missing)
    failures: dict[int, str] = {}
    failed_in_a_row = 0
    start = time.monotonic()

    def note() -> str:
        seconds = max(time.monotonic() - start, 1e-9)
        tokens_in = client.prompt_tokens + question_client.prompt_tokens
        tokens_out = client.completion_tokens + question_client.completion_tokens
        return f"tokens/s {tokens_in / seconds:.0f} in, {tokens_out / seconds:.0f} out"

    async def worker() -> None:
        nonlocal failed_in_a_row
        # Then the server is gone, and waiting in vain for every batch that is left would take hours.
        while queue and failed_in_a_row < GIVE_UP_AFTER:
            index = queue.popleft()
            try:
                talks = await study(index, sizes[index], client, question_client, chunker, config, toolbox)
                held = await all_or_none(talk.hold() for talk in talks)
            except Unavailable as error:
                failed_in_a_row += 1
                failures[index] = str(error)
                log.error("batch %d (%d conversations) failed: %s", index, sizes[index], error)
                continue
            failed_in_a_row = 0
            kept = [one for one in held if one is not None]
            notes = {"requested": str(sizes[index]), "dropped": str(len(held) - len(kept))}
            conversation.write(_part(output, index), kept, notes)
            progress.advance(sizes[index], note())

    try:
        await all_or_none(worker() for _ in range(config.max_chunks_in_flight))
    finally:
        progress.close(note())
    absent = sum(sizes[index] for index in [*failures, *queue])
    if absent:
        raise Unavailable(
            f"{absent} of {total} conversations are missing, {len(failures)} batches failed and {len(queue)} were not "
            f"tried: the same command makes only those (last failure: {list(failures.values())[-1]})"
        )


def _batch_sizes(config: SynthConfig) -> list[int]:
    whole, rest = divmod(config.num_conversations, config.conversations_per_chunk)
    return [config.conversations_per_chunk] * whole + [rest] * (rest > 0)


def _part(output: Path, index: int) -> Path:
    return output / "parts" / f"part-{index:05d}.parquet"


def _is_done(part: Path, size: int) -> bool:
    """Whether a part is whole and holds its batch; the last batch of an earlier, smaller run may be too small."""
    if not part.exists():
        return False
    try:
        rows, notes = conversation.read_notes(part)
        if rows + int(notes["dropped"]) != int(notes["requested"]):
            raise ValueError(
                f"{part} holds {rows} conversations and {notes['dropped']} dropped of {notes['requested']}"
            )
    except KeyError as error:
        log.warning("%s was not written by this command, it has no %s: making it again", part, error)
        return False
    except ValueError as error:
        log.warning("%s: making it again", error)
        return False
    return int(notes["requested"]) >= size


def _is_complete(dataset: Path, config: SynthConfig) -> bool:
    if not dataset.exists():
        return False
    try:
        return conversation.read_notes(dataset)[1].get("requested") == str(config.num_conversations)
    except ValueError as error:
        log.warning("%s: making it again", error)
        return False


def _claim(output: Path, config: SynthConfig, text: str) -> None:
    """Ties the folder to its config once it holds data, and refuses any other config then: parts of two would mix."""
    ours = dataclasses.asdict(config) | {"document_sha256": hashlib.sha256(text.encode()).hexdigest()}
    for client in filter(None, (ours["client"], ours["question_client"])):
        del client["api_key"]
    ours = json.loads(json.dumps(ours))
    path = output / "config.json"
    if (output / "dataset.parquet").exists() or any((output / "parts").glob("*.parquet")):
        try:
            theirs = json.loads(path.read_text(encoding="utf-8"))
            made = theirs["num_conversations"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{output} holds data, but {path} does not say how it was made: choose another config.output_dir"
            ) from error
        before, now = _leaves(theirs), _leaves(ours)
        for key in sorted(before.keys() | now.keys()):
            if key not in FREE_KEYS and before.get(key) != now.get(key):
                if key == "document_sha256":
                    raise ValueError(
                        f"{config.resource.path} is not the text that {output} was made from: "
                        "bring that text back or choose another config.output_dir"
                    )
                raise ValueError(
                    f"config.{key} is {now.get(key)!r}, but {output} was made with {before.get(key)!r}: go back to "
                    "that value or choose another config.output_dir"
                )
        if config.num_conversations < made:
            raise ValueError(
                f"config.num_conversations is {config.num_conversations}, but {output} was made for {made}: "
                "it may grow, not shrink; choose another config.output_dir"
            )
    files.write_text(path, json.dumps(ours, indent=2) + "\n")


def _leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return leaves


def _summary(dataset: Path, dropped: int) -> str:
    kinds: collections.Counter[str] = collections.Counter()
    questions, answers, truncated, duplicates = [], [], 0, 0
    seen: set[bytes] = set()
    for made in conversation.iterate(dataset):
        kinds[made.metadata["seed_prompt_type"]] += 1
        lengths, reasons = made.metadata["completion_tokens"], made.metadata["finish_reasons"]
        questions += lengths[0::2]
        answers += lengths[1::2]
        truncated += reasons[1::2].count("length")
        words = hashlib.sha256("\0".join(message.content for message in made.messages).encode()).digest()
        duplicates += words in seen
        seen.add(words)
    return (
        f"{dataset}: {sum(kinds.values())} conversations "
        f"({', '.join(f'{kind} {count}' for kind, count in sorted(kinds.items()))})\n"
        f"mean tokens: question {_mean(questions):.1f}, answer {_mean(answers):.1f}; truncated answers: {truncated}; "
        f"dropped as empty: {dropped}; duplicates: {duplicates}"
    )


def _mean(values: list[int]) -> float:
    return sum(values) / len(values) if values else 0.0
