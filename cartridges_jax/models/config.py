"""What differs between Llama 3.x, SmolLM2, Qwen2.5 and Qwen3, as data (design §4)."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

from command_line.errors import UserError

# Hugging Face `model_type` -> whether q/k/v carry a bias unless the config says otherwise, and whether q and k are
# normed.
FAMILIES = {"llama": (False, False), "qwen2": (True, False), "qwen3": (False, True)}
# what a config.json cannot do without
HF_KEYS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
HF_KEYS += ("max_position_embeddings",)

# what a cartridge's slots depend on, even between models whose weights are the same
LAYOUT = ("num_layers", "num_kv_heads", "head_dim", "rope_theta", "rope_factors")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer with grouped-query attention, RMSNorm, RoPE and a SwiGLU MLP."""

    family: str
    vocab_size: int  # v
    num_layers: int  # l
    embed_dim: int  # d
    num_heads: int  # n
    num_kv_heads: int  # k
    head_dim: int  # h
    mlp_dim: int  # f
    norm_eps: float
    rope_theta: float
    window: int  # longest sequence the model was made for, in tokens, cartridge slots included
    tie_embeddings: bool
    qkv_bias: bool = False
    qk_norm: bool = False
    rope_factors: tuple[float, ...] = ()  # h/2 divisors of the RoPE frequencies (Llama 3's scaling); empty means ones

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise UserError(f"{self.num_heads} query heads cannot be grouped over {self.num_kv_heads} kv heads evenly")
        if self.head_dim % 2:
            raise UserError(f"head size is {self.head_dim}, expected an even number: RoPE rotates pairs")
        if self.rope_factors and len(self.rope_factors) != self.head_dim // 2:
            raise UserError(f"{len(self.rope_factors)} RoPE factors were given, expected {self.head_dim // 2}")

    @property
    def layer_weights(self) -> int:
        """Entries of one layer's matrices."""
        return self.embed_dim * (2 * self.head_dim * (self.num_heads + self.num_kv_heads) + 3 * self.mlp_dim)

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any]) -> ModelConfig:
        """Reads a Hugging Face `config.json`, of transformers 4 (`rope_theta`) or 5 (`rope_parameters`).

        Raises:
          UserError: a family or a RoPE scaling that this decoder does not implement.
        """
        family = raw.get("model_type", "")
        if family not in FAMILIES:
            raise UserError(f"model_type is {family!r}, expected one of {', '.join(FAMILIES)}")
        sliding = raw.get("use_sliding_window") or "sliding_attention" in (raw.get("layer_types") or ())
        if sliding or raw.get("hidden_act", "silu") != "silu" or raw.get("mlp_bias"):
            raise UserError(f"this {family} config uses a sliding window, an MLP bias or an activation other than silu")
        if missing := [key for key in HF_KEYS if key not in raw]:
            raise UserError(f"this {family} config lacks {', '.join(missing)}: expected a whole config.json")
        default_bias, qk_norm = FAMILIES[family]
        heads, width = raw["num_attention_heads"], raw["hidden_size"]
        head_dim = raw.get("head_dim") or width // heads
        rope = {**(raw.get("rope_scaling") or {}), **(raw.get("rope_parameters") or {})}
        theta = float(rope.get("rope_theta") or raw.get("rope_theta") or 10_000.0)
        return cls(
            family=family,
            vocab_size=raw["vocab_size"],
            num_layers=raw["num_hidden_layers"],
            embed_dim=width,
            num_heads=heads,
            num_kv_heads=raw.get("num_key_value_heads") or heads,
            head_dim=head_dim,
            mlp_dim=raw["intermediate_size"],
            norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
            rope_theta=theta,
            window=raw["max_position_embeddings"],
            tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
            qkv_bias=bool(raw.get("attention_bias", default_bias)) or family == "qwen2",
            qk_norm=qk_norm,
            rope_factors=rope_factors(rope, theta, head_dim),
        )

    def layout_differs(self, other: str) -> str:
        """How the layout of keys and values differs from that of another config, its JSON; "" where it does not.

        What the other config does not say is taken to agree.
        """
        try:
            theirs = json.loads(other or "{}")
        except (ValueError, RecursionError):
            theirs = {}
        ours = json.loads(json.dumps({name: getattr(self, name) for name in LAYOUT}))
        different = [name for name in LAYOUT if isinstance(theirs, dict) and theirs.get(name, ours[name]) != ours[name]]
        shown = (", ".join(f"{name} {side[name]}" for name in different) for side in (theirs, ours))
        return f"with {next(shown)}, and this model has {next(shown)}" if different else ""


def rope_factors(rope: Mapping[str, Any], theta: float, head_dim: int) -> tuple[float, ...]:
    """Divisors of the RoPE frequencies for Hugging Face's `rope_type`s `default`, `linear` and `llama3`.

    `llama3` (Llama 3.1 model card): wavelengths longer than original/low are divided by `factor`, those shorter than
    original/high stay, those between are interpolated.
    """
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return ()
    half = head_dim // 2
    factor = float(rope["factor"]) if "factor" in rope else 1.0
    if kind == "linear":
        return (factor,) * half
    if kind != "llama3":
        raise UserError(f"RoPE scaling is {kind!r}, expected default, linear or llama3")
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    original = float(rope["original_max_position_embeddings"])

    def divisor(i: int) -> float:
        turns = original * theta ** (-i / half) / (2 * math.pi)  # rotations within the original window
        smooth = min(1.0, max(0.0, (turns - low) / (high - low)))
        return 1.0 / ((1.0 - smooth) / factor + smooth)

    return tuple(divisor(i) for i in range(half))
