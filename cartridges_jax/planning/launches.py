"""What a compiled program launches, the bytes that it moves, and how often its host has to wait, read from its text.

A launch is an instruction that runs by itself on the device: a fusion, a kernel, a library's call, a copy. It moves its
operands and its results, with three exceptions. Of an operand from which it only takes slices or rows, those count; of
one that it updates in place, the updates do; and of the pages of keys and values, attention moves those that its block
tables name, which the text does not know (`Paged`).
"""

from __future__ import annotations

import dataclasses
import re
from typing import NamedTuple

from cartridges_jax.planning.hlo import (
    CONDITION,
    INSTRUCTION,
    KINDS,
    Programs,
    called,
    known_trips,
    operands,
    programs_of,
    size_of,
)

# Instructions that launch nothing: names, places, and what contains instructions of its own.
NOTHING = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "opt-barrier"}
NOTHING |= {"add-dependency", "while", "conditional", "call", "partition-id", "replica-id", "iota"}
NO_CALLS = ("AllocateBuffer", "AssumeGatherIndicesInBound", "ConcatBitcast", "Sharding")
TO_THE_HOST = {"infeed", "outfeed", "send", "recv"}
TAKING = {"gather", "dynamic-slice", "slice"}  # take a part of their first operand
UPDATING = {"scatter": 2, "dynamic-update-slice": 1}  # change a part of it; which operand is the new part
_ATTENTION = re.compile(r'op_name="[^"]*/decode_attention/')  # that of its kernel
_TARGET = re.compile(r'custom_call_target="([^"]+)"')
_PARAMETER = re.compile(r" parameter\((\d+)\)")
_LEADING = re.compile(r"^\(?\w+\[(\d+)")


class Paged(NamedTuple):
    """The pool of pages, and what attention reads of it."""

    head_pages: int  # of the pool: its arrays' first axis
    num_bytes: float  # that one call of the kernel reads of them


@dataclasses.dataclass(frozen=True)
class Launches:
    """What one run of a program does on one device."""

    count: int = 0
    num_bytes: float = 0.0  # from and to the device's memory
    waits: int = 0  # of the host

    def __add__(self, other: Launches) -> Launches:
        return Launches(self.count + other.count, self.num_bytes + other.num_bytes, self.waits + other.waits)

    def __mul__(self, times: int) -> Launches:
        return Launches(self.count * times, self.num_bytes * times, self.waits * times)


class Instruction(NamedTuple):
    name: str
    shape: str
    operation: str
    line: str

    @property
    def target(self) -> str:
        found = _TARGET.search(self.line)
        return found[1] if found else ""


def launches(text: str, paged: Paged | None = None, unknown_trips: int = 1, is_gpu: bool = False) -> Launches:
    """Returns what a program launches in one run.

    The host waits for each turn of a loop whose length depends on the data, for transfers to it, and on a GPU for
    the number that chooses a branch. Of the branches, the one with most launches counts.

    Args:
      text: the program (`compiled.as_text()`).
      unknown_trips: how often a loop turns if that depends on the data.
    """
    programs, entry = programs_of(text)
    return _Counter(programs, paged, unknown_trips, is_gpu).of(entry)


