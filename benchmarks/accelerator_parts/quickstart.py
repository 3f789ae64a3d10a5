"""Training and evaluation of the quickstart's dataset on this device: its gap beside that of a CPU, and its minutes."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerator_parts import models
from accelerator_parts.measuring import Line, Options
from cartridges_jax.command_line.config import build, load
from cartridges_jax.evaluate import EvalConfig, evaluate
from cartridges_jax.quickstart import CONFIG, DOCUMENT, QUESTIONS, STAGES
from cartridges_jax.training.config import TrainConfig
from cartridges_jax.training.run import train

ROOT = Path(__file__).parents[2]


def measure(options: Options) -> Iterator[Line]:
    if not options.tiny and options.dataset is None:
        yield {"skipped": "no --dataset was given: the quickstart leaves one in runs/document-…/synth/dataset.parquet"}
        return
    config = load([f"--config={ROOT / CONFIG}"], STAGES).to_dict()
    with tempfile.TemporaryDirectory() as folder:
        inputs = {"dataset": options.dataset, "corpus": str(ROOT / DOCUMENT), "questions": str(ROOT / QUESTIONS)}
        if options.tiny:
            inputs = _tiny_inputs(Path(folder))
            config["train"] |= {"num_steps": 2, "init": {"kind": "text", "num_slots": 16}, "batch_size": 2}
            config["evaluate"] |= {"max_answer_tokens": 4}
        questions = inputs.pop("questions")
        settings = config["train"] | inputs | {"output_dir": f"{folder}/train"}
        start = time.perf_counter()
        model = models.quickstart(options, "float32" if options.tiny else "bfloat16")
        cartridge = train(build(TrainConfig, settings | {"dtype": "auto"}), model)
        trained = time.perf_counter()
        settings = config["evaluate"] | {"cartridge": str(cartridge), "corpus": inputs["corpus"]}
        settings |= {"questions": questions, "output_dir": folder}
        report = evaluate(build(EvalConfig, settings), models.quickstart(options, "float32"))
        evaluated = time.perf_counter()
    yield from _lines(report, trained - start, evaluated - trained, options.gap)


def _lines(report: dict[str, Any], training: float, evaluating: float, gap: float | None) -> Iterator[Line]:
    for row in report["rows"]:
        figures = {name: row[name] for name in ("nll", "gap_closed", "accuracy")}
        yield {"condition": row["condition"], **{n: None if v is None else round(v, 3) for n, v in figures.items()}}
    own = report["gap_closed"]
    yield {
        "gap closed": None if own is None else round(own, 3),
        "a CPU's": gap,
        "training, s": round(training, 1),
        "evaluation, s": round(evaluating, 1),
    }


def _tiny_inputs(folder: Path) -> dict[str, str | None]:
    import tiny  # of the tests: a random model's text, and conversations about it

    (folder / "corpus.txt").write_text(tiny.TEXT, encoding="utf-8")
    tiny.write_dataset(folder / "dataset.parquet", tiny.model())
    question = {"question": "What is in box 3?", "answer": "the owl"}
    (folder / "questions.jsonl").write_text(json.dumps(question) + "\n", encoding="utf-8")
    return {name.partition(".")[0]: str(folder / name) for name in ("corpus.txt", "dataset.parquet", "questions.jsonl")}
