"""The model as serving runs it: over pages, a few tokens of each request at a time.

The same mathematics as `models.transformer.Block`, laid out for a CPU, where a step is bound by reading the weights:
q, k and v in one matrix and gate and up in another, output features first, times activations whose columns are tokens.
For one token that is half as slow again as the machine's memory, and for sixteen no slower than any other order
(`benchmarks/engine.md`). Layers are unrolled: a scanned stack would be copied at every step.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from cartridges_jax import collectives, sharding
from cartridges_jax.kernels.prefix_decode_attention import Pages, Plan, prefix_decode_attention
from cartridges_jax.models.config import ModelConfig
from cartridges_jax.models.transformer import Params, Rope, rms_norm, rope_tables, rotate

Weights = dict[str, Any]  # "embed", "head" (if it is not tied), "final_norm", and "layers": a dict of arrays for each


def rearranged(params: Params, config: ModelConfig, mesh: Mesh) -> Weights:
    """The weights as `forward` takes them, on the mesh's devices; the model's own can be let go of."""
    ends = _ends({name: leaf for name, leaf in params.items() if name != "blocks"}, mesh)
    layers = [_rearranged_layer(params["blocks"], i, config, mesh) for i in range(config.num_layers)]
    return {**ends, "layers": layers}


@functools.partial(jax.jit, static_argnames="mesh")
def _ends(ends: Params, mesh: Mesh) -> Params:
    def local(ends: Params) -> Params:
        return {name: collectives.whole(leaf, sharding.WEIGHTS[name]) for name, leaf in ends.items()}

    in_specs = (sharding.fitted(ends, {name: sharding.WEIGHTS[name] for name in ends}, mesh),)
    return sharding.on_mesh(local, mesh, in_specs, {name: sharding.DECODER[name] for name in ends})(ends)


@functools.partial(jax.jit, static_argnames=("config", "mesh"))
def _rearranged_layer(blocks: Params, i: Int[Array, ""], config: ModelConfig, mesh: Mesh) -> Params:
    def local(blocks: Params, i: Int[Array, ""]) -> Params:
        block = collectives.whole_layer(jax.tree.map(lambda leaf: leaf[i], blocks))
        heads = {name: block[name] for name in ("k", "v")}
        biases = {name: leaf for name, leaf in block.items() if name in ("k_bias", "v_bias")}
        block |= collectives.own_heads(heads, config, axis=1) | collectives.own_heads(biases, config, axis=0)

        def rows(*names: str) -> Array:
            return jnp.concatenate([block[name].reshape(config.embed_dim, -1) for name in names], axis=1).T

        layer = {"qkv": rows("q", "k", "v"), "gate_up": rows("gate", "up"), "down": block["down"].T}
        layer["o"] = block["o"].reshape(-1, config.embed_dim).T
        if config.qkv_bias:
            layer["qkv_bias"] = jnp.concatenate([block[name] for name in ("q_bias", "k_bias", "v_bias")])
        return layer | {name: leaf for name, leaf in block.items() if name.endswith("norm")}

    names = {"qkv", "gate_up", "down", "o"} | ({"qkv_bias"} if config.qkv_bias else set())
    names |= {name for name in blocks if name.endswith("norm")}
    in_specs = (sharding.fitted(blocks, sharding.WEIGHTS["blocks"], mesh), P())
    out_specs = {name: sharding.DECODER["layers"][name] for name in names}
    return sharding.on_mesh(local, mesh, in_specs, out_specs)(blocks, i)


def forward(
    weights: Weights,
    cache: list[Pages],
    tokens: Int[Array, "b t"],
    positions: Int[Array, "b t"],
    page: Int[Array, "b t"],
    place: Int[Array, "b t"],
    plan: Plan,
    config: ModelConfig,
) -> tuple[Float[Array, "d m"], list[Pages]]:
    """Final, normed hidden states of the tokens as columns, m = b t; keys and values are written to the cache.

    Args:
      page, place: where each token's keys and values go; a page that does not exist means nowhere.
      plan: who sees which page, these tokens' own included.
    """
    rope = rope_tables(positions, config)
    x_dm = collectives.lookup(weights["embed"], tokens.reshape(-1)).T
    written = []
    for layer, pages in zip(weights["layers"], cache, strict=True):
        x_dm, pages = _block(layer, pages, x_dm, rope, positions, page, place, plan, config)
        written.append(pages)
    return _normed(x_dm, weights["final_norm"], config), written


@functools.partial(jax.jit, static_argnames="config")  # one jit inside another: traced once, not for every layer
def _block(
    layer: Params,
    pages: Pages,
    x_dm: Array,
    rope: Rope,
    positions: Array,
    page: Array,
    place: Array,
    plan: Plan,
    config: ModelConfig,
) -> tuple[Array, Pages]:
    q, k, v = _queries_keys_values(layer, x_dm, (*positions.shape, pages.bias.shape[1]), config)
    q, k = rotate(q, rope), rotate(k, rope)
    pages = pages._replace(
        keys=pages.keys.at[page, :, :, place].set(k.astype(pages.keys.dtype), mode="drop"),
        values=pages.values.at[page, :, place].set(v.astype(pages.values.dtype), mode="drop"),
        bias=pages.bias.at[page, :, place].set(0, mode="drop"),
    )
    o_btnh = prefix_decode_attention(q, positions, pages, plan)
    x_dm = x_dm + collectives.joined(project(layer["o"], o_btnh.reshape(x_dm.shape[1], -1).T))
    gate_fm, up_fm = jnp.split(project(layer["gate_up"], _normed(x_dm, layer["mlp_norm"], config)), 2)
    return x_dm + collectives.joined(project(layer["down"], jax.nn.silu(gate_fm) * up_fm)), pages


def logits(weights: Weights, hidden: Float[Array, "d m"]) -> Float[Array, "m v"]:
    """In float32."""
    # turned round first: asked to do it in one, XLA multiplies in an order that is ten times slower on a CPU
    head_vd = weights.get("head", weights["embed"])
    hidden_md = jax.lax.optimization_barrier(hidden.astype(head_vd.dtype).T)
    logits_mv = jnp.einsum("md,vd->mv", hidden_md, head_vd, preferred_element_type=jnp.float32)
    return collectives.whole_vocabulary(logits_mv)


def project(weight_od: Array, x_dm: Array) -> Array:
    """Multiplied in the weight's dtype, added up in float32."""
    y_om = jnp.einsum("od,dm->om", weight_od, x_dm.astype(weight_od.dtype), preferred_element_type=jnp.float32)
    return y_om.astype(x_dm.dtype)


