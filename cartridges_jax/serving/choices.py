"""From a choice's events to the text that may be shown: stop strings, incomplete characters, log-probabilities."""

from __future__ import annotations

import codecs
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from cartridges_jax.models.tokenizer import StreamDecoder, Tokenizer
from cartridges_jax.serving.protocol import ApiError
from cartridges_jax.serving.requests import GenerationRequest
from cartridges_jax.serving.scheduler import (
    NOT_FINITE,
    Event,
    PromptScored,
    Request,
    Sampled,
    Scored,
    Started,
    Token,
)
from cartridges_jax.serving.tools import Call, CallParser, format_of

FinishReason = Literal["stop", "length", "cancelled", "tool_calls"]
TOO_LATE = "the answer took longer than this server allows: ask for fewer tokens, or again when it is less busy"


class StopStrings:
    """Lets text through up to the first stop string, or with it; holds back an end that may still become one.

    Knuth, Morris and Pratt's search: of each stop string it is known how much of it the text ends with, so that work is
    linear in the text, whatever repeats itself in either.
    """

    def __init__(self, stops: tuple[str, ...], include: bool = False):
        self._stops = [(stop, _borders(stop)) for stop in stops]
        self._include = include
        self._matched = [0] * len(stops)
        self._held = ""
        self.found: str | None = None  # the stop string that ended the text

    def push(self, piece: str) -> tuple[str, bool]:
        """Takes a piece of text; gives the text that is certain now, and whether a stop string ends it."""
        begins = [
            (at, len(stop)) for i, (stop, _) in enumerate(self._stops) if (at := self._find(i, piece)) is not None
        ]
        self._held += piece
        if begins:
            at, length = min(begins)
            self.found = self._held[at : at + length]
            certain, self._held = self._held[: at + length * self._include], ""
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
    offsets: list[int] = field(default_factory=list)  # how many characters come before each of these tokens
    tool_calls: list[Call] = field(default_factory=list)  # parts of calls, in OpenAI's shape of chunks
    finish_reason: FinishReason | None = None

    def add(self, other: Delta) -> None:
        self.text += other.text
        self.token_ids += other.token_ids
        self.logprobs += other.logprobs
        self.offsets += other.offsets
        self.tool_calls += other.tool_calls
        self.finish_reason = other.finish_reason


