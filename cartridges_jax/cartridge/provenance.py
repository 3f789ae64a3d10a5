"""Provenance: where a cartridge comes from, and whether a model is the one that it was made for."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cartridges_jax.command_line.errors import UserError

if TYPE_CHECKING:
    from cartridges_jax.models.config import ModelConfig
    from cartridges_jax.models.language_model import LanguageModel

LARGEST_NUMBER = 1e300  # of FLOPs or tokens; a header that says more is not believed


@dataclasses.dataclass(frozen=True)
class Provenance:
    """Where a cartridge comes from; no compiled program knows of it."""

    model: str = ""
    model_config: str = ""  # JSON of the ModelConfig, RoPE settings included
    weights_hash: str = ""
    tokenizer_hash: str = ""
    corpus_hash: str = ""
    recipe: str = ""  # how the slots came to be, for people
    training_tokens: int = 0
    training_flops: float = 0.0
    evaluation: str = ""  # JSON of the evaluation's table
    dataset_hash: str = ""  # of the conversations that it was trained on
    thinking: bool | None = None  # the mode of thinking it was trained to answer in; None: the chat template's own

    @classmethod
    def of(cls, model: LanguageModel, corpus: str, recipe: str) -> Provenance:
        """Returns the provenance of a cartridge that is made now, for this model, of the text `corpus`."""
        return cls(
            model=model.name,
            model_config=json.dumps(dataclasses.asdict(model.config), sort_keys=True),
            weights_hash=model.fingerprint,
            tokenizer_hash=model.tokenizer.fingerprint,
            corpus_hash=hashlib.sha256(corpus.encode()).hexdigest(),
            recipe=recipe,
        )

    def made_for(self, model: LanguageModel) -> Provenance:
        """Returns this provenance with `model` noted down, of a cartridge whose file did not say enough about it."""
        noted = Provenance.of(model, "", f"{self.recipe}; its model as given to convert")
        return dataclasses.replace(noted, corpus_hash=self.corpus_hash, training_tokens=self.training_tokens)

    def read_config(self) -> ModelConfig:
        """Reads the config of the model. Raises a UserError if it says nothing, or nothing that can be."""
        from cartridges_jax.models.config import ModelConfig

        try:
            said = json.loads(self.model_config)
            config = ModelConfig(**said | {"rope_factors": tuple(said["rope_factors"])})
            local = config.rope_theta if config.local_rope_theta is None else config.local_rope_theta
            if not (0 < config.rope_theta < math.inf and 0 < local < math.inf):
                raise ValueError
        except (ValueError, TypeError, LookupError, ArithmeticError, RecursionError, UserError) as error:
            raise UserError(
                "this cartridge has to be rotated to other positions and does not say how its model rotates keys: name "
                "the model, with --model"
            ) from error
        return config

    def as_dict(self) -> dict[str, str | int | float | bool]:
        """Returns the fields as JSON takes them, without those that are None."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Provenance:
        """Reads the fields that it knows, and no others; a value of another type is a TypeError or ValueError."""
        known = {field.name: type(field.default) for field in dataclasses.fields(cls)} | {"thinking": bool}
        found = {name: values[name] for name in known if name in values}
        for name, value in found.items():
            if type(value) is not known[name] and not (known[name] is float and type(value) is int):
                raise TypeError(f"{name} is a {type(value).__name__}, expected a {known[name].__name__}")
            if isinstance(value, str):
                value.encode()  # a lone surrogate is a ValueError
            elif not abs(value) < LARGEST_NUMBER:
                raise UserError(f"{name} is no finite number")
        return cls(**found)

    def check(self, model: LanguageModel, source: str) -> None:
        """Raises a UserError that names both models if the cartridge in `source` was made for another than `model`."""
        expected = Provenance.of(model, "", "")
        for field, meaning in (("weights_hash", "weights"), ("tokenizer_hash", "tokenizer")):
            theirs, ours = getattr(self, field), getattr(expected, field)
            if theirs and theirs != ours:
                raise UserError(
                    f"{source} was made for {self.model} ({meaning} {theirs[:12]}…), not for {expected.model} "
                    f"({meaning} {ours[:12]}…): load the model it was made for"
                )
        if not self.weights_hash and _name_differs(self.model, expected.model):
            raise UserError(f"{source} says that it is for {self.model}, not for {expected.model}: load that model")
        if difference := model.config.layout_differs(self.model_config):
            raise UserError(
                f"{source} was made for {self.model} {difference}: its slots mean nothing to {expected.model}, "
                "load the model it was made for"
            )


def _name_differs(theirs: str, ours: str) -> bool:
    """Says whether both names are Hub ids of models with different names; the owners of the copies do not matter."""
    from cartridges_jax.models.hub import HUB_ID

    ids = [name for name in (theirs, ours) if HUB_ID.fullmatch(name) and not Path(name).exists()]
    names = [name.partition("/")[2].casefold() for name in ids]
    return len(set(names)) == 2
