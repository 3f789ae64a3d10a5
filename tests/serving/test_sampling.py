"""Which token is drawn, against distributions written out in numpy."""

from __future__ import annotations

import itertools
from functools import partial
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cartridges_jax.serving.sampling import (
    KINDS,
    SORTED,
    SamplingParams,
    Wants,
    _bisected,
    _threshold,
    kind_for,
    sample,
)

V = 16
DRAWS = 4000
run = jax.jit(sample, static_argnums=2)
threshold_of, bisected = jax.jit(_threshold), jax.jit(_bisected)


def sampling_params(
    count: int, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0, seed: int = 0, first_step: int = 0
) -> SamplingParams:
    """`count` rows that differ in their step only."""
    return SamplingParams(
        jnp.full(count, temperature, jnp.float32),
        jnp.full(count, top_p, jnp.float32),
        jnp.full(count, top_k, jnp.int32),
        jnp.full(count, seed, jnp.int32),
        first_step + jnp.arange(count, dtype=jnp.int32),
        jnp.ones(count, jnp.int32),
    )


def kept(probs: np.ndarray, top_p: float, top_k: int) -> np.ndarray:
    """The exact rule: best first, until the mass reaches top_p or there are top_k; ties with the last one stay."""
    order = np.argsort(-probs, kind="stable")
    mass, last = 0.0, len(probs) - 1
    for rank, i in enumerate(order):
        mass += float(probs[i])
        if (top_p < 1 and mass >= top_p) or (top_k and rank + 1 >= top_k):
            last = rank
            break
    return probs >= probs[order[last]]


def softmax(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    shifted = (logits.astype(np.float64) - logits.max()) / temperature
    return np.exp(shifted) / np.exp(shifted).sum()


def draws(logits: np.ndarray, **how: float) -> np.ndarray:
    return np.asarray(run(jnp.broadcast_to(jnp.asarray(logits), (DRAWS, V)), sampling_params(DRAWS, **how), 1)[0])


# a CPU may take subnormal numbers for zero
LOGITS = hnp.arrays(np.float32, V, elements=st.floats(-40, 40, width=32, allow_subnormal=False))
FLAT_LOGITS = hnp.arrays(np.float32, V, elements=st.floats(-3, 3, width=32))


@settings(max_examples=100, deadline=None)
@given(LOGITS)
def test_greedy_is_the_first_of_the_best(logits: np.ndarray):
    logits = logits + np.float32(0)  # XLA orders -0 before 0, numpy takes them for equal
    token, logprob, top_ids, top_logprobs = run(jnp.asarray(logits)[None], sampling_params(1, temperature=0.0), 5)
    assert int(token[0]) == int(np.argmax(logits)) == int(top_ids[0, 0])
    log_probs = logits.astype(np.float64) - logits.max()
    log_probs -= np.log(np.exp(log_probs).sum())
    np.testing.assert_allclose(logprob[0], log_probs[token[0]], atol=1e-5)
    np.testing.assert_allclose(top_logprobs[0], np.sort(log_probs)[::-1][:5], atol=1e-5)
    np.testing.assert_allclose(log_probs[np.asarray(top_ids[0])], top_logprobs[0], atol=1e-5)


@settings(max_examples=150, deadline=None)
@given(LOGITS, st.integers(1, V), st.integers(0, 1000))
def test_top_k_never_leaves_its_support(logits: np.ndarray, top_k: int, seed: int):
    allowed = kept(np.asarray(jax.nn.softmax(jnp.asarray(logits))), 1.0, top_k)
    rows = jnp.broadcast_to(jnp.asarray(logits), (64, V))
    tokens = np.asarray(run(rows, sampling_params(64, top_k=top_k, seed=seed), 1)[0])
    assert allowed[tokens].all()


@settings(max_examples=150, deadline=None)
@given(FLAT_LOGITS, st.integers(1, V - 1), st.sampled_from([-1e-4, 1e-4, 0.01]), st.integers(0, 1000))
def test_top_p_keeps_exactly_its_support(logits: np.ndarray, rank: int, beyond: float, seed: int):
    probs = np.asarray(jax.nn.softmax(jnp.asarray(logits)))
    top_p = min(float(np.sort(probs)[::-1][:rank].sum()) * (1 + beyond), 0.9999)  # just short of a token, or just over
    for find in (bisected, threshold_of):
        found = probs >= np.asarray(find(jnp.asarray(probs)[None], sampling_params(1, top_p=top_p)))[0]
        # the mass is a sum in float32: a top_p within its rounding may take one more or less
        assert (found >= kept(probs, top_p * (1 - 1e-6), 0)).all()
        assert (found <= kept(probs, min(top_p * (1 + 1e-6), 0.9999999), 0)).all()
    rows = jnp.broadcast_to(jnp.asarray(logits), (64, V))
    tokens = np.asarray(run(rows, sampling_params(64, top_p=top_p, seed=seed), 1)[0])
    assert found[tokens].all()


@pytest.mark.parametrize("top_k", [0, 1, 2, 5, V, V + 3])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.5, 0.05])
@pytest.mark.parametrize("temperature", [1.0, 0.3, 2.5])
def test_frequencies_are_those_of_the_exact_distribution(temperature: float, top_p: float, top_k: int):
    logits = np.random.default_rng(7).standard_normal(V).astype(np.float32) * 2
    probs = softmax(logits, temperature)
    probs = np.where(kept(probs, top_p, top_k), probs, 0)
    probs /= probs.sum()
    counts = np.bincount(draws(logits, temperature=temperature, top_p=top_p, top_k=top_k), minlength=V)
    assert not counts[probs == 0].any()
    rare = (probs * DRAWS < 5) & (probs > 0)  # one class of their own, as the test asks for
    expected = np.append(probs[~rare & (probs > 0)], probs[rare].sum()) * DRAWS
    found = np.append(counts[~rare & (probs > 0)], counts[rare].sum())
    some = expected > 0
    chi_square = ((found[some] - expected[some]) ** 2 / expected[some]).sum()
    degrees = some.sum() - 1
    assert chi_square <= degrees + 5 * np.sqrt(2 * degrees) + 1e-9  # seeds are fixed: this passes or fails for ever


