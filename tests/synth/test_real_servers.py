"""The OpenAI-compatible client against servers that run: our own, llama.cpp's and vLLM's, each if it is here.

    make test-servers LLAMA_SERVER=path/to/llama-server VLLM_PYTHON=path/to/python

llama-server reads the quickstart's model; vLLM (its CPU build will do) and our server a tiny random one.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny

from synth import conversation
from synth.clients.base import Client, Refused
from synth.clients.factory import connect
from synth.config import ChunkerConfig, ClientConfig, ExistingConfig, ResourceConfig, SamplingConfig, SynthConfig
from synth.pipeline import synthesize

pytestmark = [pytest.mark.real_servers, pytest.mark.timeout(900)]
GREEDY = SamplingConfig(temperature=0.0, max_tokens=12)
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is the capital of France?"}]


@dataclasses.dataclass(frozen=True)
class Real:
    url: str
    model: str
    scores: bool  # gives prompt_logprobs
    exact: bool  # the same request gives the same numbers, whatever is cached


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def running(command: list[str], port: int, seconds: float, **env: str) -> Iterator[str]:
    """Starts a server in a session of its own, waits until it is healthy, and ends all of it afterwards."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"} | env
    process = subprocess.Popen(command, env=environment, start_new_session=True, stdout=subprocess.DEVNULL)
    root = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + seconds
        while True:
            assert process.poll() is None, f"{command[0]} ended with {process.returncode}"
            assert time.monotonic() < deadline, f"{command[0]} is not ready after {seconds:g} s"
            try:
                with urllib.request.urlopen(f"{root}/health", timeout=5):
                    break
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        yield root
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def ours() -> Iterator[Real]:
    port = free_port()
    folder = tiny.folder()
    command = [sys.executable, "-m", "cartridges_jax.serve", f"--model={folder}", f"--port={port}", "--max-length=1024"]
    for root in running(command, port, 120):
        yield Real(f"{root}/v1", str(folder), scores=True, exact=True)


def llama_cpp() -> Iterator[Real]:
    binary = os.environ.get("LLAMA_SERVER")
    if not binary:
        pytest.skip("LLAMA_SERVER names no llama-server")
    from cartridges_jax.models import hub

    port, gguf = free_port(), hub.resolve("smollm2-135m").gguf
    command = [binary, "-m", str(gguf), "--alias", "smollm2", "--host", "127.0.0.1", "--port", str(port)]
    command += ["-t", "2", "-c", "8192", "-np", "4", "--kv-unified", "--no-webui", "--offline", "--log-disable"]
    for root in running([*command, "-ctk", "f32", "-ctv", "f32", "-fa", "off"], port, 120):
        yield Real(f"{root}/v1", "smollm2", scores=False, exact=False)


