"""Runs a comparison cell by cell. What is there is not made again, so that a run that was killed goes on."""

from __future__ import annotations

import dataclasses
import itertools
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from cartridges_jax.command_line import files
from cartridges_jax.command_line.errors import UserError
from cartridges_jax.command_line.progress import Progress
from cartridges_jax.comparison.cells import Cell, cell_name, read_cells, write_cell
from cartridges_jax.comparison.config import BY_CHANCE, WITHOUT_BUDGET, CompareConfig, Method
from cartridges_jax.comparison.measure import measure
from cartridges_jax.comparison.methods import Source
from cartridges_jax.comparison.table import write_table
from cartridges_jax.models.language_model import LanguageModel, load_model
from cartridges_jax.serving.self_study import DATASET, ServerConfig, self_study_server, synthesize
from cartridges_jax.suites import Suite, SuiteQuestion, load_suite
from cartridges_jax.training.config import TrainConfig

STUDYING = ("cartridge",)  # methods that need conversations about the document
CELLS = "cells"
# What may differ between runs that fill one table.
CHANGEABLE = ("output_dir", "methods", "shares", "seeds", "documents")


@dataclasses.dataclass(frozen=True)
class QuestionGroup:
    """The questions that are asked about the same document or documents, whose texts follow one another."""

    name: str
    text: str
    questions: list[SuiteQuestion]


@dataclasses.dataclass(frozen=True)
class Budget:
    """A cell that is to be made."""

    group: QuestionGroup
    method: Method
    share: int | None
    seed: int

    @property
    def file(self) -> str:
        return cell_name(self.group.name, self.method, self.share, self.seed)


def compare(
    config: CompareConfig, train: TrainConfig, server: ServerConfig, config_path: str, overrides: Sequence[str]
) -> Path:
    """Makes the cells that are missing and writes the table; returns the table's path.

    Args:
      config_path, overrides: where self-study finds its settings, the config's stage `synth`.
    """
    directory = Path(config.output_dir)
    suite = load_suite(config.suite, config.suite_options)
    groups = question_groups(suite, config)
    with files.locked(directory):
        _refuse_other_settings(directory, config, train)
        missing = [b for b in _budgets(groups, config) if not (directory / CELLS / b.file).is_file()]
        studied = [b.group for b in missing if b.method in STUDYING]
        _self_study(config, server, directory, studied, config_path, overrides)
        try:
            if missing:
                _fill(config, train, suite, directory, missing)
        finally:
            if cells := read_cells(directory / CELLS):
                table = write_table(directory, cells)
    return table


def question_groups(suite: Suite, config: CompareConfig) -> list[QuestionGroup]:
    documents = suite.documents()
    if unknown := set(config.documents) - set(documents):
        raise UserError(f"the suite {config.suite} has no document {sorted(unknown)[0]!r}: {', '.join(documents)}")
    by_documents: dict[tuple[str, ...], list[SuiteQuestion]] = {}
    for question in suite.questions():
        if not config.documents or set(question.documents) <= set(config.documents):
            by_documents.setdefault(question.documents, []).append(question)
    groups = []
    for names, questions in by_documents.items():
        if config.questions_a_class is not None:
            by_class = itertools.groupby(sorted(questions, key=lambda q: q.kind), key=lambda q: q.kind)
            questions = [q for _, members in by_class for q in itertools.islice(members, config.questions_a_class)]
        groups.append(QuestionGroup("+".join(names), "\n\n".join(documents[name] for name in names), questions))
    return groups


def _budgets(groups: Sequence[QuestionGroup], config: CompareConfig) -> Iterator[Budget]:
    """Yields the cells of a comparison, a document's one after another."""
    for group in groups:
        for method in config.methods:
            if method in WITHOUT_BUDGET:
                yield Budget(group, method, None, 0)
        for share, seeds in zip(config.shares, config.seeds, strict=True):
            for method in config.methods:
                if method not in WITHOUT_BUDGET:
                    for seed in range(seeds if method in BY_CHANCE else 1):
                        yield Budget(group, method, share, seed)


def _fill(config: CompareConfig, train: TrainConfig, suite: Suite, directory: Path, missing: Sequence[Budget]) -> None:
    model = load_model(config.model, config.dtype)
    progress = Progress("comparing", len(missing), "cells")
    for _, of_document in itertools.groupby(missing, key=lambda budget: budget.group.name):
        for budget in of_document:
            write_cell(directory / CELLS, _cell(budget, config, train, suite, model, directory))
            progress.advance(note=f"{budget.group.name}: {budget.method}")
        # Programs for one document's length are no other's. Their code lies in mappings, of which Linux gives a process
        # 65,530: those of three documents do not fit.
        jax.clear_caches()
    progress.close()


def _cell(
    budget: Budget, config: CompareConfig, train: TrainConfig, suite: Suite, model: LanguageModel, directory: Path
) -> Cell:
    group, folder = budget.group, _folder(directory, budget.group)
    dataset, corpus = folder / DATASET, folder / "corpus.txt"
    if dataset.is_file():
        train = dataclasses.replace(train, dataset=str(dataset), corpus=str(corpus))
    num_tokens = len(model.tokenizer.encode(group.text))
    source = Source(model, group.text, folder, train)
    context = source.make(budget.method, num_tokens // (budget.share or 1), budget.seed)
    measured = measure(model, context, suite, group.questions, config, num_tokens // min(config.shares, default=1))
    return Cell(
        suite=config.suite,
        model=model.name,
        document=group.name,
        method=budget.method,
        share=budget.share,
        seed=budget.seed,
        context_tokens=context.num_tokens,
        kv_bytes=context.kv_bytes,
        seconds_to_make=context.seconds_to_make,
        tokens_to_make=context.tokens_to_make,
        **measured,
    )


def _folder(directory: Path, group: QuestionGroup) -> Path:
    return directory / "made" / group.name


def _self_study(
    config: CompareConfig,
    server: ServerConfig,
    directory: Path,
    groups: Sequence[QuestionGroup],
    config_path: str,
    overrides: Sequence[str],
) -> None:
    """Makes the conversations about every document that has none yet, all of them with one server."""
    folders = {_folder(directory, group): group.text for group in groups}
    unread = {folder: text for folder, text in folders.items() if not (folder / DATASET).is_file()}
    if not unread:
        return
    with self_study_server(config.model, server, directory) as url:
        for folder, text in unread.items():
            document = folder / "document.txt"
            files.write_text(document, text)
            begun = time.monotonic()
            synthesize(config_path, overrides, document, url, folder)
            files.write_text(folder / "self_study.json", json.dumps({"seconds": time.monotonic() - begun}) + "\n")


def _refuse_other_settings(directory: Path, config: CompareConfig, train: TrainConfig) -> None:
    """Raises a UserError if the folder's cells were made with other settings, which one table must not mix."""
    settings: dict[str, Any] = {"compare": dataclasses.asdict(config), "train": dataclasses.asdict(train)}
    for name in CHANGEABLE:
        del settings["compare"][name]
    settings = json.loads(json.dumps(settings, default=dict))
    path = directory / "config.json"
    if not path.is_file():
        files.write_text(path, json.dumps(settings, indent=1, sort_keys=True) + "\n")
    elif (theirs := files.read_json(path)) != settings:
        changed = sorted(
            f"{stage}.{key}"
            for stage, mine in settings.items()
            for key in mine
            if mine[key] != theirs.get(stage, {}).get(key)
        )
        raise UserError(
            f"{directory} holds cells made with another {', '.join(changed)}: choose another config.compare.output_dir "
            "or remove it"
        )
