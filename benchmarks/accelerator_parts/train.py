"""The training step at the shapes of Llama 3.1 8B and Qwen3 4B: random weights, both remat policies, one device.

And its loss alone, by how many targets have logits at one time.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from typing import Any, get_args

import jax
import jax.numpy as jnp
import optax

from accelerator_parts import models, sizes
from accelerator_parts.measuring import Line, Options, attempts, rounded, seconds
from cartridges_jax import kernels
from cartridges_jax.kernels.block_sizes import of_kernel
from cartridges_jax.models.config import ModelConfig
from cartridges_jax.models.params import Params
from cartridges_jax.models.transformer import Remat, head_weights
from cartridges_jax.parallel.device import matmul_peak
from cartridges_jax.training.losses import top_k_cross_entropy
from cartridges_jax.training.step import TrainState, train_step


def measure(options: Options) -> Iterator[Line]:
    size = sizes.training(options.tiny)
    for name, config in {"tiny": models.TINY}.items() if options.tiny else models.LARGE.items():
        params = models.random_params(config, "bfloat16")
        for remat in get_args(Remat):
            what = {"step of": name, "side": f"ours, remat {remat}", "rows": size.rows, "t": size.t, "p": size.p}
            yield from attempts([(what, functools.partial(_speed, config, params, remat, size))])
        yield from attempts(
            (what, functools.partial(_loss_speed, config, params, chunk, size)) for what, chunk in _chunks(name)
        )
        del params


def _chunks(name: str) -> Iterator[tuple[Line, int]]:
    own = of_kernel(kernels.platform()).loss_chunk
    for chunk in sorted({own // 2, own, 2 * own, 4 * own}):
        yield {"loss of": name, "chunk": chunk, "default": "yes" * (chunk == own)}, chunk


def _loss_speed(config: ModelConfig, params: Params, chunk: int, size: sizes.Training) -> Line:
    head, batch = head_weights(params), jax.tree.map(lambda a: a[0], models.random_batch(config, size.rows, size.t))
    targets = [a.reshape(-1, a.shape[-1]) for a in (batch.target_ids, batch.target_logprobs, batch.target_entries)]
    hidden = jax.random.normal(jax.random.key(0), (size.rows * size.t, config.embed_dim), jnp.bfloat16)
    loss = functools.partial(top_k_cross_entropy, tail="drop", chunk=chunk)
    program = jax.jit(jax.value_and_grad(loss))
    return {"ms": rounded(seconds(functools.partial(program, hidden, head, *targets), jax.block_until_ready) * 1e3)}


def _speed(config: ModelConfig, params: Params, remat: Remat, size: sizes.Training) -> Line:
    rows, t, p = size.rows, size.t, size.p
    cartridge, batch, tx = models.random_cartridge(config, p), models.random_batch(config, rows, t), optax.adam(1e-3)
    state = TrainState(cartridge.slots, tx.init(cartridge.slots), jnp.zeros((), jnp.int32))
    options: Any = {"tail": "drop", "reduction": "token", "remat": remat, "attention": models.own_kernel()}
    start = time.perf_counter()
    program = train_step.lower(state, params, batch, cartridge.placement, config=config, tx=tx, **options).compile()
    compiling = time.perf_counter() - start
    held = program.memory_analysis()
    peak = held.argument_size_in_bytes + held.temp_size_in_bytes + held.output_size_in_bytes - held.alias_size_in_bytes

    def step() -> Any:
        nonlocal state
        state, metrics = program(state, params, batch, cartridge.placement)
        return metrics["loss"]

    spent = seconds(step, jax.block_until_ready, repeats=2, series=2)
    flops = models.needed_flops(config, rows, t, p) / spent
    return {
        "tokens/s": rounded(rows * t / spent),
        "TFLOP/s": rounded(flops / 1e12),
        "share of the matmul peak": rounded(flops / matmul_peak("bfloat16", 1), 2),
        "peak memory, GiB": rounded(peak / 2**30),
        "compile, s": rounded(compiling),
        "loss": rounded(float(step()), 5),
    }
