"""An int8 base: what is stored, how far it is from what it was, and what it costs."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tiny

from cartridges_jax.cartridge.arrays import Cartridge
from cartridges_jax.models.quantization import SUMMED, Quantized, dequantized, quantized
from cartridges_jax.models.transformer import hidden_states, init_params


def test_weights_are_within_half_a_step_of_what_they_were():
    model = tiny.model()
    small = quantized(model)
    blocks = small.params["blocks"]
    assert {name for name, leaf in blocks.items() if isinstance(leaf, Quantized)} == set(SUMMED)
    for name, wide in dequantized(blocks).items():
        before = model.params["blocks"][name]
        assert wide.dtype == before.dtype and wide.shape == before.shape
        if name in SUMMED:
            leaf = blocks[name]
            assert leaf.values.dtype == jnp.int8 and int(jnp.abs(leaf.values).max()) == 127
            assert (jnp.abs(wide - before) <= leaf.scale / 2 * 1.0001).all()
            channels = [1 if axis in SUMMED[name] else n for axis, n in enumerate(before.shape)]
            assert leaf.scale.shape == tuple(channels)
    assert small.params["embed"] is model.params["embed"]
    held, whole = (sum(leaf.nbytes for leaf in jax.tree.leaves(m.params["blocks"])) for m in (small, model))
    assert held < 0.35 * whole  # a channel of the tiny model is short: scales weigh more than in a real one


def test_what_it_says_is_nearly_the_same():
    model, tokens = tiny.model(), np.array([tiny.model().tokenizer.encode(tiny.TEXT)[:64]])
    cartridge = Cartridge.from_text(model, tiny.TEXT, 8)
    before, after = (jax.nn.log_softmax(m.logits(tokens, cartridge=cartridge)) for m in (model, quantized(model)))
    apart = float(jnp.abs(before - after).mean())
    assert 0 < apart < 0.1 * float(jnp.abs(before - before.mean(-1, keepdims=True)).mean())


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
        for m in (model, quantized(model))
    ]
    layer = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params["blocks"])) / config.num_layers
    assert temporary[1] < temporary[0] + 4 * layer
