"""Where a cartridge's slots stand and how many each head has: the same answers at any offset, and no other program."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

import cartridges_jax as cj
from cartridges_jax.cartridge.arrays import Cartridge
from cartridges_jax.cartridge.composition import compose
from cartridges_jax.cartridge.provenance import Provenance
from cartridges_jax.command_line.errors import UserError
from cartridges_jax.interop import to_pages, to_past_key_values
from cartridges_jax.interop.formats import FORMATS, read, write
from cartridges_jax.models import language_model
from cartridges_jax.models.config import LayerSettings
from cartridges_jax.models.rope import frequencies, shift_keys
from cartridges_jax.serving.store import CartridgeStore, Reference
from cartridges_jax.training import losses
from cartridges_jax.training.optim import OptimConfig, optimizer
from cartridges_jax.training.step import TrainState, train_step

LENGTHS = np.array([[3, 9], [12, 5]], np.int32)
TOLERANCE = 1e-5


def cartridge_of(start: int, num_tokens: int = 12, num_frozen: int = 1) -> Cartridge:
    return Cartridge.from_text(tiny.model(), tiny.TEXT[start:], num_tokens, num_frozen)


def ragged_cartridge(start: int = 0, lengths: np.ndarray = LENGTHS, num_frozen: int = 1) -> Cartridge:
    """With a bias, and with large numbers where heads have no slot."""
    whole = cartridge_of(start, num_frozen=num_frozen)
    missing_lpk = np.arange(12)[:, None] >= lengths[:, None]
    bias = np.random.default_rng(start).standard_normal(whole.keys.shape[:3]).astype(np.float32)
    keys, values = (np.where(missing_lpk[..., None], 50.0, array).astype(np.float32) for array in whole.prefix[:2])
    return whole.replace(keys=keys, values=values, bias=np.where(missing_lpk, 20.0, bias), lengths=lengths)


def tokens() -> np.ndarray:
    return np.asarray(tiny.model().tokenizer.encode("What does the owl weigh? The owl"))[None]


def logits(cartridge: Cartridge) -> np.ndarray:
    return np.asarray(tiny.model().logits(tokens(), cartridge=cartridge))


def same_logits(a: Cartridge, b: Cartridge) -> None:
    np.testing.assert_allclose(logits(a), logits(b), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("cartridge", [cartridge_of(0), ragged_cartridge()], ids=["alike", "ragged"])
def test_logits_are_the_same_at_any_offset(cartridge: Cartridge):
    config = tiny.model().config
    for offset in (12, 1, 100):
        moved = cartridge.at_offset(offset, config)
        assert moved.offset == offset and np.abs(moved.keys - cartridge.keys).max() > 0.1
        same_logits(moved, cartridge)
        np.testing.assert_allclose(moved.at_offset(0).keys, cartridge.keys, rtol=0, atol=3e-5)
    with pytest.raises(UserError, match=f"an offset of {tiny.WINDOW} and .* tokens exceed"):
        logits(cartridge.at_offset(tiny.WINDOW))


def test_every_kind_of_rope_is_rotated_alike(tiny_model: cj.LanguageModel):
    """Families with other frequencies in some layers, with factors, and with norms of keys."""
    cartridge = Cartridge.from_tokens(tiny_model, list(range(3, 20)))
    assert cartridge.offset == 0
    asked = np.arange(30, 36)[None]
    before = tiny_model.logits(asked, cartridge=cartridge)
    after = tiny_model.logits(asked, cartridge=cartridge.at_offset(17, tiny_model.config))
    largest = float(jnp.abs(before).max())
    np.testing.assert_allclose(after, before, rtol=0, atol=TOLERANCE * max(1.0, largest / 4))


# theta, head size, and frequencies that transformers rounds to another float32 than the nearest, by their index
ROUNDED = (
    (1e5, 64, {4: "0x1.e5a846p-3", 5: "0x1.52e812p-3", 6: "0x1.d8ffacp-4"}),
    (5e5, 128, {2: "0x1.53c38cp-1", 4: "0x1.c2ef78p-2", 8: "0x1.8d2760p-3"}),
    (1e6, 128, {1: "0x1.9c975ap-1", 3: "0x1.0bedde0p-1", 7: "0x1.c3f06ap-3"}),
    (1e4, 64, {5: "0x1.e5a846p-3", 9: "0x1.33281ap-4", 10: "0x1.ccab84p-5"}),
)


@pytest.mark.parametrize(("theta", "head_dim", "rounded"), ROUNDED)
def test_frequencies_are_rounded_as_in_transformers(theta: float, head_dim: int, rounded: dict[int, str]):
    found = frequencies(LayerSettings(theta, (), None, None), head_dim)
    assert found.dtype == np.float32 and len(found) == head_dim // 2
    assert {i: float(found[i]) for i in rounded} == {i: float.fromhex(text) for i, text in rounded.items()}
    np.testing.assert_allclose(found, theta ** (-np.arange(head_dim // 2) / (head_dim // 2)), rtol=2e-7)


def test_bare_arrays_stand_at_the_beginning():
    """As their makers mean it: a text's keys at the positions 0 to p - 1, and what follows at p."""
    made = cartridge_of(0)
    moved = made.at_offset(12)
    bare = Cartridge(keys=moved.keys, values=moved.values)
    assert (made.offset, bare.offset) == (0, 12)
    same_logits(bare, made)


