"""Shapes of well-known models, from the config.json that their authors publish: planning needs no weights."""

from __future__ import annotations

from cartridges_jax.models.config import ModelConfig

_LLAMA_3_1 = {
    "model_type": "llama",
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
_QWEN3 = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "head_dim": 128,
}


def _sizes(width: int, mlp: int, layers: int, heads: int, kv_heads: int) -> dict[str, int]:
    return {
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    }


SHAPES = {
    "meta-llama/Llama-3.1-8B-Instruct": _LLAMA_3_1 | _sizes(4096, 14336, 32, 32, 8),
    "meta-llama/Llama-3.3-70B-Instruct": _LLAMA_3_1 | _sizes(8192, 28672, 80, 64, 8),
    "Qwen/Qwen3-4B": _QWEN3 | _sizes(2560, 9728, 36, 32, 8) | {"tie_word_embeddings": True},
    "Qwen/Qwen3-32B": _QWEN3 | _sizes(5120, 25600, 64, 64, 8),
}


def shape_of(name: str) -> ModelConfig:
    """Raises ValueError for a model that is not in the table."""
    if name not in SHAPES:
        raise ValueError(f"model is {name!r}, expected one of {', '.join(sorted(SHAPES))}: others are not in the table")
    return ModelConfig.from_hf(SHAPES[name])
