"""A cartridge: in every layer p slots, each a key and a value, that stand in for a text (arXiv 2506.06266).

Keys are stored after RoPE (and after Qwen's norm of keys) as if the slots stood at the positions 0 to p - 1. The i-th
token of the sequence that follows is rotated at p + i. Upstream, PEFT and Tokasaurus have the same convention.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from cartridges_jax.cartridge.provenance import Provenance
from cartridges_jax.command_line.errors import UserError
from cartridges_jax.parallel import sharding

if TYPE_CHECKING:
    from cartridges_jax.models.config import ModelConfig
    from cartridges_jax.models.language_model import LanguageModel


@flax.struct.dataclass
class Cartridge:
    """The slots of l layers, p in each, with k heads of size h. It is a pytree that `jax.grad` and `jax.jit` take."""

    keys: Float[Array, "l p k h"]
    values: Float[Array, "l p k h"]
    bias: Float[Array, "l p k"] | None = None  # log-weight added to each slot's attention score; None means zero
    num_frozen: int = flax.struct.field(pytree_node=False, default=1)  # leading slots that training never moves
    provenance: Provenance = flax.struct.field(pytree_node=False, default=Provenance())

    @property
    def num_slots(self) -> int:
        """The number of slots in each layer, p."""
        return self.keys.shape[1]

    @property
    def thinking(self) -> bool | None:
        """The mode of thinking in which the cartridge was trained to answer; requests may say another."""
        return self.provenance.thinking

    @property
    def prefix(self) -> tuple[Array, Array, Array | None]:
        """The keys, the values and the bias, as attention takes them, with the layers first."""
        return self.keys, self.values, self.bias

    @property
    def num_bytes(self) -> int:
        """The size of the slots in memory, in the dtype that they have here."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    def checked(self, config: ModelConfig) -> Cartridge:
        """Returns the cartridge unchanged if its shapes fit a model of this config; otherwise raises a UserError."""
        l, p, k, h = self.keys.shape if self.keys.ndim == 4 else (0, 0, 0, 0)
        expected = (config.num_layers, p, config.num_kv_heads, config.head_dim)
        if (l, p, k, h) != expected or self.values.shape != self.keys.shape:
            raise UserError(
                f"the cartridge's keys are {self.keys.shape} and values {self.values.shape}, "
                f"expected {expected} as [layers, slots, kv heads, head size] of this model: use the model it was made "
                "for"
            )
        if self.bias is not None and self.bias.shape != (l, p, k):
            raise UserError(f"the cartridge's bias is {self.bias.shape}, expected {(l, p, k)}")
        if not 0 <= self.num_frozen <= p:
            raise UserError(f"num_frozen is {self.num_frozen}, expected 0 to the number of slots, {p}")
        return self

    @classmethod
    def from_text(
        cls, model: LanguageModel, text: str, num_tokens: int | None = None, num_frozen: int = 1
    ) -> Cartridge:
        """Makes a cartridge of the keys and values of a text: behind it the model answers as behind the text itself.

        Args:
          num_tokens: how many of the text's tokens to take, from its beginning; by default all.

        Raises:
          UserError: the text has no token, or more tokens than the model's window.
        """
        tokens = model.tokenizer.encode(text, add_special_tokens=True)[:num_tokens]
        provenance = Provenance.of(model, text, f"text, first {len(tokens)} tokens")
        return cls.from_tokens(model, tokens, num_frozen, provenance)

    @classmethod
    def from_tokens(
        cls, model: LanguageModel, tokens: Sequence[int], num_frozen: int = 1, provenance: Provenance | None = None
    ) -> Cartridge:
        """Makes a cartridge of the keys and values of these tokens, which stand at the positions 0 to p - 1."""
        if len(tokens) == 0:
            raise UserError("the text has no tokens: a cartridge needs at least one")
        if len(tokens) > (window := model.config.max_position_embeddings):
            raise UserError(f"{len(tokens)} tokens exceed {model.name}'s window of {window}: cut the text")
        # padded on the right to a multiple, which causality hides, so that similar lengths share one compiled program
        padded_t = np.zeros(math.ceil(len(tokens) / 64) * 64, np.int32)
        padded_t[: len(tokens)] = tokens
        mesh = sharding.mesh_of(model.params)
        keys_and_values = _keys_and_values(model.config, mesh)(model.params, padded_t)
        keys_lpkh, values_lpkh = (a[:, : len(tokens)].astype(jnp.float32) for a in keys_and_values)
        provenance = provenance or Provenance.of(model, "", "tokens")
        return cls(keys_lpkh, values_lpkh, None, min(num_frozen, len(tokens)), provenance).checked(model.config)

    def save(self, path: str | os.PathLike[str], dtype: str | None = None) -> None:
        """Writes the cartridge's file, whole or not at all; see `cartridge_file.write`."""
        from cartridges_jax.cartridge import file as cartridge_file

        cartridge_file.write(self, path, dtype)

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: LanguageModel | None = None) -> Cartridge:
        """Reads a cartridge.

        Args:
          path: a file that `save` wrote, a file or folder of any format that `interop` knows, or `hf:org/name` or
            `wandb:entity/project/run`, which are fetched.
          model: the model that the cartridge is for; a cartridge that was made for another is refused.

        Raises:
          FileNotFoundError: there is no such file.
          UserError: it is no whole cartridge, has a newer format, or was made for another model.
          ConnectionError, PermissionError: it has to be fetched and cannot be.
        """
        from cartridges_jax.interop import formats

        cartridge = formats.read(path)
        if model is not None:
            cartridge.provenance.check(model, os.fspath(path))
            cartridge.checked(model.config)
        return cartridge


@functools.cache
def _keys_and_values(config: ModelConfig, mesh: Mesh) -> Any:
    from cartridges_jax.models.params import abstract_params, weight_specs
    from cartridges_jax.models.transformer import keys_and_values

    weights = sharding.fitted(abstract_params(config), weight_specs(config), mesh)
    slots = jax.ShapeDtypeStruct((config.num_layers, 1, config.num_kv_heads, config.head_dim), jnp.float32)
    out = sharding.fitted(slots, sharding.CARTRIDGE, mesh)
    function = functools.partial(keys_and_values, config=config)
    return jax.jit(sharding.on_mesh(function, mesh, (weights, P()), (out, out)))
