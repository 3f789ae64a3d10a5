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
from jaxtyping import Array, Float, Int

from cartridges_jax.kernels.prefix_decode_attention import Pages, Plan, prefix_decode_attention
from cartridges_jax.models.config import ModelConfig
from cartridges_jax.models.transformer import Params, Rope, rms_norm, rope_tables, rotate

Weights = dict[str, Any]  # "embed", "head", "final_norm", and "layers": a dict of arrays for each


def rearranged(params: Params, config: ModelConfig) -> Weights:
    """The weights as `forward` takes them: a copy, so that the model's own can be let go of."""
    layers = [_rearranged_layer(params["blocks"], i, config) for i in range(config.num_layers)]
    embed, head = jnp.copy(params["embed"]), params.get("head")
    return {
        "embed": embed,
        "head": embed if head is None else jnp.copy(head),
        "final_norm": jnp.copy(params["final_norm"]),
        "layers": layers,
    }


@functools.partial(jax.jit, static_argnames="config")
def _rearranged_layer(blocks: Params, i: Int[Array, ""], config: ModelConfig) -> Params:
    block = jax.tree.map(lambda leaf: leaf[i], blocks)

    def rows(*names: str) -> Array:
        return jnp.concatenate([block[name].reshape(config.embed_dim, -1) for name in names], axis=1).T

    layer = {"qkv": rows("q", "k", "v"), "gate_up": rows("gate", "up"), "down": block["down"].T}
    layer["o"] = block["o"].reshape(-1, config.embed_dim).T
    if config.qkv_bias:
        layer["qkv_bias"] = jnp.concatenate([block[name] for name in ("q_bias", "k_bias", "v_bias")])
    return layer | {name: leaf for name, leaf in block.items() if name.endswith("norm")}


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
    x_dm = weights["embed"][tokens.reshape(-1)].T
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
    q, k, v = _queries_keys_values(layer, x_dm, positions.shape, config)
    q, k = rotate(q, rope), rotate(k, rope)
    pages = pages._replace(
        keys=pages.keys.at[page, :, :, place].set(k.astype(pages.keys.dtype), mode="drop"),
        values=pages.values.at[page, :, place].set(v.astype(pages.values.dtype), mode="drop"),
        bias=pages.bias.at[page, :, place].set(0, mode="drop"),
    )
    o_btnh = prefix_decode_attention(q, positions, pages, plan)
    x_dm = x_dm + project(layer["o"], o_btnh.reshape(x_dm.shape[1], -1).T)
    gate_fm, up_fm = jnp.split(project(layer["gate_up"], _normed(x_dm, layer["mlp_norm"], config)), 2)
    return x_dm + project(layer["down"], jax.nn.silu(gate_fm) * up_fm), pages


def logits(weights: Weights, hidden: Float[Array, "d m"]) -> Float[Array, "m v"]:
    """In float32."""
    # turned round first: asked to do it in one, XLA multiplies in an order that is ten times slower on a CPU
    hidden_md = jax.lax.optimization_barrier(hidden.astype(weights["head"].dtype).T)
    return jnp.einsum("md,vd->mv", hidden_md, weights["head"], preferred_element_type=jnp.float32)


def project(weight_od: Array, x_dm: Array) -> Array:
    """Multiplied in the weight's dtype, added up in float32."""
    y_om = jnp.einsum("od,dm->om", weight_od, x_dm.astype(weight_od.dtype), preferred_element_type=jnp.float32)
    return y_om.astype(x_dm.dtype)


def _queries_keys_values(
    layer: Params, x_dm: Array, shape: tuple[int, int], config: ModelConfig
) -> tuple[Array, Array, Array]:
    n, k = config.num_heads, config.num_kv_heads
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
