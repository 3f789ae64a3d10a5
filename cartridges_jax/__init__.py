"""Cartridges in JAX: small trained KV caches that stand in for long texts (arXiv 2506.06266).

The public API, imported lazily: `import cartridges_jax` starts no backend and reads nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cartridges_jax import interop as interop
    from cartridges_jax.cartridge.arrays import Cartridge as Cartridge
    from cartridges_jax.cartridge.composition import compose as compose
    from cartridges_jax.cartridge.provenance import Provenance as Provenance
    from cartridges_jax.kernels.prefix_attention import prefix_attention as prefix_attention
    from cartridges_jax.models.language_model import LanguageModel as LanguageModel
    from cartridges_jax.models.language_model import load_model as load_model
    from cartridges_jax.serving.generate import generate as generate
    from cartridges_jax.training.batch import Batch as Batch
    from cartridges_jax.training.losses import distillation_loss as distillation_loss

_HOMES = {
    "Batch": "cartridges_jax.training.batch",
    "Cartridge": "cartridges_jax.cartridge.arrays",
    "LanguageModel": "cartridges_jax.models.language_model",
    "Provenance": "cartridges_jax.cartridge.provenance",
    "compose": "cartridges_jax.cartridge.composition",
    "distillation_loss": "cartridges_jax.training.losses",
    "generate": "cartridges_jax.serving.generate",
    "load_model": "cartridges_jax.models.language_model",
    "prefix_attention": "cartridges_jax.kernels.prefix_attention",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name == "interop":  # a package of functions, not one of the names
        return importlib.import_module("cartridges_jax.interop")
    if name not in _HOMES:
        raise AttributeError(f"module 'cartridges_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
