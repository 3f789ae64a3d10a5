"""Where tokens lie in the pages of keys and values, and which pages a step of the engine reads.

All of it is worked out on the host, in numpy.

A sequence begins on a page with the slots of its cartridge, if it has one; its tokens begin on the next page.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from cartridges_jax.kernels.decode_attention.pages import AttentionMetadata
from cartridges_jax.serving.scheduler import BlockTable

PAGE_SIZE = 128


class Row(NamedTuple):
    """One request's part of a step: its tokens from `start` to `last` are written, and those from `start` on ask."""

    block_table: BlockTable
    start: int
    last: int


def num_pages(length: int) -> int:
    """How many pages so many positions need."""
    return -(-length // PAGE_SIZE)


def slot_index(block_table: BlockTable, position: int) -> int:
    """The index of a sequence's token among all positions of all pages."""
    page, offset = divmod(position, PAGE_SIZE)
    return block_table.pages[num_pages(block_table.prefix_length) + page] * PAGE_SIZE + offset


def attention_metadata(
    rows: Sequence[Row], b: int, pages_each: int, shape_lk: tuple[int, int], slot_lens: Mapping[int, np.ndarray]
) -> AttentionMetadata:
    """The metadata of a step for b requests, the last of which may be none.

    Args:
      pages_each: how many pages a request has at most.
      slot_lens: how many slots each head has, [l, k], of the cartridges that lie in pages, by the first of these pages.
    """
    starts, cartridge_ids = np.zeros(b, np.int32), np.full(b, -1, np.int32)
    tokens, slots = np.full((b, pages_each), -1, np.int32), np.zeros((b, pages_each), np.int32)
    found: dict[int, int] = {}  # the cartridges of the step, by their first pages
    for r, (block_table, start, last) in enumerate(rows):
        pages, own = block_table.pages, num_pages(block_table.prefix_length)
        starts[r] = start
        count = last // PAGE_SIZE + 1
        tokens[r, :count] = pages[own : own + count]
        if own:
            a = cartridge_ids[r] = found.setdefault(pages[0], len(found))
            slots[a, :own] = pages[:own]
    lens = np.zeros((shape_lk[0], b, shape_lk[1]), np.int32)
    for first, a in found.items():
        lens[:, a] = slot_lens[first]
    return AttentionMetadata(starts, tokens, cartridge_ids, slots, lens, -(-lens.max((0, 2)) // PAGE_SIZE))
