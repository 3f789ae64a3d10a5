"""One decoder for every family. NNX modules say what a parameter is; plain pytrees of arrays travel (design §4).

A block is one function of (x, rope, attend): the drivers differ in `attend`. Training scans the stacked blocks together
with the cartridge's layers. Serving has the same block in the order that a CPU decodes fastest (`serving/decoder.py`).

Axis letters: b batch, t query, s key, p prefix slot, l layer, d model width, n query heads, k kv heads, h head size,
f mlp width, v vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from cartridges_jax.kernels.prefix_attention import prefix_attention
from cartridges_jax.models.config import ModelConfig
from cartridges_jax.models.quantization import dequantized
from cartridges_jax.parallel import collectives
from cartridges_jax.parallel.sharding import WEIGHTS

Params = dict[str, Any]
Rope = tuple[Float[Array, "b t h/2"], Float[Array, "b t h/2"]]  # cosine and sine
Remat = Literal["layers", "elementwise"]  # what the backward pass computes again
SAVED = {"layers": ("attention",), "elementwise": ("attention", "projection")}  # what it finds, beside a layer's input
# attend(q_btnh, k_btkh, v_btkh) -> (o_btnh, whatever the driver wants back from this layer)
Attend = Callable[[Array, Array, Array], tuple[Array, Any]]


def _weight(*shape: int) -> nnx.Param:
    return nnx.Param(jnp.zeros(shape))


class Block(nnx.Module):
    def __init__(self, config: ModelConfig):
        d, n, k, h, f = config.embed_dim, config.num_heads, config.num_kv_heads, config.head_dim, config.mlp_dim
        self.config = config
        self.attention_norm, self.mlp_norm = _weight(d), _weight(d)
        self.q, self.k, self.v, self.o = _weight(d, n, h), _weight(d, k, h), _weight(d, k, h), _weight(n, h, d)
        self.gate, self.up, self.down = _weight(d, f), _weight(d, f), _weight(f, d)
        if config.qkv_bias:
            self.q_bias, self.k_bias, self.v_bias = _weight(n, h), _weight(k, h), _weight(k, h)
        if config.qk_norm:
            self.q_norm, self.k_norm = _weight(h), _weight(h)

    def __call__(self, x_btd: Array, rope: Rope, attend: Attend) -> tuple[Array, Any]:
        eps = self.config.norm_eps
        y_btd = collectives.copy_to_tp(rms_norm(x_btd, self.attention_norm[...], eps))
        q_btnh = project("btd,dnh->btnh", y_btd, self.q[...])
        k_btkh = project("btd,dkh->btkh", y_btd, self.k[...])
        v_btkh = project("btd,dkh->btkh", y_btd, self.v[...])
        if self.config.qkv_bias:
            q_btnh, k_btkh = q_btnh + self.q_bias[...], k_btkh + self.k_bias[...]
            v_btkh = v_btkh + self.v_bias[...]
        if self.config.qk_norm:
            q_btnh, k_btkh = rms_norm(q_btnh, self.q_norm[...], eps), rms_norm(k_btkh, self.k_norm[...], eps)
        o_btnh, extra = attend(rotate(q_btnh, rope), rotate(k_btkh, rope), v_btkh)
        x_btd = x_btd + collectives.reduce_from_tp(project("btnh,nhd->btd", o_btnh, self.o[...]))
        y_btd = collectives.copy_to_tp(rms_norm(x_btd, self.mlp_norm[...], eps))
        y_btf = jax.nn.silu(project("btd,df->btf", y_btd, self.gate[...])) * project("btd,df->btf", y_btd, self.up[...])
        return x_btd + collectives.reduce_from_tp(project("btf,fd->btd", y_btf, self.down[...])), extra


class Decoder(nnx.Module):
    """Blocks hold arrays with a leading layer axis. The head is [v, d], like the embedding it may be tied to."""

    def __init__(self, config: ModelConfig):
        self.embed = _weight(config.vocab_size, config.embed_dim)
        self.blocks = nnx.vmap(lambda _: Block(config))(jnp.arange(config.num_layers))
        self.final_norm = _weight(config.embed_dim)
        if not config.tie_embeddings:
            self.head = _weight(config.vocab_size, config.embed_dim)


@functools.cache
def _split(config: ModelConfig) -> tuple[Any, Params, Any]:
    decoder_def, state = nnx.split(nnx.eval_shape(lambda: Decoder(config)))
    block_def, _ = nnx.split(nnx.eval_shape(lambda: Block(config)))
    return decoder_def, nnx.to_pure_dict(state), block_def


def abstract_params(config: ModelConfig) -> Params:
    """The parameters' names and shapes, as `jax.ShapeDtypeStruct`s: what the loaders fill and check against."""
    return jax.tree.map(lambda leaf: leaf, _split(config)[1])


def block_of(config: ModelConfig, layer_params: Params) -> Block:
    """A block over one layer's arrays: for `jax.lax.scan` bodies and for unrolled decoding."""
    return nnx.merge(_split(config)[2], collectives.all_gather_layer(dequantized(layer_params)))


def init_params(config: ModelConfig, key: Array, dtype: Any = jnp.float32) -> Params:
    """Random weights with the variance of a trained model: for tests and benchmarks."""
    leaves, tree = jax.tree.flatten_with_path(abstract_params(config))

    def draw(path: Any, leaf: jax.ShapeDtypeStruct, key: Array) -> Array:
        if "norm" in jax.tree_util.keystr(path):
            return jnp.ones(leaf.shape, dtype)
        return (jax.random.normal(key, leaf.shape) * 0.05).astype(dtype)

    keys = jax.random.split(key, len(leaves))
    return jax.tree.unflatten(tree, [draw(p, leaf, k) for (p, leaf), k in zip(leaves, keys, strict=True)])


