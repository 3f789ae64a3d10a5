"""Folders that a Tokasaurus server loads (its branch geoff/cartridges): `cartridge.pt` and `config.yaml`.

The server loads cartridges that fill whole pages of `PAGE` slots. It reads the number of slots and the model's name
from the config.
"""

from __future__ import annotations

from pathlib import Path

import yaml

from cartridges_jax.cartridge.arrays import Cartridge
from cartridges_jax.command_line import files
from cartridges_jax.command_line.errors import UserError
from cartridges_jax.interop import upstream

TENSORS = "cartridge.pt"
PAGE = 16  # the server's default page_size


def write(cartridge: Cartridge, folder: Path, dtype: str = "float32") -> None:
    """Writes the folder; the config last, since the server takes a folder that has both files.

    Raises:
      UserError: the slots do not fill whole pages.
    """
    p = cartridge.num_slots
    if p % PAGE:
        raise UserError(
            f"this cartridge has {p} slots, and Tokasaurus loads multiples of its page, {PAGE}, only: train "
            f"{p - p % PAGE} or {p + -p % PAGE}, or have slots added (--pad), which costs some quality"
        )
    upstream.write(cartridge, folder / TENSORS, dtype)
    config = {
        "kv_cache_initializer": {"max_tokens": p},
        "model": {"pretrained_model_name_or_path": cartridge.provenance.model},
    }
    files.write_text(folder / upstream.CONFIG, yaml.safe_dump(config))
