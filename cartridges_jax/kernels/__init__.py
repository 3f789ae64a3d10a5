"""Attention's kernels, and a product's, each with a reference beside it."""

from __future__ import annotations

import jax


def platform() -> str:
    """The platform that is compiled for: "cpu", "gpu" or "tpu"."""
    # a mesh knows the devices that are compiled for, which may be elsewhere
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()
