"""How `prefix_attention`'s implementations compare on one layer: time and temporary memory, forward and backward.

    python benchmarks/attention.py [--shape=smollm2-135m] [--lengths 1024 2048 4096] [--implementations reference xla]

`reference` is the plain masked einsum: one dense mask, one softmax, gradients by autodiff. Every implementation of a
length is compiled first; then they take turns, so that a busy machine troubles all alike, and medians are printed. A
ratio above 1 is in favour of the implementation. TFLOP/s count the products that the visible pairs need.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp

from cartridges_jax.kernels.prefix_attention import IMPLEMENTATIONS, prefix_attention
from cartridges_jax.kernels.prefix_attention.shapes import MODELS, Shape

PASSES = ("forward", "forward and backward")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="smollm2-135m", choices=MODELS)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--implementations", nargs="+", default=["reference", "xla"], choices=IMPLEMENTATIONS)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    print(f"{args.shape} in {args.dtype} on {jax.devices()[0].device_kind}, {args.repeats} repeats")
    print("| t | pass | implementation | ms | TFLOP/s | temporary MB | times faster | times smaller |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for t in args.lengths:
        shape = dataclasses.replace(MODELS[args.shape], t=t)
        for backward in (False, True):
            found = measure(shape, backward, args.implementations, jnp.dtype(args.dtype), args.repeats)
            first_ms, first_mb = found[args.implementations[0]]
            for name, (ms, mb) in found.items():
                rate = flops(shape, backward) / ms / 1e9
                print(
                    f"| {t} | {PASSES[backward]} | {name} | {ms:.1f} | {rate:.3f} | {mb:.1f} "
                    f"| {first_ms / ms:.2f} | {first_mb / mb:.1f} |",
                    flush=True,
                )


def measure(
    shape: Shape, backward: bool, implementations: list[str], dtype: jnp.dtype, repeats: int
) -> dict[str, tuple[float, float]]:
    """Of each implementation the median milliseconds, and the megabytes that it needs besides arguments and results."""
    drawn, segment_ids, cotangent = shape.draw()
    arrays = {name: jnp.asarray(a, dtype if name in ("q", "k", "v") else None) for name, a in drawn.items()}
    programs = {}
    for name in implementations:

        def run(arrays: dict[str, Any], segment_ids: Any, cotangent: Any, name: str = name) -> Any:
            def attend(arrays: dict[str, Any]) -> Any:
                return prefix_attention(segment_ids=segment_ids, implementation=name, window=shape.window, **arrays)

            if not backward:
                return attend(arrays)
            o, pullback = jax.vjp(attend, arrays)
            return o, pullback(cotangent.astype(o.dtype))

        programs[name] = jax.jit(run).lower(arrays, segment_ids, cotangent).compile()
    times: dict[str, list[float]] = {name: [] for name in programs}
    for repeat in range(repeats + 1):
        for name, program in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program(arrays, segment_ids, cotangent))
            if repeat:  # the first is a warm-up
                times[name].append((time.perf_counter() - start) * 1e3)
    megabytes = {name: program.memory_analysis().temp_size_in_bytes / 1e6 for name, program in programs.items()}
    return {name: (statistics.median(times[name]), megabytes[name]) for name in programs}


def flops(shape: Shape, backward: bool) -> float:
    """Of one whole segment per row: 2 products of 2·h operations for each visible pair forward, 5 more backward."""
    window = min(shape.window or shape.t, shape.t)
    pairs = shape.t * shape.p + window * (window + 1) // 2 + (shape.t - window) * window
    return shape.b * shape.n * pairs * 2 * shape.h * (7 if backward else 2)


if __name__ == "__main__":
    main()
