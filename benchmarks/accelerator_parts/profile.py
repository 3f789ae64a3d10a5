"""Where a training step's and a decoding step's time goes: a trace of each, reduced to its twenty costliest kernels."""

from __future__ import annotations

import collections
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from accelerator_parts import models, sizes
from accelerator_parts.measuring import Line, Options, failure, rounded
from cartridges_jax.models.config import ModelConfig
from cartridges_jax.models.params import Params
from cartridges_jax.serving.cache import Prefix
from cartridges_jax.serving.engine import Engine
from cartridges_jax.serving.scheduler import Request, Scheduler, Token
from cartridges_jax.training.step import TrainState, train_step

COSTLIEST = 20
# Where a kernel's events lie: a GPU's streams, a TPU's operations, the threads of XLA's own pool on a CPU.
KERNEL_LINES = re.compile(r"Stream|XLA Ops|tf_XLA")
NO_KERNELS = re.compile(r"ThreadpoolListener|ThunkExecutor|^end: ")  # a CPU's bookkeeping among them


def measure(options: Options) -> Iterator[Line]:
    config = models.TINY if options.tiny else models.LARGE["llama-3.1-8b"]
    params = models.random_params(config, "bfloat16")
    for name, make in (("training", _training), ("decoding", _decoding)):
        try:
            step = make(config, params, options.tiny)
            step(), step()  # compiled, and run once since
            yield from _costliest(name, step)
            del step
        except Exception as error:
            yield {"step": name, **failure(error)}


def _training(config: ModelConfig, params: Params, tiny: bool) -> Callable[[], None]:
    size = sizes.training(tiny)
    cartridge, batch = models.random_cartridge(config, size.p), models.random_batch(config, size.rows, size.t)
    tx = optax.adam(1e-3)
    state = TrainState(cartridge.slots, tx.init(cartridge.slots), jnp.zeros((), jnp.int32))
    options: Any = {"tail": "drop", "reduction": "token", "remat": "layers", "attention": models.own_kernel()}

    def step() -> None:
        nonlocal state
        state, metrics = train_step(state, params, batch, cartridge.placement, config=config, tx=tx, **options)
        jax.block_until_ready(metrics)

    return step


def _decoding(config: ModelConfig, params: Params, tiny: bool) -> Callable[[], None]:
    """Of requests that share a cartridge; the answers outlast the steps that are taken."""
    size = sizes.decoding(tiny)
    n = size.requests[:2][-1]  # 64
    model = models.without_tokenizer(config, params)
    longest = size.slots + size.prompt + size.answer + 8
    room = n * 4 * 128 + longest + 256
    engine = Engine(model, n, longest, 1, cache_tokens=room, batch_sizes=[n], attention=models.own_kernel())
    prefix = Prefix("cartridge", size.slots, models.random_cartridge(config, size.slots))
    scheduler = Scheduler(engine, n)
    for i in range(n):
        scheduler.submit(Request(str(i), (i + 1,) * size.prompt, prefix, size.answer))
    while sum(isinstance(event, Token) for event in scheduler.step()) < n:
        pass

    def step() -> None:
        scheduler.step()

    return step


def _costliest(name: str, step: Callable[[], None]) -> Iterator[Line]:
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            step()
        times = _kernel_times(next(Path(folder).rglob("*.xplane.pb")))
    whole = sum(spent for spent, _ in times.values())
    yield {"step": name, "kernels": sum(count for _, count in times.values()), "all, ms": rounded(whole / 1e6)}
    for kernel, (spent, count) in sorted(times.items(), key=lambda item: -item[1][0])[:COSTLIEST]:
        share = rounded(spent / whole, 2)
        yield {"step": name, "kernel": kernel[:80], "times": count, "ms": rounded(spent / 1e6), "share": share}


def _kernel_times(trace: Path) -> dict[str, tuple[float, int]]:
    """Nanoseconds and calls of each kernel of the first device, or of the host where the CPU is the device."""
    planes = list(jax.profiler.ProfileData.from_file(str(trace)).planes)
    devices = [plane for plane in planes if plane.name.startswith("/device:") and list(plane.lines)]
    times: dict[str, tuple[float, int]] = collections.defaultdict(lambda: (0.0, 0))
    for plane in devices[:1] or [plane for plane in planes if plane.name == "/host:CPU"]:
        for line in plane.lines:
            for event in line.events if KERNEL_LINES.match(line.name or "") else ():
                if not NO_KERNELS.search(event.name):
                    spent, count = times[event.name]
                    times[event.name] = spent + event.duration_ns, count + 1
    return dict(times)
