"""Servers that speak SGLang's and Tokasaurus' protocols, written from their documentation; and one that hosts texts.

They answer with a reversed copy of the last message, in the ids of a real tokenizer.
"""

from __future__ import annotations

import base64
import contextlib
import json
import pickle
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import numpy as np
from aiohttp import web
from openai.types.chat.chat_completion import ChatCompletion, Choice
from openai.types.chat.chat_completion_message import ChatCompletionMessage as ChatMessage
from openai.types.completion_usage import CompletionUsage as Usage

from synth.clients.local import ChatTokenizer

END = "<|im_end|>"


@contextlib.asynccontextmanager
async def served(routes: dict[str, Callable[[Any], Awaitable[web.Response]]]) -> AsyncIterator[str]:
    """The root of a server on loopback; each route is given the body of a POST, or None."""
    app = web.Application()

    def handle(answer: Callable[[Any], Awaitable[web.Response]]) -> Any:
        async def handler(request: web.Request) -> web.Response:
            return await answer(await request.json() if request.can_read_body else None)

        return handler

    for path, answer in routes.items():
        app.router.add_route("*", path, handle(answer))
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


def alternatives(token: int, place: int, count: int) -> list[tuple[float, int]]:
    """(log-probability, id), best first; the token itself is the best."""
    return [(-0.25 - place - j, token + j) for j in range(count)]


class SGLang:
    """`/generate` of SGLang, and the part of its OpenAI routes that lists models."""

    def __init__(self, tokenizer: ChatTokenizer):
        self.tokenizer, self.requests = tokenizer, []
        self.change: Callable[[dict[str, Any]], None] = lambda reply: None

    @property
    def routes(self) -> dict[str, Any]:
        return {"/v1/models": self._models, "/generate": self._generate}

    async def _models(self, _: Any) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "tiny", "object": "model"}]})

    async def _generate(self, body: dict[str, Any]) -> web.Response:
        self.requests.append(body)
        prompt, sampling_params = body["input_ids"], body["sampling_params"]
        said = (await self.tokenizer.decode(prompt)).split("\n")[-3].removesuffix(END)[::-1]
        ids = self.tokenizer.encode(said + END)[: sampling_params["max_new_tokens"]]
        cut = len(ids) == sampling_params["max_new_tokens"]
        meta: dict[str, Any] = {
            "id": "0",
            "finish_reason": {"type": "length", "length": len(ids)} if cut else {"type": "stop", "matched": ids[-1]},
            "prompt_tokens": len(prompt),
            "completion_tokens": len(ids),
            "cached_tokens": 3,
            "e2e_latency": 0.1,
        }
        if body.get("return_logprob"):
            count, first = body["top_logprobs_num"], body["logprob_start_len"]
            tops = [[[lp, i, None] for lp, i in alternatives(t, place, count)] for place, t in enumerate(ids)]
            meta["output_top_logprobs"] = tops
            meta["output_token_logprobs"] = [[top[0][0], t, None] for top, t in zip(tops, ids, strict=True)]
            given = prompt[first if first >= 0 else len(prompt) :]
            own = [[-1.0 - place, t, None] for place, t in enumerate(given)]
            meta["input_token_logprobs"] = [[None, *own[0][1:]], *own[1:]] if own else []
            best = [[[lp, i, None] for lp, i in alternatives(t, 0, count)] for t in given]
            meta["input_top_logprobs"] = [None, *best[1:]] if best else []
        text = (await self.tokenizer.decode(ids)).removesuffix(END)
        reply = {"text": text, "output_ids": ids, "meta_info": meta}
        self.change(reply)
        return web.json_response(reply)


class Tokasaurus:
    def __init__(self, tokenizer: ChatTokenizer):
        self.tokenizer = tokenizer
        self.requests: list[dict[str, Any]] = []
        self.batches: list[int] = []
        self.pickled: Callable[[list[Any]], bytes] = pickle.dumps
        self.change: Callable[[dict[str, Any]], None] = lambda fingerprint: None

    @property
    def routes(self) -> dict[str, Any]:
        return {
            "/v1/models": self._models,
            "/v1/chat/completions": self._chat,
            "/custom/synchronous-batch-completions": self._batch,
        }

    async def _models(self, _: Any) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "Org/Tiny"}]})

    async def _chat(self, body: dict[str, Any]) -> web.Response:
        return web.json_response((await self._answer(body)).model_dump())

    async def _batch(self, body: dict[str, Any]) -> web.Response:
        self.batches.append(len(body["requests"]))
        replies = [await self._answer(request) for request in body["requests"]]
        return web.Response(body=self.pickled(replies), content_type="application/octet-stream")

    async def _answer(self, body: dict[str, Any]) -> Any:
        self.requests.append(body)
        ids = self.tokenizer.encode(body["messages"][-1]["content"][::-1] + END)
        fingerprint: dict[str, Any] = {"completion_ids": [ids]}
        if body.get("logprobs"):
            rows = [alternatives(token, place, body["top_logprobs"]) for place, token in enumerate(ids)]
            fingerprint |= {
                "packed_chosen_logprobs": [_packed([row[0][0] for row in rows], "<f4")],
                "packed_topk_indices": [_packed([[i for _, i in row] for row in rows], "<i4")],
                "packed_topk_logprobs": [_packed([[lp for lp, _ in row] for row in rows], "<f4")],
            }
        self.change(fingerprint)
        message = ChatMessage(role="assistant", content=(await self.tokenizer.decode(ids)).removesuffix(END))
        return ChatCompletion(
            id="0",
            object="chat.completion",
            created=0,
            model="Org/Tiny",
            choices=[Choice(index=0, message=message, logprobs=None, finish_reason="stop")],
            usage=Usage(prompt_tokens=9, completion_tokens=len(ids), total_tokens=9 + len(ids)),
            system_fingerprint=json.dumps(fingerprint),
        )


def _packed(values: Any, dtype: str) -> str:
    return base64.b64encode(np.asarray(values, dtype).tobytes()).decode()
