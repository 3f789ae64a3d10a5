"""The paper's figure: what a fixed KV budget serves, with documents as prompts and with cartridges in their place.

    python benchmarks/engine_memory.py --output-dir=DIR [--budget-gib=2] [--most=128] [--steps=6]

For each kind of context: how many sequences of it, with 128 tokens of question and answer each, fit the budget, counted
in the engine's pages; and the tokens per second of that many decoding together, at most `--most`. Those steps are run
and timed; the contexts are not computed first, since a step costs the same whatever the pages hold. Lengths beyond
SmolLM2's window of 8,192 are timed as if it were longer. A cartridge by head has heads with different numbers of slots,
whose average is given. First it is told how much memory such cartridges take, over that of their slots. Writes
`engine_memory.png` and prints tables.
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
from engine_context import cartridge, log_normal_lengths

import cartridges_jax as cj
from cartridges_jax.serving.cache import PageCache, Prefix
from cartridges_jax.serving.engine import PAGE_SIZE, Engine
from cartridges_jax.serving.scheduler import BlockTable, SequenceInput

OWN = 128  # tokens of question and answer
PROMPTS = (1024, 2048, 4096, 8192, 16_384, 32_768)
CARTRIDGES = (128, 512, 2048)
BY_HEAD = (819,)  # a tenth of SmolLM2's window
AVERAGES = (50, 100, 200)
KINDS = ("prompt", "cartridge, one user each", "cartridge, many users", "cartridge by head, one user each")


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
    contexts += [(kind, length) for kind in KINDS[1:3] for length in CARTRIDGES]
    contexts += [(KINDS[3], length) for length in BY_HEAD]
    rows = []
    print("| slots of a head, on average | bytes of a cartridge over those of its slots |\n|---|---|")
    for average in AVERAGES:
        print(f"| {average} | {memory(engine, model, average):.3f} |")
    print(
        f"\nload average {os.getloadavg()[0]:.1f}; budget {args.budget_gib:g} GiB: {num_pages} pages of {PAGE_SIZE}\n"
    )
    print("| context | length | sequences that fit | decoding together | tokens/s |\n|---|---|---|---|---|", flush=True)
    for kind, length in contexts:
        row = measure(engine, model, kind, length, num_pages, args)
        rows.append(row)
        print(f"| {kind} | {length} | {row.fit} | {row.measured} | {row.tokens_per_second:.0f} |", flush=True)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    draw(rows, args.budget_gib, args.output_dir / "engine_memory.png")


def memory(engine: Engine, model: cj.LanguageModel, average: int) -> float:
    """The bytes of the head pages of a cartridge by head, biases included, over those of its slots' keys and values."""
    c, pages = model.config, engine._cache
    lengths = log_normal_lengths(c.num_layers, c.num_kv_heads, average)
    of_head_page = sum(a.nbytes for a in (pages.keys, pages.values, pages.bias)) / len(pages.bias)
    taken = engine.head_pages(cartridge(model, int(lengths.max()), lengths))
    return taken * of_head_page / (int(lengths.sum()) * 2 * c.head_dim * pages.keys.dtype.itemsize)


def block_tables(
    engine: Engine, model: cj.LanguageModel, kind: str, length: int, num_pages: int, most: int
) -> tuple[list[BlockTable], int]:
    """Where the first `most` sequences lie, with their cartridges loaded, and how many fit."""
    cache = PageCache(num_pages, PAGE_SIZE, engine.heads_per_page, engine.head_pages)
    prefix, context = None, 0
    if kind == KINDS[0]:
        context = length
    elif kind == KINDS[3]:
        lengths = log_normal_lengths(model.config.num_layers, model.config.num_kv_heads, length)
        prefix = cartridge(model, int(lengths.max()), lengths)
    else:
        prefix = cartridge(model, length)
    tables, fit = [], 0
    while True:
        key = "shared" if kind == KINDS[2] else str(fit)
        own = prefix and Prefix(key, prefix.length, prefix.cartridge)
        allocation = cache.allocate(own, [fit], context + OWN)
        if allocation is None:
            return tables, fit
        fit += 1
        if len(tables) < most:
            tables.append(BlockTable(allocation.pages, allocation.slots))
            if own and allocation.load:
                engine.load(own, allocation.slots)


def measure(
    engine: Engine, model: cj.LanguageModel, kind: str, length: int, num_pages: int, args: argparse.Namespace
) -> Row:
    tables, fit = block_tables(engine, model, kind, length, num_pages, args.most)
    n = len(tables)
    if n == 0:
        return Row(kind, length, 0, 0, 0.0)
    seconds, position = [], (length if kind == KINDS[0] else 0) + OWN // 2
    for i, block_table in enumerate(tables):
        engine.begin(SequenceInput(i, 0, position, block_table, 0.0, 1.0, 0, 0, 0))
    for _ in range(args.steps):
        start = time.perf_counter()
        engine.harvest(engine.decode(range(n)))
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
