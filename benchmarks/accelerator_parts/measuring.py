"""What the parts share: their options, how a call is timed, and that one failure does not end the others.

It imports neither JAX nor torch, since both kinds of parts use it.
"""

from __future__ import annotations

import dataclasses
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import Any

Line = dict[str, Any]  # one finding: what was measured, and its figures


@dataclasses.dataclass(frozen=True)
class Options:
    tiny: bool  # shapes that a CPU runs in seconds
    model: str  # that of the quickstart: a name, a folder or a .gguf file
    dataset: str | None  # the quickstart's dataset.parquet
    gap: float | None  # that the quickstart closed on a CPU, with the same dataset


def attempts(things: Iterable[tuple[Line, Callable[[], Line]]]) -> Iterator[Line]:
    """What each call finds, beside the words that name it; one that raises says so, and the next is called."""
    for name, call in things:
        try:
            yield {**name, **call()}
        except Exception as error:
            yield {**name, **failure(error)}


def failure(error: BaseException) -> Line:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return {"failed": f"{type(error).__name__}: {reason[:300]}", "traceback": traceback.format_exc()}


def seconds(call: Callable[[], Any], wait: Callable[[Any], Any], repeats: int = 5, series: int = 3) -> float:
    """Of one call: the best of a few series, in each of which `repeats` calls queue behind one another."""
    wait(call())
    best = float("inf")
    for _ in range(series):
        start = time.perf_counter()
        for _ in range(repeats):
            result = call()
        wait(result)
        best = min(best, (time.perf_counter() - start) / repeats)
    return best


def rounded(value: float, digits: int = 3) -> float:
    """To so many significant digits: a figure that is read, not computed with."""
    return float(f"{value:.{digits}g}")
