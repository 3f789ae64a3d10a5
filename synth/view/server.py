"""Serves the page and its HTTP API, on the loopback only. Requests name conversations by number, and never a path."""

from __future__ import annotations

import asyncio
import collections
import math
from collections.abc import Awaitable, Callable
from importlib import resources
from typing import Any

import numpy as np
from aiohttp import web

from synth.conversation import Message
from synth.view.index import Index
from synth.view.vocabulary import Vocabulary

HOST = "127.0.0.1"
NAMES = ("127.0.0.1", "localhost")  # by which a browser may ask: another site's name that leads here is refused
PAGE = {"": "index.html", "view.css": "view.css", "view.js": "view.js", "charts.js": "charts.js"}
TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript"}
POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'"
LARGEST_PAGE = 200  # conversations in one list
SNIPPET = 200  # characters
BARS = 32
SAMPLED = 400  # conversations whose probabilities are counted

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


async def serve(index: Index, vocabulary: Vocabulary | None, name: str, port: int) -> None:
    """Serves the page until the process is stopped."""
    runner = web.AppRunner(make_app(index, vocabulary, name), shutdown_timeout=1.0)
    await runner.setup()
    try:
        await web.TCPSite(runner, HOST, port).start()
    except OSError as error:
        await runner.cleanup()
        raise OSError(f"port {port} of {HOST} is taken: choose another --port, or 0 for a free one") from error
    print(f"{index.total} conversations at http://{HOST}:{runner.addresses[0][1]}/ (Ctrl-C stops)", flush=True)
    try:
        await asyncio.Event().wait()
    finally:
        await runner.cleanup()


def make_app(index: Index, vocabulary: Vocabulary | None, name: str) -> web.Application:
    view = _View(index, vocabulary, name)
    app = web.Application(middlewares=[_guarded])
    app.router.add_get("/api/summary", view.summary)
    app.router.add_get("/api/conversations", view.listing)
    app.router.add_get("/api/conversations/{place}", view.one)
    app.router.add_get("/{name}", _file)
    app.router.add_get("/", _file)
    return app


@web.middleware
async def _guarded(request: web.Request, handler: Handler) -> web.StreamResponse:
    if request.url.host not in NAMES:
        raise web.HTTPForbidden(text=f"ask for {HOST}")
    response = await handler(request)
    response.headers["Content-Security-Policy"] = POLICY
    response.headers["X-Content-Type-Options"] = "nosniff"
    response.headers["Cache-Control"] = "no-store"
    return response


async def _file(request: web.Request) -> web.Response:
    file = PAGE.get(request.match_info.get("name", ""))
    if file is None:
        raise web.HTTPNotFound()
    text = resources.files("synth.view").joinpath("web", file).read_text(encoding="utf-8")
    return web.Response(text=text, content_type=TYPES[file.rpartition(".")[2]], charset="utf-8")


class _View:
    def __init__(self, index: Index, vocabulary: Vocabulary | None, name: str):
        self._index, self._vocabulary, self._name = index, vocabulary, name
        self._summary: dict[str, Any] | None = None

    async def summary(self, request: web.Request) -> web.Response:
        if self._summary is None:
            self._summary = await asyncio.to_thread(self._summarize)
        return web.json_response(self._summary)

    async def listing(self, request: web.Request) -> web.Response:
        offset, limit = _number(request, "offset", 0), min(_number(request, "limit", 50), LARGEST_PAGE)
        query = request.query
        asked = query.get("type", ""), query.get("search", ""), query.get("context") == "1"
        return web.json_response(await asyncio.to_thread(self._list, asked, offset, limit))

    async def one(self, request: web.Request) -> web.Response:
        place = request.match_info["place"]
        if not place.isdecimal() or len(place) > 12 or int(place) >= self._index.total:
            raise web.HTTPNotFound(text=f"there are {self._index.total} conversations, counted from 0")
        return web.json_response(await asyncio.to_thread(self._show, int(place)))

    def _list(self, asked: tuple[str, str, bool], offset: int, limit: int) -> dict[str, Any]:
        found = self._index.find(*asked)
        places = [int(place) for place in found[offset : offset + limit]]
        rows = [
            {
                "place": place,
                "type": head.seed_type,
                "texts": [content[:SNIPPET] for content in head.contents[:2]],
                "tokens": head.count("assistant"),
            }
            for place, head in zip(places, self._index.heads(places), strict=True)
        ]
        return {"matches": len(found), "rows": rows}

    def _show(self, place: int) -> dict[str, Any]:
        made = self._index.conversation(place)
        return {
            "place": place,
            "type": self._index.kind_of[place],
            "system_prompt": made.system_prompt,
            "metadata": made.metadata,
            "messages": [{"role": m.role, "content": m.content} | _tokens(m, self._vocabulary) for m in made.messages],
        }

    def _summarize(self) -> dict[str, Any]:
        index = self._index
        return {
            "name": self._name,
            "total": index.total,
            "has_texts": self._vocabulary is not None,
            "types": index.kinds.most_common(),
            "resources": index.resources.most_common(),
            "endings": index.endings.most_common(),
            "models": index.models.most_common(),
            "question_tokens": _histogram(index.question_tokens),
            "answer_tokens": _histogram(index.answer_tokens),
            "coverage": {name: _coverage(spans) for name, spans in index.spans.items()},
            "probabilities": self._probabilities(),
        }

    def _probabilities(self) -> list[int]:
        """How many tokens of a sample's answers had a probability up to a tenth, two tenths and so on."""
        counts: collections.Counter[int] = collections.Counter()
        for made in self._index.sample(SAMPLED):
            for message in made.messages:
                counts.update(min(int(p * 10), 9) for p, _ in _chosen(message))
        return [counts[tenth] for tenth in range(10)]


