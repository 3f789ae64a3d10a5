"""Where tokens lie in the pages of keys and values, and which pages a step of the engine reads.

All of it is worked out on the host, in numpy.

A sequence begins on a page with the slots of its cartridge, if it has one; its tokens begin on the next page.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from cartridges_jax.kernels.prefix_decode_attention import AttentionMetadata, PageList, own_entries, shared_entries
from cartridges_jax.serving.scheduler import BlockTable, SequenceInput

PAGE_SIZE = 128
# To multiply so many rows of queries by a page, all but one of them for nothing, costs what reading it once more costs.
ROWS_PER_USER = 8


def num_pages(length: int) -> int:
    """How many pages so many positions need."""
    return -(-length // PAGE_SIZE)


def slot_index(block_table: BlockTable, position: int) -> int:
    """The index of a position behind the cartridge among all positions of all pages."""
    page, offset = divmod(position - block_table.prefix_length, PAGE_SIZE)
    return block_table.pages[num_pages(block_table.prefix_length) + page] * PAGE_SIZE + offset


def chunk_metadata(block_table: BlockTable, position: int, pages_each: int) -> AttentionMetadata:
    """The metadata of one request whose last token is at `position`; a request has at most `pages_each` pages."""
    most = shared_entries(pages_each)
    pages = PageList.of(_visible_pages(block_table, position), most)
    return AttentionMetadata(pages, np.ones((most, 1), bool), PageList.of([], 0), np.zeros(0, np.int32))


def batch_metadata(inputs: Sequence[SequenceInput], b: int, pages_each: int, all_pages: int) -> AttentionMetadata:
    """The metadata of a batch that is padded to b requests.

    A page that enough requests see is read once, and meets the queries of the whole batch. The lists have room for
    whatever b requests of at most `pages_each` pages, on `all_pages` pages together, can come to see.
    """
    visible = [_visible_pages(i.block_table, i.position) for i in inputs]
    users = Counter(page for entries in visible for page, _, _ in entries)
    fewest = max(2, b // ROWS_PER_USER) if b > 1 else 1
    shared = {entry[0]: entry for entries in visible for entry in entries if users[entry[0]] >= fewest}
    order = {page: c for c, page in enumerate(shared)}
    shared_mask = np.zeros((shared_entries(pages_each if b == 1 else all_pages), b), bool)
    own, owners = [], []
    for row, entries in enumerate(visible):
        for entry in entries:
            if entry[0] in order:
                shared_mask[order[entry[0]], row] = True
            else:
                own.append(entry)
                owners.append(row)
    most = 0 if b == 1 else own_entries(b * pages_each, b)
    seq_ids = np.zeros(most, np.int32)
    seq_ids[: len(owners)] = owners
    shared_pages = PageList.of(list(shared.values()), len(shared_mask))
    return AttentionMetadata(shared_pages, shared_mask, PageList.of(own, most), seq_ids)


def _visible_pages(block_table: BlockTable, position: int) -> list[tuple[int, int, int]]:
    """The pages that hold a sequence up to `position`, each with its filled positions and the first one's position."""
    p, own = block_table.prefix_length, num_pages(block_table.prefix_length)
    slots = [(block_table.pages[i], min(PAGE_SIZE, p - i * PAGE_SIZE), i * PAGE_SIZE) for i in range(own)]
    count = (position - p) // PAGE_SIZE + 1
    return slots + [(block_table.pages[own + i], PAGE_SIZE, p + i * PAGE_SIZE) for i in range(count)]
