"""Bodies, headers and files that are meant to do harm: each is refused with a sentence, and nobody else waits."""

from __future__ import annotations

import asyncio
import gzip
import json
import math
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from safetensors.numpy import save_file
from test_server import END, HELLO, SAID, Client, ScriptEngine, folder, serving  # pyrefly: ignore[missing-import]

from cartridges_jax import serve
from cartridges_jax.cartridge import file as cartridge_file
from cartridges_jax.cartridge.arrays import Cartridge
from cartridges_jax.command_line import progress
from cartridges_jax.command_line.errors import UserError
from cartridges_jax.interop import formats
from cartridges_jax.serving import completions, protocol, requests
from cartridges_jax.serving.choices import StopStrings
from cartridges_jax.serving.engine import Engine
from cartridges_jax.serving.protocol import PIECE, take_tags
from cartridges_jax.serving.server import Server
from cartridges_jax.serving.store import CartridgeStore

__all__ = ["folder"]  # a fixture
BODY = json.dumps({"messages": HELLO}).encode()
LIVE = "/v1/chat/completions"


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def test_unclosed_tags_take_time_in_proportion():
    def read(count: int) -> float:
        return seconds(lambda: take_tags([{"role": "system", "content": "<cartridge>" * count}]))

    assert read(60_000) < 3
    half_open = "<cartridge>" * 60_000 + "</cartridge>"

    async def test(client: Client) -> None:
        for content in (half_open, '<cartridge>{"id": "manual"}</cartridge>' * 20_000):
            status, reply = await client.chat(messages=[{"role": "system", "content": content}, *HELLO])
            assert status == 400 and "cartridge" in reply["error"]["message"] and len(reply["error"]["message"]) < 500

    serving(ScriptEngine(SAID), test, max_body=1 << 22)


def test_stop_strings_take_time_in_proportion():
    stops = tuple("a" * (1000 - i) + "b" for i in range(16))

    def read(count: int) -> None:
        found = StopStrings(stops)
        assert not any(found.push("a" * 10)[1] for _ in range(count))

    assert seconds(lambda: read(2000)) < 2


def test_a_stop_string_has_an_end():
    async def test(client: Client) -> None:
        assert (await client.chat(stop="x" * 1024))[0] == 200
        status, reply = await client.chat(stop=["x" * 1025])
        assert status == 400 and "1024 characters" in reply["error"]["message"]

    serving(ScriptEngine(SAID), test)


@pytest.mark.parametrize("depth", [10, 500, 900, 972, 990, 5000, 100_000])
@pytest.mark.parametrize("field", ["messages", "stop", "cartridges", "tools", "temperature", "seed", "prompt", "n"])
def test_deep_bodies(depth: int, field: str):
    async def test(client: Client) -> None:
        for value in ("[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth):
            body = f'{{"messages": [{{"role": "user", "content": "hi"}}], "prompt": "hi", "{field}": {value}}}'
            for path in (LIVE, "/v1/completions", "/tokenize", "/v1/cartridges/load", "/detokenize"):
                status, reply = await client.post(path, data=body)
                assert status < 500 and (status == 200 or len(reply["error"]["message"]) < 500)

    serving(ScriptEngine(SAID), test)


@pytest.mark.parametrize("value", ["1e999", "-1e999", "NaN", "Infinity", "[" * 975 + "]" * 975])
def test_what_is_no_json_is_told_to_nobody(value: str):
    async def test(client: Client) -> None:
        for stream in ("true", "false"):
            body = f'{{"input": "x", "metadata": {{"a": {value}}}, "stream": {stream}}}'
            status, reply = await client.post("/v1/responses", data=body)
            assert status == 400 and "JSON" in reply["error"]["message"]
        status, reply = await client.post("/v1/messages", data='{"messages": ' + "[" * 975)
        assert status == 400 and reply["type"] == "error" and "is not JSON" in reply["error"]["message"]
        call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": f'{{"a": {value}}}'}}
        said = [*HELLO, {"role": "assistant", "tool_calls": [call]}]
        status, reply = await client.chat(messages=said)
        assert status == 400 and "arguments" in reply["error"]["message"]

    serving(ScriptEngine(SAID), test)


@pytest.mark.parametrize("value", ["1e999", "NaN", "[" * 300 + "]" * 300])
@pytest.mark.parametrize("written", ['{"arguments": {"a": %s}, "name": "f"}', '{"name": "f", "arguments": {"a": %s}}'])
def test_what_a_model_writes_that_is_no_json_breaks_no_answer(value: str, written: str):
    tool: Any = {"name": "f", "input_schema": {"type": "object"}}
    chat_tool: Any = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}

    async def test(client: Client) -> None:
        body = {"messages": HELLO, "max_tokens": 900}
        status, reply = await client.post("/v1/messages", json=body | {"tools": [tool]})
        assert status == 200 and all(block.get("input", {}) == {} for block in reply["content"])
        assert (await client.chat(tools=[chat_tool], max_tokens=900))[0] == 200

    said = f"<tool_call>{written % value}</tool_call>".encode()
    serving(ScriptEngine([*said, END], max_length=2000), test)


