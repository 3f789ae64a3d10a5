"""The frozen base in int8: weights only, with a scale for each output channel; they are multiplied as before.

A layer's weights become floating point again where the layer runs, in the scan, so that one layer of them exists at a
time. Embedding, head and norms stay as they are.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

from cartridges_jax.command_line.errors import UserError
from cartridges_jax.parallel import sharding

if TYPE_CHECKING:
    from cartridges_jax.models.language_model import LanguageModel

# axes of the stacked weights that a multiplication sums over: behind them, a channel has one scale
SUMMED = {"q": (1,), "k": (1,), "v": (1,), "o": (1, 2), "gate": (1,), "up": (1,), "down": (1,)}
LARGEST = 127


@flax.struct.dataclass
class Quantized:
    """values * scale, in `dtype`."""

    values: Int8[Array, "*shape"]
    scale: Float[Array, "*channels"]  # of size 1 on the axes that are summed over
    dtype: Any = flax.struct.field(pytree_node=False)


def quantized(model: LanguageModel) -> LanguageModel:
    """The model with its layers' matrices in int8: a quarter of float32's memory, half of bfloat16's.

    Raises:
      UserError: the weights are spread over several devices.
    """
    if sharding.mesh_of(model.params).size > 1:
        raise UserError("quantization is 'int8' and the weights lie on several devices: use one, or no quantization")
    blocks = {
        name: _quantize(leaf, axes=SUMMED[name]) if name in SUMMED else leaf
        for name, leaf in model.params["blocks"].items()
    }
    return dataclasses.replace(model, params=model.params | {"blocks": blocks})


def dequantized(layer_params: dict[str, Any]) -> dict[str, Array]:
    """One layer's weights as they are multiplied."""
    return {name: _widened(leaf) if isinstance(leaf, Quantized) else leaf for name, leaf in layer_params.items()}


def _widened(leaf: Quantized) -> Array:
    # the barrier keeps XLA from widening all layers at once, before the scan
    values, scale = jax.lax.optimization_barrier((leaf.values, leaf.scale))
    return (values.astype(jnp.float32) * scale).astype(leaf.dtype)


@functools.partial(jax.jit, static_argnames="axes")
def _quantize(weight: Array, *, axes: tuple[int, ...]) -> Quantized:
    wide = weight.astype(jnp.float32)
    scale = jnp.maximum(jnp.abs(wide).max(axes, keepdims=True), 1e-30) / LARGEST
    return Quantized(jnp.round(wide / scale).astype(jnp.int8), scale, weight.dtype)
