"""Weights from a Hugging Face directory: `config.json` and safetensors, one file or an index. Without torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from cartridges_jax.models.loading import load_params
from cartridges_jax.models.config import ModelConfig
from cartridges_jax.models.transformer import Params


def load_hf(directory: Path, dtype: Any) -> tuple[ModelConfig, Params, str]:
    """Loads config, parameters and their fingerprint.

    Raises:
      FileNotFoundError: no config.json or no safetensors in the directory.
      ValueError: an unsupported family, a damaged file, or tensors that do not fit the config.
    """
    config_file = directory / "config.json"
    if not config_file.is_file():
        raise FileNotFoundError(f"{directory} holds no config.json: expected a Hugging Face model directory")
    config = ModelConfig.from_hf(json.loads(config_file.read_text(encoding="utf-8")))
    files = _tensor_files(directory)

    def read(name: str) -> Any:
        # the flax reader gives bfloat16 as a jax array's dtype; numpy's own reader does not know it
        with safe_open(files[name], framework="numpy") as reader:
            return reader.get_tensor(name)

    params, fingerprint = load_params(config, files, read, dtype)
    return config, params, fingerprint


def _tensor_files(directory: Path) -> dict[str, Path]:
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = {name: directory / Path(shard).name for name, shard in shards.items()}
        missing = sorted({p.name for p in files.values() if not p.is_file()})
        if missing:
            raise FileNotFoundError(
                f"{directory} lacks {', '.join(missing)}, which its index names: download them again"
            )
        return files
    files = {}
    for path in sorted(directory.glob("*.safetensors")):
        try:
            with safe_open(path, framework="numpy") as reader:
                files.update(dict.fromkeys(reader.keys(), path))
        except SafetensorError as error:
            raise ValueError(f"{path} is not a whole safetensors file ({error}): download it again") from error
    if not files:
        raise FileNotFoundError(
            f"{directory} holds no .safetensors file: convert or download the weights in that format"
        )
    return files
