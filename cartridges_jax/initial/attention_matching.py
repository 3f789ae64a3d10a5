"""Attention matching: p slots whose attention is fitted to that of the full document (arXiv 2602.16284).

It takes seconds. The queries are those of self-study conversations and of the document being repeated, which ask for
every token. For every layer and kv head, three steps follow:

1. Keep the p tokens of the document that receive the most attention.
2. Give each a bias, so that the slots' total weight matches the document's (non-negative least squares).
3. Move their values, so that attention's output matches (least squares).

Layers are fitted in order, on the states that the slots fitted so far produce, so that later layers make up for what
earlier ones lost. A document longer than `chunk_tokens` is compacted in chunks, each as if it alone stood before the
question. The attention sink of the second and later chunks is dropped, as in a composition of cartridges.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, Literal

import einops
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from cartridges_jax.cartridge.arrays import Cartridge
from cartridges_jax.cartridge.provenance import Provenance
from cartridges_jax.command_line.errors import UserError
from cartridges_jax.kernels.prefix_attention import prefix_attention
from cartridges_jax.models.config import ModelConfig
from cartridges_jax.models.language_model import LanguageModel
from cartridges_jax.models.params import Params
from cartridges_jax.models.transformer import run_layers
from cartridges_jax.parallel import sharding
from cartridges_jax.training.data import Example, PackedRows

ROW = 256  # tokens of a packed row of reference conversations
QUERY_TOKENS = 1024  # tokens of conversations whose queries are used; p slots need several times p queries
NNLS_STEPS = 200
LARGEST_BIAS = 5.0  # in nats
RIDGE = 1e-3  # of the mean squared probability: how strongly a slot keeps its token's value where no query asks for it


@dataclasses.dataclass(frozen=True)
class MatchingConfig:
    queries: Literal["both", "conversations", "repeat"] = "both"
    chunk_tokens: int = 4096  # tokens that are compacted at once; memory grows with their square

    def __post_init__(self) -> None:
        if self.chunk_tokens < 2:
            raise UserError(f"init.matching.chunk_tokens is {self.chunk_tokens}, expected at least 2")


def attention_matching(
    model: LanguageModel,
    corpus: str,
    examples: Sequence[Example],
    num_slots: int,
    num_frozen: int = 1,
    config: MatchingConfig | None = None,
) -> Cartridge:
    """Compacts a document, in a system message as the teacher saw it, into a cartridge.

    Args:
      examples: conversations about the corpus, whose tokens are reference queries. Without any, the document being
        repeated gives all of them.

    Raises:
      UserError: the document has fewer than `num_slots` tokens, or there are too few slots for its chunks.
    """
    config = config or MatchingConfig()
    if config.queries == "conversations" and not examples:
        raise UserError("init.matching.queries is 'conversations' and there are none: give a dataset, or use 'repeat'")
    room = model.config.max_position_embeddings - ROW
    bodies, (before, after) = _chunks(model, corpus, min(config.chunk_tokens, room))
    chunks = [[*before, *body, *after] for body in bodies]
    # the second and later chunks fit one slot more, for the attention sink that is dropped
    shares = [num_slots // len(chunks) + (i < num_slots % len(chunks)) + (i > 0) for i in range(len(chunks))]
    if any(not 2 <= share <= len(chunk) for share, chunk in zip(shares, chunks, strict=True)):
        raise UserError(
            f"the document has {len(chunks)} chunks of {len(chunks[0])} tokens, expected at least the {num_slots} "
            "slots and two of them for each chunk: choose another init.num_slots, or another init.kind"
        )
    parts = []
    for body, chunk, share in zip(bodies, chunks, shares, strict=True):
        document = Cartridge.from_tokens(model, chunk)
        batch = _queries(model, body, examples, config)
        matched = _match(
            model.params,
            document.keys,
            document.values,
            *(np.stack([row[name] for row in batch]) for name in ("tokens", "segment_ids", "positions")),
            config=model.config,
            num_slots=share,
            # on a mesh XLA lays out the computation, which it cannot do with a kernel
            implementation=None if sharding.mesh_of(model.params).size == 1 else "xla",
        )
        parts.append(matched if not parts else [a[:, 1:] for a in matched])
    keys, values, bias = (jnp.concatenate(arrays, axis=1) for arrays in zip(*parts, strict=True))
    recipe = f"attention matching (queries: {config.queries}; {len(chunks)} chunks of {len(chunks[0])} tokens)"
    provenance = Provenance.of(model, corpus, recipe)
    return Cartridge(keys, values, bias, num_frozen, provenance, offset=0).checked(model.config)


def _chunks(model: LanguageModel, corpus: str, size: int) -> tuple[list[list[int]], tuple[list[int], list[int]]]:
    """Returns the document's tokens in chunks, and what stands before and after each in a system message.

    With that, no chunk has more than `size` tokens. The last chunk begins early enough to be as long as the others, so
    that one compiled program compacts them all.
    """

    def message(text: str) -> list[int]:
        return model.tokenizer.chat_ids([{"role": "system", "content": text}], add_generation_prompt=False)

    whole, other = message(corpus), message("\N{SYMBOL FOR NULL}")
    before = _common(whole, other)
    after = _common(whole[before:][::-1], other[before:][::-1])
    frame = whole[:before], whole[len(whole) - after :]
    body, room = whole[before : len(whole) - after], size - before - after
    if room < 1:
        raise UserError(
            f"a chunk of {size} tokens leaves no room for a text: expected more than {size - room} of "
            f"init.matching.chunk_tokens, and {ROW} more than those of {model.name}'s window, "
            f"{model.config.max_position_embeddings}"
        )
    count = -(-len(body) // room)
    length = -(-len(body) // count)
    starts = [min(i * length, len(body) - length) for i in range(count)]
    return [body[start : start + length] for start in starts], frame


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Returns the length of the longest common beginning of two sequences."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _queries(
    model: LanguageModel, body: Sequence[int], examples: Sequence[Example], config: MatchingConfig
) -> list[dict[str, np.ndarray]]:
    """Returns packed rows whose queries a chunk's slots are fitted to; their number is the same for every choice."""
    repeated = 2 * len(body)
    counts = {"both": (QUERY_TOKENS, repeated), "conversations": (QUERY_TOKENS + repeated, 0), "repeat": (0, repeated)}
    asked, said = counts[config.queries]
    return _rows(examples, asked) + _rows(_repetitions(model, body), said)


