"""What synthesis needs of an inference server, and the three ways in which a call can fail.

A client makes one attempt per call, at one server. Whoever holds several servers decides what is tried again and where.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, Self

from command_line.errors import UserError
from synth.config import SamplingConfig

ChatMessages = Sequence[dict[str, str]]
OWN_TOKENIZER = "set config.chunker.tokenizer to a tokenizer.json, a folder that holds one, or a Hub id"
TopRows = tuple[tuple[tuple[int, float], ...], ...]  # per token: (token id, log-probability) pairs


class Refused(UserError):
    """The server will not serve this request, now or later; the sentence holds its own words."""


class Unavailable(OSError):
    """No usable answer this time; the same call may succeed later."""

    def __init__(self, message: str, kind: str = "connection"):
        super().__init__(message)
        self.kind = kind  # a few words to count by: "connection", "timeout", "http 500", "broken reply", "wrong tokens"


class Busy(Unavailable):
    """HTTP 429 or 503: the server wants fewer calls, and the next one after `retry_after` seconds (0: unsaid)."""

    def __init__(self, message: str, kind: str, retry_after: float = 0.0):
        super().__init__(message, kind)
        self.retry_after = retry_after


@dataclasses.dataclass(frozen=True)
class Completion:
    text: str
    token_ids: tuple[int, ...] | None
    top_logprobs: TopRows | None  # before temperature; one row a token, or none for a last end-of-turn token
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


@contextlib.contextmanager
def reading(url: str) -> Iterator[None]:
    """Around code that takes a reply apart: what it trips over is the reply's fault, and passes."""
    try:
        yield
    except Refused:
        raise
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise Unavailable(f"{url} gave a reply with a part missing or wrong ({error!r})", "broken reply") from error


def finite(logprob: Any) -> float:
    """A log-probability; a server in trouble gives NaN, which no JSON parser minds."""
    value = float(logprob)
    if math.isnan(value):
        raise Unavailable("the server gave a logprob that is not a number", "broken reply")
    return value


def answer_span(opened: list[int], empty: list[int], whole: list[int]) -> slice:
    """Where an answer's tokens stand in those of the conversation that it ends, its end-of-turn token included.

    Told from the same conversation up to the point where the answer begins, and with an empty answer. Raises: Refused.
    """
    first, tail = len(opened), empty[len(opened) :]
    end = len(whole) - len(tail)
    if not tail or end <= first or not empty[:first] == whole[:first] == opened or whole[end:] != tail:
        raise Refused("the model's chat template alters what stands around an answer, so its tokens cannot be told")
    return slice(first, end + 1)


class Client(Protocol):
    """One server. Every method raises `Refused`, `Unavailable` or `Busy`; a call ends within its time-out."""

    async def __aenter__(self) -> Self: ...
    async def __aexit__(self, *_: object) -> None: ...

    async def check(self) -> None:
        """Raises a sentence unless a server answers and serves the model: better now than after a document was read."""

    async def complete(
        self, messages: ChatMessages, sampling: SamplingConfig, seed: int, top_logprobs: int = 0
    ) -> Completion: ...

    async def score(self, messages: ChatMessages, top_logprobs: int) -> Completion:
        """The last message, which is the assistant's, as if the server had sampled it, end-of-turn token included.

        A given answer was not thought over: where the chat template has a switch, it is off.
        """
        ...

    async def tokenize(self, text: str) -> list[int]: ...

    async def detokenize(self, token_ids: Sequence[int]) -> str: ...
