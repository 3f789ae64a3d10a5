"""This file knows the shapes of well-known models by their public `config.json`s: enough to plan with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cartridges_jax.command_line.errors import UserError
from cartridges_jax.command_line.files import read_json
from cartridges_jax.models.config import ModelConfig

LLAMA_ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA_ROPE |= {"original_max_position_embeddings": 8192}


def _shape(kind: str, layers: int, width: int, mlp: int, heads: int, kv_heads: int, **more: Any) -> dict[str, Any]:
    rest = {
        "llama": {"vocab_size": 128_256, "max_position_embeddings": 131_072, "rope_theta": 5e5, "rms_norm_eps": 1e-5},
        "qwen3": {"vocab_size": 151_936, "max_position_embeddings": 40_960, "rope_theta": 1e6, "rms_norm_eps": 1e-6},
    }[kind]
    sizes = {"num_hidden_layers": layers, "hidden_size": width, "intermediate_size": mlp, "head_dim": 128}
    return {"model_type": kind, **sizes, "num_attention_heads": heads, "num_key_value_heads": kv_heads, **rest, **more}


SHAPES = {
    "smollm2-135m": _shape("llama", 30, 576, 1536, 9, 3, head_dim=64, vocab_size=49_152, max_position_embeddings=8192)
    | {"rope_theta": 1e5, "tie_word_embeddings": True},
    "llama-3.1-8b": _shape("llama", 32, 4096, 14_336, 32, 8, rope_scaling=LLAMA_ROPE),
    "llama-3.3-70b": _shape("llama", 80, 8192, 28_672, 64, 8, rope_scaling=LLAMA_ROPE),
    "qwen3-4b": _shape("qwen3", 36, 2560, 9728, 32, 8, tie_word_embeddings=True),
    "qwen3-32b": _shape("qwen3", 64, 5120, 25_600, 64, 8),
}


def shape_of(name: str) -> ModelConfig:
    """Gives the config of a model by its name ("llama-3.1-8b", "meta-llama/Llama-3.1-8B-Instruct") or its file.

    Raises:
      UserError: neither a known name nor a file; or a file that is no config of ours.
    """
    path = Path(name).expanduser()
    path = path / "config.json" if path.is_dir() else path
    if path.is_file():
        try:
            raw = read_json(path)
        except UserError as error:
            raise UserError(f"{name!r} is no config.json: planning reads shapes, not weights") from error
        return ModelConfig.from_hf(raw)
    short = name.rpartition("/")[2].lower().removesuffix("-instruct")
    if short not in SHAPES:
        raise UserError(
            f"the shape of model {name!r} is unknown: planning needs one of {', '.join(SHAPES)}, a model folder or a "
            "config.json"
        )
    return ModelConfig.from_hf(SHAPES[short])
