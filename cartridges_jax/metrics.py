"""`metrics.jsonl`: one JSON object a step, cut back to the checkpoint on resume so that no step stands there twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from command_line import files


class MetricsLog:
    def __init__(self, path: Path, first_step: int):
        """Opens the log for steps from `first_step` on; later lines of an interrupted run are dropped."""
        if path.exists():
            kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step(line) < first_step]
            files.write_text(path, "".join(line + "\n" for line in kept))
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        try:
            self._file.write(json.dumps({"step": step, **metrics}) + "\n")
            self._file.flush()
        except OSError as error:
            raise OSError(f"cannot write {self._file.name}: {error}") from error

    def close(self) -> None:
        self._file.close()


def _step(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return float("inf")  # the line that a crash cut short
