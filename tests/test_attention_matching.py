"""Attention matching: exact when nothing is left out, and closer to the document than what it starts from."""

from __future__ import annotations

import itertools
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jaxtyping import Array
from scipy.optimize import nnls

from cartridges_jax.cartridge.arrays import Cartridge
from cartridges_jax.command_line.errors import UserError
from cartridges_jax.initial.attention_matching import RIDGE, _fit_slots, _match, _nnls, attention_matching
from cartridges_jax.initial.budgets import BudgetConfig, BudgetKind
from cartridges_jax.initial.chunks import MatchingConfig, chunks_of
from cartridges_jax.initial.initializers import InitConfig, initial_cartridge
from cartridges_jax.initial.keys import move_keys
from cartridges_jax.training.data import Example, read_examples

QUESTION = [{"role": "user", "content": "Where does the owl number 5 sleep?"}]


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> list[Example]:
    path = tiny.write_dataset(tmp_path_factory.mktemp("data") / "dataset.parquet", tiny.model(), count=60)
    return read_examples(path, tiny.model().tokenizer)


@pytest.fixture(scope="module")
def document() -> list[int]:
    return tiny.model().tokenizer.chat_ids(
        [{"role": "system", "content": tiny.TEXT[:1200]}], add_generation_prompt=False
    )


def _logits(cartridge: Cartridge) -> Array:
    model = tiny.model()
    return model.logits(np.array([model.tokenizer.turn_ids(QUESTION, add_generation_prompt=True)]), cartridge=cartridge)


def _error(cartridge: Cartridge, document: list[int]) -> float:
    return float(jnp.abs(_logits(cartridge) - _logits(Cartridge.from_tokens(tiny.model(), document))).mean())


def test_weights_are_those_of_non_negative_least_squares():
    rng = np.random.default_rng(0)
    shares = rng.dirichlet(np.full(60, 0.3), 300)[:, :20]  # of 60 tokens, 20 are kept
    expected, least = nnls(shares, np.ones(300))
    found = np.asarray(_nnls(jnp.asarray(shares, jnp.float32), jnp.ones(300)))
    assert (found > 0).all() and np.linalg.norm(shares @ found - 1) < 1.01 * least
    assert np.linalg.norm(shares @ found - 1) < 0.9 * np.linalg.norm(shares.sum(1) - 1)  # all weights 1
    np.testing.assert_allclose(found, expected, atol=0.1 * expected.max())


def test_values_are_those_of_least_squares_with_a_ridge():
    rng = np.random.default_rng(1)
    shares, values, output = (
        rng.dirichlet(np.ones(30), 200)[:, :10],
        rng.normal(size=(10, 4)),
        rng.normal(size=(200, 4)),
    )
    arrays = (jnp.asarray(array, jnp.float32) for array in (shares, values, output))
    found, bias = _fit_slots(*arrays, jnp.ones(200, bool), 10)
    weights = shares * np.exp(np.asarray(bias, np.float64))
    weights /= weights.sum(1, keepdims=True)
    ridge = np.sqrt(RIDGE * (weights**2).sum() / 10)
    rows, aims = np.concatenate([weights, ridge * np.eye(10)]), np.concatenate([output, ridge * values])
    np.testing.assert_allclose(found, np.linalg.lstsq(rows, aims)[0], atol=2e-3)


def _head(rng: np.random.Generator, num_slots: int) -> tuple[tuple[Array, Array, Array], tuple[Array, ...]]:
    """Slots of a head, two more places behind them, and the document's attention that they shall have."""
    q, k, v = (rng.normal(size=(rows, 8)) for rows in (330, 60, 60))
    total = np.log(np.exp(q @ k.T).sum(1))
    output = np.exp(q @ k.T - total[:, None]) @ v
    is_slot = np.arange(num_slots + 2) < num_slots
    slots = (np.where(is_slot[:, None], a[: num_slots + 2], 0) for a in (k, v))
    aims = q, total, output, np.arange(330) < 300, is_slot
    *arrays, bias = (jnp.asarray(a) for a in (*slots, is_slot * np.log(60 / num_slots)))
    return (arrays[0], arrays[1], bias), tuple(jnp.asarray(a) for a in aims)


def _missed(slots: tuple[Array, Array, Array], aims: tuple[Array, ...]) -> float:
    keys, values, bias = (np.asarray(a, np.float64) for a in slots)
    q, _, output, is_query, is_slot = (np.asarray(a) for a in aims)
    weights = np.where(is_slot, np.exp(q @ keys.T + bias), 0)
    found = weights @ values / weights.sum(1, keepdims=True)
    return float(((found - output)[is_query] ** 2).mean() / (output[is_query] ** 2).mean())


