"""The record that synthesis writes and training reads, and its Parquet layout.

Columns and types are upstream's (HazyResearch/cartridges), so files pass both ways; only `metadata` is a JSON string
here, because a struct whose lists happen to be empty has no type that a later file could agree with.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import operator
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cartridges_jax.command_line import files
from cartridges_jax.command_line.errors import UserError
from synth.columns import Columns

COLUMNS = ("messages", "system_prompt", "metadata", "type")
MESSAGE_FIELDS = ("content", "role", "token_ids", "top_logprobs")
TOP_LOGPROBS_FIELDS = ("token_idx", "token_id", "logprobs", "shape")
ROWS_PER_GROUP = 1024

_IDS = pa.list_(pa.int64())
_TOP_LOGPROBS = pa.struct(
    {"token_idx": _IDS, "token_id": pa.list_(pa.int32()), "logprobs": pa.list_(pa.float32()), "shape": _IDS}
)
_MESSAGE = pa.struct({"content": pa.string(), "role": pa.string(), "token_ids": _IDS, "top_logprobs": _TOP_LOGPROBS})
SCHEMA = pa.schema(
    {"messages": pa.list_(_MESSAGE), "system_prompt": pa.string(), "metadata": pa.string(), "type": pa.string()}
)


@dataclasses.dataclass(frozen=True, eq=False)
class TopLogprobs:
    """The teacher's likeliest tokens: at place `token_idx[i]` of the message's ids, `token_id[i]` had `logprobs[i]`."""

    token_idx: np.ndarray  # int64, 0-based inside the message
    token_id: np.ndarray  # int32
    logprobs: np.ndarray  # float32
    shape: tuple[int, int]  # (rows, k) before entries were dropped

    def __post_init__(self):
        for name, dtype in (("token_idx", np.int64), ("token_id", np.int32), ("logprobs", np.float32)):
            object.__setattr__(self, name, _as(dtype, getattr(self, name), name))
        object.__setattr__(self, "shape", tuple(map(int, self.shape)))
        if not len(self.token_idx) == len(self.token_id) == len(self.logprobs):
            raise UserError(
                f"top_logprobs has {len(self.token_idx)} token_idx, {len(self.token_id)} token_id and "
                f"{len(self.logprobs)} logprobs, expected as many of each"
            )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TopLogprobs) and all(
            np.array_equal(getattr(self, name), getattr(other, name)) for name in TOP_LOGPROBS_FIELDS
        )


@dataclasses.dataclass(frozen=True)
class Message:
    content: str
    role: str  # user, assistant or system
    token_ids: tuple[int, ...] | None = None
    top_logprobs: TopLogprobs | None = None


@dataclasses.dataclass(frozen=True)
class Conversation:
    messages: tuple[Message, ...]
    system_prompt: str
    metadata: dict[str, Any]
    type: str | None = None


def flatten(rows: Sequence[Sequence[tuple[int, float]]], min_prob_mass: float = 0.99) -> TopLogprobs:
    """Keeps the likeliest (token id, log-probability) pairs of each row until their mass reaches `min_prob_mass`.

    A row that never reaches it keeps all its pairs: the flattest distributions need the most of them.
    """
    lengths = np.array(list(map(len, rows)), np.int64)
    width = int(lengths.max(initial=0))
    is_there_tj = np.arange(width) < lengths[:, None]
    ids_tj = np.zeros((len(rows), width), np.int32)
    logprobs_tj = np.full((len(rows), width), -np.inf, np.float64)
    if width:
        in_order = (sorted(row, key=operator.itemgetter(1), reverse=True) for row in rows)
        ids_tj[is_there_tj], logprobs_tj[is_there_tj] = zip(*itertools.chain.from_iterable(in_order), strict=True)
    mass_tj = np.cumsum(np.exp(logprobs_tj), axis=1)
    before_tj = np.concatenate([np.zeros((len(rows), 1)), mass_tj], axis=1)[:, :width]
    keep_tj = (before_tj < min_prob_mass) & np.isfinite(logprobs_tj)
    return TopLogprobs(np.nonzero(keep_tj)[0], ids_tj[keep_tj], logprobs_tj[keep_tj], (len(rows), width))


def write(
    path: str | os.PathLike[str], conversations: Iterable[Conversation], notes: Mapping[str, str] | None = None
) -> None:
    """Writes one file, whole or not at all. `notes` are pairs of texts in its footer, which `read_notes` reads."""
    write_tables(path, [to_table(conversations)], lambda: notes or {})


def to_table(conversations: Iterable[Conversation]) -> pa.Table:
    """The conversations as a table of `SCHEMA`."""
    return pa.Table.from_pylist([_to_row(conversation) for conversation in conversations], schema=SCHEMA)


def write_tables(
    path: str | os.PathLike[str], tables: Iterable[pa.Table], notes: Callable[[], Mapping[str, str]]
) -> None:
    """Writes a file from tables of `SCHEMA`, a row group at a time. `notes` is called when all of them are written."""
    try:
        with files.atomic(path) as temporary, pq.ParquetWriter(temporary, SCHEMA) as writer:
            for tables_of_group in _groups(tables):
                writer.write_table(pa.concat_tables(tables_of_group))
                pa.default_memory_pool().release_unused()  # else what was freed piles up
            writer.add_key_value_metadata(dict(notes()))
    except OSError as error:
        raise OSError(f"cannot write {path}: {error}") from error


def _groups(tables: Iterable[pa.Table]) -> Iterator[list[pa.Table]]:
    """Gathers small tables until they make a row group of a useful size."""
    waiting: list[pa.Table] = []
    for table in tables:
        waiting.append(table.replace_schema_metadata(None))
        if sum(table.num_rows for table in waiting) >= ROWS_PER_GROUP:
            yield waiting
            waiting = []
    if waiting:
        yield waiting


def read(path: str | os.PathLike[str], vocab_size: int | None = None) -> list[Conversation]:
    return list(iterate(path, vocab_size))


def iterate(path: str | os.PathLike[str], vocab_size: int | None = None) -> Iterator[Conversation]:
    """Reads conversations one by one; `vocab_size` is that of the model whose ids they hold, if it is known.

    Raises:
      UserError: the file is cut short, damaged, not a conversation dataset, or holds what cannot be true; the sentence
        names what is missing, or the row.
    """
    with open_file(path) as file:
        first = 0
        batches = file.iter_batches(batch_size=256, columns=list(COLUMNS))
        while True:
            try:
                batch = next(batches, None)
                if batch is None:
                    return
                columns = Columns(batch.column("messages"))
            except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
                raise UserError(f"{path} is damaged: {_first_line(error)}") from error
            columns.check(path, first, vocab_size)
            yield from _conversations(columns, batch, path, first)
            first += batch.num_rows


def check(table: pa.Table, source: str | os.PathLike[str], first: int = 0) -> None:
    """Checks a table, whose first row is number `first`. Raises: UserError, if a row cannot be true."""
    Columns(table.column("messages")).check(source, first)


def outlines(table: pa.Table) -> Iterator[Conversation]:
    """The conversations of a table without their token ids and log-probabilities, which makes it quick."""
    messages = table["messages"].combine_chunks()
    fields = messages.flatten()
    contents, roles = (fields.field(name).to_pylist() for name in ("content", "role"))
    starts = [0, *np.cumsum(messages.value_lengths().to_numpy())]
    rows = zip(table["system_prompt"].to_pylist(), table["metadata"].to_pylist(), strict=True)
    for i, (system_prompt, metadata) in enumerate(rows):
        inside = slice(starts[i], starts[i + 1])
        messages = tuple(map(Message, contents[inside], roles[inside]))
        yield Conversation(messages, system_prompt or "", json.loads(metadata))


def from_batch(batch: pa.RecordBatch | pa.Table) -> Iterator[Conversation]:
    """The conversations of a batch, unchecked: `check` tells whether they can be true."""
    if batch.num_rows:
        yield from _conversations(Columns(batch.column("messages")), batch, "the dataset", 0)


def read_notes(path: str | os.PathLike[str]) -> tuple[int, dict[str, str]]:
    """The number of conversations in a file, and its notes. Only its footer is read."""
    with open_file(path) as file:
        notes = file.metadata.metadata or {}
        return file.metadata.num_rows, {k.decode(): v.decode() for k, v in notes.items()}


def open_file(path: str | os.PathLike[str]) -> pq.ParquetFile:
    """Opens a Parquet file that has the columns of conversations.

    Raises:
      FileNotFoundError, UserError: there is none, or it is cut short, damaged, or holds something else.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"dataset {path} does not exist")
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        raise UserError(
            f"{path} is not a whole Parquet file, its footer is missing or damaged: {_first_line(error)}"
        ) from error
    _check_columns(path, file.schema_arrow)
    return file


