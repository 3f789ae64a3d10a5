"""Chips that a run may be planned for: their peaks, and slices of them by the names that clouds give."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import re
from pathlib import Path
from typing import Any

H100_PROTO = Path(__file__).with_name("h100.txtpb")


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peaks of one chip, which is one JAX device."""

    flops: float  # a second, of dense bfloat16 products
    memory: int  # bytes
    bandwidth: float  # of that memory, bytes a second
    links: float  # to other chips of the slice, bytes a second, all links together
    cores_named: int = 1  # how many of a slice's name make one chip: v5p-64 has 32
    dimensions: int = 2  # of the slice's torus
    per_host: int = 4


# Sources: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e} ("System architecture"); NVIDIA H100 datasheet, SXM5, without
# sparsity. Links as those pages give them, both directions added.
CHIPS = {
    "v4": Chip(275e12, 32 << 30, 1228e9, 300e9, cores_named=2, dimensions=3),
    "v5e": Chip(197e12, 16 << 30, 819e9, 200e9),
    "v5p": Chip(459e12, 95 << 30, 2765e9, 600e9, cores_named=2, dimensions=3),
    "v6e": Chip(918e12, 32 << 30, 1640e9, 448e9),
    "h100": Chip(989e12, 80 << 30, 3350e9, 900e9, per_host=8),
}
CLOUD_NAMES = {"v5litepod": "v5e"}


@dataclasses.dataclass(frozen=True)
class Slice:
    kind: str
    num_devices: int

    @property
    def chip(self) -> Chip:
        return CHIPS[self.kind]


def slice_of(name: str) -> Slice:
    """The slice of a name: "v5p-64" counts cores as Google Cloud does, "v5e-16" chips, "h100:8" GPUs.

    Raises:
      ValueError: no such name.
    """
    found = re.fullmatch(r"([a-z]\w*)[-:](\d+)", name)
    kind = CLOUD_NAMES.get(found[1], found[1]) if found else ""
    if found is None or kind not in CHIPS:
        raise ValueError(f"topology is {name!r}, expected a slice such as v5p-64, v5e-16, v6e-8, v4-32 or h100:8")
    count = int(found[2]) // CHIPS[kind].cores_named
    whole = count * CHIPS[kind].cores_named == int(found[2])
    if not whole or (kind != "h100" and (count < 4 or count & (count - 1))) or count < 1:
        raise ValueError(f"topology is {name!r}: expected a power of two of at least 4 chips, or a number of H100s")
    if kind == "h100" and count > 8 and count % 8:
        raise ValueError(f"topology is {name!r}: expected at most 8 GPUs, or whole hosts of 8")
    return Slice(kind, count)


def torus(count: int, dimensions: int) -> tuple[int, ...]:
    """The sides of a slice of 2^k chips, as even as they can be, the long ones last; in space, the last may be 1."""
    power = int(math.log2(count))
    sides = sorted(1 << ((power + i) // dimensions) for i in range(dimensions))
    return (*sides[1:], 1) if sides[0] == 1 else tuple(sides)


def devices_of(slice_: Slice) -> list[Any]:
    """Devices that programs can be compiled for, on a machine that has none of them.

    Raises:
      ImportError: the compiler is not installed; the sentence says how.
    """
    from jax.experimental import topologies

    if slice_.kind == "h100":
        if importlib.util.find_spec("jax_cuda13_plugin") is None:
            raise ImportError("planning for H100s needs their compiler: pip install jax-cuda13-plugin jax-cuda13-pjrt")
        hosts = max(slice_.num_devices // 8, 1)
        description = topologies.get_topology_desc(
            "",
            platform="cuda",
            target_config=H100_PROTO.read_text(encoding="utf-8"),
            topology=f"1x{hosts}x{slice_.num_devices // hosts}",
        )
        return list(description.devices)
    if importlib.util.find_spec("libtpu") is None:
        raise ImportError("planning for a TPU needs its compiler: pip install '.[tpu]' (or libtpu alone)")
    sides = "x".join(map(str, torus(slice_.num_devices, slice_.chip.dimensions)))
    return list(topologies.get_topology_desc(f"{slice_.kind}:{sides}", platform="tpu").devices)
