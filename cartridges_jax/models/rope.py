"""The frequencies of RoPE, and rotating keys that are stored: RoPE is relative, so that all of a cartridge may move.

Keys are rotated on the host, in NumPy and without JAX, or inside a compiled program, whose arrays bring their own
functions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from cartridges_jax.models.config import LayerSettings, ModelConfig


def frequencies(settings: LayerSettings, head_dim: int) -> np.ndarray:
    """Computes the frequency of each pair of numbers of a head, float32 [h/2].

    They are rounded where transformers rounds them. One rounding more or less is 1e-7 of a frequency, and 1e-4 of an
    angle behind 2,000 tokens.
    """
    exponents_h = np.arange(0, head_dim, 2).astype(np.float32) / np.float32(head_dim)
    powers_h = (settings.rope_theta ** exponents_h.astype(np.float64)).astype(np.float32)
    frequencies_h = np.float32(1) / powers_h
    return frequencies_h / np.asarray(settings.rope_factors, np.float32) if settings.rope_factors else frequencies_h


def shift_keys(keys: Any, distance: Any, config: ModelConfig) -> Any:
    """Rotates keys `[l, p, k, h]` on by so many positions, each layer's by its own frequencies.

    Args:
      keys: an array of NumPy's or of JAX's; the result is of the same kind.
    """
    xp = keys.__array_namespace__()
    half = keys.shape[-1] // 2
    frequencies_lh = np.stack([frequencies(layer, 2 * half) for layer in config.layers])
    angles_l11h = distance * frequencies_lh[:, None, None].astype(np.float64)
    cos, sin = xp.cos(angles_l11h).astype(xp.float32), xp.sin(angles_l11h).astype(xp.float32)
    if xp is not np:
        return _rotated(keys, cos, sin)
    moved = np.empty_like(keys)
    with np.errstate(over="ignore", invalid="ignore"):  # as in a compiled program, there is no warning
        for layer, keys_pkh in enumerate(keys):  # one at a time, whose products stay in the processor's cache
            moved[layer] = _rotated(keys_pkh, cos[layer], sin[layer])
    return moved


def _rotated(keys: Any, cos: Any, sin: Any) -> Any:
    first, second = keys[..., : cos.shape[-1]], keys[..., cos.shape[-1] :]
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return keys.__array_namespace__().concatenate(rotated, axis=-1).astype(keys.dtype, copy=False)
