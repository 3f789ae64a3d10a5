"""Half an hour of everything that clients do to a server, at random; says at the end whether it stayed whole.

    python benchmarks/soak.py [--minutes=30] [--model=smollm2-135m] [--seed=0]

A server process on the loopback gets well-formed requests (whole, streamed, with a cartridge, two composed, or none),
clients that go away or read slowly, malformed, oversize and hostile bodies, cartridges whose numbers overflow, and
cartridges that are loaded, dropped, pinned and replaced under it. Checked throughout: a well-formed greedy
request gives the tokens that it gives alone, or a proper refusal (429, 503); anything else is refused with 4xx in
OpenAI's shape; no reply holds NaN; the process lives. Checked at the end: no answer is left running, and memory did not
grow.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gzip
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from statistics import linear_regression, median
from typing import Any

import aiohttp

from cartridges_jax.command_line.progress import Progress

WORKERS, WATCH_SECONDS = 12, 5
WORDS = ("the", "a", "lid", "box", "is", "of", "in", "wide", "cat", "owl", "sleeps", "weighs", "what", "seven", "blue")
NAMES = ("short", "middle", "long")
HOSTILE = {"keys": 1e38, "values": 3e38, "bias": 1e38}  # what every third slot of a cartridge holds: finite in its file
GROWTH_MB = 64  # of the server's memory, beyond which it is a leak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_cartridges(args.model, Path(folder), args.seed)
        with server(args.model, Path(folder), warm=args.minutes >= 1) as (url, process):
            report = asyncio.run(Soak(url, process, Path(folder), args.seed).run(60 * args.minutes))
    print(json.dumps(report, indent=1))
    if report["wrong"]:
        sys.exit("the server did not stay whole: see wrong")


def write_cartridges(model: str, folder: Path, seed: int) -> None:
    import jax.numpy as jnp

    import cartridges_jax as cj

    loaded, rng = cj.load_model(model), random.Random(seed)
    for name, length in zip(NAMES, (5, 24, 60), strict=True):
        text = " ".join(rng.choices(WORDS, k=100))
        cj.Cartridge.from_text(loaded, text, length).save(folder / f"{name}.safetensors")
    clean = cj.Cartridge.from_text(loaded, " ".join(WORDS), 10)
    clean = clean.replace(bias=jnp.zeros(clean.keys.shape[:3]))
    for name, value in HOSTILE.items():
        hostile = clean.replace(**{name: getattr(clean, name).at[:, ::3].set(value)})
        hostile.save(folder / f"hostile-{name}.safetensors")


@contextlib.contextmanager
def server(model: str, folder: Path, warm: bool) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    options = [
        "--max-num-seqs=4",
        "--max-length=256",
        "--max-queue=8",
        "--max-body=40000",
        "--max-cartridges=4",
        "--port=0",
    ]
    command = [sys.executable, "-m", "cartridges_jax.serve", f"--model={model}", f"--cartridges={folder}", *options]
    command += [] if warm else ["--no-warmup"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        found = re.search(r"http://\S+?:\d+", process.stdout.readline())
        if found is None:
            sys.exit("the server did not start: see above")
        try:
            yield found[0], process
        finally:
            process.terminate()


class Soak:
    def __init__(self, url: str, process: subprocess.Popen[str], folder: Path, seed: int):
        self._url, self._process, self._folder = url, process, folder
        self._rng = random.Random(seed)
        self._done: Counter[str] = Counter()
        self._wrong: list[str] = []
        self._memory: list[float] = []
        self._known: list[tuple[dict[str, Any], list[int]]] = []

    async def run(self, seconds: float) -> dict[str, Any]:
        async with aiohttp.ClientSession() as self._session:
            for body in self._bodies():
                self._known.append((body, await self._alone(body)))
            end = time.monotonic() + seconds
            await asyncio.gather(self._watch(end), *(self._work(end) for _ in range(WORKERS)))
            for body, ids in self._known:
                self._expect(await self._alone(body) == ids, f"afterwards, alone: other tokens for {body}")
            await self._settle()
        return {
            "seconds": round(seconds),
            "done": dict(sorted(self._done.items())),
            "server_megabytes": {
                "by_fifth_of_the_time": self._fifths(),
                "more_each_hour_in_the_last_half": self._slope(),
            },
            "wrong": self._wrong[:20],
        }

    def _bodies(self) -> Iterator[dict[str, Any]]:
        choices: list[list[str]] = [[], *([name] for name in NAMES), ["short", "long"], ["long", "short"]]
        for i in range(12):
            question = " ".join(self._rng.choices(WORDS, k=self._rng.randint(1, 12)))
            yield {
                "messages": [{"role": "user", "content": question}],
                "cartridges": [{"id": name} for name in choices[i % len(choices)]],
                "temperature": 0,
                "max_tokens": self._rng.randint(1, 24),
                "ignore_eos": bool(i % 2),
                "return_token_ids": True,
            }

    async def _alone(self, body: dict[str, Any]) -> list[int]:
        async with self._session.post(f"{self._url}/v1/chat/completions", json=body) as response:
            reply = await response.json()
            assert response.status == 200, reply
            return reply["choices"][0]["token_ids"]

    async def _work(self, end: float) -> None:
        actions = [self._answer] * 4 + [self._stream] * 3 + [self._leave, self._malformed, self._oversize, self._manage]
        actions += [self._overflow, self._attack]
        while time.monotonic() < end and self._process.poll() is None:
            action = self._rng.choice(actions)
            try:
                await action()
            except aiohttp.ClientError as error:
                self._expect(False, f"{action.__name__}: {error!r}")
            self._done[action.__name__.strip("_")] += 1

    async def _answer(self) -> None:
        body, ids = self._rng.choice(self._known)
        async with self._session.post(f"{self._url}/v1/chat/completions", json=body) as response:
            reply = await response.json()
            if response.status == 200:
                self._expect(reply["choices"][0]["token_ids"] == ids, f"other tokens than alone for {body}")
            else:
                self._refused(response.status, reply, (429, 503))

    async def _stream(self) -> None:
        """Every third one is read slowly."""
        body, ids = self._rng.choice(self._known)
        pause = self._rng.choice([0, 0, 0.05])
        said: list[int] = []
        async with self._session.post(f"{self._url}/v1/chat/completions", json=body | {"stream": True}) as response:
            if response.status != 200:
                return self._refused(response.status, await response.json(), (429, 503))
            async for line in response.content:
                await asyncio.sleep(pause)
                if line.startswith(b"data: {"):
                    event = json.loads(line[6:])
                    if "error" in event:
                        return self._refused(503, event, (503,))
                    said += [token for choice in event["choices"] for token in choice["token_ids"]]
        self._expect(said == ids, f"other streamed tokens than alone for {body}")

    async def _leave(self) -> None:
        body, _ = self._rng.choice(self._known)
        body = body | {"max_tokens": 150, "ignore_eos": True, "stream": self._rng.random() < 0.5}
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._rng.uniform(0.001, 0.3)):
                async with self._session.post(f"{self._url}/v1/chat/completions", json=body) as response:
                    await response.read()

    async def _malformed(self) -> None:
        good = json.dumps(self._rng.choice(self._known)[0])
        cut = self._rng.randrange(len(good))
        wrong = {"messages": 5, "temperature": "hot", "cartridges": [{"id": "../short"}], "n": 0, "stop": [""]}
        name = self._rng.choice(list(wrong))
        data = self._rng.choice(
            [good[:cut], self._rng.randbytes(50), b"[" * 5000, json.dumps(json.loads(good) | {name: wrong[name]})]
        )
        route = self._rng.choice(["/v1/chat/completions", "/v1/completions", "/v1/cartridges/load", "/tokenize"])
        async with self._session.post(f"{self._url}{route}", data=data) as response:
            reply = await response.json()
            if route != "/tokenize" or response.status != 200:  # which looks at the messages only
                self._refused(response.status, reply, range(400, 500))

    async def _overflow(self) -> None:
        """A cartridge whose numbers are too large: numbers that are none are refused, whatever else may be said."""
        body = {
            "messages": [{"role": "user", "content": self._rng.choice(WORDS)}],
            "cartridges": [{"id": f"hostile-{self._rng.choice(list(HOSTILE))}"}],
            "max_tokens": 8,
            "logprobs": True,
            "top_logprobs": 3,
        }
        async with self._session.post(f"{self._url}/v1/chat/completions", json=body) as response:
            text = await response.text()
            self._expect("NaN" not in text and "Infinity" not in text, f"no JSON: {text[:200]}")
            if response.status != 200:
                self._refused(response.status, json.loads(text), (422, 429, 503))

    async def _attack(self) -> None:
        body, headers = self._rng.choice(
            [
                (json.dumps({"messages": [{"role": "system", "content": "<cartridge>" * 3000}]}).encode(), {}),
                (b'{"messages": ' + b"[" * 972 + b"]" * 972 + b"}", {}),
                (b'{"messages": []}', {"Content-Encoding": "gzip"}),
                (gzip.compress(b" " * (1 << 24)), {"Content-Encoding": "gzip"}),
                (b'{"messages": [{"role": "user", "content": "a"}], "temperature": 1e400}', {}),
            ]
        )
        start = time.monotonic()
        async with self._session.post(f"{self._url}/v1/chat/completions", data=body, headers=headers) as response:
            reply = await response.json()
            if response.status != 200:
                self._refused(response.status, reply, range(400, 500))
        self._expect(time.monotonic() - start < 30, f"{body[:60]!r} took {time.monotonic() - start:.0f} s")

    async def _oversize(self) -> None:
        length = self._rng.choice([3000, 50_000])
        body = {"messages": [{"role": "user", "content": "word " * (length // 5)}]}
        async with self._session.post(f"{self._url}/v1/chat/completions", json=body) as response:
            self._refused(response.status, await response.json(), (400, 413))

    async def _manage(self) -> None:
        name, act = self._rng.choice(NAMES), self._rng.choice(["load", "unload", "pin", "unpin", "replace"])
        if act == "replace":
            copy = self._folder / f".{name}.{time.monotonic_ns()}"
            copy.write_bytes((self._folder / f"{name}.safetensors").read_bytes())
            copy.replace(self._folder / f"{name}.safetensors")
            act = "load"
        async with self._session.post(f"{self._url}/v1/cartridges/{act}", json={"id": name}) as response:
            if response.status != 200:
                self._refused(response.status, await response.json(), (409,))

    def _refused(self, status: int, reply: Any, statuses: Any) -> None:
        told = isinstance(reply, dict) and isinstance(reply.get("error"), dict) and reply["error"].get("message")
        self._expect(bool(told) and status in statuses, f"{status}: {str(reply)[:200]}")
        self._done[f"refused {status}"] += 1

    def _expect(self, true: bool, otherwise: str) -> None:
        if not true:
            self._wrong.append(otherwise)

    async def _watch(self, end: float) -> None:
        progress = Progress("soaking", round(end - time.monotonic()), "seconds")
        while time.monotonic() < end:
            if self._process.poll() is not None:
                self._wrong.append(f"the server ended with {self._process.returncode}")
                break
            self._memory.append(self._megabytes())
            await asyncio.sleep(WATCH_SECONDS)
            progress.advance(WATCH_SECONDS, f"{len(self._wrong)} things wrong")
        progress.close()

    async def _settle(self) -> None:
        """Nothing runs any more, and memory is as it was after the first fifth of the time."""
        for _ in range(100):
            async with self._session.get(f"{self._url}/metrics") as response:
                told = await response.text()
            live = re.findall(r"^vllm:num_requests_(?:running|waiting){.*} (.+)$", told, re.MULTILINE)
            if live == ["0.0", "0.0"]:
                break
            await asyncio.sleep(0.1)
        self._expect(live == ["0.0", "0.0"], f"answers are left running or waiting: {live}")
        fifths = self._fifths()
        if fifths:
            growth = fifths[-1] - fifths[1]
            self._expect(growth < GROWTH_MB, f"the server's memory grew by {growth} MB")

    def _fifths(self) -> list[int]:
        """The median of each fifth of the time: the allocator fills its arenas in the first. Empty if too short."""
        size = len(self._memory) // 5
        return [round(median(self._memory[i * size : (i + 1) * size])) for i in range(5)] if size else []

    def _slope(self) -> float | None:
        """Megabytes an hour; None if the time is too short to tell."""
        later = self._memory[len(self._memory) // 2 :]
        if len(later) < 3:
            return None
        return round(linear_regression(range(len(later)), later).slope * 3600 / WATCH_SECONDS, 1)

    def _megabytes(self) -> float:
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        return int(re.findall(r"VmRSS:\s+(\d+) kB", status)[0]) / 1000


if __name__ == "__main__":
    main()