def vllm(folder: Path) -> Iterator[Real]:
    python = os.environ.get("VLLM_PYTHON")
    if not python:
        pytest.skip("VLLM_PYTHON names no Python with vllm")
    # attention heads of a size that vLLM has a kernel for
    tiny.write_model(folder, head_dim=64, hidden_size=128, num_attention_heads=2, num_key_value_heads=1)
    port = free_port()
    command = [
        python,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        str(folder),
        "--served-model-name",
        "tiny",
    ]
    command += ["--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    command += ["--max-model-len", "1024", "--max-num-seqs", "4", "--max-logprobs", "20", "--enforce-eager"]
    quiet = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_HOST_IP": "127.0.0.1"}
    small = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_NUM_OF_RESERVED_CPU": "0"}
    for root in running(command, port, 800, **quiet, **small):
        yield Real(f"{root}/v1", "tiny", scores=True, exact=True)


@pytest.fixture(scope="module", params=["ours", "llama.cpp", "vllm"])
def real(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Real]:
    if request.param == "ours":
        yield from ours()
    elif request.param == "llama.cpp":
        yield from llama_cpp()
    else:
        yield from vllm(tmp_path_factory.mktemp("vllm"))


def client_config(real: Real) -> ClientConfig:
    return ClientConfig(real.url, real.model, timeout_seconds=300.0)


def use(real: Real, action: Callable[[Client], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        async with connect(client_config(real), real.url) as client:
            return await action(client)

    return asyncio.run(run())


def test_model_and_tokenizer(real: Real):
    use(real, lambda c: c.check())
    text = "The owl sleeps in the barn, and the hen in the yard.\n"

    async def there_and_back(client: Client) -> str:
        return await client.detokenize(await client.tokenize(text))

    assert use(real, there_and_back) == text
    with pytest.raises(Refused, match="does not serve 'no-such-model'"):
        use(dataclasses.replace(real, model="no-such-model"), lambda c: c.check())


def test_an_answer_in_ids_that_spell_it(real: Real):
    """The client itself compares text and ids, and refuses what does not agree."""
    made = use(real, lambda c: c.complete(MESSAGES, GREEDY, 1, 5))
    assert made.text and made.token_ids and made.top_logprobs
    assert len(made.token_ids) - len(made.top_logprobs) in (0, 1)
    assert made.prompt_tokens > 5 and made.completion_tokens >= len(made.top_logprobs)
    for token, row in zip(made.token_ids, made.top_logprobs, strict=False):
        assert len(row) >= 5 and max(row, key=lambda pair: pair[1])[0] == token, "greedy takes the best"
        assert all(logprob <= 1e-4 for _, logprob in row)


def test_logprobs_are_those_before_temperature(real: Real):
    """The first row is that of the prompt, whatever is sampled from it."""
    plain = use(real, lambda c: c.complete(MESSAGES, GREEDY, 1, 5))
    warm = use(real, lambda c: c.complete(MESSAGES, SamplingConfig(temperature=0.5, max_tokens=12), 2, 5))
    a, b = (dict(made.top_logprobs[0]) for made in (plain, warm))
    shared = a.keys() & b.keys()
    assert len(shared) >= 4
    assert max(abs(a[token] - b[token]) for token in shared) < (1e-3 if real.exact else 0.05)


def test_a_seed_says_the_same_again(real: Real):
    warm = SamplingConfig(temperature=1.0, max_tokens=12)
    texts = [use(real, lambda c, seed=seed: c.complete(MESSAGES, warm, seed, 5)).text for seed in (7, 7, 8, 9)]
    assert texts[0] == texts[1] or not real.exact
    assert len(set(texts)) > 1


def test_scoring_an_answer_is_sampling_it(real: Real):
    said = use(real, lambda c: c.complete(MESSAGES, GREEDY, 1, 5))
    text = "Paris is the capital."
    given = [*MESSAGES, {"role": "assistant", "content": text}]
    if not real.scores:
        with pytest.raises(Refused, match="gives no prompt_logprobs"):
            use(real, lambda c: c.score(given, 5))
        return
    scored = use(real, lambda c: c.score(given, 5))
    spelt = use(real, lambda c: c.detokenize(scored.token_ids))
    assert re.fullmatch(re.escape(text) + r"<\|?\w+\|?>", spelt), "the answer and the end of its turn"
    assert all(len(row) == 5 for row in scored.top_logprobs)
    first, sampled = dict(scored.top_logprobs[0]), dict(said.top_logprobs[0])
    assert first.keys() == sampled.keys()
    assert max(abs(first[token] - sampled[token]) for token in first) < 1e-3


def test_a_dataset(real: Real, tmp_path: Path):
    (tmp_path / "text.txt").write_text(tiny.TEXT)
    logs = tmp_path / "logs.jsonl"
    logs.write_text('{"messages": [{"role":"user","content":"Hi."},{"role":"assistant","content":"Hello."}]}\n' * 2)
    existing = ExistingConfig(str(logs), share=0.25, context=False) if real.scores else None
    config = SynthConfig(
        str(tmp_path / "out"),
        8,
        ResourceConfig(str(tmp_path / "text.txt")),
        client_config(real),
        ChunkerConfig(32, 64),
        seed_prompts=("cloze",),
        conversations_per_chunk=4,
        top_logprobs=5,
        answer=SamplingConfig(temperature=0.0, max_tokens=12),
        distill_existing=existing,
    )
    made = conversation.read(asyncio.run(synthesize(config)))
    assert len(made) == 8 and sum(one.type == "distill_existing" for one in made) == (2 if existing else 0)
    for one in made:
        top = one.messages[1].top_logprobs
        assert top is not None and len(top.token_idx) and one.messages[1].token_ids
