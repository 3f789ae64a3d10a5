"""The cartridge as a pytree and as a file: what is saved comes back bit by bit, anything else is refused."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from cartridges_jax.cartridge import file as cartridge_file
from cartridges_jax.cartridge.arrays import Cartridge
from cartridges_jax.cartridge.file import FORMAT_VERSION
from cartridges_jax.cartridge.provenance import Provenance
from cartridges_jax.command_line.errors import UserError
from cartridges_jax.serving.generate import generate

SHAPE = (tiny.LAYERS, 5, tiny.KV_HEADS, tiny.HEAD_DIM)


def random_cartridge(seed: int = 0, with_bias: bool = True, num_frozen: int = 2) -> Cartridge:
    rng = np.random.default_rng(seed)
    keys, values = (jnp.asarray(rng.standard_normal(SHAPE), jnp.float32) for _ in range(2))
    bias = jnp.asarray(rng.standard_normal(SHAPE[:3]), jnp.float32) if with_bias else None
    provenance = dataclasses.replace(
        Provenance.of(tiny.model(), tiny.TEXT, "random — für Prüfungen"),
        training_tokens=12345678901,
        training_flops=1.25e21,
        evaluation='{"recall": 0.5}',
    )
    return Cartridge(keys, values, bias, num_frozen, provenance)


def same(a: Cartridge, b: Cartridge) -> bool:
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in leaves
    )


def rewrite(path: Path, header: dict[str, Any] | str | None = None, **tensors: np.ndarray) -> None:
    """Replaces parts of a saved cartridge file."""
    with safe_open(path, framework="numpy") as reader:
        old = json.loads(reader.metadata()["cartridge"])
    text = header if isinstance(header, str) else json.dumps(old | (header or {}))
    save_file(load_file(path) | tensors, path, metadata={"cartridge": text})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "cartridge.safetensors"
    random_cartridge().save(path)
    return path


@pytest.mark.parametrize("with_bias", [True, False])
def test_save_and_load_give_the_same_bits_and_provenance(tmp_path: Path, with_bias: bool):
    cartridge = random_cartridge(with_bias=with_bias)
    cartridge.save(tmp_path / "c.safetensors")
    assert same(Cartridge.load(tmp_path / "c.safetensors", model=tiny.model()), cartridge)
    assert same(Cartridge.load(tmp_path / "c.safetensors"), cartridge)


def test_the_same_cartridge_gives_the_same_bytes(tmp_path: Path, path: Path):
    Cartridge.load(path).save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def test_the_header_says_where_a_cartridge_comes_from(path: Path):
    with safe_open(path, framework="numpy") as reader:
        header = json.loads(reader.metadata()["cartridge"])
        assert set(reader.keys()) == {"keys", "values", "bias"}
    model = tiny.model()
    config = json.loads(header["model_config"])
    assert header["format_version"] == 1
    assert header["model"] == model.name
    assert (config["num_layers"], config["num_kv_heads"], config["head_dim"]) == (SHAPE[0], *SHAPE[2:])
    assert (config["rope_theta"], config["rope_factors"]) == (10000.0, [])
    assert (header["weights_hash"], header["tokenizer_hash"]) == (model.fingerprint, model.tokenizer.fingerprint)
    assert header["num_frozen"] == 2
    assert header["corpus_hash"] == hashlib.sha256(tiny.TEXT.encode()).hexdigest()
    assert header["recipe"] == "random — für Prüfungen"
    assert (header["training_tokens"], header["training_flops"]) == (12345678901, 1.25e21)
    assert json.loads(header["evaluation"]) == {"recall": 0.5}


def test_a_header_of_before_the_config_had_another_name_for_its_longest_sequence(path: Path):
    """`window` was that once; what it says must pass neither for a sliding window nor for another model's layout."""
    model, cartridge = tiny.model(), Cartridge.load(path)
    config = json.loads(cartridge.provenance.model_config)
    config["window"] = config.pop("max_position_embeddings")
    old = dataclasses.replace(cartridge.provenance, model_config=json.dumps(config))
    cartridge.replace(provenance=old).save(path)
    loaded = Cartridge.load(path, model=model)
    assert loaded.provenance == old
    answers = [generate(model, ["Line"], cartridge=c, max_tokens=3) for c in (loaded, cartridge)]
    assert answers[0] == answers[1]


