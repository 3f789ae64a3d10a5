"""An index of a dataset: where each conversation lies, and counts of them. The conversations stay on disk."""

from __future__ import annotations

import bisect
import collections
import dataclasses
import functools
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cartridges_jax.command_line.progress import Progress
from synth import conversation, dataset
from synth.conversation import Conversation
from synth.dataset import Head

TABLES_KEPT = 4  # row groups with all their columns
OPEN_FILES = 32
SEARCHES_KEPT = 16


@dataclasses.dataclass(frozen=True)
class Group:
    """A row group (a block of rows) of one of the files."""

    path: Path
    number: int
    first: int  # the number of its first conversation


class Index:
    """The index of one dataset. Several threads may use it.

    Raises:
      FileNotFoundError, UserError: a file that is not there, damaged, or no conversation dataset.
    """

    def __init__(self, files: Sequence[Path]):
        self._lock = threading.Lock()  # an open Parquet file is not for two threads
        self._open = functools.lru_cache(OPEN_FILES)(conversation.open_file)
        self._table = functools.lru_cache(TABLES_KEPT)(self._read_table)
        self.find = functools.lru_cache(SEARCHES_KEPT)(self._find)
        self._groups: list[Group] = []
        self.total = 0
        for path in files:
            metadata = self._open(path).metadata
            for number in range(metadata.num_row_groups):
                self._groups.append(Group(path, number, self.total))
                self.total += metadata.row_group(number).num_rows
        self._firsts = [group.first for group in self._groups]
        self.kinds: collections.Counter[str] = collections.Counter()
        self.resources: collections.Counter[str] = collections.Counter()
        self.endings: collections.Counter[str] = collections.Counter()
        self.models: collections.Counter[str] = collections.Counter()
        self.kind_of: list[str] = []
        self.question_tokens = np.zeros(self.total, np.int32)
        self.answer_tokens = np.zeros(self.total, np.int32)
        self.spans: dict[str, list[tuple[int, int]]] = collections.defaultdict(list)  # by resource
        self._scan()

    def _scan(self) -> None:
        progress = Progress("reading", self.total, "conversations")
        for group in self._groups:
            heads = self._heads(group)
            for place, head in enumerate(heads, group.first):
                self._count(place, head)
            progress.advance(len(heads))
        progress.close()

    def _count(self, place: int, head: Head) -> None:
        kind, metadata = head.seed_type, head.metadata
        self.kinds[kind] += 1
        self.kind_of.append(kind)
        resource = str(metadata.get("resource") or "")
        self.resources[resource] += 1
        self.endings[str((metadata.get("finish_reasons") or ["unknown"])[-1])] += 1
        if metadata.get("model"):
            self.models[str(metadata["model"])] += 1
        self.question_tokens[place], self.answer_tokens[place] = head.count("user"), head.count("assistant")
        match metadata.get("chunk_span"):
            case [int(start), int(end)]:
                self.spans[resource].append((start, end))

    def _heads(self, group: Group) -> list[Head]:
        with self._lock:
            file = self._open(group.path)
            table = file.read_row_group(group.number, columns=dataset.light_columns(file))
        return [dataset.head_of(row) for row in table.to_pylist()]

    def heads(self, places: Sequence[int]) -> list[Head]:
        """The heads of the conversations at `places`, which ascend."""
        found: list[Head] = []
        group, heads = None, []
        for place in places:
            own = self._group(place)
            if own != group:
                group, heads = own, self._heads(own)
            found.append(heads[place - own.first])
        return found

    def conversation(self, place: int) -> Conversation:
        group = self._group(place)
        return next(conversation.from_batch(self._table(group).slice(place - group.first, 1)))

    def sample(self, count: int) -> list[Conversation]:
        """About `count` conversations from row groups spread evenly over the dataset."""
        groups = self._groups[:: max(1, len(self._groups) // 4)][:4]
        share = -(-count // max(1, len(groups)))
        return [made for group in groups for made in conversation.from_batch(self._table(group).slice(0, share))]

    def _find(self, kind: str, words: str, in_context: bool) -> np.ndarray:
        """The places of conversations of seed type `kind` (all, if empty) that hold `words` in upper or lower case."""
        found = np.ones(self.total, bool)
        if kind:
            found &= np.array([own == kind for own in self.kind_of], bool)
        if words:
            held = [self._holds(group, words, in_context) for group in self._groups]
            found &= np.concatenate(held) if held else found
        return np.nonzero(found)[0]

    def _holds(self, group: Group, words: str, in_context: bool) -> np.ndarray:
        with self._lock:
            file = self._open(group.path)
            paths = dataset.light_columns(file)
            wanted = [path for path in paths if path.endswith(".content") or (in_context and path == "system_prompt")]
            table = file.read_row_group(group.number, columns=wanted)
        messages = table.column("messages").combine_chunks()
        hit = _matches(messages.flatten().field("content"), words)
        # a row holds the words if the count of hits grows between its first message and its last
        counts = np.concatenate([[0], np.cumsum(hit)])
        ends = np.cumsum(pc.fill_null(pc.list_value_length(messages), 0).to_numpy(zero_copy_only=False))
        starts = np.concatenate([[0], ends[:-1]])
        found = counts[ends] > counts[starts]
        return found | _matches(table.column("system_prompt"), words) if in_context else found

    def _group(self, place: int) -> Group:
        return self._groups[bisect.bisect_right(self._firsts, place) - 1]

    def _read_table(self, group: Group) -> pa.Table:
        with self._lock:
            return self._open(group.path).read_row_group(group.number, columns=list(conversation.COLUMNS))


def _matches(texts: Any, words: str) -> np.ndarray:
    held = pc.match_substring(texts, words, ignore_case=True)
    return pc.fill_null(held, False).to_numpy(zero_copy_only=False)