def test_the_threshold_is_exact_far_below_the_best():
    """Two tokens of 1e-11 beside one of almost all mass: top_k tells them apart although a coarse bisection cannot."""
    logits = np.full(V, -30.0, np.float32)
    logits[[3, 5, 7]] = [20.0, -5.0, -5.001]
    probs = np.asarray(jax.nn.softmax(jnp.asarray(logits)))
    for top_k, support in ((1, {3}), (2, {3, 5}), (3, {3, 5, 7})):
        for find in (bisected, threshold_of):
            threshold = find(jnp.asarray(probs)[None], sampling_params(1, top_k=top_k))
            assert set(np.flatnonzero(probs >= np.asarray(threshold)[0])) == support


@settings(max_examples=200, deadline=None)
@given(LOGITS, st.integers(1, V))
def test_the_threshold_of_top_k_is_the_kth_probability(logits: np.ndarray, top_k: int):
    probs = jax.nn.softmax(jnp.asarray(logits))
    expected = float(np.sort(np.asarray(probs))[::-1][top_k - 1])
    for find in (bisected, threshold_of):
        found = float(find(probs[None], sampling_params(1, top_k=top_k))[0, 0])
        assert found == expected or expected < np.finfo(np.float32).tiny  # a CPU may take subnormal numbers for zero


@pytest.mark.parametrize(("top_p", "top_k"), [(0.9, 0), (1.0, SORTED), (1.0, SORTED + 50), (0.999, 700), (1.0, 0)])
def test_what_the_best_do_not_tell_is_bisected(top_p: float, top_k: int):
    """A vocabulary larger than what is sorted, and so flat that most of it is kept."""
    probs = jax.nn.softmax(jnp.asarray(np.random.default_rng(4).standard_normal((1, 3 * SORTED)) / 4, jnp.float32))
    params = sampling_params(1, top_p=top_p, top_k=top_k)
    found = np.asarray(probs >= threshold_of(probs, params))[0]
    assert found.sum() == kept(np.asarray(probs)[0], top_p, top_k).sum() >= SORTED
    np.testing.assert_array_equal(found, np.asarray(probs >= bisected(probs, params))[0])


def test_a_token_that_was_left_out_is_never_drawn_from_a_large_vocabulary():
    """A parallel sum over the vocabulary wobbles by a rounding where nothing is added: those ids must stay impossible.

    The draw is put exactly on such a wobble.
    """
    v = 49_152
    rng = np.random.default_rng(0)
    logits = np.full(v, -np.inf, np.float32)
    possible = np.sort(rng.choice(v, 50, replace=False))
    logits[possible] = rng.standard_normal(50)
    sums = np.asarray(jax.jit(partial(jnp.cumsum, axis=-1))(jax.nn.softmax(jnp.asarray(logits))[None]))[0]
    total = sums[-1]
    wobbles = np.flatnonzero((np.diff(sums) != 0) & ~np.isin(np.arange(1, v), possible))
    assert len(wobbles) > 0
    targets = np.concatenate([sums[wobbles], sums[wobbles + 1]]) / total
    targets = np.concatenate([targets, np.nextafter(targets, np.float32(0)), np.nextafter(targets, np.float32(1))])

    @jax.jit
    def draw_at(logits_1v: jax.Array, target: jax.Array) -> jax.Array:
        with mock.patch.object(jax.random, "uniform", lambda _: target):
            return sample(logits_1v, sampling_params(1), 1)[0][0]

    assert {int(draw_at(jnp.asarray(logits)[None], target)) for target in targets} <= set(possible.tolist())


