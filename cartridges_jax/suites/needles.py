"""Needles in a text of any length: facts that are drawn from a seed and lie between sentences that say nothing of them.

There are three classes of questions, after RULER (arXiv 2404.06654):

- `multi-key`: one fact out of many of its form is asked for.
- `multi-value`: three facts of one subject are asked for, a fact from each third of the text.
- `several places`: a fact in one third names whom to look up in another.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Iterator

from cartridges_jax.command_line.errors import UserError
from cartridges_jax.suites import SuiteQuestion
from cartridges_jax.training.evals.scorers import contains

THIRDS = 3
COLOURS = "amber azure black copper crimson green grey indigo ivory orange pink purple red silver teal white"
THINGS = "anchor barrel basket bell cabinet chest clock drawer kettle ladder lantern locker mirror wagon"
FIRST = "Agda Brin Calla Doran Edda Fenn Greta Hollis Imre Jorun Kesta Lorne Mirel Nils Orla Petra"
LAST = "Abelin Bask Corrow Denholt Eskil Farrow Grimby Harl Isdale Jarrow Kell Lund Morrow Nash"
HAY = (
    ("A farmer", "The ferryman", "A painter", "The old baker", "A tall sailor", "The schoolteacher", "A quiet nurse"),
    ("walked", "waited", "sang", "slept", "rested", "read a letter", "mended a net", "ate an apple", "told a story"),
    ("by the river", "near the bridge", "in the orchard", "on the hill", "behind the mill", "under a wide tree"),
    ("before sunrise", "at noon", "in the evening", "after the rain", "on a cold day", "while the wind blew"),
)


@dataclasses.dataclass(frozen=True)
class Suite:
    words: int = 1200  # of a document
    num_documents: int = 1
    questions_a_class: int = 10  # about each document
    seed: int = 0
    instruction: str = "{question} Answer with the numbers only."
    max_answer_tokens: int = 24

    def documents(self) -> dict[str, str]:
        return {name: text for name, text, _ in self._drawn()}

    def questions(self) -> list[SuiteQuestion]:
        return [question for _, _, questions in self._drawn() for question in questions]

    def score(self, question: SuiteQuestion, text: str) -> float:
        """Returns the share of the answer's numbers that the text names."""
        values = question.answer.replace(" and ", ", ").split(", ")
        return sum(contains(text, value) for value in values) / len(values)

    def _drawn(self) -> Iterator[tuple[str, str, list[SuiteQuestion]]]:
        for i in range(self.num_documents):
            name = f"needles-{i}"
            rng = random.Random(f"{self.seed} {i}")
            needles, questions = _needles(rng, self.questions_a_class, name)
            yield name, _text(rng, needles, self.words), questions


def _needles(rng: random.Random, count: int, name: str) -> tuple[list[tuple[int, str]], list[SuiteQuestion]]:
    """Returns facts, each with the third of the text in which it stands, and the questions about them."""
    subjects = [f"{colour} {thing}" for colour, thing in itertools.product(COLOURS.split(), THINGS.split())]
    people = [f"{first} {last}" for first, last in itertools.product(FIRST.split(), LAST.split())]
    if 3 * count > len(subjects) or count > len(people):
        raise UserError(f"needles has {count} questions a class, expected at most {len(subjects) // 3}")
    subjects, people = rng.sample(subjects, 3 * count), rng.sample(people, count)
    numbers = iter(map(str, rng.sample(range(10_000, 100_000), 5 * count)))
    needles, questions = [], []

    def ask(kind: str, question: str, answer: str) -> None:
        questions.append(SuiteQuestion(question, answer, kind=kind, documents=(name,)))

    for one, several, kept, person in zip(
        subjects[:count], subjects[count : 2 * count], subjects[2 * count :], people, strict=True
    ):
        value, *values, code = itertools.islice(numbers, 5)
        needles.append((rng.randrange(THIRDS), f"The number of the {one} is {value}."))
        ask("multi-key", f"What is the number of the {one}?", value)
        needles += [(third, f"A number of the {several} is {value}.") for third, value in enumerate(values)]
        ask("multi-value", f"What are the three numbers of the {several}?", "{}, {} and {}".format(*values))
        first, second = rng.sample(range(THIRDS), 2)
        needles.append((first, f"The keeper of the {kept} is {person}."))
        needles.append((second, f"The number of {person} is {code}."))
        ask("several places", f"What is the number of the keeper of the {kept}?", code)
    return needles, questions


def _text(rng: random.Random, needles: list[tuple[int, str]], words: int) -> str:
    """Returns a text of about so many words with every needle in its third, a paragraph for each third."""
    needed = sum(len(sentence.split()) for _, sentence in needles)
    if needed > words:
        raise UserError(f"needles has {words} words a document, expected at least the {needed} of its facts")
    paragraphs = []
    for third in range(THIRDS):
        sentences = [sentence for at, sentence in needles if at == third]
        left = words // THIRDS - sum(len(sentence.split()) for sentence in sentences)
        while left > 0:
            sentences.append(" ".join(map(rng.choice, HAY)) + ".")
            left -= len(sentences[-1].split())
        rng.shuffle(sentences)
        paragraphs.append(" ".join(sentences))
    return "\n\n".join(paragraphs) + "\n"
