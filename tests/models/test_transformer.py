"""What must hold whatever the weights: slots of real tokens are the tokens, packed rows are their conversations."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from make_golden import fixed_tokens
from numpy.testing import assert_allclose, assert_array_equal

import cartridges_jax as cj
from cartridges_jax.command_line.errors import UserError
from cartridges_jax.models.params import init_params
from cartridges_jax.models.transformer import head_weights, hidden_states, keys_and_values
from cartridges_jax.models.weights import Dense

TOLERANCE = 3e-5  # float32 logits of size 1 to 40, added in another order; measured at most 1.5e-5


def random_cartridge(model: cj.LanguageModel, p: int) -> cj.Cartridge:
    config, rng = model.config, np.random.default_rng(p)
    shape = (config.num_layers, p, config.num_kv_heads, config.head_dim)
    keys, values = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for _ in range(2))
    return cj.Cartridge(keys, values, jnp.asarray(rng.standard_normal(shape[:3]), jnp.float32))


@pytest.mark.parametrize("p", [1, 13, 65])
def test_cartridge_of_real_tokens_equals_the_text(p: int, tiny_model: cj.LanguageModel) -> None:
    """The lossless control: the first p tokens as slots, the rest as tokens."""
    tokens = fixed_tokens(80)
    full = tiny_model.logits(tokens[None])[:, p:]
    cartridge = cj.Cartridge.from_tokens(tiny_model, tokens[:p].tolist())
    assert cartridge.num_slots == p
    assert_allclose(tiny_model.logits(tokens[None, p:], cartridge=cartridge), full, rtol=0, atol=TOLERANCE)
    if p == 13:
        weighed = cartridge.replace(bias=jnp.zeros(cartridge.keys.shape[:3]))
        assert_allclose(tiny_model.logits(tokens[None, p:], cartridge=weighed), full, rtol=0, atol=TOLERANCE)
        assert_array_equal(cj.Cartridge.from_tokens(tiny_model, tokens[:p]).keys, cartridge.keys)  # an array will do


def test_no_slots_are_no_cartridge(tiny_model: cj.LanguageModel) -> None:
    tokens = fixed_tokens()[None]
    empty = dataclasses.replace(random_cartridge(tiny_model, 0), num_frozen=0)
    assert_array_equal(tiny_model.logits(tokens, cartridge=empty), tiny_model.logits(tokens))


def test_slots_in_another_order(tiny_model: cj.LanguageModel) -> None:
    """The order of slots says nothing: what composition relies on when it puts one cartridge behind another."""
    tokens = fixed_tokens(40)
    whole = cj.Cartridge.from_tokens(tiny_model, tokens[:30].tolist())
    order = np.random.default_rng(0).permutation(30)
    shuffled = whole.replace(keys=whole.keys[:, order], values=whole.values[:, order])
    found, expected = (tiny_model.logits(tokens[None, 30:], cartridge=c) for c in (shuffled, whole))
    assert_allclose(found, expected, rtol=0, atol=TOLERANCE)


def test_a_packed_row_is_its_conversations_alone(tiny_model: cj.LanguageModel) -> None:
    """Logits place by place; the gradients of the slots add up."""
    cartridge, lengths, t = random_cartridge(tiny_model, 5), (13, 13), 32
    tokens = fixed_tokens(t)
    ends = np.cumsum(lengths)
    segment_ids, positions = np.zeros((2, t), np.int32)
    for segment, (end, length) in enumerate(zip(ends, lengths, strict=True), start=1):
        segment_ids[end - length : end], positions[end - length : end] = segment, np.arange(length)
    cotangent = np.random.default_rng(0).standard_normal((t, 128)).astype(np.float32) * (segment_ids > 0)[:, None]

    @jax.jit
    def run(tokens: jax.Array, segments: jax.Array, places: jax.Array, cotangent: jax.Array) -> tuple[jax.Array, Any]:
        def logits_of(cartridge: cj.Cartridge) -> jax.Array:
            return tiny_model.logits(tokens[None], segments[None], places[None], cartridge)[0]

        logits, pullback = jax.vjp(logits_of, cartridge)
        return logits, pullback(cotangent)[0]

    packed, gradient = run(tokens, segment_ids, positions, cotangent)
    alone = []
    for end, length in zip(ends, lengths, strict=True):
        rows = slice(end - length, end)
        logits, share = run(tokens[rows], np.ones(length, np.int32), np.arange(length), cotangent[rows])
        assert_allclose(logits, packed[rows], rtol=0, atol=TOLERANCE)
        alone.append(share)
    sums = jax.tree.map(lambda *shares: sum(shares), *alone)
    for found, expected in zip(jax.tree.leaves(gradient), jax.tree.leaves(sums), strict=True):
        assert_allclose(found, expected, rtol=0, atol=3e-6 * np.abs(expected).max())


def test_causality_by_gradient(tiny_llama: cj.LanguageModel) -> None:
    """Logits move with a token's embedding exactly if the token is theirs or an earlier one of the same segment."""
    t = 16
    tokens = np.arange(t, dtype=np.int32)[None]  # all different: row i of the embedding is the token at i
    segment_ids = np.repeat([1, 2, 0], [7, 6, 3])
    positions = np.concatenate([np.arange(7), np.arange(6), np.arange(3)])[None]
    weight = np.random.default_rng(0).standard_normal(tiny_llama.config.embed_dim).astype(np.float32)
    cartridge = random_cartridge(tiny_llama, 3)

    @jax.jit
    @jax.jacrev
    def reach(embed: jax.Array, keys: jax.Array) -> jax.Array:
        hidden = hidden_states(
            {**tiny_llama.params, "embed": embed},
            tokens,
            segment_ids[None],
            positions,
            keys,
            cartridge.values,
            cartridge.bias,
            offset=cartridge.offset,
            config=tiny_llama.config,
        )
        return hidden[0] @ weight  # [t]

    moved = np.abs(reach(tiny_llama.params["embed"], cartridge.keys)[:, :t]).sum(-1) > 0
    causal = (segment_ids[:, None] == segment_ids) & np.tri(t, dtype=bool)
    assert_array_equal(moved, causal)