def test_slots_use_up_no_positions():
    """A cartridge and a text that together are longer than the model's window."""
    model = tiny.model()
    cartridge = cartridge_of(0, tiny.WINDOW // 2)
    assert np.isfinite(model.logits(np.zeros((1, tiny.WINDOW), np.int32), cartridge=cartridge)).all()


def test_keys_are_rotated_in_compiled_programs_as_on_the_host(tiny_model: cj.LanguageModel):
    config = tiny_model.config
    keys = np.random.default_rng(0).standard_normal((config.num_layers, 3, config.num_kv_heads, config.head_dim))
    keys = keys.astype(np.float32)
    rotate = jax.jit(lambda keys, distance: shift_keys(keys, distance, config))
    for distance in (-40, 0, 7):
        expected = shift_keys(keys, distance, config)
        assert isinstance(expected, np.ndarray)
        np.testing.assert_allclose(rotate(keys, distance), expected, rtol=0, atol=TOLERANCE)
    assert rotate._cache_size() == 1 and rotate(jnp.asarray(keys, jnp.bfloat16), 7).dtype == jnp.bfloat16


@pytest.mark.parametrize("is_ragged", [False, True])
@pytest.mark.parametrize("offsets", [(0, 0), (12, 7), (0, 300)])
def test_a_composition_does_not_depend_on_the_order(is_ragged: bool, offsets: tuple[int, int]):
    first = ragged_cartridge(num_frozen=0) if is_ragged else cartridge_of(0, num_frozen=0)
    second = cartridge_of(60, 7, num_frozen=0)
    pair = [part.at_offset(offset) for part, offset in zip((first, second), offsets, strict=True)]
    there, back = compose(pair), compose(pair[::-1])
    assert there.offset == back.offset == 0 and (there.bias is not None) == is_ragged
    same_logits(there, back)
    assert np.abs(logits(there) - logits(first)).max() > 1e-3


def test_a_composition_keeps_each_cartridge_at_its_distance():
    first, second = cartridge_of(0), cartridge_of(60, 7)
    keys, values = (np.concatenate([a, b[:, 1:]], 1) for a, b in zip(first.prefix[:2], second.prefix[:2], strict=True))
    side_by_side = Cartridge(keys, values, offset=0)
    same_logits(compose([first, second]), side_by_side)
    same_logits(compose([first.at_offset(12), second.at_offset(7)]), side_by_side)
    at_seven = [part.at_offset(7) for part in (first, second)]
    assert compose(at_seven).offset == 7, "what has one offset stays there"
    same_logits(compose(at_seven), side_by_side)


def test_slots_that_a_head_does_not_have_are_missing_in_a_composition():
    first, second = ragged_cartridge(), ragged_cartridge(40, LENGTHS[::-1].copy())
    made = compose([first, second, cartridge_of(90, 4)])
    np.testing.assert_array_equal(made.lengths, LENGTHS + LENGTHS[::-1] - 1 + 3)
    assert made.num_slots == made.lengths.max() and made.num_frozen == 1
    head = [part.keys[0, start : part.all_lengths[0, 1], 1] for part, start in ((first, 0), (second, 1))]
    np.testing.assert_array_equal(made.keys[0, : LENGTHS[0, 1] + LENGTHS[1, 1] - 1, 1], np.concatenate(head))
    assert made.bias is not None and not np.asarray(made.bias)[made.all_lengths.max() - 1 :, :].any()
    loose = [part.keys for part in (first, second)]
    seen = np.concatenate([np.arange(12)[:, None] < part.lengths[:, None] for part in (first, second)], 1)
    seen[:, 12] = False  # the second sink
    keys, values = (np.concatenate([getattr(c, name) for c in (first, second)], 1) for name in ("keys", "values"))
    bias = np.where(seen, np.concatenate([first.bias, second.bias], 1), -1e30)
    assert loose[0].shape == loose[1].shape
    same_logits(compose([first, second]), Cartridge(keys, values, bias.astype(np.float32), offset=0))


def test_what_does_not_say_how_its_keys_are_rotated_is_composed_for_a_model():
    first, second = (part.replace(provenance=Provenance()) for part in (cartridge_of(0).at_offset(12), cartridge_of(9)))
    with pytest.raises(UserError, match="does not say how its model rotates keys: name the model"):
        compose([first, second])
    same_logits(compose([first, second], tiny.model().config), compose([cartridge_of(0), cartridge_of(9)]))


@pytest.mark.parametrize(
    "said",
    ["", "[]", "3", "{}", "[" * 100_000]
    + [f'{{"rope_theta": {theta}}}' for theta in ("0", "-1", "1e999", '"x"', "null")]
    + ['{"num_layers": 99999999999}', '{"head_dim": 16}', '{"rope_factors": ["x", 1, 1, 1]}', '{"family": []}'],
)
def test_a_header_whose_model_cannot_be_rotates_nothing(said: str):
    cartridge = cartridge_of(0)
    whole = cartridge.provenance.model_config
    config = whole[:-1] + ", " + said[1:] if said.startswith('{"') else said  # the last of two keys counts
    broken = cartridge.replace(provenance=dataclasses.replace(cartridge.provenance, model_config=config))
    with pytest.raises(UserError):
        broken.at_offset(12)


def training(cartridge: Cartridge) -> tuple[TrainState, Any]:
    """Two steps of Adam on random targets."""
    model, rng = tiny.model(), np.random.default_rng(0)
    shape = (1, 2, 32)
    ids = rng.integers(0, model.config.vocab_size, (*shape, 3)).astype(np.int32)
    positions = np.broadcast_to(np.arange(32, dtype=np.int32), shape)
    entries = np.full(ids.shape, np.log(0.2), np.float32), np.ones(ids.shape, bool)
    batch = cj.Batch(ids[..., 0], np.ones(shape, np.int32), positions, ids, *entries)
    tx = optimizer(OptimConfig(), 4, 1)
    options: Any = {"config": model.config, "tx": tx, "tail": "bucket", "reduction": "token", "remat": "layers"}
    slots = jax.tree.map(lambda a: jnp.array(a), cartridge.slots)
    state, metrics = TrainState(slots, tx.init(slots), jnp.zeros((), jnp.int32)), None
    for _ in range(2):
        state, metrics = train_step(state, model.params, batch, cartridge.placement, **options)
    return state, metrics


def test_cartridges_of_equal_shapes_share_their_programs():
    """Whatever their history, their offset and their lengths."""
    model = tiny.model()
    batch = cj.Batch(*(np.ones((1, 8), np.int32),) * 3, *(np.ones((1, 8, 2), np.int32),) * 2, np.ones((1, 8, 2), bool))
    programs = train_step, language_model._logits, losses._loss_sum

    def run(cartridge: Cartridge) -> list[int]:
        training(cartridge)
        logits(cartridge)
        jax.grad(cj.distillation_loss)(cartridge, model, batch)
        return [program._cache_size() for program in programs]

    start = ragged_cartridge()
    compiled = run(start)
    other = start.replace(provenance=Provenance(recipe="another"), num_frozen=2)
    assert run(other) == run(start.at_offset(300)) == run(start.replace(lengths=LENGTHS[::-1].copy())) == compiled
    assert run(start.replace(lengths=None)) > compiled, "the count does count"


def test_cartridges_are_stacked_and_mapped_whatever_their_history():
    a, b = cartridge_of(0), cartridge_of(50).replace(provenance=Provenance(recipe="another"))
    stacked = jax.tree.map(lambda *x: jnp.stack(x), a, b)
    assert stacked.keys.shape == (2, *a.keys.shape) and stacked.offset == 0
    assert jax.tree.structure(a) == jax.tree.structure(b)
    mean = jax.jit(lambda x, y: jax.tree.map(lambda *leaves: sum(leaves) / 2, x, y))(a, b)
    assert mean.provenance == Provenance(), "it is neither's"
    np.testing.assert_allclose(mean.values, (a.values + b.values) / 2, rtol=1e-6)


def test_jit_and_grad_keep_lengths_and_offset():
    cartridge = ragged_cartridge().at_offset(30)
    for made in (jax.jit(lambda c: c)(cartridge), jax.tree.map(lambda a: a, cartridge)):
        assert (made.offset, made.num_frozen) == (30, 1)
        np.testing.assert_array_equal(made.lengths, LENGTHS)
    gradient = jax.jit(jax.grad(lambda c: (c.keys * c.values).sum()))(cartridge)
    np.testing.assert_array_equal(gradient.lengths, LENGTHS)


def test_slots_beyond_a_heads_length_have_no_weight_no_gradient_and_no_update():
    cartridge = ragged_cartridge()
    missing_lpk = np.arange(12)[:, None] >= LENGTHS[:, None]
    zeros = {name: np.where(missing_lpk[..., None], 0, getattr(cartridge, name)) for name in ("keys", "values")}
    zeros["bias"] = np.where(missing_lpk, 0, cartridge.bias)
    np.testing.assert_array_equal(logits(cartridge), logits(cartridge.replace(**zeros)))
    batch = cj.Batch(*(np.ones((1, 8), np.int32),) * 3, *(np.ones((1, 8, 2), np.int32),) * 2, np.ones((1, 8, 2), bool))
    gradient = jax.grad(cj.distillation_loss)(cartridge, tiny.model(), batch)
    after, _ = training(cartridge)
    for name in ("keys", "values", "bias"):
        assert not np.asarray(getattr(gradient, name))[missing_lpk].any()
        assert np.asarray(getattr(gradient, name))[~missing_lpk].any()
        moved = np.asarray(getattr(after.cartridge, name)) != np.asarray(getattr(cartridge, name))
        assert not moved[missing_lpk].any()
        there = moved[~missing_lpk].reshape(int(LENGTHS.sum()), -1).any(-1)
        assert there.sum() == LENGTHS.sum() - LENGTHS.size, "all but the frozen first slot of each head"


def test_training_moves_no_byte_of_what_is_no_slot():
    cartridge = ragged_cartridge()
    missing_lpk = np.arange(12)[:, None] >= LENGTHS[:, None]
    others = np.array([np.nan, np.inf, -np.inf, -0.0, 0.0, 2e-38, 3e38], np.float32)
    filled = {name: np.array(getattr(cartridge, name)) for name in ("keys", "values", "bias")}
    for array in filled.values():
        array[missing_lpk] = np.resize(others, array[missing_lpk].shape)
    expected, _ = training(cartridge)
    after, metrics = training(cartridge.replace(**filled))
    assert np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"])
    for name, before in filled.items():
        found = np.asarray(getattr(after.cartridge, name))
        np.testing.assert_array_equal(found[missing_lpk].view(np.uint32), before[missing_lpk].view(np.uint32))
        there = np.asarray(getattr(expected.cartridge, name))[~missing_lpk]
        np.testing.assert_array_equal(found[~missing_lpk], there)
    moments = [a for a in jax.tree.leaves(after.opt_state) if a.shape[:3] == missing_lpk.shape]
    assert len(moments) == 6, "two each of keys, values and bias"
    for moment in moments:
        assert not np.asarray(moment)[missing_lpk].any() and np.asarray(moment)[~missing_lpk].any()


def test_loss_and_gradient_are_the_same_at_any_offset():
    batch = cj.Batch(*(np.ones((1, 8), np.int32),) * 3, *(np.ones((1, 8, 2), np.int32),) * 2, np.ones((1, 8, 2), bool))
    batch = batch.replace(positions=np.arange(8)[None], target_logprobs=np.full((1, 8, 2), np.log(0.3), np.float32))
    cartridge = cartridge_of(0)
    found = [
        jax.value_and_grad(cj.distillation_loss)(one, tiny.model(), batch)
        for one in (cartridge, cartridge.at_offset(12))
    ]
    (loss, gradient), (moved_loss, moved) = found
    assert float(loss) == pytest.approx(float(moved_loss), abs=TOLERANCE)
    np.testing.assert_allclose(moved.values, gradient.values, rtol=0, atol=TOLERANCE)
    # a gradient of keys turns with them
    np.testing.assert_allclose(shift_keys(moved.keys, -12, tiny.model().config), gradient.keys, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"lengths": LENGTHS[:1]}, r"lengths of the cartridge's heads .* expected \(2, 2\) from 0 to 12"),
        ({"lengths": LENGTHS + 1}, "lengths of the cartridge's heads"),
        ({"lengths": -LENGTHS}, "lengths of the cartridge's heads"),
        ({"lengths": LENGTHS / 2}, "lengths of the cartridge's heads"),
        ({"num_frozen": 4}, "num_frozen is 4, expected 0 to the number of slots, 3"),
        ({"offset": -1}, f"offset is -1, expected 0 to the model's {tiny.WINDOW}"),
        ({"offset": tiny.WINDOW + 1}, f"offset is {tiny.WINDOW + 1}, expected"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], sentence: str):
    with pytest.raises(UserError, match=sentence):
        ragged_cartridge().replace(**changes).checked(tiny.model().config)


