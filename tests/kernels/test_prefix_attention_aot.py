"""The kernels, compiled for TPUs and for an H100 on a machine that has none: that they fit, not what they compute."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from cartridges_jax.kernels.prefix_attention import prefix_attention
from cartridges_jax.kernels.prefix_attention.shapes import MODELS, Shape
from cartridges_jax.planning.chips import CHIPS, devices_of

pytestmark = pytest.mark.aot

DEVICES = {
    "v4": "v4:2x2x2",
    "v5e": "v5e:2x4",
    "v5p": "v5p:2x2x2",
    "v6e": "v6e:2x4",
    "tpu7x": "tpu7x:2x2x2",
    "h100": "h100:8",
}
KERNEL = {"tpu": "tpu_custom_call", "gpu": "__gpu$xla.gpu.triton"}
BATCH, HEADS = ("data", "fsdp"), "tensor"
SPECS = {"q": P(BATCH, None, HEADS), "k": P(BATCH, None, HEADS), "v": P(BATCH, None, HEADS)}
SPECS |= {"prefix_k": P(None, HEADS), "prefix_v": P(None, HEADS), "bias": P(None, HEADS)}


def mesh(device: str) -> Mesh:
    """2 x 2 x 2 of them."""
    devices = np.array(devices_of(DEVICES[device])[1])[:8].reshape(2, 2, 2)
    return Mesh(devices, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


def compiled(device: str, shape: Shape, dtype: Any) -> Any:
    """The output and all gradients, in `shard_map`, by the kernels of its platform."""
    on, name = mesh(device), CHIPS[device].platform

    def argument(size: tuple[int, ...], dtype: Any, spec: P) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(size, dtype, sharding=NamedSharding(on, spec))

    def local(arrays: dict[str, Any], segment_ids: Any, lengths: Any) -> Any:
        options: Any = {"implementation": name, "window": shape.window, "lengths": lengths}
        return prefix_attention(segment_ids=segment_ids, **options, **arrays)

    def run(arrays: dict[str, Any], segment_ids: Any, lengths: Any, cotangent: Any) -> Any:
        # without check_vma, its transpose adds up the gradients of slots and bias over the batch's devices
        specs = SPECS, P(BATCH), P(HEADS)
        attend = jax.shard_map(local, mesh=on, in_specs=specs, out_specs=SPECS["q"], check_vma=False)
        o, pullback = jax.vjp(lambda arrays: attend(arrays, segment_ids, lengths), arrays)
        return o, pullback(cotangent)[0]

    small = dataclasses.replace(shape, b=1, t=1, segments=()).draw()[0]
    lengths = None if shape.lengths is None else argument((shape.k,), jnp.int32, P(HEADS))
    b, t, p = shape.b, shape.t, shape.p
    arrays = {
        name: argument((b, t, *a.shape[2:]), dtype, SPECS[name])
        if name in ("q", "k", "v")
        else argument((p, *a.shape[1:]), jnp.float32, SPECS[name])
        for name, a in small.items()
    }
    with jax.set_mesh(on):
        lowered = jax.jit(run).lower(arrays, argument((b, t), jnp.int32, P(BATCH)), lengths, arrays["q"])
        return lowered.compile({"exec_time_optimization_effort": -1.0} if device != "h100" else None)


def check(program: Any, platform: str, shape: Shape, kernels: int) -> None:
    text = program.as_text()
    assert len(re.findall(re.escape(f'custom_call_target="{KERNEL[platform]}"'), text)) == kernels
    # those that no device can do without: of the slots' gradients, over the batch
    assert not re.findall(r" (all-gather|all-to-all|collective-permute|reduce-scatter)\S*\(", text)
    scores = shape.b // 4 * shape.n // 2 * shape.t * (shape.p + shape.t) * 4  # bytes on each device
    assert program.memory_analysis().temp_size_in_bytes < scores / 4


@pytest.mark.parametrize("name", ["llama-3.2-1b", "llama-3.1-8b"])
@pytest.mark.parametrize("device", list(DEVICES))
def test_both_passes_compile_on_eight_devices(device: str, name: str) -> None:
    """Head sizes 64 and 128 at lengths of training; that includes that blocks fit VMEM, or shared memory."""
    program = compiled(device, MODELS[name], jnp.bfloat16)
    check(program, "gpu" if device == "h100" else "tpu", MODELS[name], kernels=4)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        (MODELS["gemma-3-4b"], jnp.bfloat16),  # head size 256, a window
        (dataclasses.replace(MODELS["gemma-3-4b"], t=2048), jnp.float32),
        (dataclasses.replace(MODELS["llama-3.1-8b"], lengths=(2048, 0, 1, 2, 62, 20, 40, 16)), jnp.bfloat16),
        (dataclasses.replace(MODELS["llama-3.1-8b"], n=14, k=2, t=3000, p=0), jnp.bfloat16),  # 7 heads share keys
    ],
    ids=["h256-window", "h256-float32", "lengths", "g7-odd-length-no-slots"],
)
@pytest.mark.parametrize("device", ["v5e", "h100"])
def test_other_head_sizes_dtypes_and_odd_lengths(device: str, shape: Shape, dtype: Any) -> None:
    program = compiled(device, shape, dtype)
    check(program, "gpu" if device == "h100" else "tpu", shape, kernels=4 if shape.p else 3)
