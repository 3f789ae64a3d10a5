"""What products take on this CPU, XLA's and the kernel's, by dtype; and attention over pages, and the engine's steps.

    python benchmarks/engine_dtypes.py [--rounds=10]

First table: products of all 30 layers of SmolLM2-135M, activations in float32 between: XLA's in the order that it does
fastest, `W[o, d] @ x[d, m]`, and `gathered_matmul` on weights cut into panels. int8 has a scale for each output and is
multiplied in float32. Second table: attention over pages, requests of 384 positions each. Third: steps of the engine,
with the model's own weights, and with the same rounded to bfloat16, which is how most models are published: the engine
finds that they fit. One side after the other in every round; the least of the rounds counts.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import cartridges_jax as cj
from cartridges_jax.kernels.decode_attention import decode_attention, new_pages, ordered
from cartridges_jax.kernels.decode_attention.pages import AttentionMetadata
from cartridges_jax.models.weights import Panels
from cartridges_jax.serving.engine import Engine
from cartridges_jax.serving.scheduler import BlockTable, Chunk, SequenceInput

LAYERS, D, F, N, K, H, PAGE = 30, 576, 1536, 9, 3, 64, 128
SHAPES = {"qkv": ((N + 2 * K) * H, D), "o": (D, N * H), "gate_up": (2 * F, D), "down": (D, F)}
TOKENS, REQUESTS, PAGES_EACH = (1, 4, 16, 64, 256), (1, 4, 16, 64), 3
Layer = dict[str, Any]


def float32(w_od: jax.Array, x_dm: jax.Array) -> jax.Array:
    return w_od @ x_dm


def bfloat16(w_od: jax.Array, x_dm: jax.Array) -> jax.Array:
    """Of one token by itself XLA:CPU makes a loop without vectors: four columns are faster."""
    m = x_dm.shape[1]
    x_dm = jnp.pad(x_dm.astype(jnp.bfloat16), ((0, 0), (0, max(4 - m, 0))))
    return jnp.einsum("od,dm->om", w_od, x_dm, preferred_element_type=jnp.float32)[:, :m]


def int8(weight: tuple[jax.Array, jax.Array], x_dm: jax.Array) -> jax.Array:
    return (weight[0].astype(jnp.float32) @ x_dm) * weight[1]


def rounded(w_od: jax.Array) -> tuple[jax.Array, jax.Array]:
    scale_o1 = jnp.abs(w_od).max(1, keepdims=True) / 127
    return jnp.round(w_od / scale_o1).astype(jnp.int8), scale_o1


def layers(convert: Callable[[jax.Array], Any]) -> list[Layer]:
    def layer(key: jax.Array) -> Layer:
        return {name: convert(0.02 * jax.random.normal(key, shape)) for name, shape in SHAPES.items()}

    return [layer(jax.random.key(i)) for i in range(LAYERS)]


def products(
    multiply: Callable[[Any, jax.Array], jax.Array], axis: int
) -> Callable[[list[Layer], jax.Array], jax.Array]:
    """Of activations whose features lie along `axis`."""

    def forward(weights: list[Layer], x: jax.Array) -> jax.Array:
        for layer in weights:
            qkv = jax.lax.optimization_barrier(multiply(layer["qkv"], x))
            x = x + multiply(layer["o"], jax.lax.slice_in_dim(qkv, 0, N * H, axis=axis))
            gate, up = jnp.split(multiply(layer["gate_up"], x), 2, axis=axis)
            x = x + multiply(layer["down"], jax.nn.silu(gate) * up)
        return x

    return jax.jit(forward)


def attention(requests: int, dtype: Any) -> Callable[[], Any]:
    """Of requests that share nothing."""
    count = requests * PAGES_EACH
    block_table = np.arange(count, dtype=np.int32).reshape(requests, PAGES_EACH)
    starts, none = np.full(requests, PAGES_EACH * PAGE - 1, np.int32), np.full(requests, -1, np.int32)
    no_slots = np.zeros((LAYERS, requests, K), np.int32)
    metadata = AttentionMetadata(starts, block_table, none, 0 * block_table, no_slots, no_slots)
    values = jax.random.normal(jax.random.key(0), (count * LAYERS * K, PAGE, H), dtype)
    pages = new_pages(len(values), PAGE, H, dtype)
    pages = pages.replace(keys=values.reshape(pages.keys.shape), values=values)
    q = jnp.ones((requests, 1, N, H), dtype)

    @jax.jit
    def run(pages: Any, metadata: AttentionMetadata) -> list[jax.Array]:
        metadata = ordered(metadata, PAGE)
        return [decode_attention(q, pages, metadata.of_layer(layer)) for layer in range(LAYERS)]

    return lambda: run(pages, metadata)


def step(model: cj.LanguageModel, size: int) -> Callable[[], Any]:
    """A step of decoding for `size` requests of 300 tokens, or a prefill of `size` tokens if there are more than 64."""
    engine = Engine(model, min(size, 64), 512, batch_sizes=[min(size, 64)])
    if size > 64:
        return lambda: (engine.prefill([Chunk([5] * size, 0, BlockTable(range(engine.pages_each)))]), engine._cache)[1]
    block_tables = [BlockTable(range(i * engine.pages_each, (i + 1) * engine.pages_each)) for i in range(size)]
    for i, block_table in enumerate(block_tables):
        engine.begin(SequenceInput(i, 5, 300, block_table, 0.0, 1.0, 0, 0, 1))
    return lambda: engine.decode(range(size))


def packed(weight: Any, x_md: jax.Array) -> jax.Array:
    return weight.matmul(x_md, "md,od->mo")


def measure(sides: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Milliseconds of each; the first call, which compiles, does not count."""
    best = dict.fromkeys(sides, float("inf"))
    for i in range(rounds + 1):
        for name, call in sides.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            if i:
                best[name] = min(best[name], 1e3 * (time.perf_counter() - start))
    return best


