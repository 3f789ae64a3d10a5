"""The formats of cartridges: how each is recognised, and which functions read and write it."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from cartridges_jax.cartridge import file as cartridge_file
from cartridges_jax.cartridge.arrays import Cartridge
from cartridges_jax.command_line.errors import UserError
from cartridges_jax.interop import peft, sources, tokasaurus, upstream
from cartridges_jax.interop.layouts import as_keys_and_values

OWN = "cartridge.safetensors"


@dataclasses.dataclass(frozen=True)
class Format:
    title: str
    read: Callable[[Path], Cartridge]
    write: Callable[[Cartridge, Path, str], None]
    has_bias: bool = False
    dtypes: tuple[str, ...] = ("float32", "float16", "bfloat16")


FORMATS = {
    "safetensors": Format(
        OWN, cartridge_file.read, cartridge_file.write, has_bias=True, dtypes=tuple(cartridge_file.DTYPES)
    ),
    "upstream": Format("upstream's .pt", upstream.read, upstream.write),
    "peft": Format("a PEFT CARTRIDGE adapter", peft.read, peft.write),
    "prefix-tuning": Format(
        "a PEFT PREFIX_TUNING adapter", peft.read, functools.partial(peft.write, kind="PREFIX_TUNING")
    ),
    "tokasaurus": Format("a Tokasaurus folder", upstream.read, tokasaurus.write),
}


def read(source: str | os.PathLike[str]) -> Cartridge:
    """Reads a cartridge of any format, from a path, `hf:…` or `wandb:…`; its arrays are on the host.

    Raises:
      FileNotFoundError: nothing there looks like a cartridge.
      UserError: it is broken or hostile, or holds values that are not finite.
      ConnectionError, PermissionError: it has to be fetched and cannot be.
    """
    path = sources.fetch(source)
    format, file = locate(path)
    cartridge = FORMATS[format].read(file)
    if not all(np.isfinite(array).all() for array in vars(cartridge.slots).values() if array is not None):
        raise UserError(f"{path} holds values that are not finite: its training diverged, train it again")
    return cartridge


def from_hub(repo: str, model: Any = None) -> Cartridge:
    """Loads the cartridge of a Hub repository `org/name[@revision]`, as `Cartridge.load("hf:…", model)` does."""
    return Cartridge.load(f"hf:{repo}", model=model)


def write(cartridge: Cartridge, path: Path, format: str, dtype: str = "float32") -> None:
    """Writes a cartridge in one of `FORMATS`.

    Raises:
      UserError: the format cannot hold this cartridge or this dtype; nothing is written then.
    """
    chosen = FORMATS[format]
    if dtype not in chosen.dtypes:
        raise UserError(f"dtype is {dtype!r}, and {chosen.title} holds {', '.join(chosen.dtypes)}")
    if not chosen.has_bias:
        cartridge = as_keys_and_values(cartridge, chosen.title)
    chosen.write(cartridge, path, dtype)


def locate(path: Path) -> tuple[str, Path]:
    """Returns the format of the cartridge at `path`, and the file that its reader takes.

    Raises:
      FileNotFoundError: nothing is there, or a folder without a cartridge.
    """
    if path.is_dir():
        if (path / OWN).is_file():
            return "safetensors", path / OWN
        if (path / peft.CONFIG).is_file():
            return "peft", path / peft.CONFIG
        if (path / tokasaurus.TENSORS).is_file():
            return "tokasaurus", path / tokasaurus.TENSORS
        if newest := upstream.newest_checkpoint(path):
            return "upstream", newest
        raise FileNotFoundError(
            f"{path} holds no cartridge: expected {OWN}, {peft.CONFIG}, {tokasaurus.TENSORS} or cache-step*.pt in it"
        )
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: expected a cartridge's file or folder, hf:… or wandb:…")
    if path.name == peft.CONFIG:
        return "peft", path
    with open(path, "rb") as file:
        return ("upstream" if file.read(2) == b"PK" else "safetensors"), path
