"""Cartridges as plain arrays in the layouts of engines: Hugging Face's `past_key_values` and vLLM's pages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from cartridges_jax.cartridge.arrays import Cartridge
from cartridges_jax.cartridge.provenance import Provenance
from cartridges_jax.command_line.errors import UserError

Layer = tuple[np.ndarray, np.ndarray]


def to_past_key_values(cartridge: Cartridge) -> list[Layer]:
    """Returns for each layer its keys and values, [1, kv heads, slots, head size], which `DynamicCache.update` takes.

    Queries then stand at position p and later, where `generate` and `forward` of transformers put them.

    Raises:
      UserError: as `as_keys_and_values`.
    """
    cartridge = as_keys_and_values(cartridge, "past_key_values")
    keys, values = (np.asarray(a).transpose(0, 2, 1, 3)[:, None] for a in (cartridge.keys, cartridge.values))
    return list(zip(keys, values, strict=True))


def from_past_key_values(layers: Sequence[tuple[Any, Any]], num_frozen: int = 1) -> Cartridge:
    """Makes a cartridge of what a model has cached for one sequence that began at position 0.

    Args:
      layers: for each layer keys (after RoPE) and values, [1, kv heads, slots, head size], in any type numpy reads.

    Raises:
      UserError: they have another shape, or hold more than one sequence.
    """
    found = [[np.asarray(array, np.float32) for array in layer[:2]] for layer in layers]
    shapes = {array.shape for layer in found for array in layer}
    if len(shapes) != 1 or len(shape := shapes.pop()) != 4 or shape[0] != 1:
        raise UserError(
            "past_key_values of one sequence are expected, in every layer [1, kv heads, slots, head size], "
            f"not {sorted({array.shape for layer in found for array in layer})}"
        )
    keys, values = (np.concatenate(side).swapaxes(1, 2) for side in zip(*found, strict=True))
    provenance = Provenance(recipe="taken from past_key_values; its making is unknown")
    return Cartridge(keys, values, None, min(num_frozen, shape[2]), provenance)


def to_pages(cartridge: Cartridge, page: int) -> np.ndarray:
    """Returns vLLM's layout of a paged cache, [layers, 2, pages, page, kv heads, head size]: keys, then values.

    The last page is filled up with zeros, which an engine that knows the number of slots does not read.

    Raises:
      UserError: as `as_keys_and_values`.
    """
    cartridge = as_keys_and_values(cartridge, "a paged cache")
    both = np.stack([np.asarray(cartridge.keys), np.asarray(cartridge.values)], axis=1)
    l, _, p, k, h = both.shape
    filled = np.pad(both, ((0, 0), (0, 0), (0, -p % page), (0, 0), (0, 0)))
    return filled.reshape(l, 2, -1, page, k, h)


def from_pages(pages: np.ndarray, num_slots: int, num_frozen: int = 1) -> Cartridge:
    """Makes a cartridge of the first `num_slots` positions of a paged cache whose pages lie in order.

    Raises:
      UserError: the cache has another layout, or fewer positions.
    """
    if pages.ndim != 6 or pages.shape[1] != 2 or pages.shape[2] * pages.shape[3] < num_slots:
        raise UserError(
            f"the pages are {pages.shape}, expected [layers, 2, pages, page, kv heads, head size] "
            f"with at least {num_slots} positions"
        )
    l, _, count, page, k, h = pages.shape
    flat = pages.astype(np.float32).reshape(l, 2, count * page, k, h)[:, :, :num_slots]
    provenance = Provenance(recipe="taken from a paged cache; its making is unknown")
    return Cartridge(flat[:, 0], flat[:, 1], None, min(num_frozen, num_slots), provenance)


def as_keys_and_values(cartridge: Cartridge, target: str) -> Cartridge:
    """Returns the cartridge as keys and values alone can say it: keys stand at 0 to p - 1 and what follows at p.

    Raises:
      UserError: it has a bias or heads of different lengths, for which `target` has no place, or its keys would have
        to be rotated and it does not say how its model does that.
    """
    refuse_lengths(cartridge, target)
    refuse_bias(cartridge, target)
    return cartridge.at_offset(cartridge.num_slots)


def refuse_lengths(cartridge: Cartridge, target: str) -> None:
    """Raises a UserError if the heads have different numbers of slots, for which `target` has no place."""
    if cartridge.lengths is not None and np.any(np.asarray(cartridge.lengths) != cartridge.num_slots):
        raise UserError(
            f"the heads of this cartridge have different numbers of slots, for which {target} has no place: make one "
            "whose heads are alike, with `convert --uniform` from its run's folder or with init.budget=uniform"
        )


def refuse_bias(cartridge: Cartridge, target: str) -> None:
    """Raises a UserError if the cartridge has a bias that is not zero, for which `target` has no place.

    A bias adds to a slot's score whatever the query is, while a key adds what depends on the query. So keys and values
    alone cannot express a bias. `fold_bias` comes near it.
    """
    if cartridge.bias is not None and np.any(np.asarray(cartridge.bias) != 0):
        raise UserError(
            f"this cartridge has a bias (a log-weight of each slot), for which {target} has no place, and no key or "
            "value says the same: fold it into the keys approximately (--fold-bias=TEXT), or train from another init"
        )
