"""The model as serving runs it: over pages, a few tokens of each request at a time.

It runs the block of `models.block` on weights in a layout of their own: q, k and v form one matrix and gate and up
another, and on a CPU, where a step takes as long as reading the weights, all are packed into panels for
`gathered_matmul`. The layers are unrolled, since a scanned stack of them would be copied at every step.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from cartridges_jax import kernels
from cartridges_jax.kernels.decode_attention import KERNELS, chosen, decode_attention, ordered, rotate_and_write
from cartridges_jax.kernels.decode_attention.pages import AttentionMetadata, Pages
from cartridges_jax.kernels.gathered_matmul import gathered_matmul, has_kernel
from cartridges_jax.models.block import Rope, block, decode_layer, embedded, norm, rope_table
from cartridges_jax.models.config import LayerSettings, ModelConfig
from cartridges_jax.models.params import Params, decode_specs, weight_specs
from cartridges_jax.models.spec import ArraySpec, end_arrays, fused_arrays
from cartridges_jax.models.weights import Dense, Panels
from cartridges_jax.parallel import collectives, sharding

Weights = dict[str, Any]  # "embed", "head" (if it is not tied), "final_norm", and "layers": a dict of arrays for each


@flax.struct.dataclass
class Step:
    """The tokens of one forward pass, where they are written, and what they see.

    A token is written at the index `slot_mapping` of all positions of all pages: its page's number times the page size,
    plus its position in the page. A token whose page does not exist is written nowhere.
    """

    tokens: Int[Array, "b t"]
    slot_mapping: Int[Array, "b t"]
    metadata: AttentionMetadata  # the pages that each request sees, those that its tokens are written to included


def to_decode_layout(params: Params, config: ModelConfig, mesh: Mesh) -> Weights:
    """The weights as `forward` takes them, on the mesh's devices; the model's own are not needed any more.

    Weights that a kernel multiplies in float32 are kept in bfloat16 if that loses nothing, as it does with most models'
    weights: a step for a few requests takes as long as reading the weights does.
    """
    ends = _ends({name: leaf for name, leaf in params.items() if name != "blocks"}, config, mesh)
    layers = [_layer_to_decode_layout(params["blocks"], i, config, mesh) for i in range(config.num_layers)]
    narrowed = functools.partial(jax.tree.map, _narrowed, is_leaf=lambda weight: isinstance(weight, Panels))
    return {**narrowed(ends), "layers": [narrowed(layer) for layer in layers]}


def _narrowed(weight: Any) -> Any:
    if not isinstance(weight, Panels) or weight.panels.dtype != jnp.float32:
        return weight
    if isinstance(weight.panels, jax.core.Tracer) or not _is_bfloat16(weight.panels):
        return weight
    return weight.replace(panels=weight.panels.astype(jnp.bfloat16))


@jax.jit
def _is_bfloat16(weight: Array) -> Array:
    """Whether bfloat16 holds every value. It looks at bits, since XLA may leave out a conversion there and back."""
    return (jax.lax.bitcast_convert_type(weight, jnp.uint32) & 0xFFFF == 0).all()


@functools.partial(jax.jit, static_argnames=("config", "mesh"))
def _ends(ends: Params, config: ModelConfig, mesh: Mesh) -> Weights:
    specs = {name: weight_specs(config)[name] for name in ends}
    arrays = {array.name: array for array in end_arrays(config)}

    def local(ends: Params) -> Weights:
        whole = {name: collectives.all_gather_fsdp(leaf, specs[name]) for name, leaf in ends.items()}
        return {name: pack_panels(leaf, arrays[name]) for name, leaf in whole.items()}

    in_specs = (sharding.fitted(ends, specs, mesh),)
    return sharding.on_mesh(local, mesh, in_specs, {name: decode_specs(config)[name] for name in ends})(ends)


@functools.partial(jax.jit, static_argnames=("config", "mesh"))
def _layer_to_decode_layout(blocks: Params, i: Int[Array, ""], config: ModelConfig, mesh: Mesh) -> Weights:
    first = {name: arrays[0] for name, arrays in fused_arrays(config).items()}

    def local(blocks: Params, i: Int[Array, ""]) -> Weights:
        layer = decode_layer(jax.tree.map(lambda leaf: leaf[i], blocks), config)
        return {name: pack_panels(leaf, first[name]) for name, leaf in layer.items()}

    in_specs = (sharding.fitted(blocks, weight_specs(config)["blocks"], mesh), P())
    return sharding.on_mesh(local, mesh, in_specs, decode_specs(config)["layers"])(blocks, i)


def pack_panels(weight: Array, array: ArraySpec) -> Panels | Dense | Array:
    """A matrix whose outputs come first, in panels where a kernel multiplies those; what is none stays as it is."""
    if not array.summed:
        return weight
    num_inputs = len(array.summed_axes)
    num_outputs = math.prod(weight.shape[:-num_inputs])
    if not has_kernel(kernels.platform()) or num_outputs % Panels.SIZE:
        return Dense(weight, array.outputs_first.replace(" ", ""))
    return Panels.of(weight, num_inputs)


def forward(
    weights: Weights, cache: Pages, step: Step, config: ModelConfig, implementation: str | None
) -> tuple[Float[Array, "b t d"], Pages]:
    """Returns the tokens' final, normed hidden states, and the cache with their keys and values written."""
    positions_bt = step.metadata.starts[:, None] + jnp.arange(step.tokens.shape[1])
    ropes = {kind: rope_table(positions_bt, kind, config.head_dim) for kind in dict.fromkeys(config.layers)}
    x_btd = embedded(weights["embed"], step.tokens, config).astype(weights["final_norm"].dtype)
    implementation = chosen(implementation)
    if implementation == "cpu":
        ropes = {kind: _kept(rope) for kind, rope in ropes.items()}
    metadata = ordered(step.metadata, cache.page_size, implementation)
    for i, (layer, kind) in enumerate(zip(weights["layers"], config.layers, strict=True)):
        seen = metadata.of_layer(i)
        x_btd, cache = _layer(layer, cache, x_btd, ropes[kind], step.slot_mapping, seen, kind, config, implementation)
    return norm(x_btd, weights["final_norm"], config), cache


