"""Decoding at the shape of Llama 3.1 8B, random weights: steps beside the memory's roofline, and the first token.

The roofline is the time that copying takes for what a step reads: the weights, and each request's keys and values, the
shared cartridge's once. Steps count in which every request gets a token.
"""

from __future__ import annotations

import functools
import random
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from engine_context import step_seconds

from accelerator_parts import models, sizes
from accelerator_parts.measuring import Line, Options, attempts, rounded, seconds
from cartridges_jax.models.language_model import LanguageModel
from cartridges_jax.serving.engine import PAGE_SIZE, Engine
from cartridges_jax.serving.generate import run
from cartridges_jax.serving.scheduler import Prefix, Request, Scheduler

ROUNDS = 2  # the first compiles


def measure(options: Options) -> Iterator[Line]:
    size = sizes.decoding(options.tiny)
    config = models.TINY if options.tiny else models.LARGE["llama-3.1-8b"]
    model = models.without_tokenizer(config, models.random_params(config, "bfloat16"))
    prefix = Prefix("cartridge", size.slots, models.random_cartridge(config, size.slots))
    bandwidth = copy_bandwidth(options.tiny)
    yield {"copy bandwidth, GB/s": rounded(bandwidth / 1e9)}
    for n in size.requests:
        engine = functools.cache(functools.partial(_engine, model, n, size))
        for name, shared in (("none", None), ("shared", prefix)):
            what = {"decoding": "ours", "requests": n, "cartridge": name}
            requests = functools.partial(_requests, config.vocab_size, n, shared, size)
            least = _bytes_read(model, n, shared, size) / bandwidth
            yield from attempts([(what, functools.partial(_steps, engine, requests, least))])
        del engine
    yield from attempts([({"first token": "ours"}, functools.partial(_first_token, model, prefix, size))])


def copy_bandwidth(tiny: bool) -> float:
    """Bytes a second that are read and written by a copy of one large array."""
    a = jnp.zeros(2**20 if tiny else 2**29, jnp.float32)
    copy = jax.jit(lambda a: a + 1)
    return 2 * a.nbytes / seconds(functools.partial(copy, a), jax.block_until_ready)


def _engine(model: LanguageModel, n: int, size: sizes.Decoding) -> Engine:
    pages_each = -(-size.prompt // PAGE_SIZE) + -(-size.answer // PAGE_SIZE) + 1
    positions = n * pages_each * PAGE_SIZE + size.slots + PAGE_SIZE
    longest = size.slots + size.prompt + size.answer + 8
    room = max(positions, longest + 2 * PAGE_SIZE)
    return Engine(model, n, longest, 1, cache_tokens=room, batch_sizes=[n], attention=models.own_kernel())


def _requests(words: int, n: int, prefix: Prefix | None, size: sizes.Decoding, round: int) -> list[Request]:
    """Other prompts in every round: what the cache remembers would not be prefilled again."""
    return [Request(str(i), _prompt(words, size.prompt, i + n * round), prefix, size.answer) for i in range(n)]


def _bytes_read(model: LanguageModel, n: int, prefix: Prefix | None, size: sizes.Decoding) -> float:
    """Of weights, keys and values that a step in the middle of the answers has to read, each once."""
    read = {name: a for name, a in model.params.items() if name != "embed" or model.config.tie_embeddings}
    weights = sum(a.nbytes for a in jax.tree.leaves(read))
    positions = n * (size.prompt + size.answer / 2) + (0 if prefix is None else prefix.length)
    return weights + positions * model.kv_bytes_per_token


def _steps(make: Callable[[], Engine], requests: Callable[[int], list[Request]], least: float) -> Line:
    engine = make()
    scheduler = Scheduler(engine, engine.max_num_seqs)
    spent = [step_seconds(scheduler, requests(round)) for round in range(ROUNDS)][-1]
    return {
        "ms a step": rounded(spent * 1e3),
        "tokens/s": rounded(engine.max_num_seqs / spent),
        "roofline, ms": rounded(least * 1e3),
        "share of the roofline": rounded(least / spent, 2),
    }


def _first_token(model: LanguageModel, prefix: Prefix, size: sizes.Decoding) -> Line:
    """Of a question of 32 tokens, behind a document as prompt and behind the cartridge, which is on the device."""
    engine = Engine(model, 1, size.document + 64, 1, attention=models.own_kernel())
    found: Line = {}
    for name, before, behind in (("document", size.document, None), ("cartridge", 0, prefix)):
        scheduler, spent = Scheduler(engine, 1), []
        for seed in range(3):
            prompt = _prompt(model.config.vocab_size, before + 32, seed)
            start = time.perf_counter()
            for _ in run(scheduler, [Request("x", prompt, behind, max_tokens=1)]):
                pass
            spent.append(time.perf_counter() - start)
        found[f"behind the {name}, ms"] = rounded(min(spent) * 1e3)
    return {"document, tokens": size.document, "slots": prefix.length, **found}


def _prompt(words: int, length: int, seed: int) -> tuple[int, ...]:
    return tuple(random.Random(seed).choices(range(words), k=length))
