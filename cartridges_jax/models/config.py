"""The config of a model says everything in which one model's mathematics differs from another's, as data."""

from __future__ import annotations

import dataclasses
import json
import math
import reprlib
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from cartridges_jax.command_line.errors import UserError
from cartridges_jax.models import spec
from cartridges_jax.models.settings import (
    HF_ACTIVATIONS,
    HF_HARMLESS,
    HF_VALUES,
    LARGEST_HEAD,
    MOST_LAYERS,
    MOST_PARAMS,
    check_settings,
    number_of,
    size_of,
)
from cartridges_jax.models.spec import FAMILIES

# what a config.json cannot do without
HF_KEYS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
HF_KEYS += ("max_position_embeddings",)

ROPE_HARMLESS = ("rope_type", "type", "rope_theta", "original_max_position_embeddings")
ROPE_VALUES = {"partial_rotary_factor": (1.0, None), "attention_factor": (1.0, None)}
ROPE_NUMBERS = {  # Hugging Face's `rope_type` -> the numbers it has
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
# different ones for different layers; no layer's may pass as "not said"
ROPE_VALUES |= dict.fromkeys(("full_attention", "sliding_attention", "chunked_attention", "linear_attention"), ())

# what a cartridge's slots depend on, even between models whose weights are the same
LAYOUT = ("num_layers", "num_kv_heads", "head_dim", "rope_theta", "rope_factors", "local_rope_theta")


class LayerSettings(NamedTuple):
    """What may differ between the layers of one model, beside their weights."""

    rope_theta: float
    rope_factors: tuple[float, ...]
    window: int | None  # how many keys of its segment a query sees; None: all
    scale: float | None  # of the scores; None: one over the root of the head size


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The sizes and numbers of a decoder-only transformer with grouped-query attention, RMSNorm, RoPE and a gated MLP.

    In what else families differ, and which arrays a layer has, is in the family's row of `spec.FAMILIES`.
    """

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
    max_position_embeddings: int  # longest sequence the model was made for, in tokens, a cartridge's offset included
    tie_embeddings: bool
    qkv_bias: bool = False
    qk_norm: bool = False
    rope_factors: tuple[float, ...] = ()  # h/2 divisors of the RoPE frequencies (Llama 3's scaling); empty means ones
    window: int | None = None  # how many keys of its segment a query sees in the family's windowed layers; None: all
    local_rope_theta: float | None = None  # of those layers, which then have no factors; None: as the others
    scale: float | None = None  # of the scores; None: one over the root of the head size
    soft_cap: float | None = None  # of the scores: cap * tanh(score / cap)

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise UserError(f"{self.num_heads} query heads cannot be grouped over {self.num_kv_heads} kv heads evenly")
        if self.head_dim % 2:
            raise UserError(f"head size is {self.head_dim}, expected an even number: RoPE rotates pairs")
        if self.rope_factors and len(self.rope_factors) != self.head_dim // 2:
            raise UserError(f"{len(self.rope_factors)} RoPE factors were given, expected {self.head_dim // 2}")
        if not all(math.isfinite(factor) and factor > 0 for factor in self.rope_factors):
            raise UserError("a RoPE factor is not a positive number: download the model again")
        params = self.matrix_weights + self.head_weights
        if params > MOST_PARAMS:
            raise UserError(f"the config asks for {params:.1e} weights, more than any machine holds: download it again")

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes of the axes of weights, by the letters that `spec.py` gives them."""
        sizes = {"d": self.embed_dim, "n": self.num_heads, "k": self.num_kv_heads, "h": self.head_dim}
        return sizes | {"f": self.mlp_dim, "v": self.vocab_size}

    @property
    def has_head(self) -> bool:
        """Whether the head is a matrix of its own, not the embedding."""
        return not self.tie_embeddings

    @property
    def layers(self) -> tuple[LayerSettings, ...]:
        """The settings of every layer."""
        others = LayerSettings(self.rope_theta, self.rope_factors, None, self.scale)
        windowed = others._replace(window=self.window)
        if self.local_rope_theta is not None:
            windowed = windowed._replace(rope_theta=self.local_rope_theta, rope_factors=())
        pattern = FAMILIES[self.family].windowed
        return tuple(windowed if pattern[i % len(pattern)] else others for i in range(self.num_layers))

    @property
    def matrix_weights(self) -> int:
        """How many entries the matrices of all layers have: a forward pass does two FLOPs with each for a token."""
        return self.num_layers * self.layer_weights

    @property
    def layer_weights(self) -> int:
        """How many entries the matrices of one layer have."""
        return spec.layer_weights(self)

    @property
    def end_weights(self) -> int:
        """How many entries the embedding and the head have together; they may be one."""
        return spec.end_weights(self)

    @property
    def head_weights(self) -> int:
        """How many entries the matrix of the head has."""
        return self.vocab_size * self.embed_dim

    @property
    def kv_numbers(self) -> int:
        """How many numbers the keys and values of one position have, in all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim

    def attention_flops(self, seen: float) -> float:
        """The FLOPs of a forward pass of one token whose queries see so many keys: scores, then values."""
        return 4 * self.num_layers * self.num_heads * self.head_dim * seen

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any]) -> ModelConfig:
        """Reads a Hugging Face `config.json`, of transformers 4 (`rope_theta`) or 5 (`rope_parameters`).

        Raises:
          UserError: a family or a RoPE scaling that this decoder does not implement.
        """
        family = raw.get("model_type", "")
        if not isinstance(family, str) or family not in FAMILIES:
            raise UserError(f"model_type is {family!r}, expected one of {', '.join(FAMILIES)}")
        if missing := [key for key in HF_KEYS if key not in raw]:
            raise UserError(f"this {family} config lacks {', '.join(missing)}: expected a whole config.json")
        heads, width = size_of(raw, "num_attention_heads"), size_of(raw, "hidden_size")
        head_dim = size_of(raw, "head_dim", FAMILIES[family].head_dim or width // heads, LARGEST_HEAD)
        longest = size_of(raw, "max_position_embeddings")
        check_settings(f"this {family} config", *_settings(raw, family, head_dim, longest))
        theta, factors = _rope(raw, longest, head_dim)
        return cls(
            family=family,
            vocab_size=size_of(raw, "vocab_size"),
            num_layers=size_of(raw, "num_hidden_layers", most=MOST_LAYERS),
            embed_dim=width,
            num_heads=heads,
            num_kv_heads=size_of(raw, "num_key_value_heads", heads),
            head_dim=head_dim,
            mlp_dim=size_of(raw, "intermediate_size"),
            norm_eps=number_of(raw, "rms_norm_eps", 1e-6),
            rope_theta=theta,
            max_position_embeddings=longest,
            tie_embeddings=bool(raw.get("tie_word_embeddings")),
            # transformers' Qwen 2 has them whatever its config says
            qkv_bias=bool(raw.get("attention_bias")) or FAMILIES[family].qkv_bias,
            qk_norm=FAMILIES[family].qk_norm,
            rope_factors=factors,
            **{
                one.field: size_of(raw, one.key) if one.is_whole else number_of(raw, one.key) ** one.power
                for one in FAMILIES[family].settings
                if raw.get(one.key) is not None
            },
        )

    def layout_differs(self, other: str) -> str:
        """Says how the layout of keys and values differs from that of another config, given as JSON; "" if it does not.

        What the other config does not mention is taken to agree.
        """
        try:
            theirs = json.loads(other or "{}")
        except (ValueError, RecursionError):
            theirs = {}
        ours = json.loads(json.dumps({name: getattr(self, name) for name in LAYOUT}))
        different = [name for name in LAYOUT if isinstance(theirs, dict) and theirs.get(name, ours[name]) != ours[name]]
        shown = (", ".join(f"{name} {side[name]}" for name in different) for side in (theirs, ours))
        return f"with {next(shown)}, and this model has {next(shown)}" if different else ""


def _settings(
    raw: Mapping[str, Any], family: str, head_dim: int, longest: int
) -> tuple[dict[str, Any], Collection[str], dict[str, tuple[object, ...]]]:
    """Puts together the arguments of `check_settings`, some of which depend on other keys of the config.json."""
    settings, name, row = dict(raw), family.capitalize(), FAMILIES[family]
    if isinstance(code := settings.get("auto_map"), dict):  # classes of the checkpoint's own; that of a config is none
        settings["auto_map"] = {key: value for key, value in code.items() if key.startswith("AutoModel")}
    limit = settings.get("sliding_window")
    if family != "llama" or (isinstance(limit, int) and limit >= longest):
        settings.pop("sliding_window", None)  # Qwen's counts with use_sliding_window only; another hides no token
    kinds = ["sliding_attention" if is_windowed else "full_attention" for is_windowed in row.windowed]
    types = settings.get("layer_types")
    if isinstance(types, list) and types == [kinds[i % len(kinds)] for i in range(len(types))]:
        del settings["layer_types"]
    values = HF_VALUES | {
        "architectures": (f"{name}ForCausalLM", f"{name}Model", "LLaMAForCausalLM", None),
        "attention_multiplier": (head_dim**-0.5, None),
        "query_pre_attn_scalar": (head_dim, None),
        "qkv_bias": (bool(raw.get("attention_bias")) or row.qkv_bias, None),
        "hidden_act": HF_ACTIVATIONS[row.activation],
    }
    values |= dict.fromkeys(("qk_norm", "use_qk_norm", "qk_layernorm"), (row.qk_norm, None))
    for setting in row.settings:  # which `from_hf` reads
        settings.pop(setting.key, None)
    return settings, HF_HARMLESS, values


def _rope(raw: Mapping[str, Any], longest: int, head_dim: int) -> tuple[float, tuple[float, ...]]:
    """Reads RoPE's theta and factors, which may be given twice: in `rope_scaling` and in `rope_parameters`."""
    said = {key: raw[key] for key in ("rope_scaling", "rope_parameters") if raw.get(key)}
    if wrong := [key for key, rope in said.items() if not isinstance(rope, dict)]:
        raise UserError(f"{wrong[0]} is {reprlib.repr(said[wrong[0]])}, expected an object")

    def agreed(key: str, default: Any) -> float:
        found = [rope[key] for rope in (raw, *said.values()) if rope.get(key) is not None] or [default]
        if any(value != found[0] for value in found):
            raise UserError(f"this config gives {key} as {' and '.join(map(repr, found))}: expected one of them")
        return number_of({key: found[0]}, key)

    theta = agreed("rope_theta", 10_000.0)
    # without the length that Llama 3's scaling began with, transformers takes the longest sequence
    original = {"original_max_position_embeddings": agreed("original_max_position_embeddings", longest)}
    factors = {rope_factors(rope | original, theta, head_dim) for rope in said.values()} or {()}
    if len(factors) > 1:
        raise UserError("rope_scaling and rope_parameters of this config contradict each other: expected one of them")
    return theta, factors.pop()


def rope_factors(rope: Mapping[str, Any], theta: float, head_dim: int) -> tuple[float, ...]:
    """Computes the divisors of the RoPE frequencies for the `rope_type`s `default`, `linear` and `llama3`.

    With `llama3` (Llama 3.1 model card), frequencies whose wavelength is longer than original/low are divided by
    `factor`, those with one shorter than original/high stay, and those between are interpolated.
    """
    kinds = {str(rope[key]) for key in ("rope_type", "type") if rope.get(key)} or {"default"}
    if len(kinds) > 1 or not kinds <= ROPE_NUMBERS.keys():
        named = " and ".join(sorted(map(repr, kinds)))
        raise UserError(f"RoPE scaling is {named}, expected {', '.join(ROPE_NUMBERS)}")
    kind, half = kinds.pop(), head_dim // 2
    neutral = {} if kind != "default" else {"factor": (1.0, None)}
    check_settings("RoPE scaling", rope, (*ROPE_HARMLESS, *ROPE_NUMBERS[kind]), ROPE_VALUES | neutral)
    numbers = [number_of(rope, key) for key in ROPE_NUMBERS[kind]]
    if kind == "default":
        return ()
    if kind == "linear":
        return (numbers[0],) * half
    factor, low, high, original = numbers
    if low >= high:
        raise UserError(f"low_freq_factor is {low}, expected less than high_freq_factor, {high}")

    def divisor(i: int) -> float:
        turns = original * theta ** (-i / half) / (2 * math.pi)  # rotations within the original window
        smooth = min(1.0, max(0.0, (turns - low) / (high - low)))
        return 1.0 / ((1.0 - smooth) / factor + smooth)

    return tuple(divisor(i) for i in range(half))
