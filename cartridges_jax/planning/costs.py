"""FLOPs, bytes and seconds of a step by formulas: XLA's analysis counts a loop's body once, and a kernel not at all.

The seconds are those of a roofline. A part of the step takes as long as its FLOPs at the chip's peak or its bytes at
the memory's bandwidth, whichever is longer. Parts follow each other, and communication is not hidden behind them. No
program reaches those peaks, and few hide nothing: a prediction says which plan is better, and what to measure against.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from cartridges_jax.kernels.block_sizes import of_device
from cartridges_jax.models.config import ModelConfig
from cartridges_jax.planning.chips import Chip
from cartridges_jax.planning.hlo import Traffic
from cartridges_jax.planning.programs import TARGETS, TOP_K, Requests, longest_head, target_chunks
from cartridges_jax.training.config import TrainConfig


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of a step, on one device."""

    flops: float
    num_bytes: float  # from and to its memory

    def seconds(self, chip: Chip) -> float:
        return max(self.flops / chip.flops, self.num_bytes / chip.bandwidth)


@dataclasses.dataclass(frozen=True)
class Costs:
    """What a step costs on one device."""

    needed: float  # FLOPs that any program needs; what is computed twice counts once
    parts: tuple[Part, ...]

    @property
    def flops(self) -> float:
        return sum(part.flops for part in self.parts)

    def seconds(self, chip: Chip, communicated: float) -> float:
        """Returns the seconds that the step takes; `communicated` are the bytes that a device receives (`received`)."""
        return sum(part.seconds(chip) for part in self.parts) + communicated / chip.ring

    def mfu(self, chip: Chip, seconds: float) -> float:
        """Returns the share of the chip's peak that a step of so many seconds uses for needed FLOPs."""
        return self.needed / (seconds * chip.flops)


def train_costs(config: TrainConfig, model: ModelConfig, mesh: tuple[int, int, int], device: str) -> Costs:
    """Returns the costs of a step of training.

    Every row counts as one conversation, which is the most that attention can cost. The FLOPs that are needed are those
    of a forward pass and of the gradients of activations and slots, since the weights are frozen.
    """
    data, fsdp, tensor = mesh
    rows = config.batch_size // (data * fsdp)
    tokens = config.accumulation * rows * config.seq_len
    layers, width = model.num_layers, jnp.dtype(config.dtype).itemsize
    matrices = model.matrix_weights / tensor
    # what the backward pass multiplies again: all but a layer's last product, which gives nothing but its output
    again = matrices - layers * model.embed_dim * model.mlp_dim / tensor if config.remat == "layers" else 0.0
    seen = config.init.num_slots + (config.seq_len + 1) / 2
    attention = model.attention_flops(seen) / tensor * tokens
    head = model.head_weights / tensor
    targets = TARGETS * tokens
    # a flash kernel's backward pass has five products to the forward pass's two, since it computes the scores again
    layer_flops = (4 * matrices + 2 * again) * tokens + 3.5 * attention
    passes = 4 if config.remat == "layers" else 3
    weight_bytes = config.accumulation * (3 if config.remat == "layers" else 2) * matrices * width
    chunks = config.accumulation * target_chunks(rows * config.seq_len, device)
    return Costs(
        needed=4 * matrices * tokens + 3 * attention + 4 * head * targets,
        parts=(
            Part(layer_flops, weight_bytes + passes * layers * tokens * _states(model, tensor) * width),
            Part(4 * head * targets, 2 * chunks * head * width),  # a chunk of targets reads the head twice
        ),
    )


def decode_costs(config: TrainConfig, model: ModelConfig, mesh: tuple[int, int, int], requests: Requests) -> Costs:
    """Returns the costs of decoding one token for every request; requests of one cartridge read it together."""
    data, fsdp, tensor = mesh
    count = requests.count / (data * fsdp)
    width = jnp.dtype(config.dtype).itemsize
    weights = (model.matrix_weights + model.head_weights) / tensor
    position = model.kv_numbers / min(tensor, model.num_kv_heads) * width
    slots = config.init.num_slots
    attention = model.attention_flops(slots + requests.length) / tensor * count
    flops = 2 * weights * count + attention
    read = min(requests.cartridges, count) * slots + count * requests.length
    return Costs(flops, (Part(flops, weights * width + position * read),))


def expected_traffic(
    config: TrainConfig, model: ModelConfig, mesh: tuple[int, int, int], device: str
) -> dict[str, float]:
    """Returns the bytes that a step's collectives write on a device, by kind of collective.

    They are: a layer's matrices, gathered in the forward and the backward pass; embedding and head, gathered for each
    micro-batch (the compiler for CPUs moves them out of that loop); over `tensor`, two sums of a layer's forward pass,
    one of them again in its backward pass, and two of gradients; and the cartridge's gradient. A few single numbers
    (loss, norm, how many chunks) are left out.
    """
    data, fsdp, tensor = mesh
    width = jnp.dtype(config.dtype).itemsize
    gathered = config.accumulation * (2 * model.matrix_weights + model.end_weights)
    positions = config.batch_size // (data * fsdp) * config.seq_len
    chunks = target_chunks(positions, device) * min(of_device(device).loss_chunk, positions)
    sums = positions * (5 * model.num_layers + 1) * model.embed_dim * width
    normalizers = 2 if config.tail == "bucket" else 1  # of two sums each
    sums += chunks * (model.embed_dim + 2 * normalizers + TOP_K) * 4  # a target's gradient, and its entries
    summed = config.accumulation * sums
    parts = tensor if model.num_kv_heads % tensor == 0 else 1
    slots = _cartridge_numbers(config, model) * 4 / parts
    return {
        "all-gather": gathered * width / tensor if fsdp > 1 else 0.0,
        "all-reduce": (summed if tensor > 1 else 0.0) + (slots if data * fsdp > 1 or parts < tensor else 0.0),
    }


def received(traffic: dict[str, Traffic] | dict[str, float]) -> float:
    """Returns the bytes that a device receives for what collectives write on it: a sum takes two rounds."""
    sizes = {kind: t.num_bytes if isinstance(t, Traffic) else t for kind, t in traffic.items()}
    return sum(size * (2 if kind == "all-reduce" else 1) for kind, size in sizes.items())


def least_memory(config: TrainConfig, model: ModelConfig, mesh: tuple[int, int, int]) -> float:
    """Returns the bytes that every program of the step holds: weights, cartridge, optimizer and layers' inputs."""
    data, fsdp, tensor = mesh
    width = jnp.dtype(config.dtype).itemsize
    weights = (model.matrix_weights + model.end_weights) * width / (fsdp * tensor)
    slots = _cartridge_numbers(config, model) * 4
    tokens = config.batch_size // (data * fsdp) * config.seq_len
    kept = model.num_layers * tokens * (model.embed_dim + model.num_heads * model.head_dim / tensor) * width
    return weights + 3 * slots / tensor + kept


def _cartridge_numbers(config: TrainConfig, model: ModelConfig) -> int:
    of_a_slot = 2 * model.head_dim + (config.init.kind == "attention_matching")  # whose slots have a bias
    return model.num_layers * longest_head(config) * model.num_kv_heads * of_a_slot


def _states(model: ModelConfig, tensor: int) -> float:
    """Returns how many numbers one pass of a layer reads and writes for a token, beside its weights."""
    heads = 2 * (model.num_heads + 2 * model.num_kv_heads) + 2 * model.num_heads
    return 8 * model.embed_dim + (heads * model.head_dim + 6 * model.mlp_dim) / tensor