def test_tokens_stand_behind_the_slots(tiny_llama: cj.LanguageModel) -> None:
    """Token i is rotated at p + i: with three more slots of no weight, queries turn three places further."""
    tokens, cartridge = fixed_tokens(8)[None], random_cartridge(tiny_llama, 4)
    nowhere = jnp.full((*cartridge.keys.shape[:1], 3, cartridge.keys.shape[2]), -jnp.inf)
    padded = cj.Cartridge(
        *(jnp.concatenate([a, jnp.zeros_like(a[:, :3])], 1) for a in (cartridge.keys, cartridge.values)),
        jnp.concatenate([cartridge.bias, nowhere], 1),
    )
    positions = np.arange(8)[None]
    shifted = tiny_llama.logits(tokens, positions=positions + 3, cartridge=cartridge)
    assert_allclose(tiny_llama.logits(tokens, cartridge=padded), shifted, rtol=0, atol=TOLERANCE)
    assert np.abs(tiny_llama.logits(tokens, cartridge=cartridge) - shifted).max() > 0.01


def test_implementations_and_remat_agree(tiny_model: cj.LanguageModel) -> None:
    tokens, cartridge = jnp.asarray(fixed_tokens())[None], random_cartridge(tiny_model, 7)
    run = functools.partial(
        jax.jit(hidden_states, static_argnames=("config", "implementation", "remat")),
        tiny_model.params,
        tokens,
        jnp.ones_like(tokens),
        jnp.arange(tokens.shape[1])[None],
        *cartridge.prefix,
        *cartridge.placement,
        config=tiny_model.config,
    )
    for options in ({"implementation": "reference"}, {"remat": "elementwise"}):
        assert_allclose(run(**options), run(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("spec", ["btd,dnh->btnh", "btnh,nhd->btd", "btd,df->btf"])
def test_a_dense_weight_multiplies_as_einsum_does_and_is_frozen(spec: str) -> None:
    sizes = {"b": 2, "t": 3, "d": 8, "n": 2, "h": 4, "f": 16}
    rng = np.random.default_rng(0)
    x_axes, w_axes, y_axes = spec.replace("->", ",").split(",")
    x, w, dy = (
        jnp.asarray(rng.standard_normal([sizes[a] for a in axes]), jnp.float32) for axes in (x_axes, w_axes, y_axes)
    )
    y, pullback = jax.vjp(lambda x, w: Dense(w).matmul(x, spec), x, w)
    plain, plain_pullback = jax.vjp(functools.partial(jnp.einsum, spec), x, w)
    assert_allclose(y, plain, rtol=1e-6)
    dx, dw = pullback(dy)
    assert_allclose(dx, plain_pullback(dy)[0], rtol=1e-5, atol=1e-6)
    assert not np.asarray(dw).any()


def test_a_dense_weight_multiplies_bfloat16_and_adds_up_in_float32() -> None:
    """In both passes: a float32 gradient times a bfloat16 weight would be a float32 product, or a slow mixed one."""
    weight = jnp.ones((8, 4), jnp.bfloat16)

    def both_passes(x: jax.Array, dy: jax.Array) -> Any:
        return jax.vjp(lambda x, w: Dense(w).matmul(x, "btd,df->btf"), x, weight)[1](dy)

    program = jax.make_jaxpr(both_passes)(jnp.ones((1, 2, 8)), jnp.ones((1, 2, 4)))
    text = str(program)
    products = [line for line in text.splitlines() if "dot_general[" in line]
    assert len(products) == 2 and text.count("preferred_element_type=float32") == 2
    assert text.count("new_dtype=bfloat16") == 2, "of the two inputs, x and dy"
    assert "f32[8,4]" not in text, "the weight is never widened"
    assert program.out_avals[0].dtype == jnp.float32


def test_bfloat16_stays_near_float32(tiny_llama: cj.LanguageModel) -> None:
    """Not a parity test: rounding of 2^-9 at each of a dozen places leaves a few percent of the logits' spread."""
    tokens = fixed_tokens()[None]
    half = dataclasses.replace(tiny_llama, params=jax.tree.map(lambda a: a.astype(jnp.bfloat16), tiny_llama.params))
    expected = np.asarray(tiny_llama.logits(tokens))
    found = half.logits(tokens, cartridge=None)
    assert found.dtype == jnp.float32
    assert np.abs(found - expected).max() < 0.1 * expected.std()
    keys, _ = keys_and_values(half.params, jnp.asarray(tokens[0]), config=half.config)
    assert keys.dtype == jnp.bfloat16
    assert cj.Cartridge.from_tokens(half, tokens[0].tolist()).keys.dtype == jnp.float32


def test_what_logits_refuse(tiny_llama: cj.LanguageModel) -> None:
    window = tiny_llama.config.max_position_embeddings
    with pytest.raises(UserError, match=f"an offset of 4 and {window} tokens exceed tiny llama's window of {window}"):
        tiny_llama.logits(np.zeros((1, window), np.int32), cartridge=random_cartridge(tiny_llama, 4))
    other = random_cartridge(tiny_llama, 4)
    with pytest.raises(UserError, match=r"expected \(3, 4, 2, 16\) as \[layers, slots, kv heads, head size\]"):
        tiny_llama.logits(fixed_tokens()[None], cartridge=other.replace(keys=other.keys[..., :8]))
    with pytest.raises(UserError, match=r"bias is \(3, 4\), expected \(3, 4, 2\)"):
        tiny_llama.logits(fixed_tokens()[None], cartridge=other.replace(bias=other.bias[..., 0]))
    with pytest.raises(UserError, match="a cartridge needs at least one"):
        cj.Cartridge.from_tokens(tiny_llama, [])
    with pytest.raises(UserError, match=f"exceed tiny llama's window of {window}: cut the text"):
        cj.Cartridge.from_tokens(tiny_llama, [0] * (window + 1))


def test_random_params_have_the_shapes_of_loaded_ones(tiny_model: cj.LanguageModel) -> None:
    drawn = init_params(tiny_model.config, jax.random.key(0), jnp.bfloat16)
    assert jax.tree.map(jnp.shape, drawn) == jax.tree.map(jnp.shape, tiny_model.params)
    assert head_weights(drawn).dtype == jnp.bfloat16
    assert (head_weights(drawn) is drawn["embed"]) == tiny_model.config.tie_embeddings
