"""`prefix_attention` is attention with one softmax over a cartridge's slots and the keys of the query's own segment.

Each implementation is a file of its name. Tests hold all of them to `reference`.
"""

from __future__ import annotations

import importlib

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from cartridges_jax import kernels
from cartridges_jax.command_line.errors import UserError

IMPLEMENTATIONS = ("reference", "xla", "tpu", "gpu")
KERNELS = ("tpu", "gpu")  # written in Pallas, each for the platform of its name
HAVE_RUN: tuple[str, ...] = ()  # those of them that have been measured where they run, and so may be the default there
HEAD_SIZES = (64, 128, 256)  # those that the kernels take


def prefix_attention(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b t k h"],
    v: Float[Array, "b t k h"],
    prefix_k: Float[Array, "p k h"],
    prefix_v: Float[Array, "p k h"],
    segment_ids: Int[Array, "b t"],
    bias: Float[Array, "p k"] | None = None,
    implementation: str | None = None,
    window: int | Array | None = None,
    scale: float | Array | None = None,
    soft_cap: float | None = None,
    sinks: Float[Array, " n"] | None = None,
    lengths: Int[Array, " k"] | None = None,
) -> Float[Array, "b t n h"]:
    """Each query attends to all p slots and, causally, to the keys of its own segment (arXiv 2506.06266 §3).

    Scores, softmax and sums are in float32, whatever the dtype of q, k and v; a kernel multiplies float32 arrays as
    precisely as the platform's own products do (`jax.default_matmul_precision`).

    Args:
      q, k, v: queries, keys and values of the rows, already rotated; n is a multiple of k (grouped queries).
      prefix_k, prefix_v: keys and values of the cartridge's slots in this layer, which all rows share; p may be 0.
      segment_ids: which of the conversations packed into a row a position belongs to; each conversation's positions
        stand side by side, and 0 is padding.
      bias: a log-weight added to each slot's score (arXiv 2602.16284); None means zero.
      implementation: "reference", "xla", "tpu", "gpu", or None for the fastest that supports the call and has been
        measured here.
      window: how many keys of its segment a query sees, its own included; None means all. Slots are always seen.
      scale: what a query's products with the keys are multiplied by; None means h**-0.5.
      soft_cap: what no score may exceed before its bias: cap * tanh(score / cap); None means no limit.
      sinks: for each query head, the score of one more key, which has no value; frozen, it gets no gradient.
      lengths: how many of the p slots each kv head has, from 0 to p; None means all. What stands in the others, which
        may be any number, NaN too, is not seen and gets a gradient of zero. Only blocks that hold slots of a head are
        computed, so that a call costs about what the sum of the lengths costs; one program serves all lengths.

    Returns:
      The weighted values of each query, in the dtype of q.

    Raises:
      UserError: an unknown implementation or one that cannot run here, a window below 1, or shapes that do not belong
        together.
    """
    b, t, n, h = q.shape
    kv_heads, p = k.shape[2], prefix_k.shape[0]
    expected = [(b, t, kv_heads, h), (b, t, kv_heads, h), (p, kv_heads, h), (p, kv_heads, h), (b, t), (p, kv_heads)]
    expected.append((kv_heads,))
    given = [k.shape, v.shape, prefix_k.shape, prefix_v.shape, segment_ids.shape]
    given += [(p, kv_heads) if bias is None else bias.shape, (kv_heads,) if lengths is None else lengths.shape]
    if n % kv_heads or given != expected:
        raise UserError(
            f"queries {q.shape}, keys {k.shape}, values {v.shape}, slots {prefix_k.shape} and {prefix_v.shape}, "
            f"segment ids {segment_ids.shape}, bias {None if bias is None else bias.shape} and lengths "
            f"{None if lengths is None else lengths.shape} do not belong together: expected [b,t,n,h], twice "
            "[b,t,k,h], twice [p,k,h], [b,t], [p,k] and [k] with n a multiple of k"
        )
    if isinstance(window, int) and window < 1:
        raise UserError(f"window is {window}, expected at least 1 key, or None for all of the segment")
    extras = {"soft_cap": soft_cap, "sinks": sinks}
    lacking = [option for option, value in extras.items() if value is not None]
    name = _choice(implementation, h, {q.dtype, k.dtype, v.dtype}, lacking)
    scale = h**-0.5 if scale is None else scale
    # imported when used: Pallas takes a while, and only one platform's is ever needed
    module = importlib.import_module(f"{__name__}.{name}")
    attention = getattr(module, f"{name}_attention")
    options = {} if name in KERNELS else extras
    return attention(q, k, v, prefix_k, prefix_v, segment_ids, bias, lengths, window, scale, **options)


def _choice(implementation: str | None, h: int, dtypes: set[jnp.dtype], lacking: list[str]) -> str:
    """Gives the name of the implementation that was asked for, if it can run here, or of the fastest that can.

    The kernels do not have the options that are `lacking`.
    """
    platform = kernels.platform()
    supported = h in HEAD_SIZES and dtypes in ({jnp.dtype(jnp.bfloat16)}, {jnp.dtype(jnp.float32)})
    if implementation is None:
        return platform if platform in HAVE_RUN and supported and not lacking else "xla"
    if implementation not in IMPLEMENTATIONS:
        raise UserError(f"implementation is {implementation!r}, expected one of {', '.join(IMPLEMENTATIONS)}")
    if implementation in KERNELS and lacking:
        raise UserError(
            f"implementation is {implementation!r}, which has no {' and no '.join(lacking)}: expected None, for the "
            "fastest that does"
        )
    if implementation in KERNELS and not (implementation == platform and supported):
        raise UserError(
            f"implementation is {implementation!r}, which needs a {implementation}, head size 64, 128 or 256, and rows "
            f"that are all in bfloat16 or all in float32; here are {platform}, head size {h} and "
            f"{', '.join(sorted(map(str, dtypes)))}: expected None, for the fastest that can run here"
        )
    return implementation
