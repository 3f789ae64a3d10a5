"""The model as serving runs it: over pages, a few tokens of each request at a time.

It runs the block of `models.block` on weights in a layout of their own: q, k and v form one matrix and gate and up
another, and on a CPU, where a step takes as long as reading the weights, all are packed into panels for
`gathered_matmul`. It reads a layer's panels where they lie in the stack of all layers: so a CPU scans the layers, and
one of them is compiled. Elsewhere they are unrolled, since a scanned stack of matrices would be copied at every step.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
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
from cartridges_jax.kernels.gathered_matmul import has_kernel
from cartridges_jax.models.block import Rope, block, decode_layer, embedded, norm
from cartridges_jax.models.config import ModelConfig
from cartridges_jax.models.layers import Kind, attention_options, kinds_of_layers, of_kind, ropes_of_kinds
from cartridges_jax.models.params import Params, decode_specs, weight_specs
from cartridges_jax.models.spec import ArraySpec, end_arrays, fused_arrays
from cartridges_jax.models.weights import Dense, Panels
from cartridges_jax.parallel import collectives, sharding

# "embed", "head" (if it is not tied), "final_norm", and "layers": arrays by their names, stacked or as a list of layers
Weights = dict[str, Any]
State = tuple[Float[Array, "b t d"], Pages]  # what goes from layer to layer


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
    blocks, ends = params["blocks"], {name: leaf for name, leaf in params.items() if name != "blocks"}
    parts = {name: [blocks[array.name] for array in arrays] for name, arrays in fused_arrays(config).items()}
    parts |= {name: [leaf] for name, leaf in ends.items()}
    is_scanned = has_kernel(kernels.platform())
    narrow = frozenset(name for name in parts if is_scanned and all(map(_is_bfloat16, parts[name])))
    options = {"narrow": narrow, "config": config, "mesh": mesh}
    if is_scanned:
        layers = _stack(blocks, **options)
    else:
        layers = [_layer_of_stack(blocks, i, **options) for i in range(config.num_layers)]
    return {**_ends(ends, **options), "layers": layers}


def _is_bfloat16(leaf: Any) -> bool:
    """Whether these are numbers in float32 of which bfloat16 holds every one."""
    is_array = isinstance(leaf, Array) and not isinstance(leaf, jax.core.Tracer)
    return is_array and leaf.dtype == jnp.float32 and bool(_has_no_more_bits(leaf))


@jax.jit
def _has_no_more_bits(weight: Array) -> Array:
    """It looks at bits, since XLA may leave out a conversion there and back."""
    return (jax.lax.bitcast_convert_type(weight, jnp.uint32) & 0xFFFF == 0).all()


_in_layout = functools.partial(jax.jit, static_argnames=("narrow", "config", "mesh"))


@_in_layout
def _ends(ends: Params, *, narrow: frozenset[str], config: ModelConfig, mesh: Mesh) -> Weights:
    specs = {name: weight_specs(config)[name] for name in ends}
    arrays = {array.name: array for array in end_arrays(config)}

    def local(ends: Params) -> Weights:
        whole = {name: collectives.all_gather_fsdp(leaf, specs[name]) for name, leaf in ends.items()}
        return {name: pack_panels(leaf, arrays[name], name in narrow) for name, leaf in whole.items()}

    in_specs = (sharding.fitted(ends, specs, mesh),)
    return sharding.on_mesh(local, mesh, in_specs, {name: decode_specs(config)[name] for name in ends})(ends)


@_in_layout
def _stack(blocks: Params, *, narrow: frozenset[str], config: ModelConfig, mesh: Mesh) -> Weights:
    def local(blocks: Params) -> Weights:
        return jax.lax.map(lambda arrays: _layer_in_layout(arrays, narrow, config), blocks)

    in_specs = (sharding.fitted(blocks, weight_specs(config)["blocks"], mesh),)
    return sharding.on_mesh(local, mesh, in_specs, decode_specs(config)["layers"])(blocks)


@_in_layout
def _layer_of_stack(
    blocks: Params, i: Int[Array, ""], *, narrow: frozenset[str], config: ModelConfig, mesh: Mesh
) -> Weights:
    def local(blocks: Params, i: Int[Array, ""]) -> Weights:
        return _layer_in_layout(jax.tree.map(lambda leaf: leaf[i], blocks), narrow, config)

    in_specs = (sharding.fitted(blocks, weight_specs(config)["blocks"], mesh), P())
    specs = {name: P(*spec[1:]) for name, spec in decode_specs(config)["layers"].items()}
    return sharding.on_mesh(local, mesh, in_specs, specs)(blocks, i)


def _layer_in_layout(arrays: Params, narrow: frozenset[str], config: ModelConfig) -> Weights:
    first = {name: arrays[0] for name, arrays in fused_arrays(config).items()}
    return {name: pack_panels(leaf, first[name], name in narrow) for name, leaf in decode_layer(arrays, config).items()}


def pack_panels(weight: Array, array: ArraySpec, is_narrow: bool) -> Panels | Dense | Array:
    """A matrix whose outputs come first, in panels where a kernel multiplies those; what is none stays as it is."""
    if not array.summed:
        return weight
    num_inputs = len(array.summed_axes)
    num_outputs = math.prod(weight.shape[:-num_inputs])
    if not has_kernel(kernels.platform()) or num_outputs % Panels.SIZE:
        return Dense(weight, array.outputs_first.replace(" ", ""))
    return Panels.of(weight.astype(jnp.bfloat16) if is_narrow else weight, num_inputs)


def forward(weights: Weights, cache: Pages, step: Step, config: ModelConfig, implementation: str | None) -> State:
    """Returns the tokens' final, normed hidden states, and the cache with their keys and values written."""
    x_btd = embedded(weights["embed"], step.tokens, config).astype(weights["final_norm"].dtype)
    ropes = ropes_of_kinds(step.metadata.starts[:, None] + jnp.arange(step.tokens.shape[1]), config)
    implementation = chosen(implementation)
    metadata = ordered(step.metadata, cache.page_size, implementation)

    def layer(state: State, arrays: Weights, i: Int[Array, ""], kind: Kind) -> State:
        rope, options = of_kind(ropes, kind), attention_options(arrays, config, kind)
        seen = metadata.of_layer(i)
        return _layer(arrays, state, rope, step.slot_mapping, seen, options, config, implementation)

    loop = _unrolled if isinstance(weights["layers"], list) else _scanned
    x_btd, cache = loop(layer, (x_btd, cache), weights["layers"], kinds_of_layers(config))
    return norm(x_btd, weights["final_norm"], config), cache


