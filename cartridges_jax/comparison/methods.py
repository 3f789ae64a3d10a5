"""The methods: what each puts before a question in place of the document, and what it takes to make it."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path

import jax

from cartridges_jax.cartridge.arrays import Cartridge
from cartridges_jax.command_line import files
from cartridges_jax.comparison.config import Method
from cartridges_jax.comparison.retrieval import bm25_retriever
from cartridges_jax.initial.initializers import InitConfig, initial_cartridge
from cartridges_jax.models.language_model import LanguageModel
from cartridges_jax.serving.generate import generate_ids
from cartridges_jax.training.config import TrainConfig
from cartridges_jax.training.data import read_examples
from cartridges_jax.training.run import train

SUMMARIZE = "Summarize the text above in about {words} words, with all names and numbers."


@dataclasses.dataclass(frozen=True)
class Context:
    """What stands before a question: slots, or a system message, which may be another for each question."""

    prefix: Cartridge | None
    system: Callable[[str], str] | None
    num_tokens: int
    kv_bytes: int
    seconds_to_make: float = 0.0
    tokens_to_make: int = 0


@dataclasses.dataclass(frozen=True)
class Source:
    """A document that methods are made from. In its folder lie what they keep, and the dataset of self-study."""

    model: LanguageModel
    text: str
    folder: Path
    train: TrainConfig  # with the document's dataset and corpus

    def make(self, method: Method, num_tokens: int, seed: int) -> Context:
        """Makes a method's context of so many tokens or slots; those without a budget take what they take."""
        match method:
            case "nothing":
                return Context(None, None, 0, 0)
            case "full document":
                return self._written(self.text, 0.0, 0)
            case "first tokens":
                begun = time.monotonic()
                prefix = jax.block_until_ready(Cartridge.from_text(self.model, self.text, num_tokens))
                return _slots(prefix, time.monotonic() - begun, num_tokens)
            case "summary":
                return self._summary(num_tokens)
            case "BM25":
                begun = time.monotonic()
                retrieve = bm25_retriever(self.text, num_tokens, self.model.tokenizer)
                num_bytes = num_tokens * self.model.kv_bytes_per_token
                return Context(None, retrieve, num_tokens, num_bytes, time.monotonic() - begun)
            case "attention matching":
                return self._matched(dataclasses.replace(self.train.init, num_slots=num_tokens))
            case "uniform attention matching":
                return self._matched(dataclasses.replace(self.train.init, num_slots=num_tokens, budget="uniform"))
            case "cartridge":
                return self._trained(num_tokens, seed)

    def _written(self, text: str, seconds: float, tokens: int) -> Context:
        num_tokens = len(self.model.tokenizer.encode(text))
        return Context(None, lambda _: text, num_tokens, num_tokens * self.model.kv_bytes_per_token, seconds, tokens)

    def _summary(self, num_tokens: int) -> Context:
        begun, tokenizer = time.monotonic(), self.model.tokenizer
        asked = [
            {"role": "system", "content": self.text},
            {"role": "user", "content": SUMMARIZE.format(words=num_tokens * 2 // 3)},
        ]
        prompt = tuple(tokenizer.chat_ids(asked, add_generation_prompt=True))
        [ids] = generate_ids(self.model, [prompt], None, num_tokens)
        return self._written(tokenizer.decode(ids).strip(), time.monotonic() - begun, len(prompt) + len(ids))

    def _matched(self, init: InitConfig) -> Context:
        matching = dataclasses.replace(init.matching, queries="repeat")
        init = dataclasses.replace(init, kind="attention_matching", path=None, matching=matching)
        begun, tokens = time.monotonic(), len(self.model.tokenizer.encode(self.text))
        prefix = jax.block_until_ready(initial_cartridge(init, self.model, self.text, [], seed=0))
        return _slots(prefix, time.monotonic() - begun, tokens)

    def _trained(self, num_slots: int, seed: int) -> Context:
        output = self.folder / str(num_slots) / f"seed{seed}"
        cost = output.with_suffix(".json")
        if not cost.is_file():
            begun = time.monotonic()
            init = dataclasses.replace(self.train.init, num_slots=num_slots)
            train(dataclasses.replace(self.train, init=init, seed=seed, output_dir=str(output)), self.model)
            files.write_text(cost, json.dumps({"seconds": time.monotonic() - begun}) + "\n")
        prefix = Cartridge.load(output / "cartridge.safetensors", model=self.model)
        seconds = self._self_study_seconds() + files.read_json(cost)["seconds"]
        # attention matching reads the document, self-study writes the conversations, and training reads them
        assert self.train.dataset is not None
        read = sum(len(example.tokens) for example in read_examples(self.train.dataset, self.model.tokenizer))
        tokens = len(self.model.tokenizer.encode(self.text)) + read + prefix.provenance.training_tokens
        return _slots(prefix, seconds, tokens)

    def _self_study_seconds(self) -> float:
        path = self.folder / "self_study.json"
        return files.read_json(path)["seconds"] if path.is_file() else 0.0


def _slots(prefix: Cartridge, seconds: float, tokens: int) -> Context:
    return Context(prefix, None, prefix.average_slots, prefix.num_bytes, seconds, tokens)
