"""From a request's events to the API's replies, whole or as chunks: OpenAI's shapes, and Tokasaurus' fingerprint."""

from __future__ import annotations

import base64
import json
import time
from array import array
from collections.abc import Sequence
from typing import Any, Literal

from cartridges_jax.serving.choices import Choice, Delta, Tokens
from cartridges_jax.serving.engine_thread import Accepted, PendingRequest
from cartridges_jax.serving.protocol import ApiError
from cartridges_jax.serving.scheduler import Scored
from cartridges_jax.serving.tools import joined

OBJECTS = {"chat": ("chatcmpl", "chat.completion", "chat.completion.chunk"), "text": ("cmpl", *["text_completion"] * 2)}


class Answer:
    """The choices of one request, and the JSON that they make; choice i·n + j is the j-th answer to prompt i.

    Of `best_of` answers that are written to each prompt, the most likely are told, by the mean of their tokens.
    """

    def __init__(self, pending: PendingRequest, tokens: Tokens):
        generation = self.generation = pending.generation
        requests = [request for request in generation.requests for _ in range(generation.n)]
        self.choices = [Choice(generation, request, tokens) for request in requests]
        self.cartridge_tokens = pending.prefix.length if pending.prefix else 0
        self.failed = False  # it ended early, by an error
        self._pending, self._tokens = pending, tokens
        self.id, self.created = pending.id, int(time.time())
        self._start, self._whole, self._chunk = OBJECTS[generation.kind]

    @property
    def finished(self) -> bool:
        return all(choice.finish_reason for choice in self.choices)

    @property
    def num_tokens(self) -> int:
        return sum(choice.num_tokens for choice in self.choices)

    @property
    def cached_tokens(self) -> int:
        # The choices of a prompt share it: what the first of them found is what earlier requests had left.
        return sum(choice.cached_tokens for choice in self.choices[:: self.generation.n])

    @property
    def prompt_tokens(self) -> int:
        return sum(len(request.prompt) for request in self.generation.requests)

    async def next(self) -> tuple[int, Delta]:
        """Waits for what happens next to a choice. Raises: ApiError, when the engine ends first or time is up."""
        while True:
            index, event = await self._pending.events.get()
            try:
                if isinstance(event, ApiError):
                    raise event
                assert not isinstance(event, Accepted)
                choice = self.choices[index]
                if choice.finish_reason is None:  # else a stop string ended it, and these tokens were on their way
                    delta = choice.take(event)
                    if choice.finish_reason is not None:
                        choice.ended = time.monotonic()
                        self._pending.cancelled.add(index)
                    return index, delta
            except ApiError:
                self.failed = True
                raise

    async def all(self) -> list[Delta]:
        """Waits for everything that each choice says. Raises: as `next`."""
        deltas = [Delta() for _ in self.choices]
        while not self.finished:
            index, delta = await self.next()
            deltas[index].add(delta)
        return deltas

    def whole(self, deltas: Sequence[Delta]) -> dict[str, Any]:
        told = self._told()
        deltas = [deltas[i] for i in told]
        choices = [
            {"index": i, **self._said(delta, "message"), **self._details(delta)} for i, delta in enumerate(deltas)
        ]
        about_prompt = self._prompt_ids()
        if self.generation.prompt_logprobs is not None:
            prompts = [self._prompt_logprobs(i // self.generation.n) for i in told]
            if self.generation.kind == "text":
                choices = [choice | {"prompt_logprobs": own} for choice, own in zip(choices, prompts, strict=True)]
            if len(self.generation.requests) == 1:
                about_prompt["prompt_logprobs"] = prompts[0]
        reply = self._envelope(self._whole, choices) | about_prompt | {"usage": self._usage()}
        if self.generation.fingerprint or self.generation.packed:
            reply["system_fingerprint"] = self._fingerprint(deltas)
        return reply

    def first_chunk(self, index: int) -> dict[str, Any]:
        said = {"delta": {"role": "assistant", "content": ""}} if self.generation.kind == "chat" else {"text": ""}
        choice = {"index": index, **said, **self._details(Delta())}
        return self._envelope(self._chunk, [choice]) | self._prompt_ids()

    def chunk(self, index: int, delta: Delta) -> dict[str, Any] | None:
        """The chunk that sends a delta; None if it holds nothing that can be sent yet."""
        details = self._details(delta)
        parts = delta.text, delta.tool_calls, details["logprobs"], details.get("token_ids"), delta.finish_reason
        if not any(parts):
            return None
        return self._envelope(self._chunk, [{"index": index, **self._said(delta, "delta"), **details}])

    def usage_chunk(self) -> dict[str, Any]:
        return self._envelope(self._chunk, []) | {"usage": self._usage()}

    def _said(self, delta: Delta, name: Literal["message", "delta"]) -> dict[str, Any]:
        if self.generation.kind == "text":
            return {"text": delta.text}
        calls = {"tool_calls": joined(delta.tool_calls)} if delta.tool_calls else {}
        if name == "delta":
            return {name: ({"content": delta.text} if delta.text else {}) | calls}
        for call in calls.get("tool_calls", ()):
            del call["index"]
        return {name: {"role": "assistant", "content": delta.text or (None if calls else "")} | calls}

    def _envelope(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": f"{self._start}-{self.id}",
            "object": kind,
            "created": self.created,
            "model": self.generation.model,
            "choices": choices,
        }

    def _told(self) -> list[int]:
        """The choices that are told: all, or the best of each prompt, best first."""
        n, kept = self.generation.n, self.generation.kept
        if kept == n:
            return list(range(len(self.choices)))

        def mean(i: int) -> float:
            return self.choices[i].sum_logprobs / max(self.choices[i].num_tokens, 1)

        return [
            i
            for first in range(0, len(self.choices), n)
            for i in sorted(range(first, first + n), key=mean, reverse=True)[:kept]
        ]

    def _details(self, delta: Delta) -> dict[str, Any]:
        logprobs = None
        if delta.logprobs and not self.generation.packed:
            is_chat = self.generation.kind == "chat"
            logprobs = {"content": delta.logprobs} if is_chat else _text_logprobs(delta)
        details: dict[str, Any] = {"logprobs": logprobs, "finish_reason": delta.finish_reason}
        if self.generation.return_token_ids:
            details["token_ids"] = delta.token_ids
        return details

    def _fingerprint(self, deltas: Sequence[Delta]) -> str:
        """JSON with every choice's token ids; packed, also base64 of raw little-endian arrays, rows [token][best]."""
        fields: dict[str, Any] = {"completion_ids": [delta.token_ids for delta in deltas]}
        if self.generation.packed and self.generation.logprobs:
            best = [[best for entry in delta.logprobs for best in entry["top_logprobs"]] for delta in deltas]
            fields["packed_chosen_logprobs"] = [
                _packed("f", [entry["logprob"] for entry in delta.logprobs]) for delta in deltas
            ]
            if self.generation.requests[0].top_logprobs:
                fields["packed_topk_indices"] = [_packed("i", [entry["token_id"] for entry in row]) for row in best]
                fields["packed_topk_logprobs"] = [_packed("f", [entry["logprob"] for entry in row]) for row in best]
        return json.dumps(fields)

    def _prompt_ids(self) -> dict[str, Any]:
        ids = [list(request.prompt) for request in self.generation.requests]
        return {"prompt_token_ids": ids[0] if len(ids) == 1 else ids} if self.generation.return_token_ids else {}

    def _prompt_logprobs(self, prompt: int) -> list[dict[str, Any] | None]:
        """In vLLM's shape: the log-probabilities of each token of a prompt but the first, and of the best, by ids."""
        return [None, *map(self._prompt_entry, self.choices[prompt * self.generation.n].prompt or ())]

    def _prompt_entry(self, scored: Scored) -> dict[str, Any]:
        own = scored.sampled
        count = self.generation.prompt_logprobs
        best = enumerate(zip(own.top_ids[:count], own.top_logprobs[:count], strict=True), start=1)
        found = {own.token: (own.logprob, scored.rank)} | {token: (logprob, rank) for rank, (token, logprob) in best}
        return {
            str(token): {"logprob": logprob, "rank": rank, "decoded_token": self._tokens.name(token)}
            for token, (logprob, rank) in found.items()
        }

    def _usage(self) -> dict[str, Any]:
        """Counts of tokens. A cartridge's slots are not the prompt's tokens: they are counted apart, not in the sum."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.num_tokens,
            "total_tokens": self.prompt_tokens + self.num_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens, "cartridge_tokens": self.cartridge_tokens},
        }


def _text_logprobs(delta: Delta) -> dict[str, Any]:
    """Log-probabilities in OpenAI's older shape, that of /v1/completions: a list for every field."""
    return {
        "tokens": [entry["token"] for entry in delta.logprobs],
        "token_logprobs": [entry["logprob"] for entry in delta.logprobs],
        "top_logprobs": [_by_name(entry) for entry in delta.logprobs],
        "text_offset": delta.offsets,
    }


def _by_name(entry: dict[str, Any]) -> dict[str, float] | None:
    """The best tokens and the one that was taken, by their texts; of several with one text, others by their ids."""
    if entry["logprob"] is None:  # the first of a prompt
        return None
    names = {entry["token_id"]: entry["token"]}
    logprobs = {best["token_id"]: best["logprob"] for best in entry["top_logprobs"]}
    for best in entry["top_logprobs"]:
        taken = best["token"] in names.values() and best["token_id"] not in names
        names.setdefault(best["token_id"], f"token_id:{best['token_id']}" if taken else best["token"])
    return {names[token]: logprob for token, logprob in (logprobs | {entry["token_id"]: entry["logprob"]}).items()}


def _packed(kind: str, values: list[Any]) -> str:
    packed = array(kind, values)
    assert packed.itemsize == 4
    return base64.b64encode(packed.tobytes()).decode()
