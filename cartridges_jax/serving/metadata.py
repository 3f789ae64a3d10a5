"""Where tokens lie in the pages of keys and values, and which pages a step of the engine reads.

All of it is worked out on the host, in numpy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Int

from cartridges_jax.kernels.decode_attention.pages import AttentionMetadata

PAGE_SIZE = 128


def num_pages(length: int) -> int:
    """How many pages so many positions need."""
    return -(-length // PAGE_SIZE)


def written_pages(block_table: Int[np.ndarray, "b c"], last: Int[np.ndarray, " b"]) -> Int[np.ndarray, "b c"]:
    """Of each row's pages those that hold its positions up to the last, and -1 in place of the others."""
    return np.where(np.arange(block_table.shape[1]) <= last[:, None] // PAGE_SIZE, block_table, np.int32(-1))


def slot_mapping(
    block_table: Int[np.ndarray, "b c"],
    starts: Int[np.ndarray, " b"],
    counts: Int[np.ndarray, " b"],
    size: int,
    nowhere: int,
) -> Int[np.ndarray, "b t"]:
    """The indices among all positions of all pages of `size` tokens a row, and `nowhere` behind the first `counts`."""
    positions_bt = starts[:, None] + np.arange(size, dtype=np.int32)
    columns_bt = np.minimum(positions_bt // PAGE_SIZE, block_table.shape[1] - 1)
    slots_bt = np.take_along_axis(block_table, columns_bt, axis=1) * PAGE_SIZE + positions_bt % PAGE_SIZE
    return np.where(np.arange(size) < counts[:, None], slots_bt, np.int32(nowhere))


def attention_metadata(
    starts: Int[np.ndarray, " b"],
    block_table: Int[np.ndarray, "b c"],
    slots: Sequence[Sequence[int]],
    slot_pages_each: int,
    shape_lk: tuple[int, int],
    loaded: Mapping[int, tuple[np.ndarray, np.ndarray]],
) -> AttentionMetadata:
    """The metadata of a step for b requests.

    Args:
      starts: where the first token of each stands that asks.
      block_table: the pages of their tokens as far as they are written, as in `AttentionMetadata`.
      slots: where the head pages of their cartridges begin, page by page; of requests at the end that have none they
        may be left out.
      slot_pages_each: how many pages a cartridge has at most.
      loaded: where the slots of each head start and how many they are, [l, k], of the cartridges that lie in pages,
        by their first head pages.
    """
    b = len(starts)
    cartridge_ids, table = np.full(b, -1, np.int32), np.zeros((b, slot_pages_each), np.int32)
    slot_starts, slot_lens = (np.zeros((shape_lk[0], b, shape_lk[1]), np.int32) for _ in range(2))
    found: dict[int, int] = {}  # the cartridges of the step, by their first head pages
    for r, firsts in enumerate(slots):
        if not firsts:
            continue
        if firsts[0] not in found:
            a = found[firsts[0]] = len(found)
            table[a, : len(firsts)] = firsts
            slot_starts[:, a], slot_lens[:, a] = loaded[firsts[0]]
        cartridge_ids[r] = found[firsts[0]]
    return AttentionMetadata(starts, block_table, cartridge_ids, table, slot_starts, slot_lens)
