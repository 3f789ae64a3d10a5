"""Dashboards that show a run: TensorBoard and Weights & Biases, with the key names that upstream uses."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from cartridges_jax.command_line.errors import MissingPackage

# from the keys of metrics.jsonl to upstream's
NAMES = {
    "loss": "train/loss",
    "targets": "train/step_num_target_tokens",
    "grad_norm": "train/grad_norm",
    "tokens": "train/num_input_tokens",
    "tokens_per_second": "train/tokens_per_second",
    "target_tokens_per_second": "train/target_tokens_per_second",
    "lr": "optimizer/lr_group0",
}
# of the table of answers
COLUMNS = ("eval", "index", "sample_idx", "prompt", "answer", "pred", "score")


@dataclasses.dataclass(frozen=True)
class TrackConfig:
    tensorboard: bool = False
    wandb: Literal["off", "online", "offline"] = "off"
    project: str = "cartridges"  # of Weights & Biases
    name: str | None = None


class Tracker(Protocol):
    """A dashboard. Its steps count updates that are done, so the first update is step 1."""

    def step(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def evaluation(self, step: int, metrics: Mapping[str, float], answers: Sequence[Mapping[str, Any]]) -> None: ...

    def close(self) -> None: ...


def trackers(config: TrackConfig, directory: Path, first: int, settings: Mapping[str, Any]) -> list[Tracker]:
    """Opens the dashboards that the config names. What they have of steps from `first` on, as logs count, is replaced.

    Raises:
      MissingPackage: the package of a dashboard is not installed.
    """
    made: list[Tracker] = []
    if config.tensorboard:
        made.append(TensorBoard(directory, first))
    if config.wandb != "off":
        made.append(WeightsAndBiases(config, directory, settings))
    return made


def upstream_names(step: int, metrics: Mapping[str, float]) -> dict[str, float]:
    """Returns a step's metrics under upstream's key names, with the two that upstream derives from them."""
    named = {NAMES[name]: value for name, value in metrics.items() if name in NAMES}
    return named | {"train/perplexity": math.exp(min(metrics["loss"], 700.0)), "train/optimizer_step": step}


class TensorBoard:
    def __init__(self, directory: Path, first: int):
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise MissingPackage(
                "track.tensorboard is True and tensorboardX is not installed: pip install 'cartridges-jax[track]'"
            ) from error
        # files are named by the second: a session that starts in the same second would overwrite this one's
        own = f".{time.time_ns()}"
        self._writer = SummaryWriter(str(directory / "tensorboard"), purge_step=first + 1, filename_suffix=own)

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in upstream_names(step, metrics).items():
            self._writer.add_scalar(name, value, step)

    def evaluation(self, step: int, metrics: Mapping[str, float], answers: Sequence[Mapping[str, Any]]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        for name in {answer["eval"] for answer in answers}:
            own = [answer for answer in answers if answer["eval"] == name]
            self._writer.add_text(f"generate_{name}/table", answers_table(own), step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    def __init__(self, config: TrackConfig, directory: Path, settings: Mapping[str, Any]):
        try:
            import wandb
        except ImportError as error:
            raise MissingPackage(
                f"track.wandb is {config.wandb!r} and wandb is not installed: pip install 'cartridges-jax[track]'"
            ) from error
        self._wandb = wandb
        # a run with the same directory and settings is the same run, and is continued
        identity = json.dumps([str(directory.absolute()), settings], sort_keys=True)
        self._run = wandb.init(
            project=config.project,
            name=config.name or directory.name,
            id=hashlib.sha256(identity.encode()).hexdigest()[:16],
            resume="allow",
            mode=config.wandb,
            dir=str(directory),
            config=dict(settings),
        )

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(upstream_names(step, metrics), step=step)

    def evaluation(self, step: int, metrics: Mapping[str, float], answers: Sequence[Mapping[str, Any]]) -> None:
        tables = {}
        for name in {answer["eval"] for answer in answers}:
            rows = [[answer[column] for column in COLUMNS] for answer in answers if answer["eval"] == name]
            tables[f"generate_{name}/table"] = self._wandb.Table(columns=list(COLUMNS), data=rows)
        self._run.log({**metrics, **tables}, step=step)

    def close(self) -> None:
        self._run.finish()


def answers_table(answers: Sequence[Mapping[str, Any]]) -> str:
    """Returns answers as a Markdown table."""
    lines = [" | ".join(COLUMNS), " | ".join("---" for _ in COLUMNS)]
    for answer in answers:
        lines.append(" | ".join(" ".join(str(answer[c]).replace("|", "\\|").split()) for c in COLUMNS))
    return "\n".join(f"| {line} |" for line in lines)
