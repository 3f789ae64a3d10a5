"""How fast synthesis itself is: conversations a second on one core, and memory, against a server that costs nothing.

    python benchmarks/synth_throughput.py [--conversations 1000 10000 100000] [--tokens=16] [--top-logprobs=20]

The server is a process of its own, kept off the counted core where there are several; every answer has `--tokens`
tokens with `--top-logprobs` alternatives each. A row is one whole run in a fresh process: documents read, chunks cut,
prompts sent over HTTP, replies parsed, parts written, filters applied, `dataset.parquet` written.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import multiprocessing
import os
import random
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

from synth.config import ChunkerConfig, ClientConfig, FilterConfig, ResourceConfig, SynthConfig
from synth.pipeline import synthesize

MODEL = "stub"
DOCUMENT = "".join(f"Line {i} tells that item {i} weighs {i * 7} grams; its box is {i % 9}.\n" for i in range(2000))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conversations", type=int, nargs="+", default=[1000, 10_000])
    parser.add_argument("--tokens", type=int, default=16, help="of an answer")
    parser.add_argument("--top-logprobs", type=int, default=20)
    args = parser.parse_args()
    counted, *others = sorted(os.sched_getaffinity(0))
    with _server(args.tokens, args.top_logprobs, set(others) or {counted}) as url:
        print("| conversations | per second | CPU ms each | peak memory, MB | dataset, MB |\n|---|---|---|---|---|")
        for count in args.conversations:
            with tempfile.TemporaryDirectory() as folder, multiprocessing.Pool(1) as pool:
                measure = pool.apply(_run, (folder, url, count, args.top_logprobs, counted))
            print(
                f"| {count} | {count / measure.seconds:.0f} | {measure.cpu_seconds / count * 1e3:.2f} "
                f"| {measure.peak_mb:.0f} | {measure.dataset_mb:.1f} |",
                flush=True,
            )


@dataclasses.dataclass(frozen=True)
class Measure:
    seconds: float
    cpu_seconds: float
    peak_mb: float
    dataset_mb: float


def _run(folder: str, url: str, count: int, top_logprobs: int, core: int) -> Measure:
    os.sched_setaffinity(0, {core})
    document = Path(folder) / "document.txt"
    document.write_text(DOCUMENT)
    config = SynthConfig(
        output_dir=f"{folder}/out",
        num_conversations=count,
        resource=ResourceConfig(str(document)),
        client=ClientConfig(url, MODEL),
        chunker=ChunkerConfig(min_tokens=512, max_tokens=1024),
        top_logprobs=top_logprobs,
        filters=FilterConfig(truncated=True, repetition=True, text_talk=True, refusal=True),
    )
    start, cpu = time.perf_counter(), time.process_time()
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        dataset = asyncio.run(synthesize(config))
    return Measure(
        time.perf_counter() - start,
        time.process_time() - cpu,
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        dataset.stat().st_size / 1e6,
    )


@contextlib.contextmanager
def _server(tokens: int, top_logprobs: int, cores: set[int]) -> Iterator[str]:
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.Process(target=_serve, args=(theirs, tokens, top_logprobs, cores), daemon=True)
    process.start()
    yield f"http://127.0.0.1:{ours.recv()}/v1"
    process.terminate()
    process.join()


def _serve(pipe: Connection, tokens: int, top_logprobs: int, cores: set[int]) -> None:
    os.sched_setaffinity(0, cores)
    rng = random.Random(0)
    answers = [_reply(rng, tokens, top_logprobs) for _ in range(512)]
    questions = [_reply(rng, 12, 0) for _ in range(4096)]

    async def serve() -> None:
        server = await asyncio.get_running_loop().create_server(lambda: _Stub(questions, answers), "127.0.0.1", 0)
        pipe.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(serve())


def _reply(rng: random.Random, tokens: int, top_logprobs: int) -> bytes:
    ids = [rng.randrange(256, 100_000) for _ in range(tokens)]
    choice = {"index": 0, "message": {"role": "assistant", "content": _text(ids)}}
    choice |= {"finish_reason": "stop", "token_ids": ids}
    if top_logprobs:
        choice["logprobs"] = {"content": [_position(rng, i, top_logprobs) for i in ids]}
    return json.dumps({"choices": [choice], "usage": {"prompt_tokens": 900, "completion_tokens": tokens}}).encode()


def _text(ids: list[int]) -> str:
    """A token is a byte, or a word."""
    return bytes(ids).decode() if max(ids) < 256 else "".join(f" w{i}" for i in ids)


def _position(rng: random.Random, token: int, top_logprobs: int) -> dict:
    others = [i for i in rng.sample(range(100_000), top_logprobs) if i != token]  # no alternative comes twice
    ids = [token, *others][:top_logprobs]
    top = [{"token": f"token_id:{i}", "logprob": -0.5 - rank, "bytes": None} for rank, i in enumerate(ids)]
    return top[0] | {"top_logprobs": top}


class _Stub(asyncio.Protocol):
    """Just enough HTTP: requests one after another on a connection that stays."""

    def __init__(self, questions: list[bytes], answers: list[bytes]):
        self._questions, self._answers, self._data = questions, answers, b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._data += data
        head, found, rest = self._data.partition(b"\r\n\r\n")
        if not found:
            return
        length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0] or 0)
        if len(rest) < length:
            return
        self._data = rest[length:]
        body = self._reply(head, rest[:length])
        self._transport.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
        )

    def _reply(self, head: bytes, body: bytes) -> bytes:
        if head.startswith(b"GET"):
            return json.dumps({"data": [{"id": MODEL}]}).encode()
        request = json.loads(body)
        if "messages" in request:
            kind = self._answers if request.get("logprobs") else self._questions
            return kind[request["seed"] % len(kind)]
        if "tokens" in request:
            return json.dumps({"prompt": _text(request["tokens"])}).encode()
        return json.dumps({"tokens": list(request["prompt"].encode())}).encode()


if __name__ == "__main__":
    sys.exit(main())
