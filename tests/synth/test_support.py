"""What an answer says beyond its chunk: a labelled set, half of it of what only looks so."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from synth.conversation import Conversation, Message
from synth.filters import findings
from synth.support import Source

CHUNK = """# Report of the station at Hollow Point

The station was founded by Ada Lovelace on 3 May 1921, and rebuilt in June 1958. Its lamp tower is 41.5 metres tall
and cost 1,250,000 kroner; about half of that came from the Norwegian Polar Institute. Gus Hale, the keeper since
1996-11-12, polishes the lamp at 22:05 with vinegar. Twelve people live there, and thirty-five reindeer. The boat to
Tromsø leaves at 9 a.m. every Tuesday from Pier 7, in winter the 2nd Friday of a month. In the 1870s whalers came from
Scotland. Kepler's telescope (model B12) has been in use from 1914 to 1918. Chapter IV lists 3.2 million sightings of
the white heron.
"""

SUPPORTED = [
    "Ada Lovelace founded the station on May 3, 1921.",
    "It was founded on 1921-05-03, i.e. 03/05/1921.",
    "The founding was on the 3rd of May, 1921, in spring.",
    "It was founded in May 1921 by Lovelace.",
    "Gus Hale came on 12 November 1996; Hale's work begins at 10:05 pm.",
    "He polishes it at 10:05 p.m. each day.",
    "The boat to Tromsø leaves at 09:00 on Tuesdays.",
    "The tower cost 1.25 million kroner, or 1250000 in all.",
    "It cost 1 250 000 kroner and is 41.50 metres tall.",
    "One writes 41,5 m.",
    "There are 12 people and 35 reindeer, said the keeper.",
    "Thirty-five reindeer and twelve people live at HOLLOW POINT.",
    "About 50% came from the institute in Norway, the NPI.",
    "Whalers of Scottish origin came in the 1870s.",
    "The Keplerian telescope, B12, was used in 1914-18.",
    "Chapter 4 tells of 3,200,000 sightings.",
    "There are two reasons:\n\n1. The lamp is bright.\n2. The tower is tall.\n3) It is old.",
    "It names three things: the lamp, the tower, and the boat.",
    "First, he cleans it. Second, he checks it. However, nobody sees him.",
    "There, says K\u00e9pler, it is \u221241.5 m.",
    "It was made in the third year, and cost 1,250 thousand kroner, as Hale\u2019s books say.",
    "Yes. Dr. Lovelace did so. I think it's true, and I'm sure.",
    "**Key Points And Findings:** the lamp is old.\n- Main Source Of Money: the institute",
    "## Summary Of The Whole Report\n\nThe lamp is old.",
    'He said: "The lamp is old." (See below.) Nobody else did!',
    "Use it so:\n```python\nx = 99\nprint(Zebra)\n```\nThat is all. https://Example.org/77",
    "Step 1 is to climb, step 2 to polish. (3) Done.",
    "The keeper, who came in the 1990s, polishes it in the evening, at five past ten.".replace(
        ", at five past ten", ""
    ),
    "L\u2019institut polaire a payé la moitié.",
    "一九二一年五月三日",
    "",
]
UNSUPPORTED = [
    ("It was founded on 4 May 1921.", "4 May 1921"),
    ("It was founded on May 3, 1922.", "May 3, 1922"),
    ("It was founded on 3 May 1958.", "3 May 1958"),
    ("It was founded on 1921-06-03.", "1921-06-03"),
    ("It was rebuilt in July 1958.", "July 1958"),
    ("It was rebuilt in 1959.", "1959"),
    ("The tower is 42 metres tall.", "42"),
    ("The tower is 41.6 metres tall.", "41.6"),
    ("It cost 1,250 kroner.", "1,250"),
    ("It cost 3.2 billion kroner.", "3.2"),
    ("There are 13 people.", "13"),
    ("There are thirteen people.", "thirteen"),
    ("There are two hundred and five reindeer.", "two hundred and five"),
    ("They waited five days for it.", "five"),
    ("He polishes it at 10:15 pm.", "10:15"),
    ("The boat leaves at 8 a.m. every day.", "8"),
    ("The boat leaves on Thursday.", "Thursday"),
    ("The station was founded by Grace Hopper.", "Grace"),
    ("The station was founded by Ada Hopper.", "Hopper"),
    ("The lamp was built by Gus Hall.", "Hall"),
    ("The money came from NASA.", "NASA"),
    ("NASA gave the money.", "NASA"),
    ("Whalers came from Ireland.", "Ireland"),
    ("The boat goes to Bodø.", "Bodø"),
    ("The founder was Dr. Hopper.", "Hopper"),
    ("Whalers came in the 1860s.", "1860"),
    ("About 60% came from the institute.", "60"),
    ("It is in chapter VI of it.", "VI"),
    ("The telescope was used in 1914-19.", "19"),
    ("It was founded on 3 May 1921 in Oslo.", "Oslo"),
]


@pytest.mark.parametrize("answer", SUPPORTED)
def test_what_the_chunk_says_in_other_words(answer: str):
    assert Source(CHUNK).lacks(answer) == []


@pytest.mark.parametrize(("answer", "claim"), UNSUPPORTED)
def test_what_the_chunk_does_not_say(answer: str, claim: str):
    assert claim in Source(CHUNK).lacks(answer)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("It costs a hundred pounds and a dozen eggs.", "It costs 100 pounds and 12 eggs."),
        ("It began at 2024-05-03T10:05:00Z.", "It began at 10:05."),
        ("Use v2.1 of it.", "Use version 2.1 of it."),
        ("Use version 2.1 of it.", "Use v2.1 of it."),
        ("About two thirds, or three quarters, came.", "About 67% came, or 75%."),
        ("About 75% came.", "About three quarters came, or 3/4."),
        ("A fifth of it, \u00bd and 1\u00bd.", "It is 20%, 0.5 and 1.5 of it."),
        ("It is 25% of it.", "It is 1/4 of it."),
        ("Nothing is 0/0.", "It is 0/0."),
        ("Half a million came in '98.", "In 1998 500,000 came."),
        ("They came in 1998.", "They came in '98."),
        ("It took two and a half million years.", "It took 2.5 million years, or 2,500,000."),
        ("The limit is 1e6, or 1.5 \u00d7 10\u00b3.", "The limit is 1,000,000, or 1500, not 1.5."),
        ("Two dozen came in nineteen eighty-four.", "It was 24 in 1984."),
        ("It was in 1984.", "It was in nineteen eighty-four."),
        ("We met at 14h30.", "We met at 2:30 pm."),
        ("The field user_id follows ISO8601 and HTTP/2.", "The ID follows ISO 8601 and HTTP2 there."),
        ("It was said by M\u00fcller and by Goethe.", "It was said by Mueller and by G\u00f6the."),
        ("Use the version 1.2.3 m of it.", "Use the version 1.2.3 of it."),
    ],
)
def test_numbers_and_names_in_other_forms(text: str, answer: str):
    assert Source(text).lacks(answer) == []


@pytest.mark.parametrize(
    ("text", "answer", "claim"),
    [
        ("It costs a hundred pounds.", "It costs 200 pounds.", "200"),
        ("It began at 2024-05-03T10:05:00Z.", "It began at 10:15.", "10:15"),
        ("Use v2.1 of it.", "Use version 2.2 of it.", "2.2"),
        ("About two thirds came.", "About 75% came.", "75"),
        ("The limit is 1e6.", "The limit is 100,000.", "100,000"),
        ("It was in 1984.", "It was in nineteen eighty-five.", "nineteen eighty-five"),
        ("The field user_id is there.", "It is the field SSN.", "SSN"),
    ],
)
def test_other_numbers_and_names_in_these_forms(text: str, answer: str, claim: str):
    assert Source(text).lacks(answer) == [claim]


def test_german_nouns_are_no_names():
    source = Source("Der Turm ist 41 Meter hoch. Die Lampe brennt seit 1921, und der Wärter putzt sie mit Essig.")
    assert source.lacks("Im Leuchtturm brennt seit 1921 eine Laterne.") == []
    assert source.lacks("Er ist 42 Meter hoch.") == ["42"]


def test_the_answers_to_our_own_questions_are_supported():
    source = Source(Path("examples/document.txt").read_text())
    questions = [json.loads(line) for line in Path("examples/questions.jsonl").read_text().splitlines()]
    assert {one["answer"]: found for one in questions if (found := source.lacks(f"It is {one['answer']}."))} == {}


@given(st.text("aA1 .,-:/'\n" + "May3dSt", max_size=200), st.text(max_size=50))
def test_any_text_supports_itself(text: str, other: str):
    assert Source(f"{other}\n\n{text}").lacks(text) == []


def test_what_a_question_says_is_supported_and_without_a_context_all_is():
    def found(question: str, answer: str, context: str = CHUNK) -> set[str]:
        return findings(Conversation((Message(question, "user"), Message(answer, "assistant")), context, {}))

    assert found("Who founded it?", "It was founded by Grace Hopper.") == {"unsupported"}
    assert found("Was it Grace Hopper?", "It was not founded by Grace Hopper.") == set()
    assert found("Was it in 1930?", "It was not founded in 1930.") == set()
    assert found("Who founded it?", "It was founded by Grace Hopper.", context="") == set()
    assert found("When?", "<think>1930? Grace Hopper?</think>It was founded in 1921.") == set()


def test_long_texts_take_time_in_proportion():
    for piece in ("1,", "1 ", "May ", "one ", "A. ", "a: ", "Ab-", "```", "12:", "3 May ", "#", "* ", "\n", "a ", "1/"):
        start = time.perf_counter()
        Source(piece * 20_000).lacks(piece * 20_000)
        assert time.perf_counter() - start < 5, piece
