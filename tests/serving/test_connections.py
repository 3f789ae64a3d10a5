"""Connections that only stay open, headers that never end: they cost nobody else an answer."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time

import pytest
import tiny
from test_server import HELLO, SAID, Client, ScriptEngine, serving, until  # pyrefly: ignore[missing-import]

from cartridges_jax.serving import connections

SLOW = b"GET /v1/models HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Slow: "


async def opened(client: Client, first: bytes = b"") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, port = client.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(first)
    return reader, writer


async def all_of(reader: asyncio.StreamReader) -> bytes:
    with contextlib.suppress(ConnectionResetError):
        return await reader.read()
    return b""


@pytest.mark.parametrize("first", [b"", b"GET ", SLOW])
def test_a_request_has_so_long_to_begin(first: bytes, monkeypatch: pytest.MonkeyPatch):
    """Also if it is still on its way, a byte at a time."""
    monkeypatch.setattr(connections, "IDLE_SECONDS", 1.0)

    async def test(client: Client) -> None:
        reader, writer = await opened(client, first)
        start = time.monotonic()
        closed = asyncio.create_task(all_of(reader))
        while not closed.done() and time.monotonic() - start < 20:
            if first and not writer.is_closing():
                writer.write(b"a")
            await asyncio.sleep(0.05)
        writer.close()
        assert closed.done() and time.monotonic() - start > 0.9
        assert (await client.chat())[0] == 200

    serving(ScriptEngine(SAID), test)


@pytest.mark.parametrize("first", [b"", SLOW])
def test_idle_connections_make_room(first: bytes, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(connections, "LEAST", 20)

    async def test(client: Client) -> None:
        flood = [await opened(client, first) for _ in range(100)]
        for _ in range(3):
            assert (await client.chat())[0] == 200
        await until(lambda: sum(not reader.at_eof() for reader, _ in flood) <= 20)
        for _, writer in flood:
            writer.close()

    serving(ScriptEngine(SAID, max_num_seqs=1), test, max_queue=1)


def test_requests_under_way_keep_their_connection(monkeypatch: pytest.MonkeyPatch):
    """And who comes beyond them is told so."""
    monkeypatch.setattr(connections, "LEAST", 4)
    body = b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1000\r\n\r\n"

    async def test(client: Client) -> None:
        engine.gate.clear()
        asked = asyncio.create_task(client.chat())
        await until(lambda: engine.prefilled > 0)
        flood = [await opened(client, body) for _ in range(3)]
        await asyncio.sleep(1.0)  # in which they arrive
        reader, writer = await opened(client, b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        head, _, told = (await asyncio.wait_for(reader.read(), 20)).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 503 ") and b"Retry-After" in head and b'"too_many_connections"' in told
        writer.close()
        engine.gate.set()
        assert (await asked)[0] == 200
        for _, other in flood:
            other.close()
        while (await client.get("/health"))[0] != 200:  # until it is seen that the others are gone
            await asyncio.sleep(0.05)

    engine = ScriptEngine(SAID, max_num_seqs=1)
    serving(engine, test, max_queue=1)


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="a timer of Linux")
def test_a_reply_that_nobody_reads_is_not_kept(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(connections, "UNREAD_SECONDS", 1.0)
    body = json.dumps({"prompt": "a" * 900_000}).encode()
    ask = b"POST /tokenize HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)

    async def test(client: Client) -> None:
        loop, address = asyncio.get_running_loop(), client.url.removeprefix("http://").split(":")
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.setblocking(False)
            await loop.sock_connect(sock, (address[0], int(address[1])))
            with pytest.raises(ConnectionResetError):
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(3):
                        await loop.sock_sendall(sock, ask * 8)
                await asyncio.sleep(2)
                while await loop.sock_recv(sock, 1 << 20):
                    pass

    serving(ScriptEngine(SAID), test)


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00",
        b"GET /\xff HTTP/1.1\r\n\r\n",
        b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: -1\r\n\r\n",
        SLOW + b"\0\r\n\r\n",
        SLOW + b"a" * 9000 + b"\r\n\r\n",
    ],
)
def test_what_is_no_http_leaves_no_traceback(data: bytes, caplog: pytest.LogCaptureFixture):
    async def test(client: Client) -> None:
        reader, writer = await opened(client, data)
        assert (await asyncio.wait_for(all_of(reader), 20)).split()[1] == b"400"
        writer.close()

    serving(ScriptEngine(SAID), test)
    assert not caplog.records


def test_other_threads_run_while_a_text_is_tokenized():
    ticks, done = [0], threading.Event()

    def tick() -> None:
        while not done.wait(0.001):
            ticks[0] += 1

    encode = tiny.model().tokenizer.encode
    encode("a")
    thread = threading.Thread(target=tick)
    thread.start()
    try:
        for text in ("a" * (1 << 20), "the cat " * (1 << 17)):
            before = ticks[0]
            encode(text)
            assert ticks[0] - before > 10
    finally:
        done.set()
        thread.join()


def test_tokens_are_the_same_however_long_the_text():
    tokenizer = tiny.model().tokenizer
    for text in (tiny.TEXT, "", " ", "<|im_end|>" * 9, "漢😀\n\n  ", HELLO[0]["content"]):
        offsets = tokenizer._backend.encode(text, add_special_tokens=False)
        assert tokenizer.encode(text) == offsets.ids
