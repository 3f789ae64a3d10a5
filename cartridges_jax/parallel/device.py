"""Measurements of the device: how fast it multiplies, and how much of its memory is in use."""

from __future__ import annotations

import functools
import resource
import sys
import time

import jax
import jax.numpy as jnp

CPU_SIZE, ACCELERATOR_SIZE = 1024, 8192  # of the square matrices that are multiplied


@functools.cache
def matmul_peak(dtype: str, num_devices: int) -> float:
    """Returns the FLOPs per second of all devices of a job, measured by products of two matrices on one of them.

    The virtual devices of a CPU share its cores, all of which a product uses, so those of a process count as one.
    """
    on_cpu = jax.default_backend() == "cpu"
    size = CPU_SIZE if on_cpu else ACCELERATOR_SIZE
    a = jnp.ones((size, size), dtype)
    product = jax.jit(jnp.dot)
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        product(a, a).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return (jax.process_count() if on_cpu else num_devices) * 2 * size**3 / min(seconds)


def memory_in_use() -> int:
    """Returns the peak memory of the first device in bytes, or of this process where the device does not say."""
    stats = jax.local_devices()[0].memory_stats() or {}
    unit = 1 if sys.platform == "darwin" else 1024
    return stats.get("peak_bytes_in_use") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