def test_keys_move_until_the_output_is_near_the_documents():
    slots, aims = _head(np.random.default_rng(2), 12)
    moved = move_keys(slots, *aims, 1.0)
    assert _missed(moved, aims) < 0.5 * _missed(slots, aims)
    np.testing.assert_array_equal(moved[0][0], slots[0][0])  # the attention sink
    assert not any(np.asarray(a)[12:].any() for a in moved)  # there are no such slots
    others = list(aims)
    others[0] = aims[0].at[300:].set(7.0)  # which are no queries
    for mine, theirs in zip(move_keys(slots, *others, 1.0), moved, strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_the_keys_of_a_head_that_is_near_already_stay():
    slots, aims = _head(np.random.default_rng(2), 58)
    for mine, theirs in zip(move_keys(slots, *aims, 1.0), slots, strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_padding_behind_the_queries_moves_no_key():
    slots, (q, total, output, is_query, is_slot) = _head(np.random.default_rng(2), 12)
    output = output * is_query[:, None]  # as masked probabilities give it
    padded = (jnp.pad(a, [(0, 3000)] + [(0, 0)] * (a.ndim - 1)) for a in (q, total, output, is_query))
    found, expected = (move_keys(slots, *aims, is_slot, 1.0) for aims in (padded, (q, total, output, is_query)))
    for mine, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-4)


@pytest.mark.parametrize(
    ("fit_keys", "kind", "share", "fitted"),
    [
        (True, "uniform", 8, True),
        (None, "attention", 20, False),
        (None, "attention", 40, True),
        (None, "uniform", 8, False),
    ],
)
def test_keys_are_fitted_where_there_are_few_slots(
    fit_keys: bool | None, kind: BudgetKind, share: int, fitted: bool, document: list[int]
):
    found, of_tokens = (
        attention_matching(
            tiny.model(),
            tiny.TEXT[:1200],
            [],
            len(document) // share,
            config=MatchingConfig(fit_keys=fit),
            budget=BudgetConfig(kind),
        )
        for fit in (fit_keys, False)
    )
    assert found.provenance is not None and ("keys: fitted" in found.provenance.recipe) == fitted
    assert np.array_equal(found.keys, of_tokens.keys) != fitted


def test_with_a_slot_for_every_token_it_is_the_document(examples: list[Example], document: list[int]):
    cartridge = attention_matching(tiny.model(), tiny.TEXT[:1200], examples, len(document))
    assert _error(cartridge, document) < 1e-3


def test_it_is_closer_to_the_document_than_its_parts_are(examples: list[Example], document: list[int]):
    p = len(document) // 4
    matched = attention_matching(tiny.model(), tiny.TEXT[:1200], examples, p)
    first = Cartridge.from_tokens(tiny.model(), document[:p])
    assert matched.keys.shape[1] == p and matched.bias is not None
    assert _error(matched, document) < 0.7 * _error(first, document)
    assert _error(matched, document) < 0.9 * _error(matched.replace(bias=None), document)


def test_the_sink_comes_first_and_keeps_its_key(examples: list[Example], document: list[int]):
    p = len(document) // 4
    model = tiny.model()
    matched = attention_matching(model, tiny.TEXT[:1200], examples, p)
    # the slot is the document's first key, moved back by len(document) - p
    full = Cartridge.from_tokens(model, document)
    norms = jnp.linalg.norm(full.keys[:, 0], axis=-1), jnp.linalg.norm(matched.keys[:, 0], axis=-1)
    np.testing.assert_allclose(*norms, rtol=1e-5)  # a rotation keeps lengths


def test_a_document_shorter_than_the_slots_is_refused(examples: list[Example]):
    with pytest.raises(UserError, match="num_slots is 900"):
        initial_cartridge(InitConfig("attention_matching", 900), tiny.model(), "A cat.", examples, seed=0)


def test_an_empty_document_is_refused():
    with pytest.raises(UserError, match="the document is empty"):
        attention_matching(tiny.model(), "", [], 2)


def test_queries_of_either_kind_give_other_slots(examples: list[Example]):
    found = [
        attention_matching(tiny.model(), tiny.TEXT[:1200], examples, 64, config=MatchingConfig(queries))
        for queries in ("both", "conversations", "repeat")
    ]
    assert all(float(jnp.abs(a.values - b.values).max()) > 1e-3 for a, b in itertools.combinations(found, 2))
    alone = attention_matching(tiny.model(), tiny.TEXT[:1200], [], 64)
    np.testing.assert_array_equal(alone.values, found[2].values)
    with pytest.raises(UserError, match="'conversations' and there are none"):
        attention_matching(tiny.model(), tiny.TEXT[:1200], [], 64, config=MatchingConfig("conversations"))


def test_a_long_document_is_compacted_in_chunks(examples: list[Example], document: list[int]):
    p = len(document) // 3
    config = MatchingConfig(chunk_tokens=len(document) // 2)
    found = attention_matching(tiny.model(), tiny.TEXT[:1200], examples, p, config=config)
    assert found.num_slots == p and found.provenance.recipe.count("3 chunks") == 1
    assert _error(found, document) < _error(Cartridge.from_tokens(tiny.model(), document[:p]), document)
    # beyond the window there is no other way
    long = attention_matching(tiny.model(), tiny.TEXT, examples, 60)
    assert long.num_slots == 60
    with pytest.raises(UserError, match="2 slots for each chunk at least"):
        attention_matching(tiny.model(), tiny.TEXT[:1200], examples, 2, config=config)


def test_heads_of_different_lengths_are_the_padded_fit(examples: list[Example]):
    """A head's slots do not depend on the size of its array: they are those of a fit whose heads all have as many."""
    model, text = tiny.model(), tiny.TEXT[:1200]
    (chunk,) = chunks_of(model, text, examples, MatchingConfig())
    shape = model.config.num_layers, model.config.num_kv_heads
    lengths = np.full(shape, 40)
    lengths[0] = np.arange(2, 2 + shape[1])  # only the first layer differs, on whose states the others are fitted
    ragged, alike = (_match(model, chunk, each, fits_keys=False) for each in (lengths, np.full(shape, 40)))
    np.testing.assert_array_equal(ragged.lengths, lengths)
    for head, length in enumerate(lengths[0]):
        alone = _match(model, chunk, np.full(shape, length), fits_keys=False)
        for name in ("keys", "values", "bias"):
            mine, theirs = (np.asarray(getattr(c, name))[0, :, head] for c in (ragged, alone))
            np.testing.assert_allclose(mine[:length], theirs, atol=1e-5)
            assert not mine[length:].any()
    assert alike.lengths is None


@pytest.mark.parametrize("kind", ["profile", "attention"])
@pytest.mark.parametrize("chunk_tokens", [4096, 220])
def test_a_budget_has_the_average_that_was_asked_for(
    kind: BudgetKind, chunk_tokens: int, examples: list[Example], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setenv("CARTRIDGES_JAX_CACHE", str(tmp_path))
    config, budget = MatchingConfig(chunk_tokens=chunk_tokens), BudgetConfig(kind, max_share=3)
    found = attention_matching(tiny.model(), tiny.TEXT[:1200], examples, 40, config=config, budget=budget)
    lengths = found.all_lengths
    assert lengths.mean() == 40 and lengths.min() >= 2 and 40 < lengths.max() <= 120
    assert (kind == "profile") == any(tmp_path.rglob("*.json"))
    uniform = attention_matching(tiny.model(), tiny.TEXT[:1200], examples, 40, config=config)
    assert _logits(found).shape == _logits(uniform).shape


def test_a_head_has_at_most_the_tokens_of_its_chunk(
    document: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """Of later chunks the attention sink is dropped again: a head that keeps every token has none to fit for it."""
    monkeypatch.setenv("CARTRIDGES_JAX_CACHE", str(tmp_path))
    config = MatchingConfig(chunk_tokens=len(document) // 2)
    sizes = [len(chunk.tokens) for chunk in chunks_of(tiny.model(), tiny.TEXT[:1200], [], config)]
    budget = BudgetConfig("attention")
    average = int(0.985 * sum(sizes))
    found = attention_matching(tiny.model(), tiny.TEXT[:1200], [], average, config=config, budget=budget)
    assert len(sizes) > 1 and found.all_lengths.max() <= sum(sizes) - len(sizes) + 1
    assert found.all_lengths.mean() == average


def test_every_head_has_the_frozen_slots():
    budget = BudgetConfig("attention")
    found = attention_matching(tiny.model(), tiny.TEXT[:600], [], 12, num_frozen=6, budget=budget)
    assert found.num_frozen == 6 and found.all_lengths.min() >= 6 and found.all_lengths.mean() == 12


def test_a_budget_belongs_to_attention_matching():
    with pytest.raises(UserError, match=r"set init\.budget=uniform"):
        InitConfig("text", budget="profile")