@pytest.mark.parametrize("failing", ["save_file", "fsync", "replace"])
def test_a_save_that_fails_leaves_the_old_file(path: Path, monkeypatch: pytest.MonkeyPatch, failing: str):
    before = path.read_bytes()

    def fail(*args: object, **kwargs: object) -> None:
        if failing == "save_file":
            Path(str(args[1])).write_bytes(b"half a f")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(*{"save_file": (cartridge_file, failing)}.get(failing, (os, failing)), fail)
    with pytest.raises(OSError, match=f"No space left on device.*{path.name}"):
        random_cartridge(seed=1).save(path)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_a_full_disk_is_an_os_error(monkeypatch: pytest.MonkeyPatch, path: Path):
    def fail(*args: object, **kwargs: object) -> None:
        raise cartridge_file.SafetensorError("Error while serializing: I/O error: No space left on device")

    monkeypatch.setattr(cartridge_file, "save_file", fail)
    with pytest.raises(OSError, match=f"cannot write .*{path.name}: .*No space left"):
        random_cartridge().save(path)


def test_load_refuses_a_missing_file(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors does not exist: expected"):
        Cartridge.load(tmp_path / "none.safetensors")
    with pytest.raises(FileNotFoundError, match=r"holds no cartridge: expected cartridge\.safetensors"):
        Cartridge.load(tmp_path)


@pytest.mark.parametrize("fraction", [0.0, 0.001, 0.01, 0.2, 0.5, 0.9, 0.999])
def test_load_refuses_a_truncated_file(path: Path, fraction: float):
    whole = path.read_bytes()
    path.write_bytes(whole[: min(int(len(whole) * fraction), len(whole) - 1)])
    with pytest.raises(UserError, match=r"cartridge\.safetensors is not a whole cartridge file"):
        Cartridge.load(path)


def test_load_refuses_a_file_that_lacks_its_last_byte_or_has_one_too_many(path: Path):
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole + b"\0", b"\0" * len(whole), b"not a cartridge"):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="is not a whole cartridge file"):
            Cartridge.load(path)


@pytest.mark.parametrize(
    "metadata",
    [None, {}, {"format": "pt"}]
    + [{"cartridge": text} for text in ("", "[]", "3", "{}", '{"format_version": 1}', '{"num_frozen": 1}')],
)
def test_load_refuses_foreign_safetensors(tmp_path: Path, metadata: dict[str, str] | None):
    save_file({"keys": np.zeros(SHAPE, np.float32), "values": np.zeros(SHAPE, np.float32)}, tmp_path / "f", metadata)
    with pytest.raises(UserError, match="f is not a whole cartridge file"):
        Cartridge.load(tmp_path / "f")


def test_load_refuses_a_model_file():
    with pytest.raises(UserError, match="is not a whole cartridge file"):
        Cartridge.load(tiny.folder() / "model.safetensors")


def test_load_refuses_a_newer_format(path: Path):
    rewrite(path, {"format_version": FORMAT_VERSION + 1})
    with pytest.raises(UserError, match="has format 4, this version reads up to 3: upgrade"):
        Cartridge.load(path)


