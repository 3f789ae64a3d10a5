"""What a cartridge is worth: the same questions, asked with it and under other conditions.

The questions are asked with nothing, with the document's first tokens, with the state that training started from,
with the cartridge, and with the full document in the prompt. Every condition is a prefix of keys and values. That of
the full document is computed once for all questions, which changes nothing in what the model sees.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cartridges_jax.cartridge import file as cartridge_file
from cartridges_jax.cartridge.arrays import Cartridge
from cartridges_jax.command_line.errors import UserError
from cartridges_jax.command_line.progress import Progress
from cartridges_jax.interop import formats
from cartridges_jax.models.language_model import LanguageModel, load_model
from cartridges_jax.serving.engine import Engine
from cartridges_jax.serving.generate import MAX_NUM_SEQS, engine_for, generate_ids
from cartridges_jax.training.data import exchanges, read_corpus
from cartridges_jax.training.evals.during import general_nll
from cartridges_jax.training.evals.loss import ROW, answer_nll
from cartridges_jax.training.evals.questions import Question, questions_of, shared_length
from cartridges_jax.training.evals.scorers import contains, exact, token_f1
from cartridges_jax.training.evals.timing import TIMED_TOKENS, time_answers
from cartridges_jax.training.metrics import METRICS
from cartridges_jax.training.report import write_report
from cartridges_jax.training.run import INITIAL

SCORES = {"accuracy": contains, "exact": exact, "f1": token_f1}


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    cartridge: str  # a file or folder in any format, hf:… or wandb:…
    corpus: str
    output_dir: str
    questions: str | None = None  # JSON lines of {"question", "answer"}
    held_out: str | None = None  # instead of questions: conversations that were kept out of training
    model: str = "smollm2-135m"
    dtype: str = "float32"
    max_answer_tokens: int = 32
    instruction: str = "{question}"  # how a question is put to the model, the same in every condition
    document_prompt: str = "{document}"  # the system message of the full-document condition
    num_samples: int = 3  # answers shown in the report
    thinking: bool | None = None  # whether the model is asked to think first; None: as in the cartridge's training

    def __post_init__(self) -> None:
        if (self.questions is None) == (self.held_out is None):
            raise UserError("set exactly one of config.questions and config.held_out: what shall be asked?")
        if "{question}" not in self.instruction or "{document}" not in self.document_prompt:
            raise UserError("config.instruction needs {question} and config.document_prompt needs {document}")


@dataclasses.dataclass(frozen=True)
class Condition:
    """A way to ask: behind a prefix of slots, or with a system message."""

    name: str
    prefix: Cartridge | None
    system: str | None = None  # the system message


def evaluate(config: EvalConfig, model: LanguageModel | None = None) -> dict[str, Any]:
    """Asks under every condition, writes `report.json`, `report.md` and `report.png`, and returns the report.

    Raises:
      FileNotFoundError, UserError: an input is missing or unusable, or the cartridge was made for another model.
    """
    questions = read_questions(config)
    corpus = read_corpus(config.corpus)
    model = model or load_model(config.model, config.dtype)
    cartridge = Cartridge.load(config.cartridge, model=model)
    if config.thinking is None:
        config = dataclasses.replace(config, thinking=cartridge.thinking)
    conditions = _conditions(config, model, corpus, cartridge)
    progress = Progress("evaluating", len(conditions) * 3, "parts")
    asked = [_laid_out(condition, questions, config, model) for condition in conditions]
    batch_sizes = sorted({1, min(len(questions), MAX_NUM_SEQS)})  # timing takes one request at a time
    engine = engine_for(model, [size for one in asked for size in one.sizes(config)], batch_sizes)
    rows = [_measure(one, questions, config, model, engine, progress) for one in asked]
    progress.close()
    report = _report(config, model, cartridge, rows)
    write_report(Path(config.output_dir), report, Path(config.cartridge).parent / METRICS)
    _record(config, report)
    return report


def _record(config: EvalConfig, report: Mapping[str, Any]) -> None:
    """Writes the report's numbers into the header of the cartridge's file, if it is a local file of our own format."""
    path = Path(config.cartridge)
    if not path.is_file() or formats.locate(path)[0] != "safetensors":
        return
    told = ("condition", "nll", "gap_closed", "accuracy", "exact", "f1", "context_tokens")
    evaluation = {
        "num_questions": report["num_questions"],
        "off_topic": report["off_topic"],
        "rows": [{key: row[key] for key in told} for row in report["rows"]],
    }
    cartridge_file.record_evaluation(path, json.dumps(evaluation, sort_keys=True))


def read_questions(config: EvalConfig) -> list[Question]:
    """Returns the questions of `config.questions`, or the first exchange of each held-out conversation."""
    if config.held_out is not None:
        return [Question(question, answer) for question, answer in exchanges(config.held_out)]
    assert config.questions is not None
    return questions_of(config.questions)


def _conditions(config: EvalConfig, model: LanguageModel, corpus: str, cartridge: Cartridge) -> list[Condition]:
    """Returns the conditions that can be measured: the full document only if the model's window holds it."""
    first = Cartridge.from_text(model, corpus, cartridge.average_slots)
    conditions = [Condition("nothing", None), Condition("first p tokens", first)]
    initial = Path(config.cartridge).parent / INITIAL
    if initial.is_file():
        conditions.append(Condition("initial state", Cartridge.load(initial, model=model)))
    conditions.append(Condition("cartridge", cartridge))
    system = config.document_prompt.replace("{document}", corpus)
    if len(model.tokenizer.encode(system)) + ROW <= model.config.max_position_embeddings:
        conditions.append(Condition("full document", None, system))
    return conditions