def _tokens(message: Message, vocabulary: Vocabulary | None) -> dict[str, Any]:
    """The tokens of a message that has probabilities: text, probability (0, if it was not kept) and alternatives.

    `aligned` tells whether the texts of all tokens but the special ones, such as an end of turn, spell the content.
    """
    chosen = list(_chosen(message))
    if not chosen or message.token_ids is None:
        return {}
    ids = message.token_ids
    texts = vocabulary.texts(ids) if vocabulary else [f"⟨{token_id}⟩" for token_id in ids]
    name = vocabulary.text if vocabulary else "⟨{}⟩".format
    special = vocabulary.special if vocabulary else frozenset()
    spelled = "".join(text for text, token_id in zip(texts, ids, strict=True) if token_id not in special)
    tokens: list[dict[str, Any]] = [
        {"text": text, "id": token_id, "special": token_id in special}
        for text, token_id in zip(texts, ids, strict=True)
    ]
    for token, (probability, alternatives) in zip(tokens, chosen, strict=False):
        token["p"] = round(probability, 4)
        token["top"] = [[name(token_id), token_id, round(p, 4)] for token_id, p in alternatives]
    return {"tokens": tokens, "aligned": vocabulary is not None and spelled.strip() == message.content.strip()}


def _chosen(message: Message) -> list[tuple[float, list[tuple[int, float]]]]:
    """For every token that has any: its own probability, and the teacher's alternatives, the likeliest first."""
    top, ids = message.top_logprobs, message.token_ids
    if top is None or ids is None:
        return []
    rows: list[list[tuple[int, float]]] = [[] for _ in ids]
    for t, token_id, logprob in zip(top.token_idx.tolist(), top.token_id.tolist(), top.logprobs.tolist(), strict=True):
        if 0 <= t < len(rows):
            rows[t].append((token_id, math.exp(min(logprob, 0.0))))
    last = max((t for t, row in enumerate(rows) if row), default=-1)
    return [
        (dict(row).get(token_id, 0.0), sorted(row, key=lambda pair: -pair[1]))
        for token_id, row in zip(ids, rows[: last + 1], strict=False)
    ]


def _histogram(values: np.ndarray) -> dict[str, Any]:
    """A histogram with bars of equal width from 0 on. The last bar has all beyond the 99.5th percentile."""
    if not len(values):
        return {"width": 1, "counts": [], "mean": 0.0}
    longest = max(1, int(np.percentile(values, 99.5)))
    width = max(1, -(-longest // BARS))
    counts = np.bincount(np.minimum(values // width, longest // width))
    return {"width": width, "counts": counts.tolist(), "mean": round(float(values.mean()), 1)}


def _coverage(spans: list[tuple[int, int]]) -> list[float]:
    """How often each of `BARS` equal stretches of a resource was in a context."""
    end = max((end for _, end in spans), default=0)
    if end < 1:
        return []
    edges_pq = np.array(spans, np.float64) / end * BARS
    bars = np.arange(BARS)
    shared = np.minimum(edges_pq[:, 1:], bars + 1) - np.maximum(edges_pq[:, :1], bars)
    return np.clip(shared, 0, 1).sum(0).round(2).tolist()


def _number(request: web.Request, name: str, default: int) -> int:
    text = request.query.get(name, str(default))
    if not text.isdecimal() or len(text) > 12:
        raise web.HTTPBadRequest(text=f"{name} is {text!r}, expected a number from 0 on")
    return int(text)
