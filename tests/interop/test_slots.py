"""Slots changed for an engine that is poorer than ours: as near as the docstrings say, and no nearer."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import cartridges_jax as cj
from cartridges_jax import interop
from cartridges_jax.cartridge.arrays import Cartridge
from cartridges_jax.command_line.errors import UserError
from cartridges_jax.interop.slots import _direction

TOKENS = np.asarray(tiny.model().tokenizer.encode("What sleeps in box 3?"))[None]


def logits(cartridge: Cartridge) -> np.ndarray:
    return np.asarray(tiny.model().logits(TOKENS, cartridge=cartridge))


def biased() -> Cartridge:
    cartridge = Cartridge.from_text(tiny.model(), tiny.TEXT, 40)
    rng = np.random.default_rng(0)
    return cartridge.replace(bias=jnp.asarray(rng.uniform(-1.0, 1.0, cartridge.keys.shape[:3]), jnp.float32))


def test_a_folded_bias_is_gone_and_zero_changes_nothing():
    cartridge = biased()
    folded = interop.fold_bias(cartridge, tiny.model(), tiny.TEXT)
    assert folded.bias is None
    assert folded.provenance.recipe.endswith("; bias folded into the keys")
    np.testing.assert_array_equal(folded.values, cartridge.values)
    assert np.abs(folded.keys - cartridge.keys).min() > 0
    zero = cartridge.replace(bias=jnp.zeros_like(cartridge.bias))
    np.testing.assert_array_equal(interop.fold_bias(zero, tiny.model(), tiny.TEXT).keys, cartridge.keys)


def test_queries_with_something_in_common_score_one_along_it():
    rng = np.random.default_rng(0)
    q_mh = jnp.asarray(rng.standard_normal((500, 16)) * 0.2 + rng.standard_normal(16), jnp.float32)
    scores_m = q_mh @ _direction(q_mh)
    assert float(jnp.abs(scores_m - 1).mean()) < 0.05


@pytest.mark.slow
def test_in_a_real_model_nearly_all_of_the_bias_survives():
    """A random model's queries have nothing in common, a trained one's do; for answers see benchmarks/formats.py."""
    model = cj.load_model("smollm2-135m")
    text = (Path(__file__).parent.parent.parent / "examples" / "document.txt").read_text()
    cartridge = Cartridge.from_text(model, text, 128)
    rng = np.random.default_rng(0)
    cartridge = cartridge.replace(bias=jnp.asarray(rng.uniform(-2.0, 2.0, cartridge.keys.shape[:3]), jnp.float32))
    tokens = np.asarray(model.tokenizer.encode(text[-600:]))[None]
    whole, folded, without = (
        jax.nn.log_softmax(model.logits(tokens, cartridge=c))
        for c in (cartridge, interop.fold_bias(cartridge, model, text), cartridge.replace(bias=None))
    )
    errors = [float((jnp.exp(whole) * (whole - other)).sum(-1).mean()) for other in (folded, without)]
    assert errors[0] < 0.25 * errors[1]


def test_padding_turns_the_keys_along_with_the_queries():
    """Masked out by a bias, the added slots change nothing: what is left of the error is rounding."""
    cartridge = biased()
    padded = interop.pad_slots(cartridge, 16, tiny.model().config)
    assert (padded.num_slots, padded.num_frozen) == (48, 1)
    hidden = padded.replace(bias=padded.bias.at[:, 40:].set(-1e9))
    np.testing.assert_allclose(logits(hidden), logits(cartridge), atol=1e-4)
    assert interop.pad_slots(cartridge, 8, tiny.model().config) is cartridge


def test_a_text_without_tokens_folds_nothing():
    with pytest.raises(UserError, match="fold_bias needs a text"):
        interop.fold_bias(biased(), tiny.model(), "")