@pytest.mark.parametrize("temperature", [1e-30, 2e-38, 1e-38, 1e-3])
def test_a_temperature_near_zero_is_greedy(temperature: float):
    logits = np.random.default_rng(1).standard_normal(V).astype(np.float32) * 10 + 50
    assert set(draws(logits, temperature=temperature)) == {int(np.argmax(logits))}


@pytest.mark.parametrize("kind", KINDS)
def test_rows_whose_wants_are_known_get_what_they_get_anyway(kind: Wants):
    """Infinity and NaN included; and the program has no branch. A row that wants less than others gets just that."""
    rng, b = np.random.default_rng(2), 40
    logits = rng.standard_normal((b, V)).astype(np.float32)
    logits[1, 3], logits[2, 4], logits[3] = np.inf, -np.inf, np.nan
    how = sampling_params(b, temperature=1.0 if kind.draws else 0.0)
    how = how.replace(seed=jnp.arange(b), temperature=how.temperature * (jnp.arange(b) % 3 > 0))
    if kind.filters:
        how = how.replace(top_p=jnp.linspace(0.05, 1, b), top_k=jnp.arange(b) % 7)
    how = how.replace(num_top=jnp.arange(b) % 3 if kind.alternatives else jnp.zeros(b, jnp.int32))
    known = jax.jit(partial(sample, num_top=2, wants=kind)).lower(logits, how)
    for found, expected in zip(known.compile()(logits, how), run(logits, how, 2), strict=True):
        np.testing.assert_array_equal(found, expected)
    assert "case" not in known.as_text() and "stablehlo.if" not in known.as_text()


def test_a_program_does_at_least_what_is_wanted():
    for wants in map(Wants._make, itertools.product([False, True], repeat=3)):
        kind = kind_for(wants)
        assert all(has or not is_wanted for has, is_wanted in zip(kind, wants, strict=True))
    assert [kind_for(kind) for kind in KINDS] == list(KINDS)


def test_log_probabilities_are_raw():
    logits = jnp.asarray(np.random.default_rng(2).standard_normal((DRAWS, V)), jnp.float32)
    how = sampling_params(DRAWS, temperature=0.3, top_p=0.7, top_k=3)
    token, logprob, top_ids, top_logprobs = run(logits, how, 4)
    expected = np.asarray(jax.nn.log_softmax(logits))
    np.testing.assert_allclose(logprob, expected[np.arange(DRAWS), token], atol=1e-6)
    np.testing.assert_allclose(top_logprobs, np.take_along_axis(expected, np.asarray(top_ids), 1), atol=1e-6)
    np.testing.assert_array_equal(np.asarray(top_ids), np.argsort(-expected, axis=1, kind="stable")[:, :4])


def test_a_row_draws_the_same_whatever_the_others_ask_for():
    rng = np.random.default_rng(3)
    logits = jnp.asarray(rng.standard_normal((8, V)) * 2, jnp.float32)
    mixed = SamplingParams(
        jnp.asarray([0, 1, 0.5, 2, 1, 1, 0, 0.8], jnp.float32),
        jnp.asarray([1, 1, 0.5, 0.9, 1, 0.3, 1, 1], jnp.float32),
        jnp.asarray([0, 0, 0, 4, 2, 0, 3, 0], jnp.int32),
        jnp.arange(8, dtype=jnp.int32) * 11,
        jnp.arange(8, dtype=jnp.int32),
        jnp.zeros(8, jnp.int32),
    )
    together = np.asarray(run(logits, mixed, 1)[0])
    for i in range(8):
        alone = run(logits[i : i + 1], jax.tree.map(lambda a, i=i: a[i : i + 1], mixed), 1)[0]
        assert int(alone[0]) == together[i]


def test_seeds_and_steps_draw_differently():
    logits = np.zeros(V, np.float32)
    a, b = draws(logits, seed=0), draws(logits, seed=1)
    assert (a == draws(logits, seed=0)).all()
    assert 0.02 < (a == b).mean() < 0.12  # one in sixteen by chance
    assert 0.02 < (a == draws(logits, seed=0, first_step=1)).mean() < 0.12
