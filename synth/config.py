"""Every setting of a synthesis run, checked before any work starts."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Literal

from synth import seed_prompts
from synth.resources.config import ResourceConfig

SYSTEM_PROMPT = """You know this text well:

<text>
{chunk}
</text>

Talk about what it says. Use full sentences that stand alone: name the people, things, dates and numbers you mean, \
since the other side cannot see the text. Do not write "the text" or "the passage"."""


def _at_least(name: str, value: float, low: float) -> None:
    if value < low:
        raise ValueError(f"config.{name} is {value}, expected at least {low}")


@dataclasses.dataclass(frozen=True)
class ClientConfig:
    base_url: str  # ends in /v1
    model: str
    api_key: str | None = None
    timeout_seconds: float = 120.0
    max_retries: int = 5

    def __post_init__(self):
        if not self.base_url.startswith(("http://", "https://")):
            raise ValueError(
                f"config.client.base_url is {self.base_url!r}, expected something like http://127.0.0.1:8000/v1"
            )
        _at_least("client.timeout_seconds", self.timeout_seconds, 0.001)
        _at_least("client.max_retries", self.max_retries, 0)


@dataclasses.dataclass(frozen=True)
class ChunkerConfig:
    min_tokens: int = 512
    max_tokens: int = 1024
    tokenizer: str | None = None  # None asks the server; else a tokenizer.json, a folder that holds one, or a Hub id
    # Windows at random places; or cut where sections, functions, messages begin; or windows of so many characters.
    kind: Literal["tokens", "structure", "characters"] = "tokens"
    characters: int = 4000  # of a chunk of that kind
    overlap: int = 0  # tokens, or characters, that a chunk repeats of the one before; windows at random places overlap

    def __post_init__(self):
        _at_least("chunker.min_tokens", self.min_tokens, 1)
        _at_least("chunker.characters", self.characters, 1)
        _at_least("chunker.overlap", self.overlap, 0)
        if self.min_tokens > self.max_tokens:
            raise ValueError(
                f"config.chunker.min_tokens is {self.min_tokens}, "
                f"more than config.chunker.max_tokens, {self.max_tokens}"
            )
        longest = {"tokens": 0, "structure": self.max_tokens // 2, "characters": self.characters // 2}[self.kind]
        if self.overlap > longest:
            raise ValueError(
                f"config.chunker.overlap is {self.overlap}, expected at most {longest}"
                + (": windows at random places overlap as they fall" if self.kind == "tokens" else ", half a chunk")
            )


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    temperature: float = 0.6
    top_p: float = 1.0
    max_tokens: int = 512
    stop: tuple[str, ...] = ()  # the message ends before any of these

    def check(self, name: str) -> None:
        _at_least(f"{name}.temperature", self.temperature, 0)
        _at_least(f"{name}.max_tokens", self.max_tokens, 1)
        if not 0 < self.top_p <= 1:
            raise ValueError(f"config.{name}.top_p is {self.top_p}, expected more than 0 and at most 1")


@dataclasses.dataclass(frozen=True)
class SynthConfig:
    output_dir: str
    num_conversations: int
    resource: ResourceConfig
    client: ClientConfig
    chunker: ChunkerConfig = ChunkerConfig()
    seed_prompts: tuple[str, ...] = tuple(seed_prompts.SEED_PROMPTS)  # one named twice is drawn twice as often
    conversations_per_chunk: int = 8  # they share a system prompt, so a server computes it once
    max_chunks_in_flight: int = 4
    instructions: tuple[str, ...] = ("{question}",)  # how the first question is put to side B; one is drawn
    rounds: int = 1
    question: SamplingConfig = SamplingConfig()
    answer: SamplingConfig = SamplingConfig(temperature=0.0, max_tokens=1024)
    top_logprobs: int = 20
    min_prob_mass: float = 0.99
    system_prompt: str = SYSTEM_PROMPT
    seed: int = 0

    def __post_init__(self):
        for name in ("num_conversations", "conversations_per_chunk", "max_chunks_in_flight", "rounds", "top_logprobs"):
            _at_least(name, getattr(self, name), 1)
        self.question.check("question")
        self.answer.check("answer")
        if not 0 < self.min_prob_mass <= 1:
            raise ValueError(f"config.min_prob_mass is {self.min_prob_mass}, expected more than 0 and at most 1")
        if "{chunk}" not in self.system_prompt:
            raise ValueError("config.system_prompt has no {chunk}: the text of the chunk takes its place")
        if not self.instructions or not all("{question}" in instruction for instruction in self.instructions):
            raise ValueError("config.instructions needs at least one text, each with {question} in it")
        if not self.seed_prompts:
            raise ValueError(f"config.seed_prompts is empty, known types are {', '.join(seed_prompts.KINDS)}")
        for kind in self.seed_prompts:
            if kind not in seed_prompts.KINDS:
                near = difflib.get_close_matches(kind, list(seed_prompts.KINDS), n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(seed_prompts.KINDS)}"
                raise ValueError(f"config.seed_prompts names an unknown type {kind!r}: {hint}")
