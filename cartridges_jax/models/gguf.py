"""Weights from a GGUF file (llama.cpp's format), dequantised by the `gguf` package where they are read.

Converters to GGUF permute the rows of Llama's q and k so that RoPE acts on neighbouring pairs; `unpermute` undoes it.
Qwen files are not permuted.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from jax.sharding import Mesh

from cartridges_jax.models.config import FAMILIES, ModelConfig, rope_factors
from cartridges_jax.models.loading import load_params
from cartridges_jax.models.transformer import Params
from command_line.errors import UserError

LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
TOP = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
TOP["output.weight"] = "lm_head.weight"
ROPE_FACTORS = "rope_freqs.weight"  # Llama 3's scaling arrives as a tensor of divisors
KEYS = ("embedding_length", "block_count", "feed_forward_length", "context_length")
KEYS += ("attention.head_count", "attention.layer_norm_rms_epsilon")


def load_gguf(path: Path, dtype: Any, mesh: Mesh | None = None) -> tuple[ModelConfig, Params, str]:
    """Loads config, parameters and their fingerprint.

    Raises:
      FileNotFoundError: no such file.
      UserError: not a whole GGUF file, an unsupported architecture, or tensors that do not fit.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: expected a .gguf file")
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise UserError(f"{path} is not a whole GGUF file ({error}): download it again") from error
    tensors = {_hf_name(t.name): t for t in reader.tensors}
    factors = tensors.pop(ROPE_FACTORS, None)
    config = _config(reader, tensors, () if factors is None else tuple(map(float, factors.data)))

    def read(name: str) -> Dequantized:
        permuted = config.family == "llama" and re.search(r"\.[qk]_proj\.", name)
        return Dequantized(tensors[name], config.head_dim if permuted else None)

    params, fingerprint = load_params(config, tensors, read, dtype, mesh)
    return config, params, fingerprint


class Dequantized:
    """A tensor of the file as float32 rows, in the order of Hugging Face."""

    def __init__(self, tensor: gguf.ReaderTensor, permuted_head_dim: int | None):
        self._tensor = tensor
        self.shape = tuple(map(int, reversed(tensor.shape)))
        rows = np.arange(self.shape[0])
        self._rows = None if permuted_head_dim is None else unpermute(rows, permuted_head_dim)

    def __getitem__(self, rows: Any) -> np.ndarray:
        chosen = rows if self._rows is None else self._rows[rows]
        return gguf.dequantize(self._tensor.data[chosen], self._tensor.tensor_type)


def unpermute(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """[(heads pairs 2), …] as GGUF interleaves RoPE's pairs -> [(heads 2 pairs), …], the halves that we rotate."""
    pairs = rows.reshape(-1, head_dim // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _config(reader: gguf.GGUFReader, tensors: dict[str, Any], factors: tuple[float, ...]) -> ModelConfig:
    architecture = reader.fields.get("general.architecture")
    family = None if architecture is None else architecture.contents()
    if family not in FAMILIES:
        raise UserError(f"the GGUF's architecture is {family!r}, expected one of {', '.join(FAMILIES)}")
    missing = [f"{family}.{key}" for key in KEYS if f"{family}.{key}" not in reader.fields]
    missing += ["token_embd.weight"] if "model.embed_tokens.weight" not in tensors else []
    if missing:
        raise UserError(f"the GGUF file lacks {', '.join(missing)}: expected a whole model")

    def value(key: str, default: Any = None) -> Any:
        field = reader.fields.get(f"{family}.{key}")
        return default if field is None else field.contents()

    heads, width = value("attention.head_count"), value("embedding_length")
    head_dim, theta = value("attention.key_length", width // heads), float(value("rope.freq_base", 10_000.0))
    scaling = value("rope.scaling.type", "none")
    if scaling != "none":
        factors = rope_factors({"rope_type": scaling, "factor": value("rope.scaling.factor", 1.0)}, theta, head_dim)
    return ModelConfig(
        family=family,
        vocab_size=int(tensors["model.embed_tokens.weight"].shape[1]),
        num_layers=value("block_count"),
        embed_dim=width,
        num_heads=heads,
        num_kv_heads=value("attention.head_count_kv", heads),
        head_dim=head_dim,
        mlp_dim=value("feed_forward_length"),
        norm_eps=float(np.float32(value("attention.layer_norm_rms_epsilon"))),
        rope_theta=theta,
        window=value("context_length"),
        tie_embeddings="lm_head.weight" not in tensors,
        qkv_bias="model.layers.0.self_attn.q_proj.bias" in tensors,
        qk_norm=FAMILIES[family][1],
        rope_factors=factors,
    )


def _hf_name(name: str) -> str:
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if match and match[2] in LAYER:
        return f"model.layers.{match[1]}.{LAYER[match[2]]}.{match[3]}"
    return TOP.get(name, name)
