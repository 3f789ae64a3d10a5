"""The decoder's block: one pure function for every family, for training, decoding, attention matching and bias folding.

What is special about a family is data (`spec.py`): which arrays a layer has, its activation and its norms. How tokens
see each other is up to `attend`, which each driver brings.

Axis letters: b batch, t query, l layer, d model width, n query heads, k kv heads, h head size, f mlp width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import einops
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from cartridges_jax.models.config import LayerSettings, ModelConfig
from cartridges_jax.models.rope import frequencies
from cartridges_jax.models.spec import FAMILIES, ArraySpec, fused_arrays, layer_arrays
from cartridges_jax.models.weights import Weight, weight_of
from cartridges_jax.parallel import collectives

Rope = tuple[Float[Array, "b t h/2"], Float[Array, "b t h/2"]]  # cosine and sine
# attend(q_btnh, k_btkh, v_btkh) -> (o_btnh, whatever the driver wants back from this layer)
Attend = Callable[[Array, Array, Array], tuple[Array, Any]]
QUERIES_KEYS_VALUES = {"q": "btd,dnh->btnh", "k": "btd,dkh->btkh", "v": "btd,dkh->btkh"}
ACTIVATIONS = {"silu": jax.nn.silu, "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True)}


def layer_of(arrays: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    """One layer of the parameters as `block` takes it: arrays of all the width, and matrices that multiply."""
    layer = {}
    for array in layer_arrays(config):
        gathered = functools.partial(collectives.all_gather_fsdp, spec=P(*array.mesh_axes))
        whole = jax.tree.map(gathered, arrays[array.name])
        layer[array.name] = weight_of(whole) if array.summed else whole
    return layer


def decode_layer(arrays: Mapping[str, Any], config: ModelConfig) -> dict[str, Array]:
    """One layer of the parameters in the decode layout: dense, with outputs first, those of one matrix side by side.

    Of the kv heads it has those that this device's query heads read.
    """
    layer = layer_of(arrays, config)

    def outputs_first(array: ArraySpec) -> Array:
        axes = array.axes.split()
        value = layer[array.name].array if array.summed else layer[array.name]
        if "k" in axes:
            value = collectives.local_kv_heads(value, config, axis=axes.index("k"))
        return einops.rearrange(value, f"{array.axes} -> {array.outputs_first}")

    def beside_each_other(arrays: Sequence[ArraySpec]) -> Array:
        parts = [outputs_first(array) for array in arrays]
        return jnp.concatenate(parts) if len(parts) > 1 else parts[0]

    return {name: beside_each_other(arrays) for name, arrays in fused_arrays(config).items()}


def block(
    layer: Mapping[str, Any], x_btd: Float[Array, "b t d"], rope: Rope | None, attend: Attend, config: ModelConfig
) -> tuple[Float[Array, "b t d"], Any]:
    """Runs one layer (`layer_of`) and gives its output, and beside it what `attend` gives beside the heads' outputs.

    A norm that the layer does not have changes nothing, so that there may be two of the states, or four, and of the
    heads none. Without `rope`, rotating queries and keys is up to `attend`.
    """

    def normed(name: str, x: Array) -> Array:
        return norm(x, layer[name], config) if name in layer else x

    def biased(name: str, product: Array) -> Array:
        return product + layer[f"{name}_bias"] if f"{name}_bias" in layer else product

    y_btd = collectives.copy_to_tp(normed("attention_norm", x_btd))
    q_btnh, k_btkh, v_btkh = map(biased, "qkv", _queries_keys_values(layer, y_btd, config))
    q_btnh, k_btkh = normed("q_norm", q_btnh), normed("k_norm", k_btkh)
    if rope is not None:
        q_btnh, k_btkh = rotate(q_btnh, rope), rotate(k_btkh, rope)
    o_btnh, extra = attend(q_btnh, k_btkh, v_btkh)
    o_btd = collectives.reduce_from_tp(layer["o"].matmul(o_btnh, "btnh,nhd->btd"))
    x_btd = x_btd + normed("attention_post_norm", o_btd)
    y_btd = collectives.copy_to_tp(normed("mlp_norm", x_btd))
    gate_btf, up_btf = _gate_and_up(layer, y_btd)
    y_btf = ACTIVATIONS[FAMILIES[config.family].activation](gate_btf) * up_btf
    y_btd = collectives.reduce_from_tp(layer["down"].matmul(y_btf, "btf,fd->btd"))
    return x_btd + normed("mlp_post_norm", y_btd), extra


def _queries_keys_values(layer: Mapping[str, Any], y_btd: Array, config: ModelConfig) -> Sequence[Array]:
    if "qkv" not in layer:
        return [layer[name].matmul(y_btd, spec) for name, spec in QUERIES_KEYS_VALUES.items()]
    heads = layer["qkv"].matmul(y_btd, "btd,dnh->btnh")  # side by side, in the decode layout
    k = collectives.num_local_kv_heads(config)
    return jnp.split(heads, (heads.shape[2] - 2 * k, heads.shape[2] - k), axis=2)


def _gate_and_up(layer: Mapping[str, Any], y_btd: Array) -> Sequence[Array]:
    if "gate_up" not in layer:
        return [layer[name].matmul(y_btd, "btd,df->btf") for name in ("gate", "up")]
    return jnp.split(layer["gate_up"].matmul(y_btd, "btd,df->btf"), 2, axis=2)


def embedded(table: Weight, tokens: Int[Array, "*b"], config: ModelConfig) -> Float[Array, "*b d"]:
    """Looks tokens up in the embedding, which some families scale."""
    x = table.lookup(tokens)
    if not FAMILIES[config.family].scales_embedding:
        return x
    return x * jnp.asarray(config.embed_dim**0.5, x.dtype)


def rope_table(positions: Int[Array, "b t"], settings: LayerSettings, head_dim: int) -> Rope:
    """Computes cosines and sines of the rotation at each position, in float32, for layers of these settings."""
    angles_bth = positions[..., None].astype(jnp.float32) * frequencies(settings, head_dim)
    return jnp.cos(angles_bth), jnp.sin(angles_bth)


def rotate(x_btnh: Float[Array, "b t n h"], rope: Rope) -> Float[Array, "b t n h"]:
    """Rotates halves, not interleaved pairs: the layout of Hugging Face's checkpoints."""
    cos, sin = (table[:, :, None] for table in rope)
    first, second = jnp.split(_wide(x_btnh), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_btnh.dtype)


