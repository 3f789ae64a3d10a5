"""Tensors in torch's zip format (`torch.save`), read and written without torch, and read without running its pickle.

A pickle is a program for a stack machine that may call anything. The machine here knows the two dozen opcodes that
torch writes, and globals are names to it, never looked up: the few that tensors need have a meaning, any other is
refused by its name. Nothing is allocated before it is known to lie in the file.
"""

from __future__ import annotations

import dataclasses
import math
import os
import pickletools
import struct
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from cartridges_jax.command_line import files
from cartridges_jax.command_line.errors import UserError

STORAGES = {
    "torch FloatStorage": np.dtype(np.float32),
    "torch DoubleStorage": np.dtype(np.float64),
    "torch HalfStorage": np.dtype(np.float16),
    "torch BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
}
TENSOR, PARAMETER_LIST, ORDERED_DICT = (
    "torch._utils _rebuild_tensor_v2",
    "torch.nn.modules.container ParameterList",
    "collections OrderedDict",
)
PARAMETERS = ("torch._utils _rebuild_parameter", "torch._utils _rebuild_parameter_with_state")
SETS = ("__builtin__ set", "builtins set")
LARGEST_PROGRAM = 1 << 22  # bytes of the pickle; a hundred layers take a hundred kilobytes
GLOBALS = {*STORAGES, TENSOR, PARAMETER_LIST, ORDERED_DICT, *PARAMETERS, *SETS}

# What a damaged or hostile file can make zipfile, pickletools, numpy and the machine below raise.
BROKEN = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError, EOFError, MemoryError)
BROKEN += (struct.error, zipfile.BadZipFile)


class Refused(UserError):
    """A sentence for the user."""


@dataclasses.dataclass(frozen=True)
class _Global:
    name: str


class _ParameterList(list):
    """Filled from the module's state, where parameters are named by their index."""


def load(path: Path) -> tuple[Any, dict[str, bytes]]:
    """The object that was saved, with arrays for its tensors and lists for its ParameterLists, and its extra files.

    Arrays are views of the file's bytes, in the dtype they were saved in; their sizes together do not exceed the
    file's.

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
        return _interpret(program, self._tensor), others

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
        self, storage: tuple[Any, ...], offset: int, shape: tuple[int, ...], strides: tuple[int, ...]
    ) -> np.ndarray:
        kind, storage_class, key = storage[:3]
        if kind != "storage" or storage_class.name not in STORAGES:
            raise Refused(f"a tensor of it is {storage_class.name}, expected floating-point numbers")
        dtype = STORAGES[storage_class.name]
        if key not in self._storages:
            self._storages[key] = self._record(f"data/{key}")
        if len(shape) > 8 or not all(type(number) is int and number >= 0 for number in (offset, *shape, *strides)):
            raise TypeError("a tensor's shape is no shape")
        # strides may visit an element twice, so the view is not yet bounded by its storage
        self._left -= math.prod(shape) * dtype.itemsize
        if self._left < 0:
            raise Refused("its tensors have more elements than the file has bytes for")
        steps = [stride * dtype.itemsize for stride in strides]
        return np.ndarray(shape, dtype, self._storages[key], offset * dtype.itemsize, steps)


def _interpret(program: bytes, tensor: Callable[..., np.ndarray]) -> Any:
    """Runs the stack machine; every value is a plain one, an array, or a `_Global` that stays a name."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def since_mark() -> list[Any]:
        start = marks.pop()
        items = stack[start:]
        del stack[start:]
        return items

    for opcode, argument, _ in pickletools.genops(program):
        match opcode.name:
            case "PROTO":
                pass
            case "STOP":
                return stack.pop()
            case "MARK":
                marks.append(len(stack))
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "NONE" | "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE":
                stack.append(argument)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(opcode.name == "NEWTRUE")
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE":
                stack.append(tuple(since_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(opcode.name[-1])
                stack[-count:] = [tuple(stack[-count:])]
            case "APPEND":
                _extend(stack, [stack.pop()])
            case "APPENDS":
                _extend(stack, since_mark())
            case "SETITEM":
                _update(stack, [stack.pop(-2), stack.pop()])
            case "SETITEMS":
                _update(stack, since_mark())
            case "GLOBAL":
                if argument not in GLOBALS:
                    raise Refused(f"it asks for {argument.replace(' ', '.')[:80]!r}, which no cartridge needs")
                stack.append(_Global(argument))
            case "BINPERSID":
                pass  # the reference to a storage stays the tuple that it is
            case "REDUCE" | "NEWOBJ":
                arguments, function = stack.pop(), stack.pop()
                stack.append(_call(function.name, arguments, tensor))
            case "BUILD":
                state = stack.pop()
                if isinstance(stack[-1], _ParameterList):
                    found = state["_parameters"]
                    stack[-1].extend(found[str(i)] for i in range(len(found)))
            case _:
                raise Refused(f"its pickle uses {opcode.name}, which torch.save does not write for tensors")
    raise EOFError("the pickle ends too early")


def _extend(stack: list[Any], items: list[Any]) -> None:
    if type(stack[-1]) is not list:
        raise TypeError("items are appended to something that is no list")
    stack[-1].extend(items)


def _update(stack: list[Any], items: list[Any]) -> None:
    if type(stack[-1]) is not dict or not all(isinstance(key, str) for key in items[::2]):
        raise TypeError("items are set in something that is no dict of names")
    stack[-1].update(zip(items[::2], items[1::2], strict=True))


def _call(name: str, arguments: tuple[Any, ...], tensor: Callable[..., np.ndarray]) -> Any:
    if name == TENSOR:
        return tensor(*arguments[:4])
    if name in PARAMETERS:
        return arguments[0]
    if name == PARAMETER_LIST:
        return _ParameterList()
    if name == ORDERED_DICT:
        return {}
    if name in SETS:
        return ()
    raise Refused(f"it calls {name.replace(' ', '.')!r}, which is no function")


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
    return b"c" + name.replace(" ", "\n").encode() + b"\n"


def _text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def _integer(value: int) -> bytes:
    if value < 2**31:
        return b"J" + struct.pack("<i", value)
    return b"\x8a\x08" + struct.pack("<q", value)


def _integers(values: Sequence[int]) -> bytes:
    return b"(" + b"".join(map(_integer, values)) + b"t"
