"""The only jitted code of serving: a static cache of slots, and the four things done to it.

A slot is one row of every layer's cache. A cartridge is copied to the row's first p positions (its keys are already
rotated for them) and a request's tokens follow at p, p+1, …, so that attention sees one contiguous cache. Layers are
unrolled, each with its own weights and cache: a scanned stack would be copied at every step on a CPU.

Axis letters: b slots, t tokens, s cache position, n query heads, k kv heads, g = n/k, h head size, v vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from cartridges_jax.models.config import ModelConfig
from cartridges_jax.models.language_model import LanguageModel, no_prefix
from cartridges_jax.models.transformer import Params, block_of, head_weights, rms_norm, rope_tables
from cartridges_jax.serving import scoring
from cartridges_jax.serving.sampling import Sampling, sample
from cartridges_jax.serving.scheduler import Prefix, Sampled, Scored, SlotInput

PREFILL_SIZES = (
    16,
    32,
    64,
    128,
    256,
)  # tokens of one prefill program; fewer are padded, and the padding is not written


@flax.struct.dataclass
class Layer:
    """One layer's weights and its rows of the cache."""

    keys: Float[Array, "b k s h"]
    values: Float[Array, "b k s h"]
    bias: Float[Array, "b k s"]  # log-weight of each position's score: a cartridge's, else zero


class Engine:
    """Slots on the device. One thread calls it; `max_length` counts cartridge slots, prompt and answer of a slot."""

    def __init__(self, model: LanguageModel, num_slots: int = 16, max_length: int = 2048, max_top_logprobs: int = 20):
        if max_length > model.config.window:
            raise ValueError(
                f"max_length is {max_length}, expected at most {model.name}'s window, {model.config.window}"
            )
        if num_slots < 1:
            raise ValueError(f"num_slots is {num_slots}, expected at least 1")
        self.num_slots, self.max_length, self.max_top_logprobs = num_slots, max_length, max_top_logprobs
        self._config = model.config
        self._blocks = _unstacked(model.params["blocks"], model.config.num_layers)
        self._top = {name: leaf for name, leaf in model.params.items() if name != "blocks"}
        shape = (num_slots, model.config.num_kv_heads, max_length)
        dtype = self._top["embed"].dtype
        self._cache = [
            Layer(
                jnp.zeros((*shape, model.config.head_dim), dtype),
                jnp.zeros((*shape, model.config.head_dim), dtype),
                jnp.zeros(shape, jnp.float32),
            )
            for _ in range(model.config.num_layers)
        ]

    def clear(self, slot: int, prefix: Prefix | None) -> None:
        """The slot now holds the cartridge's p positions, or nothing."""
        if prefix is not None:
            cartridge: Any = prefix.cartridge
            keys, values, bias = cartridge.checked(self._config).prefix
            if bias is None:
                bias = jnp.zeros(keys.shape[:3])
            self._cache = _insert(self._cache, slot, keys, values, bias)
        else:
            self._cache = _clear_bias(self._cache, slot)

    def copy(self, source: int, target: int) -> None:
        """The target's cache becomes a copy of the source's."""
        self._cache = _copy(self._cache, source, target)

    def prefill(self, slot: int, tokens: Sequence[int], position: int) -> None:
        """Writes the keys and values of `tokens` at cache positions `position`, `position` + 1, …"""
        for start in range(0, len(tokens), PREFILL_SIZES[-1]):
            part = tokens[start : start + PREFILL_SIZES[-1]]
            size = next(s for s in PREFILL_SIZES if s >= len(part))
            padded_t = np.zeros(size, np.int32)
            padded_t[: len(part)] = part
            self._cache = _prefill(
                self._top, self._blocks, self._cache, slot, padded_t, position + start, len(part), config=self._config
            )

    def decode(self, inputs: Sequence[SlotInput]) -> list[Sampled]:
        """Writes each input's token at its position and samples the token that follows it."""
        # positions of slots that are not in use lie past the cache, where writes are dropped
        token_b = np.zeros(self.num_slots, np.int32)
        position_b = np.full(self.num_slots, self.max_length, np.int32)
        temperature_b, top_p_b = np.zeros(self.num_slots, np.float32), np.ones(self.num_slots, np.float32)
        top_k_b, seed_b, step_b = (np.zeros(self.num_slots, np.int32) for _ in range(3))
        for i in inputs:
            token_b[i.slot], position_b[i.slot] = i.token, i.position
            temperature_b[i.slot], top_p_b[i.slot], top_k_b[i.slot] = i.temperature, i.top_p, i.top_k
            seed_b[i.slot], step_b[i.slot] = i.seed & 0x7FFFFFFF, i.step
        self._cache, sampled = _decode(
            self._top,
            self._blocks,
            self._cache,
            token_b,
            position_b,
            Sampling(temperature_b, top_p_b, top_k_b, seed_b, step_b),
            config=self._config,
            num_top=self.max_top_logprobs,
        )
        tokens, logprobs, top_ids, top_logprobs = (a.tolist() for a in jax.device_get(sampled))
        return [
            Sampled(tokens[i.slot], logprobs[i.slot], tuple(top_ids[i.slot]), tuple(top_logprobs[i.slot]))
            for i in inputs
        ]

    def score(self, tokens: Sequence[int], prefix: Prefix | None, num_top: int) -> list[Scored]:
        """Every token but the first, as the model would have sampled it; no slot is touched."""
        cartridge: Any = prefix and prefix.cartridge
        slots = cartridge.checked(self._config).prefix if cartridge else no_prefix(self._config)
        return scoring.score(self._top, self._blocks, slots, tokens, num_top, self._config)

    def warmup(self) -> None:
        """Compiles every program but those that depend on a cartridge's size; slot 0 holds rubbish afterwards."""
        for size in PREFILL_SIZES:
            if size <= self.max_length:
                self.prefill(0, [0] * size, 0)
        self.copy(0, self.num_slots - 1)
        self.decode([SlotInput(0, 0, 0, 0.0, 1.0, 0, 0, 0)])


