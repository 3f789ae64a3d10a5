"""Matrices of the frozen model, in any format: each is a small pytree that multiplies, and nobody asks which it is.

`Dense` is an array as it is; `Int8` and `Fp8` hold small numbers and a scale for each output channel; `Panels` is the
layout that a CPU reads fastest while it decodes. In a model's parameters, a plain array stands for a dense matrix.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from cartridges_jax.command_line.errors import UserError
from cartridges_jax.models.spec import layer_arrays
from cartridges_jax.parallel import collectives, sharding

if TYPE_CHECKING:
    from cartridges_jax.models.language_model import LanguageModel

Format = Literal["int8", "fp8"]


@flax.struct.dataclass
class Dense:
    array: Array
    axes: str | None = flax.struct.field(pytree_node=False, default=None)  # their order here; None: as a product says

    def matmul(self, x: Array, spec: str) -> Array:
        """Gives `einsum(spec, x, weight)` in the dtype of x, without a gradient for the weight, which is frozen.

        It is multiplied in the weight's dtype and added up in float32, and so is the gradient for x. Left to autodiff,
        the backward pass would multiply a float32 gradient by a bfloat16 weight, which no hardware does at the speed
        of two bfloat16s.
        """
        if self.axes is not None:
            operand, _, result = spec.replace("->", ",").split(",")
            spec = f"{operand},{self.axes}->{result}"
        return checkpoint_name(_matmul(spec, x, self.array), "projection")

    def lookup(self, ids: Int[Array, "*b"]) -> Float[Array, "*b d"]:
        """Gives the rows of `ids`, of a table [v, d]."""
        return collectives.embedding_lookup(self.array, ids)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul(spec: str, x: Array, weight: Array) -> Array:
    wide = jnp.promote_types(jnp.float32, weight.dtype)
    return jnp.einsum(spec, x.astype(weight.dtype), weight, preferred_element_type=wide).astype(x.dtype)


def _matmul_backward(spec: str, weight: Array, gradient: Array) -> tuple[Array, None]:
    x, rest = spec.split(",")
    w, y = rest.split("->")
    return _matmul(f"{y},{w}->{x}", gradient, weight), None


_matmul.defvjp(lambda spec, x, weight: (_matmul(spec, x, weight), weight), _matmul_backward)


@flax.struct.dataclass
class _Scaled:
    """values * scale, in `dtype`. They become floating point again where they are multiplied: in a scan, by layers."""

    values: Array
    scale: Float[Array, "*channels"]  # of size 1 on the axes that a product sums over
    dtype: Any = flax.struct.field(pytree_node=False)

    STORED: ClassVar[Any]
    LARGEST: ClassVar[float]

    @classmethod
    def of(cls, weight: Array, axes: tuple[int, ...]) -> Self:
        """Makes it of an array; every output channel's largest entry becomes the largest number of the format."""
        wide = weight.astype(jnp.float32)
        scale = jnp.maximum(jnp.abs(wide).max(axes, keepdims=True), 1e-30) / cls.LARGEST
        return cls(cls._rounded(wide / scale), scale, weight.dtype)

    @classmethod
    def _rounded(cls, scaled: Array) -> Array:
        return scaled.astype(cls.STORED)

    @property
    def array(self) -> Array:
        # the barrier keeps XLA from widening all layers at once, before the scan
        values, scale = jax.lax.optimization_barrier((self.values, self.scale))
        return (values.astype(jnp.float32) * scale).astype(self.dtype)

    def matmul(self, x: Array, spec: str) -> Array:
        """Multiplies as `Dense` does, in `dtype`."""
        return Dense(self.array).matmul(x, spec)


@flax.struct.dataclass
class Int8(_Scaled):
    STORED, LARGEST = jnp.int8, 127

    @classmethod
    def _rounded(cls, scaled: Array) -> Array:
        return jnp.round(scaled).astype(jnp.int8)


