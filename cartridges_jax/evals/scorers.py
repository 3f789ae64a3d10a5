"""How good an answer is, from 0 to 1, by name."""

from __future__ import annotations

import difflib
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Literal

Scorer = Literal["contained", "exact", "f1", "choice", "chrf"]


def score(scorer: Scorer, text: str, answer: str, choices: Sequence[str] = ()) -> float:
    """Of one answer; `choices` are what a multiple-choice question offers."""
    if scorer == "choice":
        return float(chosen(text, choices) == answer)
    return float(SCORERS[scorer](text, answer))


def normalized(text: str) -> str:
    """Lower case, without punctuation and articles, single spaces (the SQuAD convention, arXiv 1606.05250)."""
    text = re.sub(r"(?<=\d),(?=\d)", "", text.lower())  # 615,000 is one number
    text = "".join(" " if ch in string.punctuation.replace(".", "") else ch for ch in text)
    text = re.sub(r"\b(a|an|the)\b", " ", re.sub(r"\.(?!\d)", " ", text))
    return " ".join(text.split())


def exact(text: str, answer: str) -> bool:
    """Whether the answer's words are all there is."""
    return normalized(text) == normalized(answer)


def contains(text: str, answer: str) -> bool:
    """Whether the answer's words stand in the text, in order and next to each other."""
    return f" {normalized(answer)} " in f" {normalized(text)} "


def token_f1(text: str, answer: str) -> float:
    """Harmonic mean of the precision and recall of words (the SQuAD convention, arXiv 1606.05250)."""
    ours, theirs = normalized(text).split(), normalized(answer).split()
    shared = sum((Counter(ours) & Counter(theirs)).values())
    return 0.0 if not shared else 2 * shared / (len(ours) + len(theirs))


def chosen(text: str, choices: Sequence[str]) -> str:
    """The choice that the text names first, or else the one most like it."""
    words = f" {normalized(text)} "
    places = {choice: words.find(f" {normalized(choice)} ") for choice in choices}
    named = {choice: (place, -len(choice)) for choice, place in places.items() if place >= 0}
    if named:
        return min(named, key=lambda choice: named[choice])
    return max(choices, key=lambda c: difflib.SequenceMatcher(None, normalized(c), normalized(text)).ratio())


def chrf(text: str, answer: str) -> float:
    """Character n-gram F-score by sacrebleu (Popović, 2015).

    Raises:
      ImportError: it is not installed.
    """
    try:
        from sacrebleu.metrics import CHRF
    except ImportError as error:
        raise ImportError("the scorer 'chrf' is sacrebleu's: pip install 'cartridges-jax[evals]'") from error
    return CHRF().sentence_score(text, [answer]).score / 100


SCORERS: dict[str, Callable[[str, str], float]] = {
    "contained": contains,
    "exact": exact,
    "f1": token_f1,
    "chrf": chrf,
}
