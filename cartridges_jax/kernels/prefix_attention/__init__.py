"""`prefix_attention`: one softmax over a cartridge's slots and the causal segment (design §5).

One file per implementation; `None` picks the fastest that supports the call, a name that cannot run here raises.
"""

from __future__ import annotations

from jaxtyping import Array, Float, Int

from cartridges_jax.kernels.prefix_attention.reference import reference_attention
from cartridges_jax.kernels.prefix_attention.xla import xla_attention

IMPLEMENTATIONS = {"reference": reference_attention, "xla": xla_attention}


def prefix_attention(
    q: Float[Array, "b t n h"],
    k: Float[Array, "b t k h"],
    v: Float[Array, "b t k h"],
    prefix_k: Float[Array, "p k h"],
    prefix_v: Float[Array, "p k h"],
    segment_ids: Int[Array, "b t"],
    bias: Float[Array, "p k"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "b t n h"]:
    """Each query attends to all p slots and, causally, to the keys of its own segment (arXiv 2506.06266 §3).

    Args:
      q, k, v: of the rows, already rotated; n is a multiple of k (grouped queries).
      prefix_k, prefix_v: the cartridge's slots in this layer, shared by the whole batch; p may be 0.
      segment_ids: which packed conversation a position belongs to; 0 is padding.
      bias: a log-weight added to each slot's score (arXiv 2602.16284); none means zero.
      implementation: "reference", "xla", or None for the fastest.

    Raises:
      ValueError: an unknown implementation, or shapes that do not belong together.
    """
    if q.shape[2] % k.shape[2] or prefix_k.shape[1:] != k.shape[2:] or prefix_k.shape != prefix_v.shape:
        raise ValueError(
            f"queries {q.shape}, keys {k.shape} and slots {prefix_k.shape}, {prefix_v.shape} do not belong together: "
            "expected [b,t,n,h], [b,t,k,h] and twice [p,k,h] with n a multiple of k"
        )
    name = implementation or "xla"
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"implementation is {name!r}, expected one of {', '.join(IMPLEMENTATIONS)}")
    return IMPLEMENTATIONS[name](q, k, v, prefix_k, prefix_v, segment_ids, bias)
