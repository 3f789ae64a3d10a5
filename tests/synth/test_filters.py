"""What is found wrong with a conversation, and that what stays depends on the order of indices alone."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from synth.config import FilterConfig
from synth.conversation import Conversation, Message
from synth.filters import Filter, findings

FINE = "The lamp tower is 41 metres tall, and Gus Hale polishes its lamp with vinegar and soft leather every morning."


def talk(question: str, answer: str = FINE, **metadata: Any) -> Conversation:
    return Conversation((Message(question, "user"), Message(answer, "assistant")), "", metadata)


@pytest.mark.parametrize(
    "answer",
    [
        FINE,
        "In the context of the war, the text message was sent, and the document was signed.",
        "\n".join(f'{{"name": "item {i}", "weight": {i * 7}, "box": {i % 9}}},' for i in range(30)),
        "\n".join(f"| item {i} | {i * 13 % 7} grams | blue |" for i in range(20)),
        "I can see the tower from here.",
        "no " * 5,
        "灯塔高四十一米 古斯·黑尔每天早晨用醋和软皮擦拭它的灯 然后他走下楼梯去吃早饭",
    ],
)
def test_nothing_is_wrong(answer: str):
    assert findings(talk("Who polishes the lamp?", answer, finish_reasons=["stop", "stop"])) == set()


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (" \n", "empty"),
        ("the lamp is the lamp and " * 12, "repetition"),
        ("I know this. " + "It is tall. " * 40, "repetition"),
        ("高四十一米" * 20, "repetition"),
        ("x" * 300, "repetition"),
        ("According to the text, it is tall.", "text_talk"),
        ("The provided passage says that it is tall.", "text_talk"),
        ("It is not mentioned in the context.", "text_talk"),
        ("Based on the information provided, it is tall.", "text_talk"),
        ("I'm sorry, but I cannot help with that.", "refusal"),
        ("I\u2019m unable to answer.", "refusal"),
        ("As an AI language model, I do not know.", "refusal"),
    ],
)
def test_what_is_wrong_is_found(answer: str, found: str):
    assert findings(talk("Who polishes the lamp?", answer)) == {found}


def test_a_message_that_was_cut_is_found():
    assert findings(talk("Who?", finish_reasons=["stop", "length"])) == {"truncated"}
    assert findings(Conversation((Message("", "user"),), "", {})) == {"empty"}


def stay(questions: list[str], **config: bool) -> list[bool]:
    filters = Filter(FilterConfig(**config))
    return [filters.check(talk(question))[1] for question in questions]


@pytest.mark.parametrize(
    ("first", "second", "alike"),
    [
        ("Who polishes the lamp of the tower?", "Who polishes the lamp of the tower?", True),
        ("Who polishes the lamp of the tower?", "who polishes the lamp, of the tower", True),
        (
            "Who polishes the lamp of the old tower every morning?",
            "Who polishes the lamp of the old tower each day?",
            False,
        ),
        ("Who polishes the lamp of the tower?", "How tall is the tower, in metres?", False),
        (
            "How much does item 12 weigh, in grams, when it is in its box?",
            "How much does item 13 weigh, in grams, when it is in its box?",
            False,
        ),
        ("!", "?", True),
    ],
)
def test_near_duplicates(first: str, second: str, alike: bool):
    assert stay([first, second], near_duplicate=True) == [True, not alike]
    assert stay([first, second]) == [True, True]


def test_of_thousands_of_questions_those_that_repeat_leave():
    different = [
        f"What did {name} say about {thing} number {i}?"
        for i in range(40)
        for name in ("Ada", "Gus Hale")
        for thing in ("the lamp", "vinegar", "a letter of the keeper")
    ]
    assert sum(stay(different * 3, near_duplicate=True)) == len(different)


def test_one_that_leaves_takes_no_other_along():
    filters = Filter(FilterConfig(refusal=True, near_duplicate=True))
    assert filters.check(talk("Who polishes the lamp?", "I cannot say."))[1] is False
    assert filters.check(talk("Who polishes the lamp?"))[1] is True
    assert filters.check(talk("Who polishes the lamp?")) == ({"near_duplicate"}, False)


@settings(max_examples=30)
@given(st.text(max_size=300), st.text(max_size=300))
def test_any_text_can_be_judged(question: str, answer: str):
    filters = Filter(FilterConfig(near_duplicate=True))
    filters.check(talk(question, answer))
    found, stays = filters.check(talk(question, answer))
    assert stays == (not found & {"empty", "near_duplicate"})
    assert found
