"""What is measured on, and what it can do at most."""

from __future__ import annotations

from collections.abc import Iterator

import jax

from accelerator_parts.measuring import Line, Options, rounded
from cartridges_jax.parallel.device import matmul_peak


def measure(options: Options) -> Iterator[Line]:
    device = jax.devices()[0]
    yield {"device": device.device_kind, "devices": len(jax.devices()), "jax": jax.__version__}
    yield {"dtype": "bfloat16", "matmul peak, TFLOP/s": rounded(matmul_peak("bfloat16", 1) / 1e12)}
