"""`prefix_decode_attention`: attention of queries over keys and values that lie in pages, some of which are shared.

A page that several requests see (of a cartridge, or of a beginning that their prompts have in common) meets the queries
of the whole batch in one product, so that a step reads it once; the requests that do not see it are masked. Every other
page meets the queries of its own request only. These pages stand in one list, whoever they belong to, so that a long
request costs the others nothing. The softmax is computed online: partial results are merged by their running maxima and
denominators as they come.

Both loops run as often as there are pages: the number of pages is data, and one compiled program serves every length.

What a query does not see has no part in its result, whatever number it is. A probability of zero would not be enough,
since zero times infinity is not a number. So masked probabilities are zeros, also for a query all of whose scores lie
below the mask's, and a page that several requests see adds nothing to the results of the others. Behind the last
position of a sequence, its pages hold zeros or the sequence's own values (`serving.engine` takes care of that).

Axis letters beyond the usual ones: r requests, c shared pages, w pages of single requests, z a page's positions, m
the queries of a request that share a kv head (t times g).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from cartridges_jax import kernels
from cartridges_jax.kernels.gathered_matmul import gathered_matmul, has_kernel
from cartridges_jax.kernels.prefix_attention.blockwise import MASKED

SHARED_AT_ONCE = 4  # pages that the whole batch reads in one turn of the loop
MANY_QUERIES = 64  # with so many queries, a single page is work enough for a turn of the loop
State = tuple[Array, Array, Array]  # a softmax so far: running maximum, denominator, sum of the weighted values


class Pages(NamedTuple):
    """The keys and values of one layer. Keys lie with their positions last, as a CPU multiplies them fastest."""

    keys: Float[Array, "pages k h z"]
    values: Float[Array, "pages k z h"]
    bias: Float[Array, "pages k z"]  # log-weights of a cartridge's slots; zero for everything else


class PageList(NamedTuple):
    """Pages in the order in which they are read. A page holds consecutive positions of a sequence from its start on."""

    block_table: Int[Array | np.ndarray, " c"]  # the pages' numbers; -1 in an entry that only pads
    kv_lens: Int[Array | np.ndarray, " c"]  # how many positions of a page are filled; 0 in an entry that only pads
    starts: Int[Array | np.ndarray, " c"]  # the position in its sequence of a page's first key and value
    num_pages: Int[Array | np.ndarray, ""]  # how many entries are to be read

    @classmethod
    def of(cls, entries: Sequence[tuple[int, int, int]], most: int) -> PageList:
        """The list of entries (page, kv_len, start), padded to `most` entries."""
        padded = np.tile(np.array([-1, 0, 0], np.int32), (most, 1))
        padded[: len(entries)] = np.array(entries, np.int32).reshape(-1, 3)
        return cls(*padded.T, np.int32(len(entries)))


class AttentionMetadata(NamedTuple):
    """Which request sees which pages. A request's sequence is made of its shared pages and its own."""

    shared: PageList
    shared_mask: Bool[Array, "c r"]  # whether a request sees a shared page
    own: PageList
    seq_ids: Int[Array, " w"]  # the row of the request that an own page belongs to


def prefix_decode_attention(
    q: Float[Array, "r t n h"], positions: Int[Array, "r t"], pages: Pages, metadata: AttentionMetadata
) -> Float[Array, "r t n h"]:
    """Each query attends to the positions up to its own of the pages that its request sees.

    Args:
      q: the rotated queries; n is a multiple of k.
      positions: the queries' positions in their sequences, a cartridge's slots counted.
      pages: the layer's pages, to which the queries' own keys and values have been written already.
      metadata: its lists are as long as `shared_entries` and `own_entries` say.
    """
    r, t, n, h = q.shape
    k = pages.bias.shape[1]
    g = n // k
    q_rkmh = (q * h**-0.5).reshape(r, t, k, g, h).transpose(0, 2, 1, 3, 4).reshape(r, k, t * g, h)
    state = _attend_shared(q_rkmh, positions, pages, metadata)
    if r > 1:  # all pages of a request that is alone stand in the list of shared ones
        state = _attend_own(q_rkmh, positions, pages, metadata, state)
    _, denominator_rkm, o_rkmh = state
    o_rkmh = o_rkmh / jnp.maximum(denominator_rkm, 1e-30)[..., None]  # rows that pad a batch see nothing
    return o_rkmh.reshape(r, k, t, g, h).transpose(0, 2, 1, 3, 4).reshape(r, t, n, h).astype(q.dtype)


