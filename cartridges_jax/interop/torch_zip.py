"""Tensors in torch's zip format (`torch.save`), read and written without torch, and read without running its pickle.

The pickle inside, which says where the tensors lie in the zip file, is read by `synth.inert_pickle`. Here is what the
few names in it stand for, and the checks that nothing is allocated before it is known to lie in the file.
"""

from __future__ import annotations

import dataclasses
import math
import os
import struct
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from cartridges_jax.command_line import files
from cartridges_jax.command_line.errors import UserError
from synth import inert_pickle
from synth.inert_pickle import Name, Record, Refused

STORAGES = {
    "torch.FloatStorage": np.dtype(np.float32),
    "torch.DoubleStorage": np.dtype(np.float64),
    "torch.HalfStorage": np.dtype(np.float16),
    "torch.BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
}
TENSOR, PARAMETER_LIST, ORDERED_DICT = (
    "torch._utils._rebuild_tensor_v2",
    "torch.nn.modules.container.ParameterList",
    "collections.OrderedDict",
)
PARAMETERS = ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state")
SETS = ("__builtin__.set", "builtins.set")
LARGEST_PROGRAM = 1 << 22  # bytes of the pickle; a hundred layers take a hundred kilobytes

# What a damaged or hostile file can make zipfile, numpy and the reading of the pickle raise.
BROKEN = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError, EOFError, MemoryError)
BROKEN += (struct.error, zipfile.BadZipFile)


@dataclasses.dataclass(frozen=True)
class _Storage:
    """The record of the zip file that holds a tensor's numbers, and their type."""

    dtype: np.dtype[Any]
    key: str


def load(path: Path) -> tuple[Any, dict[str, bytes]]:
    """The object that was saved, with arrays for its tensors and lists for its ParameterLists, and its extra files.

    Arrays are views of the file's bytes, in the dtype they were saved in; their sizes together do not exceed the
    file's. ParameterLists are expected as values of a dict, which is how cartridges hold them.

    Raises:
      FileNotFoundError: no such file.
      UserError: not a whole file of this format, or one that holds more than tensors in lists and dicts.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return _Reader(archive, path).load()
    except FileNotFoundError:
        raise
    except Refused as error:
        raise UserError(f"{path} is refused: {error}") from error
    except BROKEN as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise UserError(f"{path} is not a whole file of torch's zip format ({reason}): make it again") from error


class _Reader:
    def __init__(self, archive: zipfile.ZipFile, path: Path):
        self._archive, self._size = archive, path.stat().st_size
        self._unread = self._size  # bytes that records may still have: they do not overlap
        self._left = self._size  # bytes that tensors may still have
        self._storages: dict[str, bytes] = {}
        programs = [name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(programs) != 1:
            raise Refused(f"it has {len(programs)} data.pkl, expected one: torch.save writes it since version 1.6")
        self._root = programs[0].removesuffix("data.pkl")

    def load(self) -> tuple[Any, dict[str, bytes]]:
        names = self._archive.namelist()
        if f"{self._root}byteorder" in names and self._record("byteorder") != b"little":
            raise Refused("its numbers are big-endian, expected little-endian: save it again on a common machine")
        extra = f"{self._root}extra/"
        others = {
            name.removeprefix(extra): self._record(name.removeprefix(self._root))
            for name in names
            if name.startswith(extra)
        }
        program = self._record("data.pkl")
        if len(program) > LARGEST_PROGRAM:
            raise Refused(f"its pickle has {len(program)} bytes, expected a few thousand")
        calls = {TENSOR: self._tensor, ORDERED_DICT: lambda: {}}
        calls |= dict.fromkeys(PARAMETERS, lambda tensor, *_: tensor)
        calls |= dict.fromkeys(SETS, lambda *_: ())
        tree = inert_pickle.run(program, "cartridge", calls, (PARAMETER_LIST,), STORAGES, _storage)
        if isinstance(tree, dict):
            tree = {name: _parameters(value) if isinstance(value, Record) else value for name, value in tree.items()}
        return tree, others

    def _record(self, name: str) -> bytes:
        info = self._archive.getinfo(self._root + name)
        # torch never compresses: what a record claims to hold, the file must hold
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
            raise Refused(f"its record {name!r} is compressed, which torch.save never does")
        self._unread -= info.file_size
        if self._unread < 0 or not 0 <= info.header_offset <= self._size - info.file_size:
            raise Refused(f"its record {name!r} claims {info.file_size} bytes, more than the file has")
        return self._archive.read(info)

    def _tensor(
        self, storage: Any, offset: Any, shape: tuple[int, ...], strides: tuple[int, ...], *_: object
    ) -> np.ndarray:
        if not isinstance(storage, _Storage):
            raise TypeError("a tensor has no storage")
        if storage.key not in self._storages:
            self._storages[storage.key] = self._record(f"data/{storage.key}")
        if len(shape) > 8 or not all(type(number) is int and number >= 0 for number in (offset, *shape, *strides)):
            raise TypeError("a tensor's shape is no shape")
        # strides may visit an element twice, so the view is not yet bounded by its storage
        size = storage.dtype.itemsize
        self._left -= math.prod(shape) * size
        if self._left < 0:
            raise Refused("its tensors have more elements than the file has bytes for")
        steps = [stride * size for stride in strides]
        return np.ndarray(shape, storage.dtype, self._storages[storage.key], offset * size, steps)


def _storage(reference: Any) -> _Storage:
    """What a tensor's reference to its numbers stands for."""
    kind, storage_class, key = reference[:3]
    if kind != "storage" or not isinstance(storage_class, Name) or str(storage_class) not in STORAGES:
        raise Refused("a tensor of it has another storage than floating-point numbers")
    if not isinstance(key, str):  # it is hashed, which may be too much for what nests
        raise TypeError("a storage's name is no text")
    return _Storage(STORAGES[str(storage_class)], key)


