"""Requests over pages, two cartridges among them, and what each should get: one dense softmax, alone, in float64.

`attend` is `decode_attention`, and the kernels of other platforms, interpreted in small blocks.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cartridges_jax import kernels
from cartridges_jax.kernels.decode_attention import (
    KERNELS,
    decode_attention,
    gpu,
    new_pages,
    ordered,
    rotate_and_write,
    tpu,
    tpu_kernels,
)
from cartridges_jax.kernels.decode_attention.pages import AttentionMetadata, Pages, lay_out_slots, slot_starts
from cartridges_jax.kernels.decode_attention.sharing import Thresholds
from cartridges_jax.kernels.decode_attention.softmax import Options

# the cartridge of each request, and how many tokens it has behind it
REQUESTS = [("a", 6), ("b", 1), (None, 9), ("a", 1), ("a", 17)]
# rows of a batch, query tokens of each
BATCHES = [([0, 1, 2, 3, 4], 1), ([4, 2], 1), ([3], 1), ([4], 9), ([2, 0], 3)]
NUM_PAGES, PAGES_EACH = 40, 12
WHOLE_PAGES, SHARED_PAGE = {"a": 30, "b": 35}, 39  # the cartridges' ends lie in one page
LAYERS, LAYER = 2, 1  # the one that is asked for; in the other one, each head of a cartridge has one slot
RAGGED = {"a": (19, 2, 0, 8), "b": (1, 3, 4, 0)}  # slots of the heads, again and again

# several parts, blocks of members and blocks of keys, so that a mix-up shows
THRESHOLDS = Thresholds(users=2, pages=1)
PARTS = {"programs": 20, "fewest_parts": 2, "most_parts": 3, "shared_parts": 2}
BLOCK_SIZES: dict[str | None, Any] = {
    "gpu": dataclasses.replace(
        gpu.default_block_sizes(), rows=16, keys=2, requests=2, thresholds=THRESHOLDS, **PARTS, interpret=True
    ),
    "tpu": tpu_kernels.BlockSizes(rows=32, written=2, thresholds=THRESHOLDS, interpret=True),
}


def is_interpreted(implementation: str | None) -> bool:
    """Whether it is a kernel of a platform that is not here."""
    return implementation in KERNELS and implementation != kernels.platform()


def attend(q: Any, pages: Pages, metadata: AttentionMetadata, implementation: str | None, **how: Any) -> jax.Array:
    """`decode_attention`, or a kernel of another platform, interpreted; the metadata is not `ordered` yet."""
    if not is_interpreted(implementation):
        metadata = ordered(metadata, pages.page_size, implementation).of_layer(LAYER)
        return decode_attention(q, pages, metadata, implementation, **how)
    sizes, module = BLOCK_SIZES[implementation], {"gpu": gpu, "tpu": tpu}[implementation]
    metadata = metadata._replace(order=module.ordered(metadata, pages.page_size, sizes)).of_layer(LAYER)
    return getattr(module, f"{implementation}_attention")(q, pages, metadata, Options(**how), sizes)


def rotated_and_written(
    heads: Any, rope: Any, slot_mapping: Any, pages: Pages, metadata: AttentionMetadata, implementation: str
) -> tuple[jax.Array, Pages]:
    """`rotate_and_write` of a kernel of any platform."""
    if not is_interpreted(implementation):
        return rotate_and_write(heads, rope, slot_mapping, pages, metadata, implementation)
    write = {"gpu": gpu.gpu_rotate_and_write, "tpu": tpu.tpu_rotate_and_write}[implementation]
    return write(heads, rope, slot_mapping, pages, metadata, BLOCK_SIZES[implementation])


@dataclasses.dataclass(frozen=True)
class Case:
    """Lengths are those of pages of 4, times `scale`: with it, a cartridge always ends in the middle of a page."""

    kv_heads: int = 2
    h: int = 8
    scale: int = 1
    is_ragged: bool = False

    @property
    def z(self) -> int:
        return 4 * self.scale

    def lengths(self, name: str) -> np.ndarray:
        """How many slots each head of each layer has."""
        uniform = {"a": (19,), "b": (3,)}
        lengths = (RAGGED if self.is_ragged else uniform)[name]
        asked = np.resize(np.array(lengths, np.int32), self.kv_heads)
        return np.stack([np.ones_like(asked), asked]) * self.scale

    @property
    def tables(self) -> dict[str, list[int]]:
        """Where the cartridges' head pages begin: whole pages, and of the last one each a part."""
        heads, offset, tables = LAYERS * self.kv_heads, 0, {}
        for name, first in WHOLE_PAGES.items():
            whole, rest = divmod(-(-int(self.lengths(name).sum()) // self.z), heads)
            assert 0 < rest <= heads - offset
            tables[name] = [page * heads for page in range(first, first + whole)] + [SHARED_PAGE * heads + offset]
            offset += rest
        return tables

    @functools.cached_property
    def contents(self) -> dict[Any, tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Keys, values and biases of the cartridges, by name, and of the requests' tokens, by number."""
        rng = np.random.default_rng(0)
        counts = {name: int(self.lengths(name).max()) for name in WHOLE_PAGES}
        counts |= {r: tokens * self.scale for r, (_, tokens) in enumerate(REQUESTS)}

        def normal(*shape: int) -> np.ndarray:
            return rng.standard_normal(shape).astype(np.float32)

        made = {}
        for name, count in counts.items():
            bias = normal(count, self.kv_heads) if isinstance(name, str) else np.zeros((count, self.kv_heads))
            made[name] = normal(count, self.kv_heads, self.h), normal(count, self.kv_heads, self.h), bias
        return made

    def pages(self, implementation: str | None, without: str = "") -> Pages:
        """What is nobody's holds NaN, and so do keys and biases behind a request's last token, and other layers.

        Slots of a cartridge `without` are NaN, too.
        """
        heads = LAYERS * self.kv_heads
        layout = "xla" if is_interpreted(implementation) else implementation
        pages = new_pages(NUM_PAGES * heads, self.z, self.h, jnp.float32, layout)
        pages = pages.replace(keys=pages.keys + np.nan, values=pages.values + np.nan, bias=pages.bias + np.nan)
        for name, table in self.tables.items():
            by_layer = [np.stack([a + 1, a]) for a in self.contents[name]]
            lengths, own = self.lengths(name), np.arange(self.kv_heads)[None]
            count = -(-int(lengths.sum()) // self.z)
            laid = [lay_out_slots(a, lengths, own, self.z, count)[0] for a in by_layer]
            laid = [a * np.nan if name == without else a for a in laid]
            for i, first in enumerate(table):
                part = [a[i * heads : (i + 1) * heads] for a in laid]
                pages = pages.load(first, len(part[0]), *part)
        for r, (_, tokens) in enumerate(REQUESTS):
            own = np.arange(6 * r * heads, (6 * r + -(-tokens * self.scale // self.z)) * heads)
            pages = pages.replace(values=pages.values.at[own].set(0))
            page, offset = np.divmod(np.arange(tokens * self.scale)[None], self.z)
            keys, values, _ = (a[None] for a in self.contents[r])
            pages = pages.write((6 * r + page) * heads + LAYER * self.kv_heads, offset, keys, values)
        return pages

    def given(self, requests: list[int], t: int) -> AttentionMetadata:
        """The metadata of the requests, t query tokens each, for all layers; `attend` takes one of them."""
        names = list(WHOLE_PAGES)
        starts = [REQUESTS[r][1] * self.scale - t for r in requests]
        tokens = np.full((len(requests), PAGES_EACH), -1, np.int32)
        for row, r in enumerate(requests):
            count = -(-REQUESTS[r][1] * self.scale // self.z)
            tokens[row, :count] = 6 * r + np.arange(count)
        ids = [names.index(name) if name else -1 for name in (REQUESTS[r][0] for r in requests)]
        slots = np.zeros((len(names), PAGES_EACH))
        for row, table in zip(slots, self.tables.values(), strict=True):
            row[: len(table)] = table
        lens = np.stack([self.lengths(name) for name in names], axis=1)
        firsts = np.stack([slot_starts(self.lengths(name)) for name in names], axis=1)
        return AttentionMetadata(*(np.array(a, np.int32) for a in (starts, tokens, ids, slots, firsts, lens)))

    def alone(
        self,
        q_tnh: np.ndarray,
        r: int,
        window: int | None = None,
        scale: float | None = None,
        soft_cap: float | None = None,
        sinks: np.ndarray | None = None,
        tokens: int | None = None,
    ) -> np.ndarray:
        """The definition, of the last tokens of a request, which has so many `tokens` if its contents were changed."""
        name, usual = REQUESTS[r]
        tokens, (t, n, h) = tokens or usual * self.scale, q_tnh.shape
        keys, values, bias = (a.astype(np.float64) for a in self.contents[r])
        seen_tk = np.arange(tokens)[None, :] <= tokens - t + np.arange(t)[:, None]
        if window is not None:
            seen_tk &= np.arange(tokens)[None, :] > tokens - t + np.arange(t)[:, None] - window
        seen = np.repeat(seen_tk[:, None], self.kv_heads, axis=1)  # t k s
        if name is not None:
            pairs = zip(self.contents[name], (keys, values, bias), strict=True)
            keys, values, bias = (np.concatenate(pair) for pair in pairs)
            slots = np.arange(len(keys) - tokens) < self.lengths(name)[LAYER][:, None]
            seen = np.concatenate([np.repeat(slots[None], t, axis=0), seen], axis=2)
        q_tkgh = q_tnh.astype(np.float64).reshape(t, self.kv_heads, n // self.kv_heads, h)
        scores = np.einsum("tkgh,skh->tkgs", q_tkgh, keys) * (h**-0.5 if scale is None else scale)
        scores = scores if soft_cap is None else soft_cap * np.tanh(scores / soft_cap)
        scores = np.where(seen[:, :, None], scores + bias.T[None, :, None], -np.inf)
        sink = (np.full(n, -np.inf) if sinks is None else sinks).reshape(self.kv_heads, -1)
        running_max = np.maximum(scores.max(-1), sink)
        probs = np.exp(scores - running_max[..., None])
        denominator = probs.sum(-1) + np.exp(sink - running_max)
        return np.einsum("tkgs,skh->tkgh", probs / denominator[..., None], values).reshape(t, n, h)