def shared_entries(count: int) -> int:
    """The length of a list with room for `count` shared pages: a multiple of what a turn of the loop reads."""
    return -(-count // SHARED_AT_ONCE) * SHARED_AT_ONCE


def own_entries(count: int, r: int) -> int:
    """The length of a list with room for `count` pages that belong to one of r requests each, a multiple likewise."""
    return -(-count // _own_at_once(r)) * _own_at_once(r)


def _own_at_once(r: int) -> int:
    return min(max(r, 4), 64)


def _attend_shared(q_rkmh: Array, positions_rt: Array, pages: Pages, metadata: AttentionMetadata) -> State:
    r, k, m, h = q_rkmh.shape
    t = positions_rt.shape[1]
    q_kxh = q_rkmh.transpose(1, 0, 2, 3).reshape(k, r * m, h)
    positions_rm = jnp.repeat(positions_rt, m // t, axis=1)
    listed = (*metadata.shared[:3], metadata.shared_mask)

    def turn(i: Array, state: State) -> State:
        page_c, kv_len_c, start_c, mask_cr = (_at(a, i * at_once, at_once) for a in listed)
        limit_crm = _limit(positions_rm, kv_len_c[:, None, None], start_c[:, None, None])
        limit_cx = jnp.where(mask_cr[:, :, None], limit_crm, 0).reshape(at_once, r * m)
        seen_c1xz = (jnp.arange(pages.bias.shape[2]) < limit_cx[:, :, None])[:, None]
        scores_ckxz = _by_pages(q_kxh, np.zeros(at_once, np.int32), pages.keys, page_c)
        scores_ckxz = jnp.where(seen_c1xz, scores_ckxz + pages.bias[page_c][:, :, None], MASKED)
        running_max_kx, denominator_kx, o_kxh = state
        new_max_kx = jnp.maximum(running_max_kx, scores_ckxz.max((0, 3)))
        probs_ckxz = jnp.where(seen_c1xz, jnp.exp(scores_ckxz - new_max_kx[..., None]), 0)
        rescale_kx = jnp.exp(running_max_kx - new_max_kx)
        weighed_ckxh = _by_pages(probs_ckxz, np.arange(at_once, dtype=np.int32), pages.values, page_c)
        weighed_ckxh = jnp.where(limit_cx[:, None, :, None] > 0, weighed_ckxh, 0)
        o_kxh = o_kxh * rescale_kx[..., None] + weighed_ckxh.sum(0)
        return new_max_kx, denominator_kx * rescale_kx + probs_ckxz.sum((0, 3)), o_kxh

    at_once = 1 if r * m >= MANY_QUERIES and has_kernel(kernels.platform()) else SHARED_AT_ONCE
    turns = (metadata.shared.num_pages + at_once - 1) // at_once
    state = jax.lax.fori_loop(0, turns, turn, _empty(k, r * m, h))
    running_max_rkm, denominator_rkm = (a.reshape(k, r, m).swapaxes(0, 1) for a in state[:2])
    return running_max_rkm, denominator_rkm, state[2].reshape(k, r, m, h).swapaxes(0, 1)


def _attend_own(q_rkmh: Array, positions_rt: Array, pages: Pages, metadata: AttentionMetadata, state: State) -> State:
    r, _, m, _ = q_rkmh.shape
    t, at_once = positions_rt.shape[1], _own_at_once(r)

    def turn(i: Array, state: State) -> State:
        page_w, kv_len_w, start_w, seq_w = (_at(a, i * at_once, at_once) for a in (*metadata.own[:3], metadata.seq_ids))
        scores_wkmz = _by_pages(q_rkmh, seq_w, pages.keys, page_w)
        limit_wt = _limit(positions_rt[seq_w], kv_len_w[:, None], start_w[:, None])
        seen_w1mz = (jnp.arange(pages.bias.shape[2]) < jnp.repeat(limit_wt, m // t, axis=1)[..., None])[:, None]
        scores_wkmz = jnp.where(seen_w1mz, scores_wkmz + pages.bias[page_w][:, :, None], MASKED)
        running_max_rkm, denominator_rkm, o_rkmh = state
        new_max_rkm = running_max_rkm.at[seq_w].max(scores_wkmz.max(3))
        probs_wkmz = jnp.where(seen_w1mz, jnp.exp(scores_wkmz - new_max_rkm[seq_w][..., None]), 0)
        weighed_wkmh = _by_pages(probs_wkmz, np.arange(at_once, dtype=np.int32), pages.values, page_w)
        rescale_rkm = jnp.exp(running_max_rkm - new_max_rkm)
        return (
            new_max_rkm,
            (denominator_rkm * rescale_rkm).at[seq_w].add(probs_wkmz.sum(3)),
            (o_rkmh * rescale_rkm[..., None]).at[seq_w].add(weighed_wkmh),
        )

    return jax.lax.fori_loop(0, (metadata.own.num_pages + at_once - 1) // at_once, turn, state)


def _empty(*shape_kxh: int) -> State:
    none_kx = jnp.zeros(shape_kxh[:-1])
    return none_kx + MASKED, none_kx, jnp.zeros(shape_kxh)


def _at(array: Array, start: Array, at_once: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(array, start, at_once)


def _limit(positions: Array, kv_len: Array, start: Array) -> Array:
    """How many of a page's filled positions lie at or before a query's position."""
    return jnp.minimum(kv_len, positions - start + 1)


def _by_pages(
    rows: Float[Array, "*i k m d"], row: Int[Array, " w"], pages: Float[Array, "pages k d y"], page: Int[Array, " w"]
) -> Float[Array, "w k m y"]:
    """The product of w pairs: the matrices of a row, one for each kv head, times those of a page."""
    k, m, d = rows.shape[-3:]
    heads = np.arange(k, dtype=np.int32)
    row_wk = (row[:, None] * k + heads).reshape(-1)
    page_wk = jnp.where(page[:, None] < 0, -1, page[:, None] * k + heads).reshape(-1)
    left, right = rows.reshape(-1, m, d), pages.reshape(-1, *pages.shape[2:])
    return gathered_matmul(left.astype(right.dtype), row_wk, right, page_wk).reshape(-1, k, m, right.shape[2])