@pytest.mark.parametrize("format", [name for name, f in FORMATS.items() if not f.has_bias])
def test_formats_without_an_offset_hold_the_keys_at_the_beginning(tmp_path: Path, format: str):
    cartridge = cartridge_of(0, 16)
    path = tmp_path / ("c.pt" if format == "upstream" else format)
    write(cartridge, path, format)
    found = read(path)
    assert found.offset == 16
    np.testing.assert_allclose(found.keys, cartridge.at_offset(16).keys, rtol=0, atol=0)
    same_logits(found, cartridge)
    with pytest.raises(UserError, match="does not say how its model rotates keys"):
        write(cartridge.replace(provenance=Provenance()), path, format)
    lengths = np.array([[16, 3], [4, 4]], np.int32)
    with pytest.raises(UserError, match=r"different numbers of slots, for which .* has no place"):
        write(cartridge.replace(lengths=lengths), path, format)


def test_arrays_for_other_engines_begin_at_position_0():
    cartridge = cartridge_of(0)
    expected = np.asarray(cartridge.at_offset(12).keys)
    np.testing.assert_array_equal(to_past_key_values(cartridge)[0][0][0].swapaxes(0, 1), expected[0])
    np.testing.assert_array_equal(to_pages(cartridge, 4)[:, 0].reshape(expected.shape), expected)
    for layout in (to_past_key_values, lambda c: to_pages(c, 4)):
        with pytest.raises(UserError, match="different numbers of slots"):
            layout(ragged_cartridge().replace(bias=None))