def _queries_keys_values(
    layer: Params, x_dm: Array, shape_btk: tuple[int, int, int], config: ModelConfig
) -> tuple[Array, Array, Array]:
    """Of this device's heads."""
    *shape, k = shape_btk
    n = layer["qkv"].shape[0] // config.head_dim - 2 * k
    # turned round afterwards: asked to do it in one, XLA multiplies in an order that is several times slower on a CPU
    qkv_om = jax.lax.optimization_barrier(project(layer["qkv"], _normed(x_dm, layer["attention_norm"], config)))
    heads_btoh = qkv_om.T.reshape(*shape, n + 2 * k, config.head_dim)
    if config.qkv_bias:
        heads_btoh = heads_btoh + layer["qkv_bias"]
    q, k, v = jnp.split(heads_btoh, (n, n + k), axis=2)
    if config.qk_norm:
        q, k = rms_norm(q, layer["q_norm"], config.norm_eps), rms_norm(k, layer["k_norm"], config.norm_eps)
    return q, k, v


def _normed(x_dm: Array, scale_d: Array, config: ModelConfig) -> Array:
    x_float = x_dm.astype(jnp.float32)
    inverse_m = jax.lax.rsqrt(jnp.mean(x_float**2, axis=0) + config.norm_eps)
    return (x_float * inverse_m).astype(x_dm.dtype) * scale_d[:, None]