@functools.partial(jax.jit, static_argnames="num_layers")
def _unstacked(blocks: Params, num_layers: int) -> list[Params]:
    return [jax.tree.map(lambda leaf, i=i: leaf[i], blocks) for i in range(num_layers)]


@functools.partial(jax.jit, donate_argnums=0)
def _insert(cache: list[Layer], slot: Int[Array, ""], keys: Array, values: Array, bias: Array) -> list[Layer]:
    def write(row: Array, l: int, new_lpk: Array) -> Array:
        new = jnp.swapaxes(new_lpk[l], 0, 1)[None].astype(row.dtype)
        return jax.lax.dynamic_update_slice(row, new, (slot,) + (0,) * (row.ndim - 1))

    return [
        Layer(write(c.keys, l, keys), write(c.values, l, values), write(c.bias.at[slot].set(0), l, bias))
        for l, c in enumerate(cache)
    ]


@functools.partial(jax.jit, donate_argnums=0)
def _clear_bias(cache: list[Layer], slot: Int[Array, ""]) -> list[Layer]:
    return [c.replace(bias=c.bias.at[slot].set(0)) for c in cache]


@functools.partial(jax.jit, donate_argnums=0)
def _copy(cache: list[Layer], source: Int[Array, ""], target: Int[Array, ""]) -> list[Layer]:
    return jax.tree.map(lambda row: row.at[target].set(row[source]), cache)


