"""What self-study needs of an inference server."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

from synth.config import SamplingConfig


class Refused(ValueError):
    """The server will not serve this request, now or later; the sentence holds its own words."""


class Unavailable(OSError):
    """The server gave no answer within the retries; it may later."""


@dataclasses.dataclass(frozen=True)
class Completion:
    text: str
    token_ids: tuple[int, ...] | None
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...] | None  # per sampled token: (token id, logprob) pairs
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


class Client(Protocol):
    async def complete(
        self, messages: Sequence[dict[str, str]], sampling: SamplingConfig, seed: int, top_logprobs: int = 0
    ) -> Completion:
        """Raises `Refused` or `Unavailable`."""
        ...
