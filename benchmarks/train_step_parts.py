"""Where the training step's time goes: its parts alone, at the shape of `train_step.py`, forward and backward.

    python benchmarks/train_step_parts.py

Least times of a dozen runs: wall, the process's CPU seconds, and the FLOPs that a part needs over its wall time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from train_step import SLOTS, SMOLLM2, TOKENS, TOP_K, measure_matmul

from cartridges_jax.kernels.prefix_attention import prefix_attention
from cartridges_jax.models.block import block, layer_of, rope_table
from cartridges_jax.models.params import init_params
from cartridges_jax.training.losses import top_k_cross_entropy

REPEATS = 12


def main() -> None:
    config, key = SMOLLM2, jax.random.key(0)
    d, h, n, k, layers = config.embed_dim, config.head_dim, config.num_heads, config.num_kv_heads, config.num_layers
    params = init_params(config, key)
    layer = jax.tree.map(lambda a: a[0], params["blocks"])
    rope = rope_table(jnp.arange(TOKENS)[None], config.layers[0], config.head_dim)
    segments = jnp.ones((1, TOKENS), jnp.int32)
    q, own, slots = (jax.random.normal(key, shape) for shape in ((1, TOKENS, n, h), (1, TOKENS, k, h), (SLOTS, k, h)))
    x = jax.random.normal(key, (1, TOKENS, d))
    ids = jax.random.randint(key, (TOKENS, TOP_K), 0, config.vocab_size)
    mask = jnp.zeros((TOKENS, TOP_K), bool).at[TOKENS // 2 :].set(True)

    def attention(*arrays: jax.Array) -> jax.Array:
        return (prefix_attention(*arrays, segments) * q).sum()

    def whole_block(x: jax.Array, layer: Any) -> jax.Array:
        return (block(layer_of(layer, config), x, rope, without_attention, config)[0] * x).sum()

    def head(x: jax.Array, weights: jax.Array) -> jax.Array:
        return top_k_cross_entropy(x, weights, ids, jnp.full(ids.shape, -3.5), mask, "drop")

    needed_attention = n * h * TOKENS * (SLOTS + (TOKENS + 1) / 2) * 12
    needed_block = 4 * TOKENS * (2 * d * h * (n + k) + 3 * d * config.mlp_dim)
    print(f"Matrix product: {measure_matmul() / 1e9:.0f} GFLOP/s\n")
    print("| part | times a step | wall, ms | CPU, ms | GFLOP/s |\n|---|---|---|---|---|")
    gradient = jax.grad(attention, argnums=(0, 1, 2, 3, 4))
    row("attention", layers, needed_attention, gradient, q, own, own + 1, slots, slots + 1)
    row("block without it", layers, needed_block, jax.grad(whole_block), x, layer)
    row("head and loss", 1, 2 * TOKENS * d * config.vocab_size, jax.grad(head), x[0], params["embed"])


def without_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, None]:
    groups = q.shape[2] // k.shape[2]
    return q + jnp.repeat(k + v, groups, axis=2), None


def row(name: str, times: int, needed: float, function: Callable[..., Any], *args: Any) -> None:
    compiled = jax.jit(function)
    jax.block_until_ready(compiled(*args))
    wall, cpu = [], []
    for _ in range(REPEATS):
        start, before = time.perf_counter(), time.process_time()
        jax.block_until_ready(compiled(*args))
        wall.append(time.perf_counter() - start)
        cpu.append(time.process_time() - before)
    print(f"| {name} | {times} | {min(wall) * 1e3:.1f} | {min(cpu) * 1e3:.1f} | {needed / min(wall) / 1e9:.0f} |")


if __name__ == "__main__":
    main()
