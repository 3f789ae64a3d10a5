"""Reads the numbers of a batch of conversations as flat arrays, and checks whether they can be true.

Numbers that cannot be true (an id below 0, a log-probability above 0) would not stop training but spoil it, so they are
refused with their file and row. A batch is checked as a whole: message by message, a large dataset would take minutes.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cartridges_jax.command_line.errors import UserError

LARGEST_ID = 2**31 - 1  # that columns and arrays of ids hold
ROUNDING = 1e-5  # what a log-probability of 0 may have become in float32


@dataclasses.dataclass(frozen=True)
class Lists:
    """Many lists in one array: list i is `values[bounds[i]:bounds[i + 1]]`. `raw` are the values as in the file."""

    bounds: np.ndarray  # [n + 1] int64
    is_there: np.ndarray  # [n] bool
    values: np.ndarray
    raw: pa.Array

    def __getitem__(self, i: int) -> np.ndarray:
        return self.values[self.bounds[i] : self.bounds[i + 1]]

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.bounds)

    @property
    def owners(self) -> np.ndarray:
        """For each value, the number of its list."""
        return np.repeat(np.arange(len(self.is_there)), self.lengths)


class Columns:
    """The messages of a batch's conversations, one behind the other. Message m belongs to row `owners[m]`."""

    def __init__(self, messages: pa.Array | pa.ChunkedArray):
        flat = pa.concat_arrays(messages.chunks) if isinstance(messages, pa.ChunkedArray) else messages
        self.bounds, _, structs = _unnested(flat)
        self.owners = np.repeat(np.arange(len(flat)), np.diff(self.bounds))
        self.is_null = structs.is_null().to_numpy(zero_copy_only=False)
        self.contents, self.roles = (_texts(_field(structs, name), name) for name in ("content", "role"))
        self.token_ids = _lists(_field(structs, "token_ids"), _integers)
        top = _field(structs, "top_logprobs")
        self.token_idx, self.token_id, self.shape = (
            _lists(_field(top, name), _integers) for name in ("token_idx", "token_id", "shape")
        )
        self.logprobs = _lists(_field(top, "logprobs"), _floats)
        self.parts = {name: getattr(self, name).is_there for name in ("token_idx", "token_id", "logprobs", "shape")}
        self.has_top = np.logical_and.reduce(list(self.parts.values()))

    def check(self, source: str | os.PathLike[str], first: int = 0, vocab_size: int | None = None) -> None:
        """Refuses what cannot be true. `first` is the number of the first row, `vocab_size` the model's, if known.

        Raises:
          UserError: with the file, the row and the message.
        """

        def refuse(bad_m: np.ndarray, say: Callable[[int], str]) -> None:
            """Raises the sentence for the first of the wrong messages, `bad_m`."""
            if len(bad_m):
                m = int(bad_m[0])
                row = int(self.owners[m])
                place = f"row {first + row}, message {m - int(self.bounds[row])}"
                raise UserError(f"{source}, {place} (counted from 0): {say(m)}; make the dataset again")

        def refuse_values(lists: Lists, is_bad: np.ndarray, name: str, expected: str) -> None:
            bad = np.flatnonzero(is_bad)
            value = lists.raw[int(bad[0])].as_py() if len(bad) else None
            refuse(lists.owners[bad], lambda m: f"{name} holds {value}, expected {expected}")

        refuse(np.flatnonzero(self.is_null), lambda m: "it is null")
        unnamed = [role is None for role in self.roles]
        refuse(np.flatnonzero(unnamed), lambda m: "its role is null, expected user, assistant or system")
        below = LARGEST_ID + 1 if vocab_size is None else vocab_size
        ids = f"ids of the model's vocabulary of {below}" if vocab_size else f"ids from 0 to {LARGEST_ID}"
        for name in ("token_ids", "token_id"):
            found = getattr(self, name)
            refuse_values(found, (found.values < 0) | (found.values >= below), name, ids)
        for name, is_there in self.parts.items():
            refuse(np.flatnonzero(is_there != self.parts["token_id"]), lambda m, n=name: f"{n} or token_id is missing")
        for name in ("token_idx", "logprobs"):
            counts = getattr(self, name).lengths
            unequal = np.flatnonzero(counts != self.token_id.lengths)
            refuse(unequal, lambda m, n=name, c=counts: f"{c[m]} {n} for {self.token_id.lengths[m]} token_id")
        refuse(np.flatnonzero(self.has_top & (self.shape.lengths != 2)), lambda m: "shape is not that of rows of k")
        refuse_values(self.shape, self.shape.values < 0, "shape", "two numbers from 0 on")
        values = self.logprobs.values
        is_bad = ~np.isfinite(values) | (values > ROUNDING)
        refuse_values(self.logprobs, is_bad, "logprobs", "finite numbers, 0 at most")
        self._check_positions(refuse, refuse_values)

    def _check_positions(self, refuse: Callable[..., None], refuse_values: Callable[..., None]) -> None:
        index, owners = self.token_idx.values, self.token_idx.owners
        outside = (index < 0) | (index >= self.token_ids.lengths[owners])
        refuse_values(self.token_idx, outside, "token_idx", "places in the message's token_ids")
        same_message = owners[1:] == owners[:-1]
        refuse(owners[1:][same_message & (index[1:] < index[:-1])], lambda m: "token_idx is not sorted")
        if not len(index):
            return
        begins = np.flatnonzero(np.concatenate([[True], ~same_message | (index[1:] != index[:-1])]))
        counts, of = np.diff(np.append(begins, len(index))), owners[begins]
        k = self.shape.values.reshape(-1, 2)[np.cumsum(self.has_top) - 1, 1]
        too_many = counts > k[of]
        refuse(of[too_many], lambda m: f"a position has {counts[too_many][0]} entries, more than the k of {k[m]}")
        token = self.token_id.values
        for distance in range(1, int(counts.max())):
            near = (owners[distance:] == owners[:-distance]) & (index[distance:] == index[:-distance])
            twice = owners[distance:][near & (token[distance:] == token[:-distance])]
            refuse(twice, lambda m: "a position has the same token_id twice")