DEEP = {f"a{i}": {"prefixItems": [{"$ref": f"#/$defs/a{i + 1}"}]} for i in range(4000)} | {"a4000": {"type": "string"}}
ROUND = {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}
GRAMMARS = [
    ("grammar", "start: r0\n" + "".join(f"r{i}: r{i + 1}\n" for i in range(8000)) + 'r8000: "a"\n'),
    ("grammar", "start: " + '"a"? ' * 9000),
    ("grammar", 'start: "b" ' + '"a"? ' * 9000),
    ("grammar", 'start: a{3000}\na: b{3000}\nb: "x"{3000}\n'),
    ("json", json.dumps({"$ref": "#/$defs/a", "$defs": ROUND})),
    ("json", json.dumps({"$ref": "#/$defs/a0", "$defs": DEEP})),
    ("regex", "a" * (1 << 20)),
]
COMPILES = """
import json, sys, time, tiny
from cartridges_jax.serving.grammar import Grammar, GrammarCompiler
from cartridges_jax.serving.protocol import ApiError

compiler = GrammarCompiler(tiny.model().tokenizer)
for case in json.load(sys.stdin):
    try:
        constraint = compiler.constraint(Grammar(*case, "form"))()
    except ApiError as error:
        assert "form" in error.message and len(error.message) < 400
        continue
    for token in b"bxaaa":
        start = time.perf_counter()
        constraint.mask()
        assert time.perf_counter() - start < 3, case[1][:80]
        constraint.take(token)
print("all")
"""


def test_a_grammar_kills_nobody_and_holds_nobody_up():
    """In a process of its own, which such grammars have ended."""
    command, folder = [sys.executable, "-c", COMPILES], Path(tiny.__file__).parent
    done = subprocess.run(command, input=json.dumps(GRAMMARS), text=True, cwd=folder, capture_output=True)
    assert done.stdout == "all\n", done.stderr[-2000:]


@pytest.mark.parametrize(
    ("header", "status"),
    [
        (b"Bearer key", 200),
        (b"bearer key", 200),
        (b"BEARER  key", 200),
        (b"Basic key", 401),
        (b"Bearer k\xc3\xa9y", 401),
        (b"Bearer \xff\xfe", 401),
        (b"\xe9", 401),
        (b"Bearer", 401),
        (b"", 401),
    ],
)
def test_any_authorization_is_answered(header: bytes, status: int):
    """Byte for byte: clients of ours would not send some of these."""

    async def test(client: Client) -> None:
        host, port = client.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(
            b"GET /v1/models HTTP/1.1\r\nHost: h\r\nConnection: close\r\nAuthorization: " + header + b"\r\n\r\n"
        )
        line = await reader.readline()
        writer.close()
        assert int(line.split()[1]) == status

    serving(ScriptEngine(SAID), test, api_key="key")


