"""`decode_attention` in Pallas for GPUs (Triton): one kernel over all keys of a layer, and one that merges its parts.

The keys of a request are split among programs, so that a few long requests occupy the whole device; each program has an
online softmax over its part. What several requests share (`sharing.py`) is read by programs that have the queries of a
few of them together, and counts as further parts of each. Nothing is gathered: a program finds its head pages in the
block tables. Where a step's keys are read, and by how many programs, is data: no host is asked, and one compiled
program serves every length.

A long chunk of a prompt is cut into short ones, each of which is read as a request of its own.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from cartridges_jax.kernels.block_sizes import of_kernel
from cartridges_jax.kernels.decode_attention import gpu_kernels
from cartridges_jax.kernels.decode_attention.gpu_kernels import BlockSizes, Layout, Order
from cartridges_jax.kernels.decode_attention.pages import AttentionMetadata, Pages
from cartridges_jax.kernels.decode_attention.sharing import SLOTS, by_group, default_thresholds, groups, page_counts
from cartridges_jax.kernels.decode_attention.softmax import Options, largest_divisor, scale_of

POSITIONS_LAST = False


def default_block_sizes() -> BlockSizes:
    """Gives what the table has for this device."""
    return BlockSizes(default_thresholds("gpu"), **of_kernel("gpu").decode)


def gpu_attention(
    q: Float[Array, "r t n h"],
    pages: Pages,
    metadata: AttentionMetadata,
    options: Options,
    block_sizes: BlockSizes | None = None,
) -> Float[Array, "r t n h"]:
    """Does what `decode_attention` says, on a GPU or interpreted."""
    layout = _layout(q, pages, metadata, options, block_sizes or default_block_sizes())
    parts = gpu_kernels.attend(layout, q, pages, metadata)
    return gpu_kernels.merge(layout, q, *parts, metadata, options.sinks)


def gpu_rotate_and_write(
    heads: Float[Array, "r t n+2k h"],
    rope: tuple[Float[Array, "r t h/2"], Float[Array, "r t h/2"]],
    slot_mapping: Int[Array, "r t"],
    pages: Pages,
    metadata: AttentionMetadata,
    block_sizes: BlockSizes | None = None,
) -> tuple[Float[Array, "r t n h"], Pages]:
    """Rotates queries and keys, which stand beside each other and beside the values, and writes the latter two."""
    interpret = (block_sizes or default_block_sizes()).interpret
    return gpu_kernels.rotate_and_write(heads, *rope, slot_mapping, pages, metadata, interpret)


def ordered(metadata: AttentionMetadata, z: int, block_sizes: BlockSizes | None = None) -> Order:
    """Works out what is read together, and how many head pages the requests have to read of their own."""
    sizes = block_sizes or default_block_sizes()
    found = groups(metadata, z, sizes.thresholds)
    place_r, request_at = by_group(found)
    r = len(place_r)
    # a block of members begins with the leader of a group, and after every so many
    behind_leader_or = jnp.arange(r) - place_r[found.leader[:, request_at]]
    begins_or = found.is_shared[:, request_at] & (behind_leader_or % sizes.requests == 0)
    block_place = (jnp.cumsum(begins_or.reshape(-1)) <= jnp.arange(max(sizes.blocks(r), 1))[:, None]).sum(1)
    left_or = found.users[:, request_at] - behind_leader_or
    left = left_or.reshape(-1).at[block_place].get(mode="fill", fill_value=0)
    slot_pages_lrk, token_pages_r = page_counts(metadata, z)
    alone_lrk = slot_pages_lrk + token_pages_r[:, None]
    own_lrk = jnp.where(found.is_shared[SLOTS][:, None], 0, slot_pages_lrk) + (token_pages_r - found.common)[:, None]
    counts = jnp.stack([alone_lrk, own_lrk])
    return Order(
        found.is_shared.astype(jnp.int32),
        found.common,
        request_at,
        block_place,
        jnp.minimum(left, sizes.requests),
        token_pages_r,
        counts.max((2, 3)),
        counts.sum((2, 3)),
    )


def _layout(q: Array, pages: Pages, metadata: AttentionMetadata, options: Options, sizes: BlockSizes) -> Layout:
    """How a call is cut into programs, which depends on its shapes alone."""
    (r, t, n, h), k = q.shape, metadata.kv_heads
    g = n // k
    tokens = largest_divisor(t, sizes.rows // g)
    is_short = tokens == t and sizes.requests * gpu_kernels.power_of_two(t * g) <= 2 * sizes.rows
    columns = metadata.block_table.shape[1] + metadata.slot_block_table.shape[1]
    own = min(max(sizes.programs // (r * (t // tokens) * k), sizes.fewest_parts), sizes.most_parts, columns)
    blocks = sizes.blocks(r) if is_short else 0
    scale = scale_of(options.scale, h)
    shared = min(sizes.shared_parts, columns) if blocks else 0
    return Layout(
        sizes, tokens, t // tokens, n, k, pages.page_size, own, shared, blocks, options.window, scale, options.soft_cap
    )
