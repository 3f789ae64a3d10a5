"""The evaluations of a training run, before its first step, between steps and after the last; upstream's key names."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections import defaultdict
from typing import Any

from cartridges_jax.cartridge.arrays import Cartridge
from cartridges_jax.command_line.errors import UserError
from cartridges_jax.models.language_model import LanguageModel
from cartridges_jax.parallel import sharding
from cartridges_jax.serving.engine import Engine
from cartridges_jax.serving.generate import MAX_NUM_SEQS, engine_for, generate_ids
from cartridges_jax.training.data import Example, Targets, typed_examples
from cartridges_jax.training.evals.loss import answer_loss
from cartridges_jax.training.evals.questions import Question, answered_examples, general_questions, questions_of
from cartridges_jax.training.evals.scorers import Scorer, score
from cartridges_jax.training.losses import Tail


@dataclasses.dataclass(frozen=True)
class LossEval:
    """The loss of answers: of a dataset's with the run's targets, or of questions' with their tokens as targets."""

    name: str
    dataset: str | None = None  # conversations that were kept out of training
    questions: str | None = None  # JSON lines of {"question", "answer"}
    instruction: str = "{question}"

    def __post_init__(self) -> None:
        if (self.dataset is None) == (self.questions is None):
            raise UserError(f"set exactly one of dataset and questions of the evaluation {self.name}")
        if "{question}" not in self.instruction:
            raise UserError(
                f"the evaluation {self.name} has the instruction {self.instruction!r}, expected a {{question}} in it"
            )

    def examples(self, model: LanguageModel, targets: Targets, thinking: bool | None) -> dict[str, list[Example]]:
        """Reads the examples by the type of their seed prompt ("" for questions, which are asked with `thinking`)."""
        if self.dataset is not None:
            groups = defaultdict(list)
            for kind, example in typed_examples(self.dataset, model.tokenizer, targets, model.config.vocab_size):
                groups[kind].append(example)
            return dict(groups)
        assert self.questions is not None
        asked = [(question.asked(self.instruction), question.answer) for question in questions_of(self.questions)]
        return {"": answered_examples(model, asked, thinking=thinking)}


@dataclasses.dataclass(frozen=True)
class GenerationEval:
    """Questions that the model answers behind the cartridge, and how the answers are scored."""

    name: str
    questions: str  # JSON lines of {"question", "answer"}, with "choices" for the scorer `choice`
    scorer: Scorer = "contained"
    instruction: str = "{question}"
    max_tokens: int = 32
    temperature: float = 0.0
    num_samples: int = 1  # answers to each question, which differ if the temperature is above 0

    def __post_init__(self) -> None:
        if self.max_tokens < 1 or self.num_samples < 1 or self.temperature < 0 or "{question}" not in self.instruction:
            raise UserError(
                f"the evaluation {self.name} has max_tokens {self.max_tokens}, num_samples {self.num_samples}, "
                f"temperature {self.temperature} and instruction {self.instruction!r}: expected at least 1, 1, 0 and "
                "a {question}"
            )


@dataclasses.dataclass(frozen=True)
class EvalsConfig:
    """The evaluations of a run. All are made before the first step and after the last."""

    every: int | None = None  # steps between evaluations; None: none but those two
    loss: tuple[LossEval, ...] = ()
    generation: tuple[GenerationEval, ...] = ()
    off_topic: bool = False  # what the cartridge does to the loss of general questions
    patience: int | None = None  # training stops after so many evaluations in a row in which loss[0] was no better

    def __post_init__(self) -> None:
        for kind in (self.loss, self.generation):
            names = [one.name for one in kind]
            if len(set(names)) < len(names):
                raise UserError(f"evals has the names {', '.join(names)}: expected each once")
        if self.off_topic and any(one.name == "off_topic" for one in self.loss):
            raise UserError("evals.loss has the name off_topic, under which evals.off_topic reports: choose another")
        if self.every is not None and self.every < 1:
            raise UserError(f"evals.every is {self.every}, expected at least 1 step")
        if self.patience is not None and (self.patience < 1 or not self.loss or self.every is None):
            raise UserError(
                f"evals.patience is {self.patience}: it takes at least 1, evals.every, and in evals.loss what to watch"
            )


