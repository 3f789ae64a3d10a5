"""`gathered_matmul`: products of matrices that stand in two lists, each pair named by its places in them.

What decoding multiplies is of this form: a request's queries by one of the pages that it sees, and activations by one
of the panels into which a weight is cut. XLA would copy what it gathers, and on a CPU it waits for memory and for
arithmetic one after the other; the kernel there does neither (`benchmarks/engine.md`). Elsewhere it is XLA's.
"""

from __future__ import annotations

import sys

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from cartridges_jax import kernels
from cartridges_jax.command_line.errors import UserError

DTYPES = (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16))  # of the kernel


def gathered_matmul(
    left: Float[Array, "i x d"],
    left_of: Int[Array | np.ndarray, " n"],
    right: Float[Array, "j d y"],
    right_of: Int[Array | np.ndarray, " n"],
    *,
    side_by_side: bool = False,
) -> Float[Array, "n x y"] | Float[Array, "x n*y"]:
    """`left[left_of] @ right[right_of]`, in float32.

    Args:
      left_of, right_of: which two matrices make each product, zero if there is no right one (-1). Other places that
        do not exist are not noticed.
      side_by_side: puts the products' rows behind one another, as those of one large product.

    Raises:
      UserError: shapes that do not belong together.
    """
    if left.shape[2] != right.shape[1] or len(left_of) != len(right_of):
        raise UserError(
            f"left matrices {left.shape}, of {left_of.shape}, and right ones {right.shape}, of {right_of.shape}, do "
            "not belong together: expected [i,x,d], [n], [j,d,y] and [n]"
        )
    is_supported = left.dtype in DTYPES and right.dtype in DTYPES and right.shape[2] % 4 == 0
    if is_supported and has_kernel(kernels.platform()):
        # imported when used: LLVM is needed on a CPU only
        from cartridges_jax.kernels.gathered_matmul.cpu import cpu_matmul

        return cpu_matmul(left, left_of, right, right_of, side_by_side)
    products = jnp.einsum("nxd,ndy->nxy", left[left_of], right[right_of], preferred_element_type=jnp.float32)
    products = jnp.where(jnp.asarray(right_of >= 0)[:, None, None], products, 0)
    return products.swapaxes(0, 1).reshape(left.shape[1], -1) if side_by_side else products


def has_kernel(platform: str) -> bool:
    return platform == "cpu" and sys.platform != "win32"
