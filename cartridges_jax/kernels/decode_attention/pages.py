"""Where keys and values lie while requests are decoded, and which of them each request sees.

Keys and values lie in pages, which belong to one layer each and hold as many positions of every kv head. A page's part
for one kv head is a *head page*: the one at `page * k + row`, if the pages of a layer are counted head by head.

The tokens of a sequence take whole pages: the i-th page of a request's block table holds the keys and values of the
positions from i times the page size on, each kv head's in the row of its number. The heads of a cartridge may have
different numbers of slots, so its pages are filled head page by head page: in every layer, those of the first head come
first, then those of the second, and so on (`lay_out_slots`, `slot_pages`). Which page a slot lies in thus follows from
the cartridge's block table and from how many slots the heads of the layer have.

Axis letters beyond the usual ones: r requests, a cartridges, c pages of a block table, e entries of a list of pages,
z a page's positions.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


@flax.struct.dataclass
class Pages:
    """The keys and values of one layer, in the layout of the implementation that made them.

    Attributes:
      keys: as the values, or with their positions last, which a CPU multiplies fastest.
      bias: log-weights of a cartridge's slots; zero for tokens.
    """

    keys: Float[Array, "pages k z h"] | Float[Array, "pages k h z"]
    values: Float[Array, "pages k z h"]
    bias: Float[Array, "pages k z"]
    positions_last: bool = flax.struct.field(pytree_node=False, default=False)

    @classmethod
    def empty(cls, num_pages: int, k: int, page_size: int, h: int, dtype: Any, positions_last: bool) -> Pages:
        """Makes pages that hold zeros."""
        values = jnp.zeros((num_pages, k, page_size, h), dtype)
        keys = values.swapaxes(2, 3) if positions_last else values
        return cls(keys, values, jnp.zeros((num_pages, k, page_size), jnp.float32), positions_last)

    @property
    def page_size(self) -> int:
        return self.bias.shape[2]

    def write(self, slot_mapping: Int[Array, "r t"], k: Float[Array, "r t k h"], v: Float[Array, "r t k h"]) -> Pages:
        """Writes tokens at their indices among all positions of all pages; an index that is too large is dropped."""
        page_rt, offset_rt = jnp.divmod(slot_mapping, self.page_size)
        at = page_rt, slice(None), offset_rt
        at_keys = (page_rt, slice(None), slice(None), offset_rt) if self.positions_last else at
        return self.replace(
            keys=self.keys.at[at_keys].set(k.astype(self.keys.dtype), mode="drop"),
            values=self.values.at[at].set(v.astype(self.values.dtype), mode="drop"),
            bias=self.bias.at[at].set(0, mode="drop"),
        )

    def load(
        self,
        page: Int[Array, ""],
        keys: Float[Array, "k z h"],
        values: Float[Array, "k z h"],
        bias: Float[Array, "k z"],
    ) -> Pages:
        """Writes a whole page."""
        keys = keys.swapaxes(1, 2) if self.positions_last else keys
        return self.replace(
            keys=self.keys.at[page].set(keys.astype(self.keys.dtype)),
            values=self.values.at[page].set(values.astype(self.values.dtype)),
            bias=self.bias.at[page].set(bias),
        )

    def copy(self, source: Int[Array, ""], target: Int[Array, ""], count: Int[Array, ""]) -> Pages:
        """Makes the target page a copy of the source's first `count` positions; behind them its values are zeros."""
        is_copied_z1 = jnp.arange(self.page_size)[:, None] < count
        return self.replace(
            keys=self.keys.at[target].set(self.keys[source]),
            values=self.values.at[target].set(jnp.where(is_copied_z1, self.values[source], 0)),
            bias=self.bias.at[target].set(self.bias[source]),
        )


class AttentionMetadata(NamedTuple):
    """Which request sees which pages: its cartridge's, and those of its own tokens, which others may see as well.

    All implementations read this; in which order, and what they read once for several requests, is their business.
    """

    starts: Int[Array | np.ndarray, " r"]  # the position of a request's first query among its tokens
    block_table: Int[Array | np.ndarray, "r c"]  # the pages of its tokens as far as they are written; then -1
    cartridge_ids: Int[Array | np.ndarray, " r"]  # which of the cartridges it sees; -1 for none
    slot_block_table: Int[Array | np.ndarray, "a c"]  # the pages of each cartridge
    slot_lens: Int[Array | np.ndarray, "l a k"]  # how many slots each head has; `of_layer` gives a layer's, [a, k]
    num_slot_pages: Int[Array | np.ndarray, " a"]  # the most head pages that a head of the cartridge has in any layer

    def of_layer(self, layer: int) -> AttentionMetadata:
        """The metadata as `decode_attention` takes it, for one layer."""
        return self._replace(slot_lens=self.slot_lens[layer])


def slot_pages(
    metadata: AttentionMetadata, cartridge: Int[Array, " e"], number: Int[Array, " e"], page_size: int
) -> tuple[Int[Array, "e k"], Int[Array, "e k"]]:
    """Finds, for each kv head, its head page of that number in a cartridge, and how many slots lie in it.

    A head that has no such page has the page -1, with no slots.
    """
    lens_ek = metadata.slot_lens[cartridge]
    pages_ek = -(-lens_ek // page_size)
    index_ek = jnp.cumsum(pages_ek, axis=1) - pages_ek + number[:, None]
    k = lens_ek.shape[1]
    page_ek = metadata.slot_block_table.at[cartridge[:, None], index_ek // k].get(mode="clip")
    count_ek = jnp.clip(lens_ek - number[:, None] * page_size, 0, page_size)
    return jnp.where(count_ek > 0, page_ek * k + index_ek % k, -1), count_ek


def lay_out_slots(
    slots: Float[np.ndarray, "l p k *h"], lengths: Int[np.ndarray, "l k"], page_size: int
) -> Float[np.ndarray, "pages l k z *h"]:
    """Lays a cartridge's slots out as its pages hold them; what is no slot is zero. It is done on the host."""
    l, p, k, *h = slots.shape
    most = -(-p // page_size)
    padded = np.pad(slots, [(0, 0), (0, most * page_size - p)] + [(0, 0)] * (slots.ndim - 2))
    missing = np.arange(most * page_size)[:, None] >= lengths[:, None]
    padded[missing] = 0
    by_page = padded.reshape(l, most, page_size, k, *h)
    pages_lk = -(-lengths // page_size)
    first_lk = np.cumsum(pages_lk, axis=1) - pages_lk
    layer, head, number = np.nonzero(np.arange(most) < pages_lk[..., None])
    laid = np.zeros((l, most * k, page_size, *h), slots.dtype)
    laid[layer, first_lk[layer, head] + number] = by_page[layer, number, :, head]
    return laid.reshape(l, most, k, page_size, *h).swapaxes(0, 1)


def visible(start: Int[Array, "*r"], t: int, position: Int[Array, "*r s"], window: int | None) -> Array:
    """Whether each of t queries from `start` on sees the tokens at these positions, as an array [*r, t, s]."""
    query = (start[..., None] + jnp.arange(t))[..., None]
    seen = position[..., None, :] <= query
    return seen if window is None else seen & (position[..., None, :] > query - window)


def flat(array: Array) -> Array:
    """The pages [pages, k, …] counted head by head."""
    return jax.lax.collapse(array, 0, 2)