def _parameters(found: Record) -> list[Any]:
    """A ParameterList's state names its parameters by their index."""
    parameters = found.fields["_parameters"]
    return [parameters[str(i)] for i in range(len(parameters))]


def save(path: str | os.PathLike[str], lists: Mapping[str, Sequence[np.ndarray]], extra: Mapping[str, bytes]) -> None:
    """Writes a dict of lists of tensors, whole or not at all; `torch.load(path, weights_only=True)` opens it.

    `extra` files ride along as torch's own `_extra_files` do. The same arrays give the same bytes.
    """
    storages: list[np.ndarray] = []
    program = bytearray(b"\x80\x02}(")
    for name, arrays in lists.items():
        program += _text(name) + b"]("
        for array in arrays:
            program += _tensor_program(array, key=str(len(storages)))
            storages.append(np.ascontiguousarray(array))
        program += b"e"
    program += b"u."
    with files.atomic(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        records = {"data.pkl": bytes(program), "byteorder": b"little", "version": b"3\n"}
        records |= {f"extra/{name}": content for name, content in extra.items()}
        for name, content in records.items():
            archive.writestr(zipfile.ZipInfo(f"archive/{name}"), content)
        for key, array in enumerate(storages):
            archive.writestr(zipfile.ZipInfo(f"archive/data/{key}"), array.tobytes())


def _tensor_program(array: np.ndarray, key: str) -> bytes:
    storage_class = next(name for name, dtype in STORAGES.items() if dtype == array.dtype)
    strides = [stride // array.itemsize for stride in np.ascontiguousarray(array).strides]
    storage = _text("storage") + _global(storage_class) + _text(key) + _text("cpu") + _integer(array.size)
    arguments = b"(" + storage + b"tQ" + _integer(0) + _integers(array.shape) + _integers(strides)
    return _global(TENSOR) + b"(" + arguments + b"\x89" + _global(ORDERED_DICT) + b")RtR"


def _global(name: str) -> bytes:
    module, _, name = name.rpartition(".")
    return f"c{module}\n{name}\n".encode()


def _text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def _integer(value: int) -> bytes:
    if value < 2**31:
        return b"J" + struct.pack("<i", value)
    return b"\x8a\x08" + struct.pack("<q", value)


def _integers(values: Sequence[int]) -> bytes:
    return b"(" + b"".join(map(_integer, values)) + b"t"
