"""Makes a document into a trained and evaluated cartridge with one command, which `make quickstart` runs.

The stages are those of the project's other commands, with settings from one config file. Each leaves its result in the
run's directory, and a second run takes what is there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from cartridges_jax.command_line import config as command_config
from cartridges_jax.command_line import files
from cartridges_jax.command_line.errors import UserError
from cartridges_jax.command_line.progress import printable, stage
from cartridges_jax.models import hub
from cartridges_jax.models.language_model import LanguageModel, load_model
from cartridges_jax.serving.self_study import DATASET, ServerConfig, self_study_server, synthesize
from cartridges_jax.training.config import TrainConfig
from cartridges_jax.training.data import read_corpus, split_dataset
from cartridges_jax.training.evals.conditions import EvalConfig, evaluate
from cartridges_jax.training.evals.questions import questions_of
from cartridges_jax.training.report import class_table, samples, table
from cartridges_jax.training.run import train

CONFIG = "configs/quickstart.py"
DOCUMENT = "examples/document.txt"
QUESTIONS = "examples/questions.jsonl"
STAGES = {"train": TrainConfig, "evaluate": EvalConfig}
LARGEST_SHARE = 4  # a cartridge has at most 1/4 of the document's tokens


def main(argv: list[str]) -> int:
    args = _arguments(argv)
    begun = time.monotonic()
    config = command_config.load([f"--config={args.config}", *args.overrides], STAGES)
    if "slots" in config.server:
        raise UserError("config.server.slots has a new name: write max_num_seqs in the config file")
    document, questions = _inputs(args)
    directory = _run_directory(Path(args.runs), config, document, questions)
    print(f"run directory: {directory}", file=sys.stderr)
    cartridge, report = directory / "train" / "cartridge.safetensors", directory / "report.json"
    if not report.is_file():
        with stage(f"fetching {config.train.model}"):
            hub.resolve(config.train.model)
        dataset = _synthesize(args.config, args.overrides, config, document, directory)
        corpus = dataset.with_name("corpus.txt")  # the text that synthesis read
        held_out = None
        if questions is None:
            dataset, held_out = split_dataset(dataset, config.num_held_out, directory)
        if not cartridge.is_file():
            _train(config, corpus, dataset, cartridge.parent)
        _evaluate(config, corpus, questions, held_out, cartridge, directory)
    try:
        shown = json.loads(report.read_bytes())
    except ValueError as error:
        raise UserError(f"{report} is damaged: remove it, and the same command evaluates again") from error
    _show(shown, cartridge, config, time.monotonic() - begun, directory)
    return 0


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m cartridges_jax.quickstart", description=__doc__)
    parser.add_argument("--document", help=f"a text, or any file that `python -m synth` reads (default: {DOCUMENT})")
    parser.add_argument(
        "--questions", help='JSON lines of {"question", "answer"}; none: held-out conversations are asked'
    )
    parser.add_argument("--config", default=CONFIG, help="default: %(default)s")
    parser.add_argument("--runs", default="runs", help="folder of the run directories (default: %(default)s)")
    args, args.overrides = parser.parse_known_args(argv)
    return args


def _inputs(args: argparse.Namespace) -> tuple[Path, Path | None]:
    """Returns the document and the questions, which are checked before anything is fetched or started."""
    document = files.find(args.document or DOCUMENT)
    chosen = args.questions or (QUESTIONS if args.document is None else None)
    questions = None if chosen is None else files.find(chosen)
    if document.suffix.lower() in ("", ".txt"):  # `synth` reads the other formats
        read_corpus(document)
    elif not document.is_file():
        raise FileNotFoundError(f"{document} does not exist: expected the document, such as {DOCUMENT}")
    if questions is not None:
        questions_of(questions)
    return document, questions


def _run_directory(runs: Path, config: ConfigDict, document: Path, questions: Path | None) -> Path:
    """Makes the directory of this document, these questions and this config, which a second run finds again."""
    digest = hashlib.sha256(config.to_json(sort_keys=True).encode() + document.read_bytes())
    digest.update(b"" if questions is None else questions.read_bytes())
    directory = runs / f"{document.stem}-{digest.hexdigest()[:8]}"
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def _synthesize(config_path: str, overrides: list[str], config: ConfigDict, document: Path, directory: Path) -> Path:
    folder = directory / "synth"
    dataset = folder / DATASET
    if not dataset.is_file():
        server = command_config.build(ServerConfig, config.server, "config.server")
        with self_study_server(config.synth.client.model, server, directory) as url:
            synthesize(config_path, overrides, document, url, folder)
    return dataset


def _train(config: ConfigDict, corpus: Path, dataset: Path, folder: Path) -> None:
    model = _load(config, config.train.dtype)
    settings = config.train.to_dict() | {"dataset": str(dataset), "corpus": str(corpus), "output_dir": str(folder)}
    tokens = len(model.tokenizer.encode(read_corpus(corpus)))
    settings["init"]["num_slots"] = max(2, min(settings["init"]["num_slots"], tokens // LARGEST_SHARE))
    train(command_config.build(TrainConfig, settings, "config.train"), model)


def _load(config: ConfigDict, dtype: str) -> LanguageModel:
    with stage(f"loading {config.train.model}"):
        return load_model(config.train.model, dtype)


def _evaluate(
    config: ConfigDict,
    corpus: Path,
    questions: Path | None,
    held_out: Path | None,
    cartridge: Path,
    directory: Path,
) -> None:
    settings = config.evaluate.to_dict() | {
        "cartridge": str(cartridge),
        "corpus": str(corpus),
        "output_dir": str(directory),
        "questions": None if questions is None else str(questions),
        "held_out": None if held_out is None else str(held_out),
    }
    if held_out is not None:  # the questions of self-study are asked again, word for word
        settings |= {"instruction": "{question}", "max_answer_tokens": config.synth.answer.max_tokens}
    evaluate(command_config.build(EvalConfig, settings, "config.evaluate"), _load(config, config.evaluate.dtype))


def _show(report: dict[str, Any], cartridge: Path, config: ConfigDict, seconds: float, directory: Path) -> None:
    served = directory / "cartridges"
    served.mkdir(exist_ok=True)
    with files.atomic(served / "document.safetensors") as temporary:
        shutil.copyfile(cartridge, temporary)
    python = shlex.quote(os.path.relpath(sys.executable)) if os.sep in sys.executable else sys.executable
    name = config.train.model
    gap = report["gap_closed"]
    print("", *filter(None, [table(report), class_table(report)]), "", sep="\n\n")
    print(f"The cartridge has {report['described']}.", end=" ")
    if gap is not None:
        print(f"It closes {gap:.0%} of the gap between knowing nothing and reading the full document.", end="")
    print("\n")
    print(printable(samples(report, report["config"]["num_samples"])))
    print(f"""
It took {seconds / 60:.1f} minutes. What to do next:
  chat with it:   {python} -m cartridges_jax.chat --model={name} --cartridge={cartridge}
  serve it:       {python} -m cartridges_jax.serve --model={name} --cartridges={served}
                  then ask for the model "{name}:document" with any OpenAI client
  other engines:  {python} -m cartridges_jax.convert {cartridge.parent} {directory}/uniform.pt --model={name} \\
                  --uniform --fold-bias={directory}/synth/corpus.txt
                  (their formats hold as many slots for every head, and no log-weights)
  your own file:  {python} -m cartridges_jax.quickstart --document=file.txt --questions=file.jsonl
run directory: {directory} (report.md, report.json)""")


if __name__ == "__main__":
    command_config.run(main, {"--config.server.slots": "--config.server.max_num_seqs"})
