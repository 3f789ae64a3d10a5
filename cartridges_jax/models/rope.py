"""Rotating keys that are stored: RoPE is relative, so that all keys of a cartridge may move together.

It is done on the host, in NumPy and without JAX, or inside a compiled program, whose arrays bring their own functions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from cartridges_jax.models.config import ModelConfig


def shift_keys(keys: Any, distance: Any, config: ModelConfig) -> Any:
    """Rotates keys `[l, p, k, h]` on by so many positions, each layer's by its own frequencies.

    Args:
      keys: an array of NumPy's or of JAX's; the result is of the same kind.
    """
    xp = keys.__array_namespace__()
    half = keys.shape[-1] // 2
    exponents_h = -np.arange(half, dtype=np.float32) / half
    frequencies_lh = np.stack([np.float32(layer.rope_theta) ** exponents_h for layer in config.layers])
    for frequencies_h, layer in zip(frequencies_lh, config.layers, strict=True):
        if layer.rope_factors:
            frequencies_h /= np.asarray(layer.rope_factors, np.float32)
    angles_l11h = distance * frequencies_lh[:, None, None].astype(np.float64)
    cos, sin = xp.cos(angles_l11h).astype(xp.float32), xp.sin(angles_l11h).astype(xp.float32)
    first, second = keys[..., :half], keys[..., half:]
    with np.errstate(over="ignore", invalid="ignore"):  # as in a compiled program, there is no warning
        return xp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(keys.dtype)
