"""Scorers of answers: each compares a text with the expected answer and gives a number from 0 to 1."""

from __future__ import annotations

import difflib
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Literal

from cartridges_jax.command_line.errors import MissingPackage

ARTICLES = ("a", "an", "the")

Scorer = Literal["contained", "exact", "f1", "choice", "chrf"]


def score(scorer: Scorer, text: str, answer: str, choices: Sequence[str] = ()) -> float:
    """Scores a text against the expected answer; `choices` are what a multiple-choice question offers."""
    if scorer == "choice":
        return float(chosen(text, choices) == answer)
    return float(SCORERS[scorer](text, answer))


def words(text: str) -> str:
    """Returns the text in lower case, without punctuation and with single spaces."""
    text = re.sub(r"(?<=\d),(?=\d)", "", text.lower())  # 615,000 is one number
    text = "".join(" " if ch in string.punctuation.replace(".", "") else ch for ch in text)
    return " ".join(re.sub(r"\.(?!\d)", " ", text).split())


def normalized(text: str) -> str:
    """Returns the words of the text without articles (the SQuAD convention, arXiv 1606.05250)."""
    return " ".join(word for word in words(text).split() if word not in ARTICLES)


def _forms(*texts: str) -> list[str]:
    """Returns the forms of texts that are compared: without articles, unless that leaves nothing of one of them."""
    forms = [normalized(text) for text in texts]
    return forms if all(forms) else [words(text) for text in texts]


def exact(text: str, answer: str) -> bool:
    """Says whether the text has the answer's words and no others."""
    ours, theirs = _forms(text, answer)
    return ours == theirs


def contains(text: str, answer: str) -> bool:
    """Says whether the answer's words stand in the text, in order and next to each other."""
    ours, theirs = _forms(text, answer)
    return f" {theirs} " in f" {ours} "


def token_f1(text: str, answer: str) -> float:
    """Returns the harmonic mean of the precision and the recall of words (as SQuAD does, arXiv 1606.05250)."""
    ours, theirs = (form.split() for form in _forms(text, answer))
    shared = sum((Counter(ours) & Counter(theirs)).values())
    return 0.0 if not shared else 2 * shared / (len(ours) + len(theirs))


def chosen(text: str, choices: Sequence[str]) -> str:
    """Returns the choice that the text names first, or else the choice that is most like the text."""
    said, *forms = _forms(text, *choices)
    places = [f" {said} ".find(f" {form} ") for form in forms]
    named = [(place, -len(choice), choice) for place, choice in zip(places, choices, strict=True) if place >= 0]
    if named:
        return min(named)[-1]
    likeness = [difflib.SequenceMatcher(None, form, said).ratio() for form in forms]
    return choices[likeness.index(max(likeness))]


def chrf(text: str, answer: str) -> float:
    """Returns the F-score of character n-grams by sacrebleu (Popović, 2015).

    Raises:
      MissingPackage: sacrebleu is not installed.
    """
    try:
        from sacrebleu.metrics import CHRF
    except ImportError as error:
        raise MissingPackage("the scorer 'chrf' is sacrebleu's: pip install 'cartridges-jax[evals]'") from error
    return CHRF().sentence_score(text, [answer]).score / 100


SCORERS: dict[str, Callable[[str, str], float]] = {
    "contained": contains,
    "exact": exact,
    "f1": token_f1,
    "chrf": chrf,
}
