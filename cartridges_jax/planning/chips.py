"""Chips that can be planned for: what they can do at best, and devices to compile for that are not here."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import math
import os
import re
from typing import Any

import jax
from jax.experimental import topologies

from cartridges_jax.command_line.errors import MissingPackage, UserError


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one device, as JAX counts them, can do at best, as its maker states it."""

    platform: str
    flops: float  # per second, of bfloat16
    memory: float  # bytes
    bandwidth: float  # bytes per second, of that memory
    ring: float  # bytes per second that a device receives from its neighbours on one axis of the mesh
    source: str
    dimensions: int = 0  # of a TPU's torus
    cores: int = 1  # how often a slice's name counts each chip ("v5p-64")
    target: str = ""  # the fields of a GpuTargetConfigProto in which GPUs differ


GIB = 2**30
NVIDIA = "https://www.nvidia.com/en-us/data-center"
CLOUD = "https://docs.cloud.google.com/tpu/docs"
HOPPER = "core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98 l2_cache_size: 52428800 "
HOPPER += "shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472 "
HOPPER += "cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }"
AMPERE = "core_count: 108 fpus_per_core: 64 clock_rate_ghz: 1.41 l2_cache_size: 41943040 "
AMPERE += "shared_memory_per_block_optin: 166912 shared_memory_per_core: 167936 "
AMPERE += "cuda_compute_capability { major: 8 minor: 0 }"

