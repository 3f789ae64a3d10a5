"""The `litellm` package against the server: `make test-litellm`, which gives it an environment of its own."""

from __future__ import annotations

import json
import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from running import running  # pyrefly: ignore[missing-import] (pytest puts this folder on the path)
from test_server import SAID, TOKENIZER, FakeCartridge, ScriptEngine  # pyrefly: ignore[missing-import]

from cartridges_jax.serving.server import Server
from cartridges_jax.serving.store import CartridgeStore

PYTHON = Path(__file__).parents[2] / ".venv-litellm" / "bin" / "python"
pytestmark = pytest.mark.litellm
PROGRAM = """
import asyncio, json, sys
import litellm

root, hello = sys.argv[1], [{"role": "user", "content": "hello"}]
reach = dict(api_base=f"{root}/v1", api_key="key", max_retries=0)
both = {"cartridges": [{"id": "manual"}, {"id": "other", "source": "local"}]}


def told(reply):
    choice = reply.choices[0]
    return {
        "text": choice.message.content, "ending": choice.finish_reason, "prompt": reply.usage.prompt_tokens,
        "completion": reply.usage.completion_tokens, "usage": reply.usage.model_dump(),
    }


def streamed(**more):
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(litellm.completion("openai/tiny", hello, **options, **reach, **more))
    return litellm.stream_chunk_builder(chunks, messages=hello), len(chunks)


async def asynchronous():
    return await litellm.acompletion("openai/tiny", hello, extra_body=both, **reach)


whole, (pieces, count) = litellm.completion("openai/tiny", hello, logprobs=True, top_logprobs=2, **reach), streamed()
made = {"whole": told(whole), "pieces": told(pieces) | {"chunks": count}}
made["logprobs"] = [entry["logprob"] for entry in whole.choices[0].logprobs.model_dump()["content"]]
made["composed"] = told(litellm.completion("openai/tiny", hello, extra_body=both, **reach))
made["streamed"] = told(streamed(extra_body=both)[0])
made["awaited"] = told(asyncio.run(asynchronous()))
made["named"] = told(litellm.completion("openai/tiny:manual", hello, **reach))
continued = litellm.text_completion(model="text-completion-openai/tiny", prompt="x", extra_body=both, **reach)
made["text"] = continued.choices[0].text
made["errors"] = []
for model, more in (("openai/gpt-4", {}), ("openai/tiny", {"temperature": 9}), ("openai/tiny", {"api_key": "wrong"})):
    try:
        litellm.completion(model, hello, **reach | more)
    except Exception as error:
        made["errors"].append(type(error).__name__)
print(json.dumps(made))
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    if not PYTHON.is_file():
        pytest.skip("litellm is not installed: make test-litellm")
    folder = tmp_path_factory.mktemp("cartridges")
    (folder / "manual.safetensors").write_text("five!")
    (folder / "other.safetensors").write_text("six...")
    store = CartridgeStore(folder, FakeCartridge, compose=FakeCartridge.compose)
    server = Server(ScriptEngine(SAID), TOKENIZER, store, "tiny", api_key="key", rng=random.Random(0))
    quiet = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_TELEMETRY": "False", "NO_PROXY": "127.0.0.1"}
    with running(server) as root:
        command = [PYTHON, "-c", PROGRAM, root]
        done = subprocess.run(command, env=os.environ | quiet, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    yield json.loads(done.stdout.splitlines()[-1])


def test_whole_and_streamed(made: Any):
    for name in ("whole", "pieces"):
        assert (made[name]["text"], made[name]["ending"], made[name]["completion"]) == ("Grüße!", "stop", len(SAID))
    assert made["pieces"]["chunks"] > 3 and made["logprobs"] == [-0.25] * len(made["logprobs"]) != []


def test_cartridges_by_body_and_by_name(made: Any):
    slots = {
        name: made[name]["usage"]["prompt_tokens_details"]["cartridge_tokens"]
        for name in ("composed", "streamed", "awaited", "named")
    }
    assert slots == {"composed": 10, "streamed": 10, "awaited": 10, "named": 5}
    assert made["text"] == "Grüße!"


def test_errors_are_its_own(made: Any):
    assert made["errors"] == ["NotFoundError", "BadRequestError", "AuthenticationError"]
