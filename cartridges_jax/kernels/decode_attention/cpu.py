"""`decode_attention` for CPUs: page after page, each product by the CPU's kernel (`gathered_matmul`).

A page that enough requests see (of a cartridge, or of a beginning that their prompts have in common) meets the queries
of the whole batch in one product, so that a step reads it once; the requests that do not see it are masked. Every other
page meets the queries of its own request only. These pages stand in one list, whoever they belong to, so that a long
request costs the others nothing. The softmax is computed online (`softmax.py`).

Both loops run as often as there are pages: the number of pages is data, and one compiled program serves every length.

What a query does not see has no part in its result, whatever number it is. A probability of zero would not be enough,
since zero times infinity is not a number. So masked probabilities are zeros, also for a query all of whose scores lie
below the mask's, and a page that several requests see adds nothing to the results of the others.

Axis letters beyond those of `softmax.py`: x the queries of all requests that share a kv head.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from cartridges_jax.kernels.decode_attention.pages import (
    AttentionMetadata,
    Pages,
    flat,
    slot_pages,
)
from cartridges_jax.kernels.decode_attention.softmax import Options, State, finished, heads_together, started
from cartridges_jax.kernels.gathered_matmul import gathered_matmul
from cartridges_jax.kernels.prefix_attention.blockwise import MASKED, soft_capped

POSITIONS_LAST = True
SHARED_AT_ONCE = 4  # pages that the whole batch reads in one turn of the loop
MANY_QUERIES = 64  # with so many queries, a single page is work enough for a turn of the loop
# To multiply so many rows of queries by a page, all but one of them for nothing, costs what reading it once more costs.
ROWS_PER_USER = 8


class PageList(NamedTuple):
    """Pages in the order in which they are read, padded to a multiple of what a turn of the loop reads."""

    head_pages: Int[Array, "e k"]  # -1: the head has no such page
    kv_lens: Int[Array, "e k"]  # how many slots lie in it, which every query sees; of tokens none
    starts: Int[Array, " e"]  # the position of the first token in it; of slots no position
    seq_ids: Int[Array, " e"]  # a request that sees it
    num_pages: Int[Array, ""]  # how many entries are to be read


def cpu_attention(
    q: Float[Array, "r t n h"], pages: Pages, metadata: AttentionMetadata, options: Options
) -> Float[Array, "r t n h"]:
    r, t = q.shape[:2]
    q_rkmh = heads_together(q, pages.bias.shape[1], options.scale)
    at_once = _shared_at_once(r * q_rkmh.shape[2]), _own_at_once(r)
    shared, shared_mask, own = _reading_order(metadata, pages.page_size, *at_once)
    state = started(q_rkmh, t, options.sinks)
    state = _attend_shared(q_rkmh, metadata.starts, t, pages, shared, shared_mask, state, options)
    if r > 1:  # all pages of a request that is alone stand in the list of shared ones
        state = _attend_own(q_rkmh, metadata.starts, t, pages, own, state, options)
    return finished(state, t).astype(q.dtype)


def _shared_at_once(num_queries: int) -> int:
    return 1 if num_queries >= MANY_QUERIES else SHARED_AT_ONCE


def _own_at_once(r: int) -> int:
    return min(max(r, 4), 64)


def _reading_order(
    metadata: AttentionMetadata, z: int, shared_at_once: int, own_at_once: int
) -> tuple[PageList, Bool[Array, "e r"], PageList]:
    """Lists the pages that many requests see, each once, with the requests that see it, and those of the others.

    Columns of a request's row are the head pages of its cartridge, by their numbers, and then the pages of its tokens.
    A page that several requests see stands in the same column of all their rows.
    """
    table_rc, ids_r = jnp.asarray(metadata.block_table), jnp.asarray(metadata.cartridge_ids)
    r, most = len(table_rc), metadata.slot_block_table.shape[1]
    num_r = jnp.where(ids_r >= 0, jnp.asarray(metadata.num_slot_pages)[ids_r], 0)
    exists_rc = jnp.concatenate([jnp.arange(most) < num_r[:, None], table_rc >= 0], axis=1)
    which_rc = jnp.concatenate([jnp.broadcast_to(ids_r[:, None], (r, most)), table_rc], axis=1)
    same_rrc = (which_rc[:, None] == which_rc) & exists_rc[:, None] & exists_rc
    is_shared_rc = exists_rc & (same_rrc.sum(0) >= (max(2, r // ROWS_PER_USER) if r > 1 else 1))
    is_first_rc = is_shared_rc & (jnp.argmax(same_rrc, axis=0) == jnp.arange(r)[:, None])

    def listed(is_listed_rc: Array, at_once: int) -> tuple[PageList, Array, Array]:
        room = -(-is_listed_rc.size // at_once) * at_once
        row_e, column_e = jnp.nonzero(is_listed_rc, size=room, fill_value=-1)
        is_slot_e, real_e = column_e < most, row_e >= 0
        slot_page_ek, count_ek = slot_pages(metadata, ids_r[row_e], column_e, z)
        k = slot_page_ek.shape[1]
        token_page_ek = table_rc[row_e, column_e - most][:, None] * k + jnp.arange(k)
        page_ek = jnp.where(is_slot_e[:, None], slot_page_ek, token_page_ek)
        return (
            PageList(
                jnp.where(real_e[:, None], page_ek, -1),
                jnp.where((is_slot_e & real_e)[:, None], count_ek, 0),
                jnp.where(is_slot_e | ~real_e, np.iinfo(np.int32).max // 2, (column_e - most) * z),
                row_e,
                is_listed_rc.sum(),
            ),
            row_e,
            column_e,
        )

    shared, row_e, column_e = listed(is_first_rc, shared_at_once)
    shared_mask = same_rrc[row_e, :, column_e] & (row_e >= 0)[:, None]
    return shared, shared_mask, listed(exists_rc & ~is_shared_rc, own_at_once)[0]


def _attend_shared(
    q_rkmh: Array,
    starts_r: Array,
    t: int,
    pages: Pages,
    listed: PageList,
    mask_er: Bool[Array, "e r"],
    state: State,
    options: Options,
) -> State:
    r, k, m, h = q_rkmh.shape
    at_once = _shared_at_once(r * m)
    q_kxh = q_rkmh.transpose(1, 0, 2, 3).reshape(k, r * m, h)
    position_x = jnp.repeat(starts_r[:, None] + jnp.arange(t), m // t, axis=1).reshape(-1)

    def turn(i: Array, state: State) -> State:
        pages_ek, lens_ek, starts_e, _ = (_at(a, i * at_once, at_once) for a in listed[:4])
        sees_ex = jnp.repeat(_at(mask_er, i * at_once, at_once), m, axis=1)
        first_e1x, limit_ekx = _range(position_x, starts_e[:, None], lens_ek[:, :, None], options.window)
        limit_ekx = jnp.where(sees_ex[:, None], limit_ekx, 0)
        seen_ekxz = _within(pages.page_size, first_e1x, limit_ekx)
        scores_ekxz = _by_pages(q_kxh, np.zeros(at_once, np.int32), pages.keys, pages_ek)
        scores_ekxz = soft_capped(scores_ekxz, options.soft_cap) + flat(pages.bias)[pages_ek][:, :, None]
        scores_ekxz = jnp.where(seen_ekxz, scores_ekxz, MASKED)
        running_max_kx, denominator_kx, o_kxh = state
        new_max_kx = jnp.maximum(running_max_kx, scores_ekxz.max((0, 3)))
        probs_ekxz = jnp.where(seen_ekxz, jnp.exp(scores_ekxz - new_max_kx[..., None]), 0)
        rescale_kx = jnp.exp(running_max_kx - new_max_kx)
        weighed_ekxh = _by_pages(probs_ekxz, np.arange(at_once, dtype=np.int32), pages.values, pages_ek)
        weighed_ekxh = jnp.where(limit_ekx[..., None] > 0, weighed_ekxh, 0)
        o_kxh = o_kxh * rescale_kx[..., None] + weighed_ekxh.sum(0)
        return new_max_kx, denominator_kx * rescale_kx + probs_ekxz.sum((0, 3)), o_kxh

    by_head = tuple(a.swapaxes(0, 1).reshape(k, r * m, *a.shape[3:]) for a in state)
    state = jax.lax.fori_loop(0, (listed.num_pages + at_once - 1) // at_once, turn, by_head)
    running_max_rkm, denominator_rkm, o_rkmh = (a.reshape(k, r, m, *a.shape[2:]).swapaxes(0, 1) for a in state)
    return running_max_rkm, denominator_rkm, o_rkmh


def _attend_own(
    q_rkmh: Array,
    starts_r: Array,
    t: int,
    pages: Pages,
    listed: PageList,
    state: State,
    options: Options,
) -> State:
    r, _, m, _ = q_rkmh.shape
    at_once = _own_at_once(r)
    position_rm = jnp.repeat(starts_r[:, None] + jnp.arange(t), m // t, axis=1)

    def turn(i: Array, state: State) -> State:
        pages_ek, lens_ek, starts_e, seq_e = (_at(a, i * at_once, at_once) for a in listed[:4])
        first_e1m, limit_ekm = _range(position_rm[seq_e], starts_e[:, None], lens_ek[:, :, None], options.window)
        seen_ekmz = _within(pages.page_size, first_e1m, limit_ekm)
        scores_ekmz = _by_pages(q_rkmh, seq_e, pages.keys, pages_ek)
        scores_ekmz = soft_capped(scores_ekmz, options.soft_cap) + flat(pages.bias)[pages_ek][:, :, None]
        scores_ekmz = jnp.where(seen_ekmz, scores_ekmz, MASKED)
        running_max_rkm, denominator_rkm, o_rkmh = state
        new_max_rkm = running_max_rkm.at[seq_e].max(scores_ekmz.max(3))
        probs_ekmz = jnp.where(seen_ekmz, jnp.exp(scores_ekmz - new_max_rkm[seq_e][..., None]), 0)
        weighed_ekmh = _by_pages(probs_ekmz, np.arange(at_once, dtype=np.int32), pages.values, pages_ek)
        rescale_rkm = jnp.exp(running_max_rkm - new_max_rkm)
        return (
            new_max_rkm,
            (denominator_rkm * rescale_rkm).at[seq_e].add(probs_ekmz.sum(3)),
            (o_rkmh * rescale_rkm[..., None]).at[seq_e].add(weighed_ekmh),
        )

    return jax.lax.fori_loop(0, (listed.num_pages + at_once - 1) // at_once, turn, state)


def _at(array: Array, start: Array, at_once: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(array, start, at_once)


def _range(
    position_em: Array, start_e1: Array, kv_len_ek1: Array, window: int | None
) -> tuple[Int[Array, "e 1 m"] | None, Int[Array, "e k m"]]:
    """From which and up to which of a page's positions a query sees; of slots all, of tokens those up to its own."""
    distance_e1m = (position_em - start_e1 + 1)[:, None]
    first_e1m = None if window is None else distance_e1m - window
    return first_e1m, jnp.maximum(kv_len_ek1, distance_e1m)


def _within(z: int, first: Int[Array, "e 1 m"] | None, limit: Int[Array, "e k m"]) -> Bool[Array, "e k m z"]:
    seen = jnp.arange(z) < limit[..., None]
    return seen if first is None else seen & (jnp.arange(z) >= first[..., None])


def _by_pages(
    rows: Float[Array, "*i k m d"], row: Int[Array, " e"], pages: Float[Array, "pages k d y"], page: Int[Array, "e k"]
) -> Float[Array, "e k m y"]:
    """The product of pairs: the matrices of a row, one for each kv head, times those of a page."""
    k, m, d = rows.shape[-3:]
    row_ek = row[:, None] * k + np.arange(k, dtype=np.int32)
    left, right = rows.reshape(-1, m, d), flat(pages)
    products = gathered_matmul(left.astype(right.dtype), row_ek.reshape(-1), right, page.reshape(-1))
    return products.reshape(-1, k, m, right.shape[2])
