"""A cartridge: in every layer p slots, each a key and a value, that stand in for a text (arXiv 2506.06266).

Keys are stored after RoPE (and after Qwen's norm of keys). The i-th token of a sequence behind the cartridge is rotated
at `offset` + i, so that the offset says how the stored keys are meant. RoPE is relative: the same cartridge can be
brought to any offset by rotating its keys (`at_offset`). With an offset of 0, which new cartridges have, keys stand at
negative positions, and slots use up no positions of the model. Upstream, PEFT and Tokasaurus have keys at 0 to p - 1
and an offset of p.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from cartridges_jax.cartridge.provenance import Provenance
from cartridges_jax.command_line.errors import UserError
from cartridges_jax.models.rope import shift_keys
from cartridges_jax.parallel import sharding

if TYPE_CHECKING:
    from cartridges_jax.models.config import ModelConfig
    from cartridges_jax.models.language_model import LanguageModel


@flax.struct.dataclass
class Slots:
    """The arrays of a cartridge, which training moves."""

    keys: Float[Array, "l p k h"]
    values: Float[Array, "l p k h"]
    bias: Float[Array, "l p k"] | None = None


class Placement(NamedTuple):
    """What a compiled program has to know of a cartridge beside its arrays; it is data that is not differentiated."""

    lengths: Int[Array, "l k"] | None
    offset: Int[Array, ""]


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False)
class Cartridge:
    """The slots of l layers, p in each, with k heads of size h. It is a pytree that `jax.grad` and `jax.jit` take.

    Its leaves are the keys, the values and the bias. What JAX makes of a cartridge (a gradient, several stacked) has
    no provenance, as it comes from elsewhere; the other fields are kept.
    """

    keys: Float[Array, "l p k h"]
    values: Float[Array, "l p k h"]
    bias: Float[Array, "l p k"] | None = None  # log-weight added to each slot's attention score; None means zero
    num_frozen: int = 1  # leading slots that training never moves
    provenance: Provenance = dataclasses.field(default_factory=Provenance)
    lengths: Int[Array, "l k"] | None = None  # how many slots a head has, which come first; None means p
    # where the first token behind the slots stands; None means p, for keys at the positions 0 to p - 1
    offset: int = None  # pyrefly: ignore[bad-assignment]

    def __post_init__(self) -> None:
        if self.offset is None:
            object.__setattr__(self, "offset", self.keys.shape[1] if self.keys.ndim > 1 else 0)

    def tree_flatten_with_keys(self) -> tuple[Any, Any]:
        children = [(jax.tree_util.GetAttrKey(name), getattr(self, name)) for name in ("keys", "values", "bias")]
        lengths = None if self.lengths is None else tuple(map(tuple, np.asarray(self.lengths).tolist()))
        return children, (self.num_frozen, self.offset, lengths)

    @classmethod
    def tree_unflatten(cls, others: Any, children: Any) -> Cartridge:
        num_frozen, offset, lengths = others
        lengths = None if lengths is None else np.asarray(lengths, np.int32)
        return cls(*children, num_frozen=num_frozen, lengths=lengths, offset=offset)

    @classmethod
    def of(cls, slots: Slots, placement: Placement) -> Cartridge:
        """Puts a cartridge together inside a compiled program, where its placement is data."""
        lengths, offset = placement
        return cls(slots.keys, slots.values, slots.bias, lengths=lengths, offset=offset)  # pyrefly: ignore

    @property
    def slots(self) -> Slots:
        """The arrays that training moves."""
        return Slots(self.keys, self.values, self.bias)

    @property
    def placement(self) -> Placement:
        """The lengths and the offset, as compiled programs take them."""
        lengths = None if self.lengths is None else np.asarray(self.lengths, np.int32)
        return Placement(lengths, np.asarray(self.offset, np.int32))

    @property
    def all_lengths(self) -> Int[np.ndarray, "l k"]:
        """How many slots each head has, also where all have p."""
        if self.lengths is not None:
            return np.asarray(self.lengths, np.int32)
        return np.full((self.keys.shape[0], self.keys.shape[2]), self.num_slots, np.int32)

    def at_offset(self, offset: int, config: ModelConfig | None = None) -> Cartridge:
        """Returns the same cartridge at another offset: its keys are rotated, on the host.

        Args:
          config: of the model that the cartridge is for; by default the one that its provenance tells.

        Raises:
          UserError: the offset is another and nothing says how the model rotates keys, or the cartridge does not fit.
        """
        if offset == self.offset:
            return self
        config = config or self.provenance.read_config()
        keys = shift_keys(np.asarray(self.checked(config).keys), offset - self.offset, config)
        return dataclasses.replace(self, keys=keys, offset=offset)

    def replace(self, **changes: Any) -> Cartridge:
        """Returns the cartridge with other fields."""
        return dataclasses.replace(self, **changes)

    def with_slots(self, slots: Slots) -> Cartridge:
        """Returns the cartridge with these arrays."""
        return dataclasses.replace(self, keys=slots.keys, values=slots.values, bias=slots.bias)

    @property
    def num_slots(self) -> int:
        """The length of the arrays, p: how many slots each head has, or at most has if there are `lengths`."""
        return self.keys.shape[1]

    @property
    def average_slots(self) -> int:
        """How many slots a head has on average, rounded up: the memory of so many tokens."""
        return math.ceil(self.all_lengths.mean()) if self.keys.shape[0] * self.keys.shape[2] else 0

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
        """The size of the slots that there are, in the dtype that they have here."""
        bytes_each = sum(leaf.nbytes // max(math.prod(leaf.shape[:3]), 1) for leaf in jax.tree.leaves(self))
        return int(self.all_lengths.sum()) * bytes_each

    def described(self) -> str:
        """Says for people how many slots the heads have and what they take in memory."""
        longest = f" on average, {self.all_lengths.max(initial=0)} at most" if self.lengths is not None else ""
        return f"{self.average_slots} slots{longest}, {self.num_bytes / 1e6:.1f} MB"

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
        fewest = p
        if self.lengths is not None:
            lengths = np.asarray(self.lengths)
            if lengths.shape != (l, k) or lengths.dtype.kind not in "iu" or lengths.min() < 0 or lengths.max() > p:
                raise UserError(f"the lengths of the cartridge's heads are {lengths}, expected {(l, k)} from 0 to {p}")
            fewest = int(lengths.min())
        if not 0 <= self.num_frozen <= fewest:
            raise UserError(f"num_frozen is {self.num_frozen}, expected 0 to the number of slots, {fewest}")
        if not 0 <= self.offset <= config.max_position_embeddings:
            raise UserError(
                f"the cartridge's offset is {self.offset}, expected 0 to the model's {config.max_position_embeddings} "
                "positions"
            )
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
        """Makes a cartridge of the keys and values of these tokens, which stand at the positions -p to -1."""
        if len(tokens) == 0:
            raise UserError("the text has no tokens: a cartridge needs at least one")
        if len(tokens) > (window := model.config.max_position_embeddings):
            raise UserError(f"{len(tokens)} tokens exceed {model.name}'s window of {window}: cut the text")
        # padded on the right to a multiple, which causality hides, so that similar lengths share one compiled program
        padded_t = np.zeros(math.ceil(len(tokens) / 64) * 64, np.int32)
        padded_t[: len(tokens)] = tokens
        mesh = sharding.mesh_of(model.params)
        keys_and_values = _keys_and_values(model.config, mesh)(model.params, padded_t, np.int32(-len(tokens)))
        keys_lpkh, values_lpkh = (a[:, : len(tokens)].astype(jnp.float32) for a in keys_and_values)
        provenance = provenance or Provenance.of(model, "", "tokens")
        num_frozen = min(num_frozen, len(tokens))
        return cls(keys_lpkh, values_lpkh, None, num_frozen, provenance, offset=0).checked(model.config)

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
    return jax.jit(sharding.on_mesh(function, mesh, (weights, P(), P()), (out, out)))