@flax.struct.dataclass
class Fp8(_Scaled):
    STORED, LARGEST = jnp.float8_e4m3fn, 448


@flax.struct.dataclass
class Panels:
    """A matrix [o, i] in panels of outputs that stand side by side, for each input: for the CPU's kernel.

    It may be one of a stack, whose layers' matrices the kernel reads where they lie (`of_layer`).
    """

    SIZE: ClassVar[int] = 16  # outputs of a panel

    panels: Float[Array, "*l o/16 i 16"]
    layer: Int[Array, ""] | None = None
    shape: tuple[int, ...] = flax.struct.field(pytree_node=False, default=())  # of the outputs' axes but the first

    @classmethod
    def of(cls, weight: Float[Array, "*o *i"], num_inputs: int = 1) -> Self:
        """Makes it of an array whose last `num_inputs` axes a product sums over."""
        outputs, inputs = weight.shape[:-num_inputs], weight.shape[-num_inputs:]
        return cls(weight.reshape(-1, cls.SIZE, math.prod(inputs)).swapaxes(1, 2), shape=outputs[1:])

    def of_layer(self, layer: Int[Array, ""]) -> Self:
        """The matrix of one layer, of a stack of them."""
        return self.replace(layer=layer)

    def matmul(self, x: Float[Array, "*b *i"], spec: str) -> Float[Array, "*b *o"]:
        """Multiplies in float32, whatever the panels are kept in; the result has the dtype of x."""
        # imported when used: only decoding on a CPU multiplies panels
        from cartridges_jax.kernels.gathered_matmul import gathered_matmul

        operand, axes, result = spec.replace("->", ",").split(",")
        rows = x.shape[: len(set(operand) - set(axes))]
        assert operand[: len(rows)] == result[: len(rows)], f"{spec}: what is summed stands last"
        count, i, y = self.panels.shape[-3:]
        own = np.arange(count, dtype=np.int32)
        own = own if self.layer is None else self.layer * count + own
        x_1mi, first = x.reshape(1, -1, i), np.zeros(count, np.int32)
        y_mo = gathered_matmul(x_1mi, first, self.panels.reshape(-1, i, y), own, side_by_side=True)
        return y_mo.astype(x.dtype).reshape(*rows, -1, *self.shape)

    def lookup(self, ids: Int[Array, "*b"]) -> Float[Array, "*b d"]:
        """Gives the rows of `ids`, of a table [v, d]."""
        own, here = collectives.local_token_ids(ids, self.panels.shape[0] * self.SIZE)
        rows = self.panels[own // self.SIZE, :, own % self.SIZE]
        return collectives.reduce_from_tp(jnp.where(here[..., None], rows, 0))


Weight = Dense | Int8 | Fp8 | Panels
FORMATS: dict[str, type[Int8] | type[Fp8]] = {"int8": Int8, "fp8": Fp8}


def weight_of(leaf: Any) -> Weight:
    """The matrix that stands in the parameters, as something that multiplies."""
    return leaf if isinstance(leaf, Weight) else Dense(leaf)


def quantized(model: LanguageModel, format: Format) -> LanguageModel:
    """The model with its layers' matrices in a format of 8 bits: half of bfloat16's memory, a quarter of float32's.

    Embedding, head and norms stay as they are.

    Raises:
      UserError: the weights are spread over several devices.
    """
    if sharding.mesh_of(model.params).size > 1:
        raise UserError(
            f"quantization is {format!r} and the weights lie on several devices: use one, or no quantization"
        )
    make = jax.jit(FORMATS[format].of, static_argnums=1)
    small = {
        array.name: make(model.params["blocks"][array.name], tuple(1 + i for i in array.summed_axes))
        for array in layer_arrays(model.config)
        if array.summed
    }
    blocks = model.params["blocks"] | small
    return dataclasses.replace(model, params=model.params | {"blocks": blocks})
