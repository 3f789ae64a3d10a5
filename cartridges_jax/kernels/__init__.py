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


def device_name() -> str:
    """Names the device that is compiled for by its platform and kind, such as "tpu TPU v6 lite"."""
    device = jax.sharding.get_abstract_mesh().abstract_device or jax.devices()[0]
    return f"{platform()} {device.device_kind}"
