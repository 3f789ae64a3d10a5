"""The communication of a compiled program, read from its text, since XLA's own analysis counts a loop's body once.

Here is also how such a text is read: computations, instructions, loops, and the sizes of arrays.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Iterator

Programs = dict[str, list[str]]  # the lines of computations, by their names
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
LONG = ("custom-call", "dot", "while")  # instructions that take long: kernels, products, and loops of them
WIDTHS = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
WIDTHS |= {"s64": 8, "u64": 8, "f64": 8, "f8e4m3fn": 1, "f8e5m2": 1}
IN_FAST_MEMORY = "S(1)"  # of an array that a TPU keeps beside its cores

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.$-]+) \(.*\{\s*$")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.$-]+) = (\(.*?\)|\S+) ([\w-]+)\((?:%?([\w.$-]+)\))?")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](\{[^}]*\})?")
_NAME = re.compile(r"%([\w.$-]+)")
CONDITION = re.compile(r"condition=%?([\w.$-]+)")
_CONSTANT = re.compile(r" [su]\d+\[\]\S* constant\((\d+)\)")
_CALLED = re.compile(
    r"(?:body|calls|to_apply|true_computation|false_computation|branch_computations)=\{?(%[\w.$, %-]+)"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


@dataclasses.dataclass(frozen=True)
class Traffic:
    """All collectives of one kind, in one run of the program and on one device."""

    count: int
    num_bytes: int  # that the collectives write


def traffic(text: str, unknown_trips: int = 1) -> dict[str, Traffic]:
    """Returns the collectives of a program, by kind.

    Args:
      text: the program (`compiled.as_text()`).
      unknown_trips: how often a loop runs if that depends on the data.
    """
    totals: collections.Counter[tuple[str, str]] = collections.Counter()
    programs, entry = programs_of(text)
    for name, times in _run(programs, entry, 1, unknown_trips):
        for found in filter(None, map(INSTRUCTION.match, programs[name])):
            kind = found[3].removesuffix("-start")
            if kind in KINDS:
                totals[kind, "count"] += times
                totals[kind, "bytes"] += times * _bytes(found[2], kind, started=found[3] != kind)
    kinds = sorted({kind for kind, _ in totals})
    return {kind: Traffic(totals[kind, "count"], totals[kind, "bytes"]) for kind in kinds}


def exposed(text: str, unknown_trips: int = 1) -> dict[str, int]:
    """Returns the bytes of the collectives that a GPU's schedule hides behind nothing, by kind, as `traffic` does.

    Between their start and their end stands no product, no kernel and no loop.
    """
    totals: collections.Counter[str] = collections.Counter()
    programs, entry = programs_of(text)
    for name, times in _run(programs, entry, 1, unknown_trips):
        under_way: dict[str, tuple[str, int]] = {}
        for line in programs[name]:
            found = INSTRUCTION.match(line)
            if found is None:
                continue
            kind = found[3].removesuffix("-start")
            if kind in KINDS:
                size = times * _bytes(found[2], kind, started=found[3] != kind)
                totals[kind] += size
                if found[3] != kind:
                    under_way[found[1]] = kind, size
            elif found[3].endswith("-done"):
                under_way.pop(found[4], None)
            elif _is_long(programs, line, found[3]):
                for kind, size in under_way.values():
                    totals[kind] -= size
                under_way.clear()
    return dict(totals)


def programs_of(text: str) -> tuple[Programs, str]:
    """Returns the lines of every computation of a program, and the name of its entry."""
    programs: Programs = {}
    lines: list[str] | None = None
    for line in text.splitlines():
        if found := _COMPUTATION.match(line):
            lines = programs[(found[1] or "") + found[2]] = []
        elif line.startswith("}"):
            lines = None
        elif lines is not None:
            lines.append(line)
    return programs, next(name for name in programs if name.startswith("ENTRY "))


def _run(programs: Programs, name: str, times: int, unknown: int) -> Iterator[tuple[str, int]]:
    """Yields a computation and those that it calls, each with the number of times that it runs."""
    if name not in programs:
        return
    yield name, times
    for line in programs[name]:
        found = INSTRUCTION.match(line)
        if found is None or found[3].removesuffix("-start") in KINDS:
            continue
        trips = _trips(programs, line, unknown) if found[3] == "while" else 1
        for inner in called(line):
            yield from _run(programs, inner, times * trips, unknown)


def called(line: str) -> list[str]:
    """Returns the names of the computations that an instruction calls, a loop's condition left out."""
    return [part.strip().removeprefix("%") for found in _CALLED.findall(line) for part in found.split(",")]


def _is_long(programs: Programs, line: str, operation: str) -> bool:
    if operation != "fusion":
        return operation in LONG
    inside = [INSTRUCTION.match(inner) for name in called(line) for inner in programs.get(name, ())]
    return any(found is not None and found[3] in LONG for found in inside)


def _trips(programs: Programs, loop: str, unknown: int) -> int:
    known = known_trips(programs, loop)
    return unknown if known is None else known


def known_trips(programs: Programs, loop: str) -> int | None:
    """Returns how often a loop runs, which XLA writes beside it or (on TPU) as the only number in its condition.

    None means that it depends on the data.
    """
    if known := _TRIPS.search(loop):
        return int(known[1])
    condition = CONDITION.search(loop)
    lines = "\n".join(programs.get(condition[1], ())) if condition else ""
    numbers = _CONSTANT.findall(lines)
    return int(numbers[0]) if len(numbers) == 1 else None


def operands(line: str, operation: str) -> list[str]:
    """Returns the names of an instruction's operands."""
    start = line.index(f" {operation}(") + len(operation) + 2
    return _NAME.findall(line[start : line.index(")", start)])


def size_of(shape: str) -> int:
    """Returns the bytes of an array, or of all arrays of a tuple, but for those in a TPU's fast memory."""
    return sum(_bytes_of(dtype, dims) for dtype, dims, layout in _ARRAY.findall(shape) if IN_FAST_MEMORY not in layout)


def _bytes_of(dtype: str, dims: str) -> int:
    return WIDTHS.get(dtype, 4) * math.prod(map(int, filter(None, dims.split(","))))


def _bytes(shape: str, kind: str, started: bool) -> int:
    arrays = [_bytes_of(dtype, dims) for dtype, dims, _ in _ARRAY.findall(shape)]
    if started and kind != "all-reduce":
        # inputs come first and then outputs; a permutation has two more numbers behind them
        return arrays[1] if kind == "collective-permute" else sum(arrays[len(arrays) // 2 :])
    return sum(arrays)
