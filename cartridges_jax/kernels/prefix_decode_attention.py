"""`prefix_decode_attention`: queries over keys and values that lie in pages, of which requests share some.

A page that several requests see (of a cartridge, or of a beginning that their prompts have in common) meets the queries
of the whole batch in one product, so that a step reads it once; those who do not see it are masked. Every other page
meets its own request only: pages stand in one list, whoever they belong to, so that a long request costs the others
nothing. Partial softmaxes merge by their maxima and sums as they come.

Both loops run as often as there are pages: their number is data, and one compiled program serves every length.

Axis letters beyond the README's: r requests, c shared pages, w pages of single requests, z a page's positions, m the
queries of a request that share a kv head (t times g).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from cartridges_jax.kernels.prefix_attention.blockwise import MASKED

SHARED_AT_ONCE = 4  # pages that the whole batch reads in one turn
Partial = tuple[Array, Array, Array]  # the scores' maximum, and relative to it the sums of weights and weighted values


class Pages(NamedTuple):
    """One layer's keys and values. Keys lie with their positions last, which is how a CPU multiplies them fastest."""

    keys: Float[Array, "pages k h z"]
    values: Float[Array, "pages k z h"]
    bias: Float[Array, "pages k z"]  # log-weights of a cartridge's slots; zero for everything else


class Reading(NamedTuple):
    """Pages in the order in which they are read. Position `first` + i of a sequence lies at place i of a page."""

    page: Int[Array, " c"]
    count: Int[Array, " c"]  # places that are filled; 0 for entries that only pad
    first: Int[Array, " c"]
    length: Int[Array, ""]  # entries that are to be read


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
      plan: the size of its `own` list is a multiple of `own_at_once(r)`.
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


def own_at_once(r: int) -> int:
    """Pages of single requests that are read in one turn."""
    return min(max(r, 4), 64)


def _shared(q_rkmh: Array, positions_rt: Array, pages: Pages, plan: Plan) -> Partial:
    """Several pages a turn while there are as many, put behind one another: XLA:CPU shares a product among its cores
    only if each of the matrices that it multiplies is large. Then one by one."""
    r, k, m, h = q_rkmh.shape
    t = positions_rt.shape[1]
    q_kxh = q_rkmh.transpose(1, 0, 2, 3).reshape(k, r * m, h)
    positions_rm = jnp.repeat(positions_rt, m // t, axis=1)

    def turn(start: Array, at_once: int, partial: Partial) -> Partial:
        page_c, count_c, first_c, members_cr = (_at(a, start, at_once) for a in (*plan.shared[:3], plan.members))
        keys_khz, values_kzh, bias_kz = (
            jnp.concatenate([a[page_c[c]] for c in range(at_once)], axis=axis)
            for a, axis in zip(pages, (2, 1, 1), strict=True)
        )
        limit_crm = _limit(positions_rm, count_c[:, None, None], first_c[:, None, None])
        limit_xc = jnp.where(members_cr[:, :, None], limit_crm, 0).reshape(at_once, r * m).T
        seen_xz = (jnp.arange(pages.bias.shape[2]) < limit_xc[:, :, None]).reshape(r * m, -1)
        scores_kxz = jnp.einsum("kxh,khz->kxz", q_kxh, keys_khz, preferred_element_type=jnp.float32)
        scores_kxz = jnp.where(seen_xz, scores_kxz + bias_kz[:, None], MASKED)
        top_kx, total_kx, o_kxh = partial
        new_top_kx = jnp.maximum(top_kx, scores_kxz.max(-1))
        weights_kxz = jnp.exp(scores_kxz - new_top_kx[..., None])
        kept_kx = jnp.exp(top_kx - new_top_kx)
        o_kxh = o_kxh * kept_kx[..., None] + _weighed("kxz,kzh->kxh", weights_kxz, values_kzh)
        return new_top_kx, total_kx * kept_kx + weights_kxz.sum(-1), o_kxh

    several = min(SHARED_AT_ONCE, plan.shared.page.shape[0])
    turns, length = plan.shared.length // several, plan.shared.length
    partial = jax.lax.fori_loop(0, turns, lambda i, o: turn(i * several, several, o), _nothing(k, r * m, h))
    partial = jax.lax.fori_loop(turns * several, length, lambda i, o: turn(i, 1, o), partial)
    top_rkm, total_rkm = (a.reshape(k, r, m).swapaxes(0, 1) for a in partial[:2])
    return top_rkm, total_rkm, partial[2].reshape(k, r, m, h).swapaxes(0, 1)


def _own(q_rkmh: Array, positions_rt: Array, pages: Pages, plan: Plan, partial: Partial) -> Partial:
    r, _, m, _ = q_rkmh.shape
    t, at_once = positions_rt.shape[1], own_at_once(r)

    def turn(i: Array, partial: Partial) -> Partial:
        page_w, count_w, first_w, row_w = (_at(a, i * at_once, at_once) for a in (*plan.own[:3], plan.reader))
        scores_wkmz = jnp.einsum(
            "wkmh,wkhz->wkmz", q_rkmh[row_w], pages.keys[page_w], preferred_element_type=jnp.float32
        )
        limit_wt = _limit(positions_rt[row_w], count_w[:, None], first_w[:, None])
        seen_wmz = jnp.arange(pages.bias.shape[2]) < jnp.repeat(limit_wt, m // t, axis=1)[..., None]
        scores_wkmz = jnp.where(seen_wmz[:, None], scores_wkmz + pages.bias[page_w][:, :, None], MASKED)
        top_rkm, total_rkm, o_rkmh = partial
        new_top_rkm = top_rkm.at[row_w].max(scores_wkmz.max(3))
        weights_wkmz = jnp.exp(scores_wkmz - new_top_rkm[row_w][..., None])
        weighed_wkmh = _weighed("wkmz,wkzh->wkmh", weights_wkmz, pages.values[page_w])
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


def _weighed(spec: str, weights: Array, values: Array) -> Array:
    return jnp.einsum(spec, weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
