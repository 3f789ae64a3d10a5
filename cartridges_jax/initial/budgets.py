"""How many slots each head of each layer gets, at a given average.

A few heads attend to nearly every token of a document, most to almost none. One threshold of attention over all layers
and heads gives each as many slots as it has tokens above it. What comes out hardly depends on the document: it is a
property of the model. So a *profile* of the model, measured once on a text of our own, serves every document, and all
cartridges of one model and average have the same lengths (`python -m cartridges_jax.budgets`).
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from cartridges_jax.cartridge.ragged import MOST_PADDING
from cartridges_jax.command_line import files
from cartridges_jax.command_line.errors import UserError
from cartridges_jax.command_line.progress import stage
from cartridges_jax.initial.chunks import Chunk, MatchingConfig, chunks_of
from cartridges_jax.initial.heads import measure_attention
from cartridges_jax.models import hub
from cartridges_jax.models.language_model import LanguageModel
from cartridges_jax.parallel import processes

PUBLISHED = Path(__file__).with_name("profiles")  # of models whose profiles come with this package
PROFILE_TEXT = PUBLISHED / "text.txt"
RATIOS = (4, 10, 20, 40)  # a profile has shares for cartridges of a document's tokens over these
FORMAT_VERSION = 1

log = logging.getLogger(__name__)

BudgetKind = Literal["profile", "attention", "uniform"]


@dataclasses.dataclass(frozen=True)
class BudgetConfig:
    """How slots are shared out over layers and heads.

    Attributes:
      kind: by the model's profile, by the document's own attention, or as many for every head.
      max_share: how many times the average a head may have; None means as many as the document has tokens and a file
        may hold.
      min_slots: how many a head has at least.
    """

    kind: BudgetKind = "uniform"
    max_share: float | None = None
    min_slots: int = 2

    def __post_init__(self) -> None:
        if self.min_slots < 1 or (self.max_share is not None and self.max_share < 1):
            raise UserError(
                f"init has min_slots {self.min_slots} and max_share {self.max_share}: expected at least one slot, and "
                "a head's largest share to be at least the average, 1"
            )

    def bounds(self, num_slots: int, num_tokens: int) -> tuple[int, int]:
        """Returns the fewest and the most slots that a head of a document of so many tokens may have."""
        most_share = MOST_PADDING if self.max_share is None else min(self.max_share, MOST_PADDING)
        return min(self.min_slots, num_slots), min(num_tokens, int(most_share * num_slots))


@dataclasses.dataclass(frozen=True)
class Profile:
    """The shares of a model's heads, for each of `RATIOS`: how many times the average each has. Their mean is 1."""

    shares: Float[np.ndarray, "r l k"]
    model: str
    weights_hash: str

    @classmethod
    def measured(cls, model: LanguageModel, text: str) -> Profile:
        """Measures the profile of a model on a text's first chunk, which takes less time than attention matching.

        Raises:
          UserError: the text is too short for a slot a head at the least of the ratios.
        """
        chunk = chunks_of(model, text, [], MatchingConfig())[0]
        num_tokens = len(chunk.tokens)
        if num_tokens < max(RATIOS):
            raise UserError(
                f"the text that the profile is measured on has {num_tokens} tokens, expected at least {max(RATIOS)}: "
                "give a longer one, of 2,000 tokens or so"
            )
        received_lks = measure_attention(model, chunk)
        lengths = [by_threshold(received_lks, num_tokens // ratio, 1, num_tokens) for ratio in RATIOS]
        shares_rlk = np.stack([lengths_lk / lengths_lk.mean() for lengths_lk in lengths])
        return cls(shares_rlk, model.name, model.fingerprint)

    @classmethod
    def of(cls, model: LanguageModel) -> Profile:
        """Returns the profile of a model: its published one, the one in the cache, or one that is measured now.

        If one process of a job has to measure it, all do, and the first one keeps it.
        """
        paths = [path for path in (*sorted(PUBLISHED.glob("*.json")), cached_profile(model)) if path.is_file()]
        kept = next((profile for path in paths if (profile := cls.load(path)).belongs_to(model)), None)
        if not processes.any_of(kept is None):
            assert kept is not None
            return kept
        with stage(f"measuring once how {model.name} shares slots out over its heads"):
            profile = cls.measured(model, PROFILE_TEXT.read_text(encoding="utf-8"))
        if processes.is_first():
            try:
                profile.save(cached_profile(model))
            except OSError as error:
                log.warning("the profile of %s cannot be kept, and is measured again next time: %s", model.name, error)
        return profile

    def belongs_to(self, model: LanguageModel) -> bool:
        """Says whether the profile was measured on this model's weights; never so without a fingerprint of them."""
        l, k = model.config.num_layers, model.config.num_kv_heads
        is_known = bool(self.weights_hash) and self.weights_hash == model.fingerprint
        return is_known and self.shares.shape == (len(RATIOS), l, k)

    def lengths(self, num_slots: int, num_tokens: int, fewest: int, most: int) -> Int[np.ndarray, "l k"]:
        """Returns how many slots each head gets of a document of so many tokens: shares for the nearest ratio."""
        ratio = math.log(num_tokens / num_slots)
        nearest = int(np.argmin(np.abs(np.log(RATIOS) - ratio)))
        return by_shares(self.shares[nearest], num_slots, fewest, most)

    def save(self, path: Path) -> None:
        """Writes the profile as JSON, whole or not at all."""
        told = {"format_version": FORMAT_VERSION, "model": self.model, "weights_hash": self.weights_hash}
        files.write_text(path, json.dumps(told | {"shares": np.round(self.shares, 4).tolist()}) + "\n")

    @classmethod
    def load(cls, path: Path) -> Profile:
        """Reads a profile that `save` wrote. Raises a UserError if it is none."""
        try:
            told = files.read_json(path)
            shares, version = np.asarray(told["shares"], np.float64), told["format_version"]
            profile = cls(shares, str(told["model"]), str(told["weights_hash"]))
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path} is no profile of a model ({error}): remove it, it is measured again") from error
        is_whole = version == FORMAT_VERSION and shares.ndim == 3 and len(shares) == len(RATIOS) and shares.size > 0
        if not is_whole or not (np.isfinite(shares).all() and shares.min() >= 0 and (shares.max((1, 2)) > 0).all()):
            raise UserError(
                f"{path} is no profile of a model (version {version}, shares {shares.shape}, expected version "
                f"{FORMAT_VERSION}, numbers from 0 on and [{len(RATIOS)}, layers, kv heads]): remove it, it is "
                "measured again"
            )
        return profile


def cached_profile(model: LanguageModel) -> Path:
    """The file in the cache folder in which a model's profile is kept."""
    return hub.cache_folder() / "budgets" / f"{model.fingerprint[:16]}.json"


def head_lengths(
    budget: BudgetConfig, model: LanguageModel, chunks: Sequence[Chunk], num_slots: int
) -> Int[np.ndarray, "c l k"]:
    """Returns how many slots each head of each chunk's cartridge gets, with `num_slots` of all chunks on average."""
    l, k = model.config.num_layers, model.config.num_kv_heads
    average_c = [num_slots // len(chunks) + (i < num_slots % len(chunks)) for i in range(len(chunks))]
    # a later chunk's sink, which its composition drops, takes a token of its own
    room_c = [len(chunk.tokens) - (i > 0) for i, chunk in enumerate(chunks)]
    bounds_c = [budget.bounds(*each) for each in zip(average_c, room_c, strict=True)]
    match budget.kind:
        case "uniform":
            lengths = [np.full((l, k), average) for average in average_c]
        case "profile":
            profile = Profile.of(model)
            lengths = [
                profile.lengths(average, len(chunk.tokens), *bounds)
                for average, chunk, bounds in zip(average_c, chunks, bounds_c, strict=True)
            ]
        case "attention":
            received_clks = np.stack([measure_attention(model, chunk) for chunk in chunks])
            # the average of all chunks lies between that of the last and that of the first
            fewest, most = bounds_c[-1][0], budget.bounds(average_c[0], room_c[-1])[1]
            return by_threshold(received_clks, num_slots / len(chunks), fewest, most)
    return np.stack(lengths)


def by_threshold(
    received: Float[np.ndarray, "*heads s"], average: float, fewest: int, most: int
) -> Int[np.ndarray, "*heads"]:
    """Returns how many of each head's tokens are above one threshold, with which heads have so many on average."""
    ranked = -np.sort(-received, axis=-1)
    ranked[..., :fewest] = np.inf
    ranked[..., most:] = -np.inf
    total = round(average * ranked[..., 0].size)
    kept = np.argpartition(-ranked, total - 1, axis=None)[:total]
    return np.bincount(kept // ranked.shape[-1], minlength=ranked[..., 0].size).reshape(ranked.shape[:-1])


def by_shares(shares: Float[np.ndarray, "l k"], average: int, fewest: int, most: int) -> Int[np.ndarray, "l k"]:
    """Returns whole numbers in proportion to the shares, within the bounds, that come to the average exactly."""
    total = average * shares.size
    low, high = 0.0, total / shares.max() + most / max(shares[shares > 0].min(), 1e-9)
    for _ in range(200):  # what is cut off at the bounds goes to the others
        scale = (low + high) / 2
        low, high = (scale, high) if np.clip(scale * shares, fewest, most).sum() < total else (low, scale)
    exact = np.clip(high * shares, fewest, most)
    lengths = np.floor(exact).astype(np.int64)
    missing = total - int(lengths.sum())
    rounded_up = np.argsort(np.where(lengths < most, lengths - exact, np.inf), axis=None, kind="stable")[:missing]
    lengths.reshape(-1)[rounded_up] += 1
    return lengths