def hidden_states(
    params: Params,
    tokens: Int[Array, "b t"],
    segment_ids: Int[Array, "b t"],
    positions: Int[Array, "b t"],
    prefix_k: Float[Array, "l p k h"],
    prefix_v: Float[Array, "l p k h"],
    prefix_bias: Float[Array, "l p k"] | None = None,
    *,
    config: ModelConfig,
    implementation: str | None = None,
    remat: Remat = "layers",
) -> Float[Array, "b t d"]:
    """The final, normed hidden states; token i of a segment is rotated at position p + i (design §3)."""
    rope = rope_tables(positions + prefix_k.shape[1], config)

    def layer(x_btd: Array, scanned: tuple[Params, Array, Array, Array | None]) -> tuple[Array, None]:
        layer_params, prefix_k_pkh, prefix_v_pkh, bias_pk = scanned

        def attend(q: Array, k: Array, v: Array) -> tuple[Array, None]:
            k, v = collectives.local_kv_heads((k, v), config, axis=2)
            *slots, bias = collectives.local_kv_heads((prefix_k_pkh, prefix_v_pkh, bias_pk), config, axis=1)
            return prefix_attention(q, k, v, *slots, segment_ids, bias, implementation), None

        return block_of(config, layer_params)(x_btd, rope, attend)

    policy = jax.checkpoint_policies.save_only_these_names(*SAVED[remat])
    body = jax.checkpoint(layer, prevent_cse=False, policy=policy)
    x_btd, _ = jax.lax.scan(body, embedded(params, tokens), (params["blocks"], prefix_k, prefix_v, prefix_bias))
    return rms_norm(x_btd, params["final_norm"], config.norm_eps)


def keys_and_values(
    params: Params, tokens: Int[Array, " t"], *, config: ModelConfig
) -> tuple[Float[Array, "l t k h"], Float[Array, "l t k h"]]:
    """The rotated keys and the values of one text at positions 0…t-1: what a prefill would put into the cache."""
    tokens_1t = tokens[None]
    segment_ids_1t = jnp.ones_like(tokens_1t)
    rope = rope_tables(jnp.arange(tokens.shape[0])[None], config)

    def layer(x_1td: Array, layer_params: Params) -> tuple[Array, tuple[Array, Array]]:
        def attend(q: Array, k: Array, v: Array) -> tuple[Array, tuple[Array, Array]]:
            own_k, own_v = collectives.local_kv_heads((k, v), config, axis=2)
            none_pkh = jnp.zeros((0, *own_k.shape[2:]), k.dtype)
            return prefix_attention(q, own_k, own_v, none_pkh, none_pkh, segment_ids_1t), (k[0], v[0])

        return block_of(config, layer_params)(x_1td, rope, attend)

    return jax.lax.scan(layer, embedded(params, tokens_1t), params["blocks"])[1]


def project(spec: str, x: Array, weight: Array) -> Array:
    """`einsum(spec, x, weight)` with a frozen weight: multiplied in the weight's dtype, added up in float32.

    The backward pass does the same with the gradient. Left to autodiff, it would multiply a float32 gradient by a
    bfloat16 weight, which no hardware does at the speed of two bfloat16s. No gradient flows to the weight.
    """
    return checkpoint_name(_project(spec, x, weight), "projection")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _project(spec: str, x: Array, weight: Array) -> Array:
    wide = jnp.promote_types(jnp.float32, weight.dtype)
    return jnp.einsum(spec, x.astype(weight.dtype), weight, preferred_element_type=wide).astype(x.dtype)


def _project_backward(spec: str, weight: Array, gradient: Array) -> tuple[Array, None]:
    x, rest = spec.split(",")
    w, y = rest.split("->")
    return _project(f"{y},{w}->{x}", gradient, weight), None


_project.defvjp(lambda spec, x, weight: (_project(spec, x, weight), weight), _project_backward)


def embedded(params: Params, tokens: Int[Array, "b t"]) -> Float[Array, "b t d"]:
    return collectives.embedding_lookup(collectives.all_gather_fsdp(params["embed"], WEIGHTS["embed"]), tokens)


def head_weights(params: Params) -> Float[Array, "v d"]:
    return collectives.all_gather_fsdp(params.get("head", params["embed"]), WEIGHTS["head"])


def rope_tables(positions: Int[Array, "b t"], config: ModelConfig) -> Rope:
    """Cosines and sines of the rotation at each position, in float32."""
    half = config.head_dim // 2
    frequencies_h = config.rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if config.rope_factors:
        frequencies_h = frequencies_h / jnp.asarray(config.rope_factors, jnp.float32)
    angles_bth = positions[..., None].astype(jnp.float32) * frequencies_h
    return jnp.cos(angles_bth), jnp.sin(angles_bth)


def rotate(x_btnh: Float[Array, "b t n h"], rope: Rope) -> Float[Array, "b t n h"]:
    """RoPE on halves, not on interleaved pairs: the layout of Hugging Face's checkpoints."""
    cos, sin = (table[:, :, None] for table in rope)
    first, second = jnp.split(_wide(x_btnh), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_btnh.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(x: Float[Array, "*b d"], scale: Float[Array, " d"], eps: float) -> Float[Array, "*b d"]:
    """No gradient flows to the scale: it is frozen."""
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
