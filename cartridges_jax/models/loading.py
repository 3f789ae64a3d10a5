"""Fills the parameter tree from named tensors: one table of names, every problem reported together.

Both loaders (`hf.py`, `gguf.py`) speak Hugging Face names; a tensor is read, checked and placed one at a time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from typing import Any

import einops
import jax
import jax.numpy as jnp
import numpy as np

from cartridges_jax.models.config import ModelConfig
from cartridges_jax.models.transformer import Params, abstract_params

ReadTensor = Callable[[str], np.ndarray]

# Hugging Face name inside a layer -> our name and the einops pattern from theirs to ours.
LAYER = {
    "input_layernorm.weight": ("attention_norm", "d -> d"),
    "post_attention_layernorm.weight": ("mlp_norm", "d -> d"),
    "self_attn.q_proj.weight": ("q", "(n h) d -> d n h"),
    "self_attn.k_proj.weight": ("k", "(n h) d -> d n h"),
    "self_attn.v_proj.weight": ("v", "(n h) d -> d n h"),
    "self_attn.o_proj.weight": ("o", "d (n h) -> n h d"),
    "self_attn.q_proj.bias": ("q_bias", "(n h) -> n h"),
    "self_attn.k_proj.bias": ("k_bias", "(n h) -> n h"),
    "self_attn.v_proj.bias": ("v_bias", "(n h) -> n h"),
    "self_attn.q_norm.weight": ("q_norm", "h -> h"),
    "self_attn.k_norm.weight": ("k_norm", "h -> h"),
    "mlp.gate_proj.weight": ("gate", "f d -> d f"),
    "mlp.up_proj.weight": ("up", "f d -> d f"),
    "mlp.down_proj.weight": ("down", "d f -> f d"),
}
TOP = {
    "model.embed_tokens.weight": ("embed", "v d -> v d"),
    "model.norm.weight": ("final_norm", "d -> d"),
    "lm_head.weight": ("head", "v d -> v d"),
}


def load_params(config: ModelConfig, names: Iterable[str], read: ReadTensor, dtype: Any) -> tuple[Params, str]:
    """Reads every parameter of `config` through `read`, casts it to `dtype` and stacks layers on axis 0.

    Returns:
      The parameters and a fingerprint: SHA-256 over each tensor's name, shape and 256 evenly spaced values as float32.

    Raises:
      ValueError: the missing, unknown and misshapen tensors, all in one sentence.
    """
    tree = abstract_params(config)
    expected = _expected(config, tree)
    available = {n for n in names if not n.endswith("rotary_emb.inv_freq")}
    if config.tie_embeddings:
        available.discard("lm_head.weight")  # a tied checkpoint may repeat the embedding
    problems = [f"{n} is missing" for n in sorted(expected.keys() - available)]
    problems += [f"{n} is unknown" for n in sorted(available - expected.keys())]
    filled = jax.tree.map(lambda leaf: np.empty(leaf.shape, jnp.dtype(dtype)), tree)
    digest = hashlib.sha256()
    for name, (place, layer, pattern) in expected.items():
        if name not in available:
            continue
        tensor = read(name)
        target = _leaf(filled, place) if layer is None else _leaf(filled, place)[layer]
        try:
            ours = einops.rearrange(tensor, pattern, **({"h": config.head_dim} if "h" in pattern else {}))
        except einops.EinopsError:
            ours = tensor
        if ours.shape != target.shape:
            problems.append(f"{name} is {tensor.shape}, expected {target.shape} as {pattern!r}")
            continue
        target[...] = ours
        flat = tensor.reshape(-1)
        sample = flat[:: max(1, flat.size // 256)].astype(np.float32)
        digest.update(f"{name}{tensor.shape}".encode() + sample.tobytes())
    if problems:
        shown = "; ".join(problems[:12]) + ("" if len(problems) <= 12 else f"; and {len(problems) - 12} more")
        raise ValueError(f"these weights do not fit a {config.family} of {config.num_layers} layers: {shown}")
    leaves, structure = jax.tree.flatten(filled)
    del filled, target
    for i in range(len(leaves)):  # one by one, so that a model is never held twice
        leaves[i] = jnp.asarray(leaves[i]).block_until_ready()
    return jax.tree.unflatten(structure, leaves), digest.hexdigest()


def _expected(config: ModelConfig, tree: Params) -> dict[str, tuple[tuple[str, ...], int | None, str]]:
    names: dict[str, tuple[tuple[str, ...], int | None, str]] = {}
    for name, (ours, pattern) in TOP.items():
        if ours in tree:
            names[name] = ((ours,), None, pattern)
    for layer in range(config.num_layers):
        for name, (ours, pattern) in LAYER.items():
            if ours in tree["blocks"]:
                names[f"model.layers.{layer}.{name}"] = (("blocks", ours), layer, pattern)
    return names


def _leaf(tree: Any, path: tuple[str, ...]) -> np.ndarray:
    for key in path:
        tree = tree[key]
    return tree