def norm(x: Float[Array, "*b d"], weights: Float[Array, " d"], config: ModelConfig) -> Float[Array, "*b d"]:
    """Norms states as the family does it."""
    offset = FAMILIES[config.family].norm_offset
    return rms_norm(x, weights + offset if offset else weights, config.norm_eps)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(x: Float[Array, "*b d"], scale: Float[Array, " d"], eps: float) -> Float[Array, "*b d"]:
    """Divides by the root of the mean square and multiplies by the scale, which is frozen: it gets no gradient."""
    x_float = _wide(x)
    return (x_float * _inverse_rms(x_float, eps)).astype(x.dtype) * scale


def _wide(x: Float[Array, "*b"]) -> Float[Array, "*b"]:
    return x.astype(jnp.promote_types(jnp.float32, x.dtype))


def _inverse_rms(x: Float[Array, "*b d"], eps: float) -> Float[Array, "*b 1"]:
    return jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + eps)


def _rms_norm_backward(eps: float, saved: tuple[Array, Array], gradient: Array) -> tuple[Array, None]:
    x, scale = saved
    x_float, gradient = _wide(x), _wide(gradient * scale)
    inverse = _inverse_rms(x_float, eps)
    # a product of two: autodiff sums one of three, which XLA:CPU does ten times slower
    mean = jnp.einsum("...d,...d->...", gradient, x_float)[..., None] / x.shape[-1]
    return (inverse * (gradient - x_float * inverse**2 * mean)).astype(x.dtype), None


rms_norm.defvjp(lambda x, scale, eps: (rms_norm(x, scale, eps), (x, scale)), _rms_norm_backward)
