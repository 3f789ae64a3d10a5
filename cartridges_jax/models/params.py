"""The parameters of a model as a pytree, made from the table of its arrays (`spec.py`): a dict of arrays, by name.

"embed", "final_norm" and, unless it is tied, "head" stand beside "blocks", whose arrays have a leading layer axis.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from cartridges_jax.models.config import ModelConfig
from cartridges_jax.models.spec import FAMILIES, ArraySpec, end_arrays, fused_arrays, layer_arrays

Params = dict[str, Any]


class Decoder(nnx.Module):
    """The parameters as a module of Flax NNX. It is split before anything runs: a plain pytree travels."""

    def __init__(self, config: ModelConfig):
        for array in end_arrays(config):
            setattr(self, array.name, nnx.Param(jnp.zeros(array.shape(config))))
        self.blocks = nnx.Dict(
            {
                array.name: nnx.Param(jnp.zeros((config.num_layers, *array.shape(config))))
                for array in layer_arrays(config)
            }
        )


@functools.cache
def _abstract(config: ModelConfig) -> Params:
    return nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: Decoder(config))))


def abstract_params(config: ModelConfig) -> Params:
    """The parameters' names and shapes, as `jax.ShapeDtypeStruct`s: what the loaders fill and check against."""
    return jax.tree.map(lambda leaf: leaf, _abstract(config))


def init_params(config: ModelConfig, key: Array, dtype: Any = jnp.float32) -> Params:
    """Random weights with the variance of a trained model: for tests and benchmarks."""
    ones = {array.name for array in (*end_arrays(config), *layer_arrays(config)) if array.init == "ones"}
    leaves, tree = jax.tree.flatten_with_path(abstract_params(config))

    def draw(path: Any, leaf: jax.ShapeDtypeStruct, key: Array) -> Array:
        if path[-1].key in ones:
            return jnp.full(leaf.shape, 1 - FAMILIES[config.family].norm_offset, dtype)
        return (jax.random.normal(key, leaf.shape) * 0.05).astype(dtype)

    keys = jax.random.split(key, len(leaves))
    return jax.tree.unflatten(tree, [draw(p, leaf, k) for (p, leaf), k in zip(leaves, keys, strict=True)])


def weight_specs(config: ModelConfig) -> Params:
    """How the parameters lie on the mesh."""
    blocks = {array.name: P(None, *array.mesh_axes) for array in layer_arrays(config)}
    return {array.name: P(*array.mesh_axes) for array in end_arrays(config)} | {"blocks": blocks}


def decode_specs(config: ModelConfig) -> dict[str, Any]:
    """How weights in the decode layout lie on the mesh: outputs first, with all of the width on every device.

    Panels have the same axes as what they are cut from: outputs, then what is summed. Layers are stacked.
    """

    def of(array: ArraySpec) -> P:
        if not array.summed:
            return P(*array.mesh_axes[:1])
        split = {axis for axis, name in zip(array.axes.split(), array.mesh_axes, strict=True) if name == "tensor"}
        summed = set(array.summed.split())
        return P("tensor" if split - summed else None, "tensor" if split & summed else None)

    layers = {name: P(None, *of(arrays[0])) for name, arrays in fused_arrays(config).items()}
    return {array.name: of(array) for array in end_arrays(config)} | {"layers": layers}