def test_a_store_leaves_nothing_on_the_device(tmp_path: Path):
    whole = cartridge_of(0), cartridge_of(30, 20).at_offset(20), ragged_cartridge()
    for name, cartridge in zip("abc", whole, strict=True):
        cartridge.save(tmp_path / f"{name}.safetensors")
    model = tiny.model()
    store = CartridgeStore(tmp_path, lambda path: Cartridge.load(path, model=model), compose=compose)
    before = {id(array) for array in jax.live_arrays()}
    held = [store.get(name) for name in "abc"]
    composed = store.prefix([Reference("a"), Reference("b"), Reference("c")])
    average = math.ceil(composed.cartridge.all_lengths.mean())
    assert composed.length == average > max(one.length for one in held)
    new = [array.shape for array in jax.live_arrays() if id(array) not in before]
    assert not [shape for shape in new if np.prod(shape) >= np.prod(SMALLEST)], new


SMALLEST = (tiny.LAYERS, 3, tiny.KV_HEADS)


def test_masked_training_is_optax_on_slots_alone():
    """The state that a checkpoint holds has the arrays and nothing else."""
    cartridge = ragged_cartridge()
    state = TrainState(cartridge.slots, optax.sgd(1.0).init(cartridge.slots), jnp.zeros((), jnp.int32))
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state)]
    assert names == [".cartridge.keys", ".cartridge.values", ".cartridge.bias", ".step"]
