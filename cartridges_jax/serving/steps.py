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

from cartridges_jax.kernels.decode_attention import new_pages
from cartridges_jax.kernels.decode_attention.pages import AttentionMetadata, Pages
from cartridges_jax.models.config import ModelConfig
from cartridges_jax.models.params import decode_specs
from cartridges_jax.parallel import collectives, sharding
from cartridges_jax.serving.decoder import Step, Weights, forward, logits
from cartridges_jax.serving.metadata import PAGE_SIZE
from cartridges_jax.serving.sampling import SamplingParams, normalizer, sample

# Everything about a step lies on every device; of a cartridge's heads each has those that its query heads read.
STEP = Step(P(), P(), AttentionMetadata(*[P()] * 4, sharding.CARTRIDGE, P()))  # type: ignore[arg-type]


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def empty_cache(
    config: ModelConfig, num_pages: int, dtype: Any, mesh: Mesh, implementation: str | None = None
) -> list[Pages]:
    """Makes empty pages for every layer, as an implementation of `decode_attention` has them."""

    def local() -> list[Pages]:
        sizes = num_pages, collectives.num_local_kv_heads(config), PAGE_SIZE, config.head_dim
        return [new_pages(*sizes, dtype, implementation) for _ in range(config.num_layers)]

    return sharding.on_mesh(local, mesh, (), sharding.PAGES)()


@functools.partial(jax.jit, static_argnames="mesh", donate_argnums=0)
def load_page(
    cache: list[Pages],
    page: Int[Array, ""],
    keys: Float[Array, "l k z h"],
    values: Float[Array, "l k z h"],
    bias: Float[Array, "l k z"],
    *,
    mesh: Mesh,
) -> list[Pages]:
    """Writes a part of a cartridge to a page."""

    def local(cache: list[Pages], page: Array, *slots: Array) -> list[Pages]:
        return [pages.load(page, *part) for pages, *part in zip(cache, *slots, strict=True)]

    in_specs = sharding.PAGES, P(), *[sharding.PAGES] * 3
    return sharding.on_mesh(local, mesh, in_specs, sharding.PAGES)(cache, page, keys, values, bias)


@functools.partial(jax.jit, static_argnames="mesh", donate_argnums=0)
def copy_page(
    cache: list[Pages], source: Int[Array, ""], target: Int[Array, ""], count: Int[Array, ""], *, mesh: Mesh
) -> list[Pages]:
    """Makes the target page a copy of the source's first `count` positions."""

    def local(cache: list[Pages], *which: Array) -> list[Pages]:
        return [pages.copy(*which) for pages in cache]

    return sharding.on_mesh(local, mesh, (sharding.PAGES, *[P()] * 3), sharding.PAGES)(cache, source, target, count)


@functools.partial(jax.jit, static_argnames="mesh", donate_argnums=0)
def clear_page(values: list[Array], page: Int[Array, ""], *, mesh: Mesh) -> list[Array]:
    """Sets the values of a page to zeros in every layer."""

    def local(values: list[Array], page: Array) -> list[Array]:
        return [layer.at[page].set(0) for layer in values]

    return sharding.on_mesh(local, mesh, (sharding.PAGES, P()), sharding.PAGES)(values, page)


@functools.partial(jax.jit, static_argnames=("config", "mesh", "implementation"), donate_argnums=1)
def prefill_step(
    weights: Weights,
    cache: list[Pages],
    step: Step,
    *,
    config: ModelConfig,
    mesh: Mesh,
    implementation: str | None = None,
) -> list[Pages]:
    """Writes the keys and values of a chunk of a prompt."""

    def local(weights: Weights, cache: list[Pages], step: Step) -> list[Pages]:
        return forward(weights, cache, step, config, implementation)[1]

    in_specs = sharding.fitted(weights, decode_specs(config), mesh), sharding.PAGES, STEP
    return sharding.on_mesh(local, mesh, in_specs, sharding.PAGES)(weights, cache, step)


@functools.partial(jax.jit, static_argnames=("config", "mesh", "num_top", "implementation"), donate_argnums=(1, 2))
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
    implementation: str | None = None,
) -> tuple[list[Pages], Array, Any]:
    """Writes a token of each request and samples the token that follows it.

    Args:
      last: the last token of each sequence of the engine, which a token of -1 in `step` stands for.
      indices: the sequences in `last` to which the rows of the batch belong; a row that only pads has none.
    """

    def local(weights: Weights, cache: list[Pages], last: Array, indices: Array, step: Step, params: SamplingParams):
        tokens = jnp.where(step.tokens < 0, last[indices][:, None], step.tokens)
        hidden_b1d, cache = forward(weights, cache, step.replace(tokens=tokens), config, implementation)
        sampled = sample(logits(weights, hidden_b1d[:, 0]), params, num_top)
        return cache, last.at[indices].set(sampled[0], mode="drop"), sampled

    in_specs = sharding.fitted(weights, decode_specs(config), mesh), sharding.PAGES, P(), P(), STEP, P()
    run = sharding.on_mesh(local, mesh, in_specs, (sharding.PAGES, P(), P()))
    return run(weights, cache, last, indices, step, sampling_params)


@functools.partial(jax.jit, static_argnames=("config", "mesh", "num_top", "implementation"), donate_argnums=1)
def score_step(
    weights: Weights,
    cache: list[Pages],
    step: Step,
    following: Int[Array, " t"],
    *,
    config: ModelConfig,
    mesh: Mesh,
    num_top: int,
    implementation: str | None = None,
) -> tuple[list[Pages], Any]:
    """Writes a chunk of a prompt and scores the token that follows each of its tokens."""

    def local(weights: Weights, cache: list[Pages], step: Step, following: Array) -> tuple[list[Pages], Any]:
        hidden_1td, cache = forward(weights, cache, step, config, implementation)
        logits_tv = logits(weights, hidden_1td[0])
        normalizer_t1 = normalizer(logits_tv)
        own_t1 = jnp.take_along_axis(logits_tv, following[:, None], axis=-1)
        top_tj, ids_tj = jax.lax.top_k(logits_tv, num_top)
        rank_t = 1 + (logits_tv > own_t1).sum(-1)
        return cache, ((own_t1 - normalizer_t1)[:, 0], rank_t, ids_tj, top_tj - normalizer_t1)

    in_specs = sharding.fitted(weights, decode_specs(config), mesh), sharding.PAGES, STEP, P()
    return sharding.on_mesh(local, mesh, in_specs, (sharding.PAGES, P()))(weights, cache, step, following)