def read_table(path: Path) -> pa.Table:
    """The whole file as a table. Raises: FileNotFoundError, UserError, as `open_file` does."""
    with open_file(path) as file:
        try:
            return file.read(use_threads=False)  # each would keep memory of its own
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{path} is damaged, delete it and run again: {_first_line(error)}") from error


def _check_columns(path: str | os.PathLike[str], schema: pa.Schema) -> None:
    missing = [name for name in COLUMNS if name not in schema.names]
    if not missing:
        messages = schema.field("messages").type
        struct = getattr(messages, "value_type", None)
        is_struct = struct is not None and pa.types.is_struct(struct)
        present = {struct.field(i).name for i in range(struct.num_fields)} if is_struct else set()
        missing = [f"messages[].{name}" for name in MESSAGE_FIELDS if name not in present]
    if missing:
        raise UserError(f"{path} is not a conversation dataset: it has no {', '.join(missing)}")


def _to_row(conversation: Conversation) -> dict[str, Any]:
    messages = []
    for message in conversation.messages:
        top = message.top_logprobs
        messages.append(
            {
                "content": files.writable(message.content, "a message"),
                "role": message.role,
                "token_ids": message.token_ids,
                "top_logprobs": top and {name: getattr(top, name) for name in TOP_LOGPROBS_FIELDS},
            }
        )
    metadata = json.dumps(conversation.metadata, ensure_ascii=False, sort_keys=True)
    return {
        "messages": messages,
        "system_prompt": files.writable(conversation.system_prompt, "a system prompt"),
        "metadata": files.writable(metadata, "metadata"),
        "type": conversation.type,
    }


