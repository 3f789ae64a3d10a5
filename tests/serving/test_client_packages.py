"""The packages `anthropic`, `openai` and `openai-agents`, unchanged, against the server: `make test-clients`."""

from __future__ import annotations

import json
import os
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest
from clients import PYTHON  # pyrefly: ignore[missing-import] (pytest puts this folder on the path)
from running import running  # pyrefly: ignore[missing-import]
from test_server import END, SAID, TOKENIZER, FakeCartridge, ScriptEngine  # pyrefly: ignore[missing-import]

from cartridges_jax.serving.server import Server
from cartridges_jax.serving.store import CartridgeStore

pytestmark = pytest.mark.clients
CALL = [*b'I look.<tool_call>\n{"name": "size", "arguments": {"of": "lid"}}\n</tool_call>', END]
QUIET = {"NO_PROXY": "127.0.0.1", "OPENAI_AGENTS_DISABLE_TRACING": "1"}

ANTHROPIC = """
import json, sys
import anthropic

client = anthropic.Anthropic(base_url=sys.argv[1], api_key="key", max_retries=0)
hello = dict(model="tiny:manual", max_tokens=200, messages=[{"role": "user", "content": "hello"}])
made = {"whole": client.messages.create(**hello, system="Be kind.").to_dict()}
with client.messages.stream(**hello) as stream:
    made["text"] = "".join(stream.text_stream)
    made["streamed"] = stream.get_final_message().to_dict()
made["counted"] = client.messages.count_tokens(model="tiny", messages=hello["messages"]).input_tokens
made["models"] = [model.id for model in client.models.list().data]
made["errors"] = []
for more in ({"model": "claude"}, {"extra_body": {"temperature": 9}}, {"max_tokens": 9000}, {"api_key": "wrong"}):
    key = more.pop("api_key", "key")
    try:
        client.with_options(api_key=key).messages.create(**hello | more)
    except anthropic.APIStatusError as error:
        made["errors"].append([type(error).__name__, str(error.body["error"]["message"])[:60]])
print(json.dumps(made))
"""

ANTHROPIC_TOOLS = """
import json, sys
import anthropic

client = anthropic.Anthropic(base_url=sys.argv[1], api_key="key", max_retries=0)
schema = {"type": "object", "properties": {"of": {"type": "string"}}, "required": ["of"]}
hello = dict(model="tiny", max_tokens=200, messages=[{"role": "user", "content": "how wide?"}])
tools = [{"name": "size", "description": "A size.", "input_schema": schema}]
whole = client.messages.create(**hello, tools=tools)
with client.messages.stream(**hello, tools=tools) as stream:
    pieces = [event.partial_json for event in stream if event.type == "input_json"]
    streamed = stream.get_final_message()
result = {"type": "tool_result", "tool_use_id": whole.content[1].id, "content": "4 cm"}
history = [*hello["messages"], {"role": "assistant", "content": whole.content}, {"role": "user", "content": [result]}]
after = client.messages.create(**hello | {"messages": history}, tools=tools)
print(json.dumps({
    "inputs": [reply.content[1].input for reply in (whole, streamed, after)], "pieces": "".join(pieces),
    "reasons": [reply.stop_reason for reply in (whole, streamed)],
}))
"""

RESPONSES = """
import json, sys
import openai

client = openai.OpenAI(base_url=f"{sys.argv[1]}/v1", api_key="key", max_retries=0)
whole = client.responses.create(model="tiny:manual", instructions="Be kind.", input="hello")
made = {"text": whole.output_text, "usage": whole.usage.to_dict(), "status": whole.status}
with client.responses.stream(model="tiny", input="hello") as stream:
    deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
    made["streamed"] = stream.get_final_response().output_text
made["deltas"] = deltas
made["counts"] = [whole.usage.input_tokens, whole.usage.total_tokens]
try:
    client.responses.create(model="tiny", input="hello", previous_response_id="resp_1")
except openai.BadRequestError as error:
    made["error"] = error.param
print(json.dumps(made))
"""

AGENTS = """
import asyncio, json, sys
import agents
from openai import AsyncOpenAI

client = AsyncOpenAI(base_url=f"{sys.argv[1]}/v1", api_key="key", max_retries=0)
asked = []


@agents.function_tool(strict_mode=False)
def size(of: str) -> str:
    "A size."
    asked.append(of)
    return "4 cm"


def agent(**more):
    model = agents.OpenAIResponsesModel(model="tiny", openai_client=client)
    return agents.Agent(name="a", instructions="Be kind.", model=model, **more)


async def main():
    run = await agents.Runner.run(agent(tools=[size], tool_use_behavior="stop_on_first_tool"), "how wide?")
    streamed = agents.Runner.run_streamed(agent(tools=[size], tool_use_behavior="stop_on_first_tool"), "how wide?")
    kinds = [event.type async for event in streamed.stream_events()]
    print(json.dumps({"outputs": [run.final_output, streamed.final_output], "asked": asked, "kinds": kinds}))


asyncio.run(main())
"""


def made(program: str, script: list[int], folder: Path) -> Any:
    """What a program that uses a client prints, which is given the root of a server that says `script`."""
    (folder / "manual.safetensors").write_text("five!")
    store = CartridgeStore(folder, FakeCartridge, compose=FakeCartridge.compose)
    engine = ScriptEngine(script, max_length=4000)
    with running(Server(engine, TOKENIZER, store, "tiny", api_key="key", rng=random.Random(0))) as root:
        command = [PYTHON, "-c", program, root]
        done = subprocess.run(command, env=os.environ | QUIET, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_anthropic_chats(tmp_path: Path):
    told = made(ANTHROPIC, SAID, tmp_path)
    for name in ("whole", "streamed"):
        assert told[name]["content"][0]["text"] == "Grüße!" and told[name]["stop_reason"] == "end_turn"
        assert told[name]["usage"]["output_tokens"] == len(SAID)
    assert told["text"] == "Grüße!" and told["whole"]["usage"]["cartridge_tokens"] == 5
    assert told["counted"] == len(b"u:hello\na:") and told["models"] == ["tiny", "tiny:manual"]
    kinds = [kind for kind, _ in told["errors"]]
    assert kinds == ["NotFoundError", "BadRequestError", "BadRequestError", "AuthenticationError"], told["errors"]


def test_anthropic_calls_tools(tmp_path: Path):
    told = made(ANTHROPIC_TOOLS, CALL, tmp_path)
    assert told["inputs"] == [{"of": "lid"}] * 3 and json.loads(told["pieces"]) == {"of": "lid"}
    assert told["reasons"] == ["tool_use"] * 2


def test_openai_responds(tmp_path: Path):
    told = made(RESPONSES, SAID, tmp_path)
    assert told["text"] == told["streamed"] == "".join(told["deltas"]) == "Grüße!" and len(told["deltas"]) > 3
    assert told["status"] == "completed" and told["usage"]["input_tokens_details"]["cartridge_tokens"] == 5
    assert told["error"] == "previous_response_id"


def test_openai_agents_call_tools(tmp_path: Path):
    told = made(AGENTS, CALL, tmp_path)
    assert told["outputs"] == ["4 cm"] * 2 and told["asked"] == ["lid"] * 2
    assert "raw_response_event" in told["kinds"]
