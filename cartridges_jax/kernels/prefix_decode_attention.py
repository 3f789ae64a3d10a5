"""`prefix_decode_attention`: queries over keys and values that lie in pages, of which requests share some.

A page that several requests see (of a cartridge, or of a beginning that their prompts have in common) meets the queries
of the whole batch in one product, so that a step reads it once; those who do not see it are masked. Every other page
meets its own request only: pages stand in one list, whoever they belong to, so that a long request costs the others
nothing. Partial softmaxes merge by their maxima and sums as they come.

Both loops run as often as there are pages: their number is data, and one compiled program serves every length.

What a query does not see has no part in its result, whatever number it is: a weight of zero would not be enough, since
zero times infinity is not a number. So masked weights are zeros, also for a query all of whose scores lie below the
mask's, and a page that several requests see adds nothing to the others. Behind a sequence's last position, its pages
hold zeros or what is its own (`Engine`).

Axis letters beyond the README's: r requests, c shared pages, w pages of single requests, z a page's positions, m the
queries of a request that share a kv head (t times g).
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

SHARED_AT_ONCE = 4  # pages that the whole batch reads in one turn
MANY_QUERIES = 64  # for which a page is work enough for a turn of the kernel
Partial = tuple[Array, Array, Array]  # the scores' maximum, and relative to it the sums of weights and weighted values


class Pages(NamedTuple):
    """One layer's keys and values. Keys lie with their positions last, which is how a CPU multiplies them fastest."""

    keys: Float[Array, "pages k h z"]
    values: Float[Array, "pages k z h"]
    bias: Float[Array, "pages k z"]  # log-weights of a cartridge's slots; zero for everything else


class Reading(NamedTuple):
    """Pages in the order in which they are read. Position `first` + i of a sequence lies at place i of a page."""

    page: Int[Array | np.ndarray, " c"]  # -1 for entries that only pad
    count: Int[Array | np.ndarray, " c"]  # places that are filled; 0 in an entry that only pads
    first: Int[Array | np.ndarray, " c"]
    length: Int[Array | np.ndarray, ""]  # entries that are to be read

    @classmethod
    def of(cls, entries: Sequence[tuple[int, int, int]], most: int) -> Reading:
        """Page, count and first of each, padded to `most` entries."""
        padded = np.tile(np.array([-1, 0, 0], np.int32), (most, 1))
        padded[: len(entries)] = np.array(entries, np.int32).reshape(-1, 3)
        return cls(*padded.T, np.int32(len(entries)))


class Plan(NamedTuple):
    """Who reads what. A request's sequence is made of its shared pages and its own."""

    shared: Reading
    members: Bool[Array, "c r"]  # who sees a shared page
    own: Reading
    reader: Int[Array, " w"]  # whose page it is


def prefix_decode_attention(
    q: Float[Array, "r t n h"], positions: Int[Array, "r t"], pages: Pages, plan: Plan
) -> Float[Array, "r t n h"]:
    """Each query attends to the positions up to its own of the pages that its request sees.

    Args:
      q: rotated. n is a multiple of k.
      positions: of the queries in their sequences, a cartridge's slots counted.
      pages: where the queries' own keys and values have been written already.
      plan: its lists are as long as `shared_entries` and `own_entries` say.
    """
    r, t, n, h = q.shape
    k = pages.bias.shape[1]
    g = n // k
    q_rkmh = (q * h**-0.5).reshape(r, t, k, g, h).transpose(0, 2, 1, 3, 4).reshape(r, k, t * g, h)
    partial = _shared(q_rkmh, positions, pages, plan)
    if r > 1:  # the pages of a request that is alone are its "shared" ones
        partial = _own(q_rkmh, positions, pages, plan, partial)
    _, total_rkm, o_rkmh = partial
    o_rkmh = o_rkmh / jnp.maximum(total_rkm, 1e-30)[..., None]  # rows that pad a batch see nothing
    return o_rkmh.reshape(r, k, t, g, h).transpose(0, 2, 1, 3, 4).reshape(r, t, n, h).astype(q.dtype)


