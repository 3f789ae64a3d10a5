"""Writes a loaded model as a Hugging Face folder, for engines that read nothing else; without torch."""

from __future__ import annotations

import json
from pathlib import Path

import einops
import numpy as np
from safetensors.numpy import save_file

from cartridges_jax.models.language_model import LanguageModel
from cartridges_jax.models.spec import file_names


def write_folder(model: LanguageModel, folder: Path) -> Path:
    c, params = model.config, model.params
    tensors = {}
    for name, spec, layer in file_names(c):
        theirs, _, ours = spec.pattern.partition(" -> ")
        array = np.asarray(params[spec.name] if layer is None else params["blocks"][spec.name][layer])
        tensors[name] = einops.rearrange(array, f"{ours} -> {theirs}", **({"h": c.head_dim} if "h" in theirs else {}))
    folder.mkdir(parents=True, exist_ok=True)
    save_file({n: np.ascontiguousarray(a) for n, a in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    config = {
        **{
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "torch_dtype": "float32",
        },
        **{"vocab_size": c.vocab_size, "hidden_size": c.embed_dim, "intermediate_size": c.mlp_dim},
        **{
            "num_hidden_layers": c.num_layers,
            "num_attention_heads": c.num_heads,
            "num_key_value_heads": c.num_kv_heads,
        },
        **{"head_dim": c.head_dim, "rms_norm_eps": c.norm_eps, "max_position_embeddings": c.max_position_embeddings},
        **{"rope_parameters": {"rope_type": "default", "rope_theta": c.rope_theta}, "rope_theta": c.rope_theta},
        **{
            "tie_word_embeddings": c.tie_embeddings,
            "bos_token_id": 1,
            "eos_token_id": sorted(model.tokenizer.stop_ids),
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    model.tokenizer._wrapped.save_pretrained(str(folder))
    return folder
