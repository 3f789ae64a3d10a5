"""Drivers of the block (`block.py`): they run all layers of a model over whole rows and differ in how tokens attend.

Layers are scanned, together with what a driver has for each (a cartridge's slots, say) and with what differs between
them (`ModelConfig.layers`). Plain pytrees of arrays travel.

Axis letters: b batch, t query, p prefix slot, l layer, d model width, n query heads, k kv heads, h head size,
v vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from cartridges_jax.kernels.prefix_attention import prefix_attention
from cartridges_jax.models.block import block, embedded, layer_of, norm
from cartridges_jax.models.config import ModelConfig
from cartridges_jax.models.layers import attention_options, kinds_of_layers, of_kind, ropes_of_kinds
from cartridges_jax.models.params import Params
from cartridges_jax.models.spec import ENDS
from cartridges_jax.models.weights import weight_of
from cartridges_jax.parallel import collectives

Remat = Literal["layers", "elementwise"]  # what the backward pass computes again
SAVED = {"layers": ("attention",), "elementwise": ("attention", "projection")}  # what it finds, beside a layer's input
# attend(q_btnh, k_btkh, v_btkh, what the driver has for this layer, **options of `prefix_attention`)
#   -> (o_btnh, whatever the driver wants back from this layer)
AttendLayer = Callable[..., tuple[Array, Any]]


def run_layers(
    params: Params,
    tokens: Int[Array, "b t"],
    positions: Int[Array, "b t"],
    attend: AttendLayer,
    of_layers: Any = None,
    *,
    config: ModelConfig,
    remat: Remat | None = None,
    dtype: Any = None,
) -> tuple[Float[Array, "b t d"], Any]:
    """Runs the embedding and all layers; gives the last states, not normed, and what `attend` gave, stacked by layers.

    Args:
      positions: at which the tokens are rotated.
      attend: how the heads of one layer see each other.
      of_layers: a pytree of arrays with a leading layer axis, of which `attend` gets each layer's part.
      remat: what a backward pass computes again; by default nothing.
      dtype: of the states; by default that of the embedding.
    """
    ropes = ropes_of_kinds(positions, config)

    def layer(x_btd: Array, scanned: Any) -> tuple[Array, Any]:
        arrays, own, kind = scanned
        arrays = layer_of(arrays, config)
        options = attention_options(arrays, config, kind)

        def attend_here(q: Array, k: Array, v: Array) -> tuple[Array, Any]:
            return attend(q, k, v, own, **options)

        return block(arrays, x_btd, of_kind(ropes, kind), attend_here, config)

    if remat is not None:
        policy = jax.checkpoint_policies.save_only_these_names(*SAVED[remat])
        layer = jax.checkpoint(layer, prevent_cse=False, policy=policy)
    start = embedded(weight_of(_whole(params["embed"], "embed")), tokens, config)
    start = start if dtype is None else start.astype(dtype)
    return jax.lax.scan(layer, start, (params["blocks"], of_layers, kinds_of_layers(config)))


def hidden_states(
    params: Params,
    tokens: Int[Array, "b t"],
    segment_ids: Int[Array, "b t"],
    positions: Int[Array, "b t"],
    prefix_k: Float[Array, "l p k h"],
    prefix_v: Float[Array, "l p k h"],
    prefix_bias: Float[Array, "l p k"] | None = None,
    lengths: Int[Array, "l k"] | None = None,
    offset: int | Int[Array, ""] = 0,
    *,
    config: ModelConfig,
    implementation: str | None = None,
    remat: Remat = "layers",
) -> Float[Array, "b t d"]:
    """Computes the final, normed hidden states; token i of a segment is rotated at position offset + i.

    Args:
      lengths: how many of the p slots each head has; None means all.
      offset: where the first token behind the slots stands, as the slots' keys are rotated.
    """

    def attend(q: Array, k: Array, v: Array, slots: Any, **options: Any) -> tuple[Array, None]:
        k, v = collectives.local_kv_heads((k, v), config, axis=2)
        *slots, lengths_k = slots
        slot_k, slot_v, bias = collectives.local_kv_heads(slots, config, axis=1)
        options["lengths"] = collectives.local_kv_heads(lengths_k, config, axis=0)
        return prefix_attention(q, k, v, slot_k, slot_v, segment_ids, bias, implementation, **options), None

    slots = prefix_k, prefix_v, prefix_bias, lengths
    x_btd, _ = run_layers(params, tokens, positions + offset, attend, slots, config=config, remat=remat)
    return norm(x_btd, params["final_norm"], config)


def keys_and_values(
    params: Params, tokens: Int[Array, " t"], first: int | Int[Array, ""] = 0, *, config: ModelConfig
) -> tuple[Float[Array, "l t k h"], Float[Array, "l t k h"]]:
    """Computes the rotated keys and the values of one text, whose tokens stand at the position `first` and on."""
    tokens_1t = tokens[None]
    segment_ids_1t = jnp.ones_like(tokens_1t)

    def attend(q: Array, k: Array, v: Array, _: None, **options: Any) -> tuple[Array, tuple[Array, Array]]:
        own_k, own_v = collectives.local_kv_heads((k, v), config, axis=2)
        none_pkh = jnp.zeros((0, *own_k.shape[2:]), k.dtype)
        o_btnh = prefix_attention(q, own_k, own_v, none_pkh, none_pkh, segment_ids_1t, **options)
        return o_btnh, (k[0], v[0])

    positions_1t = first + jnp.arange(tokens.shape[0])[None]
    return run_layers(params, tokens_1t, positions_1t, attend, config=config)[1]


def head_weights(params: Params) -> Float[Array, "v d"]:
    """Gives the head's matrix with all of its width: the embedding, if the model ties them."""
    return _whole(params.get("head", params["embed"]), "head")


def _whole(leaf: Array, name: str) -> Array:
    (array,) = (array for array in ENDS if array.name == name)
    return collectives.all_gather_fsdp(leaf, P(*array.mesh_axes))
