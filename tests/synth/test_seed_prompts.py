"""Seed prompts: drawn as weighted, and a cue that shows a beginning without giving the rest away."""

from __future__ import annotations

import random
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from synth import seed_prompts

TEXT = "The lamp tower is 41 metres tall. It has stripes.\nGus Hale polishes the lamp with vinegar and soft leather."


@given(st.integers(0, 10**6))
def test_a_cue_begins_a_sentence_and_hides_its_end(seed: int):
    prompt = seed_prompts.draw(("cloze",), TEXT, random.Random(seed))
    assert prompt.is_question and prompt.kind == "cloze"
    sentences = ["The lamp tower is 41 metres tall.", "Gus Hale polishes the lamp with vinegar and soft leather."]
    cues = [" ".join(s.split()[:n]) for s in sentences for n in range(3, len(s.split()) - 1)]
    assert any(cue in prompt.text for cue in cues)
    assert "tall" not in prompt.text and "leather" not in prompt.text


@given(st.integers(0, 10**6))
def test_side_a_is_shown_one_whole_sentence(seed: int):
    prompt = seed_prompts.draw(("sentence",), TEXT, random.Random(seed))
    assert not prompt.is_question and prompt.kind == "sentence"
    shown = ["The lamp tower is 41 metres tall." in prompt.text, "Gus Hale polishes" in prompt.text]
    assert sorted(shown) == [False, True], "one of the two that are long enough to ask about"


@given(st.integers(0, 10**6), st.text(max_size=400))
def test_a_sentence_of_any_text_is_short(seed: int, text: str):
    prompt = seed_prompts.draw(("sentence",), "word " * 500 + text, random.Random(seed))
    assert len(prompt.text.split()) < 90


@given(st.integers(0, 10**6), st.text(max_size=400))
def test_a_cue_of_any_text_is_short(seed: int, text: str):
    prompt = seed_prompts.draw(("cloze",), "word " * 500 + text, random.Random(seed))
    assert len(prompt.text.split()) < 40


def test_a_type_named_twice_comes_twice_as_often():
    rng = random.Random(0)
    kinds = Counter(seed_prompts.draw(("cloze", "cloze", "question"), TEXT, rng).kind for _ in range(3000))
    assert 0.63 < kinds["cloze"] / 3000 < 0.70
    assert not seed_prompts.draw(("question",), TEXT, rng).is_question