def _unrolled(layer: Callable[..., State], state: State, layers: list[Weights], kinds: np.ndarray | None) -> State:
    traced = jax.jit(layer, static_argnames="kind")  # one jit inside another: once for all layers of a kind
    for i, arrays in enumerate(layers):
        state = traced(state, arrays, i, kind=None if kinds is None else int(kinds[i]))
    return state


def _scanned(layer: Callable[..., State], state: State, stack: Weights, kinds: np.ndarray | None) -> State:
    panels = {name: leaf for name, leaf in stack.items() if isinstance(leaf, Panels)}  # which stay where they are
    others = {name: leaf for name, leaf in stack.items() if name not in panels}

    def run(state: State, of_layer: tuple[Array, Weights, Kind]) -> tuple[State, None]:
        i, arrays, kind = of_layer
        arrays = arrays | {name: leaf.of_layer(i) for name, leaf in panels.items()}
        return layer(state, arrays, i, kind), None

    numbers = jnp.arange(len(jax.tree.leaves(stack)[0]))
    return jax.lax.scan(run, state, (numbers, others, kinds))[0]


def _layer(
    layer: Weights,
    state: State,
    rope: Rope,
    slot_mapping: Array,
    metadata: AttentionMetadata,
    options: dict[str, Any],
    config: ModelConfig,
    implementation: str,
) -> State:
    x_btd, pages = state
    is_one_kernel = implementation in KERNELS  # rotation and writing

    def attend(q: Array, k: Array, v: Array) -> tuple[Array, Pages]:
        if is_one_kernel:
            heads = jnp.concatenate([q, k, v], axis=2)  # as the projection gave them: nothing is moved
            q, written = rotate_and_write(heads, rope, slot_mapping, pages, metadata, implementation)
        else:
            page_bt, offset_bt = jnp.divmod(slot_mapping, pages.page_size)
            written = pages.write(page_bt * metadata.heads + metadata.layer * metadata.kv_heads, offset_bt, k, v)
        return decode_attention(q, written, metadata, implementation, **options), written

    return block(layer, x_btd, None if is_one_kernel else rope, attend, config)


def logits(weights: Weights, hidden: Float[Array, "m d"]) -> Float[Array, "m v"]:
    """The vocabulary's logits, in float32."""
    head = weights.get("head", weights["embed"])
    return collectives.all_gather_vocab(head.matmul(hidden.astype(jnp.float32), "md,vd->mv"))
