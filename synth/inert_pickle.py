"""Reads a pickle of protocol 2 or later, which is what Python 3 and torch write, without running it.

A pickle is a program for a small stack machine that may call anything. The machine here has the instructions that build
plain values. The names in a pickle are never looked up: whoever reads says what a few of them stand for, instances of
the classes that it allows become inert `Record`s, and any other name ends the reading. So there is no way from a
pickle's instruction to a Python function that its reader did not give.
"""

from __future__ import annotations

import dataclasses
import mmap
import os
import pickletools
import re
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cartridges_jax.command_line.errors import UserError

LARGEST_FILE = 2**36  # bytes
LONGEST_PATH = 4096  # characters

_VALUES = (
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    *("SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8"),
)
_NUMBERS = re.compile(r"[iufb]\d{1,2}")
_MARK = object()
_DAMAGE = (ValueError, LookupError, TypeError, AttributeError, OverflowError, MemoryError, RecursionError)


class Refused(UserError):
    """A pickle, or the file that holds it, asks for what its reader does not allow; the sentence says what."""


@dataclasses.dataclass(eq=False)
class Record:
    """An instance of a class that is never imported."""

    name: str  # of its class, with the module
    fields: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Name:
    """A class or a function that the pickle names. It stays a name."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclasses.dataclass(eq=False)
class _Array:
    """An array of NumPy's, which a pickle makes empty and then gives its values as a state."""

    value: np.ndarray | None = None


@dataclasses.dataclass(eq=False)
class _Type:
    """NumPy's type of an array's numbers, such as i8. A pickle gives its byte order as a state."""

    code: str
    order: str = "="

    def dtype(self) -> np.dtype[Any]:
        return np.dtype(self.order.replace("|", "=") + self.code)


