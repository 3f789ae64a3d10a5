"""What attention the tokens of a document receive, for each layer and kv head, from reference queries."""

from __future__ import annotations

import functools
from typing import Any

import einops
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from cartridges_jax.cartridge.arrays import Cartridge
from cartridges_jax.initial.chunks import Chunk
from cartridges_jax.kernels.prefix_attention import prefix_attention
from cartridges_jax.models.config import ModelConfig
from cartridges_jax.models.language_model import LanguageModel
from cartridges_jax.models.params import Params
from cartridges_jax.models.transformer import run_layers
from cartridges_jax.parallel import sharding


def measure_attention(model: LanguageModel, chunk: Chunk) -> Float[np.ndarray, "l k s"]:
    """Measures the attention that each of a chunk's tokens receives behind all of the chunk (`attention_received`)."""
    document = Cartridge.from_tokens(model, chunk.tokens)
    arrays = document.keys, document.values, *chunk.queries
    options: Any = {"config": model.config, "implementation": attention_for(model)}
    return sharding.gathered(_measure(model.params, *arrays, **options))


def attention_for(model: LanguageModel) -> str | None:
    """Names the attention for programs that XLA lays out over a mesh by itself, which it cannot do with a kernel."""
    return None if sharding.mesh_of(model.params).size == 1 else "xla"


@functools.partial(jax.jit, static_argnames=("config", "implementation"))
def _measure(
    params: Params,
    document_k: Float[Array, "l s k h"],  # at an offset of 0
    document_v: Float[Array, "l s k h"],
    tokens: Int[Array, "b t"],
    segment_ids: Int[Array, "b t"],
    positions: Int[Array, "b t"],
    *,
    config: ModelConfig,
    implementation: str | None,
) -> Float[Array, "l k s"]:
    is_query_bt = segment_ids > 0

    def attend(q_btnh: Array, k_btkh: Array, v_btkh: Array, document: Any, **options: Any) -> tuple[Array, Array]:
        keys_skh, values_skh = document
        q_kmh, is_query_m = by_head(q_btnh, is_query_bt, config)
        scale = options.get("scale", config.head_dim**-0.5)
        received_ks = jax.lax.map(
            lambda head: attention_received(*head, is_query_m, scale)[1], (q_kmh, keys_skh.transpose(1, 0, 2))
        )
        slots = keys_skh, values_skh, segment_ids, None, implementation
        return prefix_attention(q_btnh, k_btkh, v_btkh, *slots, **options), received_ks

    given = params, tokens, positions, attend, (document_k, document_v)
    return run_layers(*given, config=config, dtype=jnp.float32)[1]


def by_head(q: Float[Array, "b t n h"], is_query: Array, config: ModelConfig) -> tuple[Float[Array, "k m h"], Array]:
    """Returns the m queries of each kv head's group, and which of them are queries and no padding."""
    q_kmh = einops.rearrange(q, "b t (k g) h -> k (b t g) h", k=config.num_kv_heads)
    return q_kmh, jnp.repeat(is_query.reshape(-1), config.num_heads // config.num_kv_heads)


def attention_received(
    q: Float[Array, "m h"], k: Float[Array, "s h"], is_query: Array, scale: float | Array
) -> tuple[Float[Array, "m s"], Float[Array, " s"]]:
    """Returns the queries' probabilities, and what each token receives: their root mean square over the queries."""
    probs_ms = jax.nn.softmax(q @ k.T * scale, axis=-1) * is_query[:, None]
    return probs_ms, jnp.sqrt((probs_ms**2).mean(0))
