"""The kernels: attention over a cartridge and rows, attention over pages, and the CPU's matrix products.

Each stands beside a reference implementation that says what it computes and to which tests hold it.
"""

from __future__ import annotations

import jax


def platform() -> str:
    """Names the platform that is compiled for: "cpu", "gpu" or "tpu"."""
    # a mesh knows the devices that are compiled for, which may be elsewhere
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()


def device_kind() -> str:
    """Names the device that is compiled for, as its maker does: "TPU v6 lite", "NVIDIA H100 80GB HBM3", "cpu"."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.device_kind if device else jax.devices()[0].device_kind
