"""From a job's events to OpenAI's replies: text, stop strings, log-probabilities, usage; whole or as chunks."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from cartridges_jax.serving.engine_thread import Accepted, Job
from cartridges_jax.serving.protocol import ApiError, Call
from cartridges_jax.serving.scheduler import Event, Sampled, Scored, Started, Token
from cartridges_jax.tokenizer import StreamDecoder, Tokenizer


class StopStrings:
    """Lets text through up to the first stop string; holds back an end that may still become one."""

    def __init__(self, stops: tuple[str, ...]):
        self._stops = stops
        self._held = ""

    def push(self, piece: str) -> tuple[str, bool]:
        """Text that is certain, and whether a stop string follows it."""
        self._held += piece
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            certain, self._held = self._held[: min(found)], ""
            return certain, True
        split = len(self._held) - max((_overlap(self._held, stop) for stop in self._stops), default=0)
        certain, self._held = self._held[:split], self._held[split:]
        return certain, False

    def flush(self) -> str:
        held, self._held = self._held, ""
        return held


def _overlap(held: str, stop: str) -> int:
    """Length of the longest end of `held` that begins `stop`."""
    return next((n for n in range(min(len(held), len(stop) - 1), 0, -1) if held.endswith(stop[:n])), 0)


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

    def __init__(self, call: Call, tokenizer: Tokenizer, token_text: Callable[[int], str]):
        self._call, self._token_text = call, token_text
        self._decoder = StreamDecoder(tokenizer)
        self._stops = StopStrings(call.stops)
        self.num_tokens = self.cached_tokens = 0
        self.finish_reason: Literal["stop", "length", "cancelled"] | None = None

    def take(self, event: Event) -> Delta:
        delta = Delta()
        if isinstance(event, Started):
            self.cached_tokens = event.cached_tokens
        elif isinstance(event, Token):
            self.num_tokens += 1
            delta = self._token(event.sampled)
        else:
            delta.text = self._certain(self._decoder.flush())
            if self.finish_reason is None:  # flushing may have completed a stop string
                delta.text += self._stops.flush()
                self.finish_reason = event.reason
        delta.finish_reason = self.finish_reason
        return delta

    def _token(self, sampled: Sampled) -> Delta:
        request = self._call.request
        hidden = sampled.token in request.stop_ids and not request.ignore_eos
        text = "" if hidden else self._certain(self._decoder.push(sampled.token))
        return Delta(text, [sampled.token], [self._entry(sampled)] if self._call.logprobs else [])

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
        name = f"token_id:{token}" if self._call.tokens_as_ids else text
        return {"token": name, "token_id": token, "logprob": logprob, "bytes": list(text.encode())}


class Answer:
    """The choices of one job, and the JSON that they make."""

    def __init__(self, job: Job, accepted: Accepted, tokenizer: Tokenizer, token_text: Callable[[int], str]):
        self.call = job.call
        self.choices = [Choice(self.call, tokenizer, token_text) for _ in range(self.call.n)]
        self._job, self._accepted, self._token_text = job, accepted, token_text
        self._id, self._created = f"chatcmpl-{job.id}", int(time.time())

    @property
    def finished(self) -> bool:
        return all(choice.finish_reason for choice in self.choices)

    async def next(self) -> tuple[int, Delta]:
        """The next thing that happens to a choice. Raises: ApiError, when the engine ends first."""
        while True:
            index, event = await self._job.events.get()
            if isinstance(event, ApiError):
                raise event
            assert not isinstance(event, Accepted)
            choice = self.choices[index]
            if choice.finish_reason is None:  # else a stop string ended it, and these tokens were on their way
                delta = choice.take(event)
                if choice.finish_reason is not None:
                    self._job.cancelled.add(index)
                return index, delta

    def whole(self, deltas: list[Delta]) -> dict[str, Any]:
        choices = [
            {"index": i, "message": {"role": "assistant", "content": delta.text}, **self._details(delta)}
            for i, delta in enumerate(deltas)
        ]
        about_prompt = self._prompt_ids() | self._prompt_logprobs()
        return self._envelope("chat.completion", choices) | about_prompt | {"usage": self._usage()}

    def first_chunk(self, index: int) -> dict[str, Any]:
        choice = {"index": index, "delta": {"role": "assistant", "content": ""}, **self._details(Delta())}
        return self._envelope("chat.completion.chunk", [choice]) | self._prompt_ids()

    def chunk(self, index: int, delta: Delta) -> dict[str, Any] | None:
        """None when there is nothing to tell yet."""
        details = self._details(delta)
        if not (delta.text or details["logprobs"] or details.get("token_ids") or delta.finish_reason):
            return None
        content = {"content": delta.text} if delta.text else {}
        return self._envelope("chat.completion.chunk", [{"index": index, "delta": content, **details}])

    def usage_chunk(self) -> dict[str, Any]:
        return self._envelope("chat.completion.chunk", []) | {"usage": self._usage()}

    def _envelope(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self.call.model,
            "choices": choices,
        }

    def _details(self, delta: Delta) -> dict[str, Any]:
        details: dict[str, Any] = {
            "logprobs": {"content": delta.logprobs} if delta.logprobs else None,
            "finish_reason": delta.finish_reason,
        }
        if self.call.return_token_ids:
            details["token_ids"] = delta.token_ids
        return details

    def _prompt_ids(self) -> dict[str, Any]:
        return {"prompt_token_ids": list(self.call.request.prompt)} if self.call.return_token_ids else {}

    def _prompt_logprobs(self) -> dict[str, Any]:
        """vLLM's shape: for each token of the prompt, itself and the best ones by their ids; nothing for the first."""
        if self._accepted.prompt is None:
            return {}
        return {"prompt_logprobs": [None, *map(self._prompt_entry, self._accepted.prompt)]}

    def _prompt_entry(self, scored: Scored) -> dict[str, Any]:
        own = scored.sampled
        best = enumerate(zip(own.top_ids, own.top_logprobs, strict=True), start=1)
        found = {own.token: (own.logprob, scored.rank)} | {token: (logprob, rank) for rank, (token, logprob) in best}
        return {
            str(token): {"logprob": logprob, "rank": rank, "decoded_token": self._token_text(token)}
            for token, (logprob, rank) in found.items()
        }

    def _usage(self) -> dict[str, Any]:
        prompt, answer = len(self.call.request.prompt), sum(choice.num_tokens for choice in self.choices)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": answer,
            "total_tokens": prompt + answer,
            # The choices share their prompt: what the first of them found is what earlier requests had left.
            "prompt_tokens_details": {"cached_tokens": self.choices[0].cached_tokens},
            "cartridge_tokens": self._accepted.cartridge_tokens,
        }
