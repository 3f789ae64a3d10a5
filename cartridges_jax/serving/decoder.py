"""The model as serving runs it: over pages, a few tokens of each request at a time.

This is the mathematics of `models.transformer.Block`, laid out for a CPU, where a step takes as long as reading the
weights: q, k and v form one matrix and gate and up another, packed into panels for `gathered_matmul`. The layers are
unrolled, since a scanned stack of them would be copied at every step.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from cartridges_jax import kernels
from cartridges_jax.kernels.gathered_matmul import gathered_matmul, has_kernel
from cartridges_jax.kernels.prefix_decode_attention import AttentionMetadata, Pages, prefix_decode_attention
from cartridges_jax.models.config import ModelConfig
from cartridges_jax.models.transformer import Params, Rope, rms_norm, rope_tables, rotate
from cartridges_jax.parallel import collectives, sharding

PANEL = 16  # how many outputs of a weight a panel holds side by side
Weights = dict[str, Any]  # "embed", "head" (if it is not tied), "final_norm", and "layers": a dict of arrays for each


@flax.struct.dataclass
class Step:
    """The tokens of one forward pass, where they are written, and what they see.

    A token is written at the index `slot_mapping` of all positions of all pages: its page's number times the page size,
    plus its position in the page. A token whose page does not exist is written nowhere.
    """

    tokens: Int[Array, "b t"]
    positions: Int[Array, "b t"]
    slot_mapping: Int[Array, "b t"]
    metadata: AttentionMetadata  # the pages that each request sees, those that its tokens are written to included


def to_decode_layout(params: Params, config: ModelConfig, mesh: Mesh) -> Weights:
    """The weights as `forward` takes them, on the mesh's devices; the model's own are not needed any more.

    Weights that a kernel multiplies in float32 are kept in bfloat16 if that loses nothing, as it does with most models'
    weights: a step for a few requests takes as long as reading the weights does.
    """
    ends = _ends({name: leaf for name, leaf in params.items() if name != "blocks"}, mesh)
    layers = (_layer_to_decode_layout(params["blocks"], i, config, mesh) for i in range(config.num_layers))
    return {**jax.tree.map(_narrowed, ends), "layers": [jax.tree.map(_narrowed, layer) for layer in layers]}


def _narrowed(weight: Array) -> Array:
    is_packed = weight.ndim == 3 and weight.dtype == jnp.float32
    if not is_packed or isinstance(weight, jax.core.Tracer) or not _is_bfloat16(weight):
        return weight
    return weight.astype(jnp.bfloat16)


@jax.jit
def _is_bfloat16(weight: Array) -> Array:
    """Whether bfloat16 holds every value. It looks at bits, since XLA may leave out a conversion there and back."""
    return (jax.lax.bitcast_convert_type(weight, jnp.uint32) & 0xFFFF == 0).all()


@functools.partial(jax.jit, static_argnames="mesh")
def _ends(ends: Params, mesh: Mesh) -> Params:
    def local(ends: Params) -> Params:
        wide = {name: collectives.all_gather_fsdp(leaf, sharding.WEIGHTS[name]) for name, leaf in ends.items()}
        return {name: leaf if leaf.ndim == 1 else pack_panels(leaf) for name, leaf in wide.items()}

    in_specs = (sharding.fitted(ends, {name: sharding.WEIGHTS[name] for name in ends}, mesh),)
    return sharding.on_mesh(local, mesh, in_specs, {name: sharding.DECODER[name] for name in ends})(ends)


@functools.partial(jax.jit, static_argnames=("config", "mesh"))
def _layer_to_decode_layout(blocks: Params, i: Int[Array, ""], config: ModelConfig, mesh: Mesh) -> Params:
    def local(blocks: Params, i: Int[Array, ""]) -> Params:
        block = collectives.all_gather_layer(jax.tree.map(lambda leaf: leaf[i], blocks))
        heads = {name: block[name] for name in ("k", "v")}
        biases = {name: leaf for name, leaf in block.items() if name in ("k_bias", "v_bias")}
        block |= collectives.local_kv_heads(heads, config, axis=1) | collectives.local_kv_heads(biases, config, axis=0)

        def rows(*names: str) -> Array:
            return jnp.concatenate([block[name].reshape(config.embed_dim, -1) for name in names], axis=1).T

        layer = {"qkv": rows("q", "k", "v"), "gate_up": rows("gate", "up"), "down": block["down"].T}
        layer["o"] = block["o"].reshape(-1, config.embed_dim).T
        if config.qkv_bias:
            layer["qkv_bias"] = jnp.concatenate([block[name] for name in ("q_bias", "k_bias", "v_bias")])
        layer = {name: leaf if leaf.ndim == 1 else pack_panels(leaf) for name, leaf in layer.items()}
        return layer | {name: leaf for name, leaf in block.items() if name.endswith("norm")}

    names = {"qkv", "gate_up", "down", "o"} | ({"qkv_bias"} if config.qkv_bias else set())
    names |= {name for name in blocks if name.endswith("norm")}
    in_specs = (sharding.fitted(blocks, sharding.WEIGHTS["blocks"], mesh), P())
    out_specs = {name: sharding.DECODER["layers"][name] for name in names}
    return sharding.on_mesh(local, mesh, in_specs, out_specs)(blocks, i)


def pack_panels(weight_od: Float[Array, "o d"]) -> Float[Array, "o d"] | Float[Array, "n d 16"]:
    """The weight in panels, each with `PANEL` outputs side by side for every input, where a kernel multiplies those."""
    if not has_kernel(kernels.platform()) or weight_od.shape[0] % PANEL:
        return weight_od
    return weight_od.reshape(-1, PANEL, weight_od.shape[1]).swapaxes(1, 2)


def forward(
    weights: Weights, cache: list[Pages], step: Step, config: ModelConfig
) -> tuple[Float[Array, "m d"], list[Pages]]:
    """Returns the tokens' final, normed hidden states, m = b t, and the cache with their keys and values written."""
    rope = rope_tables(step.positions, config)
    x_md = _embedded(weights["embed"], step.tokens.reshape(-1)).astype(weights["final_norm"].dtype)
    written = []
    for layer, pages in zip(weights["layers"], cache, strict=True):
        x_md, pages = _block(layer, pages, x_md, rope, step, config)
        written.append(pages)
    return rms_norm(x_md, weights["final_norm"], config.norm_eps), written


