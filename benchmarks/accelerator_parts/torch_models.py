"""transformers' models of the shapes that are measured, with random weights, and what torch's device says."""

from __future__ import annotations

import gc
import resource
from typing import Any

import torch
import transformers

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
_COMMON = {"max_position_embeddings": 131_072, "head_dim": 128, "num_attention_heads": 32, "num_key_value_heads": 8}
_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-3.1-8b": (
        "Llama",
        {"vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32, **_COMMON},
    ),
    "qwen3-4b": (
        "Qwen3",
        {"vocab_size": 151_936, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, **_COMMON}
        | {"tie_word_embeddings": True},
    ),
    "tiny": (
        "Llama",
        {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
        | {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096},
    ),
}


def random_model(name: str) -> Any:
    """In bfloat16, frozen, with torch's own attention."""
    family, sizes = _CONFIGS[name]
    config = getattr(transformers, f"{family}Config")(**sizes, attn_implementation="sdpa")
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(DEVICE):
            model = getattr(transformers, f"{family}ForCausalLM")(config)
    finally:
        torch.set_default_dtype(torch.float32)
    return model.requires_grad_(False)


def wait(_: object) -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def forget() -> None:
    """Gives memory back and begins to count its peak anew."""
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_bytes() -> int:
    if DEVICE == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
