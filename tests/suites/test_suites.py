"""What holds of every suite: the same documents at every call, and questions that name them."""

from __future__ import annotations

import pkgutil

import pytest

from cartridges_jax import suites
from cartridges_jax.command_line.errors import UserError
from cartridges_jax.suites import load_suite

NAMES = sorted(module.name for module in pkgutil.iter_modules(suites.__path__))


@pytest.mark.parametrize("name", NAMES)
def test_a_suite_is_the_same_every_time_and_its_questions_name_its_documents(name: str):
    suite = load_suite(name, {})
    documents, questions = suite.documents(), suite.questions()
    assert (documents, questions) == (load_suite(name, {}).documents(), load_suite(name, {}).questions())
    assert all(question.documents and set(question.documents) <= set(documents) for question in questions)
    assert all(question.kind and question.answer for question in questions)
    assert len({(question.question, question.documents) for question in questions}) == len(questions)
    assert "{question}" in suite.instruction and suite.max_answer_tokens > 0


@pytest.mark.parametrize("name", NAMES)
def test_an_answer_is_right_and_an_empty_text_is_wrong(name: str):
    suite = load_suite(name, {})
    assert {suite.score(question, question.answer) for question in suite.questions()} == {1.0}
    assert {suite.score(question, "") for question in suite.questions()} == {0.0}


def test_a_suite_or_an_option_that_is_not_there_is_named():
    with pytest.raises(UserError, match=r"no suite 'needle': expected one of .*needles"):
        load_suite("needle", {})
    with pytest.raises(UserError, match="word: did you mean 'words'"):
        load_suite("needles", {"word": 3})
