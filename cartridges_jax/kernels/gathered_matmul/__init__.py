"""`gathered_matmul` multiplies many pairs of matrices, of which each names one of a left and one of a right list.

This is what decoding multiplies: a request's queries by each page of keys that it sees, and activations by each of
the panels into which a weight is cut. XLA would first copy the matrices that are named, and on a CPU it would wait for
memory and for arithmetic one after the other; the kernel for CPUs does neither (`docs/cpu_kernel.md`). On other
platforms, and where the kernel cannot run, XLA multiplies.
"""

from __future__ import annotations

import sys

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from cartridges_jax import kernels
from cartridges_jax.command_line.errors import UserError

DTYPES = (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16))  # those that the kernel multiplies


def gathered_matmul(
    left: Float[Array, "i x d"],
    left_index: Int[Array | np.ndarray, " n"],
    right: Float[Array, "j d y"],
    right_index: Int[Array | np.ndarray, " n"],
    *,
    side_by_side: bool = False,
) -> Float[Array, "n x y"] | Float[Array, "x n*y"]:
    """Computes the n products `left[left_index] @ right[right_index]` in float32.

    Args:
      left: i matrices of x rows and d columns.
      left_index: which left matrix each product has.
      right: j matrices of d rows and y columns.
      right_index: which right matrix each product has; the product of -1 is zero. No other index is checked, here or
        on the left: one that does not exist gives any result or reads memory that it should not.
      side_by_side: gives one matrix [x, n*y], in which the products stand from left to right, and not a list [n, x, y].

    Raises:
      UserError: shapes that do not belong together.
    """
    if left.shape[2] != right.shape[1] or len(left_index) != len(right_index):
        raise UserError(
            f"left matrices {left.shape}, of {left_index.shape}, and right ones {right.shape}, of {right_index.shape}, "
            "do not belong together: expected [i,x,d], [n], [j,d,y] and [n]"
        )
    is_supported = left.dtype in DTYPES and right.dtype in DTYPES and right.shape[2] % 4 == 0
    if is_supported and has_kernel(kernels.platform()):
        from cartridges_jax.kernels.gathered_matmul.cpu import cpu_matmul

        return cpu_matmul(left, left_index, right, right_index, side_by_side)
    products = jnp.einsum("nxd,ndy->nxy", left[left_index], right[right_index], preferred_element_type=jnp.float32)
    products = jnp.where(jnp.asarray(right_index >= 0)[:, None, None], products, 0)
    return products.swapaxes(0, 1).reshape(left.shape[1], -1) if side_by_side else products


def has_kernel(platform: str) -> bool:
    """Whether there is a kernel for the platform ("cpu", "gpu" or "tpu") that runs on this machine."""
    if platform != "cpu" or sys.platform == "win32":
        return False
    # imported when used: LLVM is needed on a CPU only
    from cartridges_jax.kernels.gathered_matmul import cpu

    return cpu.is_usable()
