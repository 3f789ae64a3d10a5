"""The numbers that a run writes: `metrics.jsonl`, `samples.jsonl`, a progress line, and dashboards.

The files hold one JSON object a line. When a run is resumed they are cut back to its checkpoint, so that no step stands
in them twice. `step` counts updates from 0; an evaluation before the first update has the step -1.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from cartridges_jax.command_line import files
from cartridges_jax.command_line.errors import UserError
from cartridges_jax.command_line.progress import Progress
from cartridges_jax.parallel.device import memory_in_use
from cartridges_jax.training.trackers import trackers

if TYPE_CHECKING:
    from cartridges_jax.training.config import TrainConfig

METRICS, SAMPLES = "metrics.jsonl", "samples.jsonl"
RATE_STEPS = 10  # the latest steps, over which tokens per second are measured
BEFORE = -1  # the step of an evaluation before the first update


class MetricsLog:
    """A file of JSON lines, each about one step."""

    def __init__(self, path: Path, first_step: int):
        """Opens the log for steps from `first_step` on; later lines of an interrupted run are dropped."""
        if path.exists():
            lines = _lines(path)
            kept = [line for number, line in enumerate(lines) if _step(path, lines, number) < first_step]
            files.write_text(path, "".join(line.decode() + "\n" for line in kept))
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        try:
            self._file.write(json.dumps({"step": step, **metrics}, ensure_ascii=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise OSError(f"cannot write {self._file.name}: {error}") from error

    def close(self) -> None:
        self._file.close()


class MetricsWriter:
    """Writes the metrics of one run, from `first_step` on, to files, dashboards and the terminal."""

    def __init__(
        self,
        directory: Path | None,
        first_step: int,
        num_steps: int,
        tokens: int,
        peak_tokens_per_second: float,
        config: TrainConfig,
        settings: Mapping[str, Any],
    ):
        self._targets, self._start, self._idle = 0.0, time.monotonic(), 0.0
        self._recent = deque([(0.0, tokens, 0.0)], maxlen=RATE_STEPS + 1)
        self._peak = peak_tokens_per_second
        self._logs: list[MetricsLog] = []
        if directory is None:  # not the first process of the job, which alone writes: it just measures time
            return
        # a run that has made no step evaluates again before its first one
        first = first_step if first_step > 0 else BEFORE
        self._trackers = trackers(config.track, directory, first, settings)
        self._logs = [MetricsLog(directory / METRICS, first)]
        self._samples = directory / SAMPLES, first
        limit = "" if config.max_minutes is None else f", {config.max_minutes:g} minutes at most"
        self._progress = Progress(f"training{limit}", num_steps, "steps", done=first_step)

    @property
    def seconds(self) -> float:
        """Seconds since the writer was made, without those of evaluations."""
        return time.monotonic() - self._start - self._idle

    def step(self, step: int, metrics: Mapping[str, Any], lr: float, tokens: int, seconds: float) -> None:
        """Writes the metrics of one update; a loss or a gradient that is not finite is a UserError.

        `tokens` and `seconds` are those of the whole run so far, with what it did before it was resumed.
        """
        values = {name: float(value) for name, value in jax.device_get(dict(metrics)).items()}
        for name in ("loss", "grad_norm"):
            if not np.isfinite(values[name]):
                raise UserError(
                    f"the {name} of step {step} is {values[name]}: training diverged, lower config.optim.lr"
                )
        if not self._logs:
            return
        self._targets += values["targets"]
        now, before = (self.seconds, tokens, self._targets), self._recent[0]
        self._recent.append(now)
        rate, target_rate = ((now[i] - before[i]) / (now[0] - before[0]) for i in (1, 2))
        values |= {
            "lr": lr,
            "tokens": tokens,
            "tokens_per_second": round(rate, 1),
            "target_tokens_per_second": round(target_rate, 1),
            "seconds": round(seconds, 3),
        }
        self._logs[0].write(step, values)
        for tracker in self._trackers:
            tracker.step(step + 1, values)
        share = f", {rate / self._peak:.0%} of the peak" if self._peak else ""
        memory = memory_in_use()
        self._progress.advance(
            note=f"loss {values['loss']:.3f}, {rate:.0f} tokens/s, {target_rate:.0f} of them targets{share}"
            + (f", {memory / 1e9:.1f} GB" if memory else "")
        )

    def evaluation(
        self, step: int, metrics: Mapping[str, float], answers: Sequence[Mapping[str, Any]], seconds: float
    ) -> None:
        """Writes what an evaluation after update `step` found; `seconds` is how long it took."""
        self._idle += seconds
        if not self._logs:
            return
        self._logs[0].write(step, metrics)
        if answers and len(self._logs) == 1:  # a run that generates nothing has no such file
            self._logs.append(MetricsLog(*self._samples))
        for answer in answers:
            self._logs[1].write(step, answer)
        for tracker in self._trackers:
            tracker.evaluation(step + 1, metrics, answers)

    def close(self) -> None:
        if self._logs:
            self._progress.close()
            for opened in (*self._logs, *self._trackers):
                opened.close()


def history(path: Path) -> list[dict[str, Any]]:
    """Returns the lines of a log, none of them if there is no such file; a damaged line is a UserError."""
    lines = _lines(path) if path.is_file() else []
    return [_parsed(path, line, number) for number, line in enumerate(lines)]


def evaluation_behind(num_steps: int, lines: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Returns the line of the evaluation after `num_steps` steps, or None if there was none."""
    return next((line for line in lines if "loss" not in line and line["step"] == num_steps - 1), None)


def _lines(path: Path) -> list[bytes]:
    """Returns a file's lines, which end in line feeds alone. A crash may have cut the last one inside a character."""
    lines = path.read_bytes().split(b"\n")
    return lines if lines[-1] else lines[:-1]


def _parsed(path: Path, line: bytes, number: int) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or not isinstance(found.get("step"), int):
        raise UserError(f"{path}, line {number + 1}, is damaged: bring the file back, or remove that line")
    return found


def _step(path: Path, lines: Sequence[bytes], number: int) -> float:
    try:
        return _parsed(path, lines[number], number)["step"]
    except UserError:
        if number == len(lines) - 1:
            return float("inf")  # the line that a crash cut short
        raise
