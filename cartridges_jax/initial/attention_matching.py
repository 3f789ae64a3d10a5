"""Attention matching: slots whose attention is fitted to that of the full document (arXiv 2602.16284).

It takes seconds. The queries are those of self-study conversations and of the document being repeated, which ask for
every token (`chunks.py`). For every layer and kv head, these steps follow:

1. Keep the tokens of the document that receive the most attention, as many as the head has slots (`budgets.py`).
2. Give each a bias, so that the slots' total weight matches the document's (non-negative least squares).
3. Move their values, so that attention's output matches (least squares).
4. With few slots, move their keys as well, in heads whose output is wrong even so (`keys.py`).

Layers are fitted in order, on the states that the slots fitted so far produce, so that later layers make up for what
earlier ones lost. A document longer than `chunk_tokens` is compacted in chunks, each as if it alone stood before the
question, and the chunks' cartridges are composed.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from cartridges_jax.cartridge.arrays import Cartridge
from cartridges_jax.cartridge.composition import compose
from cartridges_jax.cartridge.provenance import Provenance
from cartridges_jax.command_line.errors import UserError
from cartridges_jax.initial.budgets import BudgetConfig, head_lengths
from cartridges_jax.initial.chunks import Chunk, MatchingConfig, chunks_of
from cartridges_jax.initial.heads import attention_for, attention_received, by_head
from cartridges_jax.initial.keys import move_keys
from cartridges_jax.kernels.prefix_attention import prefix_attention
from cartridges_jax.models.config import ModelConfig
from cartridges_jax.models.language_model import LanguageModel
from cartridges_jax.models.params import Params
from cartridges_jax.models.transformer import run_layers
from cartridges_jax.parallel import sharding
from cartridges_jax.training.data import Example

NNLS_STEPS = 200
LARGEST_BIAS = 5.0  # in nats
RIDGE = 1e-3  # of the mean squared probability: how strongly a slot keeps its token's value where no query asks for it
AMPLE = 1 / 30  # of the tokens: so many slots have nothing to gain by fitted keys, if they are budgeted or trained
# A head's slots are fitted in arrays of the next of these sizes, each of which costs compilation; one is 1.4 times the
# one before, since the time of a fit grows with the square of its size, and below the first it is next to nothing.
SIZES = tuple(int(64 * 2 ** (i / 2)) for i in range(15))


def attention_matching(
    model: LanguageModel,
    corpus: str,
    examples: Sequence[Example],
    num_slots: int,
    num_frozen: int = 1,
    config: MatchingConfig | None = None,
    budget: BudgetConfig | None = None,
) -> Cartridge:
    """Compacts a document, in a system message as the teacher saw it, into a cartridge.

    Args:
      examples: conversations about the corpus, whose tokens are reference queries if `config.queries` says so. Without
        any, the document being repeated gives all of them.
      num_slots: how many slots a head has on average.
      budget: how the slots are shared out over layers and heads; by default all heads have as many.

    Raises:
      UserError: the document has fewer than `num_slots` tokens, or there are too few slots for its chunks.
    """
    config, budget = config or MatchingConfig(), budget or BudgetConfig()
    budget = dataclasses.replace(budget, min_slots=max(budget.min_slots, num_frozen))  # a frozen slot is all heads'
    chunks = chunks_of(model, corpus, examples, config)
    fewest = max(2, num_frozen)
    if not fewest <= num_slots / len(chunks) <= len(chunks[0].tokens) - (len(chunks) > 1):
        raise UserError(
            f"the document has {len(chunks)} chunks of {len(chunks[0].tokens)} tokens and init.num_slots is "
            f"{num_slots}, expected {fewest} slots for each chunk at least, and at most as many as it has tokens: "
            "choose another number, or another init.kind"
        )
    lengths_clk = head_lengths(budget, model, chunks, num_slots)
    num_tokens = sum(len(chunk.tokens) for chunk in chunks)
    fits_keys = num_slots < AMPLE * num_tokens if config.fit_keys is None else config.fit_keys
    # the second and later chunks fit one slot more, for the attention sink that their composition drops
    parts = [
        _match(model, chunk, own + (i > 0), fits_keys)
        for i, (chunk, own) in enumerate(zip(chunks, lengths_clk, strict=True))
    ]
    recipe = (
        f"attention matching (queries: {config.queries}; budget: {budget.kind}; keys: "
        f"{'fitted' if fits_keys else 'of tokens'}; {len(chunks)} chunks of {len(chunks[0].tokens)} tokens)"
    )
    if len(parts) > 1:  # which are composed on the host
        parts = [compose([part.with_slots(sharding.gathered(part.slots)) for part in parts])]
    provenance = Provenance.of(model, corpus, recipe)
    return dataclasses.replace(parts[0], num_frozen=num_frozen, provenance=provenance).checked(model.config)


def _match(model: LanguageModel, chunk: Chunk, lengths_lk: np.ndarray, fits_keys: bool) -> Cartridge:
    """Fits as many slots as each head shall have to a chunk."""
    document = Cartridge.from_tokens(model, chunk.tokens)
    keys, values, bias = _fit(
        model.params,
        document.keys,
        document.values,
        lengths_lk.astype(np.int32),
        *chunk.queries,
        config=model.config,
        sizes=array_sizes(lengths_lk),
        fits_keys=fits_keys,
        implementation=attention_for(model),
    )
    lengths = None if np.ptp(lengths_lk) == 0 else lengths_lk.astype(np.int32)
    return Cartridge(keys, values, bias, 1, lengths=lengths, offset=0)


def array_sizes(lengths: Int[np.ndarray, "l k"]) -> tuple[int, ...]:
    """Returns the sizes of arrays in which heads of these lengths are fitted; the last is that of the longest head."""
    longest = int(lengths.max())
    sizes = (*(size for size in SIZES if size < longest), longest)
    return tuple(sorted({sizes[i] for i in np.searchsorted(sizes, lengths.reshape(-1))}))


@functools.partial(jax.jit, static_argnames=("config", "sizes", "fits_keys", "implementation"))
def _fit(
    params: Params,
    document_k: Float[Array, "l s k h"],  # at an offset of 0
    document_v: Float[Array, "l s k h"],
    lengths: Int[Array, "l k"],
    tokens: Int[Array, "b t"],
    segment_ids: Int[Array, "b t"],
    positions: Int[Array, "b t"],
    *,
    config: ModelConfig,
    sizes: tuple[int, ...],
    fits_keys: bool,
    implementation: str | None,
) -> tuple[Float[Array, "l p k h"], Float[Array, "l p k h"], Float[Array, "l p k"]]:
    """Fits the slots of all layers, and returns their keys, values and bias; p is the last of the sizes."""
    is_query_bt = segment_ids > 0

    def attend(q_btnh: Array, k_btkh: Array, v_btkh: Array, given: Any, **options: Any) -> tuple[Array, Any]:
        document_k, document_v, lengths_k = given
        q_kmh, is_query_m = by_head(q_btnh, is_query_bt, config)
        scale = options.get("scale", config.head_dim**-0.5)
        fit = functools.partial(_fit_head, is_query=is_query_m, sizes=sizes, fits_keys=fits_keys, scale=scale)
        # one head at a time: its scores are [queries, document tokens]
        heads = q_kmh, document_k.transpose(1, 0, 2), document_v.transpose(1, 0, 2), lengths_k
        keys_kph, values_kph, bias_kp = jax.lax.map(lambda head: fit(*head), heads)
        slot_k, slot_v, bias = slots = keys_kph.transpose(1, 0, 2), values_kph.transpose(1, 0, 2), bias_kp.T
        options["lengths"] = lengths_k
        o_btnh = prefix_attention(q_btnh, k_btkh, v_btkh, slot_k, slot_v, segment_ids, bias, implementation, **options)
        return o_btnh, slots

    given = params, tokens, positions, attend, (document_k, document_v, lengths)
    return run_layers(*given, config=config, dtype=jnp.float32)[1]


def _fit_head(
    q: Float[Array, "m h"],
    k: Float[Array, "s h"],
    v: Float[Array, "s h"],
    length: Int[Array, ""],
    *,
    is_query: Array,
    sizes: tuple[int, ...],
    fits_keys: bool,
    scale: float | Array,
) -> tuple[Float[Array, "p h"], Float[Array, "p h"], Float[Array, " p"]]:
    """Fits the slots of one kv head to the queries of its group, and returns their keys, values and bias."""
    probs_ms, received_s = attention_received(q, k, is_query, scale)
    total_m, output_mh = jax.nn.logsumexp(q @ k.T * scale, axis=-1), probs_ms @ v
    kept_s = _kept(received_s, length)

    def fit(size: int) -> tuple[Array, Array, Array]:
        is_slot_p, kept_p = jnp.arange(size) < length, kept_s[:size]
        probs_mp, keys_ph, values_ph = (
            jnp.where(there, jnp.take(a, kept_p, axis, mode="clip"), 0)
            for a, axis, there in ((probs_ms, 1, is_slot_p), (k, 0, is_slot_p[:, None]), (v, 0, is_slot_p[:, None]))
        )
        values_ph, bias_p = _fit_slots(probs_mp, values_ph, output_mh, is_query, length)
        slots = keys_ph, values_ph, jnp.where(is_slot_p, bias_p, 0)
        if fits_keys:
            slots = move_keys(slots, q, total_m, output_mh, is_query, is_slot_p, scale)
        return tuple(jnp.pad(a, [(0, sizes[-1] - size)] + [(0, 0)] * (a.ndim - 1)) for a in slots)

    size_index = jnp.searchsorted(jnp.asarray(sizes), length)
    return jax.lax.switch(size_index, [functools.partial(fit, size) for size in sizes])


def _kept(received: Float[Array, " s"], length: int | Array) -> Int[Array, " s"]:
    """Returns the `length` tokens that receive most, in their order, and s behind them.

    The first token, the attention sink, is always kept.
    """
    ranked_s = jnp.argsort(received.at[0].set(jnp.inf), descending=True)
    return jnp.sort(jnp.where(jnp.arange(len(received)) < length, ranked_s, len(received)))


def _fit_slots(
    probs_mp: Array, v_ph: Array, output_mh: Array, is_query: Array, length: int | Array
) -> tuple[Float[Array, "p h"], Float[Array, " p"]]:
    """Returns the values and biases with which the kept tokens' output comes closest to that of all tokens.

    Of the p tokens, the first `length` are kept; the others have no probability.
    """
    weight_p = _nnls(probs_mp, is_query.astype(probs_mp.dtype))
    probs_mp = probs_mp * weight_p
    probs_mp = probs_mp / jnp.maximum(probs_mp.sum(-1, keepdims=True), 1e-9)
    gram_pp = probs_mp.T @ probs_mp
    ridge = RIDGE * jnp.trace(gram_pp) / length
    gram_pp = gram_pp + ridge * jnp.eye(len(v_ph), dtype=gram_pp.dtype)
    residual_ph = probs_mp.T @ (output_mh - probs_mp @ v_ph)
    return v_ph + jax.scipy.linalg.solve(gram_pp, residual_ph, assume_a="pos"), jnp.log(weight_p)


def _nnls(probs: Float[Array, "m p"], target: Float[Array, " m"]) -> Float[Array, " p"]:
    """Finds a positive w with probs @ w near the target, by multiplicative updates (Lee and Seung, 2001)."""
    gram_pp, aim_p = probs.T @ probs, probs.T @ target

    def update(_: int, weight_p: Array) -> Array:
        return jnp.clip(
            weight_p * aim_p / jnp.maximum(gram_pp @ weight_p, 1e-12), *jnp.exp(jnp.array([-1, 1]) * LARGEST_BIAS)
        )

    return jax.lax.fori_loop(0, NNLS_STEPS, update, jnp.ones_like(aim_p))
