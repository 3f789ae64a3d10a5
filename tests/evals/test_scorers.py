"""Scores from 0 to 1, by their definitions."""

from __future__ import annotations

import pytest

from cartridges_jax.training.evals.scorers import Scorer, score

CHOICES = ("aspirin", "low dose aspirin", "no drug")


@pytest.mark.parametrize(
    ("scorer", "text", "answer", "expected"),
    [
        ("exact", "The White Heron.", "white heron", 1.0),
        ("exact", "It is a white heron.", "white heron", 0.0),
        ("contained", "It is a white heron.", "white heron", 1.0),
        ("f1", "white bird", "white heron", 0.5),
        ("choice", "I would give low dose aspirin.", "low dose aspirin", 1.0),
        ("choice", "Aspirin, not no drug.", "aspirin", 1.0),
        ("choice", "asprin", "aspirin", 1.0),
        ("choice", "no drug", "aspirin", 0.0),
        ("contained", "It is A.", "A", 1.0),
        ("contained", "", "A", 0.0),
        ("exact", "A", "A", 1.0),
        ("f1", "A", "A", 1.0),
        ("chrf", "white heron", "white heron", 1.0),
        ("chrf", "xyz", "white heron", 0.0),
    ],
)
def test_scores(scorer: Scorer, text: str, answer: str, expected: float):
    assert score(scorer, text, answer, CHOICES) == pytest.approx(expected)


@pytest.mark.parametrize(("text", "answer"), [("A because B is wrong", "A"), ("C, not A", "C"), ("It is B.", "B")])
def test_choices_may_be_letters(text: str, answer: str):
    assert score("choice", text, answer, ("A", "B", "C")) == 1.0


def test_chrf_is_between_for_what_is_near():
    assert 0.3 < score("chrf", "white herons", "white heron") < 1
