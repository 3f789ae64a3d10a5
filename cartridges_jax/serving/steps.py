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
STEP = Step(P(), P(), AttentionMetadata(*[P()] * 4, sharding.CARTRIDGE, sharding.CARTRIDGE))  # type: ignore[arg-type]


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def empty_cache(
    config: ModelConfig, num_pages: int, dtype: Any, mesh: Mesh, implementation: str | None = None
) -> Pages:
    """Makes empty pages, as an implementation of `decode_attention` has them."""

    def local() -> Pages:
        num_head_pages = num_pages * config.num_layers * collectives.num_local_kv_heads(config)
        return new_pages(num_head_pages, PAGE_SIZE, config.head_dim, dtype, implementation)

    return sharding.on_mesh(local, mesh, (), sharding.PAGES)()


@functools.partial(jax.jit, static_argnames="mesh", donate_argnums=0)
def load_slots(
    cache: Pages,
    first: Int[Array, ""],
    count: Int[Array, ""],
    keys: Float[Array, "e devices z h"],
    values: Float[Array, "e devices z h"],
    bias: Float[Array, "e devices z"],
    *,
    mesh: Mesh,
) -> Pages:
    """Writes a part of a cartridge, for each device of `tensor` its own, to `count` head pages from `first` on."""

    def local(cache: Pages, first: Array, count: Array, *slots: Array) -> Pages:
        return cache.load(first, count, *(part[:, 0] for part in slots))

    in_specs = sharding.PAGES, P(), P(), *[P(None, "tensor")] * 3
    run = sharding.on_mesh(local, mesh, in_specs, sharding.PAGES)
    return run(cache, first, count, keys, values, bias)


@functools.partial(jax.jit, static_argnames=("heads", "mesh"), donate_argnums=0)
def copy_page(
    cache: Pages, source: Int[Array, ""], target: Int[Array, ""], count: Int[Array, ""], *, heads: int, mesh: Mesh
) -> Pages:
    """Makes the target page, which has so many `heads` on each device, a copy of the source's first positions."""

    def local(cache: Pages, *which: Array) -> Pages:
        return cache.copy(*which, heads)

    return sharding.on_mesh(local, mesh, (sharding.PAGES, *[P()] * 3), sharding.PAGES)(cache, source, target, count)


@functools.partial(jax.jit, static_argnames=("heads", "mesh"), donate_argnums=0)
def clear_page(values: Array, page: Int[Array, ""], *, heads: int, mesh: Mesh) -> Array:
    """Sets the values of a page to zeros in every layer."""

    def local(values: Array, page: Array) -> Array:
        zeros = jnp.zeros((heads, *values.shape[1:]), values.dtype)
        return jax.lax.dynamic_update_slice_in_dim(values, zeros, page * heads, 0)

    return sharding.on_mesh(local, mesh, (sharding.PAGES, P()), sharding.PAGES)(values, page)


@functools.partial(jax.jit, static_argnames=("config", "mesh", "implementation"), donate_argnums=1)
def prefill_step(
    weights: Weights,
    cache: Pages,
    step: Step,
    *,
    config: ModelConfig,
    mesh: Mesh,
    implementation: str | None = None,
) -> Pages:
    """Writes the keys and values of a chunk of a prompt."""

    def local(weights: Weights, cache: Pages, step: Step) -> Pages:
        return forward(weights, cache, step, config, implementation)[1]

    in_specs = sharding.fitted(weights, decode_specs(config), mesh), sharding.PAGES, STEP
    return sharding.on_mesh(local, mesh, in_specs, sharding.PAGES)(weights, cache, step)


@functools.partial(
    jax.jit, static_argnames=("config", "mesh", "num_top", "implementation", "is_greedy"), donate_argnums=(1, 2)
)
def decode_step(
    weights: Weights,
    cache: Pages,
    last: Int[Array, " seqs"],
    indices: Int[Array, " b"],
    step: Step,
    sampling_params: SamplingParams,
    *,
    config: ModelConfig,
    mesh: Mesh,
    num_top: int,
    implementation: str | None = None,
    is_greedy: bool = False,
) -> tuple[Pages, Array, Any]:
    """Writes a token of each request and samples the token that follows it.

    Args:
      last: the last token of each sequence of the engine, which a token of -1 in `step` stands for.
      indices: the sequences in `last` to which the rows of the batch belong; a row that only pads has none.
      is_greedy: whether no request draws its token or wants alternatives (`sampling.sample`).
    """

    def local(weights: Weights, cache: Pages, last: Array, indices: Array, step: Step, params: SamplingParams):
        tokens = jnp.where(step.tokens < 0, last[indices][:, None], step.tokens)
        hidden_b1d, cache = forward(weights, cache, step.replace(tokens=tokens), config, implementation)
        sampled = sample(logits(weights, hidden_b1d[:, 0]), params, num_top, is_greedy)
        return cache, last.at[indices].set(sampled[0], mode="drop"), sampled

    in_specs = sharding.fitted(weights, decode_specs(config), mesh), sharding.PAGES, P(), P(), STEP, P()
    run = sharding.on_mesh(local, mesh, in_specs, (sharding.PAGES, P(), P()))
    return run(weights, cache, last, indices, step, sampling_params)


@functools.partial(jax.jit, static_argnames=("config", "mesh", "num_top", "implementation"), donate_argnums=1)
def score_step(
    weights: Weights,
    cache: Pages,
    step: Step,
    following: Int[Array, " t"],
    *,
    config: ModelConfig,
    mesh: Mesh,
    num_top: int,
    implementation: str | None = None,
) -> tuple[Pages, Any]:
    """Writes a chunk of a prompt and scores the token that follows each of its tokens."""

    def local(weights: Weights, cache: Pages, step: Step, following: Array) -> tuple[Pages, Any]:
        hidden_1td, cache = forward(weights, cache, step, config, implementation)
        logits_tv = logits(weights, hidden_1td[0])
        normalizer_t1 = normalizer(logits_tv)
        own_t1 = jnp.take_along_axis(logits_tv, following[:, None], axis=-1)
        top_tj, ids_tj = jax.lax.top_k(logits_tv, num_top)
        rank_t = 1 + (logits_tv > own_t1).sum(-1)
        return cache, ((own_t1 - normalizer_t1)[:, 0], rank_t, ids_tj, top_tj - normalizer_t1)

    in_specs = sharding.fitted(weights, decode_specs(config), mesh), sharding.PAGES, STEP, P()
    return sharding.on_mesh(local, mesh, in_specs, (sharding.PAGES, P()))(weights, cache, step, following)
