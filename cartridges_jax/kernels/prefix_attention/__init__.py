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
      segment_ids: which packed conversation a position belongs to, those of one side by side; 0 is padding.
      bias: a log-weight added to each slot's score (arXiv 2602.16284); none means zero.
      implementation: "reference", "xla", or None for the fastest.

    Raises:
      ValueError: an unknown implementation, or shapes that do not belong together.
    """
    b, t, n, h = q.shape
    kv_heads, p = k.shape[2], prefix_k.shape[0]
    expected = [(b, t, kv_heads, h), (b, t, kv_heads, h), (p, kv_heads, h), (p, kv_heads, h), (b, t), (p, kv_heads)]
    given = [k.shape, v.shape, prefix_k.shape, prefix_v.shape, segment_ids.shape]
    given += [(p, kv_heads) if bias is None else bias.shape]
    if n % kv_heads or given != expected:
        raise ValueError(
            f"queries {q.shape}, keys {k.shape}, values {v.shape}, slots {prefix_k.shape} and {prefix_v.shape}, "
            f"segment ids {segment_ids.shape} and bias {None if bias is None else bias.shape} do not belong together: "
            "expected [b,t,n,h], twice [b,t,k,h], twice [p,k,h], [b,t] and [p,k] with n a multiple of k"
        )
    name = implementation or "xla"
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"implementation is {name!r}, expected one of {', '.join(IMPLEMENTATIONS)}")
    return IMPLEMENTATIONS[name](q, k, v, prefix_k, prefix_v, segment_ids, bias)
