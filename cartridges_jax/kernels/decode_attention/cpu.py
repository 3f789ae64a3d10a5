"""`decode_attention` for CPUs: head page after head page, each product by the CPU's kernel (`gathered_matmul`).

A head page that enough requests see (of a cartridge, or of a beginning that their prompts have in common) meets the
queries of the whole batch in one product, so that a step reads it once; the requests that do not see it are masked.
Every other one meets the queries of its own request only. Each kind is read by one loop, whoever the head pages belong
to, so that a long request costs the others nothing, and a long head of a cartridge neither: a head page is read for the
heads that have slots in it and for no other. The softmax is computed online (`softmax.py`).

Both loops run as often as there are head pages: their number is data, and one compiled program serves every length.

What a query does not see has no part in its result, whatever number it is. A probability of zero would not be enough,
since zero times infinity is not a number. So masked probabilities are zeros, also for a query all of whose scores lie
below the mask's, and a page that several requests see adds nothing to the results of the others. What lies beside a
head's slots in their head pages belongs to the same cartridge.

Axis letters beyond those of `softmax.py`: w rows of queries that are multiplied together, x the queries of a row, i
runs.
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
    slot_head_page,
    slot_page_counts,
)
from cartridges_jax.kernels.decode_attention.softmax import Options, State, finished, heads_together, started
from cartridges_jax.kernels.gathered_matmul import gathered_matmul
from cartridges_jax.kernels.prefix_attention.blockwise import MASKED, soft_capped

POSITIONS_LAST = True
SHARED_AT_ONCE = 4  # head pages of each kv head that the whole batch reads in one turn of the loop
MANY_QUERIES = 64  # with so many queries, a single one is work enough for a turn of the loop
# To multiply so many rows of queries by a page, all but one of them for nothing, costs what reading it once more costs.
ROWS_PER_USER = 8


class Runs(NamedTuple):
    """The head pages that one of the loops reads, in the order in which it does, as numbers from 0 on.

    A run is what is read for a kv head because of a request (run i is of request i // k and head i % k): first head
    pages of the request's cartridge, then some of its tokens'. The last axis of each field is that of runs.
    """

    start: Int[Array, "*l i"]  # the run's first number; those up to `slots_end` are the cartridge's, the rest tokens'
    slots_end: Int[Array, "*l i"]
    end: Int[Array, "*l i"]
    slot_page: Int[Array, "*l i"]  # added to a number, it gives that of the head page in the cartridge
    column: Int[Array, "*l i"]  # added to a number, it gives the block table's column of the tokens' page
    slot_start: Int[Array, "*l i"]  # where the head's slots start among the cartridge's, and where they end
    slot_stop: Int[Array, "*l i"]


class Order(NamedTuple):
    """What is read once for several requests, each time because of the first of them, and what for each alone.

    The fields of `Runs` of all layers, in one array: a layer takes its part at once.
    """

    shared: Int[Array, "l i fields"]
    own: Int[Array, "l i fields"]


class Entries(NamedTuple):
    """Head pages that are read in one turn."""

    run: Int[Array, " e"]
    head_page: Int[Array, " e"]  # -1: there is none
    is_slots: Bool[Array, " e"]  # whether slots lie in it, or tokens
    column: Int[Array, " e"]  # of tokens: where the block table has the page
    start: Int[Array, " e"]  # from which of its positions on it is read, and up to which; of tokens all may be
    limit: Int[Array, " e"]


def cpu_attention(
    q: Float[Array, "r t n h"], pages: Pages, metadata: AttentionMetadata, options: Options
) -> Float[Array, "r t n h"]:
    (r, t), k = q.shape[:2], metadata.kv_heads
    q_rkmh = heads_together(q, k, options.scale)
    m = q_rkmh.shape[2]
    position_rm = jnp.repeat(metadata.starts[:, None] + jnp.arange(t), m // t, axis=1)
    queries = q_rkmh, *started(q_rkmh, t, options.sinks)  # and what their softmax has come to
    q_kxh, *state = (a.swapaxes(0, 1).reshape(k, r * m, *a.shape[3:]) for a in queries)
    at_once = k * (1 if r * m >= MANY_QUERIES else SHARED_AT_ONCE)
    state = _attend(q_kxh, position_rm.reshape(1, -1), pages, metadata, True, at_once, tuple(state), options)
    state = tuple(a.reshape(k, r, m, *a.shape[2:]).swapaxes(0, 1) for a in state)
    if r > 1:  # a request that is alone shares all its pages with nobody
        q_wmh, *state = (a.reshape(r * k, m, *a.shape[3:]) for a in (q_rkmh, *state))
        position_wm = jnp.repeat(position_rm, k, axis=0)
        state = _attend(q_wmh, position_wm, pages, metadata, False, k * min(max(r, 4), 64), tuple(state), options)
        state = tuple(a.reshape(r, k, m, *a.shape[2:]) for a in state)
    return finished(state, t).astype(q.dtype)


def ordered(metadata: AttentionMetadata, z: int) -> Order:
    """Works out what is read because of which request, for all layers."""
    table_rc, ids_r = jnp.asarray(metadata.block_table), jnp.asarray(metadata.cartridge_ids)
    r, index_r = len(table_rc), jnp.arange(len(table_rc))
    starts_lrk, lens_lrk = (jnp.asarray(a)[:, ids_r] for a in (metadata.slot_starts, metadata.slot_lens))
    lens_lrk = jnp.where((ids_r >= 0)[:, None], lens_lrk, 0)
    slot_pages_lrk = slot_page_counts(starts_lrk, lens_lrk, z)
    fewest_users = max(2, r // ROWS_PER_USER) if r > 1 else 1
    same_rr = ids_r[:, None] == ids_r
    shares_slots_r = same_rr.sum(0) >= fewest_users
    reads_slots_r = shares_slots_r & (jnp.argmax(same_rr, axis=0) == index_r)
    exists_rc = table_rc >= 0
    same_rrc = (table_rc[:, None] == table_rc) & exists_rc
    shared_rc = exists_rc & (same_rrc.sum(0) >= fewest_users)
    # pages that several requests see come before the others, those last that no earlier request sees
    num_shared_r = shared_rc.sum(1)
    num_read_r = (shared_rc & (jnp.argmax(same_rrc, axis=0) == index_r[:, None])).sum(1)

    def runs(reads_slots_r: Array, column_r: Array, num_pages_r: Array) -> Array:
        num_slot_pages_lrk = jnp.where(reads_slots_r[:, None], slot_pages_lrk, 0)
        count_lrk = num_slot_pages_lrk + num_pages_r[:, None]
        end_lrk = jnp.cumsum(count_lrk.reshape(len(count_lrk), -1), axis=1).reshape(count_lrk.shape)
        begin_lrk = end_lrk - count_lrk
        slots_end_lrk = begin_lrk + num_slot_pages_lrk
        fields = Runs(
            begin_lrk,
            slots_end_lrk,
            end_lrk,
            starts_lrk // z - begin_lrk,
            column_r[:, None] - slots_end_lrk,
            starts_lrk,
            starts_lrk + lens_lrk,
        )
        return jnp.stack([field.reshape(len(field), -1) for field in fields], axis=2)

    return Order(
        runs(reads_slots_r, num_shared_r - num_read_r, num_read_r),
        runs(~shares_slots_r, num_shared_r, exists_rc.sum(1) - num_shared_r),
    )


def _attend(
    q_wxh: Float[Array, "w x h"],
    position_wx: Int[Array, "w x"],
    pages: Pages,
    metadata: AttentionMetadata,
    is_shared: bool,
    at_once: int,
    state: State,
    options: Options,
) -> State:
    """Reads all runs of a kind; rows of queries are those of each run, or the whole batch's for each kv head.

    Args:
      position_wx: where the queries stand; of the whole batch the same for all rows, which may be given as one.
    """
    k = metadata.kv_heads
    runs = (metadata.order.shared if is_shared else metadata.order.own)[metadata.layer]
    keys, values, bias = pages.keys, pages.values, pages.bias

    def turn(i: Array, state: State) -> State:
        entries = _entries(runs, metadata, pages.page_size, i * at_once + jnp.arange(at_once))
        row_e = entries.run % k if is_shared else entries.run
        position_ex = position_wx if is_shared else position_wx[row_e]
        start_ex, limit_ex = _range(position_ex, entries, pages.page_size, options.window)
        if is_shared and len(metadata.starts) > 1:
            sees_er = _sees(entries, metadata, k)
            limit_ex = jnp.where(jnp.repeat(sees_er, q_wxh.shape[1] // sees_er.shape[1], axis=1), limit_ex, 0)
        if is_shared:  # XLA would work out the ranges of so many queries anew for each position of a page
            start_ex, limit_ex = jax.lax.optimization_barrier((start_ex, limit_ex))
        at_z = jnp.arange(pages.page_size)
        seen_exz = (at_z >= start_ex[..., None]) & (at_z < limit_ex[..., None])
        scores_exz = gathered_matmul(q_wxh.astype(keys.dtype), row_e, keys, entries.head_page)
        bias_ez = jnp.where(entries.is_slots[:, None], bias[entries.head_page], 0)
        scores_exz = soft_capped(scores_exz, options.soft_cap) + bias_ez[:, None]
        scores_exz = jnp.where(seen_exz, scores_exz, MASKED)
        running_max_wx, denominator_wx, o_wxh = state
        new_max_wx = running_max_wx.at[row_e].max(scores_exz.max(2))
        probs_exz = jnp.where(seen_exz, jnp.exp(scores_exz - new_max_wx[row_e][..., None]), 0)
        each_e = np.arange(at_once, dtype=np.int32)
        weighed_exh = gathered_matmul(probs_exz.astype(values.dtype), each_e, values, entries.head_page)
        weighed_exh = jnp.where(limit_ex[..., None] > 0, weighed_exh, 0)
        rescale_wx = jnp.exp(running_max_wx - new_max_wx)
        denominator_wx = (denominator_wx * rescale_wx).at[row_e].add(probs_exz.sum(2))
        return new_max_wx, denominator_wx, (o_wxh * rescale_wx[..., None]).at[row_e].add(weighed_exh)

    num_turns = (Runs(*runs[-1]).end + at_once - 1) // at_once
    return jax.lax.fori_loop(0, num_turns, turn, state)


def _entries(runs: Int[Array, "i fields"], metadata: AttentionMetadata, z: int, number_e: Int[Array, " e"]) -> Entries:
    """Finds the head pages of these numbers of a layer's runs."""
    k = metadata.kv_heads
    # unsigned, since for a number that may be negative every index and every division would take further steps
    run_e = (Runs(*runs.T).start <= number_e[:, None]).sum(1, dtype=jnp.uint32) - 1
    run = Runs(*runs[run_e].T)
    request_e = run_e // k
    is_slots_e = number_e < run.slots_end
    slot_page_number_e = number_e + run.slot_page
    cartridge_e = jnp.asarray(metadata.cartridge_ids)[request_e]
    slot_page_e = slot_head_page(metadata, cartridge_e, slot_page_number_e)
    column_e = number_e + run.column
    page_e = jnp.asarray(metadata.block_table).at[request_e, column_e].get(mode="clip")
    token_page_e = page_e * metadata.heads + metadata.layer * k + (run_e % k).astype(jnp.int32)
    is_any_e = number_e < run.end
    origin_e = slot_page_number_e * z
    return Entries(
        run_e,
        jnp.where(is_any_e, jnp.where(is_slots_e, slot_page_e, token_page_e), -1),
        is_slots_e,
        column_e,
        jnp.where(is_slots_e, run.slot_start - origin_e, 0),
        jnp.where(is_any_e, jnp.where(is_slots_e, run.slot_stop - origin_e, z), 0),
    )


def _sees(entries: Entries, metadata: AttentionMetadata, k: int) -> Bool[Array, "e r"]:
    """Which requests see head pages: those of its cartridge, or those that have its page where it stands."""
    ids_r, table_rc = jnp.asarray(metadata.cartridge_ids), jnp.asarray(metadata.block_table)
    request_e = entries.run // k
    page_er = table_rc.at[:, entries.column].get(mode="clip").T
    page_e = table_rc.at[request_e, entries.column].get(mode="clip")
    return jnp.where(entries.is_slots[:, None], ids_r == ids_r[request_e][:, None], page_er == page_e[:, None])


def _range(
    position_ex: Int[Array, "_e x"], entries: Entries, z: int, window: int | None
) -> tuple[Int[Array, "e _x"], Int[Array, "e x"]]:
    """From which and up to which of a head page's positions a query sees; of tokens, those up to its own."""
    behind_ex = position_ex - entries.column[:, None] * z + 1
    is_slots_e1, start_e1, limit_e1 = (a[:, None] for a in (entries.is_slots, entries.start, entries.limit))
    limit_ex = jnp.where(is_slots_e1, limit_e1, jnp.minimum(behind_ex, limit_e1))
    if window is None:
        return start_e1, limit_ex
    return jnp.where(is_slots_e1, start_e1, behind_ex - window), limit_ex
