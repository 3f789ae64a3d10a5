"""The model as serving runs it: over pages, a few tokens of each request at a time.

This is the mathematics of `models.block`, laid out for a CPU, where a step takes as long as reading the
weights: q, k and v form one matrix and gate and up another, packed into panels for `gathered_matmul`. The layers are
unrolled, since a scanned stack of them would be copied at every step.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from cartridges_jax import kernels
from cartridges_jax.command_line.errors import UserError
from cartridges_jax.kernels.gathered_matmul import has_kernel
from cartridges_jax.kernels.prefix_decode_attention import AttentionMetadata, Pages, prefix_decode_attention
from cartridges_jax.models.block import Rope, decode_layer, rms_norm, rope_table, rotate
from cartridges_jax.models.config import ModelConfig
from cartridges_jax.models.params import Params, decode_specs, weight_specs
from cartridges_jax.models.spec import fused_arrays
from cartridges_jax.models.weights import Dense, Panels
from cartridges_jax.parallel import collectives, sharding

DECODED = ("llama", "qwen2", "qwen3")  # families whose layers have nothing that is not said here
PRODUCT = "md,od->mo"  # of a weight in this layout
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
    if config.family not in DECODED:
        raise UserError(
            f"decoding runs models of {', '.join(DECODED)}, and this one is a {config.family}: choose another"
        )
    ends = _ends({name: leaf for name, leaf in params.items() if name != "blocks"}, config, mesh)
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


@functools.partial(jax.jit, static_argnames=("config", "mesh"))
def _ends(ends: Params, config: ModelConfig, mesh: Mesh) -> Weights:
    specs = {name: weight_specs(config)[name] for name in ends}

    def local(ends: Params) -> Weights:
        wide = {name: collectives.all_gather_fsdp(leaf, specs[name]) for name, leaf in ends.items()}
        return {name: leaf if leaf.ndim == 1 else pack_panels(leaf) for name, leaf in wide.items()}

    in_specs = (sharding.fitted(ends, specs, mesh),)
    return sharding.on_mesh(local, mesh, in_specs, {name: decode_specs(config)[name] for name in ends})(ends)


@functools.partial(jax.jit, static_argnames=("config", "mesh"))
def _layer_to_decode_layout(blocks: Params, i: Int[Array, ""], config: ModelConfig, mesh: Mesh) -> Weights:
    fused = fused_arrays(config)

    def local(blocks: Params, i: Int[Array, ""]) -> Weights:
        layer = decode_layer(jax.tree.map(lambda leaf: leaf[i], blocks), config)
        return {name: pack_panels(leaf) if fused[name][0].summed else leaf for name, leaf in layer.items()}

    in_specs = (sharding.fitted(blocks, weight_specs(config)["blocks"], mesh), P())
    return sharding.on_mesh(local, mesh, in_specs, decode_specs(config)["layers"])(blocks, i)


def pack_panels(weight_od: Float[Array, "o d"]) -> Panels | Dense:
    """The weight in panels of outputs that stand side by side, where a kernel multiplies those."""
    if not has_kernel(kernels.platform()) or weight_od.shape[0] % Panels.SIZE:
        return Dense(weight_od)
    return Panels.of(weight_od)


def forward(
    weights: Weights, cache: list[Pages], step: Step, config: ModelConfig
) -> tuple[Float[Array, "m d"], list[Pages]]:
    """Returns the tokens' final, normed hidden states, m = b t, and the cache with their keys and values written."""
    rope = rope_table(step.positions, config.layers[0], config.head_dim)
    x_md = weights["embed"].lookup(step.tokens.reshape(-1)).astype(weights["final_norm"].dtype)
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
    x_md = x_md + collectives.reduce_from_tp(layer["o"].matmul(o_btnh.reshape(x_md.shape[0], -1), PRODUCT))
    y_md = rms_norm(x_md, layer["mlp_norm"], config.norm_eps)
    gate_mf, up_mf = jnp.split(layer["gate_up"].matmul(y_md, PRODUCT), 2, axis=1)
    return x_md + collectives.reduce_from_tp(layer["down"].matmul(jax.nn.silu(gate_mf) * up_mf, PRODUCT)), pages


def logits(weights: Weights, hidden: Float[Array, "m d"]) -> Float[Array, "m v"]:
    """The vocabulary's logits, in float32."""
    head = weights.get("head", weights["embed"])
    return collectives.all_gather_vocab(head.matmul(hidden.astype(jnp.float32), PRODUCT))


def _queries_keys_values(
    layer: Params, x_md: Array, shape_btk: tuple[int, int, int], config: ModelConfig
) -> tuple[Array, Array, Array]:
    """The queries, keys and values of this device's heads, before their rotation."""
    *shape, k = shape_btk
    qkv_mo = layer["qkv"].matmul(rms_norm(x_md, layer["attention_norm"], config.norm_eps), PRODUCT)
    n = qkv_mo.shape[1] // config.head_dim - 2 * k
    heads_btoh = qkv_mo.reshape(*shape, n + 2 * k, config.head_dim)
    if config.qkv_bias:
        heads_btoh = heads_btoh + layer["qkv_bias"]
    q, k, v = jnp.split(heads_btoh, (n, n + k), axis=2)
    if config.qk_norm:
        q, k = rms_norm(q, layer["q_norm"], config.norm_eps), rms_norm(k, layer["k_norm"], config.norm_eps)
    return q, k, v
