"""Reads a dataset, which is a file or a run's folder, without its log-probabilities: row by row, or as a table."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq

from cartridges_jax.command_line.errors import MissingPackage, UserError
from synth import conversation

if TYPE_CHECKING:
    import pandas as pd

ROWS_AT_ONCE = 1024


@dataclasses.dataclass(frozen=True)
class Head:
    """The parts of a conversation that are quick to read: all but token ids and log-probabilities."""

    roles: tuple[str, ...]
    contents: tuple[str, ...]
    tokens: tuple[int | None, ...]  # written for each message, where that is known
    system_prompt: str
    metadata: dict[str, Any]
    type: str | None

    @property
    def seed_type(self) -> str:
        return str(self.metadata.get("seed_prompt_type") or self.type or "none")

    def count(self, role: str) -> int:
        """Tokens of all messages of `role`, as far as they are known."""
        return sum(tokens or 0 for tokens, r in zip(self.tokens, self.roles, strict=True) if r == role)


def files_of(path: str | os.PathLike[str]) -> list[Path]:
    """The Parquet files of a dataset: `path` itself, or in that folder dataset.parquet, else parts/*, else data/*.

    Raises:
      FileNotFoundError: there is nothing of the kind at `path`.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    whole = path / "dataset.parquet"
    if whole.is_file():
        return [whole]
    for pattern in ("parts/*.parquet", "data/*.parquet", "*.parquet"):
        if found := sorted(path.glob(pattern)):
            return found
    raise FileNotFoundError(f"{path} holds no dataset: expected a .parquet file, or the output_dir of a run")


def heads(files: Sequence[Path]) -> Iterator[Head]:
    """Yields the head of every conversation in `files`. The large columns are not read.

    Raises:
      FileNotFoundError, UserError: a file that is not there, damaged, or no conversation dataset.
    """
    for path in files:
        with conversation.open_file(path) as file:
            try:
                for batch in file.iter_batches(ROWS_AT_ONCE, columns=light_columns(file)):
                    for row in batch.to_pylist():
                        yield head_of(row)
            except (OSError, KeyError, TypeError, ValueError) as error:  # pyarrow's own errors are ValueErrors too
                raise UserError(f"{path} is damaged: {error}") from error


def light_columns(file: pq.ParquetFile) -> list[str]:
    """The paths of all columns but the log-probabilities'. Files differ in how they name the items of a list."""
    paths = (file.schema.column(i).path for i in range(len(file.schema)))
    return [path for path in paths if path.split(".")[0] in conversation.COLUMNS and "top_logprobs" not in path]


def load(path: str | os.PathLike[str]) -> pd.DataFrame:
    """The dataset as a table with one row a conversation.

    Its columns are `messages` (a list of {role, content}), `seed_prompt_type`, `resource`, `question_tokens` and
    `answer_tokens` (of all rounds), `system_prompt` and `metadata`.

    Raises:
      FileNotFoundError, UserError: `path` holds no dataset, or a damaged one.
      MissingPackage: pandas is not installed.
    """
    try:
        import pandas as pd
    except ImportError as error:
        raise MissingPackage("synth.load needs pandas: pip install 'cartridges-jax[pandas]'") from error
    rows = [
        {
            "messages": [{"role": r, "content": c} for r, c in zip(head.roles, head.contents, strict=True)],
            "seed_prompt_type": head.seed_type,
            "resource": head.metadata.get("resource"),
            "question_tokens": head.count("user"),
            "answer_tokens": head.count("assistant"),
            "system_prompt": head.system_prompt,
            "metadata": head.metadata,
        }
        for head in heads(files_of(path))
    ]
    return pd.DataFrame(rows)


def head_of(row: dict[str, Any]) -> Head:
    """The head of a conversation, from a row of a file."""
    messages = row["messages"] or ()
    found = row["metadata"]
    metadata = json.loads(found) if isinstance(found, str) else found or {}
    counted = metadata.get("completion_tokens")
    if not (isinstance(counted, list) and len(counted) == len(messages)):
        counted = [None] * len(messages)
    ids = [message["token_ids"] for message in messages]
    return Head(
        tuple(message["role"] for message in messages),
        tuple(message["content"] or "" for message in messages),
        tuple(count if own is None else len(own) for own, count in zip(ids, counted, strict=True)),
        row["system_prompt"] or "",
        metadata,
        row["type"],
    )
