"""The client of OpenAI, Together and the like, whose large models give texts without token ids and ask the questions.

These hosts know OpenAI's own fields only, and some of their models refuse even a default temperature when it is sent,
so nothing is sent that has its default value.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

from synth.clients.base import OWN_TOKENIZER, ChatMessages, Completion, Refused, reading
from synth.clients.http import HttpClient
from synth.config import SamplingConfig

LENGTH_FIELD = {"openai_api": "max_completion_tokens", "together": "max_tokens"}


class HostedClient(HttpClient):
    async def complete(
        self, messages: ChatMessages, sampling: SamplingConfig, seed: int, top_logprobs: int = 0
    ) -> Completion:
        if top_logprobs:
            self._no("token ids with log-probabilities")
        body: dict[str, Any] = {
            "model": self._config.model,
            "messages": list(messages),
            LENGTH_FIELD[self._config.kind]: sampling.max_tokens,
            "seed": seed,
        }
        if sampling.temperature != 1.0:
            body["temperature"] = sampling.temperature
        if sampling.top_p != 1.0:
            body["top_p"] = sampling.top_p
        if sampling.stop:
            body["stop"] = list(sampling.stop)
        url = f"{self._url}/chat/completions"
        reply = await self._http.post(url, body)
        await self._check_named(reply)
        with reading(url):
            choice, usage = reply["choices"][0], reply.get("usage") or {}
            return Completion(
                text=choice["message"].get("content") or "",
                token_ids=None,
                top_logprobs=None,
                finish_reason=choice.get("finish_reason") or "unknown",
                prompt_tokens=usage.get("prompt_tokens") or 0,
                completion_tokens=usage.get("completion_tokens") or 0,
                cached_tokens=(usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0,
            )

    async def score(self, messages: ChatMessages, top_logprobs: int) -> Completion:
        self._no("log-probabilities of a given answer")

    async def tokenize(self, text: str) -> list[int]:
        self._no(f"tokens: {OWN_TOKENIZER}")

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        self._no(f"tokens: {OWN_TOKENIZER}")

    def _no(self, what: str) -> NoReturn:
        raise Refused(f"a server of kind {self._config.kind!r} gives no {what}")
