"""One table for each family of models says which arrays a layer has and how its mathematics differs from the others'.

Everything else that has to know is derived from it: abstract shapes, random weights, the names and layouts in files of
Hugging Face and GGUF, where an array lies on a mesh, along which axes it is quantised, the layout of decoding, and how
many weights there are. A new family is a row of `FAMILIES`.

Axis letters: l layer, d model width, n query heads, k kv heads, h head size, f mlp width, v vocabulary.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from cartridges_jax.models.config import ModelConfig

MESH_AXES = {"d": "fsdp", "n": "tensor", "k": "tensor", "f": "tensor", "v": "tensor"}


class ArraySpec(NamedTuple):
    """One array: its name and axes here, and its name and layout in files. Of a layer's, files add the layer."""

    name: str
    axes: str
    hf: str
    gguf: str
    hf_axes: str = ""  # as an einops pattern; the same as `axes` unless it is said
    summed: str = ""  # axes that a product with this matrix sums over; none: it is not multiplied as a matrix
    fused: str = ""  # the matrix in which decoding has it, beside others
    when: str = ""  # the setting of `ModelConfig` without which the array does not exist
    init: Literal["random", "ones"] = "random"

    @property
    def pattern(self) -> str:
        """The rearrangement from the file's layout to ours, for einops."""
        return f"{self.hf_axes or self.axes} -> {self.axes}"

    def shape(self, config: ModelConfig) -> tuple[int, ...]:
        return tuple(config.sizes[axis] for axis in self.axes.split())

    def file_shape(self, config: ModelConfig) -> tuple[int, ...]:
        """The shape in a file of Hugging Face's."""
        axes = re.findall(r"\([^)]*\)|\w", self.hf_axes or self.axes)
        return tuple(math.prod(config.sizes[axis] for axis in re.findall(r"\w", part)) for part in axes)

    @property
    def mesh_axes(self) -> tuple[str | None, ...]:
        """The mesh's axis along which each axis lies. The width is split in matrices only."""
        return tuple(None if a == "d" and not self.summed else MESH_AXES.get(a) for a in self.axes.split())

    @property
    def outputs_first(self) -> str:
        """The axes with those that a product sums over behind the others: the layout in which decoding reads it."""
        summed = self.summed.split()
        return " ".join(sorted(self.axes.split(), key=lambda axis: axis in summed))

    @property
    def summed_axes(self) -> tuple[int, ...]:
        return tuple(i for i, axis in enumerate(self.axes.split()) if axis in self.summed.split())


class Setting(NamedTuple):
    """A number of a config.json that a family reads: `ModelConfig.field` is the number at `key`, to a power."""

    field: str
    key: str
    power: float = 1.0
    is_whole: bool = False


class Family(NamedTuple):
    """What a Hugging Face `model_type` stands for."""

    arrays: tuple[ArraySpec, ...]  # of a layer, in the order in which they enter a model's fingerprint
    qkv_bias: bool = False  # where the config does not say
    qk_norm: bool = False
    head_dim: int | None = None  # where the config does not say; None: the width over the number of heads
    activation: Literal["silu", "gelu_tanh"] = "silu"
    norm_offset: float = 0.0  # what is added to the weights of a norm before they are multiplied
    scales_embedding: bool = False  # by the root of the width
    windowed: tuple[bool, ...] = (False,)  # which layers see `ModelConfig.window` keys only; repeated
    settings: tuple[Setting, ...] = ()
    gguf_interleaves: bool = False  # GGUF's converter puts the two halves of RoPE's pairs side by side


