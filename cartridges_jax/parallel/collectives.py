"""What a program on a mesh communicates, and nothing else does (`sharding.on_mesh`).

The model's code is that of a single device but for these words, which on one device return what they are given:

- `whole`: a weight's parts of `fsdp`, gathered where a layer needs them, in the forward and again in the backward pass;
- `split` before weights that `tensor` splits: nothing, and on the way back the sum of the parts' gradients;
- `joined` behind such weights: the sum of the parts, and on the way back nothing;
- `over_rows`: sums over the rows of all devices, of loss and gradients, once a step;
- `whole_vocabulary`: logits of which every device has a part, once a step of decoding.

Gradients are taken inside such a program, never through it: `split` and `joined` would be counted twice.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from cartridges_jax.parallel.sharding import AXES, ROWS, WEIGHTS

if TYPE_CHECKING:
    from cartridges_jax.models.config import ModelConfig


def whole(weight: Array, spec: P) -> Array:
    """A frozen weight with all of its width; `spec` is that of the array as it is here."""
    if _size("fsdp") == 1 or "fsdp" not in spec:
        return weight
    return jax.lax.all_gather(weight, "fsdp", axis=tuple(spec).index("fsdp"), tiled=True)


def whole_layer(layer_params: dict[str, Array]) -> dict[str, Array]:
    """One layer's weights with all of their width."""
    return {name: whole(leaf, P(*tuple(WEIGHTS["blocks"][name])[1:])) for name, leaf in layer_params.items()}


def split(x: Array) -> Array:
    return x if _size("tensor") == 1 else _split(x)


def joined(x: Array) -> Array:
    return x if _size("tensor") == 1 else _joined(x)


@jax.custom_vjp
def _split(x: Array) -> Array:
    return x


_split.defvjp(lambda x: (x, None), lambda _, gradient: (jax.lax.psum(gradient, "tensor"),))


@jax.custom_vjp
def _joined(x: Array) -> Array:
    return jax.lax.psum(x, "tensor")


_joined.defvjp(lambda x: (jax.lax.psum(x, "tensor"), None), lambda _, gradient: (gradient,))


def over_rows(tree: Any) -> Any:
    return _over(ROWS, tree)


def gradient_over_rows(gradient: Any, config: ModelConfig) -> Any:
    """Of the cartridge. Where every device holds all of its heads, each has the gradient of those that it reads."""
    copied = config.num_kv_heads % _size("tensor") != 0
    return _over(AXES if copied else ROWS, gradient)


def own_heads(tree: Any, config: ModelConfig, axis: int) -> Any:
    """Of arrays of kv heads, those that this device's query heads read; an equal number of those share each."""
    parts = _size("tensor")
    if config.num_kv_heads % parts == 0:
        return tree  # `tensor` splits them, and queries lie with their keys
    queries, group = config.num_heads // parts, config.num_heads // config.num_kv_heads
    count = own_kv_heads(config)
    first = jax.lax.axis_index("tensor") * queries
    heads = (first + queries // count * jnp.arange(count)) // group
    return jax.tree.map(lambda array: jnp.take(array, heads, axis=axis), tree)


def own_kv_heads(config: ModelConfig) -> int:
    """How many `own_heads` gives a device."""
    parts = _size("tensor")
    if config.num_kv_heads % parts == 0:
        return config.num_kv_heads // parts
    queries = config.num_heads // parts
    # as many neighbours read one kv head, wherever a device's queries begin
    return queries // math.gcd(queries, config.num_heads // config.num_kv_heads)


def lookup(table: Float[Array, "v d"], ids: Int[Array, "*b"]) -> Float[Array, "*b d"]:
    """Rows of a table whose rows lie over `tensor`."""
    if _size("tensor") == 1:
        return table[ids]
    own, here = own_ids(ids, table.shape[0])
    return joined(jnp.where(here[..., None], table[own], 0))


def picked(logits: Float[Array, "c v"], ids: Int[Array, "c j"]) -> Float[Array, "c j"]:
    """The logits of `ids`, of a vocabulary that lies over `tensor`."""
    if _size("tensor") == 1:
        return jnp.take_along_axis(logits, ids, axis=-1)
    own, here = own_ids(ids, logits.shape[-1])
    return joined(jnp.where(here, jnp.take_along_axis(logits, own, axis=-1), 0))


def log_sum_exp(logits: Float[Array, "c v"]) -> Float[Array, " c"]:
    """Over a vocabulary that lies over `tensor`."""
    if _size("tensor") == 1:
        return jax.nn.logsumexp(logits, axis=-1)
    top_c = jax.lax.pmax(jax.lax.stop_gradient(logits.max(-1)), "tensor")
    return top_c + jnp.log(joined(jnp.exp(logits - top_c[:, None]).sum(-1)))


def own_ids(ids: Int[Array, "*b"], part: int) -> tuple[Int[Array, "*b"], Bool[Array, "*b"]]:
    """Ids within this device's `part` of the vocabulary, and which of them lie in it; the others become 0."""
    if _size("tensor") == 1:
        return ids, jnp.ones_like(ids, bool)
    own = ids - jax.lax.axis_index("tensor") * part
    here = (own >= 0) & (own < part)
    return jnp.where(here, own, 0), here


def vocabulary(part: int) -> int:
    """Size of a vocabulary of which a device holds `part`."""
    return part * _size("tensor")


def whole_vocabulary(logits: Float[Array, "c part"]) -> Float[Array, "c v"]:
    """The logits of all devices, beside each other on all of them."""
    return logits if _size("tensor") == 1 else jax.lax.all_gather(logits, "tensor", axis=1, tiled=True)


def most(count: Int[Array, ""]) -> Int[Array, ""]:
    """The largest of the devices' counts: a loop that communicates must turn equally often on all of them."""
    axes = tuple(axis for axis in AXES if _size(axis) > 1)
    return jax.lax.pmax(count, axes) if _size("tensor") > 1 else count


def _over(axes: tuple[str, ...], tree: Any) -> Any:
    axes = tuple(axis for axis in axes if _size(axis) > 1)
    return jax.lax.psum(tree, axes) if axes else tree


def _size(axis: str) -> int:
    """Of the mesh that the program being traced runs on (`on_mesh`); outside of one, 1."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.shape[axis] if axis in mesh.manual_axes else 1
