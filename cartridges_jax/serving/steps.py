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
from cartridges_jax.serving.logits_processors import LogitsParams, LogitsState, allowed, process
from cartridges_jax.serving.metadata import PAGE_SIZE
from cartridges_jax.serving.sampling import NEVER, Wants, normalizer, sample
from cartridges_jax.serving.sequences import DecodeBatch

# Everything about a step lies on every device; of a cartridge's heads each has those that its query heads read.
METADATA = AttentionMetadata(*[P()] * 4, sharding.CARTRIDGE, sharding.CARTRIDGE)  # type: ignore[arg-type]
STEP, BATCH = Step(P(), P(), METADATA), DecodeBatch(P(), P(), METADATA, P())  # type: ignore[arg-type]


@functools.partial(jax.jit, static_argnames="mesh")
def put(tree: Any, *, mesh: Mesh) -> Any:
    """Brings a `DecodeBatch`, or an array that every device has, to the devices: by one call for all its arrays."""
    specs = BATCH if isinstance(tree, DecodeBatch) else P()
    return sharding.on_mesh(lambda tree: tree, mesh, (specs,), specs)(tree)


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
    keys: Float[Array, "devices e z h"],
    values: Float[Array, "devices e z h"],
    bias: Float[Array, "devices e z"],
    *,
    mesh: Mesh,
) -> Pages:
    """Writes a part of a cartridge, for each device of `tensor` its own, to `count` head pages from `first` on."""

    def local(cache: Pages, first: Array, count: Array, *slots: Array) -> Pages:
        return cache.load(first, count, *(part[0] for part in slots))

    in_specs = sharding.PAGES, P(), P(), *[P("tensor")] * 3
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
    jax.jit, static_argnames=("config", "mesh", "num_top", "implementation", "wants"), donate_argnums=(1, 2)
)
def decode_step(
    weights: Weights,
    cache: Pages,
    last: Int[Array, " seqs"],
    batch: DecodeBatch,
    *,
    config: ModelConfig,
    mesh: Mesh,
    num_top: int,
    implementation: str | None = None,
    wants: Wants | None = None,
) -> tuple[Pages, Array, Any, Any]:
    """Writes a token of each request and samples the token that follows it.

    Args:
      last: the last token of each sequence of the engine.
      wants: what requests want of their sampling, if the host knows it (`sampling.sample`).

    Returns:
      The pages, the last tokens, the numbers of the batch's next step (`DecodeBatch.advancing`), and what is sampled.
    """

    def local(weights: Weights, cache: Pages, last: Array, batch: DecodeBatch):
        logits_bv, cache = _next_logits(weights, cache, last, batch, config, implementation)
        last, sampled = _sampled(logits_bv, last, batch, num_top, wants)
        return cache, last, _advanced(batch), sampled

    in_specs = sharding.fitted(weights, decode_specs(config), mesh), sharding.PAGES, P(), BATCH
    run = sharding.on_mesh(local, mesh, in_specs, (sharding.PAGES, P(), P(), P()))
    return run(weights, cache, last, batch)


@functools.partial(jax.jit, static_argnames=("config", "mesh", "implementation"), donate_argnums=1)
def logits_step(
    weights: Weights,
    cache: Pages,
    last: Int[Array, " seqs"],
    batch: DecodeBatch,
    *,
    config: ModelConfig,
    mesh: Mesh,
    implementation: str | None = None,
) -> tuple[Pages, Any, Float[Array, "b v"]]:
    """The first half of `decode_step`: what it samples from."""

    def local(weights: Weights, cache: Pages, last: Array, batch: DecodeBatch):
        logits_bv, cache = _next_logits(weights, cache, last, batch, config, implementation)
        return cache, _advanced(batch), logits_bv

    in_specs = sharding.fitted(weights, decode_specs(config), mesh), sharding.PAGES, P(), BATCH
    run = sharding.on_mesh(local, mesh, in_specs, (sharding.PAGES, P(), P()))
    return run(weights, cache, last, batch)


@functools.partial(jax.jit, static_argnames=("num_top", "wants"), donate_argnums=(0, 4))
def sample_step(
    last: Int[Array, " seqs"],
    logits: Float[Array, "b v"],
    batch: DecodeBatch,
    mask: Int[Array, "b words"],
    state: LogitsState | None = None,
    logits_params: LogitsParams | None = None,
    *,
    num_top: int,
    wants: Wants | None = None,
) -> tuple[Array, Any, LogitsState | None]:
    """The other half, among the tokens whose bits are set in the mask, 32 in a word, the lowest first.

    With a state and the rows' parameters, logits are processed before; the tokens that are sampled are counted there.
    """
    if state is None or logits_params is None:
        processed_bv = jnp.where(allowed(mask, logits.shape[1]), logits, NEVER)
        return *_sampled(logits, last, batch, num_top, wants, processed_bv), None
    params, rows = batch.sampling_params, jax.tree.map(lambda of_all: of_all.at[batch.indices].get(mode="clip"), state)
    processed_bv = process(logits, rows, logits_params, params.temperature, params.step, mask)
    last, sampled = _sampled(logits, last, batch, num_top, wants, processed_bv)
    counts = state.counts.at[batch.indices, sampled[0]].add(1, mode="drop")
    return last, sampled, state.replace(counts=counts)


def _next_logits(
    weights: Weights, cache: Pages, last: Array, batch: DecodeBatch, config: ModelConfig, implementation: str | None
) -> tuple[Array, Pages]:
    metadata, z = batch.metadata, cache.page_size
    tokens_b = jnp.where(batch.tokens < 0, last[batch.indices], batch.tokens)
    column_b1 = (metadata.starts // z)[:, None]
    page_b = jnp.take_along_axis(metadata.block_table, column_b1, axis=1, mode="clip")[:, 0]
    num_pages = len(cache.bias) // metadata.heads  # one more than the last page's number: it is written nowhere
    slot_b = jnp.where(page_b < 0, num_pages, page_b) * z + metadata.starts % z
    hidden_b1d, cache = forward(
        weights, cache, Step(tokens_b[:, None], slot_b[:, None], metadata), config, implementation
    )
    return logits(weights, hidden_b1d[:, 0]), cache


def _sampled(
    logits_bv: Array,
    last: Array,
    batch: DecodeBatch,
    num_top: int,
    wants: Wants | None,
    processed_bv: Array | None = None,
) -> tuple[Array, Any]:
    sampled = sample(logits_bv, batch.sampling_params, num_top, wants, processed_bv)
    return last.at[batch.indices].set(sampled[0], mode="drop"), sampled


def _advanced(batch: DecodeBatch) -> tuple[Array, Array, Array]:
    tokens, starts, step = batch.advancing
    return jnp.full_like(tokens, -1), starts + 1, step + 1


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
