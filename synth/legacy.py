"""Converts upstream's older datasets, which are pickles, to Parquet: `python -m synth.legacy OLD.pkl NEW.parquet`.

There are two formats (HazyResearch/cartridges, structs.py). The older one is a dict of `rows` and of the `context` or
`resources` that they were made from, where a row's token ids and teacher top-k cover all its turns together. The later
one is a list of conversations in which each message has its own. The pickle is never run: see `synth.inert_pickle`.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cartridges_jax.command_line import config
from cartridges_jax.command_line.errors import UserError
from synth import conversation, inert_pickle
from synth.conversation import Conversation, Message, TopLogprobs
from synth.inert_pickle import Record

PACKAGES = ("cartridges", "capsules")  # upstream, under its present and its former name
MOST_EXPANSION = 200  # times the file's size that conversations may hold: a pickle writes once what they share
SMALLEST_BUDGET = 2**20
# The ids of a turn's header, by role, and of its end, for the two tokenizers that upstream's rows were made with.
LLAMA = {
    "system": (128006, 9125, 128007, 271),
    "user": (128006, 882, 128007, 271),
    "assistant": (128006, 78191, 128007, 271),
}
QWEN = {"system": (151644, 8948, 198), "user": (151644, 872, 198), "assistant": (151644, 77091, 198)}
TURNS = ((LLAMA, 128009), (QWEN, 151645))


def read(path: Path) -> Iterator[Conversation]:
    """The conversations of one of upstream's pickles.

    A row of the older kind is cut at the headers of its turns, if they are Llama 3's or Qwen's; else its messages come
    without token ids.

    Raises:
      FileNotFoundError: there is no such file.
      UserError: it is no such pickle, names what no dataset needs, or has a row that cannot be true; the sentence says
        what.
    """
    found = inert_pickle.load(path, PACKAGES)
    rows = found.get("rows") if isinstance(found, dict) else found
    if not isinstance(rows, list) or not all(isinstance(row, Record) for row in rows):
        raise UserError(f"{path} is no dataset of upstream's: expected a list of conversations, or a dict with rows")
    made, first = _conversations(rows, path), 0
    while group := list(itertools.islice(made, conversation.ROWS_PER_GROUP)):
        conversation.check(conversation.to_table(group), path, first)
        yield from group
        first += len(group)


def _conversations(rows: Sequence[Record], path: Path) -> Iterator[Conversation]:
    budget = _Budget(path, max(SMALLEST_BUDGET, MOST_EXPANSION * path.stat().st_size))
    for number, row in enumerate(rows):
        try:
            yield _conversation(row.fields, budget)
        except _TooLarge:
            raise
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
            raise UserError(f"{path}, row {number}, is no conversation of upstream's: {error!r}") from error


def convert(old: Path, new: Path) -> int:
    """Writes the conversations of a pickle as Parquet, a group at a time, and returns how many there are."""
    count = 0

    def tables() -> Iterator[pa.Table]:
        nonlocal count
        made = read(old)
        while group := list(itertools.islice(made, conversation.ROWS_PER_GROUP)):
            count += len(group)
            yield conversation.to_table(group)

    conversation.write_tables(new, tables(), lambda: {"source": old.name})
    return count


class _TooLarge(UserError):
    pass


@dataclasses.dataclass
class _Budget:
    """How much more a pickle may unfold to: a short one may name the same list a million times."""

    path: Path
    left: int

    def take(self, size: int) -> None:
        self.left -= size
        if self.left < 0:
            raise _TooLarge(f"{self.path} unfolds to more than {MOST_EXPANSION} times its size: refused")


def _conversation(row: dict[str, Any], budget: _Budget) -> Conversation:
    messages = [_fields(message) for message in row["messages"]]
    system_prompt, kind = row.get("system_prompt") or "", row.get("type")
    if not isinstance(system_prompt, str) or not isinstance(kind, str | None):
        raise TypeError("system_prompt and type should be texts")
    budget.take(len(messages) + len(system_prompt))
    metadata = _json(row.get("metadata") or {}, budget)
    if not isinstance(metadata, dict):
        raise TypeError("its metadata is no dict")
    if row.get("token_ids") is not None:
        made = _cut(messages, row, budget)
    else:
        made = [_message(m, m.get("token_ids"), _flat(m.get("top_logprobs"), budget), budget) for m in messages]
    return Conversation(tuple(made), system_prompt, metadata, kind)


def _fields(value: Any) -> dict[str, Any]:
    fields = value.fields if isinstance(value, Record) else value
    if not isinstance(fields, dict):
        raise TypeError(f"a message is a {type(value).__name__}")
    return fields


def _message(message: dict[str, Any], ids: Any, top: TopLogprobs | None, budget: _Budget) -> Message:
    content, role = message["content"], message["role"]
    if not isinstance(content, str) or not isinstance(role, str):
        raise TypeError("content and role should be texts")
    budget.take(len(content) + (0 if ids is None else len(ids)) + (0 if top is None else len(top.token_id)))
    return Message(content, role, None if ids is None else _ids(ids, budget), top)


def _numbers(value: Any, budget: _Budget) -> np.ndarray:
    """A list of numbers, or of lists of them, as an array. What nests deeper may have no end, and is refused."""
    if isinstance(value, np.ndarray):
        return value
    for row in value if any(isinstance(row, list | tuple | np.ndarray) for row in value) else [value]:
        budget.take(len(row))
        if not isinstance(row, np.ndarray) and not all(isinstance(number, int | float | None) for number in row):
            raise TypeError("ids and log-probabilities should be numbers")
    return np.asarray(value)


def _ids(value: Any, budget: _Budget) -> tuple[int, ...]:
    found = _numbers(value, budget)
    if found.size and (found.ndim != 1 or found.dtype.kind not in "iu" or not (abs(found) < 2**62).all()):
        raise TypeError("token_ids should be integers")
    return tuple(found.tolist())


def _flat(value: Any, budget: _Budget) -> TopLogprobs | None:
    if value is None:
        return None
    fields = _fields(value)
    rows, width = fields["shape"]
    arrays = (_numbers(fields[name], budget) for name in ("token_idx", "token_id", "logprobs"))
    return TopLogprobs(*arrays, (rows, width))


def _cut(messages: Sequence[dict[str, Any]], row: dict[str, Any], budget: _Budget) -> list[Message]:
    """Cuts a whole conversation's ids into its turns. Row t of the teacher's top-k is about token t + 1."""
    ids = _numbers(row["token_ids"], budget).astype(np.int64)
    turns = _turns(ids.tolist(), [message["role"] for message in messages])
    if turns is None:
        return [_message(message, None, None, budget) for message in messages]
    top_ids, logprobs = row.get("top_logprob_ids"), row.get("top_logprob_logprobs")
    made = []
    for message, (start, end) in zip(messages, turns, strict=True):
        top = None
        if top_ids is not None and logprobs is not None and message["role"] == "assistant":
            first, last = start - 1, min(end - 1, len(top_ids))
            top = _dense(_numbers(top_ids, budget)[first:last], _numbers(logprobs, budget)[first:last])
        made.append(_message(message, ids[start:end].tolist(), top, budget))
    return made


def _dense(ids_tj: np.ndarray, logprobs_tj: np.ndarray) -> TopLogprobs:
    t, j = ids_tj.shape
    kept_tj = np.isfinite(logprobs_tj) & (ids_tj >= 0)
    return TopLogprobs(np.nonzero(kept_tj)[0], ids_tj[kept_tj], logprobs_tj[kept_tj], (t, j))


def _turns(ids: list[int], roles: list[str]) -> list[tuple[int, int]] | None:
    """Where each turn stands in the ids, without its header, with its end; None if the headers do not fit `roles`."""
    for headers, end_of_turn in TURNS:
        spans, found, place = [], [], 0
        while place < len(ids):
            role = next((r for r, h in headers.items() if tuple(ids[place : place + len(h)]) == h), None)
            if role is None:
                place += 1
                continue
            start = place + len(headers[role])
            try:
                place = ids.index(end_of_turn, start) + 1
            except ValueError:  # the last turn was cut
                place = len(ids)
            spans.append((start, place))
            found.append(role)
        if found and found == roles:
            return spans
    return None


def _json(value: Any, budget: _Budget) -> Any:
    budget.take(1)
    match value:
        case dict():
            return {str(key): _json(item, budget) for key, item in value.items()}
        case list() | tuple() | set() | frozenset():
            return [_json(item, budget) for item in value]
        case Record():
            return _json(value.fields, budget)
        case np.ndarray():
            budget.take(value.size)
            return value.tolist()
        case bool() | int() | float() | None:
            return value
        case _:
            text = str(value)
            budget.take(len(text))
            return text


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m synth.legacy", description=__doc__)
    parser.add_argument("old", type=Path, help="a pickle of upstream's")
    parser.add_argument("new", type=Path, help="the Parquet file to write")
    args = parser.parse_args(argv)
    print(f"{args.new}: {convert(args.old, args.new)} conversations")
    return 0


if __name__ == "__main__":
    config.run(main)