ENDS = (
    ArraySpec("embed", "v d", "model.embed_tokens.weight", "token_embd.weight", summed="d"),
    ArraySpec("final_norm", "d", "model.norm.weight", "output_norm.weight", init="ones"),
    ArraySpec("head", "v d", "lm_head.weight", "output.weight", summed="d", when="has_head"),
)
_NORMS = (
    ArraySpec("attention_norm", "d", "input_layernorm.weight", "attn_norm.weight", init="ones"),
    ArraySpec("mlp_norm", "d", "post_attention_layernorm.weight", "ffn_norm.weight", init="ones"),
)
MATRICES = (
    ArraySpec("q", "d n h", "self_attn.q_proj.weight", "attn_q.weight", "(n h) d", summed="d", fused="qkv"),
    ArraySpec("k", "d k h", "self_attn.k_proj.weight", "attn_k.weight", "(k h) d", summed="d", fused="qkv"),
    ArraySpec("v", "d k h", "self_attn.v_proj.weight", "attn_v.weight", "(k h) d", summed="d", fused="qkv"),
    ArraySpec("o", "n h d", "self_attn.o_proj.weight", "attn_output.weight", "d (n h)", summed="n h", fused="o"),
    ArraySpec("q_bias", "n h", "self_attn.q_proj.bias", "attn_q.bias", "(n h)", when="qkv_bias"),
    ArraySpec("k_bias", "k h", "self_attn.k_proj.bias", "attn_k.bias", "(k h)", when="qkv_bias"),
    ArraySpec("v_bias", "k h", "self_attn.v_proj.bias", "attn_v.bias", "(k h)", when="qkv_bias"),
    ArraySpec("q_norm", "h", "self_attn.q_norm.weight", "attn_q_norm.weight", when="qk_norm", init="ones"),
    ArraySpec("k_norm", "h", "self_attn.k_norm.weight", "attn_k_norm.weight", when="qk_norm", init="ones"),
    ArraySpec("gate", "d f", "mlp.gate_proj.weight", "ffn_gate.weight", "f d", summed="d", fused="gate_up"),
    ArraySpec("up", "d f", "mlp.up_proj.weight", "ffn_up.weight", "f d", summed="d", fused="gate_up"),
    ArraySpec("down", "f d", "mlp.down_proj.weight", "ffn_down.weight", "d f", summed="f", fused="down"),
)
FAMILIES: dict[str, Family] = {
    "llama": Family(_NORMS + MATRICES, gguf_interleaves=True),
    "qwen2": Family(_NORMS + MATRICES, qkv_bias=True),
    "qwen3": Family(_NORMS + MATRICES, qk_norm=True, head_dim=128),
}


def layer_arrays(config: ModelConfig) -> tuple[ArraySpec, ...]:
    """The arrays of a layer of this model."""
    return _existing(FAMILIES[config.family].arrays, config)


def end_arrays(config: ModelConfig) -> tuple[ArraySpec, ...]:
    """The arrays of this model that belong to no layer."""
    return _existing(ENDS, config)


def _existing(arrays: tuple[ArraySpec, ...], config: ModelConfig) -> tuple[ArraySpec, ...]:
    return tuple(array for array in arrays if not array.when or getattr(config, array.when))


def file_names(config: ModelConfig) -> Iterator[tuple[str, ArraySpec, int | None]]:
    """Every tensor that a model's file has: its name in Hugging Face's, what it is, and its layer, if it has one."""
    for array in end_arrays(config):
        yield array.hf, array, None
    for layer in range(config.num_layers):
        for array in layer_arrays(config):
            yield f"model.layers.{layer}.{array.hf}", array, layer


def fused_arrays(config: ModelConfig) -> dict[str, list[ArraySpec]]:
    """The arrays that stand beside each other in each matrix of the decode layout, by the name of that matrix."""
    fused: dict[str, list[ArraySpec]] = {}
    for array in layer_arrays(config):
        fused.setdefault(array.fused or array.name, []).append(array)
    return fused


def layer_weights(config: ModelConfig) -> int:
    """How many entries the matrices of one layer have."""
    return sum(math.prod(array.shape(config)) for array in layer_arrays(config) if array.summed)


def end_weights(config: ModelConfig) -> int:
    """How many entries the embedding and the head have, which may be one."""
    return sum(math.prod(array.shape(config)) for array in end_arrays(config) if array.summed)
