"""The made-up long document: the same for everyone, without repetition, and its questions have their answers in it."""

from __future__ import annotations

import runpy
from collections import Counter
from pathlib import Path

made = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "documents" / "expedition.py"))["made"]


def test_it_depends_on_the_seed_and_on_nothing_else():
    assert made() == made() != made(8)


def test_no_sentence_stands_there_twice_and_every_answer_does():
    text, questions = made()
    sentences = Counter(text.replace("\n\n", " ").split(". "))
    assert len(sentences) > 500 and max(sentences.values()) == 1
    assert len({q["question"] for q in questions}) == len(questions) > 40
    assert all(q["answer"] in text for q in questions)
