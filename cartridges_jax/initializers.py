"""Where a cartridge starts from (design §6)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp

from cartridges_jax.attention_matching import attention_matching
from cartridges_jax.cartridge import Cartridge, Provenance
from cartridges_jax.data import Example
from cartridges_jax.models.language_model import LanguageModel

STATISTICS_TOKENS = 512  # of the corpus, from which random vectors take their mean and spread


@dataclasses.dataclass(frozen=True)
class InitConfig:
    kind: Literal["text", "attention_matching", "random_vectors", "pretrained"] = "text"
    num_slots: int = 512  # p; of `pretrained`, the file decides
    num_frozen: int = 1
    path: str | None = None  # of `pretrained`: a file or folder in any format, hf:… or wandb:…

    def __post_init__(self) -> None:
        if self.num_slots < 1 or not 0 <= self.num_frozen <= self.num_slots:
            raise ValueError(
                f"init has num_slots {self.num_slots} and num_frozen {self.num_frozen}: "
                "expected at least one slot and num_frozen from 0 to num_slots"
            )
        if (self.kind == "pretrained") != (self.path is not None):
            raise ValueError(
                f"init.kind is {self.kind!r} and init.path {self.path!r}: a path belongs to 'pretrained' only"
            )


def initial_cartridge(
    config: InitConfig, model: LanguageModel, corpus: str, examples: Sequence[Example], seed: int
) -> Cartridge:
    """The cartridge before training, in float32. Only attention matching looks at `examples`, the training data.

    Raises:
      ValueError: the corpus is shorter than `num_slots` tokens, or a pretrained file belongs to another model.
    """
    if config.kind == "pretrained":
        assert config.path is not None
        loaded = jax.tree.map(lambda a: a.astype(jnp.float32), Cartridge.load(config.path, model=model))
        return loaded.replace(num_frozen=config.num_frozen).checked(model.config)
    if config.kind == "attention_matching":
        return attention_matching(model, corpus, examples, config.num_slots, config.num_frozen)
    if config.kind == "text":
        cartridge = Cartridge.from_text(model, corpus, config.num_slots, config.num_frozen)
        if cartridge.num_slots < config.num_slots:
            raise ValueError(
                f"the corpus has {cartridge.num_slots} tokens, fewer than init.num_slots, {config.num_slots}: lower it"
            )
        return cartridge
    return _random_vectors(config, model, corpus, seed)


def _random_vectors(config: InitConfig, model: LanguageModel, corpus: str, seed: int) -> Cartridge:
    """Gaussian slots with the mean and spread that real keys and values have, per layer, head and channel."""
    tokens = model.tokenizer.encode(corpus, add_special_tokens=True)
    tokens = tokens[: min(STATISTICS_TOKENS, model.config.window)]
    sink = config.num_frozen
    if len(tokens) < max(2, sink):
        raise ValueError(
            f"the corpus has {len(tokens)} tokens, expected at least {max(2, sink)}: random vectors take their spread "
            "and the frozen slots from it"
        )
    real = Cartridge.from_tokens(model, tokens)

    def draw(key: jax.Array, real_lskh: jax.Array) -> jax.Array:
        mean, spread = real_lskh[:, 1:].mean(1, keepdims=True), real_lskh[:, 1:].std(1, keepdims=True)
        shape = (real_lskh.shape[0], config.num_slots, *real_lskh.shape[2:])
        drawn = mean + spread * jax.random.normal(key, shape)
        return drawn.at[:, :sink].set(
            real_lskh[:, :sink]
        )  # a random attention sink would never be repaired: it is frozen

    keys, values = (
        draw(key, real)
        for key, real in zip(jax.random.split(jax.random.key(seed)), (real.keys, real.values), strict=True)
    )
    provenance = Provenance.of(model, corpus, f"random vectors, seed {seed}")
    return Cartridge(jnp.asarray(keys), jnp.asarray(values), None, config.num_frozen, provenance)
