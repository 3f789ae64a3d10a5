"""Upstream's `.pt` (HazyResearch/cartridges): four lists, per layer a tensor [1, kv heads, slots, head size].

`frozen_keys` and `frozen_values` (`fixed_*` before August 2025) come before `trainable_keys` and `trainable_values`.
Upstream writes ParameterLists; here they are plain lists, which upstream and Tokasaurus read as well, and which
`torch.load(weights_only=True)` opens. Our header is an extra file in the archive, which torch ignores.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from cartridges_jax.cartridge.arrays import Cartridge
from cartridges_jax.cartridge.file import cast, header_of, read_header
from cartridges_jax.cartridge.provenance import Provenance
from cartridges_jax.command_line.errors import UserError
from cartridges_jax.interop import torch_zip

HEADER = "cartridge.json"
CONFIG = "config.yaml"  # of the training run, beside the file
LARGEST_CONFIG = 1 << 18  # bytes


def read(path: Path) -> Cartridge:
    """Reads `cache-step*.pt` or `cartridge.pt`, and the model's name from the `config.yaml` beside it, if there is one.

    Raises:
      FileNotFoundError: there is no such file.
      UserError: the file is not whole, or holds something else.
    """
    tree, extra = torch_zip.load(path)
    if not isinstance(tree, dict) or "trainable_keys" not in tree or "trainable_values" not in tree:
        raise UserError(f"{path} is no cartridge of upstream's: it has no trainable_keys and trainable_values")
    frozen = "frozen" if "frozen_keys" in tree else "fixed"
    parts = [
        [_stacked(tree.get(f"{kind}_{name}", []), path) for kind in (frozen, "trainable")]
        for name in ("keys", "values")
    ]
    if [part.shape for part in parts[0]] != [part.shape for part in parts[1]]:
        raise UserError(f"{path} is no cartridge of upstream's: its keys and values differ in shape")
    keys, values = (_joined(*both, path) for both in parts)
    num_frozen, provenance = parts[0][0].shape[1], Provenance(recipe="read from upstream's .pt; its making is unknown")
    if HEADER in extra:
        provenance = _provenance(extra[HEADER], path)
    elif (path.parent / CONFIG).is_file():
        provenance = Provenance(model=model_of(read_config(path.parent / CONFIG)), recipe=provenance.recipe)
    return Cartridge(keys, values, None, num_frozen, provenance)


def write(cartridge: Cartridge, path: Path, dtype: str = "float32") -> None:
    """Writes the file, whole or not at all. Upstream's training expects bfloat16, its model's dtype.

    Raises:
      UserError: the dtype cannot hold the values.
    """
    lists = {}
    for name, array_lpkh in (("keys", cartridge.keys), ("values", cartridge.values)):
        array_lkph = cast(np.asarray(array_lpkh), dtype).transpose(0, 2, 1, 3)[:, None]
        # no frozen slot: tensors of zero slots, since upstream and Tokasaurus look at the first tensor of the list
        lists[f"trainable_{name}"] = list(array_lkph[:, :, :, cartridge.num_frozen :])
        lists[f"frozen_{name}"] = list(array_lkph[:, :, :, : cartridge.num_frozen])
    torch_zip.save(path, lists, {HEADER: json.dumps(header_of(cartridge), sort_keys=True).encode()})


def newest_checkpoint(folder: Path) -> Path | None:
    """Returns the `cache-step*.pt` (or `cache-epoch*.pt`) with the highest number, or None if there is none."""
    numbered = {}
    for path in folder.glob("cache-*.pt"):
        digits = "".join(filter(str.isdecimal, path.stem))
        numbered[int(digits[:9] or 0), path.name] = path
    return numbered[max(numbered)] if numbered else None


def read_config(path: Path) -> dict[str, Any]:
    """Reads a run's config.yaml. Python objects in it are left out, and none is made.

    Raises:
      UserError: it is no YAML, holds something else than keys, or is too large.
    """
    if path.stat().st_size > LARGEST_CONFIG:
        raise UserError(f"{path} has {path.stat().st_size} bytes, expected a training run's config.yaml")
    try:
        config = yaml.load(path.read_text(encoding="utf-8"), _ConfigLoader)  # a SafeLoader
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not YAML ({str(error).splitlines()[0]})") from error
    if not isinstance(config, dict):
        raise UserError(f"{path} holds a {type(config).__name__}, expected the keys of a training run's config")
    return config


def model_of(config: Mapping[str, Any]) -> str:
    """Returns the `pretrained_model_name_or_path` of a config, as upstream or Weights & Biases writes it, or ""."""
    model = config.get("model")
    model = model.get("value", model) if isinstance(model, dict) else {}
    name = model.get("pretrained_model_name_or_path") if isinstance(model, dict) else None
    return name if isinstance(name, str) else ""


class _ConfigLoader(yaml.SafeLoader):
    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Refuses merges (`<<`), which no run writes, and which can double the size of the config at every level."""
        if any(key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value):
            raise yaml.constructor.ConstructorError(None, None, "it merges groups by <<", node.start_mark)


_ConfigLoader.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)


def _stacked(tensors: Any, path: Path) -> np.ndarray:
    """Returns one of the four lists as an array [l, p, k, h] of float32; an empty list gives no layers."""
    if not isinstance(tensors, list) or not all(isinstance(tensor, np.ndarray) for tensor in tensors):
        raise UserError(f"{path} is no cartridge of upstream's: expected lists of tensors, one a layer")
    if len({tensor.shape for tensor in tensors}) > 1 or any(t.ndim != 4 or len(t) != 1 for t in tensors):
        raise UserError(
            f"{path} is no cartridge of upstream's: its tensors are {_shapes(tensors)}, "
            "expected one [1, kv heads, slots, head size] for all layers"
        )
    if not tensors:
        return np.zeros((0, 0, 0, 0), np.float32)
    return np.concatenate(tensors).transpose(0, 2, 1, 3).astype(np.float32)


def _joined(frozen: np.ndarray, trainable: np.ndarray, path: Path) -> np.ndarray:
    held = [part for part in (frozen, trainable) if len(part)]
    if not held or len({(part.shape[0], *part.shape[2:]) for part in held}) > 1:
        raise UserError(
            f"{path} is no cartridge of upstream's: its frozen slots are {frozen.shape} and its trainable ones "
            f"{trainable.shape}, expected the same layers, kv heads and head size"
        )
    return np.concatenate(held, axis=1)


def _shapes(tensors: Sequence[np.ndarray]) -> str:
    shown = sorted({str(tensor.shape) for tensor in tensors})
    return ", ".join(shown[:4]) + (" and others" if len(shown) > 4 else "")


def _provenance(content: bytes, path: Path) -> Provenance:
    try:
        return read_header(json.loads(content))["provenance"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(f"{path} holds a damaged {HEADER} ({error}): convert it again") from error
