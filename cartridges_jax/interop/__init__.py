"""Cartridges of other programs and for other programs. The names are imported when they are first used.

`Cartridge.load` reads every format and source too, and `python -m cartridges_jax.convert` writes every format.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cartridges_jax.interop.formats import from_hub as from_hub
    from cartridges_jax.interop.formats import read as read
    from cartridges_jax.interop.formats import write as write
    from cartridges_jax.interop.layouts import from_pages as from_pages
    from cartridges_jax.interop.layouts import from_past_key_values as from_past_key_values
    from cartridges_jax.interop.layouts import to_pages as to_pages
    from cartridges_jax.interop.layouts import to_past_key_values as to_past_key_values
    from cartridges_jax.interop.publish import push_dataset as push_dataset
    from cartridges_jax.interop.publish import push_to_hub as push_to_hub
    from cartridges_jax.interop.slots import fold_bias as fold_bias
    from cartridges_jax.interop.slots import pad_slots as pad_slots

_HOMES = {
    "fold_bias": "slots",
    "from_hub": "formats",
    "from_pages": "layouts",
    "from_past_key_values": "layouts",
    "pad_slots": "slots",
    "push_dataset": "publish",
    "push_to_hub": "publish",
    "read": "formats",
    "to_pages": "layouts",
    "to_past_key_values": "layouts",
    "write": "formats",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'cartridges_jax.interop' has no attribute {name!r}")
    return getattr(importlib.import_module(f"cartridges_jax.interop.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
