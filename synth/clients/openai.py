"""Any OpenAI-compatible server: vLLM, llama-server, `python -m cartridges_jax.serve`."""

from __future__ import annotations

import asyncio
import email.utils
import json
import logging
import math
import random
import time
from collections.abc import Sequence
from typing import Any

import aiohttp

from synth.clients.base import Completion, Refused, Unavailable
from synth.config import ClientConfig, SamplingConfig

FIRST_BACKOFF_SECONDS, LONGEST_BACKOFF_SECONDS = 0.5, 30.0
RETRIED_STATUSES = (408, 429)  # and every 5xx

log = logging.getLogger(__name__)


class OpenAIClient:
    """An async context manager: `async with OpenAIClient(config, rng) as client`. Counts the tokens that pass."""

    def __init__(self, config: ClientConfig, rng: random.Random):
        self._config, self._rng = config, rng
        self._url = config.base_url.rstrip("/")
        self._root = self._url.removesuffix("/v1")  # where /tokenize lives
        self.prompt_tokens = self.completion_tokens = 0

    async def __aenter__(self) -> OpenAIClient:
        key = self._config.api_key
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),  # the pipeline bounds the requests in flight
            timeout=aiohttp.ClientTimeout(total=self._config.timeout_seconds),
            headers={"Authorization": f"Bearer {key}"} if key else {},
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def check(self) -> None:
        """Raises a sentence unless a server answers and serves the model: better now than after a document was read."""
        url = f"{self._url}/models"
        try:
            async with self._session.get(url) as response:
                status, text = response.status, await response.text()
        except (aiohttp.ClientError, TimeoutError) as error:
            raise Unavailable(
                f"no inference server answers at {self._url}: start one with python -m cartridges_jax.serve "
                "or change config.client.base_url"
            ) from error
        if status >= 400:
            raise (Unavailable if _retried(status) else Refused)(
                f"GET {url} gave HTTP {status}, expected a list of models: {_server_words(text)}"
            )
        models = _parse(text, url).get("data")
        if not isinstance(models, list):
            raise Refused(f"GET {url} gave no list of models: config.client.base_url should end in /v1")
        served = [str(model.get("id")) for model in models if isinstance(model, dict)]
        if self._config.model not in served:
            raise Refused(
                f"{self._url} does not serve {self._config.model!r}, it serves {', '.join(served) or 'nothing'}: "
                "change config.client.model"
            )

    async def complete(
        self, messages: Sequence[dict[str, str]], sampling: SamplingConfig, seed: int, top_logprobs: int = 0
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
        reply = await self._post(url, body)
        try:
            completion = _completion(reply, bool(top_logprobs))
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise Refused(f"{url} gave a reply that is not a chat completion ({error!r})") from error
        self.prompt_tokens += completion.prompt_tokens
        self.completion_tokens += completion.completion_tokens
        return completion

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
                reply = await self._post(url, body)
            except Refused as refusal:
                problem = str(refusal)
                continue
            for key in keys:
                if reply.get(key):
                    return reply[key]
        raise Refused(
            f"{problem}: set config.chunker.tokenizer to a tokenizer.json, a folder that holds one, or a Hub id"
        )

    async def _post(self, url: str, body: dict[str, Any]) -> dict[str, Any]:
        attempts = self._config.max_retries + 1
        for attempt in range(1, attempts + 1):
            wait = 0.0
            try:
                async with self._session.post(url, json=body) as response:
                    text = await response.text()
                    if response.status < 400:
                        return _parse(text, url)
                    problem = f"HTTP {response.status}: {_server_words(text)}"
                    if not _retried(response.status):
                        raise Refused(f"{url} refused a request, {problem}")
                    wait = _retry_after(response.headers.get("Retry-After"))
            except TimeoutError:
                problem = f"no answer in {self._config.timeout_seconds:g} s"
            except aiohttp.ClientError as error:
                problem = str(error) or type(error).__name__
            if attempt == attempts:
                break
            backoff = min(FIRST_BACKOFF_SECONDS * 2 ** (attempt - 1), LONGEST_BACKOFF_SECONDS)
            wait = max(wait, backoff * self._rng.uniform(0.5, 1.0))
            log.warning("%s: %s; retry %d of %d in %.1f s", url, problem, attempt, attempts - 1, wait)
            await asyncio.sleep(wait)
        raise Unavailable(f"{url} failed {attempts} times, at last with {problem}")


def _retried(status: int) -> bool:
    return status in RETRIED_STATUSES or status >= 500


def _parse(text: str, url: str) -> dict[str, Any]:
    try:
        reply = json.loads(text)
    except ValueError as error:
        raise Refused(f"{url} gave a reply that is not JSON: {text[:100]!r}") from error
    if not isinstance(reply, dict):
        raise Refused(f"{url} gave a reply that is not a JSON object: {text[:100]!r}")
    return reply


def _server_words(text: str) -> str:
    """The message inside an error reply, in OpenAI's shape or another."""
    try:
        reply = json.loads(text)
        error = reply.get("error", reply)
        return str(error.get("message") or error.get("detail") or text) if isinstance(error, dict) else str(error)
    except (ValueError, AttributeError):
        return " ".join(text.split())[:300] or "no message"


def _retry_after(header: str | None) -> float:
    """Seconds, from either form that HTTP allows."""
    if not header:
        return 0.0
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time())
    except ValueError:
        return 0.0


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
            raise Refused(f"the server gave {len(token_ids)} token ids with logprobs of {len(rows)} tokens")
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
        raise Refused(f"the server gave a logprob that is not a number: {entry}")
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
