"""Prefix attention of Llama 3.1 8B's layer, both passes: its implementations, what cuDNN gives, and block sizes.

cuDNN's two calls, causal over the own keys and dense over the slots, are not merged into one softmax: what is compared
with is less than the whole work. TFLOP/s count the products that a query's visible pairs need.
"""

from __future__ import annotations

import concurrent.futures
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from accelerator_parts import sizes
from accelerator_parts.measuring import Line, Options, attempts, rounded, seconds
from cartridges_jax import kernels
from cartridges_jax.kernels.prefix_attention import KERNELS, gpu_kernels, prefix_attention, tpu_kernels
from cartridges_jax.kernels.prefix_attention.gpu import default_block_sizes as gpu_block_sizes
from cartridges_jax.kernels.prefix_attention.gpu import gpu_attention
from cartridges_jax.kernels.prefix_attention.tpu import default_block_sizes as tpu_block_sizes
from cartridges_jax.kernels.prefix_attention.tpu import tpu_attention

Attend = Callable[..., Any]  # of q, k, v, slots and segment ids


def measure(options: Options) -> Iterator[Line]:
    shapes = sizes.attention(options.tiny)
    yield from _speeds(_implementations(shapes))
    yield from _speeds(_block_sizes(shapes[0], options.tiny))


def _speeds(sides: Iterable[tuple[Line, Attend, sizes.Attention]]) -> Iterator[Line]:
    """All are compiled at once, by as many threads as there are cores, before the first is timed."""
    with concurrent.futures.ThreadPoolExecutor() as pool:
        compiled = [(name, shape, pool.submit(_compiled, attend, shape)) for name, attend, shape in sides]
        concurrent.futures.wait(future for *_, future in compiled)
    yield from attempts([(name, functools.partial(_speed, shape, future)) for name, shape, future in compiled])


def _implementations(shapes: list[sizes.Attention]) -> Iterator[tuple[Line, Attend, sizes.Attention]]:
    platform = kernels.platform()
    names = [platform, "xla"] if platform in KERNELS else ["xla"]
    sides: dict[str, Attend] = {name: functools.partial(prefix_attention, implementation=name) for name in names}
    if platform == "gpu":
        sides["cuDNN, two calls, unmerged"] = _unmerged
    for shape in shapes:
        for name, attend in sides.items():
            yield {"attention": name, "t": shape.t, "p": shape.p}, attend, shape


def _unmerged(q: Any, k: Any, v: Any, prefix_k: Any, prefix_v: Any, segment_ids: Any) -> Any:
    slots = (jnp.broadcast_to(a, (len(q), *a.shape)) for a in (prefix_k, prefix_v))
    own = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")
    return own + jax.nn.dot_product_attention(q, *slots, implementation="cudnn")


def _compiled(attend: Attend, shape: sizes.Attention) -> tuple[Any, Any, list[jax.Array]]:
    """Programs of the forward pass and of both, and their arguments."""
    b, t, p, n, k, h = shape.b, shape.t, shape.p, shape.n, shape.k, shape.h
    q_shape, own, slots = (b, t, n, h), (b, t, k, h), (p, k, h)
    keys = jax.random.split(jax.random.key(0), 6)
    drawn = zip(keys, (q_shape, own, own, slots, slots, q_shape), strict=True)
    arrays = [jax.random.normal(key, shape, jnp.bfloat16) for key, shape in drawn]
    segment_ids = jnp.ones((b, t), jnp.int32)

    def forward(*arrays: Any) -> Any:
        return attend(*arrays[:-1], segment_ids)

    def both(*arrays: Any) -> Any:
        o, pullback = jax.vjp(lambda *inputs: attend(*inputs, segment_ids), *arrays[:-1])
        return o, pullback(arrays[-1])

    return jax.jit(forward).lower(*arrays).compile(), jax.jit(both).lower(*arrays).compile(), arrays


def _speed(shape: sizes.Attention, compiled: concurrent.futures.Future[Any]) -> Line:
    forward, both, arrays = compiled.result()
    found: Line = {}
    for name, program, products in (("forward", forward, 2), ("both passes", both, 7)):
        spent = seconds(functools.partial(program, *arrays), jax.block_until_ready)
        rate = products * shape.product / spent / 1e12
        found |= {f"{name}, ms": rounded(spent * 1e3), f"{name}, TFLOP/s": rounded(rate)}
    return found


def _block_sizes(shape: sizes.Attention, tiny: bool) -> Iterator[tuple[Line, Attend, sizes.Attention]]:
    """Every size of the platform's kernel, the same for both passes; on a CPU one of each kernel, interpreted."""
    platform = kernels.platform()
    interpret = platform not in KERNELS
    if platform == "gpu" or interpret:
        candidates = [(16, 16, 4)] if tiny else list(itertools.product((64, 128), (32, 64, 128), (4, 8)))
        defaults = gpu_block_sizes(shape.h, jnp.bfloat16)
        for candidate in candidates:
            block = gpu_kernels.BlockSizes(*candidate, interpret)
            words = ["forward"] * (block == defaults[0]) + ["backward"] * (block == defaults[1])
            name = {"block of": "gpu", "queries, keys, warps": str(candidate), "default": " and ".join(words)}
            yield name, functools.partial(_with, gpu_attention, block_sizes=(block, block)), shape
    if platform == "tpu" or interpret:
        candidates = [(16, 16, 16)] if tiny else list(itertools.product((128, 256), (256, 512, 1024), (256, 512, 1024)))
        g = shape.n // shape.k
        default = tpu_block_sizes(shape.t, g, shape.p)
        for candidate in candidates:
            block = tpu_kernels.BlockSizes(g, *candidate, interpret)
            words = "both" if block == default else ""
            name = {"block of": "tpu", "queries, keys, slots": str(candidate), "default": words}
            yield name, functools.partial(_with, tpu_attention, block_sizes=block), shape


def _with(kernel: Attend, *arrays: Any, **blocks: Any) -> Any:
    return kernel(*arrays, bias=None, lengths=None, window=None, **blocks)