def table(head: str, columns: Sequence[int], rows: dict[int, dict[str, float]]) -> None:
    print(f"\n| {head} | {' | '.join(map(str, columns))} |\n|---|{'---|' * len(columns)}", flush=True)
    for name in rows[columns[0]]:
        print(f"| {name} | {' | '.join(f'{rows[column][name]:.1f}' for column in columns)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    rounds = parser.parse_args().rounds
    sides = {
        "XLA, float32": (products(float32, 0), layers(lambda w: w), 0),
        "XLA, bfloat16": (products(bfloat16, 0), layers(lambda w: w.astype(jnp.bfloat16)), 0),
        "XLA, int8": (products(int8, 0), layers(rounded), 0),
        "kernel, float32": (products(packed, 1), layers(Panels.of), 1),
        "kernel, bfloat16 weights": (products(packed, 1), layers(lambda w: Panels.of(w.astype(jnp.bfloat16))), 1),
    }
    found = {}
    for m in TOKENS:
        x_dm = jax.random.normal(jax.random.key(0), (D, m))
        calls = {name: lambda run=run, w=w, x=(x_dm, x_dm.T)[axis]: run(w, x) for name, (run, w, axis) in sides.items()}
        found[m] = measure(calls, rounds)
    table("products, ms for tokens", TOKENS, found)
    of_pages = {
        n: measure({"float32": attention(n, jnp.float32), "bfloat16": attention(n, jnp.bfloat16)}, rounds)
        for n in REQUESTS
    }
    table("attention, ms for requests", REQUESTS, of_pages)
    model = cj.load_model("smollm2-135m", dtype="float32")
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(leaf.dtype), model.params)
    models = {"its own weights": model, "bfloat16's": dataclasses.replace(model, params=narrow)}
    steps = {m: measure({name: step(of, m) for name, of in models.items()}, rounds) for m in TOKENS}
    table("the engine, ms a step for tokens", TOKENS, steps)


if __name__ == "__main__":
    main()
