"""The settings of a comparison, as its config file gives them."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from cartridges_jax.command_line.errors import UserError

Method = Literal[
    "nothing",
    "full document",
    "first tokens",
    "summary",  # written by the model itself, with the document before it
    "BM25",  # the passages that fit a question's words best
    "attention matching",  # to the document being repeated: without self-study
    "uniform attention matching",  # the same with as many slots for every head
    "cartridge",  # trained on self-study, from a state of attention matching
]
WITHOUT_BUDGET = ("nothing", "full document")
BY_CHANCE = ("cartridge",)  # which more than one seed can tell more of


@dataclasses.dataclass(frozen=True)
class CompareConfig:
    """What is compared, on which questions, at which memory."""

    output_dir: str
    suite: str = "embedded"  # a file of cartridges_jax/suites
    suite_options: Any = dataclasses.field(default_factory=dict)
    model: str = "smollm2-135m"
    dtype: str = "float32"
    methods: tuple[Method, ...] = (
        "nothing",
        "full document",
        "first tokens",
        "summary",
        "BM25",
        "uniform attention matching",
        "attention matching",
        "cartridge",
    )
    shares: tuple[int, ...] = (4, 10, 20)  # a method has the document's tokens over this
    seeds: tuple[int, ...] = (1, 3, 1)  # how many at each share, of the methods that depend on chance
    documents: tuple[str, ...] = ()  # of the suite; none: all
    questions_a_class: int | None = None  # of each document; None: all
    answers_a_class: int = 7  # how many of these are answered in words, and not only measured by likelihood
    timed_questions: int = 3  # over which the speed of a method is the median

    def __post_init__(self) -> None:
        if len(self.seeds) != len(self.shares) or min((*self.shares, *self.seeds), default=1) < 1:
            raise UserError(
                f"config.compare has the shares {self.shares} and the seeds {self.seeds}: expected numbers of at least "
                "1, as many seeds as shares"
            )
        if self.answers_a_class < 0 or self.timed_questions < 1 or (self.questions_a_class or 1) < 1:
            raise UserError("config.compare asks no question: raise questions_a_class or timed_questions")
