"""This file loads a model from a GGUF file (llama.cpp's format) or its parts; the `gguf` package dequantises them.

Converters to GGUF permute the rows of Llama's q and k so that RoPE acts on neighbouring pairs; `unpermute` undoes it.
Qwen files are not permuted.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from jax.sharding import Mesh

from cartridges_jax.command_line.errors import UserError
from cartridges_jax.models.config import ModelConfig, rope_factors
from cartridges_jax.models.hub import gguf_parts
from cartridges_jax.models.loading import load_params
from cartridges_jax.models.params import Params
from cartridges_jax.models.settings import LARGEST_HEAD, MOST_LAYERS, check_settings, number_of, size_of
from cartridges_jax.models.spec import ENDS, FAMILIES
from cartridges_jax.models.tokenizer import gguf_metadata

ROPE_FACTORS = "rope_freqs.weight"  # Llama 3's scaling arrives as a tensor of divisors
KEYS = ("embedding_length", "block_count", "feed_forward_length", "context_length")
KEYS += ("attention.head_count", "attention.layer_norm_rms_epsilon")
GENERAL = {"general.type": "model", "general.quantization_version": 2}
# Keys behind the architecture's name that change nothing of what is computed, or are read by name below.
HARMLESS = (*KEYS, "attention.head_count_kv", "attention.key_length", "rope.freq_base", "vocab_size", "pooling_type")
HARMLESS += ("rope.scaling.type", "rope.scaling.factor", "rope.scale_linear", "rope.scaling.original_context_length")
HARMLESS += ("rope.scaling.finetuned",)
# Those that change it, with the only values that ask for what the decoder computes; in many of them 0 is "not said".
VALUES: dict[str, tuple[object, ...]] = {
    "attention.causal": (True,),
    "rope.scaling.attn_factor": (1.0,),
    "tensor_data_layout": ("reference", "Meta AI original pth"),
}
VALUES |= dict.fromkeys(("logit_scale", "residual_scale", "embedding_scale"), (0.0, 1.0))


def load_gguf(path: Path, dtype: Any, mesh: Mesh | None = None, num_ids: int = 0) -> tuple[ModelConfig, Params, str]:
    """Loads config, parameters and their fingerprint; `mesh` and `num_ids` are as `load_params` has them.

    Raises:
      FileNotFoundError: no such file, or no other part of it.
      UserError: not a whole GGUF file, an unsupported architecture, or tensors that do not fit.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: expected a .gguf file")
    parts = gguf_parts(path)
    metadata = [gguf_metadata(part) for part in parts]
    for i, (part, said) in enumerate(zip(parts, metadata, strict=True)):
        number, count = said.get("split.no", i), said.get("split.count") or 1
        if (number, count) != (i, len(parts)):
            raise UserError(
                f"{part} is part {number} (from 0) of {count} by its contents, and {i} of {len(parts)} by its name: "
                "give the parts of a model back the names that they were published with"
            )
    listed = [tensor for part in parts for tensor in _tensors(part)]
    tensors = {_hf_name(tensor.name, metadata[0].get("general.architecture")): tensor for tensor in listed}
    if not len(tensors) == len(listed) == metadata[0].get("split.tensors.count", len(listed)):
        raise UserError(f"{path} and its other parts do not hold the tensors of one model: download them again")
    factors = tensors.pop(ROPE_FACTORS, None)
    config = _config(metadata[0], tensors, None if factors is None else Dequantized(factors)[:])

    def read(name: str) -> Dequantized:
        permuted = FAMILIES[config.family].gguf_interleaves and re.search(r"\.[qk]_proj\.", name)
        return Dequantized(tensors[name], config.head_dim if permuted else None)

    params, fingerprint = load_params(config, tensors, read, dtype, mesh, num_ids)
    return config, params, fingerprint


def _tensors(path: Path) -> list[gguf.ReaderTensor]:
    try:
        with np.errstate(over="raise"):
            return gguf.GGUFReader(path).tensors
    except (ValueError, IndexError, KeyError, ArithmeticError) as error:
        raise UserError(f"{path} is not a whole GGUF file ({error}): download it again") from error


class Dequantized:
    """A tensor of the file, which gives float32 rows in the order of Hugging Face when it is indexed."""

    def __init__(self, tensor: gguf.ReaderTensor, permuted_head_dim: int | None = None):
        self._tensor, self._permuted = tensor, permuted_head_dim
        self.shape = tuple(map(int, reversed(tensor.shape)))

    @functools.cached_property
    def _rows(self) -> np.ndarray:
        assert self._permuted is not None
        return unpermute(np.arange(self.shape[0]), self._permuted)

    def __getitem__(self, rows: Any) -> np.ndarray:
        chosen = rows if self._permuted is None else self._rows[rows]
        try:
            return gguf.dequantize(self._tensor.data[chosen], self._tensor.tensor_type)
        except NotImplementedError as error:
            kind = self._tensor.tensor_type.name
            raise UserError(
                f"{self._tensor.name} is of type {kind}, which no weights are: download it again"
            ) from error