def _conversations(
    columns: Columns, batch: pa.RecordBatch | pa.Table, source: str | os.PathLike[str], first: int
) -> Iterator[Conversation]:
    """The rows of a batch. Arrays stay arrays: through Python lists a large dataset would take minutes to read."""
    others = zip(*(batch.column(name).to_pylist() for name in COLUMNS[1:]), strict=True)
    for row, (system_prompt, metadata, type_) in enumerate(others):
        messages = tuple(_message(columns, m) for m in range(columns.bounds[row], columns.bounds[row + 1]))
        try:
            found = json.loads(metadata) if isinstance(metadata, str) else metadata or {}
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise UserError(f"{source}, row {first + row} (counted from 0): its metadata is no JSON object")
        yield Conversation(messages, system_prompt or "", found, type_)


def _message(columns: Columns, m: int) -> Message:
    ids = tuple(columns.token_ids[m].tolist()) if columns.token_ids.is_there[m] else None
    top = TopLogprobs(*(getattr(columns, name)[m] for name in TOP_LOGPROBS_FIELDS)) if columns.has_top[m] else None
    return Message(columns.contents[m] or "", columns.roles[m], ids, top)


def _as(dtype: type, value: Any, name: str) -> np.ndarray:
    """The value as an array of `dtype`. Raises: UserError, if an integer would become another."""
    found = np.asarray(value)
    made = found.astype(dtype, copy=False)
    if made is not found and issubclass(dtype, np.integer) and (made != found).any():
        raise UserError(f"top_logprobs has {found[made != found][0]} in its {name}, expected integers that fit")
    return made


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
