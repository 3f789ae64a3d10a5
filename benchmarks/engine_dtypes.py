"""Which dtype decodes fastest on this CPU: the products of SmolLM2's layers, and attention over pages, in each.

    python benchmarks/engine_dtypes.py [--rounds=10]

First table: products of all 30 layers, weights as `serving/decoder.py` lays them out, activations in float32 between.
int8 has a scale for each output and is multiplied in float32, or with activations rounded to int8. Second table:
attention over pages, requests of 384 positions each. Third: steps of the engine, keys and values in float32. One dtype
after the other in every round; the least of the rounds counts.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import cartridges_jax as cj
from cartridges_jax.kernels.prefix_decode_attention import Pages, Plan, Reading, own_at_once, prefix_decode_attention
from cartridges_jax.serving.engine import Engine
from cartridges_jax.serving.scheduler import Place, SlotInput

LAYERS, D, F, N, K, H, PAGE = 30, 576, 1536, 9, 3, 64, 128
SHAPES = {"qkv": ((N + 2 * K) * H, D), "o": (D, N * H), "gate_up": (2 * F, D), "down": (D, F)}
TOKENS, REQUESTS, PAGES_EACH = (1, 4, 16, 64, 256), (4, 16), 3
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


def int8_both(weight: tuple[jax.Array, jax.Array], x_dm: jax.Array) -> jax.Array:
    scale_m = jnp.abs(x_dm).max(0) / 127
    rounded_dm = jnp.round(x_dm / scale_m).astype(jnp.int8)
    y_om = jnp.einsum("od,dm->om", weight[0], rounded_dm, preferred_element_type=jnp.int32)
    return y_om.astype(jnp.float32) * weight[1] * scale_m


def layers(convert: Callable[[jax.Array], Any]) -> list[Layer]:
    def layer(key: jax.Array) -> Layer:
        return {name: convert(0.02 * jax.random.normal(key, shape)) for name, shape in SHAPES.items()}

    return [layer(jax.random.key(i)) for i in range(LAYERS)]


def rounded(w_od: jax.Array) -> tuple[jax.Array, jax.Array]:
    scale_o1 = jnp.abs(w_od).max(1, keepdims=True) / 127
    return jnp.round(w_od / scale_o1).astype(jnp.int8), scale_o1


def products(multiply: Callable[[Any, jax.Array], jax.Array]) -> Callable[[list[Layer], jax.Array], jax.Array]:
    def forward(weights: list[Layer], x_dm: jax.Array) -> jax.Array:
        for layer in weights:
            qkv_om = jax.lax.optimization_barrier(multiply(layer["qkv"], x_dm))
            x_dm = x_dm + multiply(layer["o"], qkv_om[: N * H])
            gate_fm, up_fm = jnp.split(multiply(layer["gate_up"], x_dm), 2)
            x_dm = x_dm + multiply(layer["down"], jax.nn.silu(gate_fm) * up_fm)
        return x_dm

    return jax.jit(forward)


def attention(requests: int, dtype: Any) -> Callable[[], Any]:
    count = requests * PAGES_EACH
    assert count % own_at_once(requests) == 0
    own = np.array([(page, PAGE, page % PAGES_EACH * PAGE) for page in range(count)], np.int32)
    nothing = Reading(*np.zeros((3, 1), np.int32), np.int32(0))
    readers = np.arange(count) // PAGES_EACH
    plan = Plan(nothing, np.zeros((1, requests), bool), Reading(*own.T, np.int32(count)), readers)
    keys = jax.random.normal(jax.random.key(0), (count, K, H, PAGE), dtype)
    values = jax.random.normal(jax.random.key(1), (count, K, PAGE, H), dtype)
    cache = [Pages(keys + i, values + i, jnp.zeros((count, K, PAGE))) for i in range(LAYERS)]
    q, positions = jnp.ones((requests, 1, N, H), dtype), jnp.full((requests, 1), PAGES_EACH * PAGE - 1)
    run = jax.jit(lambda plan: [prefix_decode_attention(q, positions, pages, plan) for pages in cache])
    return lambda: run(plan)


def step(model: cj.LanguageModel, size: int, names: Sequence[str]) -> Callable[[], Any]:
    """A step of decoding for `size` requests of 300 tokens, or a prefill of `size` tokens if there are more than 64."""
    engine = Engine(model, min(size, 64), 512, batch_sizes=[min(size, 64)])
    for layer in engine._weights["layers"]:
        layer |= {name: layer[name].astype(jnp.bfloat16) for name in names}
    if size > 64:
        return lambda: (engine.prefill([5] * size, 0, Place(range(engine.pages_each), 0)), engine._cache)[1]
    places = [Place(range(i * engine.pages_each, (i + 1) * engine.pages_each), 0) for i in range(size)]
    batch = engine._batch([SlotInput(i, 5, 300, place, 0.0, 1.0, 0, 0, 1) for i, place in enumerate(places)])
    return lambda: engine._run(*batch)


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
    print(f"\n| {head} | {' | '.join(map(str, columns))} |\n|---|{'---|' * len(columns)}")
    for name in rows[columns[0]]:
        print(f"| {name} | {' | '.join(f'{rows[column][name]:.1f}' for column in columns)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    rounds = parser.parse_args().rounds
    sides = {
        "float32": (products(float32), layers(lambda w: w)),
        "bfloat16": (products(bfloat16), layers(lambda w: w.astype(jnp.bfloat16))),
        "int8, multiplied in float32": (products(int8), layers(rounded)),
        "int8, activations too": (products(int8_both), layers(rounded)),
    }
    found = {}
    for m in TOKENS:
        x_dm = jax.random.normal(jax.random.key(0), (D, m))
        calls = {name: lambda run=run, w=w, x=x_dm: run(w, x) for name, (run, w) in sides.items()}
        found[m] = measure(calls, rounds)
    table("products, ms for tokens", TOKENS, found)
    of_pages = {
        n: measure({"float32": attention(n, jnp.float32), "bfloat16": attention(n, jnp.bfloat16)}, rounds)
        for n in REQUESTS
    }
    table("attention, ms for requests", REQUESTS, of_pages)
    model = cj.load_model("smollm2-135m", dtype="float32")
    kinds = {"float32": (), "bfloat16 weights": tuple(SHAPES), "bfloat16 weights but for o": ("qkv", "gate_up", "down")}
    steps = {m: measure({name: step(model, m, of) for name, of in kinds.items()}, rounds) for m in TOKENS}
    table("the engine, ms a step for tokens", TOKENS, steps)


if __name__ == "__main__":
    main()