@pytest.mark.parametrize(
    ("encoding", "data", "status", "words"),
    [
        ("gzip", gzip.compress(BODY, mtime=0), 200, ""),
        ("GZIP", gzip.compress(BODY, mtime=0), 200, ""),
        ("deflate", zlib.compress(BODY), 200, ""),
        ("identity", BODY, 200, ""),
        ("gzip", BODY, 400, "not gzip"),
        ("deflate", BODY, 400, "not deflate"),
        ("gzip", gzip.compress(BODY, mtime=0)[:-9], 400, "one whole gzip stream"),
        ("gzip", gzip.compress(BODY, mtime=0) * 2, 400, "one whole gzip stream"),
        ("gzip", b"", 400, "one whole gzip stream"),
        ("gzip", gzip.compress(b" " * (64 << 20), mtime=0), 413, "when it is unpacked"),
        ("deflate", zlib.compress(b"[" * (64 << 20)), 413, "when it is unpacked"),
        ("br", BODY, 415, "expected gzip or deflate"),
        ("gzip, gzip", gzip.compress(gzip.compress(BODY, mtime=0), mtime=0), 415, "expected gzip or deflate"),
    ],
)
def test_packed_bodies(encoding: str, data: bytes, status: int, words: str):
    async def test(client: Client) -> None:
        got, reply = await client.post(LIVE, data=data, headers={"Content-Encoding": encoding})
        assert got == status and (status == 200 or words in reply["error"]["message"])

    serving(ScriptEngine(SAID), test, max_body=1 << 20)


@pytest.mark.parametrize(
    "number", ["1e400", "-1e400", "NaN", "Infinity", "9" * 4000, "-0", "1" + "0" * 5000, "0.0", "-1", "true", '"1"']
)
def test_numbers_at_the_edges(number: str):
    async def test(client: Client) -> None:
        for field in ("temperature", "top_p", "top_k", "seed", "n", "max_tokens", "top_logprobs", "prompt_logprobs"):
            body = f'{{"messages": [{{"role": "user", "content": "hi"}}], "{field}": {number}}}'
            status, _ = await client.post(LIVE, data=body)
            assert status < 500, (field, number)

    serving(ScriptEngine(SAID), test)


