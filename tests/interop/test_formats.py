"""What one format can say, every other says too, bit by bit; what it cannot say is refused before a file is written."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import make_golden
import make_golden_formats as golden
import ml_dtypes
import numpy as np
import pytest
import tiny
from make_golden_formats import FORMATS as GOLDEN
from make_golden_formats import UPSTREAM
from readme_table import CLAIMS, FILES, readme_table
from safetensors.numpy import load_file, save_file

import cartridges_jax as cj
from cartridges_jax import interop
from cartridges_jax.cartridge.arrays import Cartridge
from cartridges_jax.cartridge.provenance import Provenance
from cartridges_jax.command_line.errors import UserError
from cartridges_jax.interop import torch_zip, upstream
from cartridges_jax.interop.formats import FORMATS, locate, read, write
from cartridges_jax.models.language_model import LanguageModel

ROUNDING = {"float32": 0.0, "float16": 2.0**-11, "bfloat16": 2.0**-8}  # of a value, relative
readme = pytest.mark.readme
OWN, OWN_SMALLER = "`cartridge.safetensors` float32", "… float16, bfloat16, int8"
SHOWN = {
    ("safetensors", "float32"): readme(OWN, read="✓", write="✓", parity="itself", tolerance="exact"),
    ("safetensors", "float16"): readme(OWN_SMALLER, read="✓", write="✓"),
}
CASES = [
    pytest.param(format, dtype, marks=SHOWN.get((format, dtype), ()))
    for format, f in FORMATS.items()
    for dtype in f.dtypes
    if dtype != "int8"
]


def place(tmp_path: Path, format: str) -> Path:
    return tmp_path / {"safetensors": "c.safetensors", "upstream": "cache-step7.pt"}.get(format, format)


def bits(cartridge: Cartridge) -> tuple[bytes, bytes]:
    return np.asarray(cartridge.keys).tobytes(), np.asarray(cartridge.values).tobytes()


@pytest.mark.parametrize(("format", "dtype"), CASES)
def test_what_is_written_is_read_back(cartridge: Cartridge, tmp_path: Path, format: str, dtype: str):
    path = place(tmp_path, format)
    write(cartridge, path, format, dtype)
    found = Cartridge.load(path, model=tiny.model())
    assert (found.num_frozen, found.provenance) == (3, cartridge.provenance)
    assert found.keys.dtype == jnp.float32
    if dtype == "float32":
        assert bits(found) == bits(cartridge)
    for ours, theirs in ((cartridge.keys, found.keys), (cartridge.values, found.values)):
        np.testing.assert_allclose(theirs, ours, rtol=ROUNDING[dtype], atol=1e-7)
    write(found, tmp_path / "again" / path.name, format, dtype)  # what the dtype can hold is kept exactly
    assert bits(read(tmp_path / "again" / path.name)) == bits(found)


@pytest.mark.parametrize("num_frozen", [0, 1, 15, 16])
@pytest.mark.parametrize("format", FORMATS)
def test_any_number_of_frozen_slots_survives(cartridge: Cartridge, tmp_path: Path, format: str, num_frozen: int):
    write(cartridge.replace(num_frozen=num_frozen), place(tmp_path, format), format)
    found = read(place(tmp_path, format))
    assert found.num_frozen == num_frozen
    assert bits(found) == bits(cartridge)


@pytest.mark.parametrize("format", FORMATS)
def test_the_same_cartridge_gives_the_same_bytes(cartridge: Cartridge, tmp_path: Path, format: str):
    contents = []
    for folder in ("a", "b"):
        write(cartridge, place(tmp_path / folder, format), format)
        files = sorted(path for path in (tmp_path / folder).rglob("*") if path.is_file())
        contents.append([(path.relative_to(tmp_path / folder), path.read_bytes()) for path in files])
    assert contents[0] == contents[1]


@readme(OWN_SMALLER, parity="itself", tolerance="rounding")
@pytest.mark.parametrize("name", ["keys", "values"])
def test_int8_errs_by_half_a_step_of_its_slot_and_head(cartridge: Cartridge, tmp_path: Path, name: str):
    cartridge = cartridge.replace(keys=cartridge.keys.at[0, 5].mul(100.0).at[1, 2, 1].set(0.0))
    cartridge.save(tmp_path / "c.safetensors", dtype="int8")
    ours, found = getattr(cartridge, name), getattr(Cartridge.load(tmp_path / "c.safetensors"), name)
    step_lpk1 = jnp.abs(ours).max(-1, keepdims=True) / 127
    assert found.dtype == jnp.float32
    assert bool((jnp.abs(found - ours) <= step_lpk1 * 0.501).all())
    assert load_file(tmp_path / "c.safetensors")[name].dtype == np.int8


def test_a_reader_of_format_1_refuses_int8(cartridge: Cartridge, tmp_path: Path):
    """It would take the integers for keys."""
    cartridge.save(tmp_path / "c.safetensors", dtype="int8")
    assert b'\\"format_version\\": 2' in (tmp_path / "c.safetensors").read_bytes()
    cartridge.save(tmp_path / "c.safetensors", dtype="bfloat16")
    assert b'\\"format_version\\": 1' in (tmp_path / "c.safetensors").read_bytes()


def test_a_value_that_float16_cannot_hold_is_refused(cartridge: Cartridge, tmp_path: Path):
    large = cartridge.replace(values=cartridge.values.at[0, 0].set(7e4))
    for format in FORMATS:
        with pytest.raises(UserError, match=r"float16 cannot hold a value of 7e\+04.*use bfloat16"):
            write(large, place(tmp_path, format), format, "float16")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("format", [name for name, f in FORMATS.items() if not f.has_bias])
def test_a_bias_is_refused_where_it_has_no_place(cartridge: Cartridge, tmp_path: Path, format: str):
    bias = jnp.zeros(cartridge.keys.shape[:3])
    with pytest.raises(UserError, match=r"has a bias .* no place, and no key or value says the same"):
        write(cartridge.replace(bias=bias.at[1, 4, 0].set(0.5)), place(tmp_path, format), format)
    assert not list(tmp_path.iterdir())
    write(cartridge.replace(bias=bias), place(tmp_path, format), format)  # zero everywhere is no bias
    assert read(place(tmp_path, format)).bias is None


@pytest.mark.parametrize("name", UPSTREAM)
def test_files_of_upstream_are_read(name: str):
    num_frozen, _, _ = UPSTREAM[name]
    found = read(GOLDEN / f"{name}.pt")
    assert found.num_frozen == num_frozen
    np.testing.assert_array_equal(found.keys, golden.slots("keys"))
    np.testing.assert_array_equal(found.values, golden.slots("values"))
    assert found.provenance == Provenance(recipe="read from upstream's .pt; its making is unknown")


@pytest.mark.parametrize("kind", ["cartridge", "prefix_tuning"])
def test_adapters_that_peft_trained_give_its_logits(kind: str, load_tiny: Callable[[str], LanguageModel]):
    found = read(GOLDEN / kind)
    assert found.num_frozen == {"cartridge": 2, "prefix_tuning": 0}[kind]
    logits = load_tiny(golden.FAMILY).logits(make_golden.fixed_tokens()[None], cartridge=found)[0]
    np.testing.assert_allclose(logits, np.load(GOLDEN / f"{kind}.npz")["logits"], rtol=0, atol=1e-4)


def test_the_newest_checkpoint_of_a_run_is_taken_and_its_model_noted(tmp_path: Path):
    for step in (9, 100, 20):
        (tmp_path / f"cache-step{step}.pt").write_bytes((GOLDEN / "cache-june.pt").read_bytes())
    text = (
        "model:\n  pretrained_model_name_or_path: Qwen/Qwen3-4b\n  model_cls:\n"
        "    _target: !!python/name:os.system ''\n  other: !!python/object/apply:os.getcwd []\n"
    )
    (tmp_path / "config.yaml").write_text(text)
    assert locate(tmp_path) == ("upstream", tmp_path / "cache-step100.pt")
    assert read(tmp_path).provenance.model == "Qwen/Qwen3-4b"
    (tmp_path / "config.yaml").write_text("model: {value: {pretrained_model_name_or_path: a/b}}")  # of W&B
    assert read(tmp_path).provenance.model == "a/b"


@pytest.mark.parametrize("text", ["- 1", "a: [", "[" * 5000, "a: &a [*a]\nmodel: 3", "x" * (1 << 20) + "y"])
def test_a_config_that_is_none_does_no_harm(tmp_path: Path, text: str):
    (tmp_path / "cache-step1.pt").write_bytes((GOLDEN / "cache-june.pt").read_bytes())
    (tmp_path / "config.yaml").write_text(text)
    try:
        assert read(tmp_path).provenance.model == ""
    except ValueError as error:
        assert str(tmp_path / "config.yaml") in str(error) and "\n" not in str(error)


def test_a_folder_for_tokasaurus_holds_whole_pages(cartridge: Cartridge, tmp_path: Path):
    part = Cartridge(cartridge.keys[:, :13], cartridge.values[:, :13], None, 1, cartridge.provenance)
    with pytest.raises(
        ValueError, match=r"13 slots, and Tokasaurus loads multiples of its page, 16, only: train 0 or 16"
    ):
        write(part, tmp_path / "c", "tokasaurus")
    assert not (tmp_path / "c").exists()
    padded = interop.pad_slots(part, 16, tiny.model().config)
    write(padded, tmp_path / "c", "tokasaurus")
    config = upstream.read_config(tmp_path / "c" / "config.yaml")
    assert config["kv_cache_initializer"] == {"max_tokens": 16}
    assert upstream.model_of(config) == tiny.model().name
    tree, _ = torch_zip.load(tmp_path / "c" / "cartridge.pt")
    assert {name: [t.shape for t in tensors] for name, tensors in tree.items()} == {
        f"{kind}_{name}": [(1, tiny.KV_HEADS, count, tiny.HEAD_DIM)] * tiny.LAYERS
        for kind, count in (("trainable", 15), ("frozen", 1))
        for name in ("keys", "values")
    }
    assert read(tmp_path / "c").provenance.recipe.endswith("; 3 slots added to fill pages of 16")


@readme("vLLM-style pages", read="✓", write="✓", parity="itself", tolerance="exact")
def test_past_key_values_and_pages_hold_the_same_slots(cartridge: Cartridge):
    layers = interop.to_past_key_values(cartridge)
    assert [array.shape for array in layers[0]] == [(1, tiny.KV_HEADS, 16, tiny.HEAD_DIM)] * 2
    assert bits(interop.from_past_key_values(layers)) == bits(cartridge)
    for page in (1, 5, 16, 128):
        pages = interop.to_pages(cartridge, page)
        assert pages.shape == (tiny.LAYERS, 2, -(-16 // page), page, tiny.KV_HEADS, tiny.HEAD_DIM)
        np.testing.assert_array_equal(pages[1, 0, 15 // page, 15 % page], cartridge.keys[1, 15])
        assert bits(interop.from_pages(pages, 16)) == bits(cartridge)
    with pytest.raises(UserError, match="of one sequence are expected"):
        interop.from_past_key_values([(np.zeros((2, 2, 16, 8)), np.zeros((2, 2, 16, 8)))])
    with pytest.raises(UserError, match="with at least 99 positions"):
        interop.from_pages(interop.to_pages(cartridge, 16), 99)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"peft_type": "LORA"}, "peft_type 'LORA', expected CARTRIDGE or PREFIX_TUNING"),
        ({"prefix_projection": True}, "its slots are made by a network"),
        ({"num_transformer_submodules": 2}, "for an encoder and a decoder"),
        ({"num_virtual_tokens": 5}, r"holds prompt_embeddings \(16, 64\), expected \(5, 64\)"),
        ({"num_virtual_tokens": 1 << 60}, "says nothing usable about num_virtual_tokens"),
        ({"num_layers": "2"}, "says nothing usable about num_layers"),
        ({"num_attention_heads": 3}, "3 heads that share 16 channels"),
        ({"num_frozen_tokens": 17}, "says nothing usable about num_frozen_tokens"),
    ],
)
def test_adapters_that_are_none_are_refused(
    cartridge: Cartridge, tmp_path: Path, changes: dict[str, Any], sentence: str
):
    write(cartridge, tmp_path, "peft")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | changes))
    with pytest.raises(UserError, match=sentence):
        read(tmp_path)


def test_an_adapter_saved_as_bin_is_read(cartridge: Cartridge, tmp_path: Path):
    write(cartridge, tmp_path, "peft")
    tensor = load_file(tmp_path / "adapter_model.safetensors")["prompt_embeddings"]
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no adapter_model\.safetensors"):
        read(tmp_path)
    torch_zip.save(tmp_path / "adapter_model.bin", {"prompt_embeddings": [tensor]}, {})
    with pytest.raises(UserError, match="has no tensor prompt_embeddings"):
        read(tmp_path)  # a list: torch's own file is in the parity tests


@pytest.mark.parametrize("format", [name for name in FORMATS if name != "safetensors"])
def test_a_cartridge_of_another_model_is_refused(cartridge: Cartridge, tmp_path: Path, format: str):
    model = tiny.model()

    def refused(changes: dict[str, Any], sentence: str) -> None:
        provenance = dataclasses.replace(cartridge.provenance, **changes)
        write(cartridge.replace(provenance=provenance), place(tmp_path, format), format)
        with pytest.raises(UserError, match=sentence):
            Cartridge.load(place(tmp_path, format), model=model)

    refused({"weights_hash": "0123"}, "was made for .* not for")
    config = json.loads(cartridge.provenance.model_config)
    for other in ({"rope_theta": 1e6}, {"rope_factors": [2.0] * 4}, {"head_dim": 16}):
        (key,) = other
        refused({"model_config": json.dumps(config | other)}, f"with {key} .* and this model has {key} ")
    provenance = Provenance(model="Qwen/Qwen3-4b")
    write(cartridge.replace(provenance=provenance), place(tmp_path, format), format)
    named = dataclasses.replace(model, name="unsloth/Qwen3-4B")
    assert Cartridge.load(place(tmp_path, format), model=named).provenance == provenance  # another's copy of it
    with pytest.raises(UserError, match=r"is for Qwen/Qwen3-4b, not for Qwen/Qwen3-8B: load that model"):
        Cartridge.load(place(tmp_path, format), model=dataclasses.replace(model, name="Qwen/Qwen3-8B"))


@pytest.mark.parametrize("format", FORMATS)
def test_heads_of_another_shape_are_refused(cartridge: Cartridge, tmp_path: Path, format: str):
    other = Cartridge(cartridge.keys[..., :4], cartridge.values[..., :4])
    write(other, place(tmp_path, format), format)
    with pytest.raises(UserError, match=r"expected \(2, 16, 2, 8\) as \[layers, slots, kv heads, head size\]"):
        Cartridge.load(place(tmp_path, format), model=tiny.model())


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("format", FORMATS)
def test_values_that_are_not_finite_are_refused(tmp_path: Path, cartridge: Cartridge, format: str, value: float):
    """By the reader: a file of somebody else's holds what it holds."""
    path = place(tmp_path, format)
    write(cartridge, path, format)
    file = locate(path)[1]
    file = file.parent / "adapter_model.safetensors" if file.name == "adapter_config.json" else file
    needle, damage = np.asarray(cartridge.values)[1, 7, 1, 3:4].tobytes(), np.asarray([value], np.float32).tobytes()
    content = file.read_bytes()
    assert content.count(needle) == 1
    if file.suffix == ".pt":
        tree, _ = torch_zip.load(file)
        tree["trainable_values"][1] = np.where(
            tree["trainable_values"][1] == np.frombuffer(needle, np.float32), value, 0
        )
        torch_zip.save(file, {k: [a.astype(np.float32) for a in v] for k, v in tree.items()}, {})
    else:
        file.write_bytes(content.replace(needle, damage))
    with pytest.raises(UserError, match="holds values that are not finite"):
        read(path)


