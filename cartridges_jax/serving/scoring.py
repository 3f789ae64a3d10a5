"""What the model thought of a prompt's own tokens: the log-probability of each and the best alternatives to it.

A pass of its own, outside the slots: a slot may hold a prompt's keys and values from before, but never its logits.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from cartridges_jax.kernels.prefix_attention import prefix_attention
from cartridges_jax.models.config import ModelConfig
from cartridges_jax.models.transformer import Params, block_of, head_weights, rms_norm, rope_tables
from cartridges_jax.serving.scheduler import Sampled, Scored

SHORTEST = 64  # prompts are padded to it and its doubles, a program each
LOGITS_AT_ONCE = 64  # tokens whose logits over the vocabulary exist together


def score(
    top: Params,
    blocks: list[Params],
    prefix: tuple[Array, Array, Array | None],
    tokens: Sequence[int],
    num_top: int,
    config: ModelConfig,
) -> list[Scored]:
    """One for every token but the first, which nothing predicts; `prefix` is a cartridge's keys, values and bias."""
    size = SHORTEST
    while size < len(tokens):
        size *= 2
    padded_t = np.zeros(size, np.int32)
    padded_t[: len(tokens)] = tokens
    scored = jax.device_get(_score(top, blocks, *prefix, padded_t, len(tokens), config=config, num_top=num_top))
    logprobs, ranks, top_ids, top_logprobs = (a.tolist() for a in scored)
    return [
        Scored(Sampled(tokens[i + 1], logprobs[i], tuple(top_ids[i]), tuple(top_logprobs[i])), ranks[i])
        for i in range(len(tokens) - 1)
    ]


@functools.partial(jax.jit, static_argnames=("config", "num_top"))
def _score(
    top: Params,
    blocks: list[Params],
    keys_lpkh: Array,
    values_lpkh: Array,
    bias_lpk: Array | None,
    tokens: Int[Array, " t"],
    length: Int[Array, ""],
    *,
    config: ModelConfig,
    num_top: int,
) -> tuple[Array, Array, Array, Array]:
    t = tokens.shape[0]
    segment_ids_1t = (jnp.arange(t) < length).astype(jnp.int32)[None]
    rope = rope_tables(keys_lpkh.shape[1] + jnp.arange(t)[None], config)
    x_1td = top["embed"][tokens[None]]
    for l, block in enumerate(blocks):

        def attend(q: Array, k: Array, v: Array, l: int = l) -> tuple[Array, None]:
            bias_pk = None if bias_lpk is None else bias_lpk[l]
            return prefix_attention(q, k, v, keys_lpkh[l], values_lpkh[l], segment_ids_1t, bias_pk), None

        x_1td, _ = block_of(config, block)(x_1td, rope, attend)
    hidden_td = rms_norm(x_1td[0], top["final_norm"], config.norm_eps)

    def one(inputs: tuple[Array, Array]) -> tuple[Array, Array, Array, Array]:
        hidden_d, token = inputs
        logits_v = jnp.einsum("d,vd->v", hidden_d, head_weights(top), preferred_element_type=jnp.float32)
        normalizer = jax.nn.logsumexp(logits_v)
        top_j, ids_j = jax.lax.top_k(logits_v, num_top)
        own = logits_v[token]
        return own - normalizer, 1 + (logits_v > own).sum(), ids_j, top_j - normalizer

    return jax.lax.map(one, (hidden_td, jnp.roll(tokens, -1)), batch_size=LOGITS_AT_ONCE)
