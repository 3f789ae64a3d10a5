"""`decode_attention` as XLA computes it on any platform: every request's tokens at once, and cartridge by cartridge.

The pages of tokens are gathered for each request, as many as the block table has room for. A cartridge is gathered once
and meets the queries of the whole batch; the requests that do not see it are masked. Of each head
as many head pages are gathered at once as a cartridge has whose heads are equally long, and of longer heads the rest in
further turns. The softmax is computed online (`softmax.py`).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from cartridges_jax.kernels.decode_attention.pages import (
    AttentionMetadata,
    Pages,
    slot_head_page,
    slot_page_counts,
    visible,
)
from cartridges_jax.kernels.decode_attention.softmax import Options, State, finished, heads_together, started
from cartridges_jax.kernels.prefix_attention.blockwise import MASKED, soft_capped

POSITIONS_LAST = False


def xla_attention(
    q: Float[Array, "r t n h"], pages: Pages, metadata: AttentionMetadata, options: Options
) -> Float[Array, "r t n h"]:
    t, k = q.shape[1], metadata.kv_heads
    q_rkmh = heads_together(q, k, options.scale)
    absorb = functools.partial(_absorb, q_rkmh, options.soft_cap)
    tokens = _tokens(pages, metadata, options.window, t, q_rkmh.shape[2])
    state = absorb(started(q_rkmh, t, options.sinks), "rk", *tokens)
    starts_ak, lens_ak = (jnp.asarray(a)[metadata.layer] for a in (metadata.slot_starts, metadata.slot_lens))
    at_once = metadata.slot_block_table.shape[1] + 1  # slots that do not begin with a page may reach into one more
    turns_a = -(-slot_page_counts(starts_ak, lens_ak, pages.page_size).max(1) // at_once)

    def of_cartridge(cartridge: Int[Array, ""], state: State) -> State:
        sees_r = metadata.cartridge_ids == cartridge

        def turn(i: Int[Array, ""], state: State) -> State:
            numbers = i * at_once + jnp.arange(at_once)
            slots = _slots(pages, metadata, cartridge, numbers, starts_ak[cartridge], lens_ak[cartridge])
            keys, values, bias, is_slot_ks = slots
            return absorb(state, "k", keys, values, bias, sees_r[:, None, None, None] & is_slot_ks[:, None])

        return jax.lax.fori_loop(0, turns_a[cartridge], turn, state)

    state = jax.lax.fori_loop(0, metadata.cartridge_ids.max() + 1, of_cartridge, state)
    return finished(state, t).astype(q.dtype)


def _tokens(
    pages: Pages, metadata: AttentionMetadata, window: int | None, t: int, m: int
) -> tuple[Float[Array, "r k s h"], Float[Array, "r k s h"], Float[Array, ""], Bool[Array, "r 1 m s"]]:
    """The keys and values of each request's tokens, their bias of zero, and which query sees which."""
    table_rc, z = jnp.asarray(metadata.block_table), pages.page_size
    exists_rs = jnp.repeat(table_rc >= 0, z, axis=1)
    k = metadata.kv_heads
    head_page_rkc = table_rc[:, None] * metadata.heads + (metadata.layer * k + jnp.arange(k))[:, None]
    keys, values = (a[head_page_rkc].reshape(len(table_rc), k, -1, a.shape[2]) for a in (pages.keys, pages.values))
    position_rs = jnp.broadcast_to(jnp.arange(exists_rs.shape[1]), exists_rs.shape)
    seen_rts = visible(metadata.starts, t, position_rs, window) & exists_rs[:, None]
    # a page that is not the request's may hold anything, and zero times infinity is not a number
    values = jnp.where(exists_rs[:, None, :, None], values, 0)
    return keys, values, jnp.zeros(()), jnp.repeat(seen_rts, m // t, axis=1)[:, None]


def _slots(
    pages: Pages,
    metadata: AttentionMetadata,
    cartridge: Int[Array, ""],
    numbers: Int[Array, " e"],
    starts_k: Int[Array, " k"],
    lens_k: Int[Array, " k"],
) -> tuple[Float[Array, "k s h"], Float[Array, "k s h"], Float[Array, "k 1 s"], Bool[Array, "k s"]]:
    """The keys, values and biases in the head pages of these numbers of each head, and which of them are its slots."""
    z, k = pages.page_size, len(starts_k)
    number_ke = (starts_k // z)[:, None] + numbers
    page_ke = slot_head_page(metadata, cartridge, number_ke)
    index_ks = (number_ke[..., None] * z + jnp.arange(z)).reshape(k, -1)
    is_slot_ks = (index_ks >= starts_k[:, None]) & (index_ks < (starts_k + lens_k)[:, None])
    keys, values = (a[page_ke].reshape(k, -1, a.shape[2]) for a in (pages.keys, pages.values))
    bias = pages.bias[page_ke].reshape(k, 1, -1)
    return keys, jnp.where(is_slot_ks[..., None], values, 0), bias, is_slot_ks


def _absorb(
    q_rkmh: Array, soft_cap: float | None, state: State, of: str, keys: Array, values: Array, bias: Array, seen: Array
) -> State:
    """Adds keys and values, with the axes `of` before their positions, to a softmax."""
    running_max_rkm, denominator_rkm, o_rkmh = state
    wide = {"preferred_element_type": jnp.float32}
    scores_rkms = soft_capped(jnp.einsum(f"rkmh,{of}sh->rkms", q_rkmh.astype(keys.dtype), keys, **wide), soft_cap)
    scores_rkms = jnp.where(seen, scores_rkms + bias, MASKED)
    new_max_rkm = jnp.maximum(running_max_rkm, scores_rkms.max(3))
    probs_rkms = jnp.where(seen, jnp.exp(scores_rkms - new_max_rkm[..., None]), 0)
    rescale_rkm = jnp.exp(running_max_rkm - new_max_rkm)
    weighed_rkmh = jnp.einsum(f"rkms,{of}sh->rkmh", probs_rkms.astype(values.dtype), values, **wide)
    # what a request does not see adds nothing to it, whatever number it is
    weighed_rkmh = jnp.where(seen.any(3, keepdims=True), weighed_rkmh, 0)
    denominator_rkm = denominator_rkm * rescale_rkm + probs_rkms.sum(3)
    return new_max_rkm, denominator_rkm, o_rkmh * rescale_rkm[..., None] + weighed_rkmh
