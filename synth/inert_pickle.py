"""Reads a pickle of protocol 3 or later, which is what Python 3 writes, without running it.

A pickle is a program for a small stack machine that may call anything. The machine here has the instructions that build
plain values and, of all callables, a handful that it carries out itself, NumPy's constructors of arrays above all.
Instances of the classes of given packages become inert `Record`s; any other name ends the reading. There is no way from
a pickle's instruction to a Python function that this file does not name.
"""

from __future__ import annotations

import dataclasses
import mmap
import os
import pickletools
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cartridges_jax.command_line.errors import UserError

LARGEST_FILE = 2**36  # bytes

_VALUES = (
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    *("SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8"),
)
_NUMBERS = re.compile(r"[iufb]\d{1,2}")
_MARK = object()
_DAMAGE = (ValueError, LookupError, TypeError, AttributeError, OverflowError, MemoryError, RecursionError)


class Refused(UserError):
    """A pickle that names what it has no business with; the sentence says what."""


@dataclasses.dataclass(eq=False)
class Record:
    """An instance of a class that is not imported."""

    name: str  # of its class, with the module
    fields: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class _Name:
    """A class or a function that the pickle names."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclasses.dataclass(eq=False)
class _Array:
    """Between its construction, which is empty, and its state."""

    value: np.ndarray | None = None


@dataclasses.dataclass(eq=False)
class _Type:
    """A NumPy type of numbers, such as i8; its byte order comes as its state."""

    code: str
    order: str = "="

    def dtype(self) -> np.dtype[Any]:
        return np.dtype(self.order.replace("|", "=") + self.code)


def load(path: Path, packages: Sequence[str]) -> Any:
    """The value that the pickle at `path` builds, with `Record`s for the classes of `packages`.

    Raises:
      FileNotFoundError: there is no such file.
      Refused: it names anything but classes of `packages` and NumPy's constructors of numbers.
      UserError: it is no whole pickle, or larger than `LARGEST_FILE`.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: expected a pickle")
    if not 0 < path.stat().st_size <= LARGEST_FILE:
        raise UserError(f"{path} has {path.stat().st_size} bytes, expected a pickle of at most {LARGEST_FILE}")
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore", DeprecationWarning)  # of backslashes in a damaged name
        try:
            return _Machine(path, packages).run(data)
        except Refused:
            raise
        except _DAMAGE as error:
            raise UserError(f"{path} is no whole pickle: {error or type(error).__name__}") from error