def test_nothing_long_is_done_on_the_event_loop(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Listing looks at every file, and the text of many tokens takes its time."""

    def elsewhere(of: type, name: str) -> None:
        real = getattr(of, name)

        def checked(*args: Any, **how: Any) -> Any:
            with pytest.raises(RuntimeError):  # this thread runs no loop
                asyncio.get_running_loop()
            seen.add(name)
            return real(*args, **how)

        monkeypatch.setattr(of, name, checked)

    seen: set[str] = set()
    elsewhere(CartridgeStore, "list")
    elsewhere(Server, "_text")

    async def test(client: Client) -> None:
        status, reply = await client.get("/v1/cartridges")
        assert status == 200 and len(reply["data"]) >= 2
        assert (await client.post("/detokenize", json={"tokens": [65] * 1000}))[0] == 200
        assert seen == {"list", "_text"}

    serving(ScriptEngine(SAID), test, folder)


def test_a_reply_has_an_end(monkeypatch: pytest.MonkeyPatch):
    """What is told in one piece is held until then, however many answers of a batch share it."""
    monkeypatch.setattr(requests, "MAX_LOGPROBS", 2 * 100 * 5)
    batch = "/custom/synchronous-batch-completions"

    async def test(client: Client) -> None:
        best = {"logprobs": True, "top_logprobs": 4}
        assert (await client.chat(n=2, max_tokens=100, **best))[0] == 200
        assert (await client.chat(n=3, max_tokens=100))[0] == 200
        assert len(await client.stream(max_tokens=300, ignore_eos=True, **best)) > 300
        bodies = {"messages": HELLO, "max_tokens": 100} | best
        assert (await client.post(batch, json={"requests": [bodies] * 2}))[0] == 200
        old = {"prompt": ["a", "b"], "n": 2, "max_tokens": 100, "logprobs": 4}
        for path, body, param in (
            (LIVE, {"messages": HELLO, "n": 3, "max_tokens": 100} | best, "top_logprobs"),
            (LIVE, {"messages": HELLO, "n": 2**31, "max_tokens": 2**31 - 1} | best, "n"),
            (LIVE, {"messages": HELLO, "n": 3} | best, "top_logprobs"),
            ("/v1/completions", old, "logprobs"),
            (batch, {"requests": [bodies] * 3}, "requests[2]"),
        ):
            status, reply = await client.post(path, json=body)
            assert status == 400 and reply["error"]["param"] == param, reply

    serving(ScriptEngine(SAID), test)


def test_replies_are_encoded_in_pieces(monkeypatch: pytest.MonkeyPatch):
    real, seen = json.dumps, [0]

    def counted(value: Any, **how: Any) -> str:
        text = real(value, **how)
        seen.append(len(text))
        return text

    reply = {
        "id": 'a"😀',
        "prompt_logprobs": [None, *({"1": {"logprob": -0.5, "rank": i}} for i in range(5000))],
        "choices": [
            {"index": i, "message": {"content": ""}, "logprobs": {"content": [{"token": "é", "bytes": [1]}] * count}}
            for i, count in enumerate((0, 1, PIECE, PIECE + 1, 5000))
        ],
        "usage": {},
    }
    monkeypatch.setattr(protocol, "to_json", counted)
    assert json.loads(completions.encoded(reply)) == reply
    assert json.loads(completions.encoded([reply] * 2)) == [reply] * 2
    assert len(seen) > 100 and max(seen) < 10_000


def test_time_includes_fetching_and_loading(folder: Path):
    arrived = threading.Event()

    def fetch(name: str) -> Path:
        arrived.wait()
        return folder / "manual.safetensors"

    async def test(client: Client) -> None:
        try:
            slow = {"id": "org/slow", "source": "huggingface"}
            status, reply = await client.chat(cartridges=[slow])
            assert status == 504 and reply["error"]["code"] == "timeout"
            assert (await client.post("/v1/cartridges/load", json=slow))[0] == 504
            assert (await client.chat())[0] == 200, "nobody else waits"
        finally:
            arrived.set()

    serving(ScriptEngine(SAID), test, folder, fetch, max_seconds=0.3)


def small() -> Cartridge:
    return Cartridge.from_tokens(tiny.model(), range(5, 25))


def write(path: Path, tensors: dict[str, np.ndarray] | None = None, **header: Any) -> Path:
    """A cartridge's file with these tensors and these entries of its header in place of its own."""
    cartridge = small()
    own = {"keys": np.asarray(cartridge.keys), "values": np.asarray(cartridge.values)}
    told = {"format_version": 2, **cartridge_file.header_of(cartridge)} | header
    save_file(own | (tensors or {}), path, metadata={"cartridge": json.dumps(told)})
    return path


@pytest.mark.parametrize(
    "tensors",
    [
        {"keys": np.ones((2, 20, 2, 8), np.int8), "keys_scale": np.ones((20_000, 1, 1, 1, 1), np.float32)},
        {"keys": np.ones((2, 20, 2, 8), np.int8), "keys_scale": np.ones((2, 20, 1), np.float32)},
        {"keys": np.ones((2, 20, 2, 8), np.int8)},
        {"keys": np.ones((2, 20, 2, 8), np.int64)},
        {"bias": np.zeros((2, 20, 2), np.int32)},
        {"bias": np.full((2, 20, 2), np.nan, np.float32)},
        {"values": np.full((2, 20, 2, 8), np.inf, np.float32)},
        {"values": np.full((2, 20, 2, 8), 127, np.int8), "values_scale": np.full((2, 20, 2), 1e38, np.float32)},
    ],
)
def test_files_whose_arrays_cannot_be_a_cartridge_s(tmp_path: Path, tensors: dict[str, np.ndarray]):
    with pytest.raises(UserError, match=r"not a whole cartridge file|not finite"):
        formats.read(write(tmp_path / "c.safetensors", tensors))


@pytest.mark.parametrize(
    "header",
    [
        {"training_flops": math.nan},
        {"training_flops": math.inf},
        {"training_flops": 10**400},
        {"training_tokens": 10**400},
        {"training_tokens": True},
        {"recipe": "\ud800"},
        {"recipe": ["a"]},
        {"evaluation": {"a": 1}},
        {"model": None},
        {"num_frozen": 1.0},
        {"format_version": "2"},
        {"evaluation": "x" * (1 << 21)},
    ],
)
def test_headers_that_say_what_no_header_says(tmp_path: Path, header: dict[str, Any]):
    with pytest.raises(UserError, match="not a whole cartridge file"):
        formats.read(write(tmp_path / "c.safetensors", **header))


@pytest.mark.parametrize(
    "evaluation", ["NaN", '{"a": 1e400}', "[" * 900 + "]" * 900, "[" * 10**5, "{", "\x1b[2J", '{"a": [1]}']
)
def test_what_a_header_says_is_listed_as_json(tmp_path: Path, evaluation: str):
    described = serve.describe(formats.read(write(tmp_path / "c.safetensors", evaluation=evaluation)))
    json.loads(json.dumps({"data": [described]}, allow_nan=False))
    assert described["evaluation"] == ({"a": [1]} if "1]" in evaluation else evaluation)


@pytest.mark.parametrize(
    "start",
    [
        b"",
        b"{}",
        b'{"__metadata__": {"cartridge": "{}"}}',
        b'{"keys": 1}',
        b'{"keys": {"data_offsets": []}}',
        b"[]",
        b"\xff",
    ],
)
def test_what_a_file_does_not_say_it_has_is_not_read(tmp_path: Path, start: bytes, monkeypatch: pytest.MonkeyPatch):
    """Ten gigabytes of nothing, which take no place on a disk."""
    for length in (len(start), 1 << 33, (1 << 64) - 1):
        path = tmp_path / "c.safetensors"
        with open(path, "wb") as file:
            file.write(length.to_bytes(8, "little") + start)
            file.truncate(10 << 30)
        start_of_read = time.perf_counter()
        with pytest.raises(UserError, match="not a whole cartridge file"):
            formats.read(path)
        assert time.perf_counter() - start_of_read < 3


def test_links_that_lead_nowhere_are_no_cartridges(folder: Path):
    (folder / "circle.safetensors").symlink_to(folder / "circle.safetensors")
    (folder / "around").symlink_to(folder / "around")
    (folder / "gone.safetensors").symlink_to(folder / "nothing")

    async def test(client: Client) -> None:
        status, reply = await client.get("/v1/cartridges")
        assert status == 200 and {entry["id"] for entry in reply["data"]} == {"manual", "nested", "wrong"}
        for id in ("circle", "around", "gone"):
            assert (await client.chat(cartridges=[{"id": id}]))[0] == 404
            assert (await client.get(f"/v1/models/tiny:{id}"))[0] == 404

    serving(ScriptEngine(SAID), test, folder)


def test_yaml_merges_are_refused(tmp_path: Path):
    lines = ["a0: &a0 {x: 1, y: 2}", *(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}" for i in range(1, 40))]
    (tmp_path / "config.yaml").write_text("\n".join(lines))
    formats.write(small(), tmp_path / "cartridge.pt", "upstream")
    from cartridges_jax.interop import upstream

    with pytest.raises(UserError, match="merges groups by <<"):
        upstream.read_config(tmp_path / "config.yaml")
    (tmp_path / "config.yaml").write_text("a: &a [1]\nb: *a\nmodel: {pretrained_model_name_or_path: org/name}\n")
    assert upstream.model_of(upstream.read_config(tmp_path / "config.yaml")) == "org/name"


def test_a_file_that_is_written_over_while_it_is_read_kills_nobody(tmp_path: Path):
    """As `cp` does: cut to nothing, then written again."""
    path = write(
        tmp_path / "c.safetensors", {name: np.ones((2, 60_000, 2, 8), np.float32) for name in ("keys", "values")}
    )
    whole = path.read_bytes()
    program = (
        "import sys, time\nfrom pathlib import Path\nfrom cartridges_jax.cartridge import file\n"
        "from cartridges_jax.command_line.errors import UserError\n"
        "print('ready', flush=True)\nend = time.monotonic() + 2\n"
        "while time.monotonic() < end:\n"
        "    try:\n        file.read(Path(sys.argv[1]))\n"
        "    except UserError:\n        pass\n"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, text=True) as reader:
        assert reader.stdout is not None and reader.stdout.readline() == "ready\n"
        while reader.poll() is None:
            with open(path, "r+b") as file:
                file.truncate(0)
                file.write(whole)
    assert reader.returncode == 0


def test_a_hostile_cartridge_is_refused_and_its_neighbours_are_not(tmp_path: Path):
    """Over HTTP, on a real engine: finite in the file, not finite in the model."""
    huge = {"values": np.full((2, 20, 2, 8), 3e38, np.float32)}
    write(tmp_path / "huge.safetensors", huge)
    small().save(tmp_path / "fine.safetensors")
    write(tmp_path / "nan.safetensors", {"values": np.full((2, 20, 2, 8), np.nan, np.float32)})
    model = tiny.model()

    def strict(text: str) -> Any:
        return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))

    async def test(client: Client) -> None:
        async def ask(name: str | None, path: str = LIVE, **fields: Any) -> tuple[int, str]:
            body = {"temperature": 0, "max_tokens": 5, "return_token_ids": True, **fields}
            body |= {"messages": HELLO} if path == LIVE else {"prompt": "hello"}
            body |= {"cartridges": [{"id": name}]} if name else {}
            async with client.session.post(client.url + path, json=body) as response:
                return response.status, await response.text()

        alone = {name: strict((await ask(name))[1])["choices"] for name in (None, "fine")}
        for fields in ({"logprobs": True, "top_logprobs": 3}, {"prompt_logprobs": 2}, {}):
            replies = await asyncio.gather(ask("huge", **fields), ask("fine"), ask(None), ask("huge", **fields))
            for status, text in (replies[0], replies[3]):
                assert status == 422 and strict(text)["error"]["code"] == "not_finite"
            for (status, text), name in zip(replies[1:3], ("fine", None), strict=True):
                assert status == 200 and strict(text)["choices"] == alone[name]
        status, text = await ask("huge", stream=True)
        assert status == 200 and "not_finite" in text and "NaN" not in text
        assert (await ask("huge", "/v1/completions"))[0] == 422
        assert (await ask("nan"))[0] == 400
        async with client.session.get(client.url + "/v1/cartridges") as response:
            assert {c["id"] for c in strict(await response.text())["data"]} == {"huge", "fine", "nan"}
        async with client.session.get(client.url + "/metrics") as response:
            assert "nan" not in (await response.text()).lower()

    engine = Engine(model, 4, 256, batch_sizes=[4])
    store = CartridgeStore(tmp_path, lambda path: Cartridge.load(path, model=model))
    server = Server(engine, model.tokenizer, store, "tiny")

    async def body() -> None:
        import aiohttp

        sock = serve.bind("127.0.0.1", 0)
        runner = await server.start(sock)
        try:
            async with aiohttp.ClientSession() as session:
                await asyncio.wait_for(test(Client(session, f"http://127.0.0.1:{sock.getsockname()[1]}")), 60)
        finally:
            await runner.cleanup()

    asyncio.run(body())


def test_escape_codes_reach_no_terminal(capsys: pytest.CaptureFixture[str]):
    from cartridges_jax import chat
    from cartridges_jax.command_line import config

    text = "a\x1b[2J\x1b]0;title\x07\x9b31m\x7f\r\tb\n"
    shown = progress.printable(text)
    assert not [c for c in shown if (ord(c) < 32 and c not in "\t\n") or 0x7F <= ord(c) < 0xA0]
    assert (
        len(shown) == len(text)
        and shown.endswith("\tb\n")
        and progress.printable("größer — 漢字\n") == "größer — 漢字\n"
    )
    chat._write(text)

    def fail(_: list[str]) -> int:
        raise UserError(text)

    with pytest.raises(SystemExit):
        config.run(fail)
    with progress.stage(text):
        pass
    told = capsys.readouterr()
    assert (
        "\x1b" not in told.out + told.err and "\x9b" not in told.out + told.err and "␛" in told.out and "␛" in told.err
    )
