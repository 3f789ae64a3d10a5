"""Which requests read a cartridge, or the beginning of their prompts, together: worked out once for all layers.

Requests that have a cartridge in common form a group, and so do those whose first page of tokens is the same. What a
group has in common is read once for all its members, if there are enough of them and it is long enough. Of prompts that
is as many pages as all members have in common; what only some of them share behind those is read by each alone.

Axis letters beyond those of `pages.py`: o the two kinds of groups, those of cartridges first.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from cartridges_jax.kernels.block_sizes import of_kernel
from cartridges_jax.kernels.decode_attention.pages import AttentionMetadata, slot_page_counts

SLOTS, TOKENS = 0, 1  # the kinds of groups: what their members have in common


class Thresholds(NamedTuple):
    """From which size on reading together pays."""

    users: int  # members of a group
    pages: int  # that they have in common, of slots for each head on average


def default_thresholds(platform: str) -> Thresholds:
    """Gives what the table has for a platform's kernel on this device."""
    line = of_kernel(platform)
    return Thresholds(line.users, line.pages)


class Groups(NamedTuple):
    """The groups of the requests of a step, and what they have in common."""

    leader: Int[Array, "o r"]  # the first request of each request's group
    users: Int[Array, "o r"]  # how many members the group has
    is_shared: Bool[Array, "o r"]  # whether they read together
    common: Int[Array, " r"]  # how many pages of tokens a request reads together with others


def groups(metadata: AttentionMetadata, page_size: int, thresholds: Thresholds) -> Groups:
    """Finds the groups of a step."""
    ids_r, table_rc = jnp.asarray(metadata.cartridge_ids), jnp.asarray(metadata.block_table)
    first_r = table_rc[:, 0]
    same_orr = jnp.stack([ids_r[:, None] == ids_r, (first_r[:, None] == first_r) & (first_r >= 0)])
    same_orr |= jnp.eye(len(ids_r), dtype=bool)
    leader_or, users_or = jnp.argmax(same_orr, axis=2), same_orr.sum(2)
    # pages that a request shares with the leader of its group form a beginning of the leader's
    as_leader_rc = (table_rc == table_rc[leader_or[TOKENS]]) & (table_rc >= 0)
    common_r = jnp.cumprod(as_leader_rc, axis=1).sum(1)
    common_r = jnp.where(same_orr[TOKENS], common_r, table_rc.shape[1]).min(1)
    slots_a = jnp.asarray(metadata.slot_lens).sum((0, 2))
    pages_r = jnp.where(ids_r >= 0, slots_a[ids_r], 0) // (metadata.heads * page_size)
    is_shared_or = (users_or >= thresholds.users) & (jnp.stack([pages_r, common_r]) >= thresholds.pages)
    return Groups(leader_or, users_or, is_shared_or, jnp.where(is_shared_or[TOKENS], common_r, 0))


def page_counts(metadata: AttentionMetadata, page_size: int) -> tuple[Int[Array, "l r k"], Int[Array, " r"]]:
    """How many head pages hold slots of each head of a request's cartridge, and how many pages its tokens."""
    ids_r = jnp.asarray(metadata.cartridge_ids)
    starts_lrk, lens_lrk = (jnp.asarray(a)[:, ids_r] for a in (metadata.slot_starts, metadata.slot_lens))
    lens_lrk = jnp.where((ids_r >= 0)[:, None], lens_lrk, 0)
    return slot_page_counts(starts_lrk, lens_lrk, page_size), (jnp.asarray(metadata.block_table) >= 0).sum(1)


def head_pages_read(metadata: AttentionMetadata, page_size: int, thresholds: Thresholds) -> Int[Array, " l"]:
    """How many head pages each layer reads if what requests share is read once."""
    found = groups(metadata, page_size, thresholds)
    slots_lrk, tokens_r = page_counts(metadata, page_size)
    reads_or = jnp.logical_not(found.is_shared) | (found.leader == jnp.arange(len(tokens_r)))
    slots_lrk = jnp.where(reads_or[SLOTS][:, None], slots_lrk, 0)
    tokens_r = jnp.where(reads_or[TOKENS], tokens_r, tokens_r - found.common)
    return slots_lrk.sum((1, 2)) + tokens_r.sum() * metadata.kv_heads


def by_group(found: Groups) -> tuple[Int[Array, " r"], Int[Array, " r"]]:
    """Gives the order of requests in which the members of every group stand side by side, its leader first.

    Returns:
      The place of each request in that order, and the request at each place.
    """
    r = found.leader.shape[1]
    # requests whose first pages are the same have the same cartridge, so that one order serves both kinds
    key_r = found.leader[SLOTS] * r + found.leader[TOKENS]
    index_r = jnp.arange(r)
    is_before_rr = (key_r < key_r[:, None]) | ((key_r == key_r[:, None]) & (index_r < index_r[:, None]))
    place_r = is_before_rr.sum(1)
    return place_r, jnp.argmax(place_r == index_r[:, None], axis=1)
