"""Data sets to compare methods on: documents, questions about them in classes, a prompt and a scorer.

Each file of this folder is one suite: a frozen dataclass `Suite`, whose fields are its options and which has what the
class `Suite` here says. A new suite is a new file and a test.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any, Protocol

from cartridges_jax.command_line.config import build
from cartridges_jax.command_line.errors import UserError
from cartridges_jax.training.evals.questions import Question


@dataclasses.dataclass(frozen=True)
class SuiteQuestion(Question):
    """A question of a class (`kind`), with the names of the documents that a reader is given for it."""

    documents: tuple[str, ...] = ()


class Suite(Protocol):
    """What a suite offers. Its documents and questions are the same at every call."""

    @property
    def instruction(self) -> str:
        """How a question is put to a model: a text with {question} and, in a multiple choice, {choices}."""
        ...

    @property
    def max_answer_tokens(self) -> int: ...

    def documents(self) -> Mapping[str, str]:
        """Returns the documents' texts by their names."""
        ...

    def questions(self) -> list[SuiteQuestion]: ...

    def score(self, question: SuiteQuestion, text: str) -> float:
        """Returns how right a model's text is as an answer, from 0 to 1."""
        ...


def load_suite(name: str, options: Mapping[str, Any]) -> Suite:
    """Returns the suite of that name. Raises: UserError, if there is none or it lacks one of the options."""
    known = sorted(module.name for module in pkgutil.iter_modules(__path__))
    if name not in known:
        raise UserError(f"there is no suite {name!r}: expected one of {', '.join(known)}")
    return build(importlib.import_module(f"{__name__}.{name}").Suite, dict(options), f"the suite {name}")
