"""Tiny random checkpoints that need no torch, and what transformers makes of them: `python tests/make_golden.py`.

A tensor is drawn from PCG64 seeded by its name, so `tests/golden/` holds configs, shapes and expected outputs only, and
the tests write the very weights that transformers was given. `make test-parity` compares transformers with these files.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

GOLDEN = Path(__file__).parent / "golden"
NUM_TOKENS = 28
STORED = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}
PROMPT = (
    "The lighthouse keeper wrote in his log: on 14 March 1887, at half past three, a brig with two masts passed "
    "north of the reef, flying no colours, and did not answer our signal.\n"
)
PROMPT_POSITIONS = (0, 1, 17, -1)

_SMALL = {"vocab_size": 128, "max_position_embeddings": 512, "num_hidden_layers": 2, "head_dim": 16}
_LLAMA3 = {"rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0}
_LLAMA3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
# sizes in words: d, f, n, k; the number of groups n/k, and n·h against d, differ from one to the next
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {
        **{"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2},
        **{"rope_parameters": _LLAMA3, "rms_norm_eps": 1e-5, "num_hidden_layers": 3},
    },
    "smollm2": {
        **{"hidden_size": 96, "intermediate_size": 128, "num_attention_heads": 6, "num_key_value_heads": 2},
        **{"rope_parameters": {"rope_type": "default", "rope_theta": 100_000.0}, "rms_norm_eps": 1e-5},
        **{"model_type": "llama", "tie_word_embeddings": True},
    },
    "qwen2": {
        **{"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 1},
        **{"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "tie_word_embeddings": True},
    },
    "qwen3": {
        **{"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4},
        **{"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    },
}


def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The tensor of this name in float32: uniform, with a trained model's spread; PCG64's bits never change."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    bits = np.random.PCG64(seed).random_raw(math.prod(shape))
    uniform = ((bits >> np.uint64(11)) * 2.0**-52 - 1.0).reshape(shape)  # [-1, 1)
    if "norm" in name:
        return (1 + 0.5 * uniform).astype(np.float32)
    spread = 0.5 if name.endswith("bias") else 1.0 if "embed" in name else (3 / shape[-1]) ** 0.5
    return (spread * uniform).astype(np.float32)


def fixed_tokens(count: int = NUM_TOKENS, vocab_size: int = 128) -> np.ndarray:
    return (np.random.PCG64(count).random_raw(count) % np.uint64(vocab_size)).astype(np.int32)


def golden_config(family: str) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """The family's `config.json` as transformers writes it, and the shape of every tensor of its checkpoint."""
    golden = json.loads((GOLDEN / f"{family}.json").read_text())
    return golden["config"], {name: tuple(shape) for name, shape in golden["shapes"].items()}


def weights(family: str, stored: str = "float32") -> dict[str, np.ndarray]:
    return {name: draw(name, shape).astype(STORED[stored]) for name, shape in golden_config(family)[1].items()}


def torch_model(family: str) -> Any:
    """An untrained transformers model of the family, in float32."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"model_type": family, **_SMALL, **FAMILIES[family]}
    config = AutoConfig.for_model(sizes.pop("model_type"), **sizes)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()


def torch_outputs(model: Any, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Each block's output [l, t, d] and the logits [t, v] of the fixed tokens, after loading `tensors`.

    They are computed in float64, as float32 is rounded otherwise by every kind of CPU.
    """
    import torch

    state = {name: torch.from_numpy(array.astype(np.float64)) for name, array in tensors.items()}
    missing, unknown = model.double().load_state_dict(state, strict=False)
    model.tie_weights()
    assert not unknown and set(missing) <= {"lm_head.weight"}, (missing, unknown)
    layers: list[np.ndarray] = []
    hooks = [
        block.register_forward_hook(lambda _module, _inputs, output: layers.append(output[0].numpy()))
        for block in model.model.layers
    ]
    with torch.no_grad():
        logits = model(torch.from_numpy(fixed_tokens())[None].long()).logits[0].numpy()
    for hook in hooks:
        hook.remove()
    return {"layers": np.stack(layers).astype(np.float32), "logits": logits.astype(np.float32)}


def smollm2_logits() -> tuple[np.ndarray, np.ndarray]:
    """Ids of PROMPT and SmolLM2-135M's logits [t, v], the dequantised GGUF file run by transformers in float64."""
    import torch
    from transformers import AutoModelForCausalLM

    from cartridges_jax.models.hub import resolve
    from cartridges_jax.models.tokenizer import load_tokenizer

    files = resolve("smollm2-135m")
    assert files.gguf is not None
    ids = np.asarray(load_tokenizer(files).encode(PROMPT), np.int32)
    model = AutoModelForCausalLM.from_pretrained(
        files.gguf.parent, gguf_file=files.gguf.name, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        return ids, model.double().eval()(torch.from_numpy(ids)[None].long()).logits[0].numpy()


def main() -> None:
    GOLDEN.mkdir(exist_ok=True)
    for family in FAMILIES:
        model = torch_model(family)
        tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
        shapes = {name: list(t.shape) for name, t in model.state_dict().items() if name not in tied}
        golden = {"config": model.config.to_dict(), "shapes": shapes}
        (GOLDEN / f"{family}.json").write_text(json.dumps(golden, sort_keys=True) + "\n")
        outputs = torch_outputs(model, weights(family))
        bfloat16 = torch_outputs(model, weights(family, "bfloat16"))
        np.savez_compressed(GOLDEN / f"{family}.npz", **outputs, bfloat16_logits=bfloat16["logits"])
    ids, logits = smollm2_logits()
    chosen = logits[list(PROMPT_POSITIONS)]
    sample = np.sort(np.random.PCG64(0).random_raw(500) % np.uint64(logits.shape[1])).astype(np.int32)
    top = np.argsort(-chosen, axis=-1, kind="stable")[:, :50].astype(np.int32)
    np.savez_compressed(
        GOLDEN / "smollm2-135m.npz",
        **{"ids": ids, "sample": sample, "sample_logits": chosen[:, sample]},
        **{"top": top, "top_logits": np.take_along_axis(chosen, top, axis=-1)},
    )


if __name__ == "__main__":
    main()
