"""Where a cartridge starts from: real tokens, noise of their kind, or an earlier cartridge."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from cartridges_jax.cartridge.arrays import Cartridge
from cartridges_jax.command_line.errors import UserError
from cartridges_jax.initial.initializers import STATISTICS_TOKENS, InitConfig, initial_cartridge
from cartridges_jax.initial.texts import CHUNK, sampled_chunks


def test_text_gives_the_first_tokens_of_the_corpus():
    model = tiny.model()
    found = initial_cartridge(InitConfig("text", 24, 2), model, tiny.TEXT, [], seed=0)
    expected = Cartridge.from_tokens(model, model.tokenizer.encode(tiny.TEXT)[:24])
    np.testing.assert_array_equal(found.keys, expected.keys)
    np.testing.assert_array_equal(found.values, expected.values)
    assert (found.num_slots, found.num_frozen, found.keys.dtype) == (24, 2, jnp.float32)
    assert found.provenance.recipe == "text, first 24 tokens"


def test_a_corpus_shorter_than_the_slots_is_refused():
    with pytest.raises(UserError, match=r"the corpus has \d tokens, fewer than init.num_slots, 64: lower it"):
        initial_cartridge(InitConfig("text", 64), tiny.model(), "A cat.", [], seed=0)


def test_random_vectors_have_the_statistics_of_real_ones_and_a_real_sink():
    model = tiny.model()
    found = initial_cartridge(InitConfig("random_vectors", 2000, 2), model, tiny.TEXT, [], seed=0)
    real = Cartridge.from_tokens(model, model.tokenizer.encode(tiny.TEXT)[:STATISTICS_TOKENS])
    for ours, theirs in ((found.keys, real.keys), (found.values, real.values)):
        np.testing.assert_array_equal(ours[:, :2], theirs[:, :2])
        spread = np.asarray(theirs[:, 1:].std(1))
        np.testing.assert_allclose(
            (ours[:, 2:].mean(1) - theirs[:, 1:].mean(1)) / spread, np.zeros_like(spread), atol=0.12
        )
        np.testing.assert_allclose(ours[:, 2:].std(1) / spread, np.ones_like(spread), atol=0.1)
    assert not np.array_equal(found.keys, found.values)


def test_random_vectors_depend_on_the_seed_and_on_nothing_else():
    config, model = InitConfig("random_vectors", 8), tiny.model()
    a, b, c = (initial_cartridge(config, model, tiny.TEXT, [], seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(a.keys, b.keys)
    assert (a.keys[:, 1:] != c.keys[:, 1:]).all()


@pytest.mark.parametrize(("corpus", "num_frozen"), [("A", 1), ("A cat.", 30), (tiny.TEXT[:1800], 600)])
def test_random_vectors_need_a_text_to_measure(corpus: str, num_frozen: int):
    count = len(tiny.model().tokenizer.encode(corpus, add_special_tokens=True))
    with pytest.raises(UserError, match=f"the corpus has {count} tokens, expected at least {max(2, num_frozen)}"):
        initial_cartridge(InitConfig("random_vectors", 700, num_frozen), tiny.model(), corpus, [], seed=0)


def test_more_frozen_slots_than_are_measured_are_the_corpus():
    model, count = tiny.model(), 600
    found = initial_cartridge(InitConfig("random_vectors", 700, count), model, tiny.TEXT, [], seed=0)
    real = Cartridge.from_text(model, tiny.TEXT, count)
    np.testing.assert_allclose(found.keys[:, :count], real.keys, atol=1e-5)


def test_random_vectors_of_a_small_window_are_measured_in_it(tmp_path: Path):
    model = tiny.load_model(str(tiny.write_model(tmp_path / "small", max_position_embeddings=64)))
    found = initial_cartridge(InitConfig("random_vectors", 8), model, tiny.TEXT, [], seed=0)
    assert np.isfinite(found.keys).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16])
def test_pretrained_is_what_the_file_holds(tmp_path: Path, dtype: type):
    saved = Cartridge.from_text(tiny.model(), tiny.TEXT, 10)
    bias = jnp.arange(10.0 * tiny.LAYERS * tiny.KV_HEADS).reshape(tiny.LAYERS, 10, tiny.KV_HEADS)
    saved = saved.replace(bias=bias.astype(dtype), keys=saved.keys.astype(dtype), values=saved.values.astype(dtype))
    saved.save(tmp_path / "c.safetensors")
    config = InitConfig("pretrained", num_frozen=3, path=str(tmp_path / "c.safetensors"))
    found = initial_cartridge(config, tiny.model(), tiny.TEXT, [], seed=0)
    np.testing.assert_array_equal(found.keys, saved.keys)
    np.testing.assert_array_equal(found.bias, saved.bias)
    assert (found.num_slots, found.num_frozen, found.keys.dtype, found.bias.dtype) == (10, 3, jnp.float32, jnp.float32)


def test_pretrained_refuses_more_frozen_slots_than_it_has(tmp_path: Path):
    Cartridge.from_text(tiny.model(), tiny.TEXT, 10).save(tmp_path / "c.safetensors")
    config = InitConfig("pretrained", num_frozen=11, path=str(tmp_path / "c.safetensors"))
    with pytest.raises(UserError, match="num_frozen is 11, expected 0 to the number of slots, 10"):
        initial_cartridge(config, tiny.model(), tiny.TEXT, [], seed=0)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"num_slots": 0}, "expected at least one slot"),
        ({"num_slots": 4, "num_frozen": 5}, "num_frozen from 0 to num_slots"),
        ({"num_frozen": -1}, "num_frozen from 0 to num_slots"),
        ({"kind": "pretrained"}, "a path belongs to 'pretrained', which needs one"),
        ({"path": "x"}, "a path belongs to 'pretrained', which needs one, or to 'random_text'"),
        ({"kind": "summary"}, "set init.summary.base_url"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(settings: dict, sentence: str):
    with pytest.raises(UserError, match=sentence):
        InitConfig(**settings)


def test_sampled_chunks_are_pieces_of_the_corpus_in_its_order():
    model = tiny.model()
    tokens = model.tokenizer.encode(tiny.TEXT)
    drawn = [sampled_chunks(list(range(len(tokens))), 150, seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    for places in drawn:
        steps = np.diff(places)
        assert len(places) == 150 and (steps > 0).all()
        assert set(np.flatnonzero(steps > 1) % CHUNK) <= {CHUNK - 1}  # whole chunks, none of them twice
    assert sampled_chunks(tokens, len(tokens), 3) == tokens
    found = initial_cartridge(InitConfig("sampled_chunks", 150, 2), model, tiny.TEXT, [], seed=0)
    expected = Cartridge.from_tokens(model, [tokens[i] for i in drawn[0]])
    np.testing.assert_array_equal(found.keys, expected.keys)
    assert found.num_frozen == 2
    with pytest.raises(UserError, match=r"the corpus has \d+ tokens, expected 900: lower init.num_slots"):
        initial_cartridge(InitConfig("sampled_chunks", 900), model, "A cat.", [], seed=0)


def test_random_text_is_another_text(tmp_path: Path):
    model = tiny.model()
    ours, again = (
        initial_cartridge(InitConfig("random_text", 300), model, corpus, [], seed)
        for corpus, seed in ((tiny.TEXT, 0), ("A cat.", 1))
    )
    np.testing.assert_array_equal(ours.keys, again.keys)
    assert ours.num_slots == 300
    (tmp_path / "other.txt").write_text(tiny.TEXT[::-1], encoding="utf-8")
    theirs = initial_cartridge(InitConfig("random_text", 20, path=str(tmp_path / "other.txt")), model, "A cat.", [], 0)
    np.testing.assert_array_equal(theirs.keys, Cartridge.from_text(model, tiny.TEXT[::-1], 20).keys)
    with pytest.raises(FileNotFoundError, match=r"the text of init\.path"):
        initial_cartridge(InitConfig("random_text", 20, path=str(tmp_path / "none.txt")), model, "A cat.", [], 0)
    with pytest.raises(UserError, match=r"the text of init\.path has \d+ tokens, fewer"):
        initial_cartridge(InitConfig("random_text", 5000, path=str(tmp_path / "other.txt")), model, "A cat.", [], 0)


def test_normal_vectors_are_upstreams():
    found = initial_cartridge(InitConfig("random_vectors", 2000, vectors="normal"), tiny.model(), "A", [], seed=0)
    for array in (found.keys, found.values):
        assert abs(float(array.mean())) < 0.01 and float(array.std()) == pytest.approx(1, abs=0.01)
        assert float(jnp.abs(array[:, 0]).mean()) < 1.5  # no sink of a real text
