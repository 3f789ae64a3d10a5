"""`prefix_decode_attention`: a step of decoding, for requests that share cartridges and have caches of their own.

Requests of one cartridge form a group, whose queries meet the slots in one product, so that a step reads a cartridge
once however many requests use it. Each request's own cache is read beside it, and the two partial softmaxes merge by
their maxima and sums. Arrays lie as serving keeps them: heads first, then positions.

Axis letters beyond the README's: r requests, c cartridges on the device, e the places of a group.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from cartridges_jax.kernels.prefix_attention.blockwise import MASKED


class Shared(NamedTuple):
    """The cartridges of one layer, filled up to one length, and who uses them."""

    keys: Float[Array, "c k p h"]
    values: Float[Array, "c k p h"]
    bias: Float[Array, "c k p"]  # log-weights of the slots; zero for none
    lengths: Int[Array, " c"]  # slots that are in use
    members: Int[Array, "c e"]  # each cartridge's requests, a request in one group at most; r or more where none is


def prefix_decode_attention(
    q: Float[Array, "r t n h"],
    keys: Float[Array, "r k s h"],
    values: Float[Array, "r k s h"],
    lengths: Int[Array, " r"],
    shared: Shared,
    implementation: str | None = None,
    window: int | None = None,
) -> Float[Array, "r t n h"]:
    """The last t tokens of each request attend to its cartridge's slots and, causally, to its own cache.

    Args:
      q: of the last t tokens, rotated; t is 1 for plain decoding. n is a multiple of k.
      keys, values: each request's cache, rotated, the t tokens' own included; without its cartridge.
      lengths: positions of the cache that are filled, so that query i stands at lengths - t + i.
      shared: the cartridges. A request that is in no group has none.
      implementation: "reference" (each request alone), "xla" (by groups), or None for the fastest.
      window: how many of its own positions a query sees, its own included; none means all.

    Raises:
      ValueError: an unknown implementation, or shapes that do not belong together.
    """
    r, _, n, h = q.shape
    c, kv_heads, p = shared.bias.shape
    own, slots = (r, kv_heads, keys.shape[2], h), (c, kv_heads, p, h)
    given = [keys.shape, values.shape, lengths.shape, shared.keys.shape, shared.values.shape, shared.lengths.shape]
    if n % kv_heads or given != [own, own, (r,), slots, slots, (c,)] or shared.members.shape[0] != c:
        raise ValueError(
            f"queries {q.shape}, caches {keys.shape} and {values.shape} of lengths {lengths.shape}, cartridges "
            f"{shared.keys.shape}, {shared.values.shape} and {shared.bias.shape} of lengths {shared.lengths.shape} and "
            f"members {shared.members.shape} do not belong together: expected [r,t,n,h], twice [r,k,s,h], [r], twice "
            "[c,k,p,h], [c,k,p], [c] and [c,e] with n a multiple of k"
        )
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"implementation is {implementation!r}, expected one of {', '.join(IMPLEMENTATIONS)}")
    return IMPLEMENTATIONS[implementation or "xla"](q, keys, values, lengths, shared, window)


def _by_group(q: Array, keys: Array, values: Array, lengths: Array, shared: Shared, window: int | None) -> Array:
    r, t, n, h = q.shape
    c, e = shared.members.shape
    kv_heads = keys.shape[1]
    q_rkmh = (q * h**-0.5).reshape(r, t, kv_heads, -1, h).transpose(0, 2, 1, 3, 4).reshape(r, kv_heads, -1, h)
    m = q_rkmh.shape[2]
    visible_rst = _visible(lengths, t, keys.shape[2], window).transpose(0, 2, 1)
    visible_r1sm = jnp.repeat(visible_rst, m // t, axis=2)[:, None]
    own = _partial(q_rkmh, keys, values, jnp.where(visible_r1sm, 0.0, MASKED))
    # a group's queries lie side by side; zeros where there is no request
    q_cekmh = q_rkmh.at[shared.members].get(mode="fill", fill_value=0)
    q_ckxh = q_cekmh.transpose(0, 2, 1, 3, 4).reshape(c, kv_heads, e * m, h)
    in_use_c1p = (jnp.arange(shared.bias.shape[2]) < shared.lengths[:, None])[:, None]
    bias_ckp1 = jnp.where(in_use_c1p, shared.bias, MASKED)[..., None]
    of_groups = _partial(q_ckxh, shared.keys, shared.values, bias_ckp1)
    slots = []
    for of_group, alone in zip(of_groups, (MASKED, 0.0, 0.0), strict=True):
        of_group = of_group.reshape(c, kv_heads, e, m, *of_group.shape[3:]).swapaxes(1, 2)
        nobody = jnp.full((r, *of_group.shape[2:]), alone)
        slots.append(nobody.at[shared.members].set(of_group, mode="drop"))
    o_rkmh = _merged(own, tuple(slots))
    return o_rkmh.reshape(r, kv_heads, t, -1, h).transpose(0, 2, 1, 3, 4).reshape(r, t, n, h).astype(q.dtype)


def _partial(q_rkmh: Array, keys_rksh: Array, values_rksh: Array, bias: Array) -> tuple[Array, Array, Array]:
    """The scores' maximum [r,k,m], and relative to it the sum of weights [r,k,m] and of weighted values [r,k,m,h].

    Scores lie as [s, m]: keys are then read once, along their rows.
    """
    scores_rksm = jnp.einsum("rksh,rkmh->rksm", keys_rksh, q_rkmh, preferred_element_type=jnp.float32) + bias
    top_rkm = scores_rksm.max(2, initial=MASKED)
    weights_rksm = jnp.exp(scores_rksm - top_rkm[:, :, None])
    weighed = weights_rksm.astype(values_rksh.dtype)
    o_rkmh = jnp.einsum("rksm,rksh->rkmh", weighed, values_rksh, preferred_element_type=jnp.float32)
    return top_rkm, weights_rksm.sum(2), o_rkmh


def _merged(*parts: tuple[Array, Array, Array]) -> Float[Array, "r k m h"]:
    """One softmax of several partial ones."""
    top_rkm = functools.reduce(jnp.maximum, (top for top, _, _ in parts))
    shares = [jnp.exp(top - top_rkm) for top, _, _ in parts]
    total_rkm = sum(share * total for share, (_, total, _) in zip(shares, parts, strict=True))
    o_rkmh = sum(share[..., None] * o for share, (_, _, o) in zip(shares, parts, strict=True))
    return o_rkmh / total_rkm[..., None]


def _alone(q: Array, keys: Array, values: Array, lengths: Array, shared: Shared, window: int | None) -> Array:
    """The definition: each request with a copy of its cartridge, one dense softmax in the inputs' own precision."""
    r, t, n, h = q.shape
    kv_heads, p = keys.shape[1], shared.bias.shape[2]
    is_member_rc = (shared.members == jnp.arange(r)[:, None, None]).any(-1)
    cartridge_r = jnp.argmax(is_member_rc, axis=1)
    used_rp = is_member_rc.any(1)[:, None] & (jnp.arange(p) < shared.lengths[cartridge_r][:, None])
    visible_rts = _visible(lengths, t, keys.shape[2], window)
    seen_rts = jnp.concatenate([jnp.broadcast_to(used_rp[:, None], (r, t, p)), visible_rts], axis=2)
    keys_rksh = jnp.concatenate([shared.keys[cartridge_r].astype(keys.dtype), keys], axis=2)
    values_rksh = jnp.concatenate([shared.values[cartridge_r].astype(values.dtype), values], axis=2)
    bias_rks = jnp.pad(shared.bias[cartridge_r].astype(q.dtype), ((0, 0), (0, 0), (0, keys.shape[2])))
    q_rtkgh = q.reshape(r, t, kv_heads, n // kv_heads, h)
    scores_rkgts = jnp.einsum("rtkgh,rksh->rkgts", q_rtkgh, keys_rksh) * h**-0.5 + bias_rks[:, :, None, None]
    weights_rkgts = jax.nn.softmax(jnp.where(seen_rts[:, None, None], scores_rkgts, -jnp.inf), axis=-1)
    return jnp.einsum("rkgts,rksh->rtkgh", weights_rkgts, values_rksh).reshape(r, t, n, h)


def _visible(lengths: Int[Array, " r"], t: int, s: int, window: int | None) -> Bool[Array, "r t s"]:
    position_rt = lengths[:, None] - t + jnp.arange(t)
    visible_rts = jnp.arange(s) <= position_rt[..., None]
    return visible_rts if window is None else visible_rts & (jnp.arange(s) > position_rt[..., None] - window)


IMPLEMENTATIONS = {"reference": _alone, "xla": _by_group}