class _Machine:
    def __init__(self, path: Path, packages: Sequence[str]):
        self._path, self._packages = path, packages
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._steps: dict[str, Callable[[Any], None]] = self._instructions()

    def run(self, data: mmap.mmap) -> Any:
        # a mapped file gives what is there, however much is asked for: a made-up length takes no memory
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name == "STOP":
                return _plain(self._pop())
            step = self._steps.get(opcode.name)
            if step is None:
                raise Refused(f"{self._path} has the instruction {opcode.name}, which no dataset needs: it was not run")
            step(argument)
        raise UserError("it has no end")

    def _instructions(self) -> dict[str, Callable[[Any], None]]:
        push = self._stack.append
        constants: dict[str, Callable[[], Any]] = {
            "NONE": lambda: None,
            "NEWTRUE": lambda: True,
            "NEWFALSE": lambda: False,
            "EMPTY_LIST": list,
            "EMPTY_TUPLE": tuple,
            "EMPTY_DICT": dict,
            "EMPTY_SET": set,
            "MARK": lambda: _MARK,
        }
        steps: dict[str, Callable[[Any], None]] = dict.fromkeys(_VALUES, push)
        steps |= {name: (lambda _, make=make: push(make())) for name, make in constants.items()}
        steps |= dict.fromkeys(("PROTO", "FRAME"), lambda _: None)
        steps |= dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), lambda i: self._memo.update({i: self._stack[-1]}))
        steps |= dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), lambda i: push(self._memo[i]))
        steps |= {f"TUPLE{n}": (lambda _, n=n: push(tuple(map(_plain, self._popped(n))))) for n in (1, 2, 3)}
        return steps | {
            "MEMOIZE": lambda _: self._memo.update({len(self._memo): self._stack[-1]}),
            "POP": lambda _: self._stack.pop(),
            "POP_MARK": lambda _: self._marked(),
            "DUP": lambda _: push(self._stack[-1]),
            "TUPLE": lambda _: push(tuple(map(_plain, self._marked()))),
            "LIST": lambda _: push(self._marked()),
            "DICT": lambda _: push(_pairs(self._marked())),
            "FROZENSET": lambda _: push(frozenset(map(_key, self._marked()))),
            "APPEND": lambda _: self._extend([self._pop()]),
            "APPENDS": lambda _: self._extend(self._marked()),
            "ADDITEMS": lambda _: self._add(self._marked()),
            "SETITEM": lambda _: self._set(self._popped(2)),
            "SETITEMS": lambda _: self._set(self._marked()),
            "GLOBAL": lambda text: push(self._name(*text.split(" ", 1))),
            "STACK_GLOBAL": lambda _: push(self._name(*self._popped(2))),
            "REDUCE": lambda _: push(self._call(*self._popped(2))),
            "NEWOBJ": lambda _: push(self._new(*self._popped(2))),
            "NEWOBJ_EX": lambda _: push(self._new(*self._popped(3)[:2])),
            "BUILD": lambda _: self._build(self._pop()),
        }

    def _pop(self) -> Any:
        value = self._stack.pop()
        if value is _MARK:
            raise UserError("a value is missing")
        return value

    def _popped(self, count: int) -> list[Any]:
        """The uppermost values, the last one last."""
        return [self._pop() for _ in range(count)][::-1]

    def _marked(self) -> list[Any]:
        """What stands above the last mark, which goes with it."""
        for place in range(len(self._stack) - 1, -1, -1):
            if self._stack[place] is _MARK:
                values = self._stack[place + 1 :]
                del self._stack[place:]
                return values
        raise UserError("a mark is missing")

    def _extend(self, values: list[Any]) -> None:
        _top(self._stack, list).extend(map(_plain, values))

    def _add(self, values: list[Any]) -> None:
        _top(self._stack, set).update(map(_key, values))

    def _set(self, values: list[Any]) -> None:
        _top(self._stack, dict).update(_pairs(values))

    def _name(self, module: Any, name: Any) -> _Name:
        if not isinstance(module, str) or not isinstance(name, str):
            raise UserError("a name that is no text")
        found = _Name(module, name)
        if str(found) not in _CALLS and str(found) not in _MARKERS and not self._is_ours(found):
            raise Refused(
                f"{self._path} is a pickle that names {str(found)[:100]}, which no dataset needs: it was not run; "
                "ask for the dataset as Parquet"
            )
        return found

    def _is_ours(self, name: _Name) -> bool:
        return name.module.split(".")[0] in self._packages

    def _new(self, name: Any, arguments: Any) -> Record:
        if not isinstance(name, _Name) or not self._is_ours(name):
            raise UserError("an instance is made of what is no class of a dataset")
        return Record(str(name), {"arguments": arguments} if arguments else {})

    def _call(self, name: Any, arguments: Any) -> Any:
        if not isinstance(name, _Name) or not isinstance(arguments, tuple):
            raise UserError("something is called that is no function")
        call = _CALLS.get(str(name))
        return call(*map(_plain, arguments)) if call else self._new(name, arguments)

    def _build(self, state: Any) -> None:
        target = self._stack[-1]
        match target, state:
            case Record(), (dict() as fields, dict() as slots):
                target.fields |= fields | slots
            case Record(), (None, dict() as slots):
                target.fields |= slots
            case Record(), dict():
                fields = state.get("__dict__")  # pydantic keeps them one level lower
                target.fields |= fields if isinstance(fields, dict) else state
            case _Array(), (_, tuple() as shape, _Type() as kind, fortran, bytes() | bytearray() as data):
                target.value = _from_bytes(data, kind, shape, "F" if fortran else "C")
            case _Type(), (_, str() as order, *_) if order in ("<", ">", "=", "|"):
                target.order = order
            case _:
                raise UserError(f"the state of a {type(target).__name__} is not what it should be")


def _top(stack: list[Any], kind: type) -> Any:
    if type(stack[-1]) is not kind:
        raise UserError(f"a {kind.__name__} is missing")
    return stack[-1]


def _pairs(values: list[Any]) -> dict[Any, Any]:
    return dict(zip(map(_key, values[0::2]), map(_plain, values[1::2]), strict=True))


def _key(value: Any) -> Any:
    """Nothing that nests: the hash of a tuple a million deep would end the process."""
    if value is not None and not isinstance(value, str | int | float | bytes):
        raise UserError(f"a {type(value).__name__} as a key")
    return value


def _plain(value: Any) -> Any:
    """An array whose state has come; before, and in everything else, the value itself."""
    return value.value if isinstance(value, _Array) and value.value is not None else value


def _type(code: Any, *_: Any) -> _Type:
    if not isinstance(code, str) or not _NUMBERS.fullmatch(code):
        raise UserError(f"an array of {code!r}, expected numbers")
    return _Type(code)


def _from_bytes(data: Any, kind: Any, shape: Any, order: Any = "C") -> np.ndarray:
    if not isinstance(data, bytes | bytearray) or not isinstance(kind, _Type) or order not in ("C", "F"):
        raise UserError("an array that is not made of bytes")
    if not isinstance(shape, tuple) or not all(isinstance(n, int) and 0 <= n <= len(data) for n in shape):
        raise UserError("an array of an impossible shape")
    return np.frombuffer(bytes(data), kind.dtype()).reshape(shape, order=order)


def _scalar(kind: Any, data: Any) -> Any:
    return _from_bytes(data, kind, ()).item()


def _path(*parts: Any) -> str:
    return os.path.join("", *map(str, parts))


_CALLS: dict[str, Callable[..., Any]] = {
    "numpy.dtype": _type,
    "collections.OrderedDict": lambda: {},
    "pathlib.PosixPath": _path,
    "pathlib.PurePosixPath": _path,
}
for _core in ("core", "_core"):  # of NumPy 1 and 2
    _CALLS |= {
        f"numpy.{_core}.multiarray._reconstruct": lambda *_: _Array(),
        f"numpy.{_core}.multiarray.scalar": _scalar,
        f"numpy.{_core}.numeric._frombuffer": _from_bytes,
    }
_MARKERS = ("numpy.ndarray",)  # stands as an argument only
