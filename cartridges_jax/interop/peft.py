"""Adapter folders of Hugging Face PEFT: CARTRIDGE, and PREFIX_TUNING without a projection.

`adapter_model.safetensors` holds one tensor `prompt_embeddings` [p, layers * 2 * kv heads * head size]: for every slot
and layer its key, then its value. PEFT reads nothing else in that file, so its metadata has room for our header.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from cartridges_jax.cartridge import tensor_file
from cartridges_jax.cartridge.arrays import Cartridge
from cartridges_jax.cartridge.file import cast, header_of, read_header
from cartridges_jax.cartridge.provenance import Provenance
from cartridges_jax.command_line import files
from cartridges_jax.command_line.errors import UserError
from cartridges_jax.interop import torch_zip

CONFIG, TENSORS, OLD_TENSORS = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
TENSOR = "prompt_embeddings"
KINDS = ("CARTRIDGE", "PREFIX_TUNING")
SIZES = ("num_layers", "num_attention_heads", "token_dim", "num_virtual_tokens")


def read(path: Path) -> Cartridge:
    """Reads the adapter folder of an `adapter_config.json`.

    Raises:
      FileNotFoundError: a file is missing.
      UserError: it is another kind of adapter, or its tensor does not fit its config.
    """
    folder, config = path.parent, _read_config(path)
    tensor, header = _read_tensor(folder)
    l, k, width, p = (config[name] for name in SIZES)
    if width % k or tensor.shape != (p, 2 * l * width):
        raise UserError(
            f"{folder} holds {TENSOR} {tensor.shape}, expected {(p, 2 * l * width)} by its config ({p} virtual tokens, "
            f"{l} layers, {k} heads that share {width} channels)"
        )
    both = tensor.astype(np.float32).reshape(p, l, 2, k, width // k)
    keys, values = (both[:, :, i].swapaxes(0, 1) for i in range(2))
    num_frozen = config.get("num_frozen_tokens", 1) if config["peft_type"] == "CARTRIDGE" else 0
    model = config.get("base_model_name_or_path")
    provenance = Provenance(
        model=model if isinstance(model, str) else "",
        recipe=f"read from a PEFT {config['peft_type']} adapter; its making is unknown",
    )
    if header is not None:
        provenance = header["provenance"]
        num_frozen = num_frozen if config["peft_type"] == "CARTRIDGE" else header["num_frozen"]
    return Cartridge(keys, values, None, num_frozen, provenance)


def write(cartridge: Cartridge, folder: Path, dtype: str = "float32", kind: str = "CARTRIDGE") -> None:
    """Writes a folder that `PeftModel.from_pretrained` loads. Raises: UserError, if `dtype` cannot hold the values."""
    l, p, k, h = cartridge.keys.shape
    both = np.stack([np.asarray(cartridge.keys), np.asarray(cartridge.values)], axis=1)  # [l, 2, p, k, h]
    tensor = cast(both, dtype).transpose(2, 0, 1, 3, 4).reshape(p, -1)
    config: dict[str, Any] = {
        "peft_type": kind,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": cartridge.provenance.model or None,
        "inference_mode": True,
        "num_layers": l,
        "num_attention_heads": k,  # PEFT too means those of keys and values
        "num_transformer_submodules": 1,
        "num_virtual_tokens": p,
        "token_dim": k * h,
    }
    extra = {"num_frozen_tokens": cartridge.num_frozen} if kind == "CARTRIDGE" else {"prefix_projection": False}
    metadata = {"cartridge": json.dumps(header_of(cartridge), sort_keys=True)}
    with files.atomic(folder / TENSORS) as temporary:
        save_file({TENSOR: np.ascontiguousarray(tensor)}, temporary, metadata=metadata)
    files.write_text(folder / CONFIG, json.dumps(config | extra, indent=2, sort_keys=True) + "\n")


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(files.read_text(path, "a PEFT adapter's config"))
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}): save the adapter again") from error
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind not in KINDS:
        raise UserError(f"{path} has peft_type {kind!r}, expected {' or '.join(KINDS)}: only those are keys and values")
    if config.get("prefix_projection"):
        raise UserError(f"{path} has prefix_projection: its slots are made by a network, save them without it")
    if config.get("num_transformer_submodules", 1) not in (1, None):
        raise UserError(f"{path} is for an encoder and a decoder, expected a decoder alone")
    wrong = [name for name in SIZES if type(config.get(name)) is not int or not 0 < config[name] < 1 << 32]
    frozen = config.get("num_frozen_tokens", 1)
    if wrong or type(frozen) is not int or (kind == "CARTRIDGE" and not 0 <= frozen <= config["num_virtual_tokens"]):
        raise UserError(f"{path} says nothing usable about {', '.join(wrong) or 'num_frozen_tokens'}: save it again")
    return config


def _read_tensor(folder: Path) -> tuple[np.ndarray, dict[str, Any] | None]:
    path = folder / TENSORS
    if not path.is_file() and (folder / OLD_TENSORS).is_file():
        tree, _ = torch_zip.load(folder / OLD_TENSORS)
        if not isinstance(tree, dict) or not isinstance(tree.get(TENSOR), np.ndarray):
            raise UserError(f"{folder / OLD_TENSORS} has no tensor {TENSOR}")
        return tree[TENSOR], None
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {TENSORS}: save the adapter again")
    try:
        data, metadata = tensor_file.read(path)
        header = metadata.get("cartridge")
        return tensor_file.arrays(data)[TENSOR], None if header is None else read_header(json.loads(header))
    except (SafetensorError, KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is not a whole adapter file ({error!r}): save it again") from error
