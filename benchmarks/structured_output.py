"""What a step costs whose requests ask for a form, or for penalties, against one whose requests ask for nothing.

    python benchmarks/structured_output.py [--requests=16] [--steps=48] [--rounds=5]

Scheduler and engine with SmolLM2-135M in float32. All kinds take turns within a round. Printed are milliseconds a step,
the best of the rounds, and the median of the ratios to the plain step of the same round.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections import defaultdict

import cartridges_jax as cj
from cartridges_jax.serving.engine import Engine
from cartridges_jax.serving.generate import run
from cartridges_jax.serving.grammar import Grammar, GrammarCompiler
from cartridges_jax.serving.scheduler import LogitsRules, Request, Scheduler, Token

PROMPT = 100
# an answer that is longer than any that is measured
SCHEMA = {
    "type": "array",
    "minItems": 999,
    "items": {
        "type": "object",
        "properties": {"name": {"type": "string"}, "kind": {"enum": ["cat", "owl"]}, "grams": {"type": "number"}},
        "required": ["name", "kind", "grams"],
        "additionalProperties": False,
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    model = cj.load_model("smollm2-135m", dtype="float32")
    engine = Engine(model, args.requests, 512, batch_sizes=[args.requests])
    constraint = GrammarCompiler(model.tokenizer).constraint(Grammar("json", json.dumps(SCHEMA)))
    rules = LogitsRules(frequency_penalty=0.5, repetition_penalty=1.1)
    plain = [Request(str(i), tuple(range(1000 + i, 1000 + i + PROMPT)), max_tokens=400) for i in range(args.requests)]
    formed = [dataclasses.replace(request, constraint=constraint) for request in plain]
    kinds = {
        "plain": plain,
        "one in a form": [*formed[:1], *plain[1:]],
        "all in a form": formed,
        "all with penalties": [dataclasses.replace(request, logits=rules) for request in plain],
    }
    for requests in kinds.values():  # compiles
        step_seconds(engine, requests, 2)
    found = defaultdict(list)
    for _ in range(args.rounds):
        for name, requests in kinds.items():
            found[name].append(step_seconds(engine, requests, args.steps))
    for name, seconds in found.items():
        ratio = statistics.median(one / plain for one, plain in zip(seconds, found["plain"], strict=True))
        print(f"{name:20} {min(seconds) * 1e3:8.2f} ms a step  {ratio:.3f} of a plain step")


def step_seconds(engine: Engine, requests: list[Request], steps: int) -> float:
    """Seconds a step, of so many from the one in which all requests have a token."""
    scheduler, seen = Scheduler(engine, len(requests)), dict.fromkeys((request.id for request in requests), 0)
    start, before, last = 0.0, 0, 0
    for event in run(scheduler, requests):
        if isinstance(event, Token):
            seen[event.id] += 1
            if not start and min(seen.values()) >= 1:
                start, before, last = time.perf_counter(), sum(seen.values()), max(seen.values()) + steps
            if start and max(seen.values()) == last:
                return (time.perf_counter() - start) * len(requests) / (sum(seen.values()) - before)
    raise AssertionError("an answer ended too early")


if __name__ == "__main__":
    main()