@pytest.mark.parametrize("name", ["keys", "values", "bias"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_load_refuses_values_that_are_not_finite(path: Path, name: str, value: float):
    damaged = load_file(path)[name].copy()
    damaged.reshape(-1)[-1] = value
    rewrite(path, **{name: damaged})
    with pytest.raises(UserError, match="holds values that are not finite"):
        Cartridge.load(path)


@pytest.mark.parametrize("field", ["weights_hash", "tokenizer_hash"])
def test_load_refuses_another_model_and_shows_both_sides(path: Path, field: str):
    rewrite(path, {"model": "some-other-model", field: "0123456789abcdef"})
    ours = getattr(Provenance.of(tiny.model(), "", ""), field)
    with pytest.raises(UserError, match=f"some-other-model .*0123456789ab.*{tiny.model().name} .*{ours[:12]}"):
        Cartridge.load(path, model=tiny.model())
    Cartridge.load(path)  # without a model to compare with, it is just a cartridge


def test_load_refuses_a_model_with_other_weights(path: Path, tmp_path: Path):
    other = tiny.load_model(str(tiny.write_model(tmp_path / "other", seed=1)))
    with pytest.raises(UserError, match=r"was made for .* not for .*other"):
        Cartridge.load(path, model=other)


@pytest.mark.parametrize(
    "shapes",
    [
        {"keys": (3, *SHAPE[1:]), "values": (3, *SHAPE[1:]), "bias": (3, *SHAPE[1:3])},
        {"keys": (2, 5, 4, 8), "values": (2, 5, 4, 8), "bias": (2, 5, 4)},
        {"keys": (2, 5, 2, 16), "values": (2, 5, 2, 16)},
        {"values": (2, 4, 2, 8)},
        {"keys": (2, 5, 16)},
        {"bias": (2, 5)},
    ],
)
def test_load_refuses_shapes_that_do_not_fit(path: Path, shapes: dict[str, tuple[int, ...]]):
    rewrite(path, **{name: np.zeros(shape, np.float32) for name, shape in shapes.items()})
    with pytest.raises(UserError, match=r"the cartridge's (keys|bias) (are|is) .* expected"):
        Cartridge.load(path, model=tiny.model())


@pytest.mark.parametrize("num_frozen", [-1, 6])
def test_num_frozen_lies_between_none_and_all(num_frozen: int):
    with pytest.raises(UserError, match=f"num_frozen is {num_frozen}, expected 0 to"):
        random_cartridge(num_frozen=num_frozen).checked(tiny.model().config)
    random_cartridge(num_frozen=5).checked(tiny.model().config)


def test_a_cartridge_passes_through_jit_and_grad():
    cartridge = random_cartridge()

    @jax.jit
    def energy(c: Cartridge) -> jax.Array:
        return (c.keys**2).sum() + c.values.sum() + c.num_frozen * c.bias.sum()

    gradient = jax.jit(jax.grad(energy))(cartridge)
    assert isinstance(gradient, Cartridge)
    assert (gradient.num_frozen, gradient.offset, gradient.provenance) == (
        2,
        5,
        Provenance(),
    )
    np.testing.assert_allclose(gradient.keys, 2 * cartridge.keys, rtol=1e-6)
    np.testing.assert_array_equal(gradient.bias, np.full(SHAPE[:3], 2.0))
    assert same(jax.jit(lambda c: c)(cartridge), cartridge)
    assert hash(cartridge.provenance) == hash(dataclasses.replace(cartridge.provenance))


def test_a_cartridge_knows_its_size():
    assert random_cartridge().num_slots == 5
    assert random_cartridge(with_bias=False).num_bytes == 2 * 4 * np.prod(SHAPE)


@pytest.mark.parametrize("num_tokens", [1, 63, 64, 65, None])
def test_a_cartridge_of_a_text_stands_in_for_its_tokens(num_tokens: int | None):
    model = tiny.model()
    text = tiny.TEXT[:300]
    tokens = np.asarray(model.tokenizer.encode(text))[:num_tokens]
    after = np.asarray(model.tokenizer.encode("What sleeps in box 3?"))
    cartridge = Cartridge.from_text(model, text, num_tokens)
    assert cartridge.num_slots == len(tokens)
    assert cartridge.keys.dtype == jnp.float32
    full = model.logits(np.concatenate([tokens, after])[None])[:, len(tokens) :]
    np.testing.assert_allclose(model.logits(after[None], cartridge=cartridge), full, atol=2e-5)


def test_a_text_without_tokens_or_beyond_the_window_is_refused():
    model = tiny.model()
    with pytest.raises(UserError, match="the text has no tokens"):
        Cartridge.from_text(model, "")
    with pytest.raises(UserError, match=r"\d+ tokens exceed .* window of 1024: cut the text"):
        Cartridge.from_text(model, tiny.TEXT * 2)
    assert Cartridge.from_text(model, tiny.TEXT * 2, num_tokens=3, num_frozen=9).num_frozen == 3


RAGGED = np.array([[5, 2], [3, 4]], np.int32)
VERSION_3 = {"at 0": {"offset": 0}, "ragged": {"lengths": RAGGED}, "ragged at 0": {"lengths": RAGGED, "offset": 0}}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("kind", VERSION_3)
def test_version_3_holds_the_slots_that_there_are_and_the_offset(
    tmp_path: Path, kind: str, with_bias: bool, dtype: str
):
    cartridge = random_cartridge(with_bias=with_bias).replace(**VERSION_3[kind])
    cartridge.save(tmp_path / "c.safetensors", dtype)
    held = load_file(tmp_path / "c.safetensors") if dtype != "bfloat16" else {}
    count = int(cartridge.all_lengths.sum())
    assert {name: array.shape for name, array in held.items() if name in ("keys", "bias")} in (
        {"keys": (count, SHAPE[-1])} | ({"bias": (count,)} if with_bias else {}),
        {},
    )
    found = Cartridge.load(tmp_path / "c.safetensors", model=tiny.model())
    assert (found.offset, found.num_frozen, found.provenance) == (cartridge.offset, 2, cartridge.provenance)
    np.testing.assert_array_equal(found.all_lengths, cartridge.all_lengths)
    assert (found.lengths is None) == (cartridge.lengths is None) and (found.bias is not None) == with_bias
    there_lpk = np.arange(5)[:, None] < cartridge.all_lengths[:, None]
    for name in ("keys", "values"):
        ours, theirs = (np.asarray(getattr(c, name)) for c in (cartridge, found))
        np.testing.assert_allclose(theirs[there_lpk], ours[there_lpk], rtol=0, atol=0 if dtype == "float32" else 0.03)
        assert not theirs[~there_lpk].any()
    found.save(tmp_path / "again.safetensors", dtype)
    if dtype == "float32":
        assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "c.safetensors").read_bytes()
    cartridge_file.record_evaluation(tmp_path / "c.safetensors", '{"a": 1}')
    evaluated = Cartridge.load(tmp_path / "c.safetensors")
    assert evaluated.provenance.evaluation == '{"a": 1}'
    np.testing.assert_array_equal(evaluated.keys, found.keys)


def test_padding_that_no_head_uses_is_not_kept(tmp_path: Path):
    random_cartridge().replace(lengths=np.full((2, 2), 4)).save(tmp_path / "c.safetensors")
    found = Cartridge.load(tmp_path / "c.safetensors")
    assert (found.num_slots, found.lengths, found.offset) == (4, None, 5)


@pytest.mark.parametrize(
    ("header", "tensors", "sentence"),
    [
        ({"offset": -1}, {}, "its offset is -1, expected a position"),
        ({"offset": 1 << 40}, {}, "expected a position"),
        ({"offset": True}, {}, "its offset is True"),
        ({"offset": 1.5}, {}, r"its offset is 1\.5"),
        ({"offset": None}, {}, "its offset is None"),
        ({"offset": tiny.WINDOW + 1}, {}, f"offset is {tiny.WINDOW + 1}, expected 0 to the model's {tiny.WINDOW}"),
        ({"num_frozen": 3}, {}, "num_frozen is 3, expected 0 to the number of slots, 2"),
        ({}, {"lengths": RAGGED + 1}, "lengths come to 18, .*: expected 14"),
        ({}, {"lengths": np.array([[9, -2], [3, 4]], np.int32)}, "the smallest is -2: expected 14, none below 0"),
        ({}, {"lengths": RAGGED.astype(np.float32)}, "lengths are float32"),
        ({}, {"lengths": RAGGED.reshape(-1)}, r"lengths are int32 \(4,\)"),
        ({}, {"lengths": np.zeros((0, 2), np.int32)}, r"lengths are int32 \(0, 2\)"),
        (
            {},
            {"lengths": np.pad(np.array([[14]], np.int32), ((0, 9), (0, 9)))},
            "a head has 14 slots, expected at most",
        ),
        ({}, {"lengths": np.array([[5, 2, 0], [3, 4, 0]], np.int32)}, r"\(2, 5, 3, 8\)"),
        ({}, {"lengths": np.full((2, 2), 2**30, np.int32)}, "lengths come to 4294967296"),
        ({}, {"keys": np.zeros((13, 8), np.float32)}, "keys are"),
        ({}, {"values": np.zeros((14, 4), np.float32)}, "values is"),
        ({}, {"bias": np.zeros((14, 1), np.float32)}, "bias is"),
        ({}, {"keys": np.zeros(SHAPE, np.float32), "values": np.zeros(SHAPE, np.float32)}, "expected slots"),
        ({"format_version": 2}, {}, "lengths is int32"),
    ],
)
def test_what_no_file_of_version_3_can_say_is_refused(
    tmp_path: Path, header: dict[str, Any], tensors: dict[str, np.ndarray], sentence: str
):
    path = tmp_path / "c.safetensors"
    random_cartridge().replace(lengths=RAGGED, offset=0).save(path)
    Cartridge.load(path, model=tiny.model())
    rewrite(path, header, **tensors)
    with pytest.raises(UserError, match=sentence):
        Cartridge.load(path, model=tiny.model())


def test_a_file_of_version_3_without_lengths_or_offset_is_refused(tmp_path: Path):
    path = tmp_path / "c.safetensors"
    random_cartridge().save(path)
    rewrite(path, {"format_version": 3})
    with pytest.raises(UserError, match=r"not a whole cartridge file \(KeyError\('lengths'\)"):
        Cartridge.load(path)
    random_cartridge().replace(offset=0).save(path)
    with safe_open(path, framework="numpy") as reader:
        said = json.loads(reader.metadata()["cartridge"])
    del said["offset"]
    rewrite(path, json.dumps(said))
    with pytest.raises(UserError, match=r"not a whole cartridge file \(KeyError\('offset'\)"):
        Cartridge.load(path)