class Tokens:
    """How tokens are told: their text, their bytes, and where they stand in a text."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.name = functools.lru_cache(1 << 16)(self._name)

    def _name(self, token: int) -> str:
        """The token's text; a part of a character is spelt as OpenAI does, `bytes:\\xf0\\x9f`, so that all differ."""
        raw = self.tokenizer.token_bytes(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def entry(self, token: int, logprob: float | None, as_id: bool, is_shown: bool) -> dict[str, Any]:
        """The log-probability of a token. The bytes of those that are shown join to the text."""
        raw = list(self.tokenizer.token_bytes(token)) if is_shown else None
        name = f"token_id:{token}" if as_id else self.name(token)
        return {"token": name, "token_id": token, "logprob": logprob, "bytes": raw}


class Offsets:
    """Counts characters token by token; a part of a character stands where the character does."""

    def __init__(self, tokens: Tokens):
        self._tokens, self._characters = tokens, codecs.getincrementaldecoder("utf-8")("replace")
        self._count = 0

    def push(self, token: int, is_shown: bool) -> int:
        """How many characters come before the next token, which is in the text or not."""
        before = self._count
        if is_shown:
            self._count += len(self._characters.decode(self._tokens.tokenizer.token_bytes(token)))
        return before


class Choice:
    """Turns the events of one choice into deltas."""

    def __init__(self, generation: GenerationRequest, request: Request, tokens: Tokens):
        self._generation, self._request, self._tokens = generation, request, tokens
        self._calls = None
        skips = generation.skip_special_tokens
        if generation.tools is not None:
            names = [function["name"] for function in generation.tools.callable]
            self._calls = CallParser(form := format_of(tokens.tokenizer), names, generation.tools.parallel)
            skips &= not form.begin  # which may be such a token
        self._decoder = StreamDecoder(tokens.tokenizer, skip_special_tokens=skips)
        self._stops = StopStrings(generation.stops, generation.include_stops)
        self._offsets = Offsets(tokens)
        self._min_tokens = request.logits.min_tokens if request.logits else 0
        self.num_tokens = self.cached_tokens = 0
        self.ended: float | None = None  # time.monotonic() of its end
        self.sum_logprobs = 0.0
        self.prompt: list[Scored] | None = None  # the score of its prompt, if that was asked for
        self.finish_reason: FinishReason | None = None

    @property
    def stop_string(self) -> str | None:
        """The stop string that ended the answer, if one did."""
        return self._stops.found

    def take(self, event: Event) -> Delta:
        """What an event adds. Raises: ApiError, when time is up, or the model's numbers are not finite."""
        delta = Delta()
        if isinstance(event, Started):
            self.cached_tokens = event.cached_tokens
            if self._generation.echo and not self._generation.logprobs:
                delta.text = "".join(map(self._decoder.push, self._request.prompt))
        elif isinstance(event, PromptScored):
            self.prompt = event.scored
            if self._generation.echo and self._generation.logprobs:
                self._echo(delta, event.scored)
        elif isinstance(event, Token):
            self.num_tokens += 1
            self.sum_logprobs += event.sampled.logprob
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
        if self._calls is not None:
            self._read_calls(self._calls, delta)
        delta.finish_reason = self.finish_reason
        return delta

    def _token(self, sampled: Sampled) -> Delta:
        is_shown = sampled.token not in self._request.stop_ids or self._generation.include_stops
        delta = Delta(self._certain(self._decoder.push(sampled.token)) if is_shown else "", [sampled.token])
        if self._generation.logprobs:
            self._tell(delta, sampled, is_shown)
        return delta

    def _read_calls(self, parser: CallParser, delta: Delta) -> None:
        """Takes calls out of a text; a model that has called has stopped for that."""
        delta.text, delta.tool_calls = parser.push(delta.text)
        if parser.is_done:
            self.finish_reason = "stop"
        if self.finish_reason is not None:
            delta.text += parser.flush()
        if self.finish_reason == "stop" and parser.count:
            self.finish_reason = "tool_calls"

    def _certain(self, piece: str) -> str:
        if self.num_tokens <= self._min_tokens:
            return piece  # as in vLLM, no stop string begins before
        certain, stopped = self._stops.push(piece)
        if stopped:
            self.finish_reason = "stop"
        return certain

    def _echo(self, delta: Delta, scored: Sequence[Scored]) -> None:
        """Adds the prompt, with log-probabilities of all its tokens but the first."""
        first = self._request.prompt[0]
        delta.text = "".join(map(self._decoder.push, self._request.prompt))
        is_shown = self._is_text(first)
        entry = self._tokens.entry(first, None, self._generation.tokens_as_ids, is_shown)
        delta.logprobs.append(entry | {"top_logprobs": []})
        delta.offsets.append(self._offsets.push(first, is_shown))
        for one in scored:
            self._tell(delta, one.sampled, True)

    def _is_text(self, token: int) -> bool:
        return not (self._generation.skip_special_tokens and self._tokens.tokenizer.is_special(token))

    def _tell(self, delta: Delta, sampled: Sampled, is_shown: bool) -> None:
        """Adds a token's log-probabilities."""
        as_ids, count = self._generation.tokens_as_ids, self._request.top_logprobs
        is_shown &= self._is_text(sampled.token)
        alternatives = zip(sampled.top_ids[:count], sampled.top_logprobs[:count], strict=True)
        best = [self._tokens.entry(token, logprob, as_ids, self._is_text(token)) for token, logprob in alternatives]
        entry = self._tokens.entry(sampled.token, sampled.logprob, as_ids, is_shown)
        delta.logprobs.append({**entry, "top_logprobs": best})
        delta.offsets.append(self._offsets.push(sampled.token, is_shown))
