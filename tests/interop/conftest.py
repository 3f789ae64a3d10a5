"""A cartridge of the tiny model, with slots of every sign and size, as the formats of others have to carry it."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from cartridges_jax.cartridge import Cartridge, Provenance

SLOTS = 16  # a page of Tokasaurus'


@pytest.fixture
def cartridge() -> Cartridge:
    rng = np.random.default_rng(0)
    shape = (tiny.LAYERS, SLOTS, tiny.KV_HEADS, tiny.HEAD_DIM)
    keys, values = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for _ in range(2))
    provenance = Provenance.of(tiny.model(), tiny.TEXT, "random, für Prüfungen")
    return Cartridge(keys, values, None, 3, dataclasses.replace(provenance, training_tokens=12, training_flops=3.5e9))
