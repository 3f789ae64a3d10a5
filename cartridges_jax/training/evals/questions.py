"""Questions with their answers: read from files of JSON lines, and laid out as examples."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Sequence
from importlib import resources

import numpy as np

from cartridges_jax.command_line import files
from cartridges_jax.command_line.errors import UserError
from cartridges_jax.models.language_model import LanguageModel
from cartridges_jax.training.data import Example

EXPECTED = '{"question": "…", "answer": "…"}'


@dataclasses.dataclass(frozen=True)
class Question:
    """A question with the answer that is expected."""

    question: str
    answer: str
    choices: tuple[str, ...] = ()  # of a multiple-choice question; the answer is one of them
    kind: str = ""  # its class, by which reports tell questions apart; "class" in a file

    def asked(self, instruction: str) -> str:
        """Returns what the model is asked: the instruction with {question} and {choices} filled in."""
        listed = "\n".join(f"- {choice}" for choice in self.choices)
        return instruction.replace("{choices}", listed).replace("{question}", self.question)


def questions_of(path: str | os.PathLike[str]) -> list[Question]:
    """Reads JSON lines of {"question", "answer"}, for a multiple choice with "choices"; all else is a UserError."""
    return _parsed(files.read_json_lines(path, 'one {"question", "answer"} a line'), str(path))


def general_questions() -> list[Question]:
    """Returns a fixed set of questions about the world at large, which no cartridge should make a model forget."""
    name = "general.jsonl"
    text = resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
    return _parsed(files.json_lines(text), name)


def _parsed(lines: Iterable[tuple[int, str]], source: str) -> list[Question]:
    questions = []
    for number, line in lines:
        try:
            entry = files.parse_json(line, source)
            choices = tuple(choice.strip() for choice in entry.get("choices", ()))
            kind = entry.get("class", "").strip()
            question = Question(entry["question"].strip(), entry["answer"].strip(), choices, kind)
        except (UserError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{source}, line {number}: expected {EXPECTED}") from error
        if choices and question.answer not in choices:
            raise UserError(f"{source}, line {number}: the answer {question.answer!r} is none of its choices")
        if not question.question or not question.answer:
            raise UserError(f"{source}, line {number}: a question or an answer is empty, expected {EXPECTED}")
        questions.append(question)
    if not questions:
        raise UserError(f'{source} holds no question: expected one {{"question", "answer"}} a line')
    return questions


def answered_examples(
    model: LanguageModel,
    exchanges: Sequence[tuple[str, str]],
    *,
    behind_cartridge: bool = True,
    thinking: bool | None = None,
) -> list[Example]:
    """Makes examples of questions and answers: the question is a chat's first turn, the answer's tokens the targets."""
    laid_out = [
        model.tokenizer.answered_ids(
            [{"role": "user", "content": question}], answer, behind_cartridge=behind_cartridge, thinking=thinking
        )
        for question, answer in exchanges
    ]
    return answer_examples(*zip(*laid_out, strict=True))


def answer_examples(prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> list[Example]:
    """Makes examples of prompts, each followed by its answer, whose tokens are the targets."""
    examples = []
    for prompt, answer in zip(prompts, answers, strict=True):
        index = np.arange(len(answer), dtype=np.int32) + len(prompt) - 1
        tokens = np.asarray([*prompt, *answer], np.int32)
        examples.append(Example(tokens, index, np.asarray(answer, np.int32), np.zeros(len(answer), np.float32)))
    return examples


def shared_length(prompts: Sequence[Sequence[int]]) -> int:
    """Returns how many leading tokens all prompts have in common; at least one token of each is left."""
    first, shortest = prompts[0], min(map(len, prompts))
    same = (all(prompt[i] == first[i] for prompt in prompts) for i in range(shortest - 1))
    return next((i for i, is_same in enumerate(same) if not is_same), shortest - 1)
