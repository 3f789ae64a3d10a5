"""This file loads a model from a Hugging Face directory: `config.json`, and safetensors in one file or several."""

from __future__ import annotations

import contextlib
import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from safetensors import SafetensorError, safe_open

from cartridges_jax.command_line.errors import UserError
from cartridges_jax.command_line.files import read_json
from cartridges_jax.models.config import ModelConfig
from cartridges_jax.models.loading import known_name, load_params
from cartridges_jax.models.params import Params

SHARD = re.compile(r"-\d{5}-of-\d{5}\.safetensors$")
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def load_hf(directory: Path, dtype: Any, mesh: Mesh | None = None, num_ids: int = 0) -> tuple[ModelConfig, Params, str]:
    """Loads config, parameters and their fingerprint; `mesh` and `num_ids` are as `load_params` has them.

    Raises:
      FileNotFoundError: no config.json or no safetensors in the directory.
      UserError: an unsupported family, a damaged file, or tensors that do not fit the config.
    """
    config_file = directory / "config.json"
    if not config_file.is_file():
        raise FileNotFoundError(f"{directory} holds no config.json: expected a Hugging Face model directory")
    config = ModelConfig.from_hf(read_json(config_file))
    places = _tensor_places(directory)

    mapped = functools.cache(_mapped)

    def read(name: str) -> np.ndarray:
        path, theirs = places[name]
        return mapped(path)[theirs]

    params, fingerprint = load_params(config, places, read, dtype, mesh, num_ids)
    return config, params, fingerprint


@contextlib.contextmanager
def _open(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="numpy") as reader:
            yield reader
    except SafetensorError as error:
        raise UserError(f"{path} is not a whole safetensors file ({error}): download it again") from error


def _mapped(path: Path) -> dict[str, np.ndarray]:
    """Maps a file into memory and gives its tensors by name; only what is indexed is read from the disk."""
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


def _tensor_places(directory: Path) -> dict[str, tuple[Path, str]]:
    """Finds the file that holds each tensor of the model, and the name of the tensor there, by our name for it.

    Files that lie beside the model (an adapter, a cartridge) are ignored as long as they hold no tensor of that name.
    """
    theirs = {path: _names(path) for path in sorted(directory.glob("*.safetensors"))}
    if not theirs:
        raise FileNotFoundError(
            f"{directory} holds no .safetensors file: convert or download the weights in that format"
        )
    whole = "layers.", "embed_tokens.", "norm."  # how names begin in a model that was saved without its head
    names = [name for listed in theirs.values() for name in listed]
    if any(name.startswith(whole[:2]) and known_name(f"model.{name}") for name in names):
        held = {path: {f"model.{n}" if n.startswith(whole) else n: n for n in theirs[path]} for path in theirs}
    else:
        held = {path: {name: name for name in theirs[path]} for path in theirs}
    places: dict[str, tuple[Path, str]] = {}
    for path in _model_files(directory, held):
        if len(held[path]) < len(theirs[path]):
            raise UserError(
                f"{path} holds tensors twice, with model. before their names and without: leave one of them"
            )
        for name, written in held[path].items():
            if others := [other.name for other in held if other != path and name in held[other]]:
                raise UserError(
                    f"{directory} holds {name} in {' and in '.join([path.name, *others])}: leave the files of one "
                    "model there"
                )
            places[name] = path, written
    return places


def _names(path: Path) -> list[str]:
    with _open(path) as reader:
        return list(reader.keys())


def _model_files(directory: Path, held: dict[Path, dict[str, str]]) -> list[Path]:
    """Lists the files that transformers would read, or, if there are none, shards and files with a tensor we know."""
    index, single = directory / "model.safetensors.index.json", directory / "model.safetensors"
    if index.is_file():
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
            raise UserError(f"{index} has no weight_map from names to files: download it again")
        files = {directory / Path(shard).name for shard in shards.values()}
        if single in held and single not in files:
            raise UserError(
                f"{directory} holds {single.name} and {index.name}, which names other files: leave one there"
            )
        if missing := sorted(path.name for path in files - held.keys()):
            raise FileNotFoundError(
                f"{directory} lacks {', '.join(missing)}, which its index names: download them again"
            )
        for name, shard in shards.items():
            if name not in held[path := directory / Path(shard).name].values():
                raise UserError(f"{path} is not a whole safetensors file (it lacks {name}): download it again")
        return sorted(files)
    if single in held:
        return [single]
    ours = [path for path, names in held.items() if SHARD.search(path.name) or any(map(known_name, names))]
    return ours or list(held)
