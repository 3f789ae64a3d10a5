"""Options of training in pairs: each works alone, and each has to work beside every other one."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from tiny_runs import config_of, metrics_of, settings_in

from cartridges_jax.cartridge.arrays import Cartridge
from cartridges_jax.training.evals.during import EvalsConfig, GenerationEval, LossEval
from cartridges_jax.training.run import train

OPTIONS: dict[str, tuple[Any, ...]] = {
    "init": ("text", "sampled_chunks", "random_text", "random_vectors", "pretrained", "attention_matching"),
    "evals": ("none", "loss", "generation", "off_topic"),
    "quantization": ("none", "int8", "fp8"),
    "targets": ("logprobs", "tokens"),
}


def covering() -> list[dict[str, Any]]:
    """Choices of one value for each option, few of them, in which every pair of values stands once at least."""
    names = list(OPTIONS)
    pairs = {((a, x), (b, y)) for a, b in itertools.combinations(names, 2) for x in OPTIONS[a] for y in OPTIONS[b]}
    choices = []
    while pairs:
        best = max(itertools.product(*OPTIONS.values()), key=lambda values: len(pairs & _pairs(names, values)))
        pairs -= _pairs(names, best)
        choices.append(dict(zip(names, best, strict=True)))
    return choices


def _pairs(names: list[str], values: tuple[Any, ...]) -> set[Any]:
    return set(itertools.combinations(zip(names, values, strict=True), 2))


def marked(choice: dict[str, Any]) -> Any:
    """Those that once failed are always run: an 8-bit base was not served."""
    once_failed = choice["quantization"] != "none" and choice["evals"] == "generation"
    return pytest.param(choice, marks=() if once_failed else pytest.mark.slow, id="-".join(choice.values()))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    tiny.write_dataset(folder / "dataset.parquet", tiny.model())
    (folder / "corpus.txt").write_text(tiny.TEXT, encoding="utf-8")
    question = {"question": "Where does the owl number 5 sleep?", "answer": "box 5"}
    (folder / "questions.jsonl").write_text(json.dumps(question) + "\n", encoding="utf-8")
    Cartridge.from_text(tiny.model(), tiny.TEXT, 16, num_frozen=2).save(folder / "start.safetensors")
    return folder


@pytest.mark.parametrize("choice", [marked(choice) for choice in covering()])
def test_every_pair_of_options_trains(choice: dict[str, Any], inputs: Path, tmp_path: Path):
    evals = {
        "none": EvalsConfig(),
        "loss": EvalsConfig(loss=(LossEval("held_out", str(inputs / "dataset.parquet")),)),
        "generation": EvalsConfig(generation=(GenerationEval("qa", str(inputs / "questions.jsonl"), max_tokens=4),)),
        "off_topic": EvalsConfig(off_topic=True),
    }[choice["evals"]]
    path = {"path": str(inputs / "start.safetensors")} if choice["init"] == "pretrained" else {}
    init = {"kind": choice["init"], "num_slots": 16, "num_frozen": 2} | path
    changes = choice | {"init": init, "evals": evals, "num_steps": 2, "seq_len": 128}
    output = train(config_of(settings_in(tmp_path, inputs), **changes), tiny.model())
    cartridge = Cartridge.load(output / "cartridge.safetensors" if output.is_dir() else output, model=tiny.model())
    assert all(np.isfinite(array).all() for array in cartridge.prefix if array is not None)
    assert len([line for line in metrics_of(tmp_path / "run") if "loss" in line]) == 2
