"""The kernel of `gathered_matmul` for CPUs: LLVM compiles it for this machine and these shapes, and XLA calls it.

XLA's threads share a call. They take items from it, of which each is a few products or some rows of one.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import threading
from string import Template

import jax
import jax.numpy as jnp
import jaxlib
import llvmlite.binding as llvm
import numpy as np
from jaxtyping import Array, Float, Int

from cartridges_jax.kernels.gathered_matmul.interface import HANDLER, UnknownInterfaceError, read_interface
from cartridges_jax.kernels.gathered_matmul.kernel import Kernel

log = logging.getLogger(__name__)
ITEMS_PER_CORE = 4  # where there are enough products: a core that is late then holds the others up less

_lock = threading.RLock()
_engines: list[llvm.ExecutionEngine] = []  # compiled code lives as long as they do


def cpu_matmul(
    left: Float[Array, "i x d"],
    left_index: Int[Array | np.ndarray, " n"],
    right: Float[Array, "j d y"],
    right_index: Int[Array | np.ndarray, " n"],
    side_by_side: bool,
) -> Float[Array, "n x y"] | Float[Array, "x n*y"]:
    """Does what `gathered_matmul` says, for arrays in float32 or bfloat16 whose y is a multiple of 4."""
    (x, d), y, n = left.shape[1:], right.shape[2], len(right_index)
    kernel = Kernel(x, d, y, str(left.dtype), str(right.dtype), side_by_side, *_vector_registers())
    with _lock:
        _register(kernel)
    shape = (x, n * y) if side_by_side else (n, x, y)
    call = jax.ffi.ffi_call(kernel.name, jax.ShapeDtypeStruct(shape, jnp.float32))
    return call(left, left_index.astype(jnp.int32), right, right_index.astype(jnp.int32))


def is_usable() -> bool:
    """Whether the installed XLA takes the kernel. The first call tries it, and logs a warning if it does not."""
    with _lock:
        return _try_smallest()


@functools.cache
def _try_smallest() -> bool:
    try:
        _register(Kernel(1, 1, 4, "float32", "float32", False, *_vector_registers()))
    except (UnknownInterfaceError, jax.errors.JaxRuntimeError) as error:
        log.warning(
            "the kernel for CPUs does not fit the installed jaxlib %s, and XLA's own products, which are slower, take "
            "its place: %s",
            jaxlib.__version__,
            error,
        )
        return False
    return True


@functools.cache
def _register(kernel: Kernel) -> None:
    """Compiles a kernel and makes it known to XLA by its name.

    Raises:
      UnknownInterfaceError: the installed XLA calls functions in a way that `handler.ll` does not know.
      JaxRuntimeError: XLA refuses a handler of this version.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    handler = Template(HANDLER.read_text(encoding="utf-8")).substitute(
        read_interface(),
        name=kernel.name,
        cores=cores,
        target_items=ITEMS_PER_CORE * cores,
        max_products_per_item=kernel.max_products_per_item,
        row_blocks=kernel.row_blocks,
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
def _vector_registers() -> tuple[int, int]:
    """How many float32 numbers a vector register of this CPU holds, and how many such registers there are."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    features = llvm.get_host_cpu_features()
    if features.get("avx512f"):
        return 16, 32
    if features.get("avx2"):
        return 8, 16
    return 4, 16 if "sse2" in features else 32
