"""Random models, cartridges and batches of the shapes that are measured, and the quickstart's own model."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from accelerator_parts import sizes
from accelerator_parts.measuring import Options
from cartridges_jax import kernels
from cartridges_jax.cartridge.arrays import Cartridge
from cartridges_jax.kernels.decode_attention import KERNELS
from cartridges_jax.models.config import ModelConfig
from cartridges_jax.models.language_model import LanguageModel, load_model
from cartridges_jax.models.params import Params, init_params
from cartridges_jax.models.shapes import shape_of
from cartridges_jax.training.batch import Batch

TINY = ModelConfig("llama", 256, 2, 32, 4, 2, 8, 64, 1e-5, 5e5, 131_072, False)
SMALL = ModelConfig("llama", 4096, 4, 512, 8, 2, 64, 1024, 1e-5, 5e5, 131_072, False)
LARGE = {name: shape_of(name) for name in sizes.LARGE}


def own_kernel() -> str | None:
    """The name of the kernels that are written for this platform; they are measured, whatever the default is."""
    return kernels.platform() if kernels.platform() in KERNELS else None


def random_params(config: ModelConfig, dtype: str) -> Params:
    """Matrices are made smaller than a trained model's: through many layers, activations stay of one size."""
    draw = jax.jit(functools.partial(init_params, config, dtype=jnp.dtype(dtype)))
    shrunk = jax.jit(lambda params: jax.tree.map(lambda a: a * 0.4 if a.ndim > 1 else a, params), donate_argnums=0)
    return jax.block_until_ready(shrunk(draw(jax.random.key(0))))


def random_cartridge(config: ModelConfig, slots: int) -> Cartridge:
    rng = np.random.default_rng(0)
    shape = (config.num_layers, slots, config.num_kv_heads, config.head_dim)
    keys, values = (jnp.asarray(rng.standard_normal(shape, np.float32)) for _ in range(2))
    return Cartridge(keys, values, None, 1)


def random_batch(config: ModelConfig, rows: int, t: int) -> Batch:
    """One accumulated batch; the teacher's entries stand on the second half of each row."""
    rng, shape = np.random.default_rng(0), (1, rows, t)
    mask = np.zeros((*shape, sizes.TOP_K), bool)
    mask[:, :, t // 2 :] = True
    batch = Batch(
        rng.integers(0, config.vocab_size, shape).astype(np.int32),
        np.ones(shape, np.int32),
        np.broadcast_to(np.arange(t, dtype=np.int32), shape).copy(),
        np.broadcast_to(rng.permutation(config.vocab_size)[: sizes.TOP_K], (*shape, sizes.TOP_K)).astype(np.int32),
        np.full((*shape, sizes.TOP_K), -3.5, np.float32),
        mask,
    )
    return jax.tree.map(jnp.asarray, batch)


def needed_flops(config: ModelConfig, rows: int, t: int, p: int) -> float:
    """Of a training step: forward products and the gradients of activations. Nothing twice, nothing behind the mask."""
    weights = config.num_layers * config.layer_weights
    attention = config.num_layers * config.num_heads * config.head_dim * (p + (t + 1) / 2) * 12
    return rows * t * (4 * weights + 4 * config.vocab_size * config.embed_dim / 2 + attention)


def quickstart(options: Options, dtype: str) -> LanguageModel:
    if options.tiny:
        import tiny  # of the tests: a random model with a tokenizer and a chat template

        return load_model(str(tiny.folder()), dtype)
    return load_model(options.model, dtype)


def without_tokenizer(config: ModelConfig, params: Params) -> LanguageModel:
    """A model that is spoken to in ids."""

    class NoTokenizer:
        fingerprint = ""
        stop_ids: frozenset[int] = frozenset()

    tokenizer: Any = NoTokenizer()
    return LanguageModel("random", config, params, tokenizer, "random")
