"""The sources of cartridges and datasets: a path, `hf:org/name[@revision]`, or `wandb:entity/project/run`.

Files that are fetched are put into a cache folder and are then read like any others: nothing in them is run.
"""

from __future__ import annotations

import os
from pathlib import Path

from cartridges_jax.interop import hub, wandb

HF, WANDB = "hf:", "wandb:"
CARTRIDGE_FILES = ("cartridge.safetensors", "*.pt", "adapter_config.json", "adapter_model.*", "config.yaml")
DATASET_FILES = ("*.parquet", "data/*.parquet", "config.yaml")
CARTRIDGE_BYTES, DATASET_BYTES = 20 * 10**9, 200 * 10**9  # that are fetched at most


def fetch(source: str | os.PathLike[str]) -> Path:
    """Returns the local file or folder of a cartridge, fetching it if need be.

    Raises:
      UserError: the source has another form, or its files are too large.
      FileNotFoundError, PermissionError, ConnectionError: it is not there, asks for a login, or cannot be reached.
    """
    text = os.fspath(source)
    if text.startswith(HF):
        return hub.download(text.removeprefix(HF), CARTRIDGE_FILES, "model", CARTRIDGE_BYTES)
    if text.startswith(WANDB):
        return wandb.download(text.removeprefix(WANDB), CARTRIDGE_BYTES)
    return Path(source)


def fetch_dataset(source: str | os.PathLike[str]) -> Path:
    """Returns the local file or folder of a dataset; it raises what `fetch` raises."""
    text = os.fspath(source)
    if text.startswith(HF):
        return hub.download(text.removeprefix(HF), DATASET_FILES, "dataset", DATASET_BYTES)
    if text.startswith(WANDB):
        return wandb.download_dataset(text.removeprefix(WANDB), DATASET_BYTES)
    return Path(source)


def dataset_files(source: str | os.PathLike[str]) -> list[Path]:
    """Returns the Parquet files of a dataset: a file, a folder (upstream's has `data/*.parquet`), `hf:…` or `wandb:…`.

    Raises:
      FileNotFoundError: there is no such file, or the folder has no Parquet file.
      UserError, PermissionError, ConnectionError: it has to be fetched and cannot be.
    """
    path = fetch_dataset(source)
    if not path.is_dir():
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist: make it with python -m synth --config=…")
        return [path]
    shards = sorted(path.glob("data/*.parquet")) or sorted(path.glob("*.parquet"))
    if not shards:
        raise FileNotFoundError(f"{path} holds no Parquet file: expected a dataset's folder, or its file")
    return shards
