"""Where tokens lie in the pages of keys and values, and which pages a step of the engine reads.

All of it is worked out on the host, in numpy.
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
    return block_table.pages[page] * PAGE_SIZE + offset


def attention_metadata(
    rows: Sequence[Row],
    b: int,
    pages_each: int,
    slot_pages_each: int,
    shape_lk: tuple[int, int],
    loaded: Mapping[int, tuple[np.ndarray, np.ndarray]],
) -> AttentionMetadata:
    """The metadata of a step for b requests, the last of which may be none.

    Args:
      pages_each: how many pages the tokens of a request have at most.
      slot_pages_each: how many pages a cartridge has at most.
      loaded: where the slots of each head start and how many they are, [l, k], of the cartridges that lie in pages,
        by their first head pages.
    """
    starts, cartridge_ids = np.zeros(b, np.int32), np.full(b, -1, np.int32)
    tokens, slots = np.full((b, pages_each), -1, np.int32), np.zeros((b, slot_pages_each), np.int32)
    slot_starts, slot_lens = (np.zeros((shape_lk[0], b, shape_lk[1]), np.int32) for _ in range(2))
    found: dict[int, int] = {}  # the cartridges of the step, by their first head pages
    for r, (block_table, start, last) in enumerate(rows):
        starts[r] = start
        count = last // PAGE_SIZE + 1
        tokens[r, :count] = block_table.pages[:count]
        if not block_table.slots:
            continue
        first = block_table.slots[0]
        if first not in found:
            a = found[first] = len(found)
            slots[a, : len(block_table.slots)] = block_table.slots
            slot_starts[:, a], slot_lens[:, a] = loaded[first]
        cartridge_ids[r] = found[first]
    return AttentionMetadata(starts, tokens, cartridge_ids, slots, slot_starts, slot_lens)
