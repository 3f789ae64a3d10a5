"""Decode attention of Llama 3.1 8B's layer: its implementations, when reading together pays, and block sizes.

Bytes are those of the pages that the block tables name, each once, whether they are read once or by every request.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from accelerator_parts import models, sizes
from accelerator_parts.engine import copy_bandwidth
from accelerator_parts.measuring import Line, Options, attempts, rounded, seconds
from cartridges_jax import kernels
from cartridges_jax.kernels.decode_attention import gpu, new_pages, tpu, xla
from cartridges_jax.kernels.decode_attention.pages import AttentionMetadata
from cartridges_jax.kernels.decode_attention.sharing import Thresholds, head_pages_read
from cartridges_jax.kernels.decode_attention.softmax import Options as AttentionOptions

PAGE_SIZE = 128
ALONE = Thresholds(1 << 30, 0)  # no group is so large
Attend = Callable[[Any, Any, AttentionMetadata], Any]


def measure(options: Options) -> Iterator[Line]:
    shape = sizes.decode_attention(options.tiny)
    bandwidth = copy_bandwidth(options.tiny)
    for n in shape.requests:
        for slots in shape.slots:
            for name, attend in _sides(options.tiny):
                what = {"decode attention": name, "requests": n, "slots": slots, "tokens": shape.tokens}
                yield from attempts([(what, functools.partial(_speed, shape, attend, n, slots, bandwidth))])
    n, slots = shape.requests[-1], shape.slots[-1]
    for changed, attend in _block_sizes(options.tiny):
        what = {"block of": models.own_kernel() or "gpu", "changed": changed, "requests": n, "slots": slots}
        yield from attempts([(what, functools.partial(_speed, shape, attend, n, slots, bandwidth))])


def _sides(tiny: bool) -> Iterator[tuple[str, Attend]]:
    """XLA's, and the platform's kernel reading together and alone; on a CPU both kernels, interpreted."""
    yield "xla", lambda q, pages, metadata: xla.xla_attention(q, pages, metadata, AttentionOptions())
    for name in (kernels.platform(),) if models.own_kernel() else ("gpu", "tpu"):
        ways = {"together": Thresholds(2, 1), "alone": ALONE}
        for how, thresholds in list(ways.items())[: 1 if tiny else None]:
            yield f"{name}, {how}", _kernel(name, thresholds=thresholds, interpret=tiny)


def _block_sizes(tiny: bool) -> Iterator[tuple[str, Attend]]:
    """The kernel's block sizes, and those that differ from them in one number."""
    tables: dict[str, dict[str, tuple[int, ...]]] = {
        "gpu": {
            "keys": (32, 128),
            "warps": (2, 8),
            "stages": (2, 4),
            "programs": (512, 2048),
            "fewest_parts": (2, 8),
            "shared_parts": (4, 16),
            "requests": (8,),
        },
        "tpu": {"rows": (128, 512)},
    }
    name = models.own_kernel() or "gpu"
    yield "nothing", _kernel(name, interpret=tiny)
    for field, values in tables[name].items():
        for value in values[: 0 if tiny else None]:
            yield f"{field}={value}", _kernel(name, **{field: value})


def _kernel(name: str, **changed: Any) -> Attend:
    module = {"gpu": gpu, "tpu": tpu}[name]
    block_sizes = dataclasses.replace(module.default_block_sizes(), **changed)

    def attend(q: Any, pages: Any, metadata: AttentionMetadata) -> Any:
        metadata = metadata._replace(order=module.ordered(metadata._replace(layer=None), PAGE_SIZE, block_sizes))
        return getattr(module, f"{name}_attention")(q, pages, metadata, AttentionOptions(), block_sizes)

    return attend


def _speed(shape: sizes.DecodeAttention, attend: Attend, n: int, slots: int, bandwidth: float) -> Line:
    """Of one layer, all of whose requests see one cartridge and nothing else of one another."""
    k, h, dtype = shape.k, shape.h, jnp.dtype(shape.dtype)
    of_slots, of_tokens = -(-slots // PAGE_SIZE), -(-shape.tokens // PAGE_SIZE)
    table = (of_slots + np.arange(n * of_tokens).reshape(n, of_tokens)).astype(np.int32)
    starts, ids = np.full(n, shape.tokens - 1, np.int32), np.full(n, 0 if slots else -1, np.int32)
    lens = np.full((1, 1, k), slots, np.int32)
    first = (np.arange(k, dtype=np.int32) * slots)[None, None]
    slot_table = (np.arange(max(of_slots, 1), dtype=np.int32) * k)[None]
    metadata = AttentionMetadata(starts, table, ids, slot_table, first, lens)
    with jax.ensure_compile_time_eval():
        head_pages = int(head_pages_read(metadata, PAGE_SIZE, Thresholds(1, 0))[0])
    pages = new_pages((of_slots + n * of_tokens) * k, PAGE_SIZE, h, dtype, "xla")
    q = jax.random.normal(jax.random.key(0), (n, 1, shape.n, h), dtype)
    arrays = jax.tree.map(jnp.asarray, metadata._replace(layer=0))
    program = jax.jit(attend)
    spent = seconds(functools.partial(program, q, pages, arrays), jax.block_until_ready)
    least = head_pages * PAGE_SIZE * h * 2 * q.dtype.itemsize / bandwidth
    return {"µs": rounded(spent * 1e6), "roofline, µs": rounded(least * 1e6), "share": rounded(least / spent, 2)}
