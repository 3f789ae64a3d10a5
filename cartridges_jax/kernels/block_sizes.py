"""The numbers that measurements on a device may move, in one table: block sizes, thresholds, chunks of the loss.

    python benchmarks/accelerator.py attention decode train

shows what each of them and its neighbours cost on a device. **No line has been measured yet**: block sizes are the
largest that fit an H100's registers and shared memory, or VMEM, and chunks of the loss follow from makers' figures.
Whoever has measured a device gives it a line of its own, under its platform and the beginning of its `device_kind`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from cartridges_jax import kernels


@dataclasses.dataclass(frozen=True)
class Line:
    """What one kind of device takes."""

    # Target positions of the loss that have logits at one time. The head is read once for each chunk: a product of 128
    # rows takes as long as reading it on accelerators, and one of 240 (v5e), 300 (H100) or 560 (v6e) as multiplying it.
    loss_chunk: int
    prefix: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # of prefix attention
    decode: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # `BlockSizes` of decode attention
    users: int = 1  # from how many requests on that share a cartridge or a beginning they read it together,
    pages: int = 0  # and from how many pages on, of slots for each head on average


GPU = Line(
    loss_chunk=512,
    prefix={  # queries and keys of the forward and of the backward pass; "wide" is float32, or a head above 128
        "usual": ((128, 64), (64, 64)),
        "wide": ((64, 32), (32, 32)),
    },
    decode={
        "rows": 64,
        "keys": 64,
        "requests": 16,
        "programs": 1024,
        "fewest_parts": 4,
        "most_parts": 32,
        "shared_parts": 8,
        "warps": 4,
        "stages": 3,
    },
    users=4,
    pages=4,
)
TPU = Line(
    loss_chunk=256,
    prefix={"queries": 1024, "keys": 512, "slots": 512},  # queries count each head of a group; scores take 2 MB
    decode={"rows": 256, "written": 32},
    users=4,
    pages=2,
)
TABLE = {
    "cpu": Line(loss_chunk=128),
    "gpu": GPU,
    "tpu": TPU,
    "tpu TPU v6": dataclasses.replace(TPU, loss_chunk=640),
}


def of_device(name: str) -> Line:
    """Returns the line of a device such as "tpu TPU v6 lite", or of a platform: the longest that it begins with."""
    return TABLE[max((key for key in TABLE if name.startswith(key)), key=len)]


def of_kernel(platform: str) -> Line:
    """Returns the line that a platform's kernels take: this device's, or the platform's where they are interpreted."""
    return of_device(kernels.device_name() if kernels.platform() == platform else platform)
