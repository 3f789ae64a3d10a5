"""vLLM answers as our server does: a trained cartridge and another, side by side, sixteen requests at once.

`make test-vllm`, which installs vLLM's CPU build into an environment of its own. Both sides compute in float32.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hf_folder import write_folder

import cartridges_jax as cj
from cartridges_jax.command_line.errors import UserError
from cartridges_jax.initial.initializers import InitConfig
from cartridges_jax.interop.engines import post, vllm_request
from cartridges_jax.models.language_model import LanguageModel
from cartridges_jax.training.config import TrainConfig
from cartridges_jax.training.evals.questions import questions_of
from cartridges_jax.training.optim import OptimConfig
from cartridges_jax.training.run import train
from synth import conversation
from synth.conversation import Conversation, Message, TopLogprobs

ROOT = Path(__file__).parent.parent.parent
VLLM = ROOT / ".venv-vllm" / "bin" / "python"
pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1500)]
SLOTS, ANSWER = 150, 20  # not a multiple of vLLM's block, 128
START_SECONDS = 600


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    if not VLLM.is_file():
        pytest.skip("vLLM is not installed: make test-vllm")
    return cj.load_model("smollm2-135m")


@pytest.fixture(scope="module")
def folder(model: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two cartridges: one trained on the questions of examples/, and one of the document's end, as it is."""
    folder = tmp_path_factory.mktemp("cartridges")
    document = (ROOT / "examples" / "document.txt").read_text()
    examples = []
    for question in questions_of(ROOT / "examples" / "questions.jsonl"):
        ids = model.tokenizer.encode(question.answer)
        targets = TopLogprobs(np.arange(len(ids)), np.asarray(ids), np.zeros(len(ids)), (len(ids), 1))
        answer = Message(question.answer, "assistant", tuple(ids), targets)
        examples.append(Conversation((Message(question.question, "user"), answer), "", {}))
    conversation.write(folder / "run" / "dataset.parquet", examples)
    config = TrainConfig(
        dataset=str(folder / "run" / "dataset.parquet"),
        corpus=str(ROOT / "examples" / "document.txt"),
        output_dir=str(folder / "run"),
        seq_len=256,
        num_epochs=2,
        init=InitConfig("text", SLOTS),
        optim=OptimConfig(lr=1e-2, warmup_steps=1),
    )
    cj.Cartridge.load(train(config, model), model=model).save(folder / "trained.safetensors")
    end = cj.Cartridge.from_text(model, document[len(document) // 2 :], 170)
    end.save(folder / "end.safetensors")
    bias = np.ones(end.keys.shape[:3], np.float32)
    end.replace(bias=bias).save(folder / "biased.safetensors")
    return folder


@contextmanager
def server(command: list[str], url: str, environment: dict[str, str], log: Path) -> Iterator[None]:
    with open(log, "wb") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
        try:
            deadline = time.monotonic() + START_SECONDS
            while True:
                try:
                    urllib.request.urlopen(f"{url}/health", timeout=5).close()
                    break
                except OSError:
                    assert process.poll() is None, log.read_text(errors="replace")[-3000:]
                    assert time.monotonic() < deadline, "the server does not start"
                    time.sleep(1)
            yield
        finally:  # vLLM's engine outlives a SIGTERM that comes too early
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


@pytest.fixture(scope="module")
def ours(folder: Path) -> Iterator[str]:
    url = f"http://127.0.0.1:{(port := free_port())}"
    command = [sys.executable, "-m", "cartridges_jax.serve", f"--port={port}", f"--cartridges={folder}"]
    with server([*command, "--max-length=512"], url, dict(os.environ), folder / "ours.log"):
        yield url


@pytest.fixture(scope="module")
def vllm(model: LanguageModel, folder: Path) -> Iterator[str]:
    url = f"http://127.0.0.1:{(port := free_port())}"
    transfer = {
        **{"kv_connector": "CartridgeConnector", "kv_connector_module_path": "cartridges_jax.interop.vllm"},
        **{"kv_role": "kv_both", "kv_connector_extra_config": {"cartridges": str(folder)}},
    }
    # `vllm serve` asks for a package of the name vllm, which the CPU build does not have
    command = [str(VLLM), "-m", "vllm.entrypoints.openai.api_server", "--host=127.0.0.1", f"--port={port}"]
    command += [f"--model={write_folder(model, folder / 'model')}", "--served-model-name=smollm2-135m"]
    command += ["--dtype=float32", "--max-model-len=1024", "--max-num-seqs=16", "--enforce-eager"]
    command += [f"--kv-transfer-config={json.dumps(transfer)}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    environment |= {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "VLLM_HOST_IP": "127.0.0.1"}
    environment |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_NUM_OF_RESERVED_CPU": "0"}
    with server(command, url, environment, folder / "vllm.log"):
        yield url


def prompt_of(model: LanguageModel, question: str) -> list[int]:
    return model.tokenizer.turn_ids([{"role": "user", "content": question}], add_generation_prompt=True)


def ask_ours(url: str, name: str, question: str) -> list[int]:
    body = {
        **{"model": "smollm2-135m", "cartridges": [{"id": name, "source": "local"}], "temperature": 0.0},
        **{"messages": [{"role": "user", "content": question}], "max_tokens": ANSWER, "return_token_ids": True},
    }
    return post(f"{url}/v1/chat/completions", body)["choices"][0]["token_ids"]


def ask_vllm(model: LanguageModel, url: str, folder: Path, name: str, question: str, **changes: Any) -> list[int]:
    slots = cj.Cartridge.load(folder / f"{name}.safetensors").num_slots
    body = vllm_request(name, slots, prompt_of(model, question), "smollm2-135m", ANSWER) | changes
    return post(f"{url}/v1/completions", body)["choices"][0]["token_ids"]


@pytest.mark.readme("vLLM server (`interop.vllm`)", write="✓", parity="vLLM 0.32 CPU", tolerance="same greedy answers")
def test_sixteen_requests_with_two_cartridges_answer_alike(model: LanguageModel, folder: Path, ours: str, vllm: str):
    with urllib.request.urlopen(f"{vllm}/version") as response:
        assert json.loads(response.read())["version"].startswith("0.32.")  # the one that docs/formats.md names
    questions = [q.question for q in questions_of(ROOT / "examples" / "questions.jsonl")[:8]]
    calls = [(name, question) for question in questions for name in ("trained", "end")]
    with ThreadPoolExecutor(16) as pool:
        expected = list(pool.map(lambda call: ask_ours(ours, *call), calls))
        for _ in range(2):  # the second time from vLLM's own prefix cache
            found = list(pool.map(lambda call: ask_vllm(model, vllm, folder, *call), calls))
            assert found == expected
    assert len({tuple(answer) for answer in expected}) > 8  # the two cartridges say different things
    plain = post(f"{vllm}/v1/completions", {"model": "smollm2-135m", "prompt": "The", "max_tokens": 3})
    assert plain["choices"][0]["text"]


@pytest.mark.parametrize(
    ("name", "changes", "why"),
    [
        ("end", {"cache_salt": "trained"}, "cache_salt is 'trained', expected 'end'"),
        ("end", {"kv_transfer_params": {"cartridge": "none"}}, "'none' does not exist"),
        ("end", {"kv_transfer_params": {"cartridge": "../run/cartridge"}}, "is not a cartridge's name"),
        ("end", {"prompt": [0] * 20}, "the prompt has 20 tokens, expected 170 placeholders and a text"),
        ("biased", {}, "has a bias, for which vLLM has no place"),
    ],
)
def test_a_request_that_cannot_be_served_fails_alone(
    model: LanguageModel, folder: Path, vllm: str, name: str, changes: dict[str, Any], why: str
):
    with pytest.raises(UserError, match="answers 500"):
        ask_vllm(model, vllm, folder, name, "Why?", **changes)
    assert why in (folder / "vllm.log").read_text(errors="replace")
    assert ask_vllm(model, vllm, folder, "end", "What was built?")