@functools.partial(jax.jit, static_argnames="config", donate_argnums=2)
def _prefill(
    top: Params,
    blocks: list[Params],
    cache: list[Layer],
    slot: Int[Array, ""],
    tokens: Int[Array, " t"],
    position: Int[Array, ""],
    length: Int[Array, ""],
    *,
    config: ModelConfig,
) -> list[Layer]:
    t = tokens.shape[0]
    positions_t = position + jnp.arange(t)
    rope = rope_tables(positions_t[None], config)
    x_1td = top["embed"][tokens[None]]
    new_cache = []
    for block, layer in zip(blocks, cache, strict=True):
        max_length = layer.keys.shape[2]
        write_t = jnp.where(jnp.arange(t) < length, positions_t, max_length)
        visible_1ts = (jnp.arange(max_length) <= positions_t[:, None])[None]

        def attend(
            q: Array, k: Array, v: Array, layer: Layer = layer, write_t: Array = write_t, visible: Array = visible_1ts
        ) -> tuple[Array, Layer]:
            keys = layer.keys.at[slot, :, write_t].set(k[0], mode="drop")
            values = layer.values.at[slot, :, write_t].set(v[0], mode="drop")
            row = jax.tree.map(lambda a: a[slot][None], Layer(keys, values, layer.bias))
            return cache_attention(q, row, visible), layer.replace(keys=keys, values=values)

        x_1td, layer = block_of(config, block)(x_1td, rope, attend)
        new_cache.append(layer)
    return new_cache


@functools.partial(jax.jit, static_argnames=("config", "num_top"), donate_argnums=2)
def _decode(
    top: Params,
    blocks: list[Params],
    cache: list[Layer],
    tokens: Int[Array, " b"],
    positions: Int[Array, " b"],
    sampling: Sampling,
    *,
    config: ModelConfig,
    num_top: int,
) -> tuple[list[Layer], Any]:
    b = tokens.shape[0]
    rope = rope_tables(positions[:, None], config)
    x_b1d = top["embed"][tokens[:, None]]
    visible_b1s = (jnp.arange(cache[0].keys.shape[2]) <= positions[:, None])[:, None]
    new_cache = []
    for block, layer in zip(blocks, cache, strict=True):

        def attend(q: Array, k: Array, v: Array, layer: Layer = layer) -> tuple[Array, Layer]:
            layer = layer.replace(
                keys=layer.keys.at[jnp.arange(b), :, positions].set(k[:, 0], mode="drop"),
                values=layer.values.at[jnp.arange(b), :, positions].set(v[:, 0], mode="drop"),
            )
            return cache_attention(q, layer, visible_b1s), layer

        x_b1d, layer = block_of(config, block)(x_b1d, rope, attend)
        new_cache.append(layer)
    hidden_bd = rms_norm(x_b1d[:, 0], top["final_norm"], config.norm_eps)
    logits_bv = jnp.einsum("bd,vd->bv", hidden_bd, head_weights(top), preferred_element_type=jnp.float32)
    return new_cache, sample(logits_bv, sampling, num_top)


def cache_attention(q: Float[Array, "b t n h"], layer: Layer, visible: Bool[Array, "b t s"]) -> Float[Array, "b t n h"]:
    """Queries over their own slot's cache. Scores lie as [s, queries]: the cache is then read once, along its rows."""
    b, t, n, h = q.shape
    kv_heads = layer.keys.shape[1]
    g = n // kv_heads
    q_bkqh = (q * h**-0.5).reshape(b, t, kv_heads, g, h).transpose(0, 2, 1, 3, 4).reshape(b, kv_heads, t * g, h)
    scores_bksq = jnp.einsum("bksh,bkqh->bksq", layer.keys, q_bkqh, preferred_element_type=jnp.float32)
    visible_b1sq = jnp.repeat(visible.transpose(0, 2, 1), g, axis=-1)[:, None]
    scores_bksq = jnp.where(visible_b1sq, scores_bksq + layer.bias[..., None], -1e30)
    weights_bksq = jax.nn.softmax(scores_bksq, axis=2).astype(layer.values.dtype)
    o_bkqh = jnp.einsum("bksq,bksh->bkqh", weights_bksq, layer.values, preferred_element_type=jnp.float32)
    return o_bkqh.reshape(b, kv_heads, t, g, h).transpose(0, 2, 1, 3, 4).reshape(b, t, n, h).astype(q.dtype)