def load(path: Path, classes: Sequence[str]) -> Any:
    """The value that the pickle of a dataset at `path` builds, with `Record`s for the instances of `classes`.

    Raises:
      FileNotFoundError: there is no such file.
      Refused: the pickle names anything but those classes and NumPy's constructors of numbers.
      UserError: the file is no whole pickle, or larger than `LARGEST_FILE`.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: expected a pickle")
    if not 0 < path.stat().st_size <= LARGEST_FILE:
        raise UserError(f"{path} has {path.stat().st_size} bytes, expected a pickle of at most {LARGEST_FILE}")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as program:
        try:
            return run(program, "dataset", _NUMPY_CALLS, classes, arguments=("numpy.ndarray",))
        except Refused as error:
            raise Refused(f"{path} is refused: {error}; ask for the dataset as Parquet") from error
        except _DAMAGE as error:
            raise UserError(f"{path} is no whole pickle: {error or type(error).__name__}") from error


def run(
    program: bytes | mmap.mmap,
    what: str,
    calls: Mapping[str, Callable[..., Any]],
    classes: Sequence[str] = (),
    arguments: Collection[str] = (),
    persistent: Callable[[Any], Any] | None = None,
) -> Any:
    """The value that a pickle builds.

    The machine takes no more memory than the program has bytes for, times a constant, and never goes deep into a value.
    What it hands to `calls` and `persistent` is the pickle's, so they must check its types before they use it.

    Args:
      program: the pickle, in memory or mapped.
      what: what it should hold, a word for the sentences of `Refused`.
      calls: what is done in place of a call, by the name that is called.
      classes: full names of classes, or of packages that hold them; their instances become `Record`s.
      arguments: names that a pickle may pass on, and not call.
      persistent: what a reference to data outside of the pickle stands for.

    Raises:
      Refused: the pickle has another name or instruction.
      ValueError, LookupError, TypeError, AttributeError, OverflowError, MemoryError, RecursionError: it is damaged.
    """
    machine = _Machine(what, calls, classes, arguments, persistent)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of backslashes in a damaged name
        return machine.run(program)


@dataclasses.dataclass(eq=False)
class _Machine:
    _what: str
    _calls: Mapping[str, Callable[..., Any]]
    _classes: Sequence[str]
    _arguments: Collection[str]
    _persistent: Callable[[Any], Any] | None

    def __post_init__(self) -> None:
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._steps: dict[str, Callable[[Any], None]] = self._instructions()

    def run(self, program: bytes | mmap.mmap) -> Any:
        # a file gives what is there, however much is asked for: a made-up length takes no memory
        for opcode, argument, _ in pickletools.genops(program):
            if opcode.name == "STOP":
                return _plain(self._pop())
            step = self._steps.get(opcode.name)
            if step is None:
                raise Refused(f"it has the instruction {opcode.name}, which no {self._what} needs: it was not run")
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
        if persistent := self._persistent:
            steps["BINPERSID"] = lambda _: push(persistent(self._pop()))
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

    def _name(self, module: Any, name: Any) -> Name:
        if not isinstance(module, str) or not isinstance(name, str):
            raise UserError("a name that is no text")
        found = Name(module, name)
        if str(found) not in self._calls and str(found) not in self._arguments and not self._is_class(found):
            raise Refused(f"it names {str(found)[:100]!r}, which no {self._what} needs: it was not run")
        return found

    def _is_class(self, name: Name) -> bool:
        return any(f"{name}.".startswith(f"{known}.") for known in self._classes)

    def _new(self, name: Any, arguments: Any) -> Record:
        if not isinstance(name, Name) or not self._is_class(name):
            raise UserError("an instance is made of what is no class")
        return Record(str(name), {"arguments": arguments} if arguments else {})

    def _call(self, name: Any, arguments: Any) -> Any:
        if not isinstance(name, Name) or not isinstance(arguments, tuple):
            raise UserError("something is called that is no function")
        call = self._calls.get(str(name))
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
            case dict(), dict():
                pass  # attributes of an OrderedDict, beside what it holds
            case _:
                raise UserError(f"the state of a {type(target).__name__} is not what it should be")


def _top(stack: list[Any], kind: type) -> Any:
    if type(stack[-1]) is not kind:
        raise UserError(f"a {kind.__name__} is missing")
    return stack[-1]


def _pairs(values: list[Any]) -> dict[Any, Any]:
    return dict(zip(map(_key, values[0::2]), map(_plain, values[1::2]), strict=True))


def _key(value: Any) -> Any:
    """Refuses keys that nest, since the hash of a tuple a million deep would end the process."""
    if value is not None and not isinstance(value, str | int | float | bytes):
        raise UserError(f"a {type(value).__name__} as a key")
    return value


def _plain(value: Any) -> Any:
    """An array whose state has come; before, and in everything else, the value itself."""
    return value.value if isinstance(value, _Array) and value.value is not None else value


def _type(code: Any, *_: Any) -> _Type:
    if not isinstance(code, str) or not _NUMBERS.fullmatch(code):
        raise UserError("an array of something else than numbers")
    return _Type(code)


def _from_bytes(data: Any, kind: Any, shape: Any, order: Any = "C") -> np.ndarray:
    if not isinstance(data, bytes | bytearray) or not isinstance(kind, _Type) or order not in ("C", "F"):
        raise UserError("an array that is not made of bytes")
    if not isinstance(shape, tuple) or not all(isinstance(n, int) and 0 <= n <= len(data) for n in shape):
        raise UserError("an array of an impossible shape")
    return np.frombuffer(data, kind.dtype()).reshape(shape, order=order)


def _scalar(kind: Any, data: Any) -> Any:
    return _from_bytes(data, kind, ()).item()


def _path(*parts: Any) -> str:
    if not all(isinstance(part, str) for part in parts) or sum(map(len, parts)) > LONGEST_PATH:
        raise UserError("a path that is none")
    return os.path.join("", *parts)


_NUMPY_CALLS: dict[str, Callable[..., Any]] = {
    "numpy.dtype": _type,
    "collections.OrderedDict": lambda: {},
    "pathlib.PosixPath": _path,
    "pathlib.PurePosixPath": _path,
}
for _core in ("core", "_core"):  # of NumPy 1 and 2
    _NUMPY_CALLS |= {
        f"numpy.{_core}.multiarray._reconstruct": lambda *_: _Array(),
        f"numpy.{_core}.multiarray.scalar": _scalar,
        f"numpy.{_core}.numeric._frombuffer": _from_bytes,
    }
