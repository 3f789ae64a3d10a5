"""The communication between the devices of a mesh, all of it written out here; it happens inside `sharding.on_mesh`.

The model's code is that of a single device, with these calls in it. On one device each returns what it was given:

- `all_gather_fsdp` gathers a weight that `fsdp` splits, where a layer needs it; the backward pass gathers it again.
- `copy_to_tp` stands before weights that `tensor` splits. It does nothing, but its backward pass sums the gradients.
- `reduce_from_tp` stands behind such weights. It sums the devices' parts, and its backward pass does nothing.
- `sum_over_rows` sums loss and gradients over the rows of all devices, once a step.
- `all_gather_vocab` gathers logits, of which each device has computed a part, once a step of decoding.

Gradients have to be taken inside the program that runs on the mesh, since a gradient through `copy_to_tp` and
`reduce_from_tp` from outside would be counted twice.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from cartridges_jax.parallel.sharding import AXES, ROWS

if TYPE_CHECKING:
    from cartridges_jax.models.config import ModelConfig


def all_gather_fsdp(weight: Array, spec: P) -> Array:
    """Returns a frozen weight with its full width; `spec` says how the array, as it is given, lies on the mesh."""
    if _size("fsdp") == 1 or "fsdp" not in spec:
        return weight
    return jax.lax.all_gather(weight, "fsdp", axis=tuple(spec).index("fsdp"), tiled=True)


@jax.custom_vjp
def copy_to_tp(x: Array) -> Array:
    """Returns x; in the backward pass, sums its gradient over the devices of `tensor`."""
    return x


copy_to_tp.defvjp(lambda x: (x, None), lambda _, gradient: (_sum_over(("tensor",), gradient),))


@jax.custom_vjp
def reduce_from_tp(x: Array) -> Array:
    """Sums x over the devices of `tensor`; in the backward pass, hands the gradient on as it is."""
    return _sum_over(("tensor",), x)


reduce_from_tp.defvjp(lambda x: (_sum_over(("tensor",), x), None), lambda _, gradient: (gradient,))


def sum_over_rows(tree: Any) -> Any:
    """Sums every array over the devices that hold different rows of the batch."""
    return _sum_over(ROWS, tree)


def sum_gradient_over_rows(gradient: Any, config: ModelConfig) -> Any:
    """Sums the gradient of the cartridge over the rows of the batch."""
    # Where `tensor` cannot split the kv heads, every device holds all of them and has the gradient of those only that
    # its query heads read: then the sum goes over `tensor` too.
    copied = config.num_kv_heads % _size("tensor") != 0
    return _sum_over(AXES if copied else ROWS, gradient)


def local_kv_heads(tree: Any, config: ModelConfig, axis: int) -> Any:
    """Takes the kv heads that this device's query heads read, an equal number of those each, from arrays of all."""
    parts = _size("tensor")
    if config.num_kv_heads % parts == 0:
        return tree  # `tensor` splits them, and queries lie with their keys
    heads = jnp.asarray(kv_heads_by_device(config, parts))[jax.lax.axis_index("tensor")]
    return jax.tree.map(lambda array: jnp.take(array, heads, axis=axis), tree)


def num_local_kv_heads(config: ModelConfig) -> int:
    """Returns how many kv heads `local_kv_heads` takes for a device."""
    return kv_heads_by_device(config, _size("tensor")).shape[1]


def kv_heads_by_device(config: ModelConfig, parts: int) -> Int[np.ndarray, "parts k"]:
    """Returns the kv heads that the query heads of each of so many devices read, an equal number of those each."""
    queries, group = config.num_heads // parts, config.num_heads // config.num_kv_heads
    # so many neighbouring query heads share a kv head, wherever a device's first one stands
    shared = math.gcd(queries, group)
    return (np.arange(parts)[:, None] * queries + np.arange(0, queries, shared)) // group


def embedding_lookup(table: Float[Array, "v d"], ids: Int[Array, "*b"]) -> Float[Array, "*b d"]:
    """Returns the rows `ids` of a table whose rows are split over `tensor`."""
    if _size("tensor") == 1:
        return table[ids]
    local, here = local_token_ids(ids, table.shape[0])
    return reduce_from_tp(jnp.where(here[..., None], table[local], 0))


def gather_logits(logits: Float[Array, "c v"], ids: Int[Array, "c j"]) -> Float[Array, "c j"]:
    """Returns the logits of `ids` where the vocabulary is split over `tensor`."""
    if _size("tensor") == 1:
        return jnp.take_along_axis(logits, ids, axis=-1)
    local, here = local_token_ids(ids, logits.shape[-1])
    return reduce_from_tp(jnp.where(here, jnp.take_along_axis(logits, local, axis=-1), 0))


def log_sum_exp(logits: Float[Array, "c v"]) -> Float[Array, " c"]:
    """Returns the log of the sum of exponentials over a vocabulary that is split over `tensor`."""
    if _size("tensor") == 1:
        return jax.nn.logsumexp(logits, axis=-1)
    max_c = jax.lax.pmax(jax.lax.stop_gradient(logits.max(-1)), "tensor")
    return max_c + jnp.log(reduce_from_tp(jnp.exp(logits - max_c[:, None]).sum(-1)))


def local_token_ids(ids: Int[Array, "*b"], part: int) -> tuple[Int[Array, "*b"], Bool[Array, "*b"]]:
    """Turns ids into indices into this device's `part` of the vocabulary, and says which lie in it; others become 0."""
    if _size("tensor") == 1:
        return ids, jnp.ones_like(ids, bool)
    local = ids - jax.lax.axis_index("tensor") * part
    here = (local >= 0) & (local < part)
    return jnp.where(here, local, 0), here


def vocab_size(part: int) -> int:
    """Returns the size of a vocabulary of which each device holds `part`."""
    return part * _size("tensor")


def all_gather_vocab(logits: Float[Array, "c part"]) -> Float[Array, "c v"]:
    """Gathers the logits of all devices of `tensor`, so that each has those of the whole vocabulary."""
    return logits if _size("tensor") == 1 else jax.lax.all_gather(logits, "tensor", axis=1, tiled=True)


def max_over_devices(count: Int[Array, ""]) -> Int[Array, ""]:
    """Returns the largest count of any device: a loop that communicates must run equally often on all of them."""
    axes = tuple(axis for axis in AXES if _size(axis) > 1)
    return jax.lax.pmax(count, axes) if _size("tensor") > 1 else count


def _sum_over(axes: tuple[str, ...], tree: Any) -> Any:
    axes = tuple(axis for axis in axes if _size(axis) > 1)
    return jax.lax.psum(tree, axes) if axes else tree


def _size(axis: str) -> int:
    """Returns the size of an axis of the mesh that the program being traced runs on, and 1 outside of `on_mesh`."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.shape[axis] if axis in mesh.manual_axes else 1
