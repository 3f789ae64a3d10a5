"""Outputs and gradients of any implementation, kernels interpreted in small blocks; the definition's, in float64."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from numpy.testing import assert_allclose

from cartridges_jax import kernels
from cartridges_jax.kernels.prefix_attention import KERNELS, gpu_kernels, prefix_attention, tpu_kernels
from cartridges_jax.kernels.prefix_attention.gpu import gpu_attention
from cartridges_jax.kernels.prefix_attention.tpu import tpu_attention

BLOCK = {"xla": 256, "tpu": 16, "gpu": 16}  # of keys, as the tests run them
# blocks of unequal sizes in each pass, so that a mix-up shows
GPU_BLOCK_SIZES = gpu_kernels.BlockSizes(8, 16, interpret=True), gpu_kernels.BlockSizes(16, 8, interpret=True)


def is_interpreted(implementation: str | None) -> bool:
    """Whether it is a kernel of a platform that is not here."""
    return implementation in KERNELS and implementation != kernels.platform()


def attend(implementation: str | None, interpret: Any = True, **arguments: Any) -> jax.Array:
    """`prefix_attention`, or a kernel of another platform, interpreted."""
    if not is_interpreted(implementation):
        return prefix_attention(implementation=implementation, **arguments)
    arguments = {"bias": None, "lengths": None, "window": None} | arguments
    if implementation == "gpu":
        return gpu_attention(block_sizes=GPU_BLOCK_SIZES, **arguments)
    g = arguments["q"].shape[2] // arguments["k"].shape[2]
    return tpu_attention(block_sizes=tpu_kernels.BlockSizes(g, 8, 16, 16, interpret), **arguments)


def outputs(
    arrays: dict[str, Any],
    segment_ids: np.ndarray,
    cotangent: np.ndarray,
    implementation: str | None,
    window: int | None = None,
    lengths: Sequence[int] | None = None,
    interpret: Any = True,
) -> dict[str, np.ndarray]:
    """The output "o" and the gradient of each input."""
    differentiate = hurried if is_interpreted(implementation) else jitted
    lengths_k = None if lengths is None else np.asarray(lengths, np.int32)
    found = differentiate(arrays, segment_ids, cotangent, implementation, window, interpret, lengths_k)
    return {name: np.asarray(a) for name, a in found.items()}


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def jitted(
    arrays: dict[str, Any],
    segment_ids: Any,
    cotangent: Any,
    implementation: str | None,
    window: int | None = None,
    interpret: Any = True,
    lengths: Any = None,
) -> dict[str, Any]:
    def of(differentiated: dict[str, Any]) -> Any:
        options = {"segment_ids": segment_ids, "window": window, "lengths": lengths}
        return attend(implementation, interpret, **options, **differentiated)

    o, pullback = jax.vjp(of, {name: a for name, a in arrays.items() if a is not None})
    return {"o": o, **pullback(cotangent.astype(o.dtype))[0]}


# Interpreted kernels are hardly optimized, since compiling is what takes their tests' time. XLA's own sums are: one
# term after the other, as a level of 0 adds, they would lose digits.
hurried = jax.jit(jitted.__wrapped__, static_argnums=(3, 4, 5), compiler_options={"xla_backend_optimization_level": 0})


def definition(
    arrays: dict[str, np.ndarray | None],
    segment_ids: np.ndarray,
    cotangent: np.ndarray,
    window: int | None = None,
    lengths: Sequence[int] | None = None,
) -> dict[str, np.ndarray]:
    with jax.enable_x64(True):
        wide = {name: None if a is None else a.astype(np.float64) for name, a in arrays.items()}
        found = outputs(wide, segment_ids, cotangent.astype(np.float64), "reference", window, lengths)
    assert all(a.dtype == np.float64 for a in found.values())
    return found


def assert_close(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], tolerance: float) -> None:
    """Errors as a fraction of an array's largest value: gradients of slots are sums over all queries."""
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        scale = max(1.0, float(np.abs(array).max(initial=0)))
        assert_allclose(found[name].astype(np.float64), array, rtol=0, atol=tolerance * scale, err_msg=name)
