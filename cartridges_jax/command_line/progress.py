"""Every long step shows its progress: by a bar with rate and time left on a terminal, and by plain lines elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 10.0
# What control characters become, except tab and newline: the first 32 have pictures in Unicode, the others U+FFFD.
_CONTROLS = {i: 0x2400 + i for i in range(32) if chr(i) not in "\t\n"} | {i: 0xFFFD for i in range(0x7F, 0xA0)}


def printable(text: str) -> str:
    """Makes a text that a model, a server or a file wrote safe to print: a terminal would obey its escape codes."""
    return text.translate(_CONTROLS)


class PrintableFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def log_to_terminal(format: str = "%(message)s") -> None:
    """Makes this process show warnings on stderr, with control characters made visible."""
    handler = logging.StreamHandler()
    handler.setFormatter(PrintableFormatter(format))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])


class Progress:
    """Counts `unit`s towards `total`. A `note` is a short text that stands beside the count, such as a loss."""

    def __init__(self, name: str, total: int, unit: str, done: int = 0):
        self._name, self._total, self._unit = name, total, unit = printable(name), total, unit
        self._done, self._first = done, done
        self._printed: int | None = None
        self._start = self._last = time.monotonic()
        disable = not sys.stderr.isatty()  # a bar that is disabled later has drawn itself by then
        self._bar = tqdm(
            total=total, initial=done, desc=name, unit=unit, dynamic_ncols=True, smoothing=0.1, disable=disable
        )

    def advance(self, count: int = 1, note: str = "") -> None:
        self._done += count
        if not self._bar.disable:
            self._bar.update(count)
            self._bar.set_postfix_str(printable(note), refresh=False)
        elif time.monotonic() - self._last >= SECONDS_BETWEEN_LINES:
            self._last = time.monotonic()
            self._print(note)

    def close(self, note: str = "") -> None:
        if self._bar.disable and (note or self._printed != self._done):  # or else the last line has said so
            self._print(note)
        self._bar.close()

    def _print(self, note: str) -> None:
        self._printed = self._done
        elapsed = time.monotonic() - self._start
        rate = (self._done - self._first) / max(elapsed, 1e-9)
        left = (self._total - self._done) / rate if rate > 0 else float("inf")
        ends = "done in " + _clock(elapsed) if self._done >= self._total else _clock(left) + " left"
        text = f"{self._name}: {self._done}/{self._total} {self._unit}, {rate:.2f} {self._unit}/s, {ends}"
        print(f"{text}, {printable(note)}" if note else text, file=sys.stderr, flush=True)


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Prints that a step of unknown length begins, and afterwards how long it took."""
    name = printable(name)
    print(f"{name} ...", file=sys.stderr, flush=True)
    start = time.monotonic()
    yield
    print(f"{name}: {_clock(time.monotonic() - start)}", file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    if seconds == float("inf"):
        return "unknown time"
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"
