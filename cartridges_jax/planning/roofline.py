"""How long a step takes at best, and when a cartridge has paid for itself. Plain arithmetic, no devices.

A step takes at least the longest of three times: its products at the chip's peak, its weights read from memory, its
collectives over the links. Nothing overlaps better than that, so that real steps are slower and the MFU lower.
"""

from __future__ import annotations

import dataclasses

from cartridges_jax.models.config import ModelConfig
from cartridges_jax.planning.hardware import Chip

READS = 3  # of a layer's weights by a micro-batch: forward, once more for the backward pass, and for the gradients


@dataclasses.dataclass(frozen=True)
class Workload:
    """One step, on all devices together."""

    tokens: int
    targets: int  # at most: tokens with a teacher's entry
    own_keys: float  # that a token sees beside the slots, on average
    slots: int


def weights_per_layer(config: ModelConfig) -> int:
    heads = config.embed_dim * config.head_dim * 2 * (config.num_heads + config.num_kv_heads)
    return heads + 3 * config.embed_dim * config.mlp_dim


def step_flops(config: ModelConfig, work: Workload, recomputed: bool = True) -> float:
    """Forward pass and gradients of the activations; weights are frozen and have none.

    With `recomputed`, what the backward pass computes again too: a layer's products but the last, whose result it does
    not need. Attention's weights are computed again in any case: its backward pass has five products for two.
    """
    down = config.embed_dim * config.mlp_dim
    products = 4 * weights_per_layer(config) + (2 * (weights_per_layer(config) - down) if recomputed else 0)
    attention = 14 * config.num_heads * config.head_dim * (work.slots + work.own_keys)
    head = 4 * config.vocab_size * config.embed_dim * work.targets
    return config.num_layers * work.tokens * (products + attention) + head


def step_seconds(chip: Chip, flops: float, memory_bytes: float, link_bytes: float) -> dict[str, float]:
    """Of one device: the three times whose longest bounds the step."""
    return {
        "compute": flops / chip.flops,
        "memory": memory_bytes / chip.bandwidth,
        "links": link_bytes / chip.links,
    }


def break_even(
    config: ModelConfig, chip: Chip, device_seconds: float, document: int, slots: int, answer: int, *, cached: bool
) -> float:
    """Number of queries after which training has cost less than prompting with the document.

    A query saves the prefill of the document, unless the server keeps it `cached`; and for every answered token the
    reading of the document's keys and values instead of the slots' (in bfloat16).
    """
    per_token = 4 * config.num_layers * config.num_kv_heads * config.head_dim
    saved = answer * (document - slots) * per_token / chip.bandwidth
    if not cached:
        prefill = 2 * config.num_layers * document * weights_per_layer(config)
        prefill += 2 * config.num_layers * config.num_heads * config.head_dim * document**2  # half of it is masked
        saved += prefill / chip.flops
    return float("inf") if saved <= 0 else device_seconds / saved
