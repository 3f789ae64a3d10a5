"""Heads of different lengths: their slots behind one another, head by head, or padded to the longest; without JAX.

The order is that of layers, in a layer that of its kv heads, and in a head that of its slots.
"""

from __future__ import annotations

import math

import numpy as np

from cartridges_jax.command_line.errors import UserError

MOST_PADDING = 64  # how many times the average a head may have; a longer one would only be there to fill the memory


def present(lengths_lk: np.ndarray, p: int) -> np.ndarray:
    """Returns a mask `[l, k, p]` of the slots that there are."""
    return np.arange(p) < lengths_lk[..., None]


def flat(array_lpk: np.ndarray, mask_lkp: np.ndarray) -> np.ndarray:
    """Returns the slots that the mask keeps, `[N, …]`, of an array `[l, p, k, …]`."""
    return np.moveaxis(array_lpk, 1, 2)[mask_lkp]


def padded(flat_n: np.ndarray, lengths_lk: np.ndarray) -> np.ndarray:
    """Returns slots that lie behind one another as an array `[l, p, k, …]`, with zeros where a head has no slot."""
    mask_lkp = present(lengths_lk, int(lengths_lk.max(initial=0)))
    array_lkp = np.zeros((*mask_lkp.shape, *flat_n.shape[1:]), flat_n.dtype)
    array_lkp[mask_lkp] = flat_n
    return np.ascontiguousarray(np.moveaxis(array_lkp, 2, 1))


def check(lengths: np.ndarray, count: int) -> None:
    """Raises a UserError if the lengths of heads, as a file has them, cannot be those of `count` slots."""
    if lengths.ndim != 2 or lengths.dtype != np.int32 or not lengths.size:
        raise UserError(f"lengths are {lengths.dtype} {lengths.shape}, expected int32 [layers, kv heads]")
    total = lengths.sum(dtype=np.int64)
    if lengths.min() < 0 or total != count:
        raise UserError(f"lengths come to {total}, the smallest is {lengths.min()}: expected {count}, none below 0")
    if math.prod(lengths.shape) * int(lengths.max()) > MOST_PADDING * count:
        raise UserError(f"a head has {lengths.max()} slots, expected at most {MOST_PADDING} times the average")
