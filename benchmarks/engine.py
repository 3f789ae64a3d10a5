"""How fast the engine decodes: against its own bare loop, `transformers`, llama.cpp and vLLM, on the same weights.

    python benchmarks/engine.py [--torch-python=PYTHON] [--llama-server=FILE] [--vllm-python=PYTHON] [--rounds=5]

First table: scheduler and engine with n requests under way, and the engine's decoding step alone, called in a loop
whose tokens nobody looks at: what the scheduler costs. Second table: whole jobs, prefill included, from the first
request to the last token: one request of 200 + 128 tokens, and 16 requests of mixed lengths. Others are asked over
HTTP, whole answers at a time; `transformers` pads a batch of 16 to its longest. Every side is a process of its own, and
they take turns: all do one thing, then all the next, in each of `--rounds`. The best counts, since another job on the
machine only ever slows one down, and beside it stands the median of the ratios within a round, as the machine's speed
drifts.
`--torch-python` is a Python with torch, transformers and gguf (`make test-parity` makes one).
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np

BATCHES = (1, 4, 16, 64)
PROMPT, STEPS = 100, 48  # of the first table
THREADS = len(os.sched_getaffinity(0))
# as `make quickstart` has it: large pages for every side, and for ours AVX-512's full width
ENVIRONMENT = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", "XLA_FLAGS": "--xla_cpu_prefer_vector_width=512"}
HERE = Path(__file__).parent
Measures = dict[str, Callable[[], float]]


def jobs() -> dict[str, list[dict[str, Any]]]:
    """Prompts are random ids: no side can find one in a cache of prefixes; every answer is as long as it may be."""
    rng = random.Random(0)

    def request(prompt: int, answer: int) -> dict[str, Any]:
        return {"prompt": [rng.randrange(100, 40_000) for _ in range(prompt)], "max_tokens": answer}

    mixed = [request(rng.randrange(16, 384), rng.randrange(32, 128)) for _ in range(16)]
    return {"1 request": [request(200, 128)], "16 mixed": mixed}


@contextlib.contextmanager
def ours() -> Iterator[Measures]:
    import jax

    import cartridges_jax as cj
    from cartridges_jax.serving.engine import Engine
    from cartridges_jax.serving.generate import run
    from cartridges_jax.serving.scheduler import BlockTable, Chunk, Request, Scheduler, SequenceInput, Token
    from cartridges_jax.serving.warmup import Warmup

    model = cj.load_model("smollm2-135m", dtype="float32")
    engine = Engine(model, max(BATCHES), 512)
    Warmup(engine.programs()).run()

    def decode(n: int) -> float:
        """Steps, from the one that has all requests to the last."""
        scheduler, seen, start = Scheduler(engine, n), dict.fromkeys(map(str, range(n)), 0), 0.0
        for event in run(scheduler, [_request(i, n) for i in range(n)]):
            if isinstance(event, Token):
                seen[event.id] += 1
                if not start and min(seen.values()) >= 1:
                    start, before = time.perf_counter(), sum(seen.values())
                if max(seen.values()) == STEPS:
                    return (sum(seen.values()) - before) / (time.perf_counter() - start)
        raise AssertionError

    def bare(n: int) -> float:
        each = engine.pages_each
        block_tables = [BlockTable(range(i * each, (i + 1) * each)) for i in range(n)]
        for block_table in block_tables:
            engine.prefill([Chunk([5] * PROMPT, 0, block_table)])
        for i, block_table in enumerate(block_tables):
            engine.begin(SequenceInput(i, 5, PROMPT, block_table, 0.0, 1.0, 0, 0, 0))
        jax.block_until_ready(engine._cache)
        start = time.perf_counter()
        for _ in range(STEPS):
            engine.decode(range(n))
        jax.block_until_ready(engine._last)
        return n * STEPS / (time.perf_counter() - start)

    def whole(job: list[dict[str, Any]]) -> float:
        requests = [Request(str(i), tuple(r["prompt"]), None, r["max_tokens"]) for i, r in enumerate(job)]
        start = time.perf_counter()
        count = sum(isinstance(event, Token) for event in run(Scheduler(engine, len(job)), requests))
        return count / (time.perf_counter() - start)

    measures: Measures = {}
    for n in BATCHES:
        measures |= {f"engine {n}": functools.partial(decode, n), f"loop {n}": functools.partial(bare, n)}
    yield measures | {name: functools.partial(whole, job) for name, job in jobs().items()}


@contextlib.contextmanager
def llama_cpp(binary: str, kind: str) -> Iterator[Measures]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.gguf"
        write_gguf(file, kind)
        command = [binary, "-m", str(file), "-t", str(THREADS), "-np", "16", "-c", str(16 * 512)]
        command += ["--no-webui", "--offline", "--log-disable"]

        def ask(root: str, request: dict[str, Any]) -> int:
            fields = {"n_predict": request["max_tokens"], "ignore_eos": True, "temperature": 0, "cache_prompt": False}
            return post(f"{root}/completion", {"prompt": request["prompt"]} | fields)["tokens_predicted"]

        with over_http(command, ask) as measures:
            yield measures


@contextlib.contextmanager
def vllm(python: str, folder: str) -> Iterator[Measures]:
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, "--served-model-name", "m"]
    command += ["--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", "16", "--no-enable-prefix-caching"]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_NUM_OF_RESERVED_CPU": "0", "VLLM_NO_USAGE_STATS": "1"}
    environment |= {"VLLM_HOST_IP": "127.0.0.1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}

    def ask(root: str, request: dict[str, Any]) -> int:
        fields = {"model": "m", "ignore_eos": True, "temperature": 0}
        return post(f"{root}/v1/completions", request | fields)["usage"]["completion_tokens"]

    with over_http(command, ask, environment) as measures:
        yield measures


@contextlib.contextmanager
def over_http(
    command: list[str],
    ask: Callable[[str, dict[str, Any]], int],
    environment: dict[str, str] | None = None,
) -> Iterator[Measures]:
    def whole(root: str, job: list[dict[str, Any]]) -> float:
        with concurrent.futures.ThreadPoolExecutor(len(job)) as pool:
            start = time.perf_counter()
            count = sum(pool.map(lambda request: ask(root, request), job))
            return count / (time.perf_counter() - start)

    with serving(command, environment or {}) as root:
        yield {name: functools.partial(whole, root, job) for name, job in jobs().items()}


@contextlib.contextmanager
def serving(command: list[str], environment: dict[str, str], seconds: float = 600) -> Iterator[str]:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    command = [*command, "--host", "127.0.0.1", "--port", str(port)]
    process = subprocess.Popen(
        command,
        env=os.environ | environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    root, deadline = f"http://127.0.0.1:{port}", time.monotonic() + seconds
    try:
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{root}/health", timeout=5):
                break
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{command[0]} does not serve: run {' '.join(command)} by hand to see why")
            time.sleep(0.5)
        yield root
    finally:
        process.terminate()
        process.wait(30)


def post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=600) as reply:
        return json.load(reply)


def write_gguf(target: Path, kind: str) -> None:
    """The quickstart's model with matrices as F32 or Q8_0, from the values that its own file stands for."""
    from cartridges_jax.models import hub

    reader = gguf.GGUFReader(hub.resolve("smollm2-135m").gguf)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        of_list = field.types[-1] if len(field.types) > 1 else None
        writer.add_key_value(name, field.contents(), field.types[0], of_list)
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        as_kind = gguf.GGMLQuantizationType[kind if values.ndim > 1 else "F32"]
        shape = tuple(map(int, reversed(tensor.shape)))
        writer.add_tensor(tensor.name, gguf.quantize(values.reshape(shape), as_kind), raw_dtype=as_kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _request(i: int, n: int) -> Any:
    from cartridges_jax.serving.scheduler import Request

    rng = random.Random(i)
    # the first comes first: enough tokens for all to be under way together for `STEPS` steps of the last
    return Request(str(i), tuple(rng.choices(range(100, 40_000), k=PROMPT)), None, STEPS + n)


@dataclasses.dataclass
class Side:
    """Processes that do what they are asked to by a line, and answer with tokens/s. Meanwhile they stand still: servers
    without requests still take a core's time."""

    process: subprocess.Popen[str]
    names: list[str]

    def measure(self, name: str) -> float:
        assert self.process.stdin
        os.killpg(self.process.pid, signal.SIGCONT)
        self.process.stdin.write(f"{name}\n")
        self.process.stdin.flush()
        found = float(self._line())
        os.killpg(self.process.pid, signal.SIGSTOP)
        return found

    def _line(self) -> str:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"it ended with {self.process.wait()}: {' '.join(map(str, self.process.args))}")
        return line

    @classmethod
    @contextlib.contextmanager
    def of(cls, command: list[str]) -> Iterator[Side]:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        process = subprocess.Popen(command, env=os.environ | ENVIRONMENT, start_new_session=True, **pipes)
        assert process.stdin
        try:
            side = cls(process, [])
            side.names = json.loads(side._line())
            os.killpg(process.pid, signal.SIGSTOP)
            yield side
        finally:  # at the end of its orders it tidies up
            os.killpg(process.pid, signal.SIGCONT)
            process.stdin.close()
            try:
                process.wait(60)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch-python")
    parser.add_argument("--llama-server")
    parser.add_argument("--vllm-python", help="needs --torch-python too, which writes the weights for it")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--side", nargs="+", help=argparse.SUPPRESS)  # how this script runs itself
    args = parser.parse_args()
    if args.side:
        _side(*args.side)
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # told to end, it ends the sides too, as at Ctrl-C
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as running:
        sides = {}
        for name, command in _sides(args, folder):
            print(f"starting {name} ...", file=sys.stderr, flush=True)
            sides[name] = running.enter_context(Side.of(command))
        _print(_rounds(sides, args.rounds))


