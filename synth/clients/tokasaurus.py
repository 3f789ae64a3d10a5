"""The client of Tokasaurus (branch geoff/cartridges): it sends one request, or several in one synchronous batch.

Token ids and log-probabilities come packed inside `system_fingerprint`, a JSON text with base64 of raw little-endian
arrays, one entry a choice. Log-probabilities are those after temperature. A batch is answered with a pickle, see
`pickles.py`. github.com/ScalingIntelligence/tokasaurus: server/endpoints.py, server/utils.py.
"""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from cartridges_jax.command_line import files
from synth.clients import base, pickles
from synth.clients.alignment import Alignment
from synth.clients.base import ChatMessages, Completion, Refused, Unavailable, Unsuited
from synth.clients.http import HttpClient
from synth.clients.local import ChatTokenizer
from synth.config import ClientConfig, SamplingConfig

MORE = "start Tokasaurus with max_topk_logprobs=20"
GATHER_SECONDS = 0.01  # how long a batch that is not full waits for more calls


class TokasaurusClient(HttpClient):
    def __init__(self, config: ClientConfig, url: str):
        super().__init__(config, url)
        tokenizer = ChatTokenizer(config.tokenizer) if config.tokenizer else None
        self._tokenizer = tokenizer
        self._alignment = Alignment(tokenizer.decode) if tokenizer else None
        self._waiting: list[tuple[dict[str, Any], asyncio.Future[Any]]] = []
        self._sending: set[asyncio.Task[None]] = set()

    async def __aexit__(self, *_: object) -> None:
        for task in self._sending:
            task.cancel()
        await asyncio.gather(*self._sending, return_exceptions=True)
        await super().__aexit__()

    async def check(self) -> None:
        served = [entry["id"] for entry in await self._listed(f"{self._root}/v1")]
        if self._config.model != "default" and self._config.model.lower() not in map(str.lower, served):
            raise Refused(
                f"{self._root} serves {', '.join(served)[:300] or 'nothing'}, not {self._config.model!r}: "
                "change config.client.model"
            )

    async def complete(
        self, messages: ChatMessages, sampling: SamplingConfig, seed: int, top_logprobs: int = 0
    ) -> Completion:
        request: dict[str, Any] = {
            "model": self._config.model,
            "messages": list(messages),
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_completion_tokens": sampling.max_tokens,
            "seed": seed,
            "logprobs_in_fingerprint": True,
        }
        if sampling.stop:
            request["stop"] = list(sampling.stop)
        if sampling.thinking is not None:
            request["apply_chat_template_overrides"] = {"enable_thinking": sampling.thinking > 0}
        if top_logprobs:
            request |= {"logprobs": True, "top_logprobs": top_logprobs}
        if self._config.batch_size > 1:
            reply = await self._in_a_batch(request)
        else:
            reply = await self._post(f"{self._root}/v1/chat/completions", request)
        with base.reading(self._root):
            if self._config.model != "default":
                await self._check_named(reply)
            completion = _completion(reply, top_logprobs)
        if self._alignment and completion.top_logprobs:
            await self._alignment.check(completion, sampling.stop)
        return completion

    async def score(self, messages: ChatMessages, top_logprobs: int) -> Completion:
        raise Refused(
            "Tokasaurus gives no log-probabilities of a given answer: vLLM, SGLang and cartridges_jax.serve do"
        )

    async def tokenize(self, text: str) -> list[int]:
        return self._own_tokenizer().encode(text)

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        return await self._own_tokenizer().decode(token_ids)

    def _own_tokenizer(self) -> ChatTokenizer:
        if self._tokenizer is None:
            raise Refused(f"Tokasaurus has no route for its tokenizer: {base.OWN_TOKENIZER}")
        return self._tokenizer

    async def _in_a_batch(self, request: dict[str, Any]) -> Any:
        """Sends the request with others, once they make a batch or a moment has passed, and returns its own reply."""
        future = asyncio.get_running_loop().create_future()
        self._waiting.append((request, future))
        if len(self._waiting) == 1:
            task = asyncio.create_task(self._send_soon())
            self._sending.add(task)
            task.add_done_callback(self._sending.discard)
        return await future

    async def _send_soon(self) -> None:
        waited = 0.0
        while len(self._waiting) < self._config.batch_size and waited < GATHER_SECONDS:
            await asyncio.sleep(GATHER_SECONDS / 4)
            waited += GATHER_SECONDS / 4
        waiting, self._waiting = self._waiting, []
        size = self._config.batch_size
        await asyncio.gather(*(self._send(waiting[i : i + size]) for i in range(0, len(waiting), size)))

    async def _send(self, calls: list[tuple[dict[str, Any], asyncio.Future[Any]]]) -> None:
        calls = [call for call in calls if not call[1].done()]  # whoever was cancelled waits no more
        url = f"{self._root}/custom/synchronous-batch-completions"
        try:
            data = await self._request("POST", url, {"requests": [request for request, _ in calls]})
            replies = pickles.read(data)
            if not isinstance(replies, list) or len(replies) != len(calls):
                raise Unavailable(f"{url} gave no list of {len(calls)} replies", "broken reply")
        except (Refused, Unavailable) as error:
            replies = [error] * len(calls)
        for (_, future), reply in zip(calls, replies, strict=True):
            if future.done():
                continue
            if isinstance(reply, Exception):
                future.set_exception(reply)
            else:
                future.set_result(reply)


def _completion(reply: Any, top_logprobs: int) -> Completion:
    choice = reply["choices"][0]
    packed = json.loads(reply["system_fingerprint"])
    ids = tuple(packed["completion_ids"][0])
    usage = reply["usage"]
    return Completion(
        text=files.writable(choice["message"]["content"] or "", "a reply"),  # a pickle's strings hold anything
        token_ids=ids,
        top_logprobs=base.enough(_rows(packed, len(ids)), top_logprobs, MORE) if top_logprobs else None,
        finish_reason=choice["finish_reason"],
        prompt_tokens=usage["prompt_tokens"],
        completion_tokens=usage["completion_tokens"],
        cached_tokens=(usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0,
    )


def _rows(packed: dict[str, Any], num_tokens: int) -> list[list[tuple[int, float]]]:
    if not packed.get("packed_topk_indices"):
        raise Unsuited(f"the server gives no top log-probabilities: {MORE}")
    ids = np.frombuffer(base64.b64decode(packed["packed_topk_indices"][0], validate=True), "<i4")
    logprobs = np.frombuffer(base64.b64decode(packed["packed_topk_logprobs"][0], validate=True), "<f4")
    if not num_tokens or len(ids) != len(logprobs) or len(ids) % num_tokens:
        raise Unavailable(
            f"the server gave {num_tokens} token ids, {len(ids)} alternatives and {len(logprobs)} logprobs of them",
            "wrong tokens",
        )
    pairs_tj = zip(ids.reshape(num_tokens, -1).tolist(), logprobs.reshape(num_tokens, -1).tolist(), strict=True)
    return [list(zip(row_ids, base.as_logprobs(row_logprobs), strict=True)) for row_ids, row_logprobs in pairs_tj]