def shared_entries(count: int) -> int:
    """How many entries a list of `count` shared pages has: whole turns."""
    return -(-count // SHARED_AT_ONCE) * SHARED_AT_ONCE


def own_entries(count: int, r: int) -> int:
    """How many entries the list of `count` pages of r single requests has: whole turns."""
    return -(-count // _own_at_once(r)) * _own_at_once(r)


def _own_at_once(r: int) -> int:
    return min(max(r, 4), 64)


def _shared(q_rkmh: Array, positions_rt: Array, pages: Pages, plan: Plan) -> Partial:
    r, k, m, h = q_rkmh.shape
    t = positions_rt.shape[1]
    q_kxh = q_rkmh.transpose(1, 0, 2, 3).reshape(k, r * m, h)
    positions_rm = jnp.repeat(positions_rt, m // t, axis=1)

    def turn(i: Array, partial: Partial) -> Partial:
        page_c, count_c, first_c, members_cr = (_at(a, i * at_once, at_once) for a in (*plan.shared[:3], plan.members))
        limit_crm = _limit(positions_rm, count_c[:, None, None], first_c[:, None, None])
        limit_cx = jnp.where(members_cr[:, :, None], limit_crm, 0).reshape(at_once, r * m)
        seen_c1xz = (jnp.arange(pages.bias.shape[2]) < limit_cx[:, :, None])[:, None]
        scores_ckxz = _by_pages(q_kxh, np.zeros(at_once, np.int32), pages.keys, page_c)
        scores_ckxz = jnp.where(seen_c1xz, scores_ckxz + pages.bias[page_c][:, :, None], MASKED)
        top_kx, total_kx, o_kxh = partial
        new_top_kx = jnp.maximum(top_kx, scores_ckxz.max((0, 3)))
        weights_ckxz = jnp.where(seen_c1xz, jnp.exp(scores_ckxz - new_top_kx[..., None]), 0)
        kept_kx = jnp.exp(top_kx - new_top_kx)
        weighed_ckxh = _by_pages(weights_ckxz, np.arange(at_once, dtype=np.int32), pages.values, page_c)
        weighed_ckxh = jnp.where(limit_cx[:, None, :, None] > 0, weighed_ckxh, 0)
        o_kxh = o_kxh * kept_kx[..., None] + weighed_ckxh.sum(0)
        return new_top_kx, total_kx * kept_kx + weights_ckxz.sum((0, 3)), o_kxh

    at_once = 1 if r * m >= MANY_QUERIES and has_kernel(kernels.platform()) else SHARED_AT_ONCE
    turns = (plan.shared.length + at_once - 1) // at_once
    partial = jax.lax.fori_loop(0, turns, turn, _nothing(k, r * m, h))
    top_rkm, total_rkm = (a.reshape(k, r, m).swapaxes(0, 1) for a in partial[:2])
    return top_rkm, total_rkm, partial[2].reshape(k, r, m, h).swapaxes(0, 1)


def _own(q_rkmh: Array, positions_rt: Array, pages: Pages, plan: Plan, partial: Partial) -> Partial:
    r, _, m, _ = q_rkmh.shape
    t, at_once = positions_rt.shape[1], _own_at_once(r)

    def turn(i: Array, partial: Partial) -> Partial:
        page_w, count_w, first_w, row_w = (_at(a, i * at_once, at_once) for a in (*plan.own[:3], plan.reader))
        scores_wkmz = _by_pages(q_rkmh, row_w, pages.keys, page_w)
        limit_wt = _limit(positions_rt[row_w], count_w[:, None], first_w[:, None])
        seen_w1mz = (jnp.arange(pages.bias.shape[2]) < jnp.repeat(limit_wt, m // t, axis=1)[..., None])[:, None]
        scores_wkmz = jnp.where(seen_w1mz, scores_wkmz + pages.bias[page_w][:, :, None], MASKED)
        top_rkm, total_rkm, o_rkmh = partial
        new_top_rkm = top_rkm.at[row_w].max(scores_wkmz.max(3))
        weights_wkmz = jnp.where(seen_w1mz, jnp.exp(scores_wkmz - new_top_rkm[row_w][..., None]), 0)
        weighed_wkmh = _by_pages(weights_wkmz, np.arange(at_once, dtype=np.int32), pages.values, page_w)
        kept_rkm = jnp.exp(top_rkm - new_top_rkm)
        return (
            new_top_rkm,
            (total_rkm * kept_rkm).at[row_w].add(weights_wkmz.sum(3)),
            (o_rkmh * kept_rkm[..., None]).at[row_w].add(weighed_wkmh),
        )

    return jax.lax.fori_loop(0, (plan.own.length + at_once - 1) // at_once, turn, partial)


def _nothing(*shape_kxh: int) -> Partial:
    none_kx = jnp.zeros(shape_kxh[:-1])
    return none_kx + MASKED, none_kx, jnp.zeros(shape_kxh)


def _at(array: Array, start: Array, at_once: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(array, start, at_once)


def _limit(positions: Array, count: Array, first: Array) -> Array:
    """How many places of a page lie at or before a position."""
    return jnp.minimum(count, positions - first + 1)


def _by_pages(
    rows: Float[Array, "*i k m d"], row: Int[Array, " w"], pages: Float[Array, "pages k d y"], page: Int[Array, " w"]
) -> Float[Array, "w k m y"]:
    """Each row's matrices, one of a kv head, times those of its page."""
    k, m, d = rows.shape[-3:]
    heads = np.arange(k, dtype=np.int32)
    row_wk = (row[:, None] * k + heads).reshape(-1)
    page_wk = jnp.where(page[:, None] < 0, -1, page[:, None] * k + heads).reshape(-1)
    left, right = rows.reshape(-1, m, d), pages.reshape(-1, *pages.shape[2:])
    return gathered_matmul(left.astype(right.dtype), row_wk, right, page_wk).reshape(-1, k, m, right.shape[2])
