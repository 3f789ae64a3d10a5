"""arXiv, Slack and Gmail, against servers on the loopback that speak as theirs do."""

from __future__ import annotations

import base64
import io
import json
import tarfile
from email.message import EmailMessage
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from web_stub import Handler, WebStub

from cartridges_jax.command_line.errors import UserError
from synth.resources import reading
from synth.resources import web as web_api
from synth.resources.config import ResourceConfig


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web_api, "FIRST_WAIT_SECONDS", 0.01)


def paper() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, text in {"main.tex": "\\documentclass{a}\n\\section{S}\n\\input{b}", "b.tex": "Inside. % no"}.items():
            info = tarfile.TarInfo(name)
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text.encode()))
    return buffer.getvalue()


def answers(*replies: web.Response) -> Handler:
    """The replies in turn, the last one again and again."""
    waiting = list(replies)

    async def handler(request: web.Request) -> web.Response:
        reply = waiting.pop(0) if len(waiting) > 1 else waiting[0]
        return web.Response(body=reply.body, status=reply.status, headers=reply.headers)

    return handler


def text_of(tmp_path: Path, path: str, api_url: str) -> str:
    return reading.read(ResourceConfig(path, api_url=api_url), tmp_path).to_string()


def test_arxiv_is_asked_again_when_it_is_busy_and_then_never(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    busy = web.Response(status=503, text="later", headers={"Retry-After": "0.02"})
    routes = {"GET /src/2506.06266": answers(busy, web.Response(status=429), web.Response(body=paper()))}
    with WebStub(routes) as server:
        config = ResourceConfig("arxiv:2506.06266", api_url=server.url)
        corpus = reading.read(config, tmp_path)
        assert corpus.resources[0].sections[-1].text == "\\section{S}\nInside.\n"
        assert len(server.requests) == 3 and "attempt 2 of 5" in caplog.text
        reading.keep(config, corpus, tmp_path)
    assert reading.read(config, tmp_path) == corpus, "a run goes on with the text that it began with"
    assert (tmp_path / "corpus.txt").read_text() == corpus.to_string()


def test_a_paper_that_is_not_there(tmp_path: Path):
    with WebStub({}) as server, pytest.raises(UserError, match=r"/src/2506\.06266 refused a request, HTTP 404"):
        text_of(tmp_path, "arxiv:2506.06266", server.url)


def test_no_other_host_is_asked(tmp_path: Path):
    moved = web.Response(status=302, headers={"Location": "http://localhost:9/src/2506.06266"})
    with WebStub({"GET /src/2506.06266": answers(moved)}) as server:
        with pytest.raises(UserError, match="leads to another host, http://localhost:9/src/2506"):
            text_of(tmp_path, "arxiv:2506.06266", server.url)
        own = web.Response(status=302, headers={"Location": "/other"})
    with WebStub({"GET /src/2506.06266": answers(own), "GET /other": answers(web.Response(body=paper()))}) as server:
        assert "Inside." in text_of(tmp_path, "arxiv:2506.06266", server.url)


def test_a_reply_that_never_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("synth.resources.arxiv.LARGEST_DOWNLOAD", 10)
    routes = {"GET /src/2506.06266": answers(web.Response(body=paper()))}
    with WebStub(routes) as server, pytest.raises(UserError, match="gave more than 10 bytes: refused"):
        text_of(tmp_path, "arxiv:2506.06266", server.url)


def test_a_host_that_is_not_there(tmp_path: Path):
    with pytest.raises(ConnectionError, match="failed 5 times, at last with"):
        text_of(tmp_path, "arxiv:2506.06266", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"config\.resource\.api_url is 'arxiv\.org', expected an address"):
        text_of(tmp_path, "arxiv:2506.06266", "arxiv.org")


def slack_routes(token: str) -> dict[str, Handler]:
    def method(*pages: dict[str, Any]) -> Handler:
        async def handler(request: web.Request) -> web.Response:
            if request.headers.get("Authorization") != f"Bearer {token}":
                return web.json_response({"ok": False, "error": "invalid_auth"})
            page = int(request.query.get("cursor") or 0)
            more = {"next_cursor": str(page + 1) if page + 1 < len(pages) else ""}
            return web.json_response({"ok": True, **pages[page], "response_metadata": more})

        return handler

    channels = [{"id": "C1", "name": "general", "is_member": True}, {"id": "C2", "name": "quiet", "is_member": False}]
    parent = {"user": "U1", "text": "question", "ts": "1704103200.0", "thread_ts": "1704103200.0", "reply_count": 1}
    reply = {"user": "U2", "text": "answer", "ts": "1704103260.0", "thread_ts": "1704103200.0"}
    return {
        "GET /conversations.list": method({"channels": channels[:1]}, {"channels": channels[1:]}),
        "GET /users.list": method({"members": [{"id": "U1", "name": "ada"}, {"id": "U2", "name": "bob"}]}),
        "GET /conversations.history": method(
            {"messages": [{"user": "U2", "text": "last", "ts": "1704189600.0"}]}, {"messages": [parent]}
        ),
        "GET /conversations.replies": method({"messages": [parent, reply]}),
    }


def test_slack_page_by_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SLACK_BOT_TOKEN", "xoxb")
    with WebStub(slack_routes("xoxb")) as server:
        assert text_of(tmp_path, "slack:#general", server.url) == (
            "#general, 2024-01-01\n10:00 ada: question\n  > 10:01 bob: answer\n\n"
            "#general, 2024-01-02\n10:00 bob: last\n\n"
        )
        assert text_of(tmp_path, "slack:", server.url).startswith("#general, 2024")
        with pytest.raises(UserError, match="Slack shows no channel 'secret' to this token"):
            text_of(tmp_path, "slack:secret", server.url)
        monkeypatch.setenv("SLACK_BOT_TOKEN", "wrong")
        with pytest.raises(UserError, match=r"Slack refused conversations\.list: invalid_auth"):
            text_of(tmp_path, "slack:general", server.url)
        monkeypatch.delenv("SLACK_BOT_TOKEN")
        with pytest.raises(UserError, match=r"needs a token .* in the environment's SLACK_BOT_TOKEN"):
            text_of(tmp_path, "slack:general", server.url)


def gmail_routes() -> dict[str, Handler]:
    async def listed(request: web.Request) -> web.Response:
        assert request.query["q"] == "label:work" and request.headers["Authorization"] == "Bearer ya29"
        if not request.query.get("pageToken"):
            return web.json_response({"messages": [{"id": "m2"}, {"id": "m3"}], "nextPageToken": "p"})
        return web.json_response({"messages": [{"id": "m1"}]})

    async def one(request: web.Request) -> web.Response:
        assert request.query["format"] == "raw"
        number = int(request.match_info["id"][1:])
        message = EmailMessage()
        message["Subject"] = f"Mail {number}"
        message.set_content(f"Body {number}.")
        raw = base64.urlsafe_b64encode(message.as_bytes()).decode()
        thread = {1: "old", 2: "new", 3: "old"}[number]
        return web.json_response({"raw": raw, "threadId": thread, "internalDate": str(number)})

    return {"GET /gmail/v1/users/me/messages": listed, "GET /gmail/v1/users/me/messages/{id}": one}


def test_gmail_thread_by_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with WebStub(gmail_routes()) as server:
        with pytest.raises(UserError, match="in the environment's GMAIL_TOKEN"):
            text_of(tmp_path, "gmail:label:work", server.url)
        monkeypatch.setenv("GMAIL_TOKEN", "ya29")
        corpus = reading.read(ResourceConfig("gmail:label:work", api_url=server.url), tmp_path)
        assert [section.name for section in corpus.resources[0].sections] == ["Mail 1", "Mail 3", "Mail 2"]
        assert corpus.to_string().startswith("Subject: Mail 1\n\nBody 1.\n\n")


def test_a_snapshot_that_was_damaged(tmp_path: Path):
    (tmp_path / reading.SNAPSHOT).write_text("{")
    with pytest.raises(UserError, match=r"resources\.json is damaged, delete it"):
        text_of(tmp_path, "arxiv:2506.06266", "http://127.0.0.1:9")


def test_the_token_is_never_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SLACK_BOT_TOKEN", "xoxb-secret")
    with WebStub(slack_routes("xoxb-secret")) as server:
        config = ResourceConfig("slack:general", api_url=server.url)
        reading.keep(config, reading.read(config, tmp_path), tmp_path)
    written = "".join(path.read_text() for path in tmp_path.iterdir())
    assert "question" in written and "secret" not in written
    assert list(json.loads((tmp_path / reading.SNAPSHOT).read_text())) == ["slack:general"]
