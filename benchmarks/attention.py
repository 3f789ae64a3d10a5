"""How `prefix_attention`'s implementations compare on one layer: time and temporary memory, forward and backward.

    python benchmarks/attention.py [--shape=smollm2-135m] [--lengths 1024 2048 4096] [--implementations reference xla]
    python benchmarks/attention.py --budgets --rows=4 --lengths 256 1024 --implementations xla

`reference` is the plain masked einsum: one dense mask, one softmax, gradients by autodiff. Every implementation of a
length is compiled first; then they take turns, so that a busy machine troubles all alike, and medians are printed. A
ratio above 1 is in favour of the implementation. TFLOP/s count the products that the visible pairs need.

With `--budgets`, the heads of 30 layers have numbers of slots of their own: log-normal, with a median of 62, at most
1,600. What such a layer takes on average is compared with a layer whose heads all have the average; the times are those
that the process's threads spend, which other work on the machine hardly changes.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cartridges_jax.kernels.prefix_attention import IMPLEMENTATIONS, prefix_attention
from cartridges_jax.kernels.prefix_attention.shapes import MODELS, Shape

PASSES = ("forward", "forward and backward")
LAYERS, MEAN, MEDIAN, FEWEST, MOST = 30, 200, 62, 2, 1600  # of the numbers of slots of heads, with `--budgets`


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="smollm2-135m", choices=MODELS)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--implementations", nargs="+", default=["reference", "xla"], choices=IMPLEMENTATIONS)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--rows", type=int, help="b, instead of the shape's")
    parser.add_argument("--budgets", action="store_true", help="compare heads of many lengths with heads of one")
    args = parser.parse_args()
    layer = dataclasses.replace(MODELS[args.shape], b=args.rows or MODELS[args.shape].b)
    if args.budgets:
        compare_budgets(layer, args)
        return
    print(f"{args.shape} in {args.dtype} on {jax.devices()[0].device_kind}, {args.repeats} repeats")
    print("| t | pass | implementation | ms | TFLOP/s | temporary MB | times faster | times smaller |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for t in args.lengths:
        shape = dataclasses.replace(layer, t=t)
        for backward in (False, True):
            found = measure(shape, backward, args.implementations, args.dtype, args.repeats)
            first_ms, first_mb = found[args.implementations[0]]
            for name, (ms, mb) in found.items():
                rate = flops(shape, backward) / ms / 1e9
                print(
                    f"| {t} | {PASSES[backward]} | {name} | {ms:.1f} | {rate:.3f} | {mb:.1f} "
                    f"| {first_ms / ms:.2f} | {first_mb / mb:.1f} |",
                    flush=True,
                )


def compare_budgets(layer: Shape, args: argparse.Namespace) -> None:
    sigma = (2 * np.log(MEAN / MEDIAN)) ** 0.5
    drawn_lk = np.random.default_rng(0).lognormal(np.log(MEDIAN), sigma, (LAYERS, layer.k))
    lengths_lk = drawn_lk.round().clip(FEWEST, MOST).astype(np.int32)
    average = round(lengths_lk.mean())
    print(
        f"{args.shape} in {args.dtype}, heads of {lengths_lk.min()} to {lengths_lk.max()} slots, {average} on average"
    )
    print("| t | pass | implementation | all the average, ms | own lengths, ms | ratio |")
    print("|---|---|---|---|---|---|", flush=True)
    for t in args.lengths:
        for backward in (False, True):
            for name in args.implementations:
                alike = prepared(dataclasses.replace(layer, t=t, p=average), backward, name, args.dtype)[1]
                ragged = dataclasses.replace(layer, t=t, p=MOST, lengths=(MOST,) * layer.k)
                own = prepared(ragged, backward, name, args.dtype)[1]
                # by turns, since a machine changes its pace
                times = np.array(
                    [[(cpu_ms(alike), cpu_ms(own, lengths)) for lengths in lengths_lk] for _ in range(args.repeats + 1)]
                )
                alike_ms, own_ms = np.median(times[1:], axis=0).mean(0)
                print(
                    f"| {t} | {PASSES[backward]} | {name} | {alike_ms:.1f} | {own_ms:.1f} | {own_ms / alike_ms:.3f} |",
                    flush=True,
                )


def cpu_ms(call: Callable[..., None], *arguments: Any) -> float:
    start = time.process_time()
    call(*arguments)
    return (time.process_time() - start) * 1e3


def measure(
    shape: Shape, backward: bool, implementations: list[str], dtype: str, repeats: int
) -> dict[str, tuple[float, float]]:
    """Of each implementation the median milliseconds, and the megabytes that it needs besides arguments and results."""
    found = {name: prepared(shape, backward, name, dtype) for name in implementations}
    times: dict[str, list[float]] = {name: [] for name in found}
    for repeat in range(repeats + 1):
        for name, (_, call) in found.items():
            start = time.perf_counter()
            call()
            if repeat:  # the first is a warm-up
                times[name].append((time.perf_counter() - start) * 1e3)
    return {name: (statistics.median(times[name]), megabytes) for name, (megabytes, _) in found.items()}


def prepared(shape: Shape, backward: bool, name: str, dtype: str) -> tuple[float, Callable[..., None]]:
    """The megabytes that a call needs besides arguments and results, and the call; it may be given other lengths."""
    drawn, segment_ids, cotangent = shape.draw()
    arrays = {n: jnp.asarray(a, dtype if n in ("q", "k", "v") else None) for n, a in drawn.items() if a is not None}
    lengths_k = None if shape.lengths is None else jnp.asarray(shape.lengths)

    def run(arrays: dict[str, Any], segment_ids: Any, cotangent: Any, lengths: Any) -> Any:
        def attend(arrays: dict[str, Any]) -> Any:
            options = {"implementation": name, "window": shape.window, "lengths": lengths}
            return prefix_attention(segment_ids=segment_ids, **options, **arrays)

        if not backward:
            return attend(arrays)
        o, pullback = jax.vjp(attend, arrays)
        return o, pullback(cotangent.astype(o.dtype))

    program = jax.jit(run).lower(arrays, segment_ids, cotangent, lengths_k).compile()

    def call(lengths: Any = lengths_k) -> None:
        jax.block_until_ready(program(arrays, segment_ids, cotangent, lengths))

    return program.memory_analysis().temp_size_in_bytes / 1e6, call


def flops(shape: Shape, backward: bool) -> float:
    """Of one whole segment per row: 2 products of 2·h operations for each visible pair forward, 5 more backward."""
    window = min(shape.window or shape.t, shape.t)
    pairs = shape.t * shape.p + window * (window + 1) // 2 + (shape.t - window) * window
    return shape.b * shape.n * pairs * 2 * shape.h * (7 if backward else 2)


if __name__ == "__main__":
    main()
