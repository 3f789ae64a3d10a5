"""An OpenAI-compatible server whose answers are a function of the request, in a thread of its own."""

from __future__ import annotations

import asyncio
import collections
import hashlib
import json
import math
import threading
from collections.abc import Callable
from typing import Any

from aiohttp import web

MODEL = "stub"
WORDS, END = 256, 1000  # token ids: of the word "w0", and of the end of a turn


class StubServer:
    """`faults` are used up one a chat request: a status, (status, headers), or the name of one in `_chat`."""

    def __init__(self):
        self.requests: list[dict[str, Any]] = []
        self.faults: collections.deque[Any] = collections.deque()
        self.next_fault: Callable[[], Any] = lambda: self.faults.popleft() if self.faults else None
        self.in_flight = self.most_in_flight = 0
        self.latency = 0.0
        self.ids = "token_id:N"  # how alternatives carry their ids: "token_id:N", "id", "token_id" or "none"
        self.end_of_turn = False  # one more token id than logprobs
        self.llama_cpp = False  # its forms of /tokenize and /detokenize
        self.empty: Callable[[dict[str, Any]], bool] = lambda body: False
        self.spelt: Callable[[dict[str, Any]], dict[str, Any]] = lambda reply: reply  # of /detokenize
        self.root = ""
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    @property
    def url(self) -> str:
        return f"{self.root}/v1"

    def start(self) -> StubServer:
        self._loop = asyncio.new_event_loop()  # one that never starts is only asked for its answers
        self._thread.start()
        assert self._started.wait(10)
        return self

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._stopped.set)
        self._thread.join(10)
        self._loop.close()

    def _run(self) -> None:
        self._loop.run_until_complete(self._serve())

    async def _serve(self) -> None:
        self._stopped = asyncio.Event()
        app = web.Application(client_max_size=2**26)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_post("/tokenize", self._tokenize)
        app.router.add_post("/detokenize", self._detokenize)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0][:2]
        self.root = f"http://{host}:{port}"
        self._started.set()
        await self._stopped.wait()
        await runner.cleanup()

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": MODEL}, {"id": "other"}]})

    async def _tokenize(self, request: web.Request) -> web.Response:
        """One token a byte, and one for each of the words that answers are made of."""
        body = await request.json()
        text = body.get("content" if self.llama_cpp else "prompt", "")
        return web.json_response({"tokens": list(text.encode())})

    async def _detokenize(self, request: web.Request) -> web.Response:
        ids = (await request.json())["tokens"]
        pieces = (bytes([i]) if i < WORDS else b"<|end|>" if i == END else f" w{i - WORDS}".encode() for i in ids)
        text = b"".join(pieces).decode(errors="replace")
        return web.json_response(self.spelt({"content" if self.llama_cpp else "prompt": text}))

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.requests.append(body)
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            await asyncio.sleep(self.latency)
            fault = self.next_fault()
            if fault == "drop":
                assert request.transport
                request.transport.abort()
            elif fault == "hang":
                await asyncio.sleep(3)
            elif fault == "broken":
                return web.Response(text='{"choices": [', content_type="application/json")
            elif fault == "empty":
                return web.json_response({"choices": []})
            elif fault == "short":
                response = web.StreamResponse(headers={"Content-Length": "1000"})
                await response.prepare(request)
                await response.write(b'{"choices": [')
                assert request.transport
                request.transport.close()
                return response
            elif fault == "wrong tokens":
                answer = self._answer(body)
                answer["choices"][0]["token_ids"] = [1] * 99
                return web.json_response(answer)
            elif fault is not None:
                status, headers = fault if isinstance(fault, tuple) else (fault, {})
                return web.json_response({"error": {"message": "no thanks"}}, status=status, headers=headers)
            return web.json_response(self._answer(body))
        finally:
            self.in_flight -= 1

    def _answer(self, body: dict[str, Any]) -> dict[str, Any]:
        digest = hashlib.sha256(json.dumps([body["messages"], body.get("seed")]).encode()).digest()
        words = [] if self.empty(body) else [f"w{byte}" for byte in digest[: 3 + digest[0] % 8]]
        entries = []
        for place, word in enumerate(words):
            token = WORDS + int(word[1:])
            top = [self._entry(token + j, -0.5 - j - place) for j in range(body.get("top_logprobs", 0))]
            entries.append({**self._entry(token, -0.5 - place), "top_logprobs": top})
        choice: dict[str, Any] = {"message": {"content": " ".join(words)}, "finish_reason": "stop", "index": 0}
        if body.get("logprobs"):
            choice["logprobs"] = {"content": entries}
        if body.get("return_token_ids") and self.ids == "token_id:N":
            choice["token_ids"] = [WORDS + int(word[1:]) for word in words] + [END] * self.end_of_turn
        usage = {"prompt_tokens": 7, "completion_tokens": len(words)}
        return {"choices": [choice], "usage": usage}

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        assert math.isfinite(logprob)
        if self.ids == "token_id:N":
            return {"token": f"token_id:{token}", "logprob": logprob}
        ids = {} if self.ids == "none" else {self.ids: token}
        return {"token": f" w{token}", "logprob": logprob, **ids}
