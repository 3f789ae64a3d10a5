"""What differs between the layers of a model beside their weights, as a loop over them takes it.

Layers with the same settings (`ModelConfig.layers`) are of one kind. A loop that runs one program for all layers gets a
layer's kind as a number, and an unrolled one may get it as an int, whose settings are constants.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from cartridges_jax.models.block import Rope, rope_table
from cartridges_jax.models.config import LayerSettings, ModelConfig

Kind = Int[Array, ""] | int | None  # None: all layers are of one


def kinds_of_layers(config: ModelConfig) -> Int[np.ndarray, " l"] | None:
    """The kind of each layer."""
    kinds = _kinds(config)
    return None if len(kinds) == 1 else np.asarray([kinds.index(layer) for layer in config.layers])


def ropes_of_kinds(positions: Int[Array, "b t"], config: ModelConfig) -> Rope:
    """The cosines and sines at these positions for layers of each kind, stacked if there are several."""
    ropes = [rope_table(positions, kind, config.head_dim) for kind in _kinds(config)]
    return ropes[0] if len(ropes) == 1 else jax.tree.map(lambda *tables: jnp.stack(tables), *ropes)


def of_kind(tree: Any, kind: Kind) -> Any:
    """The part of `ropes_of_kinds` for layers of this kind."""
    return tree if kind is None else jax.tree.map(lambda leaf: leaf[kind], tree)


def attention_options(layer: Mapping[str, Any], config: ModelConfig, kind: Kind) -> dict[str, Any]:
    """How the tokens of a layer of this kind attend, as far as it differs from what attention does anyway.

    Args:
      layer: its arrays.
    """
    defaults = {"window": config.max_position_embeddings, "scale": config.head_dim**-0.5}
    options: dict[str, Any] = {"soft_cap": config.soft_cap, "sinks": layer.get("sinks")}
    for name, default in defaults.items():
        values = [getattr(one, name) for one in _kinds(config)]
        if len(set(values)) == 1:
            options[name] = values[0]
        elif isinstance(kind, int):
            options[name] = values[kind]
        else:
            options[name] = jnp.asarray([default if value is None else value for value in values])[kind]
    return {name: value for name, value in options.items() if value is not None}


def _kinds(config: ModelConfig) -> list[LayerSettings]:
    return list(dict.fromkeys(config.layers))
