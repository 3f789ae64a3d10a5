"""A loaded language model: its config, its weights, its tokenizer and its name."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from cartridges_jax.command_line.errors import UserError
from cartridges_jax.models import hub
from cartridges_jax.models.config import ModelConfig
from cartridges_jax.models.gguf import load_gguf
from cartridges_jax.models.hf import load_hf
from cartridges_jax.models.params import Params, weight_specs
from cartridges_jax.models.tokenizer import Tokenizer, load_tokenizer
from cartridges_jax.models.transformer import head_weights, hidden_states
from cartridges_jax.parallel import sharding

if TYPE_CHECKING:
    from cartridges_jax.cartridge.arrays import Cartridge

DTYPES = ("float32", "bfloat16", "auto")


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """A frozen language model, whose `params` are a plain pytree with the layers stacked on axis 0."""

    name: str
    config: ModelConfig
    params: Params
    tokenizer: Tokenizer
    fingerprint: str  # of the weights: see `models.loading.load_params`

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes that one position of the cache takes: keys and values of all layers, in the dtype of the weights."""
        c = self.config
        return 2 * c.num_layers * c.num_kv_heads * c.head_dim * self.params["embed"].dtype.itemsize

    def logits(
        self,
        tokens: Int[Array, "b t"],
        segment_ids: Int[Array, "b t"] | None = None,
        positions: Int[Array, "b t"] | None = None,
        cartridge: Cartridge | None = None,
    ) -> Float[Array, "b t v"]:
        """Computes the float32 logits of every position.

        It is meant for small inputs: training and serving never hold the logits of all positions.

        Args:
          tokens: token ids.
          segment_ids: which packed conversation a position belongs to, 0 for padding; all ones by default.
          positions: 0-based in each segment (the cartridge's slots come before); 0…t-1 by default.
          cartridge: the slots every token sees; none means p = 0.

        Raises:
          UserError: the cartridge does not fit, or its offset and t exceed the model's window.
        """
        tokens = jnp.asarray(tokens, jnp.int32)
        segment_ids = jnp.ones_like(tokens) if segment_ids is None else jnp.asarray(segment_ids, jnp.int32)
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        prefix, placement = no_prefix(self.config), (None, 0)
        if cartridge is not None:
            prefix, placement = cartridge.checked(self.config).prefix, cartridge.placement
        offset = int(placement[1])
        if offset + tokens.shape[1] > (window := self.config.max_position_embeddings):
            raise UserError(
                f"an offset of {offset} and {tokens.shape[1]} tokens exceed {self.name}'s window of {window}: "
                "shorten the text or use a smaller cartridge"
            )
        inputs = tokens, segment_ids, jnp.asarray(positions, jnp.int32)
        mesh = sharding.mesh_of(self.params)
        return _logits(self.params, inputs, prefix, placement, config=self.config, mesh=mesh)


def no_prefix(config: ModelConfig) -> tuple[Array, Array, None]:
    """The slots of no cartridge are arrays of size 0, so that the same code runs with a cartridge and without."""
    empty_lpkh = jnp.zeros((config.num_layers, 0, config.num_kv_heads, config.head_dim))
    return empty_lpkh, empty_lpkh, None


@functools.partial(jax.jit, static_argnames=("config", "mesh"))
def _logits(params: Params, inputs: Any, prefix: Any, placement: Any, *, config: ModelConfig, mesh: Mesh) -> Array:
    def logits(params: Params, inputs: Any, prefix: Any, placement: Any) -> Array:
        hidden_btd = hidden_states(params, *inputs, *prefix, *placement, config=config)
        return jnp.einsum("btd,vd->btv", hidden_btd, head_weights(params), preferred_element_type=jnp.float32)

    weights = sharding.fitted(params, weight_specs(config), mesh)
    slots = sharding.fitted(prefix, sharding.CARTRIDGE, mesh), sharding.fitted(placement, sharding.PLACEMENT, mesh)
    return sharding.on_mesh(logits, mesh, (weights, P(), *slots), sharding.LOGITS)(params, inputs, prefix, placement)


def load_model(name: str, dtype: str = "float32", mesh: Mesh | None = None) -> LanguageModel:
    """Loads "smollm2-135m", a Hub id, a Hugging Face directory or a `.gguf` file, without torch.

    Args:
      dtype: of the weights. "auto" is bfloat16 where the hardware multiplies matrices of it faster, float32 elsewhere.
      mesh: over whose devices the weights are spread (`sharding.make_mesh`); by default they come to one.

    Raises:
      UserError: an unknown name or dtype, an unsupported family, weights that do not fit.
      FileNotFoundError, ConnectionError: the files are not here and cannot be fetched; the sentence says what to do.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
    dtype = _fastest_dtype() if dtype == "auto" else dtype
    files = hub.resolve(name)
    tokenizer = load_tokenizer(files)
    num_ids = max({tokenizer.vocab_size - 1, *tokenizer.stop_ids}) + 1
    if files.gguf is not None:
        config, params, fingerprint = load_gguf(files.gguf, jnp.dtype(dtype), mesh, num_ids)
    else:
        assert files.directory is not None
        config, params, fingerprint = load_hf(files.directory, jnp.dtype(dtype), mesh, num_ids)
    return LanguageModel(files.name, config, params, tokenizer, fingerprint)


def _fastest_dtype() -> str:
    """The dtype in which this machine multiplies the large matrices of training fastest."""
    if jax.default_backend() != "cpu":
        return "bfloat16"
    flags = Path("/proc/cpuinfo")
    return "bfloat16" if flags.is_file() and "amx_bf16" in flags.read_text() else "float32"
