"""Where keys and values lie while requests are decoded, and which of them each request sees.

All layers have one pool of pages. A page has z positions for every kv head of every layer; its part for one of these
heads is a *head page*, and the pool is also counted head page by head page: the ones of a page stand behind one
another, layer by layer and in a layer head by head.

The tokens of a sequence take whole pages: page i of a request's block table holds their keys and values from position
i times z on, each head's in its own head page.

The slots of a cartridge lie flat: those of the first layer's first head come first, then those of its second head, and
so on through all layers, without a gap, in as many head pages as that takes (`lay_out_slots`). So they take the memory
of the slots that there are, however differently long the heads are. A head's slots may begin inside a head page, and
a head page may hold slots of several heads: which of its positions are a head's follows from where the head's slots
start among all (`AttentionMetadata.slot_starts`) and how many there are. Head page i of a cartridge is the pool's
`table[i // heads] + i % heads`, where a page has so many `heads` and the table is the cartridge's. The head pages of
one page may thus belong to several cartridges, but a head page belongs to one.

Under `tensor` each device has the slots of its own heads, and a pool of its own in which the same numbers are taken.

Axis letters beyond the usual ones: r requests, a cartridges, c pages of a block table, e entries of a list of head
pages, z a page's positions.
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
    """The pool, head page by head page (p of them), in the layout of the implementation that made it.

    It is flat so that the layers, one after the other, write into it in place, while all of them read it.

    Attributes:
      keys: as the values, or with their positions last, which a CPU multiplies fastest.
      bias: log-weights of cartridges' slots; tokens have none, and what stands here beside them means nothing.
    """

    keys: Float[Array, "p z h"] | Float[Array, "p h z"]
    values: Float[Array, "p z h"]
    bias: Float[Array, "p z"]
    positions_last: bool = flax.struct.field(pytree_node=False, default=False)

    @classmethod
    def empty(cls, num_head_pages: int, page_size: int, h: int, dtype: Any, positions_last: bool) -> Pages:
        """Makes head pages that hold zeros."""
        values = jnp.zeros((num_head_pages, page_size, h), dtype)
        keys = values.swapaxes(1, 2) if positions_last else values
        return cls(keys, values, jnp.zeros((num_head_pages, page_size), jnp.float32), positions_last)

    @property
    def page_size(self) -> int:
        return self.bias.shape[1]

    def write(self, head_page: Int[Array, "r t"], offset: Int[Array, "r t"], k: Array, v: Array) -> Pages:
        """Writes keys and values [r, t, k, h] of a layer's tokens at their offsets in head pages.

        Args:
          head_page: that of each token's first head, those of the others stand behind it; one that does not exist is
            written nowhere.
        """

        def written(pool: Array, new: Array, position_axis: int) -> Array:
            layout = jax.lax.ScatterDimensionNumbers((2, 3), (position_axis,), (0, position_axis))
            at_rt2 = jnp.stack([head_page, offset], axis=-1)
            drop = jax.lax.GatherScatterMode.FILL_OR_DROP
            return jax.lax.scatter(pool, at_rt2, new.astype(pool.dtype), layout, mode=drop)

        return self.replace(
            keys=written(self.keys, k, 2 if self.positions_last else 1), values=written(self.values, v, 1)
        )

    def load(
        self,
        first: Int[Array, ""],
        count: Int[Array, ""],
        keys: Float[Array, "e z h"],
        values: Float[Array, "e z h"],
        bias: Float[Array, "e z"],
    ) -> Pages:
        """Writes whole head pages, the first `count` of those that are given, from head page `first` on."""
        keys = keys.swapaxes(1, 2) if self.positions_last else keys
        index_e = jnp.arange(len(keys))
        at_e = jnp.where(index_e < count, first + index_e, len(self.bias))
        return self.replace(
            keys=self.keys.at[at_e].set(keys.astype(self.keys.dtype), mode="drop"),
            values=self.values.at[at_e].set(values.astype(self.values.dtype), mode="drop"),
            bias=self.bias.at[at_e].set(bias, mode="drop"),
        )

    def copy(self, source: Int[Array, ""], target: Int[Array, ""], count: Int[Array, ""], heads: int) -> Pages:
        """Makes the target page a copy of the source's first `count` tokens; behind them its values are zeros.

        Args:
          heads: how many head pages a page has.
        """

        def copied(pool: Array, is_copied: Array | bool) -> Array:
            part = jax.lax.dynamic_slice_in_dim(pool, source * heads, heads)
            return jax.lax.dynamic_update_slice_in_dim(pool, jnp.where(is_copied, part, 0), target * heads, 0)

        is_copied_z1 = jnp.arange(self.page_size)[:, None] < count
        return self.replace(keys=copied(self.keys, True), values=copied(self.values, is_copied_z1))


class AttentionMetadata(NamedTuple):
    """Which request sees which pages: its cartridge's, and those of its own tokens, which others may see as well.

    Requests that have a page of tokens in common have all pages before it in common.

    All implementations read this; in which order, and what they read once for several requests, is their business:
    what an implementation works out once for all layers it keeps in `order` (`decode_attention.ordered`).
    """

    starts: Int[Array | np.ndarray, " r"]  # the position of a request's first query among its tokens
    block_table: Int[Array | np.ndarray, "r c"]  # the pages of its tokens as far as they are written; then -1
    cartridge_ids: Int[Array | np.ndarray, " r"]  # which of the cartridges it sees; -1 for none
    slot_block_table: Int[Array | np.ndarray, "a c"]  # where the head pages of each cartridge begin, page by page
    slot_starts: Int[Array | np.ndarray, "l a k"]  # how many slots come before those of a head
    slot_lens: Int[Array | np.ndarray, "l a k"]  # how many slots a head has; 0 where there is no cartridge
    layer: Int[Array, ""] | int | None = None  # the one that is asked for
    order: Any = None

    @property
    def kv_heads(self) -> int:
        return self.slot_lens.shape[2]

    @property
    def heads(self) -> int:
        """How many head pages a page has."""
        return self.slot_lens.shape[0] * self.kv_heads

    def of_layer(self, layer: Int[Array, ""] | int) -> AttentionMetadata:
        """The metadata as `decode_attention` takes it, for one layer."""
        return self._replace(layer=layer)


def slot_page_counts(starts: Array, lens: Array, page_size: int) -> Array:
    """How many head pages hold slots of a head, for arrays of where the slots of heads start and how many they are."""
    return jnp.where(lens > 0, (starts + lens - 1) // page_size - starts // page_size + 1, 0)


def slot_head_page(
    metadata: AttentionMetadata, cartridge: Int[Array, "*e"], number: Int[Array, "*e"]
) -> Int[Array, "*e"]:
    """Finds the head pages of these numbers of cartridges; a number that a cartridge does not have gives any."""
    table_ac, number = jnp.asarray(metadata.slot_block_table), number.astype(jnp.uint32)
    page, head = number // metadata.heads, number % metadata.heads
    return table_ac.at[cartridge, page].get(mode="clip") + head.astype(jnp.int32)


def lay_out_slots(
    slots: Float[np.ndarray, "l p k *h"],
    lengths: Int[np.ndarray, "l k"],
    heads: Int[np.ndarray, "devices k"],
    page_size: int,
    num_head_pages: int,
) -> Float[np.ndarray, "devices e z *h"]:
    """Lays a cartridge's slots out as its head pages hold them, on the host; behind the last is zero.

    Args:
      heads: those of each device, which has head pages of its own.
      num_head_pages: how many these are on every device.
    """
    laid = np.empty((len(heads), num_head_pages * page_size, *slots.shape[3:]), slots.dtype)
    for on_device, own in zip(laid, heads, strict=True):
        starts = slot_starts(lengths[:, own])
        for layer, i in np.ndindex(starts.shape):
            start, length = starts[layer, i], lengths[layer, own[i]]
            on_device[start : start + length] = slots[layer, :length, own[i]]
        on_device[lengths[:, own].sum() :] = 0
    return laid.reshape(len(heads), num_head_pages, page_size, *slots.shape[3:])


def slot_starts(lengths: Int[np.ndarray, "l k"]) -> Int[np.ndarray, "l k"]:
    """How many slots come before those of each head, as `lay_out_slots` lays them."""
    return (np.cumsum(lengths) - lengths.reshape(-1)).reshape(lengths.shape).astype(np.int32)


def visible(start: Int[Array, "*r"], t: int, position: Int[Array, "*r s"], window: int | None) -> Array:
    """Whether each of t queries from `start` on sees the tokens at these positions, as an array [*r, t, s]."""
    query = (start[..., None] + jnp.arange(t))[..., None]
    seen = position[..., None, :] <= query
    return seen if window is None else seen & (position[..., None, :] > query - window)
