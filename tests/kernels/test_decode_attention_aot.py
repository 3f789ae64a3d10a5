"""The kernels over pages, compiled for TPUs and GPUs on a machine that has none: that they fit, and copy no pages."""

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

from cartridges_jax.command_line.errors import UserError
from cartridges_jax.kernels.decode_attention import decode_attention, new_pages, ordered, rotate_and_write
from cartridges_jax.kernels.decode_attention.pages import AttentionMetadata, Pages
from cartridges_jax.planning.chips import CHIPS, devices_of

pytestmark = pytest.mark.aot

DEVICES = {"v5e": "v5e:1x1", "v5p": "v5p:2x2x1", "v6e": "v6e:1x1", "tpu7x": "tpu7x:2x2x1", "a100": "a100:1"}
DEVICES |= {"h100": "h100:1"}
KERNEL = {"tpu": "tpu_custom_call", "gpu": "__gpu$xla.gpu.triton"}
KERNELS = {"tpu": 2, "gpu": 3}  # rotation and writing; attention; on a GPU, its parts are merged
LAYERS, NUM_PAGES, PAGE_SIZE, COLUMNS = 2, 1024, 128, 12


@dataclasses.dataclass(frozen=True)
class Call:
    """Requests, query tokens of each, query heads, kv heads, head size."""

    r: int = 64
    t: int = 1
    n: int = 32
    k: int = 8
    h: int = 128
    dtype: Any = jnp.bfloat16
    options: tuple[tuple[str, Any], ...] = ()


OPTIONS = (("window", 300), ("soft_cap", 30.0), ("scale", 0.1))
CALLS = {
    "one request": Call(r=1),
    "a chunk of two prompts": Call(r=2, t=128),
    "one kv head, eight query heads": Call(n=8, k=1),
    "all options": Call(n=9, k=3, options=OPTIONS),
    "large heads in float32": Call(r=8, n=8, k=4, h=256, dtype=jnp.float32),
}


def compiled(device: str, call: Call) -> tuple[str, Any, int]:
    """The platform, the program, and the bytes of the pages' keys."""
    platform = CHIPS[device].platform
    on = Mesh(np.array(devices_of(DEVICES[device])[1][:1]), ("x",), axis_types=(AxisType.Auto,))
    here = NamedSharding(on, P())

    def of(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=here)

    def run(heads: Any, rope: Any, slot_mapping: Any, pages: Pages, metadata: AttentionMetadata, sinks: Any) -> Any:
        of_layer = ordered(metadata, PAGE_SIZE, platform).of_layer(1)
        q, written = rotate_and_write(heads, rope, slot_mapping, pages, of_layer, platform)
        options: Any = {**dict(call.options), "sinks": sinks}
        return decode_attention(q, written, of_layer, platform, **options), written

    r, t, k = call.r, call.t, call.k
    ids_r, table, by_head = of(np.int32, r), of(np.int32, r, COLUMNS), of(np.int32, LAYERS, r, k)
    metadata = AttentionMetadata(ids_r, table, ids_r, table, by_head, by_head)
    sinks = of(np.float32, call.n) if call.options else None
    rope = (of(np.float32, r, t, call.h // 2),) * 2
    with jax.set_mesh(on):
        count = NUM_PAGES * LAYERS * k
        shapes = jax.eval_shape(lambda: new_pages(count, PAGE_SIZE, call.h, call.dtype, platform))
        pages = jax.tree.map(lambda a: of(a.dtype, *a.shape), shapes)
        heads = of(call.dtype, r, t, call.n + 2 * k, call.h)
        lowered = jax.jit(run, donate_argnums=3).lower(heads, rope, of(np.int32, r, t), pages, metadata, sinks)
        program = lowered.compile({"exec_time_optimization_effort": -1.0} if platform == "tpu" else None)
    return platform, program, pages.keys.size * pages.keys.dtype.itemsize


def check(device: str, call: Call) -> None:
    platform, program, keys = compiled(device, call)
    text = program.as_text()
    assert len(re.findall(re.escape(f'custom_call_target="{KERNEL[platform]}"'), text)) == KERNELS[platform]
    assert " while(" not in text and " conditional(" not in text
    assert program.memory_analysis().temp_size_in_bytes < keys / 2  # the pages are changed in place


@pytest.mark.parametrize("device", DEVICES)
def test_a_step_of_many_requests_compiles(device: str) -> None:
    check(device, Call())


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("device", ["v5e", "h100"])
def test_other_shapes_and_all_options_compile(device: str, name: str) -> None:
    check(device, CALLS[name])


def test_small_heads_are_for_gpus() -> None:
    small = Call(n=9, k=3, h=64, options=OPTIONS)
    check("h100", small)
    with pytest.raises(UserError, match="'tpu', which takes heads of 128 or 256 numbers, and those of"):
        check("v5e", small)
