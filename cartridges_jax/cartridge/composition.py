"""Composition: one cartridge made of several, with their slots behind one another.

Every cartridge keeps the rotation of its own keys, which begins at position 0. The tokens that follow stand behind the
slots of all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp

from cartridges_jax.cartridge.arrays import Cartridge
from cartridges_jax.command_line.errors import UserError


def compose(cartridges: Sequence[Cartridge]) -> Cartridge:
    """Puts the slots of all cartridges into one, in the order given.

    The frozen slots of the second and later ones are left out, since one attention sink is enough.

    Raises:
      UserError: no cartridge is given, they were made for different models, or one has frozen slots only.
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
    starts = [0, *(cartridge.num_frozen for cartridge in cartridges[1:])]
    parts = list(zip(cartridges, starts, strict=True))
    bias_lpk = None
    if any(cartridge.bias is not None for cartridge in cartridges):
        zeros = [jnp.zeros(c.keys.shape[:3]) if c.bias is None else c.bias for c in cartridges]
        bias_lpk = jnp.concatenate([bias[:, start:] for bias, start in zip(zeros, starts, strict=True)], axis=1)
    return dataclasses.replace(
        first,
        keys=jnp.concatenate([c.keys[:, start:] for c, start in parts], axis=1),
        values=jnp.concatenate([c.values[:, start:] for c, start in parts], axis=1),
        bias=bias_lpk,
        provenance=dataclasses.replace(
            first.provenance,
            corpus_hash="",
            recipe="composed: " + "; ".join(c.provenance.recipe or "unknown" for c in cartridges),
            training_tokens=sum(c.provenance.training_tokens for c in cartridges),
            training_flops=sum(c.provenance.training_flops for c in cartridges),
            evaluation="",
            thinking=first.thinking if all(c.thinking == first.thinking for c in cartridges) else None,
        ),
    )
