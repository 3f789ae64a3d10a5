"""Budgets: whole numbers that come to the average exactly, within their bounds, and more where more is attended to."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import tiny

from cartridges_jax.cartridge.ragged import MOST_PADDING
from cartridges_jax.command_line.errors import UserError
from cartridges_jax.initial import budgets
from cartridges_jax.initial.attention_matching import array_sizes
from cartridges_jax.initial.budgets import (
    PROFILE_TEXT,
    RATIOS,
    BudgetConfig,
    Profile,
    by_shares,
    by_threshold,
    head_lengths,
)
from cartridges_jax.initial.chunks import Chunk


def test_one_threshold_keeps_the_tokens_above_it():
    received = np.array([[[9.0, 8, 7, 6], [5, 0.5, 0.4, 0.3]], [[3.0, 0.1, 2, 0.2], [4, 0, 0, 0]]])
    np.testing.assert_array_equal(by_threshold(received, 2, fewest=1, most=4), [[4, 1], [2, 1]])
    np.testing.assert_array_equal(by_threshold(received, 2, fewest=1, most=3), [[3, 2], [2, 1]])
    np.testing.assert_array_equal(by_threshold(received, 2, fewest=2, most=4), np.full((2, 2), 2))


@pytest.mark.parametrize("average", [3, 10, 77, 100])
def test_shares_come_to_the_average_exactly(average: int):
    shares = np.random.default_rng(0).lognormal(0, 1.5, (6, 3))
    lengths = by_shares(shares / shares.mean(), average, fewest=2, most=100)
    assert lengths.sum() == average * lengths.size and lengths.min() >= 2 and lengths.max() <= 100
    order = np.argsort(shares, axis=None)
    assert (np.diff(lengths.reshape(-1)[order]) >= -1).all()  # but for rounding, a larger share is no fewer slots
    np.testing.assert_array_equal(by_shares(np.ones((6, 3)), average, 2, 100), np.full((6, 3), average))


def test_a_profile_is_read_as_it_was_written(tmp_path: Path):
    profile = Profile.measured(tiny.model(), PROFILE_TEXT.read_text()[:1500])
    assert profile.shares.shape == (len(RATIOS), tiny.model().config.num_layers, tiny.model().config.num_kv_heads)
    np.testing.assert_allclose(profile.shares.mean((1, 2)), 1)
    profile.save(tmp_path / "profile.json")
    read = Profile.load(tmp_path / "profile.json")
    np.testing.assert_allclose(read.shares, profile.shares, atol=1e-4)
    assert read.weights_hash == tiny.model().fingerprint
    # documents of about as many tokens have the same lengths at the same average
    np.testing.assert_array_equal(read.lengths(20, 200, 2, 150), read.lengths(20, 230, 2, 150))


@pytest.mark.parametrize("text", ["{", "[]", '{"format_version": 1}', '{"format_version": 9, "shares": [[[1]]]}'])
def test_what_is_no_profile_is_refused(text: str, tmp_path: Path):
    (tmp_path / "profile.json").write_text(text)
    with pytest.raises(UserError, match="no profile of a model"):
        Profile.load(tmp_path / "profile.json")


def test_a_profile_is_measured_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("CARTRIDGES_JAX_CACHE", str(tmp_path))
    first = Profile.of(tiny.model())
    monkeypatch.setattr(Profile, "measured", None)
    np.testing.assert_allclose(Profile.of(tiny.model()).shares, first.shares, atol=1e-4)


def test_impossible_bounds_are_refused():
    for impossible in ({"min_slots": 0}, {"max_share": 0.5}):
        with pytest.raises(UserError, match="at least one slot"):
            BudgetConfig("attention", **impossible)


def test_chunks_that_share_unequally_keep_the_bounds(monkeypatch: pytest.MonkeyPatch):
    """Of an average of 2.5 slots a head has at least 2, which one chunk has of them, and at most 3, the other's."""
    model, chunks = tiny.model(), [Chunk([0] * 30, [])] * 2
    shape = model.config.num_layers, model.config.num_kv_heads, 30
    received = iter(np.random.default_rng(0).lognormal(0, 3, (2, *shape)))
    monkeypatch.setattr(budgets, "measure_attention", lambda *_: next(received))
    lengths = head_lengths(BudgetConfig("attention", max_share=1, min_slots=3), model, chunks, 5)
    assert lengths.mean() == 2.5 and lengths.min() >= 2 and lengths.max() <= 3


def test_no_head_is_longer_than_a_file_may_hold():
    for max_share in (None, 1000):
        assert BudgetConfig("attention", max_share).bounds(3, 4096) == (2, 3 * MOST_PADDING)


def test_a_text_without_a_slot_for_every_head_gives_no_profile():
    with pytest.raises(UserError, match="give a longer one"):
        Profile.measured(tiny.model(), "A")


def test_a_profile_belongs_to_one_model(tmp_path: Path):
    model = tiny.model()
    l, k = model.config.num_layers, model.config.num_kv_heads
    own = Profile(np.ones((len(RATIOS), l, k)), model.name, model.fingerprint)
    assert own.belongs_to(model)
    for changes in ({"weights_hash": "0" * 64}, {"shares": np.ones((len(RATIOS), l + 1, k))}):
        assert not dataclasses.replace(own, **changes).belongs_to(model)
    nobodys = dataclasses.replace(model, fingerprint="")
    assert not dataclasses.replace(own, weights_hash="").belongs_to(nobodys)


@pytest.mark.parametrize("longest", [1, 8, 9, 8192, 10_000])
def test_arrays_hold_heads_of_any_length(longest: int):
    sizes = array_sizes(np.array([[1, longest], [min(longest, 50), 1]]))
    assert sizes[-1] == longest and list(sizes) == sorted(set(sizes))
