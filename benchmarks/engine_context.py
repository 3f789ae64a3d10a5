"""What a context costs the engine: a cartridge shared by 64 requests, and the time to the first token behind one.

    python benchmarks/engine_context.py [--slots=2048] [--requests=64] [--average=200] [--rounds=3]

First: steps of `--requests` requests that share one cartridge, and the same requests without it, taking turns. Second:
steps of 1, 16 and 64 requests that share a cartridge of `--average` slots a head, and one of the same average whose
heads have different numbers of slots. Third: seconds to the first token of a question of 32 tokens, behind a cartridge
of 512 slots that is on the device, behind one that has to be put there first, and behind the whole document as prompt.
Cartridges and documents are random: what they hold does not change what they cost. The best of `--rounds` counts, and
of the second part's ratios the median.
"""

from __future__ import annotations

import argparse
import os
import random
import time

import numpy as np

import cartridges_jax as cj
from cartridges_jax.serving.engine import PAGE_SIZE, Engine
from cartridges_jax.serving.generate import run
from cartridges_jax.serving.scheduler import Prefix, Request, Scheduler, Token
from cartridges_jax.serving.warmup import Warmup

PROMPT, ANSWER = 200, 48
QUESTION, CARTRIDGE_SLOTS = 32, 512
DOCUMENTS = (2000, 4000, 8000)
REQUESTS = (1, 16, 64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slots", type=int, default=2048)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--average", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    model = cj.load_model("smollm2-135m", dtype="float32")
    print(f"load average {os.getloadavg()[0]:.1f}")
    shared_step(model, args.slots, args.requests, args.rounds)
    lengths_by_head(model, args.average, args.rounds)
    first_token(model, args.rounds)


def shared_step(model: cj.LanguageModel, slots: int, n: int, rounds: int) -> None:
    positions = n * (PROMPT + ANSWER + 2 * PAGE_SIZE) + slots + PAGE_SIZE  # so many that all run together
    engine = Engine(model, n, slots + PROMPT + ANSWER + 8, cache_tokens=positions, batch_sizes=[n])
    scheduler = Scheduler(engine, n)
    prefixes = {"without": None, "with": cartridge(model, slots)}
    seconds: dict[str, list[float]] = {name: [] for name in prefixes}
    for _ in range(rounds + 1):  # the first round compiles
        for name, prefix in prefixes.items():
            requests = [Request(str(i), prompt(PROMPT, i), prefix, ANSWER) for i in range(n)]
            seconds[name].append(step_seconds(scheduler, requests))
    without, behind = (min(found[1:]) for found in seconds.values())
    print(f"\n| {n} requests | ms a step |\n|---|---|\n| without a cartridge | {without * 1e3:.0f} |")
    print(f"| sharing one of {slots} slots | {behind * 1e3:.0f} ({behind / without:.2f} times) |")


def lengths_by_head(model: cj.LanguageModel, average: int, rounds: int) -> None:
    """Prints the time of a step behind heads of equal and of different lengths, which take turns."""
    c = model.config
    lengths = log_normal_lengths(c.num_layers, c.num_kv_heads, average)
    prefixes = {"equal": cartridge(model, average), "by head": cartridge(model, int(lengths.max()), lengths)}
    print(f"\nslots of a head: {lengths.min()} to {lengths.max()}, median {np.median(lengths):.0f}, ", end="")
    print(
        f"average {lengths.mean():.0f}\n\n| requests | equal, ms | by head, ms | ratio |\n|---|---|---|---|", flush=True
    )
    for n in REQUESTS:
        engine = Engine(model, n, 8 * average + PROMPT + ANSWER, cache_tokens=n * 512 + 16 * average, batch_sizes=[n])
        scheduler = Scheduler(engine, n)
        found: dict[str, list[float]] = {name: [] for name in prefixes}
        for round in range(rounds + 1):  # the first one compiles
            for name, prefix in prefixes.items():
                requests = [Request(str(i), prompt(PROMPT, i + n * round), prefix, ANSWER) for i in range(n)]
                found[name].append(step_seconds(scheduler, requests))
        ratio = np.median([b / a for a, b in zip(*(seconds[1:] for seconds in found.values()), strict=True)])
        equal, by_head = (min(seconds[1:]) * 1e3 for seconds in found.values())
        print(f"| {n} | {equal:.1f} | {by_head:.1f} | {ratio:.3f} |", flush=True)


def log_normal_lengths(l: int, k: int, average: int) -> np.ndarray:
    """Lengths [l, k] as budgets of a model's heads are: most below the average, 2 at least, some 8 times of it."""
    sigma = np.sqrt(2 * np.log(200 / 62))  # a mean of 200 and a median of 62
    drawn = np.random.default_rng(0).lognormal(-(sigma**2) / 2, sigma, (l, k))
    scale = average
    for _ in range(20):  # what is cut off is given to the others
        lengths = np.clip(scale * drawn, 2, 8 * average)
        scale *= average / lengths.mean()
    return np.round(lengths).astype(np.int32)


def step_seconds(scheduler: Scheduler, requests: list[Request]) -> float:
    """The median of steps in which every request gets a token."""
    for request in requests:
        scheduler.submit(request)
    seconds = []
    while scheduler.has_work:
        start = time.perf_counter()
        tokens = sum(isinstance(event, Token) for event in scheduler.step())
        if tokens == len(requests):
            seconds.append(time.perf_counter() - start)
    return float(np.median(seconds[2:]))


def first_token(model: cj.LanguageModel, rounds: int) -> None:
    print("\n| document, tokens | as prompt, s | cartridge, s | ratio | cartridge that is loaded first, s | ratio |")
    print("|---|---|---|---|---|---|", flush=True)
    engine = Engine(model, 1, DOCUMENTS[-1] + QUESTION + 8)
    Warmup(engine.programs()).run()
    prefix = cartridge(model, CARTRIDGE_SLOTS)
    scheduler = Scheduler(engine, 1)

    def seconds(tokens: int, prefix: Prefix | None, seed: int) -> float:
        start = time.perf_counter()
        events = run(scheduler, [Request("x", prompt(tokens, seed), prefix, max_tokens=1)])
        assert any(isinstance(event, Token) for event in events)
        return time.perf_counter() - start

    for length in DOCUMENTS:
        document, loaded, held = [], [], []
        for seed in range(rounds):
            document.append(seconds(length + QUESTION, None, seed + length))
            scheduler = Scheduler(engine, 1)  # knows of nothing on the device
            loaded.append(seconds(QUESTION, prefix, seed))
            held.append(seconds(QUESTION, prefix, seed + 100))
        prompted, first, later = map(min, (document, loaded, held))
        ratios = (f"{seconds:.3f} | {prompted / seconds:.0f}" for seconds in (later, first))
        print(f"| {length} | {prompted:.2f} | {' | '.join(ratios)} |", flush=True)


def cartridge(model: cj.LanguageModel, slots: int, lengths: np.ndarray | None = None) -> Prefix:
    c, rng = model.config, np.random.default_rng(0)
    shape = (c.num_layers, slots, c.num_kv_heads, c.head_dim)
    keys, values = (rng.standard_normal(shape, np.float32) for _ in range(2))
    return Prefix.of(f"random {lengths is None}", cj.Cartridge(keys, values, lengths=lengths))


def prompt(length: int, seed: int) -> tuple[int, ...]:
    return tuple(random.Random(seed).choices(range(100, 40_000), k=length))


if __name__ == "__main__":
    main()
