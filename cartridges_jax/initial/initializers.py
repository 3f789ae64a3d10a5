"""The kinds of initial states: what a cartridge holds before it is trained."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import Literal

import jax

from cartridges_jax.cartridge.arrays import Cartridge
from cartridges_jax.cartridge.provenance import Provenance
from cartridges_jax.command_line import files
from cartridges_jax.command_line.errors import UserError
from cartridges_jax.initial import texts
from cartridges_jax.initial.attention_matching import attention_matching
from cartridges_jax.initial.budgets import BudgetConfig, BudgetKind
from cartridges_jax.initial.chunks import MatchingConfig
from cartridges_jax.initial.texts import SummaryConfig
from cartridges_jax.models.language_model import LanguageModel
from cartridges_jax.training.data import Example

STATISTICS_TOKENS = 512  # of the corpus, whose keys and values give random vectors their mean and spread

Kind = Literal[
    "text",  # the first tokens of the corpus
    "sampled_chunks",  # chunks of 64 tokens from all over the corpus (arXiv 2508.17032)
    "random_text",  # another text: our own, or that of the file in `path`
    "random_vectors",
    "pretrained",  # the cartridge in `path`
    "summary",  # a summary of the corpus, written by a server
    "attention_matching",  # the compacted corpus (arXiv 2602.16284)
]
WITH_PATH = ("pretrained", "random_text")  # of which the first needs a path

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class InitConfig:
    kind: Kind = "attention_matching"
    # of a head on average; a `pretrained` file has its own number, and a short `summary` as many as it has tokens
    num_slots: int = 512
    num_frozen: int = 1
    path: str | None = None  # a cartridge in any format, hf:… or wandb:…; for `random_text`, a text file
    vectors: Literal["matched", "normal"] = "matched"  # spread like real keys and values, or N(0, 1) as in upstream
    summary: SummaryConfig = dataclasses.field(default_factory=SummaryConfig)
    matching: MatchingConfig = dataclasses.field(default_factory=MatchingConfig)
    budget: BudgetKind = "uniform"  # how attention matching shares the slots out over layers and heads
    max_share: float | None = None  # how many times the average a head may have; None means as many as a file may hold
    min_slots: int = 2  # of a head that has not as many as all others; `num_frozen`, if that is more

    @property
    def budget_config(self) -> BudgetConfig:
        """How attention matching shares the slots out over layers and heads."""
        return BudgetConfig(self.budget, self.max_share, self.min_slots)

    def __post_init__(self) -> None:
        if self.num_slots < 1 or not 0 <= self.num_frozen <= self.num_slots:
            raise UserError(
                f"init has num_slots {self.num_slots} and num_frozen {self.num_frozen}: "
                "expected at least one slot and num_frozen from 0 to num_slots"
            )
        if (self.kind == "pretrained" and self.path is None) or (self.path is not None and self.kind not in WITH_PATH):
            raise UserError(
                f"init.kind is {self.kind!r} and init.path {self.path!r}: a path belongs to 'pretrained', which needs "
                "one, or to 'random_text'"
            )
        if self.kind != "attention_matching" and self.budget != "uniform":
            raise UserError(
                f"init.kind is {self.kind!r} and init.budget {self.budget!r}: only 'attention_matching' gives heads "
                "different numbers of slots, set init.budget=uniform"
            )
        BudgetConfig(self.budget, self.max_share, self.min_slots)  # which refuses what cannot be
        if self.kind == "summary" and self.summary.base_url is None:
            raise UserError("init.kind is 'summary': set init.summary.base_url to the server that shall write it")


def initial_cartridge(
    config: InitConfig, model: LanguageModel, corpus: str, examples: Sequence[Example], seed: int
) -> Cartridge:
    """Makes the cartridge before training, in float32.

    Args:
      examples: the training data, which only attention matching looks at.

    Raises:
      UserError: the text is shorter than `num_slots` tokens, or a pretrained file belongs to another model.
      ConnectionError: the server that should write a summary cannot be reached.
    """
    match config.kind:
        case "pretrained":
            assert config.path is not None
            loaded = Cartridge.load(config.path, model=model)
            return loaded.replace(num_frozen=config.num_frozen).checked(model.config)
        case "attention_matching":
            slots = config.num_slots, config.num_frozen
            return attention_matching(model, corpus, examples, *slots, config.matching, config.budget_config)
        case "random_vectors":
            return _random_vectors(config, model, corpus, seed)
        case "summary":
            text = texts.summary(corpus, config.num_slots, config.summary)
            tokens = model.tokenizer.encode(text, add_special_tokens=True)[: config.num_slots]
            if len(tokens) < config.num_slots:
                log.warning("the summary has %d tokens: so many slots, not %d", len(tokens), config.num_slots)
            recipe = f"summary by {config.summary.model}, {len(tokens)} tokens"
        case "sampled_chunks":
            start = model.tokenizer.encode("", add_special_tokens=True)
            rest = config.num_slots - len(start)
            tokens = start + texts.sampled_chunks(model.tokenizer.encode(corpus), rest, seed)
            recipe = f"chunks of {texts.CHUNK} tokens, {len(tokens)} in all, seed {seed}"
        case "random_text":
            text = texts.unrelated_text(config.num_slots)
            if config.path is not None:
                text = files.read_text(config.path, "the text of init.path")
            tokens = _first_tokens(config, model, text, "the text of init.path")
            recipe = f"another text, first {len(tokens)} tokens"
        case "text":
            tokens = _first_tokens(config, model, corpus, "the corpus")
            recipe = f"text, first {len(tokens)} tokens"
    return Cartridge.from_tokens(model, tokens, config.num_frozen, Provenance.of(model, corpus, recipe))


def _first_tokens(config: InitConfig, model: LanguageModel, text: str, name: str) -> list[int]:
    tokens = model.tokenizer.encode(text, add_special_tokens=True)[: config.num_slots]
    if len(tokens) < config.num_slots:
        raise UserError(f"{name} has {len(tokens)} tokens, fewer than init.num_slots, {config.num_slots}: lower it")
    return tokens


def _random_vectors(config: InitConfig, model: LanguageModel, corpus: str, seed: int) -> Cartridge:
    """Draws Gaussian slots: N(0, 1), or with the mean and spread that real ones have per layer, head and channel."""
    c = model.config
    keys = jax.random.split(jax.random.key(seed))
    shape = (c.num_layers, config.num_slots, c.num_kv_heads, c.head_dim)
    drawn = [jax.random.normal(key, shape) for key in keys]
    provenance = Provenance.of(model, corpus, f"random vectors ({config.vectors}), seed {seed}")
    if config.vectors == "matched":
        real = _measured(config, model, corpus)
        drawn = [_like(*pair, config.num_frozen) for pair in zip(drawn, (real.keys, real.values), strict=True)]
    keys, values = drawn
    return Cartridge(keys, values, None, config.num_frozen, provenance, offset=0)


def _measured(config: InitConfig, model: LanguageModel, corpus: str) -> Cartridge:
    """Returns the real keys and values of the beginning of the corpus."""
    tokens = model.tokenizer.encode(corpus, add_special_tokens=True)
    needed = max(2, config.num_frozen)
    if len(tokens) < needed:
        raise UserError(
            f"the corpus has {len(tokens)} tokens, expected at least {needed}: random vectors take their spread and "
            "the frozen slots from it"
        )
    measured = min(max(STATISTICS_TOKENS, needed), model.config.max_position_embeddings)
    return Cartridge.from_tokens(model, tokens[:measured])


def _like(drawn_lpkh: jax.Array, real_lskh: jax.Array, num_frozen: int) -> jax.Array:
    """Returns the drawn vectors with the mean and the spread of the real ones, and real ones in the frozen slots."""
    mean, spread = real_lskh[:, 1:].mean(1, keepdims=True), real_lskh[:, 1:].std(1, keepdims=True)
    # training could not repair a random attention sink, since it is frozen
    return (mean + spread * drawn_lpkh).at[:, :num_frozen].set(real_lskh[:, :num_frozen])