def _side(name: str, *rest: str) -> None:
    with {"ours": ours, "llama_cpp": llama_cpp, "vllm": vllm}[name](*rest) as measures:
        print(json.dumps(list(measures)), flush=True)
        for line in sys.stdin:
            print(measures[line.strip()](), flush=True)


def _rounds(sides: dict[str, Side], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Tokens/s of each side by measure. One more round than counts: what the first has to compile or to allocate."""
    found: dict[str, dict[str, list[float]]] = {side: defaultdict(list) for side in sides}
    for i in range(rounds + 1):
        for name in sides["ours"].names:
            for side, process in sides.items():
                if name in process.names:
                    found[side][name].append(process.measure(name))
        print(f"round {i} of {rounds}", file=sys.stderr, flush=True)
    return {side: {name: values[1:] for name, values in of_side.items()} for side, of_side in found.items()}


def _sides(args: argparse.Namespace, folder: str) -> Iterator[tuple[str, list[str]]]:
    def itself(*side: str) -> list[str]:
        return [sys.executable, __file__, "--side", *side]

    yield "ours", itself("ours")
    if args.torch_python:
        script = str(HERE / "engine_transformers.py")
        from cartridges_jax.models import hub

        subprocess.run([args.torch_python, script, "model", str(hub.resolve("smollm2-135m").gguf), folder], check=True)
        Path(folder, "jobs.json").write_text(json.dumps(jobs()))
        yield "transformers", [args.torch_python, script, "measure", folder]
    if args.llama_server:
        yield "llama.cpp F32", itself("llama_cpp", args.llama_server, "F32")
        yield "llama.cpp Q8_0", itself("llama_cpp", args.llama_server, "Q8_0")
    if args.vllm_python:
        yield "vLLM", itself("vllm", args.vllm_python, folder)


def _print(measured: dict[str, dict[str, list[float]]]) -> None:
    def compared(ours: list[float], other: list[float]) -> str:
        median = statistics.median(a / b for a, b in zip(ours, other, strict=True))
        return f"{max(ours) / max(other):.2f}, {median:.2f}"

    ours = measured["ours"]
    print(f"load average {os.getloadavg()[0]:.1f} on {THREADS} cores; ratios: of the best rounds, median of rounds\n")
    print("| requests | engine, tokens/s | bare loop, tokens/s | ratio |\n|---|---|---|---|")
    for n in BATCHES:
        engine, loop = ours[f"engine {n}"], ours[f"loop {n}"]
        print(f"| {n} | {max(engine):.0f} | {max(loop):.0f} | {compared(engine, loop)} |")
    names = list(jobs())
    print(f"\n| tokens/s, prefill included | {' | '.join(names)} |\n|---|{'---|' * len(names)}")
    for side, found in measured.items():
        cells = (f"{max(found[name]):.0f} (ours is {compared(ours[name], found[name])} times that)" for name in names)
        print(f"| {side} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
