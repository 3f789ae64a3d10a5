"""What the host does between two steps of decoding, beside a device that takes no time.

    python benchmarks/engine_host.py [--steps=256] [--rounds=3]

Microseconds a step of scheduler and engine with n requests that decode and get a token each. The programs are replaced
by functions that do nothing, or by a compiled one that takes the same arrays and does nothing with them: the difference
is what calling a program costs. In the third column answers have 16 tokens, so that in every step some requests end and
others begin. In the last the requests come through the engine's thread, and an event loop takes their tokens.

It is the time of a core that the thread takes, so that other work on the machine counts for little; in the last column
that of all threads, which is more than the engine's thread spends.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from cartridges_jax.models.config import ModelConfig
from cartridges_jax.models.language_model import LanguageModel
from cartridges_jax.models.params import init_params
from cartridges_jax.serving import steps
from cartridges_jax.serving.engine import Engine
from cartridges_jax.serving.engine_thread import EngineThread
from cartridges_jax.serving.metrics import Metrics, TokenTimer
from cartridges_jax.serving.requests import GenerationRequest
from cartridges_jax.serving.scheduler import Finished, Request, Scheduler, Token
from cartridges_jax.serving.warmup import Warmup

REQUESTS = (1, 16, 64, 256)
PROMPT, SHORT = 20, 16
# as many arrays as SmolLM2-135M has, and all of them small
SIZES = {"num_layers": 30, "embed_dim": 18, "num_heads": 9, "num_kv_heads": 3, "head_dim": 2, "mlp_dim": 16}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    numbers = {"norm_eps": 1e-6, "rope_theta": 1e4, "max_position_embeddings": 8192}
    config = ModelConfig("llama", 512, **SIZES, **numbers, tie_embeddings=True)
    model = LanguageModel("small", config, init_params(config, jax.random.key(0)), cast(Any, None), "")
    engine = Engine(model, REQUESTS[-1], PROMPT + args.steps + 8)
    print(f"load average {os.getloadavg()[0]:.1f}; the least of {args.rounds} rounds, µs of a core a step\n")
    print("| requests | scheduler and engine | and a program's call | requests that come and go | engine's thread |")
    print("|---|---|---|---|---|", flush=True)
    for n in REQUESTS:
        sides: list[Callable[[], float]] = [
            partial(long_answers, engine, n, args.steps, nothing),
            partial(long_answers, engine, n, args.steps, compiled),
            partial(short_answers, engine, n, args.steps),
            partial(through_the_thread, engine, n, args.steps),
        ]
        found = [min(side() for _ in range(args.rounds + 1)) for side in sides]
        print(f"| {n} | {' | '.join(f'{1e6 * seconds:.0f}' for seconds in found)} |", flush=True)


def nothing(weights: Any, cache: Any, last: Any, batch: Any, **options: Any) -> Any:
    """A decoding step that takes no time."""
    return cache, last, batch.advancing, (np.zeros(len(batch.tokens), np.int32), np.zeros(len(batch.tokens)))


@partial(jax.jit, keep_unused=True, donate_argnums=(1, 2))
def _compiled(weights: Any, cache: Any, last: Any, batch: Any) -> Any:
    b = len(batch.tokens)
    return cache, last, batch.advancing, (jnp.zeros(b, jnp.int32), jnp.zeros(b))


def compiled(weights: Any, cache: Any, last: Any, batch: Any, **options: Any) -> Any:
    return _compiled(weights, cache, last, batch)


@contextmanager
def replaced(decode_step: Callable[..., Any]) -> Iterator[None]:
    """Without the programs that would compute something; beginning a page still costs a call."""
    before = steps.decode_step, steps.prefill_step
    steps.decode_step, steps.prefill_step = cast(Any, decode_step), cast(Any, lambda weights, cache, step, **_: cache)
    try:
        yield
    finally:
        steps.decode_step, steps.prefill_step = before


def long_answers(engine: Engine, n: int, count: int, decode_step: Callable[..., Any]) -> float:
    """Seconds a step, from the one in which all decode to the end of the answers."""
    with replaced(decode_step):
        scheduler = Scheduler(engine, n)
        for i in range(n):
            scheduler.submit(Request(str(i), (i, *range(1, PROMPT)), max_tokens=count))
        while sum(isinstance(event, Token) for event in scheduler.step()) < n:
            pass
        done, start = 0, time.thread_time()
        while sum(isinstance(event, Token) for event in scheduler.step()) == n:
            done += 1
        seconds = time.thread_time() - start
        while scheduler.has_work:
            scheduler.step()
    return seconds / done


def short_answers(engine: Engine, n: int, count: int) -> float:
    """Seconds a step while requests end and others begin in their place, all at different times."""

    def request(i: int) -> Request:
        length = 1 + i % SHORT if i < n else SHORT
        return Request(str(i), tuple(random.Random(i).choices(range(512), k=PROMPT)), max_tokens=length)

    with replaced(compiled):
        scheduler, submitted = Scheduler(engine, n), 2 * n
        for i in range(submitted):
            scheduler.submit(request(i))
        start = time.thread_time()
        for _ in range(count):
            for event in scheduler.step():
                if isinstance(event, Finished):
                    scheduler.submit(request(submitted))
                    submitted += 1
        return (time.thread_time() - start) / count


def through_the_thread(engine: Engine, n: int, count: int) -> float:
    """Seconds a step of a thread whose tokens are taken, and nothing made of them, in an event loop."""
    metrics = Metrics("small")

    async def ask(thread: EngineThread, i: int) -> None:
        request = Request("", (i, *range(1, PROMPT)), max_tokens=count)
        timer = TokenTimer(metrics, time.monotonic())
        pending = thread.submit(GenerationRequest("text", "small", (), (request,), count), None, timer)
        await pending.accepted()
        while not isinstance((await pending.events.get())[1], Finished):
            pass

    async def body() -> float:
        thread = EngineThread(engine, n, 600.0, Warmup())
        start = time.process_time()
        await asyncio.gather(*(ask(thread, i) for i in range(n)))
        seconds = time.process_time() - start
        await thread.stop()
        return seconds / count

    with replaced(compiled):
        return asyncio.run(body())


if __name__ == "__main__":
    main()