@dataclasses.dataclass(frozen=True)
class _Counter:
    programs: Programs
    paged: Paged | None
    unknown_trips: int
    is_gpu: bool

    def of(self, name: str) -> Launches:
        """What one run of a computation launches."""
        instructions = _instructions(self.programs, name)
        return sum((self._of_one(each, instructions) for each in instructions.values()), Launches())

    def _of_one(self, one: Instruction, beside: dict[str, Instruction]) -> Launches:
        if one.operation == "while":
            trips = known_trips(self.programs, one.line)
            turns = self.unknown_trips if trips is None else trips
            waits = Launches(waits=turns if trips is None else 0)
            condition = CONDITION.search(one.line)
            bodies = [*called(one.line), *([condition[1]] if condition else [])]
            return waits + sum((self.of(body) for body in bodies if body in self.programs), Launches()) * turns
        if one.operation in ("conditional", "call"):
            branches = [self.of(branch) for branch in called(one.line) if branch in self.programs]
            most = max(branches, key=lambda found: found.count, default=Launches())
            return most + Launches(waits=int(self.is_gpu and one.operation == "conditional"))
        if one.operation in TO_THE_HOST or "callback" in one.target:
            return Launches(1, 0.0, 1)
        if one.operation in NOTHING or one.operation.endswith("-done") or one.target in NO_CALLS:
            return Launches()
        return Launches(1, self._bytes(one, beside))

    def _bytes(self, one: Instruction, beside: dict[str, Instruction]) -> float:
        given = [beside[name] for name in operands(one.line, one.operation) if name in beside]
        is_started = one.operation.endswith("-start") and one.operation.removesuffix("-start") not in KINDS
        results = size_of(one.shape.partition(",")[0] if is_started and one.shape.startswith("(") else one.shape)
        if one.operation == "custom-call":
            return results + self._bytes_of_kernel(one, given)
        if one.operation == "fusion":
            inside = called(one.line)[0]
            moved = [self._of_operand(inside, index, size_of(each.shape)) for index, each in enumerate(given)]
        else:
            moved = [size_of(each.shape) for each in given]
            if one.operation in TAKING:
                moved[0] = results
            elif one.operation in UPDATING:
                moved[0] = moved[UPDATING[one.operation]] - results
        return results + sum(moved)

    def _bytes_of_kernel(self, one: Instruction, given: list[Instruction]) -> float:
        """The operands of a kernel; pages that it writes in place, no more of them than it is given beside them."""
        of_pages, others = [], 0.0
        for each in given:
            leading = _LEADING.match(each.shape)
            if self.paged is not None and leading and int(leading[1]) == self.paged.head_pages:
                of_pages.append(size_of(each.shape))
            else:
                others += size_of(each.shape)
        if not of_pages:
            return others
        assert self.paged is not None
        if "output_to_operand_aliasing" in one.line:
            others += others - sum(of_pages)
        return others + (self.paged.num_bytes if _ATTENTION.search(one.line) else 0.0)

    def _of_operand(self, computation: str, index: int, size: float) -> float:
        """What a fusion reads of its operand `index`, less what it need not write of a result for it."""
        moved, is_result = self._moved(computation, index, size)
        return size if is_result else min(moved, size)

    def _moved(self, computation: str, index: int, size: float) -> tuple[float, bool]:
        """The same, and whether the operand itself is the fusion's result."""
        instructions = _instructions(self.programs, computation)
        names = {each.name for each in instructions.values() if _number(each) == index}
        moved = 0.0
        for each in instructions.values():
            given = operands(each.line, each.operation)
            if not names & set(given):
                continue
            if each.operation == "bitcast":
                names.add(each.name)
            elif each.operation in TAKING and given[0] in names and not names & set(given[1:]):
                moved += size_of(each.shape)
            elif each.operation in UPDATING and given[0] in names:
                moved += size_of(instructions[given[UPDATING[each.operation]]].shape) - size
            elif each.operation == "fusion":
                for i in (i for i, name in enumerate(given) if name in names):
                    inner, is_result = self._moved(called(each.line)[0], i, size)
                    moved += inner
                    if is_result:
                        names.add(each.name)
            else:
                return size, False
        return moved, any(
            each.line.lstrip().startswith("ROOT") and each.name in names for each in instructions.values()
        )


def _instructions(programs: Programs, name: str) -> dict[str, Instruction]:
    found = (INSTRUCTION.match(line) for line in programs[name])
    lines = zip(found, programs[name], strict=True)
    return {match[1]: Instruction(match[1], match[2], match[3], line) for match, line in lines if match}


def _number(one: Instruction) -> int:
    """Which parameter of its computation an instruction is; -1 if it is none."""
    found = _PARAMETER.search(one.line)
    return int(found[1]) if found and one.operation == "parameter" else -1