def test_unlike_lists_are_refused(tmp_path: Path):
    def refused(sentence: str, **lists: list[np.ndarray]) -> None:
        torch_zip.save(tmp_path / "c.pt", lists, {})
        with pytest.raises(UserError, match=sentence):
            read(tmp_path / "c.pt")

    ok = [np.zeros((1, 2, 3, 4), np.float32)] * 2
    refused("it has no trainable_keys", keys=ok)
    refused("keys and values differ in shape", trainable_keys=ok, trainable_values=ok[:1])
    refused("expected the same layers", trainable_keys=[], trainable_values=[])
    bare = [np.zeros((1, 2, 3), np.float32)]
    refused(r"its tensors are \(1, 2, 3\), expected one", trainable_keys=bare, trainable_values=bare)
    uneven = [*ok, np.zeros((1, 2, 3, 5), np.float32)]
    refused(r"\(1, 2, 3, 4\), \(1, 2, 3, 5\)", trainable_keys=uneven, trainable_values=uneven)
    two = {f"frozen_{name}": [np.zeros((1, 3, 1, 4), np.float32)] * 2 for name in ("keys", "values")}
    refused("expected the same layers, kv heads", trainable_keys=ok, trainable_values=ok, **two)


def test_our_file_with_a_foreign_header_is_refused(cartridge: Cartridge, tmp_path: Path):
    path = tmp_path / "c.safetensors"
    cartridge.save(path)
    for changes in ({"num_frozen": "1"}, {"model": []}, {"training_tokens": "many"}, {"recipe": None}):
        header = {"format_version": 1, "num_frozen": 1} | changes
        save_file(load_file(path), path, metadata={"cartridge": json.dumps(header)})
        with pytest.raises(UserError, match="is not a whole cartridge file"):
            read(path)


def test_every_cell_of_the_readmes_table_has_a_test_that_shows_it(request: pytest.FixtureRequest):
    if request.config.stash[FILES] != {path.name for path in Path(__file__).parent.glob("test_*.py")}:
        pytest.skip("only some of the files with marked tests were collected")
    cells = {(row, column): {cell} for row, cells in readme_table().items() for column, cell in cells.items()}
    assert request.config.stash[CLAIMS] == {place: cell for place, cell in cells.items() if cell != {"-"}}


def test_golden_files_are_bfloat16():
    tree, _ = torch_zip.load(GOLDEN / "cache-step512.pt")
    assert {tensor.dtype for tensors in tree.values() for tensor in tensors} == {np.dtype(ml_dtypes.bfloat16)}


def test_interop_is_reached_from_the_package_and_lists_what_it_has():
    assert cj.interop is interop
    assert all(getattr(interop, name).__name__ == name for name in dir(interop))
    with pytest.raises(AttributeError, match=r"'cartridges_jax\.interop' has no attribute 'no_such_name'"):
        interop.no_such_name  # noqa: B018
