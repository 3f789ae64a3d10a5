"""Where a cartridge comes from, and whether a model is the one that it was made for."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cartridges_jax.command_line.errors import UserError

if TYPE_CHECKING:
    from cartridges_jax.models.language_model import LanguageModel

LARGEST_NUMBER = 1e300  # of FLOPs or tokens, beyond which a header is not believed


@dataclasses.dataclass(frozen=True)
class Provenance:
    """Where a cartridge comes from. Hashable, so that it may ride along through `jit` as a static field."""

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
    thinking: bool | None = None  # the mode in which it was trained to answer; None: as the chat template has it

    @classmethod
    def of(cls, model: LanguageModel, corpus: str, recipe: str) -> Provenance:
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

    def as_dict(self) -> dict[str, str | int | float | bool]:
        """JSON's values; what is None is left out."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Provenance:
        """Takes the fields it knows.

        Raises:
          TypeError, ValueError: one of them holds something else than a text or a number that can be told to others.
        """
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
        """Raises: UserError, both sides shown, if `source` was made for another model than this one."""
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
    """Whether both are Hub ids, of models that differ in name; whose copy it is does not matter."""
    from cartridges_jax.models.hub import HUB_ID

    ids = [name for name in (theirs, ours) if HUB_ID.fullmatch(name) and not Path(name).exists()]
    names = [name.partition("/")[2].casefold() for name in ids]
    return len(set(names)) == 2
