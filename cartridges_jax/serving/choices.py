"""From a choice's events to the text that may be shown: stop strings, incomplete characters, log-probabilities."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from cartridges_jax.models.tokenizer import StreamDecoder, Tokenizer
from cartridges_jax.serving.protocol import ApiError
from cartridges_jax.serving.requests import GenerationRequest
from cartridges_jax.serving.scheduler import NOT_FINITE, Event, Request, Sampled, Started, Token

TOO_LATE = "the answer took longer than this server allows: ask for fewer tokens, or again when it is less busy"


class StopStrings:
    """Lets text through up to the first stop string; holds back an end that may still become one.

    Knuth, Morris and Pratt's search: of each stop string it is known how much of it the text ends with, so that work is
    linear in the text, whatever repeats itself in either.
    """

    def __init__(self, stops: tuple[str, ...]):
        self._stops = [(stop, _borders(stop)) for stop in stops]
        self._matched = [0] * len(stops)
        self._held = ""

    def push(self, piece: str) -> tuple[str, bool]:
        """Takes a piece of text; gives the text that is certain now, and whether a stop string follows it."""
        begins = [at for i in range(len(self._stops)) if (at := self._find(i, piece)) is not None]
        self._held += piece
        if begins:
            certain, self._held = self._held[: min(begins)], ""
            self._matched = [0] * len(self._stops)
            return certain, True
        split = len(self._held) - max(self._matched, default=0)
        certain, self._held = self._held[:split], self._held[split:]
        return certain, False

    def _find(self, i: int, piece: str) -> int | None:
        """Where stop string i begins in the text that is held back and the piece behind it, if it does."""
        (stop, borders), matched = self._stops[i], self._matched[i]
        for end, character in enumerate(piece, start=len(self._held) + 1):
            while matched and stop[matched] != character:
                matched = borders[matched - 1]
            matched += stop[matched] == character
            if matched == len(stop):
                return end - matched
        self._matched[i] = matched
        return None

    def flush(self) -> str:
        held, self._held = self._held, ""
        return held


@functools.lru_cache(64)
def _borders(text: str) -> tuple[int, ...]:
    """For each beginning of the text, the length of its longest proper end that is a beginning, too."""
    borders = [0]
    for character in text[1:]:
        length = borders[-1]
        while length and text[length] != character:
            length = borders[length - 1]
        borders.append(length + (text[length] == character))
    return tuple(borders)


@dataclass
class Delta:
    """What one or more events add to a choice."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    finish_reason: Literal["stop", "length", "cancelled"] | None = None

    def add(self, other: Delta) -> None:
        self.text += other.text
        self.token_ids += other.token_ids
        self.logprobs += other.logprobs
        self.finish_reason = other.finish_reason


class Choice:
    """Turns the events of one choice into deltas."""

    def __init__(
        self, generation: GenerationRequest, request: Request, tokenizer: Tokenizer, token_text: Callable[[int], str]
    ):
        self._generation, self._request, self._token_text = generation, request, token_text
        self._decoder = StreamDecoder(tokenizer)
        self._stops = StopStrings(generation.stops)
        self.num_tokens = self.cached_tokens = 0
        self.ended: float | None = None  # time.monotonic() of its end
        self.finish_reason: Literal["stop", "length", "cancelled"] | None = None

    def take(self, event: Event) -> Delta:
        """What an event adds. Raises: ApiError, when time is up, or the model's numbers are not finite."""
        delta = Delta()
        if isinstance(event, Started):
            self.cached_tokens = event.cached_tokens
        elif isinstance(event, Token):
            self.num_tokens += 1
            delta = self._token(event.sampled)
        elif event.reason == "deadline":
            raise ApiError(504, TOO_LATE, code="timeout")
        elif event.reason == "not_finite":
            raise ApiError(422, NOT_FINITE, "cartridges", code="not_finite")
        else:
            delta.text = self._certain(self._decoder.flush())
            if self.finish_reason is None:  # flushing may have completed a stop string
                delta.text += self._stops.flush()
                self.finish_reason = event.reason
        delta.finish_reason = self.finish_reason
        return delta

    def _token(self, sampled: Sampled) -> Delta:
        hidden = sampled.token in self._request.stop_ids and not self._request.ignore_eos
        text = "" if hidden else self._certain(self._decoder.push(sampled.token))
        return Delta(text, [sampled.token], [self._entry(sampled)] if self._generation.logprobs else [])

    def _certain(self, piece: str) -> str:
        certain, stopped = self._stops.push(piece)
        if stopped:
            self.finish_reason = "stop"
        return certain

    def _entry(self, sampled: Sampled) -> dict[str, Any]:
        alternatives = zip(sampled.top_ids, sampled.top_logprobs, strict=True)
        best = [self._logprob(token, logprob) for token, logprob in alternatives]
        return {**self._logprob(sampled.token, sampled.logprob), "top_logprobs": best}

    def _logprob(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._token_text(token)
        name = f"token_id:{token}" if self._generation.tokens_as_ids else text
        return {"token": name, "token_id": token, "logprob": logprob, "bytes": list(text.encode())}
