"""How long streams wait for their next token while long prompts arrive.

    python benchmarks/engine_fairness.py [--streams=16] [--prompt=8000] [--arrivals=4] [--rounds=3]

Streams decode; then long prompts arrive, each when the one before has its first token. Of the times between two tokens
of a stream, from the first arrival to the last first token, the median, the 99th percentile and the longest are
printed, beside those without arrivals and the time to the long prompts' first tokens. The best round counts.
"""

from __future__ import annotations

import argparse
import os
import random
import time
from typing import NamedTuple

import numpy as np

import cartridges_jax as cj
from cartridges_jax.serving.engine import PAGE_SIZE, Engine
from cartridges_jax.serving.scheduler import Request, Scheduler, Token
from cartridges_jax.serving.warmup import Warmup

PROMPT, ALONE = 100, 32  # tokens of a stream's prompt, and steps that are timed before the first arrival


class Waits(NamedTuple):
    """Seconds: between a stream's tokens, with and without arrivals, and to the first tokens of those that arrive."""

    alone: list[float]
    between: list[float]
    first_token: list[float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=8000)
    parser.add_argument("--arrivals", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    model = cj.load_model("smollm2-135m", dtype="float32")
    longest = args.prompt + PAGE_SIZE
    cache_tokens = 2 * longest + args.streams * 16 * PAGE_SIZE
    engine = Engine(model, args.streams + 1, longest, cache_tokens=cache_tokens, batch_sizes=[args.streams + 1])
    Warmup(engine.programs()).run()
    rounds = [measure(engine, args.streams, args.prompt, args.arrivals, seed) for seed in range(args.rounds)]
    best = min(rounds, key=lambda waits: np.percentile(waits.between, 99))
    print(f"load average {os.getloadavg()[0]:.1f}; {args.streams} streams, prompts of {args.prompt} tokens\n")
    print("| ms | median | p99 | longest |\n|---|---|---|---|")
    for name, seconds in (("between tokens, nothing arrives", best.alone), ("while prompts arrive", best.between)):
        print(f"| {name} | {' | '.join(f'{1e3 * np.percentile(seconds, q):.0f}' for q in (50, 99, 100))} |")
    print(f"\nto a long prompt's first token, the median: {np.median(best.first_token):.2f} s")


def measure(engine: Engine, streams: int, length: int, arrivals: int, seed: int) -> Waits:
    rng, scheduler = random.Random(seed), Scheduler(engine, streams + 1)

    def submit(id: str, tokens: int, answer: int) -> None:
        scheduler.submit(Request(id, tuple(rng.choices(range(100, 40_000), k=tokens)), None, answer))

    for i in range(streams):
        submit(f"stream {i}", PROMPT, 15 * PAGE_SIZE)
    last: dict[str, float] = {}
    waits, arrived, submitted = Waits([], [], []), 0, 0.0
    while len(waits.first_token) < arrivals:
        if len(waits.alone) >= ALONE * streams and arrived == len(waits.first_token):
            submit(f"long {arrived}", length, 1)
            arrived, submitted = arrived + 1, time.perf_counter()
        events, now = scheduler.step(), time.perf_counter()
        for event in events:
            if isinstance(event, Token) and event.id.startswith("long"):
                waits.first_token.append(now - submitted)
            elif isinstance(event, Token):
                if len(last) == streams:
                    (waits.between if arrived else waits.alone).append(now - last[event.id])
                last[event.id] = now
    for i in range(streams):
        scheduler.cancel(f"stream {i}")
    while scheduler.has_work:
        scheduler.step()
    return waits


if __name__ == "__main__":
    main()