def _unnested(lists: pa.Array) -> tuple[np.ndarray, np.ndarray, Any]:
    """The bounds of lists, which of the lists are there (not null), and all their values in one array."""
    if pa.types.is_null(lists.type):
        return np.zeros(len(lists) + 1, np.int64), np.zeros(len(lists), bool), pa.nulls(0)
    lengths = pc.list_value_length(lists).fill_null(0).to_numpy(zero_copy_only=False)
    bounds = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    return bounds, lists.is_valid().to_numpy(zero_copy_only=False), lists.flatten()


def _field(structs: Any, name: str) -> pa.Array:
    """A field of structs. It is null where the struct is."""
    if pa.types.is_null(structs.type):
        return structs
    if not pa.types.is_struct(structs.type):
        raise UserError(f"what should have {name} is of type {structs.type}, expected an object")
    return structs.flatten()[structs.type.get_field_index(name)]


def _texts(found: pa.Array, name: str) -> list[str | None]:
    kind = found.type.value_type if pa.types.is_dictionary(found.type) else found.type
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    if not is_text and not pa.types.is_null(kind):
        raise UserError(f"{name} is of type {kind}, expected texts")
    return found.to_pylist()


def _lists(found: pa.Array, numbers: Callable[[pa.Array], np.ndarray]) -> Lists:
    bounds, is_there, raw = _unnested(found)
    return Lists(bounds, is_there, numbers(raw), raw)


def _integers(raw: pa.Array) -> np.ndarray:
    """The values as int64, with -1 for each that is no integer."""
    if pa.types.is_null(raw.type):
        return np.full(len(raw), -1, np.int64)
    if not (pa.types.is_integer(raw.type) or pa.types.is_floating(raw.type)):
        raise UserError(f"numbers are of type {raw.type}, expected integers")
    if pa.types.is_signed_integer(raw.type) and not raw.null_count:
        return raw.to_numpy().astype(np.int64, copy=False)
    found = raw.fill_null(0).to_numpy(zero_copy_only=False)
    is_one = raw.is_valid().to_numpy(zero_copy_only=False) & (found == np.trunc(found)) & (np.abs(found) < 2**62)
    return np.where(is_one, found, 0).astype(np.int64) - ~is_one


def _floats(raw: pa.Array) -> np.ndarray:
    """The values as float32, with NaN for each that is no number."""
    if pa.types.is_null(raw.type):
        return np.full(len(raw), np.nan, np.float32)
    if not (pa.types.is_integer(raw.type) or pa.types.is_floating(raw.type)):
        raise UserError(f"logprobs are of type {raw.type}, expected floating-point numbers")
    with np.errstate(over="ignore"):
        return raw.to_numpy(zero_copy_only=False).astype(np.float32, copy=False)