def unpermute(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Turns rows [(heads pairs 2), …], RoPE's pairs side by side, into the halves [(heads 2 pairs), …] we rotate."""
    pairs = rows.reshape(-1, head_dim // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _config(metadata: dict[str, Any], tensors: dict[str, Any], divisors: np.ndarray | None) -> ModelConfig:
    family = metadata.get("general.architecture")
    if not isinstance(family, str) or family not in FAMILIES:
        raise UserError(f"the GGUF's architecture is {family!r}, expected one of {', '.join(FAMILIES)}")
    for key, expected in GENERAL.items():
        if (found := metadata.get(key, expected)) != expected:
            raise UserError(f"{key} of the GGUF file is {found!r}, expected {expected!r}")
    settings = {
        key.removeprefix(f"{family}."): _alike(value) for key, value in metadata.items() if key.startswith(f"{family}.")
    }
    missing = [f"{family}.{key}" for key in KEYS if key not in settings]
    missing += ["token_embd.weight"] if "model.embed_tokens.weight" not in tensors else []
    if missing:
        raise UserError(f"the GGUF file lacks {', '.join(missing)}: expected a whole model")
    heads, width = size_of(settings, "attention.head_count"), size_of(settings, "embedding_length")
    head_dim = size_of(settings, "attention.key_length", width // heads, LARGEST_HEAD)
    scale = 0.0, float(np.float32(head_dim**-0.5))
    same = dict.fromkeys(("attention.value_length", "rope.dimension_count"), (head_dim,))
    check_settings(f"this {family} GGUF file", settings, HARMLESS, VALUES | same | {"attention.scale": scale})
    theta = number_of(settings, "rope.freq_base", 10_000.0)
    return ModelConfig(
        family=family,
        vocab_size=int(tensors["model.embed_tokens.weight"].shape[-1]),
        num_layers=size_of(settings, "block_count", most=MOST_LAYERS),
        embed_dim=width,
        num_heads=heads,
        num_kv_heads=size_of(settings, "attention.head_count_kv", heads),
        head_dim=head_dim,
        mlp_dim=size_of(settings, "feed_forward_length"),
        norm_eps=float(np.float32(number_of(settings, "attention.layer_norm_rms_epsilon"))),
        rope_theta=theta,
        max_position_embeddings=size_of(settings, "context_length"),
        tie_embeddings="lm_head.weight" not in tensors,
        qkv_bias="model.layers.0.self_attn.q_proj.bias" in tensors,
        qk_norm=FAMILIES[family].qk_norm,
        rope_factors=_rope_factors(settings, theta, head_dim, divisors),
    )


def _alike(value: Any) -> Any:
    """Takes one number out of a list that gives the same number for every layer; anything else stays as it is."""
    return value[0] if isinstance(value, list) and value and all(one == value[0] for one in value) else value


def _rope_factors(
    settings: dict[str, Any], theta: float, head_dim: int, divisors: np.ndarray | None
) -> tuple[float, ...]:
    """Reads the scaling of RoPE as llama.cpp does: linear unless a type is given, the newer of two keys, 0 for none."""
    factor = settings.get("rope.scaling.factor", settings.get("rope.scale_linear")) or 1.0
    kind = settings.get("rope.scaling.type", "linear")
    if kind == "none" or (kind == "linear" and factor == 1.0):
        scaling: tuple[float, ...] = ()
    else:
        scaling = rope_factors({"rope_type": kind, "factor": factor}, theta, head_dim)
    if divisors is None:
        return scaling
    if divisors.shape != (head_dim // 2,):
        raise UserError(f"{ROPE_FACTORS} is {divisors.shape}, expected {(head_dim // 2,)}: download the file again")
    return tuple(float(divisor) * (scaling[0] if scaling else 1.0) for divisor in divisors)


def _hf_name(name: str, family: Any) -> str:
    """Gives Hugging Face's name of a tensor; one that is not in the family's table keeps its own."""
    match = re.fullmatch(r"blk\.(\d+)\.(.+)", name)
    if match is None:
        return {array.gguf: array.hf for array in ENDS}.get(name, name)
    arrays = FAMILIES[family].arrays if isinstance(family, str) and family in FAMILIES else ()
    hf_names = {array.gguf: f"model.layers.{match[1]}.{array.hf}" for array in arrays}
    return hf_names.get(match[2], name)
