"""Training runs of the tiny model: their inputs, their settings, and what they leave behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny

from cartridges_jax.initial.initializers import InitConfig
from cartridges_jax.training.config import TrainConfig
from cartridges_jax.training.metrics import MetricsLog
from cartridges_jax.training.optim import OptimConfig
from cartridges_jax.training.run import train

STEPS = 24
TIMING = {"tokens_per_second", "target_tokens_per_second", "seconds"}


def write_inputs(folder: Path) -> Path:
    """Writes a dataset and the text that it is about."""
    tiny.write_dataset(folder / "dataset.parquet", tiny.model())
    (folder / "corpus.txt").write_text(tiny.TEXT, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run's inputs."""
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def settings_in(folder: Path, inputs: Path) -> dict[str, Any]:
    return {
        "dataset": str(inputs / "dataset.parquet"),
        "corpus": str(inputs / "corpus.txt"),
        "output_dir": str(folder / "run"),
        "model": str(tiny.folder()),
        "seq_len": 192,
        "batch_size": 2,
        "num_epochs": 6,
        "num_steps": STEPS,
        "checkpoint_every": 3,
        "init": {"kind": "text", "num_slots": 16, "num_frozen": 2},
        "optim": {"lr": 5e-2, "warmup_steps": 2},
    }


def config_of(settings: dict[str, Any], **changes: Any) -> TrainConfig:
    values = settings | changes
    return TrainConfig(**values | {"init": InitConfig(**values["init"]), "optim": OptimConfig(**values["optim"])})


def interrupted(config: TrainConfig, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trains until the line of `step` is about to be written."""
    write = MetricsLog.write

    def stop(self: MetricsLog, this: int, metrics: dict[str, Any]) -> None:
        if this == step and "loss" in metrics:
            raise KeyboardInterrupt
        write(self, this, metrics)

    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "write", stop)
        with pytest.raises(KeyboardInterrupt):
            train(config, tiny.model())


def metrics_of(folder: str | Path, timing: bool = False) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return lines if timing else [{k: v for k, v in line.items() if k not in TIMING} for line in lines]


def bytes_of(tree: Any) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]
