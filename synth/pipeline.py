"""From a config to `dataset.parquet`: bounded, and resumable at any moment.

A batch (the conversations about one chunk) depends on the config and on its index alone, and is one file in `parts/`,
whole or absent. So those files are all that a killed run has to leave behind; the next run makes the others.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import logging
import random
import time
from pathlib import Path
from typing import Any

from command_line import files
from command_line.progress import Progress
from synth import chunkers, conversation
from synth.chunkers import Chunker, LocalTokenizer
from synth.clients.base import Unavailable
from synth.clients.openai import OpenAIClient
from synth.config import SynthConfig
from synth.resources import reading
from synth.self_study import all_or_none, study

GIVE_UP_AFTER = 8  # batches that failed in a row

log = logging.getLogger(__name__)

# What may change between a run and its continuation: where things are and how fast they go, not what comes out.
FREE_KEYS = (
    "output_dir",
    "num_conversations",
    "max_chunks_in_flight",
    "resource.path",
    "resource.api_url",
    "client.base_url",
    "client.timeout_seconds",
    "client.max_retries",
)


async def synthesize(config: SynthConfig) -> Path:
    """Makes the dataset, or what is missing of it, and returns its path.

    Raises:
      ValueError: the document, the server's model or the output folder does not fit the config.
      Unavailable: some batches failed after all retries; calling again goes on from there.
    """
    output = Path(config.output_dir)
    dataset = output / "dataset.parquet"
    corpus = reading.read(config.resource, output)
    _claim(output, config, corpus.to_string())
    reading.keep(config.resource, corpus, output)
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
        async with OpenAIClient(config.client, random.Random(f"{config.seed}/retries")) as client:
            await client.check()
            tokenizer = LocalTokenizer(config.chunker.tokenizer) if config.chunker.tokenizer else client
            chunker = await chunkers.create(config.chunker, tokenizer, corpus)
            await _work(missing, sizes, client, chunker, config)

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


async def _work(
    missing: list[int], sizes: list[int], client: OpenAIClient, chunker: Chunker, config: SynthConfig
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
        return f"tokens/s {client.prompt_tokens / seconds:.0f} in, {client.completion_tokens / seconds:.0f} out"

    async def worker() -> None:
        nonlocal failed_in_a_row
        # Then the server is gone, and waiting in vain for every batch that is left would take hours.
        while queue and failed_in_a_row < GIVE_UP_AFTER:
            index = queue.popleft()
            try:
                batch = await study(index, sizes[index], client, chunker, config)
            except Unavailable as error:
                failed_in_a_row += 1
                failures[index] = str(error)
                log.error("batch %d (%d conversations) failed: %s", index, sizes[index], error)
                continue
            failed_in_a_row = 0
            notes = {"requested": str(sizes[index]), "dropped": str(batch.dropped)}
            conversation.write(_part(output, index), batch.conversations, notes)
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
    del ours["client"]["api_key"]
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
