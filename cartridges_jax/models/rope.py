"""Rotating keys that are stored, on the host and without JAX: RoPE is relative, so keys may move together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from cartridges_jax.models.config import ModelConfig


def shift_keys(keys: Any, distance: int, config: ModelConfig) -> np.ndarray:
    """Rotates keys `[l, p, k, h]` on by so many positions, each layer's by its own frequencies."""
    keys_lpkh = np.asarray(keys)
    half = keys_lpkh.shape[-1] // 2
    exponents_h = -np.arange(half, dtype=np.float32) / half
    frequencies_lh = np.stack([np.float32(layer.rope_theta) ** exponents_h for layer in config.layers])
    for frequencies_h, layer in zip(frequencies_lh, config.layers, strict=True):
        if layer.rope_factors:
            frequencies_h /= np.asarray(layer.rope_factors, np.float32)
    angles_l11h = distance * frequencies_lh[:, None, None].astype(np.float64)
    cos, sin = np.cos(angles_l11h).astype(np.float32), np.sin(angles_l11h).astype(np.float32)
    first, second = keys_lpkh[..., :half], keys_lpkh[..., half:]
    rotated = np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(keys_lpkh.dtype)
