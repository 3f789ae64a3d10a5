"""Which line of the table of block sizes a device takes."""

from __future__ import annotations

import pytest

from cartridges_jax.kernels.block_sizes import GPU, TABLE, TPU, Line, of_device, of_kernel
from cartridges_jax.kernels.decode_attention import gpu, thresholds, tpu
from cartridges_jax.kernels.prefix_attention.tpu import default_block_sizes

LINES = {
    "cpu": TABLE["cpu"],
    "gpu": GPU,
    "tpu": TPU,
    "gpu NVIDIA H100 80GB HBM3": GPU,
    "gpu AMD Instinct MI300X": GPU,
    "tpu TPU v5 lite": TPU,
    "tpu TPU v6 lite": TABLE["tpu TPU v6"],
    "tpu TPU7x": TPU,
}


@pytest.mark.parametrize(("name", "line"), LINES.items())
def test_a_device_has_the_line_of_its_kind_or_its_platform(name: str, line: Line):
    assert of_device(name) is line


def test_an_unknown_kind_has_its_platforms_line():
    assert of_device("tpu of tomorrow") is TPU and of_device("gpu of tomorrow") is GPU


def test_interpreted_kernels_take_what_their_platform_has():
    assert (of_kernel("gpu"), of_kernel("tpu")) == (GPU, TPU)
    assert gpu.default_block_sizes().keys == GPU.decode["keys"] and tpu.default_block_sizes().rows == TPU.decode["rows"]
    assert thresholds("xla") == (1, 0), "XLA's reads whatever requests share as often as there are requests"
    assert default_block_sizes(4096, 4, 2048).keys == TPU.prefix["keys"]


def test_blocks_are_no_larger_than_what_there_is():
    sizes = default_block_sizes(t=100, g=2, p=130)
    assert (sizes.queries, sizes.keys, sizes.slots) == (128, 128, 256)
