"""A run's examples on disk, so that a run which is resumed need not lay its conversations out again.

A file is named by everything that the layout depends on: the dataset's bytes, the tokenizer with its chat template, the
day that the template is told, the targets, and the versions of libraries. A damaged file is made again.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import zipfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from cartridges_jax.command_line import files
from cartridges_jax.command_line.errors import UserError
from cartridges_jax.models.tokenizer import Tokenizer
from cartridges_jax.training.data import Example, Targets, dataset_hash, read_examples

FORMAT = 1  # to be raised when the file's format or `data.example_of` changes: all files are made again then
LIBRARIES = ("transformers", "tokenizers", "jinja2")
FIELDS = {"tokens": np.int32, "target_index": np.int32, "target_ids": np.int32, "target_logprobs": np.float32}

log = logging.getLogger(__name__)


class ExampleCache:
    """Reads datasets as `read_examples` does, from files of an earlier call where there are any.

    New files are written by `keep` and not before, so that a run which refuses its inputs leaves nothing behind.
    """

    def __init__(self, folder: Path, tokenizer: Tokenizer, targets: Targets, vocab_size: int):
        self._folder, self._tokenizer, self._targets, self._vocab_size = folder, tokenizer, targets, vocab_size
        self._new: dict[Path, list[Example]] = {}

    def read(self, source: str) -> list[Example]:
        """Returns the examples of a dataset. It raises what `read_examples` raises."""
        path = self._folder / f"{self._key(source)}.npz"
        examples = _load(path) if path.is_file() else None
        if examples is None:
            examples = self._new[path] = read_examples(source, self._tokenizer, self._targets, self._vocab_size)
        return examples

    def keep(self) -> None:
        """Writes the files of all datasets that were laid out by this object."""
        for path, examples in self._new.items():
            _save(path, examples)

    def _key(self, source: str) -> str:
        versions = [importlib.metadata.version(name) for name in LIBRARIES]
        parts = [FORMAT, versions, dataset_hash(source), self._tokenizer.rendering, self._targets, self._vocab_size]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _save(path: Path, examples: Sequence[Example]) -> None:
    columns = {name: [getattr(example, name) for example in examples] for name in FIELDS}
    arrays = {name: np.concatenate(column) for name, column in columns.items()}
    arrays |= {f"{name}_lengths": np.array([len(one) for one in columns[name]]) for name in ("tokens", "target_index")}
    with files.atomic(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)


def _load(path: Path) -> list[Example] | None:
    """Returns the examples of a file, or None if the file is damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            if (damaged := archive.testzip()) is not None:
                raise UserError(f"{damaged} has another checksum")
        with np.load(path, allow_pickle=False) as arrays:
            cuts = {name: np.cumsum([0, *arrays[f"{name}_lengths"]]) for name in ("tokens", "target_index")}
            columns = []
            for name, dtype in FIELDS.items():
                array, cut = arrays[name], cuts["tokens" if name == "tokens" else "target_index"]
                if array.dtype != dtype or array.shape != (cut[-1],):
                    raise UserError(f"{name} is {array.dtype} {array.shape}, expected {dtype.__name__} ({cut[-1]},)")
                columns.append([array[start:end] for start, end in pairwise(cut)])
            return [Example(*parts) for parts in zip(*columns, strict=True)]
    except Exception as error:  # zipfile and numpy raise anything at a damaged file
        log.warning("%s is damaged (%s): its conversations are laid out again", path, error)
        return None
