"""A document and questions from files, such as one's own; by default those of the quickstart."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from cartridges_jax.command_line import files
from cartridges_jax.suites import SuiteQuestion
from cartridges_jax.training.evals.questions import questions_of
from cartridges_jax.training.evals.scorers import contains


@dataclasses.dataclass(frozen=True)
class Suite:
    document: str = "examples/document.txt"  # a text
    question_file: str = "examples/questions.jsonl"  # a line: {"question", "answer"}, and "class" where it has one
    instruction: str = "{question} Answer with a short phrase only."
    max_answer_tokens: int = 20

    def documents(self) -> dict[str, str]:
        return {Path(self.document).stem: files.read_text(self.document, "a text")}

    def questions(self) -> list[SuiteQuestion]:
        return [
            SuiteQuestion(q.question, q.answer, q.choices, q.kind or "questions", (Path(self.document).stem,))
            for q in questions_of(self.question_file)
        ]

    def score(self, question: SuiteQuestion, text: str) -> float:
        return float(contains(text, question.answer))
