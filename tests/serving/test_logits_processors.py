"""What requests ask to be done to their logits, against the same written out token by token."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from cartridges_jax.serving.logits_processors import LogitsParams, begin_row, empty_state, process, row_of
from cartridges_jax.serving.sampling import NEVER, SamplingParams, sample
from cartridges_jax.serving.scheduler import LogitsRules

V = 40  # more than a word of a mask
WORDS = -(-V // 32)
run, draw = jax.jit(process), jax.jit(sample, static_argnums=2)
TOKENS = st.lists(st.integers(0, V - 1), max_size=6).map(tuple)
RULES = st.builds(
    LogitsRules,
    frequency_penalty=st.sampled_from([0.0, 0.5, -2.0]),
    presence_penalty=st.sampled_from([0.0, 0.25, -1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.5, 0.5]),
    min_p=st.sampled_from([0.0, 0.2, 1.0]),
    min_tokens=st.integers(0, 3),
    bias=st.lists(st.tuples(st.integers(0, V - 1), st.sampled_from([-100.0, 2.0])), max_size=3).map(tuple),
    allowed=st.none() | st.lists(st.integers(0, V - 1), min_size=1, max_size=9).map(tuple),
    stop_ids=st.frozensets(st.integers(0, V - 1), max_size=2),
    prompt=TOKENS,
    answer=TOKENS,
)


def mask_of(tokens: set[int]) -> np.ndarray:
    bits = np.zeros(WORDS * 32, np.uint8)
    bits[list(tokens)] = 1
    return np.packbits(bits, bitorder="little").view(np.int32)


EVERYTHING = mask_of(set(range(V)))


def by_hand(logits: np.ndarray, rules: LogitsRules, temperature: float, mask: set[int]) -> dict[int, float]:
    """The tokens that may be drawn, with their logits."""
    made = {}
    for token in mask:
        if rules.allowed is not None and token not in rules.allowed:
            continue
        if token in rules.stop_ids and len(rules.answer) < rules.min_tokens:
            continue
        value = float(logits[token])
        if token in (*rules.prompt, *rules.answer):
            value = value / rules.repetition_penalty if value > 0 else value * rules.repetition_penalty
        count = rules.answer.count(token)
        value -= rules.frequency_penalty * count + rules.presence_penalty * (count > 0)
        made[token] = value + sum(added for biased, added in rules.bias if biased == token)
    best = max(made.values(), default=0.0)
    return {
        token: value
        for token, value in made.items()
        if rules.min_p == 0 or value >= best + temperature * math.log(rules.min_p) - 1e-5
    }


def processed(logits: np.ndarray, rules: list[LogitsRules], temperature: float, masks: list[np.ndarray]) -> np.ndarray:
    state = empty_state(len(rules), V)
    for i, own in enumerate(rules):
        state = begin_row(state, i, row_of(own, V))
    params = jax.tree.map(lambda *own: np.stack(own), *map(LogitsParams.of, rules))
    rows: dict[str, Any] = {"temperature": jnp.full(len(rules), temperature)}
    steps = jnp.array([len(own.answer) for own in rules], jnp.int32)
    return np.asarray(run(logits, state, params, rows["temperature"], steps, np.stack(masks)))


@settings(max_examples=60, deadline=None)
@given(st.lists(RULES, min_size=2, max_size=2), st.sampled_from([0.0, 0.7]), st.integers(0, 99), st.booleans())
def test_it_is_what_each_field_says(rules: list[LogitsRules], temperature: float, seed: int, masked: bool):
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((2, V)).astype(np.float32) * 3
    sets = [set(rng.choice(V, 12, replace=False).tolist()) if masked else set(range(V)) for _ in rules]
    made = processed(logits, rules, temperature, [mask_of(one) for one in sets])
    for row, own, mask, of_row in zip(logits, rules, sets, made, strict=True):
        wanted = by_hand(row, own, temperature, mask)
        assert int(of_row.argmax()) in mask, "whatever is banned, the mask holds"
        if wanted:
            assert {int(i) for i in np.flatnonzero(of_row > NEVER / 2)} == wanted.keys()
            np.testing.assert_allclose([of_row[token] for token in wanted], list(wanted.values()), atol=1e-5)


def test_a_row_that_asks_for_nothing_keeps_its_logits():
    logits = np.random.default_rng(0).standard_normal((2, V)).astype(np.float32)
    rules = [LogitsRules(), LogitsRules(frequency_penalty=1.0, answer=(3,))]
    assert (processed(logits, rules, 1.0, [EVERYTHING] * 2)[0] == logits[0]).all()


def test_log_probabilities_stay_those_of_the_model():
    logits = np.random.default_rng(0).standard_normal((1, V)).astype(np.float32)
    only = mask_of({7})[None]
    params = SamplingParams(*(np.zeros(1, np.float32),) * 2, *(np.zeros(1, np.int32),) * 3, np.ones(1, np.int32))
    state, rows = empty_state(1, V), jax.tree.map(lambda a: a[None], LogitsParams.of(LogitsRules()))
    made = run(logits, state, rows, params.temperature, params.step, only)
    token, logprob, best, best_logprobs = draw(logits, params, 3, processed=made)
    wanted = jax.nn.log_softmax(logits[0])
    assert int(token[0]) == 7 and int(best[0, 0]) == int(logits[0].argmax())
    np.testing.assert_allclose(logprob[0], wanted[7], atol=1e-5)
    np.testing.assert_allclose(best_logprobs[0, 0], wanted.max(), atol=1e-5)
