"""An answer as the parts that it is made of, texts and calls of tools: some APIs tell each of them on its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from cartridges_jax.serving.choices import Delta


@dataclass
class Part:
    """A text, or the arguments of a call if it has the `name` of a function; `index` counts an answer's parts."""

    index: int
    text: str = ""
    name: str = ""
    call_id: str = ""


Step = tuple[Literal["open", "add", "close"], Part, str]  # what happens to a part, and the piece that is added to it


class Parts:
    """Takes an answer as it comes, and says what happens to its parts: one is open at a time."""

    def __init__(self) -> None:
        self.all: list[Part] = []
        self._is_open = False

    def push(self, delta: Delta) -> Iterator[Step]:
        """The steps of a piece of the answer."""
        if delta.text:
            if not self._is_open or self.all[-1].name:
                yield from self._begin(Part(len(self.all)))
            yield self._add(delta.text)
        for call in delta.tool_calls:
            function = call["function"]
            if "id" in call:
                yield from self._begin(Part(len(self.all), name=function["name"], call_id=call["id"]))
            if function["arguments"]:
                yield self._add(function["arguments"])

    def end(self) -> Iterator[Step]:
        """The steps at the end of an answer; one that says nothing is an empty text."""
        if not self.all:
            yield from self._begin(Part(0))
        yield from self._close()

    def _begin(self, part: Part) -> Iterator[Step]:
        yield from self._close()
        self.all.append(part)
        self._is_open = True
        yield "open", part, ""

    def _add(self, piece: str) -> Step:
        self.all[-1].text += piece
        return "add", self.all[-1], piece

    def _close(self) -> Iterator[Step]:
        if self._is_open:
            self._is_open = False
            yield "close", self.all[-1], ""


def parts_of(delta: Delta) -> list[Part]:
    """The parts of a whole answer."""
    parts = Parts()
    for _ in (*parts.push(delta), *parts.end()):
        pass
    return parts.all
