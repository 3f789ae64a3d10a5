"""`decode_attention` in Pallas for TPUs (Mosaic): one kernel a layer, which fetches pages while it computes.

A TPU has one core, or two that share nothing, so that a request's keys are not split. The kernel walks blocks of
requests. What members of a block share (`sharing.py`) is fetched once and meets the queries of the whole block; then
each request's own pages meet its queries, and the next page is under way meanwhile, also that of the next request.

A long chunk of a prompt is cut into shorter ones, each of which is read as a request of its own.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from cartridges_jax.kernels.block_sizes import of_kernel
from cartridges_jax.kernels.decode_attention import tpu_kernels
from cartridges_jax.kernels.decode_attention.pages import AttentionMetadata, Pages
from cartridges_jax.kernels.decode_attention.sharing import Groups, default_thresholds, groups, page_counts
from cartridges_jax.kernels.decode_attention.softmax import Options, largest_divisor, scale_of, sinks_together
from cartridges_jax.kernels.decode_attention.tpu_kernels import BIAS_ROWS, LANES, BlockSizes, Layout, Tables
from cartridges_jax.kernels.prefix_attention.blockwise import MASKED, pad_to_multiple

POSITIONS_LAST = False
SUBLANES = 8  # of a register, in float32
MULTIPLE = BIAS_ROWS  # of head pages in a pool


class Order(NamedTuple):
    """What is worked out once for all layers."""

    groups: Groups
    token_pages: Int[Array, " r"]
    slots: Int[Array, "l 1 2ak"]  # where the slots of each head of each cartridge start, and then how many they are


def default_block_sizes() -> BlockSizes:
    """Gives what the table has for this device."""
    return BlockSizes(default_thresholds("tpu"), **of_kernel("tpu").decode)


def ordered(metadata: AttentionMetadata, z: int, block_sizes: BlockSizes | None = None) -> Order:
    """Works out what requests have in common."""
    found = groups(metadata, z, (block_sizes or default_block_sizes()).thresholds)
    lists = (jnp.asarray(a).reshape(len(a), 1, -1) for a in (metadata.slot_starts, metadata.slot_lens))
    slots = pad_to_multiple(jnp.concatenate([*lists], axis=2), 2, LANES)
    return Order(found, page_counts(metadata, z)[1], slots)


def tpu_attention(
    q: Float[Array, "r t n h"],
    pages: Pages,
    metadata: AttentionMetadata,
    options: Options,
    block_sizes: BlockSizes | None = None,
) -> Float[Array, "r t n h"]:
    """Does what `decode_attention` says, on a TPU or interpreted."""
    sizes, (r, t, n, h), k = block_sizes or default_block_sizes(), q.shape, metadata.kv_heads
    g = n // k
    tokens = largest_divisor(t, sizes.rows // g)
    chunks, m = r * (t // tokens), -(-tokens * g // SUBLANES) * SUBLANES
    # chunks of one request are not read together: they see different pages
    fitting = sizes.rows // m if tokens == t else 1
    requests = largest_divisor(chunks, fitting)
    scale = scale_of(options.scale, h)
    layout = Layout(
        sizes, tokens, t // tokens, n, k, m, requests, pages.page_size, options.window, scale, options.soft_cap
    )
    order = metadata.order
    tables = Tables(
        layer=jnp.asarray(metadata.layer, jnp.int32).reshape(1),
        starts=metadata.starts,
        block_table=metadata.block_table,
        cartridge_ids=metadata.cartridge_ids,
        slot_block_table=metadata.slot_block_table,
        token_pages=order.token_pages,
        leader=order.groups.leader,
        leads=_leads(order.groups.leader, order.groups.is_shared, requests),
        is_shared=order.groups.is_shared,
        common=order.groups.common,
    )
    sinks = None
    if options.sinks is not None:
        sinks = sinks_together(jnp.asarray(options.sinks, jnp.float32), k, tokens)
        sinks = jnp.pad(sinks, ((0, 0), (0, m - tokens * g)), constant_values=MASKED)
    q_qtnh = q.reshape(chunks, tokens, n, h)
    return tpu_kernels.attend(layout, q_qtnh, sinks, pages, tables, order.slots, metadata.heads).reshape(q.shape)


def tpu_rotate_and_write(
    heads: Float[Array, "r t n+2k h"],
    rope: tuple[Float[Array, "r t h/2"], Float[Array, "r t h/2"]],
    slot_mapping: Int[Array, "r t"],
    pages: Pages,
    metadata: AttentionMetadata,
    block_sizes: BlockSizes | None = None,
) -> tuple[Float[Array, "r t n h"], Pages]:
    """Rotates queries and keys, which stand beside each other and beside the values, and writes the latter two."""
    cos, sin = rope
    both = jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([-sin, sin], axis=-1)
    layer = jnp.asarray(metadata.layer, jnp.int32).reshape(1)
    sizes = block_sizes or default_block_sizes()
    return tpu_kernels.rotate_and_write(sizes, heads, *both, slot_mapping, layer, pages, metadata)


def _leads(leader_or: Int[Array, "o r"], is_shared_or: Bool[Array, "o r"], requests: int) -> Bool[Array, "o r"]:
    """Which requests are the first of their group in their block, and so have it read."""
    leader = leader_or.reshape(2, -1, requests)
    is_first = jnp.argmax(leader[..., None] == leader[..., None, :], axis=3) == jnp.arange(requests)
    return is_first.reshape(leader_or.shape) & is_shared_or
