"""Requests over pages, two cartridges among them, and what each should get: one dense softmax, alone, in float64."""

from __future__ import annotations

import dataclasses

import numpy as np

from cartridges_jax.kernels.prefix_decode_attention import (
    AttentionMetadata,
    PageList,
    Pages,
    own_entries,
    shared_entries,
)

Entry = tuple[int, int, int]  # page, filled positions, position of the first
# the cartridge of each request, and how many tokens it has behind it
REQUESTS = [("a", 6), ("b", 1), (None, 9), ("a", 1), ("a", 17)]
# rows of a batch, query tokens of each
BATCHES = [([0, 1, 2, 3, 4], 1), ([4, 2], 1), ([3], 1), ([4], 9), ([2, 0], 3)]


@dataclasses.dataclass(frozen=True)
class Case:
    """Lengths are those of pages of 4, times `scale`: with it, a cartridge always ends in the middle of a page."""

    kv_heads: int = 2
    h: int = 8
    scale: int = 1
    num_pages: int = 40

    @property
    def z(self) -> int:
        return 4 * self.scale

    def pages(self, rng: np.random.Generator) -> Pages:
        def normal(*shape: int) -> np.ndarray:
            return rng.standard_normal(shape).astype(np.float32)

        n, k, h, z = self.num_pages, self.kv_heads, self.h, self.z
        return Pages(normal(n, k, h, z), normal(n, k, z, h), normal(n, k, z))

    def cartridge(self, name: str | None) -> list[Entry]:
        """Two of 19 and 3 slots, each on pages of its own, and together on more than are read in one turn."""
        slots, first_page = {"a": (19 * self.scale, 30), "b": (3 * self.scale, 36), None: (0, 0)}[name]
        z = self.z
        return [(first_page + i, min(z, slots - i * z), i * z) for i in range(-(-slots // z))]

    def sequence(self, r: int) -> list[Entry]:
        """All pages of a request; its own are 6r, 6r + 1, …"""
        name, tokens = REQUESTS[r]
        behind = self.cartridge(name)
        p, z = sum(count for _, count, _ in behind), self.z
        return behind + [(6 * r + i, z, p + i * z) for i in range(-(-tokens * self.scale // z))]

    def last_positions(self, r: int, t: int) -> np.ndarray:
        name, tokens = REQUESTS[r]
        return sum(count for _, count, _ in self.cartridge(name)) + tokens * self.scale - t + np.arange(t)

    def metadata(self, requests: list[int], shared: bool) -> AttentionMetadata:
        together = [page for name in ("a", "b") for page in self.cartridge(name)] if shared else []
        if len(requests) == 1:
            together = self.sequence(requests[0])
        listed = PageList.of(together, shared_entries(len(together) + 1))  # with padding that is not reached, or is
        shared_mask = np.array([[page in self.sequence(r) for r in requests] for page in together], bool)
        shared_mask = np.pad(
            shared_mask.reshape(-1, len(requests)), ((0, len(listed.block_table) - len(together)), (0, 0))
        )
        own = [(row, page) for row, r in enumerate(requests) for page in self.sequence(r) if page not in together]
        own_list = PageList.of([page for _, page in own], own_entries(len(own) + 1, len(requests)))
        seq_ids = np.zeros(len(own_list.block_table), np.int32)
        seq_ids[: len(own)] = [row for row, _ in own]
        return AttentionMetadata(listed, shared_mask, own_list, seq_ids)

    def alone(self, q_tnh: np.ndarray, positions_t: np.ndarray, r: int, pages: Pages) -> np.ndarray:
        """The definition."""
        keys_skh, values_skh, bias_sk, position_s = [], [], [], []
        for page, count, first in self.sequence(r):
            for i in range(count):
                keys_skh.append(pages.keys[page, :, :, i])
                values_skh.append(pages.values[page, :, i])
                bias_sk.append(pages.bias[page, :, i])
                position_s.append(first + i)
        keys, values, bias = (np.array(a, np.float64) for a in (keys_skh, values_skh, bias_sk))
        t, n, h = q_tnh.shape
        q_tkgh = q_tnh.astype(np.float64).reshape(t, self.kv_heads, n // self.kv_heads, h)
        scores = np.einsum("tkgh,skh->tkgs", q_tkgh, keys) * h**-0.5 + bias.T[None, :, None]
        scores = np.where((np.array(position_s) <= positions_t[:, None])[:, None, None], scores, -np.inf)
        probs = np.exp(scores - scores.max(-1, keepdims=True))
        return np.einsum("tkgs,skh->tkgh", probs / probs.sum(-1, keepdims=True), values).reshape(t, n, h)
