"""Changes of a cartridge's slots that other engines need: a bias folded into the keys, slots added to fill pages.

Both are approximate. benchmarks/formats.py measures what they cost.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import einops
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from cartridges_jax.cartridge.arrays import Cartridge
from cartridges_jax.command_line.errors import UserError
from cartridges_jax.interop.layouts import refuse_lengths
from cartridges_jax.kernels.prefix_attention import prefix_attention
from cartridges_jax.models.config import ModelConfig
from cartridges_jax.models.language_model import LanguageModel
from cartridges_jax.models.params import Params
from cartridges_jax.models.transformer import run_layers

FOLD_TOKENS = 1024  # of the text, whose queries say what all queries have in common
RIDGE = 1e-3  # of the mean squared query


def fold_bias(cartridge: Cartridge, model: LanguageModel, text: str) -> Cartridge:
    """Moves the bias into the keys, for engines that know keys and values only.

    For each layer and kv head it finds a direction u whose score q·u is near 1 for all queries q of `text` behind the
    cartridge (least squares), and adds b·u to the key of a slot with the bias b. A query sees b·(q·u) instead of b,
    which is the same as far as queries have something in common; those of a trained model do.

    Raises:
      UserError: the cartridge does not fit the model, or the text has no token.
    """
    cartridge.checked(model.config)
    if cartridge.bias is None:
        return cartridge
    room = model.config.max_position_embeddings - cartridge.offset
    tokens = model.tokenizer.encode(text)[: min(FOLD_TOKENS, room)]
    if not tokens:
        raise UserError(f"fold_bias needs a text and room for it: there are {room} positions behind the cartridge")
    slots = *cartridge.prefix, cartridge.placement.lengths
    positions = cartridge.offset + np.arange(len(tokens))
    direction_lkh = _common_directions(model.params, slots, np.asarray(tokens), positions, config=model.config)
    keys = cartridge.keys + cartridge.bias[..., None] * direction_lkh[:, None]
    recipe = f"{cartridge.provenance.recipe}; bias folded into the keys"
    provenance = dataclasses.replace(cartridge.provenance, recipe=recipe)
    return cartridge.replace(keys=keys, bias=None, provenance=provenance)


def pad_slots(cartridge: Cartridge, multiple: int, config: ModelConfig) -> Cartridge:
    """Adds slots at the end until their number is a multiple, for engines that hold whole pages only.

    The new slots have the mean key and the mean value of the others, since without a bias no slot can be without
    effect. What follows stays as far from the others as it was.

    Raises:
      UserError: the cartridge does not fit the model's config, or its heads have different numbers of slots.
    """
    refuse_lengths(cartridge.checked(config), "an engine that holds whole pages")
    missing = -cartridge.num_slots % multiple
    if not missing:
        return cartridge

    def padded(array_lpkh: Array) -> Array:
        mean_l1kh = array_lpkh.mean(1, keepdims=True)
        return jnp.concatenate([array_lpkh, jnp.repeat(mean_l1kh, missing, axis=1)], axis=1)

    keys, values = padded(cartridge.keys), padded(cartridge.values)
    bias = None if cartridge.bias is None else jnp.pad(cartridge.bias, ((0, 0), (0, missing), (0, 0)))
    recipe = f"{cartridge.provenance.recipe}; {missing} slots added to fill pages of {multiple}"
    provenance = dataclasses.replace(cartridge.provenance, recipe=recipe)
    return cartridge.replace(keys=keys, values=values, bias=bias, lengths=None, provenance=provenance)


@functools.partial(jax.jit, static_argnames="config")
def _common_directions(
    params: Params,
    slots: Any,  # keys, values, bias and, unless they are alike, the lengths of heads
    tokens: Int[Array, " t"],
    positions: Int[Array, " t"],
    *,
    config: ModelConfig,
) -> Float[Array, "l k h"]:
    """Returns for each layer and kv head the direction whose score is near 1 for all queries of the tokens."""
    segment_ids = jnp.ones_like(tokens)[None]

    def attend(q_btnh: Array, k_btkh: Array, v_btkh: Array, slots: Any, **options: Any) -> tuple[Array, Array]:
        q_kmh = einops.rearrange(q_btnh, "b t (k g) h -> k (b t g) h", k=config.num_kv_heads)
        q_kmh = q_kmh * options.get("scale", config.head_dim**-0.5)
        slot_k, slot_v, slot_bias, options["lengths"] = slots
        out = prefix_attention(q_btnh, k_btkh, v_btkh, slot_k, slot_v, segment_ids, slot_bias, **options)
        return out, jax.vmap(_direction)(q_kmh)

    return run_layers(params, tokens[None], positions[None], attend, slots, config=config, dtype=jnp.float32)[1]


def _direction(q: Float[Array, "m h"]) -> Float[Array, " h"]:
    """Returns the u for which q @ u is nearest to 1."""
    gram_hh = q.T @ q / len(q)
    ridge = RIDGE * jnp.trace(gram_hh) / len(gram_hh)
    return jax.scipy.linalg.solve(gram_hh + ridge * jnp.eye(len(gram_hh)), q.mean(0), assume_a="pos")