class Evals:
    """The evaluations that a config names, with their inputs, which are read once; an unusable one is a UserError.

    Questions are asked in the mode `thinking`: that of the conversations of training.
    """

    def __init__(
        self, config: EvalsConfig, model: LanguageModel, targets: Targets, tail: Tail, thinking: bool | None = None
    ):
        if config.generation and sharding.mesh_of(model.params).size > 1:
            raise UserError("evals.generation needs a model on one device: drop it here, and ask the cartridge later")
        self._config, self._model, self._tail, self._thinking = config, model, tail, thinking
        self._losses = {one.name: one.examples(model, targets, thinking) for one in config.loss}
        self._questions = {one.name: questions_of(one.questions) for one in config.generation}
        for one in config.generation:
            if one.scorer == "choice" and not all(q.choices for q in self._questions[one.name]):
                raise UserError(f"{one.questions} has a question without choices, which the scorer 'choice' needs")
            if one.scorer == "chrf":
                score("chrf", "a", "a")  # raises before training begins if sacrebleu is missing
        self._without = general_nll(model, None, thinking) if config.off_topic else None

    def check_window(self, offset: int) -> None:
        """Raises a UserError if an evaluation exceeds the model's window behind a cartridge of this offset."""
        examples = {name: [e for members in groups.values() for e in members] for name, groups in self._losses.items()}
        if self._without is not None:
            examples["off_topic"] = _general_examples(self._model, True, self._thinking)
        lengths = {name: max(len(example.tokens) for example in members) for name, members in examples.items()}
        for one in self._config.generation:
            asked = [self._turn(question.asked(one.instruction)) for question in self._questions[one.name]]
            lengths[one.name] = max(lengths.get(one.name, 0), max(map(len, asked)) + one.max_tokens)
        for name, length in lengths.items():
            if offset + length > (window := self._model.config.max_position_embeddings):
                raise UserError(
                    f"the evaluation {name} needs {length} tokens behind an offset of {offset}, more than "
                    f"{self._model.name}'s window of {window}: ask or generate less there"
                )

    def __bool__(self) -> bool:
        return bool(self._losses or self._questions or self._config.off_topic)

    @property
    def watched(self) -> str | None:
        """The key of the loss that early stopping watches."""
        return f"eval_{self._config.loss[0].name}/loss" if self._config.loss else None

    def run(self, cartridge: Cartridge) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Evaluates a cartridge: returns the metrics by upstream's keys, and every answer that was generated."""
        metrics: dict[str, float] = {}
        for name, groups in self._losses.items():
            metrics |= self._loss(name, groups, cartridge)
        if self._without is not None:
            loss = general_nll(self._model, cartridge, self._thinking)
            metrics |= {
                "eval_off_topic/loss": loss,
                "eval_off_topic/loss_without_cartridge": self._without,
                "eval_off_topic/damage": loss - self._without,
            }
        answers = []
        engine = self._engine(cartridge) if self._config.generation else None
        for one in self._config.generation:
            rows, num_tokens = self._answers(one, self._questions[one.name], cartridge, engine)
            metrics[f"generate_{one.name}/score"] = statistics.mean(row["score"] for row in rows)
            metrics[f"generate_{one.name}/num_assistant_tokens"] = num_tokens
            answers += rows
        return metrics, answers

    def _loss(self, name: str, groups: dict[str, list[Example]], cartridge: Cartridge) -> dict[str, float]:
        sums = {kind: answer_loss(self._model, cartridge, members, self._tail) for kind, members in groups.items()}
        total, count = (sum(column) for column in zip(*sums.values(), strict=True))
        metrics = _losses(f"eval_{name}", total / count)
        for kind, (total, count) in sums.items() if "" not in sums else ():
            metrics |= _losses(f"eval_{name}/seed_prompt_{kind}", total / count)
            metrics[f"eval_{name}/seed_prompt_{kind}/count"] = len(groups[kind])
        return metrics

    def _engine(self, cartridge: Cartridge) -> Engine:
        """Makes the engine that generates answers. Between evaluations its memory is training's."""
        sizes = [
            (cartridge.average_slots, len(self._turn(question.asked(one.instruction))) + one.max_tokens)
            for one in self._config.generation
            for question in self._questions[one.name]
        ]
        most = max(len(self._questions[one.name]) * one.num_samples for one in self._config.generation)
        return engine_for(self._model, sizes, [min(most, MAX_NUM_SEQS)])

    def _answers(
        self, one: GenerationEval, questions: list[Question], cartridge: Cartridge, engine: Engine | None
    ) -> tuple[list[dict[str, Any]], int]:
        asked = [(i, sample) for i in range(len(questions)) for sample in range(one.num_samples)]
        prompts = [tuple(self._turn(questions[i].asked(one.instruction))) for i, _ in asked]
        ids = generate_ids(self._model, prompts, cartridge, one.max_tokens, one.temperature, engine=engine)
        rows = []
        for (i, sample), answer in zip(asked, ids, strict=True):
            question, text = questions[i], self._model.tokenizer.decode(answer).strip()
            rows.append(
                {
                    "eval": one.name,
                    "index": i,
                    "sample_idx": sample,
                    "prompt": question.question,
                    "answer": question.answer,
                    "pred": text,
                    "score": score(one.scorer, text, question.answer, question.choices),
                }
            )
        return rows, sum(map(len, ids))

    def _turn(self, text: str) -> list[int]:
        messages = [{"role": "user", "content": text}]
        return self._model.tokenizer.turn_ids(messages, add_generation_prompt=True, thinking=self._thinking)


def general_nll(model: LanguageModel, prefix: Cartridge | None, thinking: bool | None = None) -> float:
    """Returns the loss of answers to general questions, behind a cartridge or of the model alone, in nats per token."""
    total, count = answer_loss(model, prefix, _general_examples(model, prefix is not None, thinking))
    return total / count


def _general_examples(model: LanguageModel, behind_cartridge: bool, thinking: bool | None) -> list[Example]:
    asked = [(question.question, question.answer) for question in general_questions()]
    return answered_examples(model, asked, behind_cartridge=behind_cartridge, thinking=thinking)


def _losses(key: str, loss: float) -> dict[str, float]:
    return {f"{key}/loss": loss, f"{key}/perplexity": math.exp(min(loss, 700.0))}
