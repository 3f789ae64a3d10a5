"""The finished conversations of a run, in numbered Parquet files (parts) that are each whole or absent.

They are all that has to survive when a run is killed. A part holds the conversations that ended within two seconds, in
the order in which they ended. Small parts are joined once there are many of them. The conversations are put in order
when all are there.
"""

from __future__ import annotations

import functools
import json
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from cartridges_jax.command_line.errors import UserError
from synth import conversation
from synth.conversation import ROWS_PER_GROUP, Conversation

FEW_ROWS, MANY_PARTS = 64, 32  # that many parts with fewer rows each become one
PARTS_IN_MEMORY = 4

_NAME = re.compile(r"part-(\d+)\.parquet")

log = logging.getLogger(__name__)


class Parts:
    """The parts in a folder. `place[i]` is the number of conversation i's part and its row there, or -1, -1."""

    def __init__(self, folder: Path, count: int):
        self._folder, self.count = folder, count
        self.place = np.full((count, 2), -1, np.int32)
        self._small: dict[int, list[int]] = {}  # part -> indices of its rows
        self._next = 0
        names = [_NAME.fullmatch(path.name) for path in folder.glob("part-*.parquet")]
        # From the newest: a part whose rows are all in a later one was joined into it just before the run was killed.
        for number in sorted((int(name[1]) for name in names if name), reverse=True):
            self._next = max(self._next, number + 1)
            self._find(number)

    def _find(self, number: int) -> None:
        path = self._path(number)
        try:
            rows, notes = conversation.read_notes(path)
            indices = json.loads(notes["indices"])
            if len(indices) != rows:
                raise UserError(f"{path} holds {rows} conversations and says {len(indices)}")
        except KeyError as error:
            log.warning("%s was not written by this command, it has no %s: making it again", path, error)
        except ValueError as error:
            log.warning("%s: making it again", error)
        else:
            inside = [index for index in indices if index < self.count]
            if inside and (self.place[inside, 0] >= 0).all():
                path.unlink()
                return
            self._note(number, indices)

    def _note(self, number: int, indices: list[int]) -> None:
        for row, index in enumerate(indices):
            if index < self.count:
                self.place[index] = number, row
        if len(indices) < FEW_ROWS:
            self._small[number] = indices

    @property
    def finished(self) -> int:
        return int((self.place[:, 0] >= 0).sum())

    def has(self, index: int) -> bool:
        return self.place[index, 0] >= 0

    def add(self, finished: Sequence[tuple[int, Conversation]]) -> None:
        """Writes conversations, with their indices, as one more part."""
        indices = [index for index, _ in finished]
        number = self._next
        conversation.write(self._path(number), (one for _, one in finished), _notes(indices))
        self._next += 1
        self._note(number, indices)
        if len(self._small) >= MANY_PARTS:
            self._join()

    def _join(self) -> None:
        old, number = self._small, self._next
        indices = [index for rows in old.values() for index in rows]
        conversation.write_tables(self._path(number), map(self._read, old), lambda: _notes(indices))
        self._next += 1
        self._small = {}
        self._note(number, indices)
        for path in map(self._path, old):
            path.unlink()

    def tables(self) -> Iterator[pa.Table]:
        """All conversations in the order of their indices, with little memory."""
        read = functools.lru_cache(PARTS_IN_MEMORY)(self._read)
        for start in range(0, self.count, ROWS_PER_GROUP):
            numbers, rows = self.place[start : start + ROWS_PER_GROUP].T
            pieces = [read(int(number)).take(rows[numbers == number]) for number in np.unique(numbers)]
            # the pieces lie one behind the other as a stable sort by part would put their rows
            order = np.argsort(np.argsort(numbers, kind="stable"), kind="stable")
            yield pa.concat_tables(pieces).take(order)

    def _read(self, number: int) -> pa.Table:
        return conversation.read_table(self._path(number))

    def _path(self, number: int) -> Path:
        return self._folder / f"part-{number:05d}.parquet"


def _notes(indices: Iterable[int]) -> dict[str, str]:
    return {"indices": json.dumps(list(indices), separators=(",", ":"))}