@functools.partial(jax.jit, static_argnames="config")  # one jit inside another: traced once, not for every layer
def _block(
    layer: Params, pages: Pages, x_md: Array, rope: Rope, step: Step, config: ModelConfig
) -> tuple[Array, Pages]:
    q, k, v = _queries_keys_values(layer, x_md, (*step.positions.shape, pages.bias.shape[1]), config)
    q, k = rotate(q, rope), rotate(k, rope)
    page_bt, offset_bt = jnp.divmod(step.slot_mapping, pages.bias.shape[2])
    pages = pages._replace(
        keys=pages.keys.at[page_bt, :, :, offset_bt].set(k.astype(pages.keys.dtype), mode="drop"),
        values=pages.values.at[page_bt, :, offset_bt].set(v.astype(pages.values.dtype), mode="drop"),
        bias=pages.bias.at[page_bt, :, offset_bt].set(0, mode="drop"),
    )
    o_btnh = prefix_decode_attention(q, step.positions, pages, step.metadata)
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
    """The vocabulary's logits, in float32."""
    logits_mv = _product(weights.get("head", weights["embed"]), hidden)
    return collectives.all_gather_vocab(logits_mv)


def project(weight: Float[Array, "o d"] | Float[Array, "n d 16"], x_md: Float[Array, "m d"]) -> Float[Array, "m o"]:
    """The product of the weight and x, in the dtype of x."""
    return _product(weight, x_md).astype(x_md.dtype)


def _product(weight: Array, x_md: Array) -> Float[Array, "m o"]:
    """The product is multiplied in the weight's dtype, or in float32 if it is packed; it is added up in float32."""
    if weight.ndim == 2:
        return jnp.einsum("md,od->mo", x_md.astype(weight.dtype), weight, preferred_element_type=jnp.float32)
    panels = np.arange(weight.shape[0], dtype=np.int32)
    return gathered_matmul(x_md[None], np.zeros_like(panels), weight, panels, side_by_side=True)


def _queries_keys_values(
    layer: Params, x_md: Array, shape_btk: tuple[int, int, int], config: ModelConfig
) -> tuple[Array, Array, Array]:
    """The queries, keys and values of this device's heads, before their rotation."""
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
