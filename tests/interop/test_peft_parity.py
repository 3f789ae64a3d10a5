"""The other side run: peft, transformers and torch read what is written here, and the other way round.

`make test-parity`. Logits agree to 1e-4, the tolerance within which the models themselves do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import make_golden
import make_golden_formats as golden
import ml_dtypes
import numpy as np
import pytest
from make_golden import FAMILIES, fixed_tokens

import cartridges_jax as cj
from cartridges_jax import interop
from cartridges_jax.cartridge.arrays import Cartridge
from cartridges_jax.interop.formats import FORMATS, read, write
from cartridges_jax.models.language_model import LanguageModel

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]
readme = pytest.mark.readme
UPSTREAM, TOKASAURUS = "upstream `.pt` (`frozen_*`, `fixed_*`)", "Tokasaurus folder"
PEFT, CACHE = "PEFT CARTRIDGE, PREFIX_TUNING", "`past_key_values`"
TOLERANCE = 1e-4
TOKENS = fixed_tokens()[None]
KINDS = ["peft", "prefix-tuning"]


def cartridge_of(model: LanguageModel, num_frozen: int = 2) -> Cartridge:
    """Keys and values of real tokens, moved: no slot is one that the model itself could have made.

    Its keys stand where the formats of others have them, so that it is written as it is.
    """
    real = Cartridge.from_tokens(model, fixed_tokens(12, model.config.vocab_size).tolist(), num_frozen)
    rng = np.random.default_rng(0)
    keys, values = (
        array + jnp.asarray(rng.standard_normal(array.shape) * 0.3 * np.std(array), jnp.float32)
        for array in (real.keys, real.values)
    )
    return real.replace(keys=keys, values=values).at_offset(real.num_slots, model.config)


def in_float64(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float64) if leaf.dtype == jnp.float32 else leaf, tree)


def torch_twin(family: str) -> Any:
    model = make_golden.torch_model(family)
    make_golden.torch_outputs(model, make_golden.weights(family))  # loads the weights
    return model


def torch_logits(model: Any, **more: Any) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(input_ids=torch.from_numpy(TOKENS).long(), **more).logits[0].numpy()


@readme(PEFT, write="✓", parity="peft 0.21", tolerance="logits 1e-4")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_peft_answers_alike_with_a_cartridge_of_ours(
    family: str, kind: str, load_tiny: Callable[[str], LanguageModel], tmp_path: Path
):
    peft = pytest.importorskip("peft")
    model = load_tiny(family)
    cartridge = cartridge_of(model)
    write(cartridge, tmp_path / "adapter", kind)
    base = torch_twin(family)
    without = torch_logits(base)
    # in float64: their float32 is further from it than ours
    theirs = torch_logits(peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter")).double().eval())
    ours = np.asarray(model.logits(TOKENS, cartridge=cartridge)[0])
    np.testing.assert_allclose(theirs, ours, rtol=0, atol=TOLERANCE)
    assert np.abs(theirs - without).max() > 0.1  # the slots do something


@readme(PEFT, read="✓")
@pytest.mark.parametrize("kind", ["CARTRIDGE", "PREFIX_TUNING"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_cartridge_that_peft_trained_answers_alike_here(
    family: str, kind: str, load_tiny: Callable[[str], LanguageModel], tmp_path: Path
):
    pytest.importorskip("peft")
    theirs = golden.train_peft(torch_twin(family), tmp_path / "adapter", kind)
    found = Cartridge.load(tmp_path / "adapter")
    ours = load_tiny(family).logits(TOKENS, cartridge=found)[0]
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE)


def test_golden_adapters_are_what_peft_makes(load_tiny: Callable[[str], LanguageModel], tmp_path: Path):
    pytest.importorskip("peft")
    logits = golden.train_peft(torch_twin(golden.FAMILY), tmp_path / "adapter")
    np.testing.assert_allclose(logits, np.load(golden.FORMATS / "cartridge.npz")["logits"], rtol=0, atol=TOLERANCE)


@readme(CACHE, write="✓", parity="transformers 5", tolerance="logits 1e-4")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_dynamic_cache_answers_alike(family: str, load_tiny: Callable[[str], LanguageModel]):
    torch = pytest.importorskip("torch")
    from transformers import DynamicCache

    model, cache = load_tiny(family), DynamicCache()
    cartridge = cartridge_of(model)
    for layer, pair in enumerate(interop.to_past_key_values(cartridge)):
        cache.update(*map(torch.from_numpy, map(np.ascontiguousarray, pair)), layer)
    theirs = torch_logits(torch_twin(family), past_key_values=cache)
    np.testing.assert_allclose(model.logits(TOKENS, cartridge=cartridge)[0], theirs, rtol=0, atol=TOLERANCE)


@readme(CACHE, read="✓")
def test_what_transformers_cached_answers_alike_here(load_tiny: Callable[[str], LanguageModel]):
    """The lossless control: the cache of a real prefix, as a cartridge, equals the whole text."""
    torch = pytest.importorskip("torch")
    base = torch_twin("smollm2")
    with torch.no_grad():
        cache = base(input_ids=torch.from_numpy(TOKENS[:, :10]).long(), use_cache=True).past_key_values
    found = interop.from_past_key_values([(layer.keys, layer.values) for layer in cache.layers])
    ours = load_tiny("smollm2").logits(TOKENS[:, 10:], cartridge=found)[0]
    np.testing.assert_allclose(ours, torch_logits(base)[10:], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("num_frozen", [0, 1, 12])
@pytest.mark.parametrize(
    "format",
    [
        pytest.param("upstream", marks=readme(UPSTREAM, write="✓", parity="torch 2.13", tolerance="exact")),
        pytest.param(
            "tokasaurus", marks=readme(TOKASAURUS, write="✓", parity="torch 2.13, a stub of it", tolerance="exact")
        ),
    ],
)
def test_torch_opens_what_is_written_with_weights_only(
    format: str, num_frozen: int, dtype: str, tiny_llama: LanguageModel, tmp_path: Path
):
    torch = pytest.importorskip("torch")
    whole = cartridge_of(tiny_llama)
    padded = interop.pad_slots(whole, 16, tiny_llama.config).replace(num_frozen=num_frozen)
    cartridge = padded.at_offset(padded.num_slots, tiny_llama.config)
    write(cartridge, path := tmp_path / ("c.pt" if format == "upstream" else "c"), format, dtype)
    tree = torch.load(path if path.suffix else path / "cartridge.pt", weights_only=True)
    for name in ("keys", "values"):
        # as Tokasaurus and upstream put them together
        layers = [
            torch.cat(pair, dim=2) for pair in zip(tree[f"frozen_{name}"], tree[f"trainable_{name}"], strict=True)
        ]
        assert tree[f"frozen_{name}"][0].size(2) == num_frozen
        assert {layer.dtype for layer in layers} == {getattr(torch, dtype)}
        found = torch.cat(layers).float().numpy().transpose(0, 2, 1, 3)
        expected = np.asarray(getattr(cartridge, name)).astype(getattr(ml_dtypes, dtype, dtype)).astype(np.float32)
        np.testing.assert_array_equal(found, expected)


@readme(UPSTREAM, read="✓")
@readme(TOKASAURUS, read="✓")
@pytest.mark.parametrize("name", golden.UPSTREAM)
def test_files_that_torch_writes_today_are_read(name: str, tmp_path: Path):
    pytest.importorskip("torch")
    golden.save_upstream(tmp_path / "c.pt", *golden.UPSTREAM[name])
    found = read(tmp_path / "c.pt")
    np.testing.assert_array_equal(found.keys, golden.slots("keys"))
    np.testing.assert_array_equal(found.values, golden.slots("values"))


def test_an_adapter_that_torch_pickled_is_read(tiny_llama: LanguageModel, tmp_path: Path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    cartridge = cartridge_of(tiny_llama)
    write(cartridge, tmp_path, "peft")
    torch.save(load_file(tmp_path / "adapter_model.safetensors"), tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_model.safetensors").unlink()
    np.testing.assert_array_equal(read(tmp_path).keys, cartridge.keys)


@pytest.mark.parametrize("format", [name for name in FORMATS if name != "tokasaurus"])
def test_smollm2_answers_alike_from_every_format(format: str, tmp_path: Path):
    """A real model, with 9 query heads on 3 of keys and values, and RoPE at base 100,000."""
    model = cj.load_model("smollm2-135m")
    cartridge = Cartridge.from_text(model, make_golden.PROMPT, 24).at_offset(24)
    path = tmp_path / {"safetensors": "c.safetensors", "upstream": "c.pt"}.get(format, format)
    write(cartridge, path, format)
    ours = model.logits(TOKENS, cartridge=Cartridge.load(path, model=model))
    np.testing.assert_array_equal(ours, model.logits(TOKENS, cartridge=cartridge))


@pytest.mark.parametrize("kind", KINDS)
def test_smollm2_in_peft_answers_alike(kind: str, tmp_path: Path):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    from cartridges_jax.models.hub import resolve

    model = cj.load_model("smollm2-135m")
    cartridge = cartridge_of(model)
    write(cartridge, tmp_path / "adapter", kind)
    gguf = resolve("smollm2-135m").gguf
    assert gguf is not None
    base = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    theirs = torch_logits(peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter")).double().eval())
    # states in the thousands: in float32 either side is off by about the tolerance, more or less with the machine
    with jax.enable_x64(True):
        wide, prefix = replace(model, params=in_float64(model.params)), in_float64(cartridge)
        ours = np.asarray(wide.logits(TOKENS, cartridge=prefix)[0])
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE)
    for logits in (ours, model.logits(TOKENS, cartridge=cartridge)[0]):
        assert (logits.argmax(-1) == theirs.argmax(-1)).all()