def _kept(rope: Rope) -> Rope:
    """The same numbers as a product's result. XLA keeps that, and would work out a sine for every head and layer."""
    b, t, half = rope[0].shape
    table_1xh, first = jnp.concatenate(rope, axis=-1).reshape(1, b * t, 2 * half), np.zeros(1, np.int32)
    kept_bth = gathered_matmul(table_1xh, first, jnp.eye(2 * half)[None], first).reshape(b, t, 2 * half)
    return kept_bth[..., :half], kept_bth[..., half:]


# one jit inside another: layers of one kind are traced once
@functools.partial(jax.jit, static_argnames=("kind", "config", "implementation"))
def _layer(
    layer: Params,
    pages: Pages,
    x_btd: Array,
    rope: Rope,
    slot_mapping: Array,
    metadata: AttentionMetadata,
    kind: LayerSettings,
    config: ModelConfig,
    implementation: str,
) -> tuple[Array, Pages]:
    is_one_kernel = implementation in KERNELS  # rotation and writing

    def attend(q: Array, k: Array, v: Array) -> tuple[Array, Pages]:
        if is_one_kernel:
            heads = jnp.concatenate([q, k, v], axis=2)  # as the projection gave them: nothing is moved
            q, written = rotate_and_write(heads, rope, slot_mapping, pages, metadata, implementation)
        else:
            page_bt, offset_bt = jnp.divmod(slot_mapping, pages.page_size)
            written = pages.write(page_bt * metadata.heads + metadata.layer * metadata.kv_heads, offset_bt, k, v)
        options = kind.window, kind.scale, config.soft_cap, layer.get("sinks")
        return decode_attention(q, written, metadata, implementation, *options), written

    return block(layer, x_btd, None if is_one_kernel else rope, attend, config)


def logits(weights: Weights, hidden: Float[Array, "m d"]) -> Float[Array, "m v"]:
    """The vocabulary's logits, in float32."""
    head = weights.get("head", weights["embed"])
    return collectives.all_gather_vocab(head.matmul(hidden.astype(jnp.float32), "md,vd->mv"))
