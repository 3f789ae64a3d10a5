"""Slots changed for an engine that is poorer than ours: as near as the docstrings say, and no nearer."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from cartridges_jax import interop
from cartridges_jax.cartridge import Cartridge

TOKENS = np.asarray(tiny.model().tokenizer.encode("What sleeps in box 3?"))[None]


def logits(cartridge: Cartridge) -> np.ndarray:
    return np.asarray(tiny.model().logits(TOKENS, cartridge=cartridge))


def biased() -> Cartridge:
    cartridge = Cartridge.from_text(tiny.model(), tiny.TEXT, 40)
    rng = np.random.default_rng(0)
    return cartridge.replace(bias=jnp.asarray(rng.uniform(-1.0, 1.0, cartridge.keys.shape[:3]), jnp.float32))


def test_a_folded_bias_comes_nearer_than_none_and_is_gone():
    cartridge = biased()
    folded = interop.fold_bias(cartridge, tiny.model(), tiny.TEXT)
    assert folded.bias is None
    assert folded.provenance.recipe.endswith("; bias folded into the keys")
    np.testing.assert_array_equal(folded.values, cartridge.values)
    error, without = (np.abs(logits(c) - logits(cartridge)).mean() for c in (folded, cartridge.replace(bias=None)))
    assert error < 0.95 * without
    zero = cartridge.replace(bias=jnp.zeros_like(cartridge.bias))
    np.testing.assert_array_equal(interop.fold_bias(zero, tiny.model(), tiny.TEXT).keys, cartridge.keys)


def test_padding_turns_the_keys_along_with_the_queries():
    """Masked out by a bias, the added slots change nothing: what is left of the error is rounding."""
    cartridge = biased()
    padded = interop.pad_slots(cartridge, 16, tiny.model().config)
    assert (padded.num_slots, padded.num_frozen) == (48, 1)
    hidden = padded.replace(bias=padded.bias.at[:, 40:].set(-1e9))
    np.testing.assert_allclose(logits(hidden), logits(cartridge), atol=1e-4)
    assert interop.pad_slots(cartridge, 8, tiny.model().config) is cartridge


def test_a_text_without_tokens_folds_nothing():
    with pytest.raises(ValueError, match="fold_bias needs a text"):
        interop.fold_bias(biased(), tiny.model(), "")
