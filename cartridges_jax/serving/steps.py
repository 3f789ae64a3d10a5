"""The jitted programs of serving: what is done to the pages of keys and values on the device.

Each takes arrays of fixed sizes, so that a handful of compiled programs serves every mixture of requests.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from cartridges_jax.kernels.prefix_decode_attention import Pages
from cartridges_jax.models.config import ModelConfig
from cartridges_jax.models.params import decode_specs
from cartridges_jax.parallel import collectives, sharding
from cartridges_jax.serving.decoder import Step, Weights, forward, logits
from cartridges_jax.serving.metadata import PAGE_SIZE
from cartridges_jax.serving.sampling import SamplingParams, normalizer, sample


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def new_pages(config: ModelConfig, num_pages: int, dtype: Any, mesh: Mesh) -> list[Pages]:
    """Makes empty pages for every layer."""

    def local() -> list[Pages]:
        k = collectives.num_local_kv_heads(config)
        return [
            Pages(
                jnp.zeros((num_pages, k, config.head_dim, PAGE_SIZE), dtype),
                jnp.zeros((num_pages, k, PAGE_SIZE, config.head_dim), dtype),
                jnp.zeros((num_pages, k, PAGE_SIZE), jnp.float32),
            )
            for _ in range(config.num_layers)
        ]

    return sharding.on_mesh(local, mesh, (), sharding.PAGES)()


@functools.partial(jax.jit, static_argnames=("config", "mesh"), donate_argnums=0)
def load_page(
    cache: list[Pages],
    page: Int[Array, ""],
    keys: Float[Array, "l z k h"],
    values: Float[Array, "l z k h"],
    bias: Float[Array, "l z k"],
    *,
    config: ModelConfig,
    mesh: Mesh,
) -> list[Pages]:
    """Writes a part of a cartridge to a page."""

    def local(cache: list[Pages], page: Int[Array, ""], slots: tuple[Array, Array, Array]) -> list[Pages]:
        keys, values, bias = collectives.local_kv_heads(slots, config, axis=2)
        return [
            Pages(
                pages.keys.at[page].set(keys[l].transpose(1, 2, 0).astype(pages.keys.dtype)),
                pages.values.at[page].set(values[l].swapaxes(0, 1).astype(pages.values.dtype)),
                pages.bias.at[page].set(bias[l].T),
            )
            for l, pages in enumerate(cache)
        ]

    slots = keys, values, bias
    in_specs = sharding.PAGES, P(), sharding.fitted(slots, sharding.CARTRIDGE, mesh)
    return sharding.on_mesh(local, mesh, in_specs, sharding.PAGES)(cache, page, slots)


@functools.partial(jax.jit, static_argnames="mesh", donate_argnums=0)
def copy_page(
    cache: list[Pages], source: Int[Array, ""], target: Int[Array, ""], count: Int[Array, ""], *, mesh: Mesh
) -> list[Pages]:
    """Makes the target page a copy of the source's first `count` positions."""

    def local(cache: list[Pages], source: Array, target: Array, count: Array) -> list[Pages]:
        is_copied_z1 = jnp.arange(PAGE_SIZE)[:, None] < count
        return [
            Pages(
                pages.keys.at[target].set(pages.keys[source]),
                pages.values.at[target].set(jnp.where(is_copied_z1, pages.values[source], 0)),
                pages.bias.at[target].set(pages.bias[source]),
            )
            for pages in cache
        ]

    return sharding.on_mesh(local, mesh, (sharding.PAGES, *[P()] * 3), sharding.PAGES)(cache, source, target, count)


@functools.partial(jax.jit, static_argnames="mesh", donate_argnums=0)
def clear_page(values: list[Array], page: Int[Array, ""], *, mesh: Mesh) -> list[Array]:
    """Sets the values of a page to zeros in every layer."""

    def local(values: list[Array], page: Array) -> list[Array]:
        return [layer.at[page].set(0) for layer in values]

    return sharding.on_mesh(local, mesh, (sharding.PAGES, P()), sharding.PAGES)(values, page)


@functools.partial(jax.jit, static_argnames=("config", "mesh"), donate_argnums=1)
def prefill_step(weights: Weights, cache: list[Pages], step: Step, *, config: ModelConfig, mesh: Mesh) -> list[Pages]:
    """Writes the keys and values of a chunk of a prompt."""

    def local(weights: Weights, cache: list[Pages], step: Step) -> list[Pages]:
        return forward(weights, cache, step, config)[1]

    in_specs = sharding.fitted(weights, decode_specs(config), mesh), sharding.PAGES, P()
    return sharding.on_mesh(local, mesh, in_specs, sharding.PAGES)(weights, cache, step)


@functools.partial(jax.jit, static_argnames=("config", "mesh", "num_top"), donate_argnums=(1, 2))
def decode_step(
    weights: Weights,
    cache: list[Pages],
    last: Int[Array, " seqs"],
    indices: Int[Array, " b"],
    step: Step,
    sampling_params: SamplingParams,
    *,
    config: ModelConfig,
    mesh: Mesh,
    num_top: int,
) -> tuple[list[Pages], Array, Any]:
    """Writes a token of each request and samples the token that follows it.

    Args:
      last: the last token of each sequence of the engine, which a token of -1 in `step` stands for.
      indices: the sequences in `last` to which the rows of the batch belong; a row that only pads has none.
    """

    def local(weights: Weights, cache: list[Pages], last: Array, indices: Array, step: Step, params: SamplingParams):
        tokens = jnp.where(step.tokens < 0, last[indices][:, None], step.tokens)
        hidden_bd, cache = forward(weights, cache, step.replace(tokens=tokens), config)
        sampled = sample(logits(weights, hidden_bd), params, num_top)
        return cache, last.at[indices].set(sampled[0], mode="drop"), sampled

    in_specs = sharding.fitted(weights, decode_specs(config), mesh), sharding.PAGES, *[P()] * 4
    run = sharding.on_mesh(local, mesh, in_specs, (sharding.PAGES, P(), P()))
    return run(weights, cache, last, indices, step, sampling_params)


@functools.partial(jax.jit, static_argnames=("config", "mesh", "num_top"), donate_argnums=1)
def score_step(
    weights: Weights,
    cache: list[Pages],
    step: Step,
    following: Int[Array, " t"],
    *,
    config: ModelConfig,
    mesh: Mesh,
    num_top: int,
) -> tuple[list[Pages], Any]:
    """Writes a chunk of a prompt and scores the token that follows each of its tokens."""

    def local(weights: Weights, cache: list[Pages], step: Step, following: Array) -> tuple[list[Pages], Any]:
        hidden_td, cache = forward(weights, cache, step, config)
        logits_tv = logits(weights, hidden_td)
        normalizer_t1 = normalizer(logits_tv)
        own_t1 = jnp.take_along_axis(logits_tv, following[:, None], axis=-1)
        top_tj, ids_tj = jax.lax.top_k(logits_tv, num_top)
        rank_t = 1 + (logits_tv > own_t1).sum(-1)
        return cache, ((own_t1 - normalizer_t1)[:, 0], rank_t, ids_tj, top_tj - normalizer_t1)

    in_specs = sharding.fitted(weights, decode_specs(config), mesh), sharding.PAGES, P(), P()
    return sharding.on_mesh(local, mesh, in_specs, (sharding.PAGES, P()))(weights, cache, step, following)
