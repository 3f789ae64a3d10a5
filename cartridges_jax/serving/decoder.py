"""The model as serving runs it: over pages, a few tokens of each request at a time.

The same mathematics as `models.transformer.Block`, laid out for a CPU, where a step is bound by reading the weights:
q, k and v in one matrix and gate and up in another, cut into panels for `gathered_matmul`. Layers are unrolled: a
scanned stack would be copied at every step.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from cartridges_jax import kernels
from cartridges_jax.kernels.gathered_matmul import gathered_matmul, has_kernel
from cartridges_jax.kernels.prefix_decode_attention import Pages, Plan, prefix_decode_attention
from cartridges_jax.models.block import Rope, decode_layer, rms_norm, rope_table, rotate
from cartridges_jax.models.config import ModelConfig
from cartridges_jax.models.params import Params, decode_specs, weight_specs
from cartridges_jax.models.spec import fused_arrays
from cartridges_jax.parallel import collectives, sharding

PANEL = 16  # outputs of a weight that stand side by side
Weights = dict[str, Any]  # "embed", "head" (if it is not tied), "final_norm", and "layers": a dict of arrays for each


def rearranged(params: Params, config: ModelConfig, mesh: Mesh) -> Weights:
    """The weights as `forward` takes them, on the mesh's devices; the model's own can be let go of.

    Those that a kernel multiplies in float32 stay in bfloat16 if nothing is lost by it, as those of most models are: a
    step for a few requests takes as long as reading them does.
    """
    ends = _ends({name: leaf for name, leaf in params.items() if name != "blocks"}, config, mesh)
    layers = (_rearranged_layer(params["blocks"], i, config, mesh) for i in range(config.num_layers))
    return {**jax.tree.map(_narrowed, ends), "layers": [jax.tree.map(_narrowed, layer) for layer in layers]}


def _narrowed(weight: Array) -> Array:
    is_cut = weight.ndim == 3 and weight.dtype == jnp.float32
    if not is_cut or isinstance(weight, jax.core.Tracer) or not _is_bfloat16(weight):
        return weight
    return weight.astype(jnp.bfloat16)


@jax.jit
def _is_bfloat16(weight: Array) -> Array:
    """By its bits: XLA may take a conversion there and back for nothing."""
    return (jax.lax.bitcast_convert_type(weight, jnp.uint32) & 0xFFFF == 0).all()


@functools.partial(jax.jit, static_argnames=("config", "mesh"))
def _ends(ends: Params, config: ModelConfig, mesh: Mesh) -> Params:
    specs = {name: weight_specs(config)[name] for name in ends}

    def local(ends: Params) -> Params:
        wide = {name: collectives.all_gather_fsdp(leaf, specs[name]) for name, leaf in ends.items()}
        return {name: leaf if leaf.ndim == 1 else cut(leaf) for name, leaf in wide.items()}

    in_specs = (sharding.fitted(ends, specs, mesh),)
    return sharding.on_mesh(local, mesh, in_specs, {name: decode_specs(config)[name] for name in ends})(ends)


@functools.partial(jax.jit, static_argnames=("config", "mesh"))
def _rearranged_layer(blocks: Params, i: Int[Array, ""], config: ModelConfig, mesh: Mesh) -> Params:
    fused = fused_arrays(config)

    def local(blocks: Params, i: Int[Array, ""]) -> Params:
        layer = decode_layer(jax.tree.map(lambda leaf: leaf[i], blocks), config)
        return {name: cut(leaf) if fused[name][0].summed else leaf for name, leaf in layer.items()}

    in_specs = (sharding.fitted(blocks, weight_specs(config)["blocks"], mesh), P())
    return sharding.on_mesh(local, mesh, in_specs, decode_specs(config)["layers"])(blocks, i)


def cut(weight_od: Float[Array, "o d"]) -> Float[Array, "o d"] | Float[Array, "n d 16"]:
    """In panels, where there is a kernel for them: outputs that stand side by side, for each input."""
    if not has_kernel(kernels.platform()) or weight_od.shape[0] % PANEL:
        return weight_od
    return weight_od.reshape(-1, PANEL, weight_od.shape[1]).swapaxes(1, 2)


def forward(
    weights: Weights,
    cache: list[Pages],
    tokens: Int[Array, "b t"],
    positions: Int[Array, "b t"],
    page: Int[Array, "b t"],
    place: Int[Array, "b t"],
    plan: Plan,
    config: ModelConfig,
) -> tuple[Float[Array, "m d"], list[Pages]]:
    """Final, normed hidden states of the tokens, m = b t; keys and values are written to the cache.

    Args:
      page, place: where each token's keys and values go; a page that does not exist means nowhere.
      plan: who sees which page, these tokens' own included.
    """
    rope = rope_table(positions, config.layers[0], config.head_dim)
    x_md = _embedded(weights["embed"], tokens.reshape(-1)).astype(weights["final_norm"].dtype)
    written = []
    for layer, pages in zip(weights["layers"], cache, strict=True):
        x_md, pages = _block(layer, pages, x_md, rope, positions, page, place, plan, config)
        written.append(pages)
    return rms_norm(x_md, weights["final_norm"], config.norm_eps), written


@functools.partial(jax.jit, static_argnames="config")  # one jit inside another: traced once, not for every layer
def _block(
    layer: Params,
    pages: Pages,
    x_md: Array,
    rope: Rope,
    positions: Array,
    page: Array,
    place: Array,
    plan: Plan,
    config: ModelConfig,
) -> tuple[Array, Pages]:
    q, k, v = _queries_keys_values(layer, x_md, (*positions.shape, pages.bias.shape[1]), config)
    q, k = rotate(q, rope), rotate(k, rope)
    pages = pages._replace(
        keys=pages.keys.at[page, :, :, place].set(k.astype(pages.keys.dtype), mode="drop"),
        values=pages.values.at[page, :, place].set(v.astype(pages.values.dtype), mode="drop"),
        bias=pages.bias.at[page, :, place].set(0, mode="drop"),
    )
    o_btnh = prefix_decode_attention(q, positions, pages, plan)
    x_md = x_md + collectives.reduce_from_tp(project(layer["o"], o_btnh.reshape(x_md.shape[0], -1)))
    y_md = rms_norm(x_md, layer["mlp_norm"], config.norm_eps)
    gate_mf, up_mf = jnp.split(project(layer["gate_up"], y_md), 2, axis=1)
    return x_md + collectives.reduce_from_tp(project(layer["down"], jax.nn.silu(gate_mf) * up_mf)), pages


def _embedded(embed: Array, tokens: Int[Array, " m"]) -> Float[Array, "m d"]:
    if embed.ndim == 2:
        return collectives.embedding_lookup(embed, tokens)
    own, here = collectives.local_token_ids(tokens, embed.shape[0] * PANEL)
    return collectives.reduce_from_tp(jnp.where(here[:, None], embed[own // PANEL, :, own % PANEL], 0))


def logits(weights: Weights, hidden: Float[Array, "m d"]) -> Float[Array, "m v"]:
    """In float32."""
    logits_mv = _product(weights.get("head", weights["embed"]), hidden)
    return collectives.all_gather_vocab(logits_mv)


def project(weight: Float[Array, "o d"] | Float[Array, "n d 16"], x_md: Float[Array, "m d"]) -> Float[Array, "m o"]:
    """In the dtype of x."""
    return _product(weight, x_md).astype(x_md.dtype)


def _product(weight: Array, x_md: Array) -> Float[Array, "m o"]:
    """Multiplied in the weight's dtype, or in float32 if it is cut; added up in float32."""
    if weight.ndim == 2:
        return jnp.einsum("md,od->mo", x_md.astype(weight.dtype), weight, preferred_element_type=jnp.float32)
    panels = np.arange(weight.shape[0], dtype=np.int32)
    return gathered_matmul(x_md[None], np.zeros_like(panels), weight, panels, side_by_side=True)


def _queries_keys_values(
    layer: Params, x_md: Array, shape_btk: tuple[int, int, int], config: ModelConfig
) -> tuple[Array, Array, Array]:
    """Of this device's heads."""
    *shape, k = shape_btk
    qkv_mo = project(layer["qkv"], rms_norm(x_md, layer["attention_norm"], config.norm_eps))
    n = qkv_mo.shape[1] // config.head_dim - 2 * k
    heads_btoh = qkv_mo.reshape(*shape, n + 2 * k, config.head_dim)
    if config.qkv_bias:
        heads_btoh = heads_btoh + layer["qkv_bias"]
    q, k, v = jnp.split(heads_btoh, (n, n + k), axis=2)
    if config.qk_norm:
        q, k = rms_norm(q, layer["q_norm"], config.norm_eps), rms_norm(k, layer["k_norm"], config.norm_eps)
    return q, k, v