@dataclasses.dataclass(frozen=True)
class Asked:
    """All questions as they are put to the model under a condition, and the answers that are expected, in token ids.

    What all prompts begin with is in `prefix`, and `tails` are the rest of them.
    """

    condition: Condition
    prompts: list[list[int]]
    references: list[list[int]]
    prefix: Cartridge | None
    tails: list[list[int]]

    def sizes(self, config: EvalConfig) -> list[tuple[int, int]]:
        """Returns what an engine has to hold to answer and to be timed, as `engine_for` takes it."""
        answered = self.prefix, self.tails, config.max_answer_tokens
        timed = self.condition.prefix, self.prompts, TIMED_TOKENS
        return [
            (prefix.average_slots if prefix else 0, max(map(len, prompts)) + num_tokens)
            for prefix, prompts, num_tokens in (answered, timed)
        ]


def _laid_out(condition: Condition, questions: Sequence[Question], config: EvalConfig, model: LanguageModel) -> Asked:
    asked = [_asked(condition, question, config, model) for question in questions]
    prompts, references = ([pair[i] for pair in asked] for i in range(2))
    if condition.system is None:
        return Asked(condition, prompts, references, condition.prefix, prompts)
    shared = shared_length(prompts)
    prefix = Cartridge.from_tokens(model, prompts[0][:shared])
    return Asked(condition, prompts, references, prefix, [prompt[shared:] for prompt in prompts])


def _measure(
    asked: Asked,
    questions: Sequence[Question],
    config: EvalConfig,
    model: LanguageModel,
    engine: Engine,
    progress: Progress,
) -> dict[str, Any]:
    """Asks all questions under one condition, and returns its row of the report."""
    condition, prefix, tails, references = asked.condition, asked.prefix, asked.tails, asked.references

    def nll_of(chosen: Sequence[int]) -> float:
        return answer_nll(model, prefix, [tails[i] for i in chosen], [references[i] for i in chosen])

    nll = nll_of(range(len(questions)))
    progress.advance(note=f"{condition.name}: log-likelihood")
    answers = generate_ids(model, list(map(tuple, tails)), prefix, config.max_answer_tokens, engine=engine)
    texts = [model.tokenizer.decode(answer).strip() for answer in answers]
    progress.advance(note=f"{condition.name}: answers")
    timing = time_answers(engine, condition.prefix, asked.prompts[: config.num_samples])
    progress.advance(note=f"{condition.name}: timing")
    slots = condition.prefix.average_slots if condition.prefix else 0
    context_tokens = slots if condition.system is None else len(model.tokenizer.encode(condition.system))
    return {
        "condition": condition.name,
        "nll": nll,
        **{key: statistics.mean(map(scorer, texts, [q.answer for q in questions])) for key, scorer in SCORES.items()},
        "context_tokens": context_tokens,
        "kv_bytes": context_tokens * model.kv_bytes_per_token,
        **timing,
        "classes": _by_class(questions, texts, nll_of),
        "answers": [
            {"question": q.question, "reference": q.answer, "answer": text}
            for q, text in zip(questions, texts, strict=True)
        ],
    }


def _by_class(
    questions: Sequence[Question], texts: Sequence[str], nll: Callable[[Sequence[int]], float]
) -> dict[str, dict[str, Any]]:
    """Returns loss and contained answers of each class of questions; nothing, where questions have no class."""
    places: dict[str, list[int]] = {}
    for i, question in enumerate(questions):
        if question.kind:
            places.setdefault(question.kind, []).append(i)
    return {
        kind: {"nll": nll(chosen), "accuracy": statistics.mean(contains(texts[i], questions[i].answer) for i in chosen)}
        for kind, chosen in places.items()
    }


def _asked(
    condition: Condition, question: Question, config: EvalConfig, model: LanguageModel
) -> tuple[list[int], list[int]]:
    """Returns the ids of a question as it is put to the model, and the ids of the answer that is expected."""
    messages = [{"role": "user", "content": config.instruction.replace("{question}", question.question)}]
    if condition.system is not None:
        messages.insert(0, {"role": "system", "content": condition.system})
    behind_cartridge = condition.prefix is not None
    return model.tokenizer.answered_ids(
        messages, question.answer, behind_cartridge=behind_cartridge, thinking=config.thinking
    )


def gap_closed(rows: Sequence[Mapping[str, Any]], condition: str) -> float | None:
    """Returns (NLL nothing - NLL) / (NLL nothing - NLL full document), or None where the document is no help."""
    nll = {row["condition"]: row["nll"] for row in rows}
    if "full document" not in nll or nll["nothing"] <= nll["full document"]:
        return None
    return (nll["nothing"] - nll[condition]) / (nll["nothing"] - nll["full document"])


def _report(
    config: EvalConfig, model: LanguageModel, cartridge: Cartridge, rows: list[dict[str, Any]]
) -> dict[str, Any]:
    for row in rows:
        row["gap_closed"] = gap_closed(rows, row["condition"])
        for kind, measured in row["classes"].items():
            of_class = [{"condition": other["condition"], "nll": other["classes"][kind]["nll"]} for other in rows]
            measured["gap_closed"] = gap_closed(of_class, row["condition"])
    provenance = dataclasses.asdict(cartridge.provenance)
    return {
        "config": dataclasses.asdict(config),
        "model": model.name,
        "num_questions": len(rows[0]["answers"]),
        "num_slots": cartridge.average_slots,
        "described": cartridge.described(),
        "gap_closed": gap_closed(rows, "cartridge"),
        "off_topic": {
            "alone": general_nll(model, None, config.thinking),
            "cartridge": general_nll(model, cartridge, config.thinking),
        },
        "provenance": {key: provenance[key] for key in ("recipe", "training_tokens", "training_flops", "weights_hash")},
        "rows": rows,
    }