def _rows(examples: Sequence[Example], num_tokens: int) -> list[dict[str, np.ndarray]]:
    rows = PackedRows(examples, ROW, batch_size=1, num_epochs=1, seed=0)
    return [rows[i] for i in range(min(len(rows), math.ceil(num_tokens / ROW)))]


def _repetitions(model: LanguageModel, tokens: Sequence[int]) -> list[Example]:
    """Makes examples in which the document is repeated, piece by piece: their queries look for each of its tokens."""
    frame = model.tokenizer.turn_ids([{"role": "user", "content": "Repeat the text."}], add_generation_prompt=True)
    size = ROW - len(frame)
    nothing = np.zeros(0, np.int32)
    return [
        Example(np.asarray([*frame, *tokens[i : i + size]], np.int32), nothing, nothing, nothing.astype(np.float32))
        for i in range(0, len(tokens), size)
    ]


@functools.partial(jax.jit, static_argnames=("config", "num_slots", "implementation"))
def _match(
    params: Params,
    document_k: Float[Array, "l s k h"],  # at an offset of 0
    document_v: Float[Array, "l s k h"],
    tokens: Int[Array, "b t"],
    segment_ids: Int[Array, "b t"],
    positions: Int[Array, "b t"],
    *,
    config: ModelConfig,
    num_slots: int,
    implementation: str | None,
) -> tuple[Float[Array, "l p k h"], Float[Array, "l p k h"], Float[Array, "l p k"]]:
    """Fits the slots of all layers, and returns their keys, values and bias."""
    is_query_bt = segment_ids > 0

    def attend(q_btnh: Array, k_btkh: Array, v_btkh: Array, document: Any, **options: Any) -> tuple[Array, Any]:
        keys_skh, values_skh = document
        q_kmh = einops.rearrange(q_btnh, "b t (k g) h -> k (b t g) h", k=config.num_kv_heads)
        is_query_m = jnp.repeat(is_query_bt.reshape(-1), config.num_heads // config.num_kv_heads)
        scale = options.get("scale", config.head_dim**-0.5)
        fit = functools.partial(_fit_head, is_query=is_query_m, num_slots=num_slots, scale=scale)
        # one head at a time: its scores are [queries, document tokens]
        keys_kph, values_kph, bias_kp = jax.lax.map(
            lambda a: fit(*a), (q_kmh, keys_skh.transpose(1, 0, 2), values_skh.transpose(1, 0, 2))
        )
        slot_k, slot_v, bias = slots = keys_kph.transpose(1, 0, 2), values_kph.transpose(1, 0, 2), bias_kp.T
        o_btnh = prefix_attention(q_btnh, k_btkh, v_btkh, slot_k, slot_v, segment_ids, bias, implementation, **options)
        return o_btnh, slots

    given = params, tokens, positions, attend, (document_k, document_v)
    return run_layers(*given, config=config, dtype=jnp.float32)[1]


def _fit_head(
    q: Float[Array, "m h"],
    k: Float[Array, "s h"],
    v: Float[Array, "s h"],
    *,
    is_query: Array,
    num_slots: int,
    scale: float | Array,
) -> tuple[Float[Array, "p h"], Float[Array, "p h"], Float[Array, " p"]]:
    """Fits the slots of one kv head to the queries of its group, and returns their keys, values and bias."""
    probs_ms = jax.nn.softmax(q @ k.T * scale, axis=-1) * is_query[:, None]
    mass_s = jnp.sqrt((probs_ms**2).mean(0))  # a token's attention: its root mean square over the queries
    # the first token is the attention sink, which stays first; the others keep their order
    kept_p = jnp.sort(jax.lax.top_k(mass_s.at[0].set(jnp.inf), num_slots)[1])
    return k[kept_p], *_fit_slots(probs_ms[:, kept_p], v[kept_p], probs_ms @ v, is_query)


def _fit_slots(
    probs_mp: Array, v_ph: Array, output_mh: Array, is_query: Array
) -> tuple[Float[Array, "p h"], Float[Array, " p"]]:
    """Returns the values and biases with which the kept tokens' output comes closest to that of all tokens."""
    weight_p = _nnls(probs_mp, is_query.astype(probs_mp.dtype))
    probs_mp = probs_mp * weight_p
    probs_mp = probs_mp / jnp.maximum(probs_mp.sum(-1, keepdims=True), 1e-9)
    gram_pp = probs_mp.T @ probs_mp
    ridge = RIDGE * jnp.trace(gram_pp) / len(v_ph)
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
