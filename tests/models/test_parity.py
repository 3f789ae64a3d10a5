"""The decoder against transformers: golden files everywhere, and live, layer by layer, where torch is installed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from make_golden import (
    FAMILIES,
    GOLDEN,
    PROMPT,
    PROMPT_POSITIONS,
    fixed_tokens,
    golden_config,
    smollm2_logits,
    torch_model,
    torch_outputs,
    weights,
)
from numpy.testing import assert_allclose

import cartridges_jax as cj
from cartridges_jax.kernels.prefix_attention import prefix_attention
from cartridges_jax.models.block import block, layer_of, rope_table
from cartridges_jax.models.hf import load_hf
from cartridges_jax.models.language_model import LanguageModel, no_prefix
from cartridges_jax.models.transformer import head_weights, hidden_states

# float32 against float32: rounding only. Logits reach 5 (untied head) or 38 (tied); measured at most 1.8e-5.
TOLERANCE = 3e-5


def logits_of(folder: Path) -> np.ndarray:
    config, params, _ = load_hf(folder, jnp.float32)
    tokens = jnp.asarray(fixed_tokens())[None]
    positions = jnp.arange(tokens.shape[1])[None]
    hidden = hidden_states(params, tokens, jnp.ones_like(tokens), positions, *no_prefix(config), config=config)
    return np.asarray(hidden[0] @ head_weights(params).T)


def layers_of(model: LanguageModel) -> np.ndarray:
    """Every block's output [l, t, d], by a plain loop over the blocks."""
    tokens = jnp.asarray(fixed_tokens())[None]
    config = model.config
    rope = rope_table(jnp.arange(tokens.shape[1])[None], config.layers[0], config.head_dim)
    none_pkh = jnp.zeros((0, config.num_kv_heads, config.head_dim))

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, None]:
        return prefix_attention(q, k, v, none_pkh, none_pkh, jnp.ones_like(tokens), implementation="reference"), None

    x_btd, outputs = model.params["embed"][tokens], []
    for layer in range(config.num_layers):
        arrays = {name: leaf[layer] for name, leaf in model.params["blocks"].items()}
        x_btd, _ = block(layer_of(arrays, config), x_btd, rope, attend, config)
        outputs.append(np.asarray(x_btd[0]))
    return np.stack(outputs)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(family: str, stored: str, shards: int, write_hf: Callable[..., Path]) -> None:
    expected = np.load(GOLDEN / f"{family}.npz")["logits" if stored == "float32" else "bfloat16_logits"]
    found = logits_of(write_hf(golden_config(family)[0], weights(family, stored), shards))
    assert_allclose(found, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_is_that_of_transformers(family: str, load_tiny: Callable[[str], LanguageModel]) -> None:
    assert_allclose(layers_of(load_tiny(family)), np.load(GOLDEN / f"{family}.npz")["layers"], rtol=0, atol=TOLERANCE)


def test_smollm2_is_that_of_transformers() -> None:
    golden = np.load(GOLDEN / "smollm2-135m.npz")
    model = cj.load_model("smollm2-135m")
    assert model.tokenizer.encode(PROMPT) == golden["ids"].tolist()
    logits = np.asarray(model.logits(golden["ids"][None])[0, jnp.asarray(PROMPT_POSITIONS)])
    assert_allclose(np.take_along_axis(logits, golden["top"], -1), golden["top_logits"], rtol=0, atol=1e-4)
    assert_allclose(logits[:, golden["sample"]], golden["sample_logits"], rtol=0, atol=1e-4)
    assert (logits.argmax(-1) == golden["top"][:, 0]).all()


@pytest.mark.parity
@pytest.mark.parametrize("family", FAMILIES)
def test_live_family(family: str, write_hf: Callable[..., Path], load_tiny: Callable[[str], LanguageModel]) -> None:
    pytest.importorskip("torch")
    model = torch_model(family)
    live = torch_outputs(model, weights(family))
    bfloat16 = torch_outputs(model, weights(family, "bfloat16"))["logits"]
    golden = np.load(GOLDEN / f"{family}.npz")
    for name, array in {**live, "bfloat16_logits": bfloat16}.items():
        assert_allclose(array, golden[name], rtol=0, atol=1e-5, err_msg=f"{name}: run tests/make_golden.py again")
    ours = layers_of(load_tiny(family))
    for layer, (found, expected) in enumerate(zip(ours, live["layers"], strict=True)):
        assert_allclose(found, expected, rtol=0, atol=TOLERANCE, err_msg=f"layer {layer}")
    assert_allclose(logits_of(write_hf(golden_config(family)[0], weights(family))), live["logits"], atol=TOLERANCE)
    fresh = json.loads(json.dumps(torch_model(family).config.to_dict()))
    assert {**golden_config(family)[0], "transformers_version": ""} == {**fresh, "transformers_version": ""}


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # transformers' GGUF reader and accelerate
def test_live_smollm2() -> None:
    pytest.importorskip("torch")
    pytest.importorskip("accelerate")
    ids, live = smollm2_logits()
    golden = np.load(GOLDEN / "smollm2-135m.npz")
    assert ids.tolist() == golden["ids"].tolist()
    chosen = live[list(PROMPT_POSITIONS)]
    assert_allclose(chosen[:, golden["sample"]], golden["sample_logits"], rtol=0, atol=1e-4)
    assert_allclose(np.take_along_axis(chosen, golden["top"], -1), golden["top_logits"], rtol=0, atol=1e-4)
    assert_allclose(np.asarray(cj.load_model("smollm2-135m").logits(ids[None])[0]), live, rtol=0, atol=1e-4)