# Memory and bandwidths are those on the makers' pages, FLOPs those without sparsity. A TPU's interconnect is stated for
# both directions of all its ports (four in a plane, six in a cube). An axis of the mesh uses two ports, and each
# receives half of its share: `ring` is what is stated over the number of ports. For v4 it is a pod's all-reduce
# bandwidth by chip and axis, which for v5e and v6e comes to the same. It takes an axis that closes to a ring: slices
# below 16 a side (v5e, v6e) or 4 (others) have ends, which one port feeds. A GPU's is half of NVLink's two directions.
# The two cores of a tpu7x chip are two devices, with half of the chip each; those of v4 and v5p are one.
CHIPS = {
    "v4": Chip("tpu", 275e12, 32 * GIB, 1200e9, 90e9, f"{CLOUD}/v4", 3, 2),
    "v5e": Chip("tpu", 197e12, 16 * GIB, 819e9, 100e9, f"{CLOUD}/v5e", 2),
    "v5p": Chip("tpu", 459e12, 95 * GIB, 2765e9, 200e9, f"{CLOUD}/v5p", 3, 2),
    "v6e": Chip("tpu", 918e12, 32 * GIB, 1638e9, 200e9, f"{CLOUD}/v6e", 2),
    "tpu7x": Chip("tpu", 1153.5e12, 96 * GIB, 3690e9, 100e9, f"{CLOUD}/tpu7x", 3),
    "a100": Chip("gpu", 312e12, 80e9, 2039e9, 300e9, f"{NVIDIA}/a100/", target=AMPERE),
    "h100": Chip("gpu", 989e12, 80e9, 3350e9, 450e9, f"{NVIDIA}/h100/", target=HOPPER),
    "h200": Chip("gpu", 989e12, 141e9, 4800e9, 450e9, f"{NVIDIA}/h200/", target=HOPPER),
    # virtual devices of this machine, to try a plan on, with roughly the speed of two cores of a laptop
    "cpu": Chip("cpu", 2e11, 8 * GIB, 2e10, 1e10, "nominal"),
}
ALIASES = {"v5litepod": "v5e", "tpu7": "tpu7x"}
GPUS_PER_HOST = 8
PACKAGES = {"tpu": "libtpu", "gpu": "jax-cuda13-plugin"}
# The GpuTargetConfigProto that XLA compiles for. What an H100 and an A100 share stands here, the rest in the table.
GPU_TARGET = """
platform_name: "CUDA" device_description_str: "NVIDIA {name}" runtime_version {{ major: 13 }}
dnn_version_info {{ major: 9 minor: 12 }}
gpu_device_info {{
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 registers_per_block_limit: 65536 registers_per_core_limit: 65536
  shared_memory_per_block: 49152 memory_bandwidth: {bandwidth:.0f} device_memory_size: {memory:.0f} {target}
}}
"""
# libtpu would ask the machine's metadata server who it is, and lock the devices that it does not use
LIBTPU = {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-8", "TPU_WORKER_HOSTNAMES": "localhost"}
LIBTPU |= {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_MIN_LOG_LEVEL": "3", "TPU_STDERR_LOG_LEVEL": "3"}
KNOWN = "v5p-64 or another slice's name, v5p:2x4x4 or another torus of chips, h100:8, or cpu:8"


def parse(topology: str) -> tuple[str, tuple[int, ...]]:
    """Returns a topology's chip and the sides of its torus, or the number of its GPUs or virtual devices.

    Raises:
      UserError: there is no such topology.
    """
    found = re.fullmatch(r"(\w+?)([:-])(\d+(?:x\d+)*)", topology.lower())
    name = ALIASES.get(found[1], found[1]) if found else ""
    if not found or name not in CHIPS:
        raise UserError(f"--topology is {topology!r}, expected {KNOWN}; chips are {', '.join(CHIPS)}")
    chip, sides = CHIPS[name], tuple(map(int, found[3].split("x")))
    if len(sides) == 1 and chip.dimensions and found[2] == "-" and name != "tpu7x":
        sides = _torus(topology, sides[0] // chip.cores, chip.dimensions)
    if min(sides) < 1 or len(sides) != (chip.dimensions or 1):
        raise UserError(f"--topology is {topology!r}: the sides of a {name} are {max(chip.dimensions, 1)} numbers")
    if chip.platform == "gpu" and sides[0] > GPUS_PER_HOST:
        raise UserError(f"--topology is {topology!r}: GPUs are planned within one host, expected at most 8")
    return name, sides


def compile_here(virtual_devices: int = 1) -> None:
    """Prepares this process to compile for devices that are not here; JAX uses its CPU alone from then on.

    It has to be called before JAX has a backend, and so by a command, not at an import.
    """
    for variable, value in LIBTPU.items():
        os.environ.setdefault(variable, value)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", virtual_devices)


def devices_of(topology: str) -> tuple[Chip, list[Any]]:
    """Returns a topology's chip, and its devices to compile for.

    Raises:
      UserError: there is no such topology, or the compiler does not know it.
      MissingPackage: the compiler is not installed.
    """
    name, sides = parse(topology)
    chip = CHIPS[name]
    if chip.platform == "cpu":
        if len(jax.devices("cpu")) < sides[0]:
            raise UserError(f"--topology is {topology!r}, but this process has {len(jax.devices('cpu'))} devices")
        return chip, jax.devices("cpu")[: sides[0]]
    try:
        importlib.metadata.distribution(PACKAGES[chip.platform])
    except importlib.metadata.PackageNotFoundError as error:
        raise MissingPackage(
            f"--topology is {topology!r}, and the compiler for it is not installed: run `pip install '.[aot]'`"
        ) from error
    try:
        if chip.platform == "tpu":
            options: dict[str, Any] = {} if math.prod(sides) >= 4 else {"chips_per_host_bounds": (*sides, 1)}
            if chip.cores == 2:
                options["chip_config_name"] = "megacore"  # two cores as one device, which has to be said of a v4
            found = topologies.get_topology_desc(f"{name}:{'x'.join(map(str, sides))}", platform="tpu", **options)
        else:
            target = GPU_TARGET.format(
                name=name.upper(), bandwidth=chip.bandwidth, memory=chip.memory, target=chip.target
            )
            found = topologies.get_topology_desc("", platform="cuda", target_config=target, topology=f"1x1x{sides[0]}")
    except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--topology is {topology!r}, which the compiler does not know ({reason})") from error
    return chip, list(found.devices)


def name_of(device: Any) -> str:
    """Returns the name by which the table of block sizes knows a device."""
    return f"{device.platform} {device.device_kind}"


def _torus(topology: str, chips: int, dimensions: int) -> tuple[int, ...]:
    """Returns the torus of a slice that is named by its size: the one nearest to a cube, by powers of two."""
    sides = [1, 1] if dimensions == 2 else [2, 2, 1]
    while math.prod(sides) < chips:
        smallest = max(i for i, side in enumerate(sides) if side == min(sides))
        sides[smallest] *= 2
    if math.prod(sides) != chips:
        raise UserError(f"--topology is {topology!r}, which has {chips} chips: give its torus, as in v5p:4x4x12")
    return tuple(sides)
