"""The paper's figure: what a fixed KV budget serves, with documents as prompts and with cartridges in their place.

    python benchmarks/engine_memory.py --output-dir=DIR [--budget-gib=2] [--most=128] [--steps=6]

For each kind of context: how many sequences of it, with 128 tokens of question and answer each, fit the budget, counted
in the engine's pages; and the tokens per second of that many decoding together, at most `--most`. Those steps are run
and timed; the contexts are not computed first, since a step costs the same whatever the pages hold. Lengths beyond
SmolLM2's window of 8,192 are timed as if it were longer. Writes `engine_memory.png` and prints a table.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

import cartridges_jax as cj
from cartridges_jax.serving.engine import PAGE_SIZE, Engine
from cartridges_jax.serving.scheduler import BlockTable, SequenceInput

OWN = 128  # tokens of question and answer
PROMPTS = (1024, 2048, 4096, 8192, 16_384, 32_768)
CARTRIDGES = (128, 512, 2048)
KINDS = ("prompt", "cartridge, one user each", "cartridge, many users")


@dataclasses.dataclass(frozen=True)
class Row:
    kind: str
    length: int
    fit: int
    measured: int  # sequences that decoded together
    tokens_per_second: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--budget-gib", type=float, default=2.0)
    parser.add_argument("--most", type=int, default=128)
    parser.add_argument("--steps", type=int, default=6)
    args = parser.parse_args()
    model = cj.load_model("smollm2-135m", dtype="float32")
    config = dataclasses.replace(model.config, max_position_embeddings=2 * PROMPTS[-1])
    model = dataclasses.replace(model, config=config)
    num_pages = int(args.budget_gib * 2**30 / (PAGE_SIZE * model.kv_bytes_per_token))
    engine = Engine(model, args.most, PROMPTS[-1] + OWN, cache_tokens=num_pages * PAGE_SIZE)
    contexts = [(KINDS[0], length) for length in PROMPTS]
    contexts += [(kind, length) for kind in KINDS[1:] for length in CARTRIDGES]
    rows = []
    print(f"load average {os.getloadavg()[0]:.1f}; budget {args.budget_gib:g} GiB: {num_pages} pages of {PAGE_SIZE}\n")
    print("| context | length | sequences that fit | decoding together | tokens/s |\n|---|---|---|---|---|", flush=True)
    for kind, length in contexts:
        row = measure(engine, kind, length, num_pages, args)
        rows.append(row)
        print(f"| {kind} | {length} | {row.fit} | {row.measured} | {row.tokens_per_second:.0f} |", flush=True)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    draw(rows, args.budget_gib, args.output_dir / "engine_memory.png")


def measure(engine: Engine, kind: str, length: int, num_pages: int, args: argparse.Namespace) -> Row:
    context, own = -(-length // PAGE_SIZE), -(-OWN // PAGE_SIZE)
    is_shared = kind == KINDS[2]
    fit = (num_pages - context) // own if is_shared else num_pages // (context + own)
    n = min(fit, args.most)
    if n == 0:
        return Row(kind, length, 0, 0, 0.0)
    pages = iter(range(num_pages))
    shared = [next(pages) for _ in range(context)] if is_shared else None
    block_tables = [
        BlockTable([*(shared or [next(pages) for _ in range(context)]), *(next(pages) for _ in range(own))], length)
        for _ in range(n)
    ]
    seconds = []
    for step in range(args.steps):
        position = OWN // 2 + step
        inputs = [
            SequenceInput(i, 0, position, block_table, 0.0, 1.0, 0, 0, step)
            for i, block_table in enumerate(block_tables)
        ]
        start = time.perf_counter()
        engine.harvest(engine.decode(inputs))
        seconds.append(time.perf_counter() - start)
    return Row(kind, length, fit, n, n / float(np.min(seconds[1:])))


def draw(rows: list[Row], budget: float, file: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    for kind in KINDS:
        some = [row for row in rows if row.kind == kind and row.fit]
        lengths = [row.length for row in some]
        left.plot(lengths, [row.fit for row in some], "o-", label=kind)
        right.plot(lengths, [row.tokens_per_second for row in some], "o-", label=kind)
    for axes, title in ((left, f"sequences in {budget:g} GiB"), (right, "tokens/s of as many as fit")):
        axes.set(xscale="log", yscale="log", xlabel="tokens or slots of context", title=title)
        axes.grid(alpha=0.3)
    left.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=150)


if __name__ == "__main__":
    main()
