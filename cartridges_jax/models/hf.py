"""Weights from a Hugging Face directory: `config.json` and safetensors, one file or an index. Without torch."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from safetensors import SafetensorError, safe_open

from cartridges_jax.models.config import ModelConfig
from cartridges_jax.models.loading import load_params
from cartridges_jax.models.transformer import Params
from command_line.errors import UserError

DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def load_hf(directory: Path, dtype: Any, mesh: Mesh | None = None) -> tuple[ModelConfig, Params, str]:
    """Loads config, parameters and their fingerprint.

    Raises:
      FileNotFoundError: no config.json or no safetensors in the directory.
      UserError: an unsupported family, a damaged file, or tensors that do not fit the config.
    """
    config_file = directory / "config.json"
    if not config_file.is_file():
        raise FileNotFoundError(f"{directory} holds no config.json: expected a Hugging Face model directory")
    config = ModelConfig.from_hf(_read_json(config_file))
    files = _tensor_files(directory)

    mapped = functools.cache(_mapped)

    def read(name: str) -> np.ndarray:
        tensors = mapped(files[name])
        if name not in tensors:
            raise UserError(f"{files[name]} is not a whole safetensors file (it lacks {name}): download it again")
        return tensors[name]

    params, fingerprint = load_params(config, files, read, dtype, mesh)
    return config, params, fingerprint


@contextlib.contextmanager
def _open(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="numpy") as reader:
            yield reader
    except SafetensorError as error:
        raise UserError(f"{path} is not a whole safetensors file ({error}): download it again") from error


def _mapped(path: Path) -> dict[str, np.ndarray]:
    """A file's tensors, of which only what is indexed is read from the disk."""
    with _open(path):  # safetensors itself complains about a damaged file
        pass
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    if other := sorted({entry["dtype"] for entry in header.values()} - DTYPES.keys()):
        raise UserError(f"{path} holds tensors of {', '.join(other)}, expected {', '.join(DTYPES)}")
    data = np.memmap(path, np.uint8, "r", offset=8 + length)

    def tensor(entry: dict[str, Any]) -> np.ndarray:
        return data[slice(*entry["data_offsets"])].view(jnp.dtype(DTYPES[entry["dtype"]])).reshape(entry["shape"])

    return {name: tensor(entry) for name, entry in header.items()}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not a whole JSON file ({error}): download it again") from error


def _tensor_files(directory: Path) -> dict[str, Path]:
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        shards = _read_json(index).get("weight_map", {})
        files = {name: directory / Path(shard).name for name, shard in shards.items()}
        missing = sorted({p.name for p in files.values() if not p.is_file()})
        if missing:
            raise FileNotFoundError(
                f"{directory} lacks {', '.join(missing)}, which its index names: download them again"
            )
        return files
    files = {}
    for path in sorted(directory.glob("*.safetensors")):
        with _open(path) as reader:
            files.update(dict.fromkeys(reader.keys(), path))
    if not files:
        raise FileNotFoundError(
            f"{directory} holds no .safetensors file: convert or download the weights in that format"
        )
    return files
