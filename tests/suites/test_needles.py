"""The needles lie where their class says, in a text of the length that is asked for."""

from __future__ import annotations

from collections import Counter

import pytest

from cartridges_jax.command_line.errors import UserError
from cartridges_jax.suites.needles import THIRDS, Suite


@pytest.mark.parametrize("words", [700, 3000, 20_000])
def test_a_document_has_the_length_that_is_asked_for(words: int):
    [text] = Suite(words=words).documents().values()
    assert abs(len(text.split()) - words) < 40


def test_every_number_stands_in_the_document_once_and_each_class_has_its_questions():
    suite = Suite(num_documents=2, questions_a_class=7)
    documents, questions = suite.documents(), suite.questions()
    assert len(set(documents.values())) == 2
    for name, text in documents.items():
        words = Counter(text.replace(".", "").split())
        mine = [question for question in questions if question.documents == (name,)]
        assert Counter(q.kind for q in mine) == {"multi-key": 7, "multi-value": 7, "several places": 7}
        numbers = [n for q in mine for n in q.answer.replace(" and ", ", ").split(", ")]
        assert all(words[number] == 1 for number in numbers) and len(set(numbers)) == len(numbers)


def test_values_lie_one_in_each_third_and_a_chain_in_two_of_them():
    suite = Suite()
    [text] = suite.documents().values()
    thirds = text.split("\n\n")
    assert len(thirds) == THIRDS

    def third_of(sentence: str) -> int:
        [place] = [i for i, third in enumerate(thirds) if sentence in third]
        return place

    for question in suite.questions():
        if question.kind == "multi-value":
            values = question.answer.replace(" and ", ", ").split(", ")
            assert [third_of(f" is {value}.") for value in values] == [0, 1, 2]
        if question.kind == "several places":
            kept = question.question.rpartition(" of the ")[2].removesuffix("?")
            keeper = text.partition(f"The keeper of the {kept} is ")[2].partition(".")[0]
            assert f"The number of {keeper} is {question.answer}." in text
            assert third_of(f"keeper of the {kept} ") != third_of(f" is {question.answer}.")


def test_a_seed_gives_other_needles_and_a_score_is_the_share_of_values():
    assert Suite(seed=1).documents() != Suite(seed=2).documents()
    [question] = [q for q in Suite(questions_a_class=1).questions() if q.kind == "multi-value"]
    assert Suite().score(question, question.answer.split(", ")[0]) == pytest.approx(1 / 3)


def test_too_few_words_or_too_many_questions_are_refused():
    with pytest.raises(UserError, match="expected at least the"):
        Suite(words=100).documents()
    with pytest.raises(UserError, match="expected at most"):
        Suite(questions_a_class=100).documents()
