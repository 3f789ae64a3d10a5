"""A base of 8 bits: what is stored, how far it is from what it was, and what it costs."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from cartridges_jax.cartridge.arrays import Cartridge
from cartridges_jax.models.params import init_params
from cartridges_jax.models.spec import layer_arrays
from cartridges_jax.models.transformer import hidden_states
from cartridges_jax.models.weights import FORMATS, Dense, Format, Panels, Weight, quantized


@pytest.mark.parametrize("format", FORMATS)
def test_weights_are_within_half_a_step_of_what_they_were(format: Format):
    model = tiny.model()
    small = quantized(model, format)
    before, after = model.params["blocks"], small.params["blocks"]
    for array in layer_arrays(model.config):
        if not array.summed:
            assert after[array.name] is before[array.name]
            continue
        leaf, wide = after[array.name], before[array.name]
        assert leaf.array.dtype == wide.dtype and leaf.values.dtype == leaf.STORED
        assert float(jnp.abs(leaf.values.astype(jnp.float32)).max()) == leaf.LARGEST
        assert leaf.scale.shape == tuple(1 if i - 1 in array.summed_axes else n for i, n in enumerate(wide.shape))
        # a step of e4m3 is an eighth of the number's power of two, and of its smallest normal number below that
        size = jnp.maximum(jnp.abs(wide), leaf.scale * 2.0**-6)
        step = leaf.scale if format == "int8" else 2 ** jnp.floor(jnp.log2(size / leaf.scale)) / 8 * leaf.scale
        assert (jnp.abs(leaf.array - wide) <= step / 2 * 1.0001).all()
    assert small.params["embed"] is model.params["embed"]
    held, whole = (sum(leaf.nbytes for leaf in jax.tree.leaves(m.params["blocks"])) for m in (small, model))
    assert held < 0.35 * whole  # a channel of the tiny model is short: scales weigh more than in a real one


@pytest.mark.parametrize("format", FORMATS)
def test_what_it_says_is_nearly_the_same(format: Format):
    model, tokens = tiny.model(), np.array([tiny.model().tokenizer.encode(tiny.TEXT)[:64]])
    cartridge = Cartridge.from_text(model, tiny.TEXT, 8)
    before, after = (
        jax.nn.log_softmax(m.logits(tokens, cartridge=cartridge)) for m in (model, quantized(model, format))
    )
    apart = float(jnp.abs(before - after).mean())
    assert 0 < apart < 0.1 * float(jnp.abs(before - before.mean(-1, keepdims=True)).mean())


@pytest.mark.parametrize("format", FORMATS)
def test_it_multiplies_as_the_dense_weight_that_it_stands_for(format: Format):
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in ((2, 3, 8), (8, 4, 6)))
    small = FORMATS[format].of(w, (0,))

    def product(weight: Weight) -> tuple[jax.Array, jax.Array]:
        y, pullback = jax.vjp(lambda x: weight.matmul(x, "btd,dnh->btnh"), x)
        return y, *pullback(jnp.ones_like(y))

    for found, expected in zip(product(small), product(Dense(small.array)), strict=True):
        assert found.dtype == x.dtype
        np.testing.assert_array_equal(found, expected)


def test_panels_multiply_and_look_up_as_the_matrix_does():
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((3, 8), (32, 8)))
    found, expected = Panels.of(w), Dense(w)
    np.testing.assert_allclose(found.matmul(x, "md,od->mo"), expected.matmul(x, "md,od->mo"), rtol=0, atol=2e-6)
    ids = jnp.asarray([0, 15, 16, 31])
    np.testing.assert_array_equal(found.lookup(ids), expected.lookup(ids))


def test_a_stack_of_panels_multiplies_by_the_layer_that_is_asked_for():
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((3, 8), (4, 32, 8)))
    stack = jax.lax.map(Panels.of, w)
    found = jax.lax.map(lambda layer: stack.of_layer(layer).matmul(x, "md,od->mo"), jnp.arange(4))
    np.testing.assert_allclose(found, jnp.einsum("md,lod->lmo", x, w), rtol=0, atol=2e-6)


def test_the_layers_are_not_widened_all_at_once():
    """XLA likes to hoist such a conversion out of the scan, which would cost more memory than there was before."""
    model = tiny.model()
    config = dataclasses.replace(model.config, num_layers=24)
    model = dataclasses.replace(model, config=config, params=init_params(config, jax.random.key(0)))
    tokens = jnp.zeros((1, 8), jnp.int32)

    def gradient(params: Any, keys: jax.Array) -> jax.Array:
        hidden = functools.partial(hidden_states, config=config)
        return jax.grad(lambda k: hidden(params, tokens, tokens + 1, tokens, k, k).sum())(keys)

    shape = (config.num_layers, 4, config.num_kv_heads, config.head_dim)
    temporary = [
        jax.jit(gradient).lower(m.params, jnp.zeros(shape)).compile().memory_analysis().temp_size_in_bytes
        for m in (model, quantized(model, "int8"))
    ]
    layer = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params["blocks"])) / config.num_layers
    assert temporary[1] < temporary[0] + 4 * layer
