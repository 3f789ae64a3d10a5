"""Any OpenAI-compatible server: vLLM, llama-server, `python -m cartridges_jax.serve`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Self

from synth.clients.base import ChatMessages, Completion, Refused, Unavailable
from synth.clients.http import Http
from synth.config import ClientConfig, SamplingConfig


class OpenAIClient:
    def __init__(self, config: ClientConfig, url: str):
        self._config = config
        self._url = url.rstrip("/")
        self._root = self._url.removesuffix("/v1")  # where /tokenize lives
        self._http = Http(config.timeout_seconds, config.api_key)

    async def __aenter__(self) -> Self:
        await self._http.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.__aexit__()

    async def check(self) -> None:
        """Raises a sentence unless a server answers and serves the model."""
        url = f"{self._url}/models"
        try:
            reply = await self._http.get(url)
        except Unavailable as error:
            if error.kind in ("connection", "timeout"):
                raise Unavailable(
                    f"no inference server answers at {self._url}: start one with python -m cartridges_jax.serve "
                    "or change config.client.base_url",
                    error.kind,
                ) from error
            raise
        models = reply.get("data") if isinstance(reply, dict) else None
        if not isinstance(models, list):
            raise Refused(f"GET {url} gave no list of models: config.client.base_url should end in /v1")
        served = [str(model.get("id")) for model in models if isinstance(model, dict)]
        if self._config.model not in served:
            raise Refused(
                f"{self._url} does not serve {self._config.model!r}, it serves {', '.join(served) or 'nothing'}: "
                "change config.client.model"
            )

    async def complete(
        self, messages: ChatMessages, sampling: SamplingConfig, seed: int, top_logprobs: int = 0
    ) -> Completion:
        body: dict[str, Any] = {
            "model": self._config.model,
            "messages": list(messages),
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_tokens,
            "seed": seed,
            "return_token_ids": True,
        }
        if sampling.stop:
            body["stop"] = list(sampling.stop)
        if top_logprobs:
            # Alternatives come as text otherwise, and text does not say which token it was.
            body |= {"logprobs": True, "top_logprobs": top_logprobs, "return_tokens_as_token_ids": True}
        url = f"{self._url}/chat/completions"
        reply = await self._http.post(url, body)
        try:
            completion = _completion(reply, bool(top_logprobs))
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise Unavailable(
                f"{url} gave a reply that is not a chat completion ({error!r})", "broken reply"
            ) from error
        return completion

    async def score(self, messages: ChatMessages, top_logprobs: int) -> Completion:
        raise NotImplementedError

    async def tokenize(self, text: str) -> list[int]:
        vllm = {"model": self._config.model, "prompt": text, "add_special_tokens": False}
        llama_cpp = {"content": text, "add_special": False}  # answers vLLM's form with no tokens
        return await self._ask_tokenizer("tokenize", (vllm, llama_cpp), ("tokens",))

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        body = {"model": self._config.model, "tokens": list(token_ids)}
        return await self._ask_tokenizer("detokenize", (body,), ("prompt", "content"))

    async def _ask_tokenizer(self, route: str, bodies: Sequence[dict[str, Any]], keys: Sequence[str]) -> Any:
        url = f"{self._root}/{route}"
        problem = f"{url} gave no {' or '.join(keys)}"
        for body in bodies:
            try:
                reply = await self._http.post(url, body)
            except Refused as refusal:
                problem = str(refusal)
                continue
            for key in keys:
                if reply.get(key):
                    return reply[key]
        raise Refused(
            f"{problem}: set config.chunker.tokenizer to a tokenizer.json, a folder that holds one, or a Hub id"
        )


def _completion(reply: dict[str, Any], wants_logprobs: bool) -> Completion:
    choice = reply["choices"][0]
    text = choice["message"].get("content") or ""
    entries = (choice.get("logprobs") or {}).get("content") or []
    token_ids = choice.get("token_ids")
    rows = None
    if wants_logprobs and text.strip():
        if not entries:
            raise Refused("the server gives no logprobs: vLLM, llama-server and cartridges_jax.serve do")
        rows = tuple(tuple(map(_pair, entry["top_logprobs"])) for entry in entries)
        token_ids = [_token_id(entry) for entry in entries] if token_ids is None else token_ids
        if len(token_ids) - len(rows) not in (0, 1):  # some servers count the end-of-turn token, but give no logprobs
            raise Unavailable(
                f"the server gave {len(token_ids)} token ids with logprobs of {len(rows)} tokens", "wrong tokens"
            )
    usage = reply.get("usage") or {}
    return Completion(
        text=text,
        token_ids=None if token_ids is None else tuple(token_ids),
        top_logprobs=rows,
        finish_reason=choice.get("finish_reason") or "unknown",
        prompt_tokens=usage.get("prompt_tokens") or 0,
        completion_tokens=usage.get("completion_tokens") or 0,
        cached_tokens=(usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0,
    )


def _pair(entry: dict[str, Any]) -> tuple[int, float]:
    logprob = float(entry["logprob"])
    if math.isnan(logprob):
        raise Unavailable(f"the server gave a logprob that is not a number: {entry}", "broken reply")
    return _token_id(entry), logprob


def _token_id(entry: dict[str, Any]) -> int:
    for value in (entry.get("token_id"), entry.get("id")):
        if isinstance(value, int):
            return value
    token = str(entry.get("token"))
    if token.startswith("token_id:") and token[9:].isdigit():
        return int(token[9:])
    raise Refused(
        f"the server gives no token ids with its logprobs (token {token!r}): vLLM, llama-server and "
        "cartridges_jax.serve do"
    )
