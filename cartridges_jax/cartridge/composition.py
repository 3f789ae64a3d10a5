"""Composition: one cartridge made of several, with their slots behind one another.

Every cartridge stays at the distance from the question at which it was fitted: all are brought to one offset, and
slots of different cartridges may stand at the same positions. So the order of the cartridges changes nothing but the
order of the slots. It is done on the host, in NumPy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from cartridges_jax.cartridge import ragged
from cartridges_jax.cartridge.arrays import Cartridge
from cartridges_jax.command_line.errors import UserError

if TYPE_CHECKING:
    from cartridges_jax.models.config import ModelConfig


def compose(cartridges: Sequence[Cartridge], config: ModelConfig | None = None) -> Cartridge:
    """Puts the slots of all cartridges into one, in the order given.

    The frozen slots of the second and later ones are left out, since one attention sink is enough.

    Args:
      config: of their model, which is needed where their offsets differ and their provenance does not say it.

    Raises:
      UserError: no cartridge is given, they were made for different models, or one has frozen slots only; or their
        offsets differ and nothing says how their model rotates keys.
    """
    if not cartridges:
        raise UserError("no cartridge is given: compose at least one")
    first = cartridges[0]
    l, _, k, h = first.keys.shape
    for number, other in enumerate(cartridges[1:], start=2):
        theirs, ours = other.keys.shape, (l, other.num_slots, k, h)
        hashes = {c.provenance.weights_hash for c in (first, other) if c.provenance.weights_hash}
        if theirs != ours or len(hashes) > 1:
            models = [c.provenance.model or "an unknown model" for c in (first, other)]
            raise UserError(
                f"cartridge 1 was made for {models[0]} and has keys {first.keys.shape}, cartridge {number} for "
                f"{models[1]} and has {theirs} as [layers, slots, kv heads, head size]: compose those of one model"
            )
        if other.num_frozen >= other.num_slots:
            raise UserError(f"all {other.num_slots} slots of cartridge {number} are frozen: leave it out")
    if len({cartridge.offset for cartridge in cartridges}) > 1:
        cartridges = [cartridge.at_offset(0, config) for cartridge in cartridges]
    starts = [0, *(cartridge.num_frozen for cartridge in cartridges[1:])]
    parts = list(zip(cartridges, starts, strict=True))
    provenance = dataclasses.replace(
        first.provenance,
        corpus_hash="",
        recipe="composed: " + "; ".join(c.provenance.recipe or "unknown" for c in cartridges),
        training_tokens=sum(c.provenance.training_tokens for c in cartridges),
        training_flops=sum(c.provenance.training_flops for c in cartridges),
        evaluation="",
        thinking=first.thinking if all(c.thinking == first.thinking for c in cartridges) else None,
    )
    composed = dataclasses.replace(
        cartridges[0],
        keys=np.concatenate([np.asarray(c.keys)[:, start:] for c, start in parts], axis=1),
        values=np.concatenate([np.asarray(c.values)[:, start:] for c, start in parts], axis=1),
        bias=None if all(c.bias is None for c in cartridges) else np.concatenate([_bias(*part) for part in parts], 1),
        lengths=None,
        provenance=provenance,
    )
    return composed if all(c.lengths is None for c in cartridges) else _without_gaps(composed, parts)


def _bias(cartridge: Cartridge, start: int) -> np.ndarray:
    bias_lpk = np.zeros(cartridge.keys.shape[:3], np.float32) if cartridge.bias is None else np.asarray(cartridge.bias)
    return bias_lpk[:, start:]


def _without_gaps(composed: Cartridge, parts: Sequence[tuple[Cartridge, int]]) -> Cartridge:
    """Returns the slots that the heads of the parts have side by side, without the padding between the parts."""
    lengths = [c.all_lengths - start for c, start in parts]
    masks = [ragged.present(own, c.num_slots - start) for own, (c, start) in zip(lengths, parts, strict=True)]
    mask_lkp, lengths_lk = np.concatenate(masks, axis=-1), np.sum(lengths, axis=0).astype(np.int32)

    def compact(array_lpk: np.ndarray) -> np.ndarray:
        return ragged.padded(ragged.flat(array_lpk, mask_lkp), lengths_lk)

    return dataclasses.replace(
        composed,
        keys=compact(composed.keys),
        values=compact(composed.values),
        bias=None if composed.bias is None else compact(composed.bias),
        lengths=lengths_lk,
    )
