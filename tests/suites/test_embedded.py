"""The questions of the suite `embedded` are what their classes promise, by rules that a program can check."""

from __future__ import annotations

import json
import re
from collections import Counter

import pytest

from cartridges_jax.cartridge.arrays import Cartridge
from cartridges_jax.comparison.likelihood import answer_nlls
from cartridges_jax.models import hub
from cartridges_jax.models.language_model import load_model
from cartridges_jax.models.tokenizer import load_tokenizer
from cartridges_jax.suites.embedded import FOLDER, Suite

SUITE = Suite()
DOCUMENTS = SUITE.documents()
CLASSES = ("fact", "paraphrase", "several places", "unanswerable")
# Words that carry no subject: a question may share them with its document, however rare they are there.
_FUNCTION_WORDS = """
    a an the this that these those and or but nor not no of to in on at by for from with without into onto out off up
    down over under after before while because if than as so too then there here i he she it they we you his her its
    their our your him them us me my mine who whom whose which what when where why how is are was were be been being am
    has have had having do does did done doing will would shall should can could may might must get gets got all any
    some each every many much more most few less least other another such own same very only also again once far one
    two three
"""
FUNCTION_WORDS = set(_FUNCTION_WORDS.split())
ENDINGS = ("ings", "ing", "ies", "ed", "es", "ers", "er", "ly", "s", "e", "y")


def stems(text: str) -> list[str]:
    """Returns the words of a text without their endings, crudely, but for function words."""
    words = [word for word in re.findall(r"[a-z]+", text.lower().replace("'s", "")) if word not in FUNCTION_WORDS]
    return [next((w[: -len(e)] for e in ENDINGS if w.endswith(e) and len(w) - len(e) >= 3), w) for w in words]


def rare(text: str) -> set[str]:
    """Returns the stems that a text has once or twice."""
    return {stem for stem, count in Counter(stems(text)).items() if count <= 2}


def lines(name: str) -> list[dict[str, str]]:
    text = (FOLDER / f"{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_each_document_has_ten_questions_of_each_class(name: str):
    mine = [question for question in SUITE.questions() if question.documents == (name,)]
    assert Counter(question.kind for question in mine) == dict.fromkeys(CLASSES, 10)


def test_documents_are_of_about_two_thousand_tokens():
    tokenizer = load_tokenizer(hub.resolve("smollm2-135m"))
    counts = [len(tokenizer.encode(text)) for text in DOCUMENTS.values()]
    assert len(counts) == 3 and all(1900 <= count <= 2100 for count in counts), counts


@pytest.mark.parametrize("question", [q for q in SUITE.questions() if q.kind == "paraphrase"], ids=lambda q: q.question)
def test_a_paraphrase_shares_no_rare_word_with_its_document(question):
    [name] = question.documents
    assert not rare(DOCUMENTS[name]) & set(stems(question.question))


@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_fact_is_asked_for_in_rare_words_of_its_document_and_answered_in_its_words(name: str):
    for line in lines(name):
        if line["class"] == "fact":
            assert rare(DOCUMENTS[name]) & set(stems(line["question"])), line["question"]
            assert line["answer"].lower() in DOCUMENTS[name].lower(), line["answer"]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_of_what_an_unanswerable_question_asks_its_document_says_nothing(name: str):
    """Each names in `missing` the word of what is asked, and no form of it stands in the document."""
    for line in lines(name):
        if line["class"] == "unanswerable":
            [missing] = stems(line["missing"])
            assert missing in stems(line["question"]) and missing not in stems(DOCUMENTS[name]), line["question"]


def test_abstaining_is_right_for_what_has_no_answer_and_for_nothing_else():
    by_kind = {question.kind: question for question in SUITE.questions()}
    for text in ("The manual does not say.", "It is not mentioned.", "the minutes don't say", "I do not know."):
        assert SUITE.score(by_kind["unanswerable"], text) == 1.0, text
        assert SUITE.score(by_kind["fact"], text) == 0.0
    assert SUITE.score(by_kind["unanswerable"], "It is blue.") == 0.0


@pytest.mark.slow
@pytest.mark.parametrize("name", DOCUMENTS)
def test_the_document_makes_every_answer_likelier(name: str):
    model = load_model("smollm2-135m")
    message = model.tokenizer.chat_ids([{"role": "system", "content": DOCUMENTS[name]}], add_generation_prompt=False)
    mine = [question for question in SUITE.questions() if question.documents == (name,)]
    nlls = []
    for prefix in (None, Cartridge.from_tokens(model, message)):
        asked = [[{"role": "user", "content": question.asked(SUITE.instruction)}] for question in mine]
        laid_out = [
            model.tokenizer.answered_ids(messages, question.answer, behind_cartridge=prefix is not None)
            for messages, question in zip(asked, mine, strict=True)
        ]
        nlls.append(answer_nlls(model, prefix, *zip(*laid_out, strict=True)))
    worse = [q.question for q, nothing, full in zip(mine, *nlls, strict=True) if full >= nothing]
    assert not worse
