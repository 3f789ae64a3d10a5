"""The kernel for CPUs: LLVM compiles it for the machine and the shapes at hand, and XLA calls it.

Many of XLA's threads may share one call: in items of a few products, or of some of their rows.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
import threading
from pathlib import Path
from string import Template

import jax
import jax.numpy as jnp
import llvmlite.binding as llvm
import numpy as np
from jaxtyping import Array, Float, Int

from cartridges_jax.kernels.gathered_matmul.kernel import Kernel

ITEMS_EACH = 4  # of each core, if there are as many products: one that is late holds the others up less
HANDLER = Path(__file__).with_name("handler.ll")

_lock = threading.Lock()
_engines: list[llvm.ExecutionEngine] = []  # compiled code lives as long as they do


def cpu_matmul(
    left: Float[Array, "i x d"],
    left_of: Int[Array | np.ndarray, " n"],
    right: Float[Array, "j d y"],
    right_of: Int[Array | np.ndarray, " n"],
    side_by_side: bool,
) -> Float[Array, "n x y"] | Float[Array, "x n*y"]:
    """`gathered_matmul`, of arrays in float32 or bfloat16, y a multiple of 4."""
    (x, d), y, n = left.shape[1:], right.shape[2], len(right_of)
    kernel = Kernel(x, d, y, str(left.dtype), str(right.dtype), side_by_side, *_vectors())
    with _lock:
        _register(kernel)
    shape = (x, n * y) if side_by_side else (n, x, y)
    call = jax.ffi.ffi_call(kernel.name, jax.ShapeDtypeStruct(shape, jnp.float32))
    return call(left, left_of.astype(jnp.int32), right, right_of.astype(jnp.int32))


@functools.cache
def _register(kernel: Kernel) -> None:
    """Makes it known to XLA."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    handler = Template(HANDLER.read_text(encoding="utf-8")).substitute(
        _interface(),
        name=kernel.name,
        cores=cores,
        shares=ITEMS_EACH * cores,
        most_at_once=kernel.most_at_once,
        row_parts=kernel.row_parts,
    )
    features = llvm.get_host_cpu_features().flatten()
    target = llvm.Target.from_default_triple()
    machine = target.create_target_machine(llvm.get_host_cpu_name(), features, opt=3, jit=True)
    module = llvm.parse_assembly(f'target datalayout = "{machine.target_data}"\n{handler}{kernel.code()}')
    passes = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=3))
    passes.getModulePassManager().run(module, passes)
    engine = llvm.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    _engines.append(engine)
    function = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(engine.get_function_address(kernel.name))
    jax.ffi.register_ffi_target(kernel.name, jax.ffi.pycapsule(function), platform="cpu")


@functools.cache
def _vectors() -> tuple[int, int]:
    """How many floats one of this CPU's has, and how many it holds."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    features = llvm.get_host_cpu_features()
    if features.get("avx512f"):
        return 16, 32
    if features.get("avx2"):
        return 8, 16
    return 4, 16 if "sse2" in features else 32


@functools.cache
def _interface() -> dict[str, int]:
    """By which the installed XLA calls: its version, and where in its table of functions those are that are needed."""
    header = (Path(jax.ffi.include_dir()) / "xla" / "ffi" / "api" / "c_api.h").read_text(encoding="utf-8")
    version = {part: re.findall(rf"define XLA_FFI_API_{part.upper()} (\d+)", header)[0] for part in ("major", "minor")}
    functions = re.findall(r"_XLA_FFI_API_STRUCT_FIELD\(XLA_FFI_(\w+)\)", header)
    places = {"destroy": functions.index("Error_Destroy"), "schedule": functions.index("ThreadPool_Schedule")}
    return {name: int(value) for name, value in version.items()} | places | {"functions": len(functions)}
