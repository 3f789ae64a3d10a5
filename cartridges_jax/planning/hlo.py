"""What a compiled program communicates, read from its text: XLA's own analysis counts the body of a loop once."""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Iterator

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
WIDTHS = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
WIDTHS |= {"s64": 8, "u64": 8, "f64": 8}

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.$-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.$-]+ = (\(.*?\)|\S+) ([\w-]+)\(")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
_CONDITION = re.compile(r"condition=%?([\w.$-]+)")
_CONSTANT = re.compile(r" [su]\d+\[\]\S* constant\((\d+)\)")
_CALLED = re.compile(
    r"(?:body|calls|to_apply|true_computation|false_computation|branch_computations)=\{?(%[\w.$, %-]+)"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Of one kind of collective, in one run of the program and on one device."""

    count: int
    num_bytes: int  # of what the collectives put out


def traffic(text: str, unknown_trips: int = 1) -> dict[str, Traffic]:
    """Collectives by kind, in a program's text (`compiled.as_text()`).

    Args:
      unknown_trips: how often a loop turns whose number of turns depends on the data.
    """
    programs = dict(_computations(text))
    entry = next(name for name in programs if name.startswith("ENTRY "))
    totals: collections.Counter[tuple[str, str]] = collections.Counter()
    _count(programs, entry, 1, unknown_trips, totals)
    kinds = sorted({kind for kind, _ in totals})
    return {kind: Traffic(totals[kind, "count"], totals[kind, "bytes"]) for kind in kinds}


def _computations(text: str) -> Iterator[tuple[str, list[str]]]:
    name, lines = "", []
    for line in text.splitlines():
        if found := _COMPUTATION.match(line):
            name, lines = (found[1] or "") + found[2], []
        elif line.startswith("}") and name:
            yield name, lines
            name = ""
        elif name:
            lines.append(line)


def _count(
    programs: dict[str, list[str]], name: str, times: int, unknown: int, totals: collections.Counter[tuple[str, str]]
) -> None:
    for line in programs.get(name, ()):
        found = _INSTRUCTION.match(line)
        if found is None:
            continue
        shape, operation = found[1], found[2]
        kind = operation.removesuffix("-start")
        if kind in KINDS:
            totals[kind, "count"] += times
            totals[kind, "bytes"] += times * _bytes(shape, kind, started=operation != kind)
            continue
        trips = _trips(programs, line, unknown) if operation == "while" else 1
        for called in _CALLED.findall(line):
            for part in called.split(","):
                _count(programs, part.strip().removeprefix("%"), times * trips, unknown, totals)


def _trips(programs: dict[str, list[str]], loop: str, unknown: int) -> int:
    """XLA writes down what it knows, or (on TPU) leaves a scan's length as the one number in the loop's condition."""
    if known := _TRIPS.search(loop):
        return int(known[1])
    condition = _CONDITION.search(loop)
    lines = "\n".join(programs.get(condition[1], ())) if condition else ""
    numbers = _CONSTANT.findall(lines)
    return int(numbers[0]) if len(numbers) == 1 else unknown


def _bytes(shape: str, kind: str, started: bool) -> int:
    arrays = [
        WIDTHS.get(dtype, 4) * math.prod(map(int, filter(None, dims.split(","))))
        for dtype, dims in _ARRAY.findall(shape)
    ]
    if started and kind != "all-reduce":
        # the pair of what goes in and what comes out; a permutation has two numbers of context behind them
        return arrays[1] if kind == "collective-permute" else sum(arrays[len(arrays) // 2 :])
    return sum(arrays)
