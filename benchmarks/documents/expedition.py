"""Writes a long document and questions about it, both made up: `python benchmarks/documents/expedition.py`.

The report of an expedition that never was, about 8,050 tokens of SmolLM2's, which leaves room for a question in its
window of 8,192; every number, name and thing is drawn from a seed, so that no model can know them. It goes to
runs/documents/expedition.txt, and a question with a short answer about every third paragraph to expedition.jsonl.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cartridges_jax.command_line import files

FOLDER = Path(__file__).resolve().parents[2] / "runs" / "documents"
SEED = 7
QUESTION_EVERY = 3  # paragraphs
TITLE = "The Report of the Corvane Survey"
OPENING = (
    "The Corvane Survey crossed the plateau of Corvane on foot in one summer. This report names the members of the "
    "Corvane Survey, the camps where they slept, what they found, what each day brought and what the crates held."
)


@dataclass(frozen=True)
class Fact:
    sentence: str
    question: str
    answer: str


@dataclass(frozen=True)
class Section:
    title: str
    paragraphs: tuple[tuple[Fact, ...], ...]


class Draw:
    """Words that are used once each, from one seed."""

    def __init__(self, seed: int):
        self.rng = random.Random(seed)
        self._pools = {name: self.rng.sample(pool, len(pool)) for name, pool in _pools().items()}

    def __call__(self, pool: str) -> str:
        return self._pools[pool].pop()

    def number(self, low: int, high: int) -> str:
        return str(self.rng.randint(low, high))


def made(seed: int = SEED) -> tuple[str, list[dict[str, str]]]:
    """The document, and its questions with their answers."""
    draw = Draw(seed)
    people = [f"{draw('first')} {draw('last')}" for _ in JOBS]
    camps = [f"Camp {draw('place')}" for _ in range(26)]
    sections = (
        _section(draw, "The Members", people, _member),
        _section(draw, "The Camps", camps, lambda draw, camp: _camp(draw, camp, draw.rng.choice(people))),
        _section(draw, "The Finds", range(36), lambda draw, _: _find(draw, draw.rng.choice(camps), people)),
        _section(draw, "The Days", range(1, 48), lambda draw, day: _day(draw, int(day), people)),
        _section(draw, "The Crates", range(24), lambda draw, _: _crate(draw, draw.rng.choice(people))),
        _section(draw, "The Letters", draw.rng.sample(people, 22), _letter),
    )
    return _text(sections), list(_questions(sections))


def _section(draw: Draw, title: str, of: Sequence[object], facts: Callable[[Draw, str], Iterator[Fact]]) -> Section:
    return Section(title, tuple(tuple(facts(draw, str(one))) for one in of))


def _text(sections: Sequence[Section]) -> str:
    parts = [TITLE, OPENING]
    for number, section in enumerate(sections, start=1):
        parts.append(f"{number}. {section.title}")
        parts += [" ".join(fact.sentence for fact in paragraph) for paragraph in section.paragraphs]
    return "\n\n".join(parts) + "\n"


def _questions(sections: Sequence[Section]) -> Iterator[dict[str, str]]:
    paragraphs = [paragraph for section in sections for paragraph in section.paragraphs]
    for i, paragraph in enumerate(paragraphs[::QUESTION_EVERY]):
        fact = paragraph[i % len(paragraph)]
        yield {"question": fact.question, "answer": fact.answer}


def _member(draw: Draw, name: str) -> Iterator[Fact]:
    job, town, thing, habit = draw("job"), draw("place"), draw("thing"), draw("habit")
    yield Fact(f"{name} was the {job} of the survey.", f"What was {name}'s work in the Corvane Survey?", job)
    yield Fact(
        draw.rng.choice((f"{name} came from {town}.", f"The home of {name} is the town of {town}.")),
        f"Which town did {name} of the Corvane Survey come from?",
        town,
    )
    yield Fact(f"In the pack of {name} lay {thing}.", f"What lay in the pack of {name}?", thing)
    yield Fact(f"Every evening {name} {habit}.", f"What did {name} do every evening?", habit)


def _camp(draw: Draw, camp: str, person: str) -> Iterator[Fact]:
    beside, height, left = draw("beside"), draw.number(400, 2900), draw("thing")
    yield Fact(f"{camp} stood beside {beside}.", f"What did {camp} stand beside?", beside)
    yield Fact(f"{camp} lies {height} metres above the sea.", f"How many metres above the sea is {camp}?", height)
    yield Fact(
        draw.rng.choice((f"It was {person} who chose the place for {camp}.", f"{person} chose the place for {camp}.")),
        f"Who chose the place for {camp}?",
        person,
    )
    yield Fact(f"At {camp} the survey left {left} behind.", f"What did the survey leave behind at {camp}?", left)


def _find(draw: Draw, camp: str, people: Sequence[str]) -> Iterator[Fact]:
    find, person = draw("find"), draw.rng.choice(people)
    weight, room = draw.number(20, 980), draw("place")
    yield Fact(
        draw.rng.choice((f"Near {camp}, {person} found {find}.", f"{person} dug up {find} near {camp}.")),
        f"Who found {find}?",
        person,
    )
    yield Fact(f"{find.capitalize()} weighs {weight} grams.", f"How many grams does {find} weigh?", weight)
    yield Fact(f"Today {find} is in the museum of {room}.", f"In the museum of which town is {find} today?", room)


def _day(draw: Draw, day: int, people: Sequence[str]) -> Iterator[Fact]:
    distance, animal, supper, leader = draw.number(3, 31), draw("animal"), draw("supper"), draw.rng.choice(people)
    yield Fact(
        draw.rng.choice((f"On day {day}, {leader} led the way.", f"The leader of day {day} was {leader}.")),
        f"Who led the way on day {day} of the Corvane Survey?",
        leader,
    )
    yield Fact(
        draw.rng.choice(
            (
                f"The survey walked {distance} kilometres and saw {animal}.",
                f"After {distance} kilometres there was {animal} on the path.",
            )
        ),
        f"What did the Corvane Survey see on day {day}?",
        animal,
    )
    yield Fact(f"Supper on day {day} was {supper}.", f"What was supper on day {day} of the Corvane Survey?", supper)


def _crate(draw: Draw, person: str) -> Iterator[Fact]:
    mark, content, price = draw("mark"), draw("content"), draw.number(11, 890)
    yield Fact(f"The crate with {mark} on it held {content}.", f"What did the crate with {mark} on it hold?", content)
    yield Fact(
        f"The crate with {mark} on it cost {price} crowns.", f"How many crowns was the crate with {mark} on it?", price
    )
    yield Fact(f"{person} had the key to the crate with {mark}.", f"Who had the key to the crate with {mark}?", person)


def _letter(draw: Draw, person: str) -> Iterator[Fact]:
    to, topic, days = draw("relation"), draw("topic"), draw.number(4, 60)
    yield Fact(f"{person} sent a letter to {to}.", f"To whom did {person} send a letter?", to)
    yield Fact(f"The letter of {person} was about {topic}.", f"What was the letter of {person} about?", topic)
    yield Fact(
        f"The letter of {person} arrived after {days} days.",
        f"After how many days did the letter of {person} arrive?",
        days,
    )


def _each(*parts: str) -> list[str]:
    """Every word of the first part before every word of the second, and so on."""
    found = [""]
    for part in parts:
        found = [before + one for before in found for one in part.split("|")]
    return found


JOBS = _each(
    "cook|surgeon|map maker|botanist|carpenter|radio operator|photographer|mule driver|geologist|interpreter|"
    "quartermaster|astronomer|tailor|weather observer|boat builder|bird counter|historian|blacksmith|secretary|"
    "chaplain|painter|rope maker|beekeeper|lamp keeper|cellist|ferryman"
)


def _pools() -> dict[str, list[str]]:
    """What may be drawn, by kind."""
    return {
        "job": list(JOBS),
        "first": _each(
            "Ada|Bram|Clio|Dorian|Edda|Falk|Greta|Hollis|Ines|Jarl|Kaia|Leif|Mira|Niko|Orla|Piet|Quinn|Runa|Silas|"
            "Tilda|Ugo|Vera|Wim|Xenia|Yorick|Zora"
        ),
        "last": _each("Ash|Birch|Crow|Dun|Elm|Fern|Gold", "more|by|well|stone|field"),
        "place": _each(
            "Bel|Cor|Dra|Fen|Hal|Ost|Kir|Lor|Mar|Nor|Pel|Tam", "wick|holm|ford|dale|mouth|stead|ness|by|low"
        ),
        "thing": _each(
            "a brass |a broken |a blue |a borrowed |a wooden |a silver |a tiny ",
            "flute|compass|teapot|clock|mirror|lantern|chess set|whistle|globe|bell",
        ),
        "habit": _each("wrote |read |copied ", "three |five |seven |nine ", "letters|pages|poems")
        + _each("washed |mended |folded ", "two |four |six |eight ", "shirts|socks|nets"),
        "beside": _each(
            "a frozen |a green |a nameless |a ruined |a steep |a silent ",
            "lake|chapel|waterfall|bridge|quarry|mill|orchard|spring",
        ),
        "find": _each(
            "the copper |the bone |the amber |the glass |the clay |the jade ",
            "fish|key|comb|crown|spoon|ring|horse|mask",
        ),
        "animal": _each(
            "a white |a limping |a sleeping |a young |an old |a lost ", "fox|heron|goat|owl|bear|hare|swan|lynx"
        ),
        "supper": _each(
            "barley |bean |mushroom |turnip |onion |lentil |fish ",
            "soup|stew|porridge|pie|dumplings|pancakes|bread",
        ),
        "mark": _each("a red |a black |a yellow |a white ", "anchor|star|wheel|crescent|arrow|hand|leaf"),
        "relation": _each(
            "an aunt |a brother |a cousin |a teacher |a neighbour ",
            "in the city|by the sea|in prison|on a farm|in a convent",
        ),
        "topic": _each(
            "the colour of |the taste of |the price of |the fear of |the smell of ",
            "snow|honey|thunder|leather|moss|silence",
        ),
        "content": _each("forty |sixty |ninety |two hundred ", "candles|nails|blankets|biscuits|matches|lemons|ropes"),
    }


def main() -> int:
    text, questions = made()
    files.write_text(FOLDER / "expedition.txt", text)
    files.write_text(FOLDER / "expedition.jsonl", "".join(json.dumps(one) + "\n" for one in questions))
    print(f"wrote {len(text)} characters and {len(questions)} questions to {FOLDER}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
