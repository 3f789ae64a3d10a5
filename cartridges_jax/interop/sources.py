"""Where a cartridge or dataset is taken from: a path, `hf:org/name[@revision]`, or `wandb:entity/project/run`.

What is fetched lands in a cache folder and is then read like any other file: nothing in it is run.
"""

from __future__ import annotations

import os
from pathlib import Path

from cartridges_jax.command_line.errors import UserError

HF, WANDB = "hf:", "wandb:"
CARTRIDGE_FILES = ("cartridge.safetensors", "*.pt", "adapter_config.json", "adapter_model.*", "config.yaml")
DATASET_FILES = ("*.parquet", "data/*.parquet", "config.yaml")
CARTRIDGE_BYTES, DATASET_BYTES = 20 * 10**9, 200 * 10**9  # that are fetched at most: a wrong name fills no disk


def fetch(source: str | os.PathLike[str]) -> Path:
    """The local file or folder of a cartridge.

    Raises:
      UserError: no such form of a source, or files that are too large.
      FileNotFoundError, PermissionError, ConnectionError: it is not there, asks for a login, or cannot be reached.
    """
    text = os.fspath(source)
    if text.startswith(HF):
        from cartridges_jax.interop import hub

        return hub.download(text.removeprefix(HF), CARTRIDGE_FILES, "model", CARTRIDGE_BYTES)
    if text.startswith(WANDB):
        from cartridges_jax.interop import wandb

        return wandb.download(text.removeprefix(WANDB), CARTRIDGE_BYTES)
    return Path(source)


def fetch_dataset(source: str | os.PathLike[str]) -> Path:
    """The local file or folder of a dataset; errors as `fetch`."""
    text = os.fspath(source)
    if text.startswith(HF):
        from cartridges_jax.interop import hub

        return hub.download(text.removeprefix(HF), DATASET_FILES, "dataset", DATASET_BYTES)
    if text.startswith(WANDB):
        from cartridges_jax.interop import wandb

        return wandb.download_dataset(text.removeprefix(WANDB), DATASET_BYTES)
    return Path(source)


def check_size(source: str, size: int, most: int) -> None:
    """Raises: UserError, if its files have more bytes than are fetched."""
    if size > most:
        raise UserError(
            f"the files of {source} have {size / 1e9:,.1f} GB, and at most {most / 1e9:,.1f} GB are fetched: is it the "
            "right name? If so, download them by hand and give their folder"
        )
