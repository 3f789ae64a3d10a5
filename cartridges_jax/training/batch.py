"""The batch that a training step reads: rows of packed examples, with the teacher's targets."""

from __future__ import annotations

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


@flax.struct.dataclass
class Batch:
    """Packed rows. Targets at t are the teacher's top-k for token t+1; `target_mask` is [b, t, j] or [b, t]."""

    tokens: Int[Array, "b t"]
    segment_ids: Int[Array, "b t"]  # 0 is padding
    positions: Int[Array, "b t"]  # 0-based per segment
    target_ids: Int[Array, "b t j"]
    target_logprobs: Float[Array, "b t j"]
    target_mask: Bool[Array, "b t j"]

    @property
    def target_entries(self) -> Bool[Array, "b t j"]:
        """The mask of every entry, also where `target_mask` has one value for all entries of a token."""
        mask = self.target_mask if self.target_mask.ndim == self.target_ids.ndim else self.target_mask[..., None]
        return jnp.broadcast_to(mask, self.target_ids.shape).astype(bool)

    @property
    def num_targets(self) -> Float[Array, ""]:
        """The number of positions that have a target."""
        return self.target_entries.any(-1).sum().astype(jnp.float32)
