"""Frameworks of others run a tool and a schema end to end against the server: `make test-clients`.

The model is scripted, since none that fits a test would do what these ask for. It reads the conversation as the chat
template renders it, and all else is the server's own.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from clients import NODE_MODULES, PYTHON  # pyrefly: ignore[missing-import] (pytest puts this folder on the path)
from running import running  # pyrefly: ignore[missing-import]
from test_server import FakeCartridge, ScriptEngine  # pyrefly: ignore[missing-import]

from cartridges_jax.serving.scheduler import Sampled, SequenceInput
from cartridges_jax.serving.server import Server
from cartridges_jax.serving.store import CartridgeStore

pytestmark = [pytest.mark.clients, pytest.mark.timeout(600)]
WEATHER = {"city": "Bern", "degrees": 21}
SAID = "It is 21 degrees in Bern."


def answer_to(prompt: str) -> str:
    """What the scripted model says: it asks for the weather, and tells it in the form that is asked for."""
    lines = [line for line in prompt.splitlines() if line.startswith('{"name"') and '"parameters"' in line]
    functions = {function["name"]: function["parameters"].get("properties", {}) for function in map(json.loads, lines)}
    last = prompt.rpartition("<|im_start|>user")[2]
    is_known = "<tool_response>" in prompt or "Observation:" in last  # as smolagents tells what a tool has said
    for name, properties in functions.items():
        if "degrees" in properties and (is_known or len(functions) == 1):
            return called(name, WEATHER)
        if "answer" in properties and is_known:
            return called(name, {"answer": SAID})
    if functions and not is_known:
        return called(next(name for name, properties in functions.items() if "city" in properties), {"city": "Bern"})
    if is_known:
        return SAID
    return '{"answer": "21"}' if "`answer`" in prompt else json.dumps(WEATHER)


def called(name: str, arguments: dict[str, Any]) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


class TalkingEngine(ScriptEngine):
    """Says what `answer_to` says to its prompt; where a grammar forbids it, the test fails."""

    def __init__(self) -> None:
        super().__init__([0], max_num_seqs=2, max_length=40_000)
        self.tokenizer = tiny.model().tokenizer
        self.answers: dict[int, list[int]] = {}

    def _sample(self, sequence: SequenceInput, mask: np.ndarray | None = None) -> Sampled:
        if sequence.step == 0:
            ids = self._read(sequence.block_table, sequence.position)
            answer = answer_to(self.tokenizer.decode(ids, skip_special_tokens=False))
            self.answers[sequence.index] = [*self.tokenizer.encode(answer), *self.tokenizer.encode(tiny.END)]
        answer = self.answers[sequence.index]
        token = answer[min(sequence.step, len(answer) - 1)]  # a step is under way when the end is read
        assert mask is None or mask[token // 32] >> token % 32 & 1, "the grammar forbids the answer"
        self.sequences[sequence.index] = replace(self.sequences[sequence.index], token=token)
        return Sampled(token, -0.1)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    store = CartridgeStore(tmp_path_factory.mktemp("cartridges"), FakeCartridge)
    with running(Server(TalkingEngine(), tiny.model().tokenizer, store, "tiny")) as root:
        yield f"{root}/v1"


START = """
import asyncio, json, os, sys
from pydantic import BaseModel
url = sys.argv[1]
os.environ |= {"OPENAI_API_KEY": "none", "OPENAI_BASE_URL": url}
class Weather(BaseModel):
    city: str
    degrees: int
asked = []
def get_weather(city: str) -> str:
    "Tells the weather of a city."
    asked.append(city)
    return f"{city}: 21 degrees"
"""
PROGRAMS = {
    "openai": """
import openai
client, ask = openai.OpenAI(), [{"role": "user", "content": "Bern?"}]
schema = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
tool = {"type": "function", "function": {"name": "get_weather", "parameters": schema}}
with client.chat.completions.stream(model="tiny", messages=ask, tools=[tool]) as stream:
    message = stream.get_final_completion().choices[0].message
call = message.tool_calls[0]
result = get_weather(**json.loads(call.function.arguments))
answer = message.model_dump(include={"role", "content", "tool_calls"})
turns = [*ask, answer, {"role": "tool", "tool_call_id": call.id, "content": result}]
said = client.chat.completions.create(model="tiny", messages=turns, tools=[tool]).choices[0].message.content
parsed = client.chat.completions.parse(model="tiny", messages=ask, response_format=Weather)
form = parsed.choices[0].message.parsed.model_dump()
""",
    "langchain_openai": """
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
model, ask = ChatOpenAI(model="tiny"), [HumanMessage("Bern?")]
bound = model.bind_tools([tool(get_weather)])
message = bound.invoke(ask)
call = message.tool_calls[0]
said = bound.invoke([*ask, message, ToolMessage(get_weather(**call["args"]), tool_call_id=call["id"])]).content
form = model.with_structured_output(Weather, method="json_schema").invoke(ask).model_dump()
again = model.with_structured_output(Weather, method="function_calling").invoke(ask).model_dump()
assert form == again
""",
    "pydantic_ai": """
from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel
model = OpenAIChatModel("tiny")
said = Agent(model, tools=[get_weather]).run_sync("Bern?").output
form = Agent(model, tools=[get_weather], output_type=Weather).run_sync("Bern?").output.model_dump()
""",
    "instructor": """
import instructor, openai
ask = dict(model="tiny", messages=[{"role": "user", "content": "Bern?"}], response_model=Weather)
modes = instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA
clients = [instructor.from_openai(openai.OpenAI(), mode=mode) for mode in modes]
form, again = (client.chat.completions.create(**ask).model_dump() for client in clients)
assert form == again
asked, said = ["Bern"], None
""",
    "agents": """
import openai
from agents import Agent, OpenAIChatCompletionsModel, Runner, function_tool, set_tracing_disabled
set_tracing_disabled(True)
model = OpenAIChatCompletionsModel("tiny", openai.AsyncOpenAI())
told = function_tool(get_weather)
said = Runner.run_sync(Agent("weather", model=model, tools=[told]), "Bern?").final_output
form = Runner.run_sync(Agent("form", model=model, output_type=Weather), "Bern?").final_output.model_dump()
""",
    "smolagents": """
from smolagents import OpenAIServerModel, ToolCallingAgent, tool
@tool
def weather(city: str) -> str:
    \"\"\"Tells the weather of a city.

    Args:
        city: its name
    \"\"\"
    return get_weather(city)
model = OpenAIServerModel("tiny", api_base=url, api_key="none")
said = ToolCallingAgent([weather], model, verbosity_level=0).run("Bern?")
form = None
""",
    "dspy": """
import dspy
model = dspy.LM("openai/tiny", api_base=url, api_key="none", cache=False)
with dspy.context(lm=model, adapter=dspy.JSONAdapter()):
    assert dspy.Predict("question -> answer")(question="Bern?").answer == "21"
asked, said, form = ["Bern"], None, None
""",
}
NODE = """
import { generateObject, generateText, stepCountIs, tool } from "ai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { z } from "zod";
const provider = createOpenAICompatible({ name: "here", baseURL: process.argv[2], supportsStructuredOutputs: true });
const model = provider("tiny"), asked = [];
const get_weather = tool({
  description: "Tells the weather of a city.", inputSchema: z.object({ city: z.string() }),
  execute: async ({ city }) => { asked.push(city); return `${city}: 21 degrees`; },
});
const { text: said } = await generateText({ model, prompt: "Bern?", tools: { get_weather }, stopWhen: stepCountIs(3) });
const schema = z.object({ city: z.string(), degrees: z.number().int() });
const { object: form } = await generateObject({ model, prompt: "Bern?", schema });
console.log(JSON.stringify({ asked, said, form }));
"""


@pytest.mark.parametrize("client", PROGRAMS)
def test_python_clients(client: str, url: str, tmp_path: Path):
    if subprocess.run([PYTHON, "-c", f"import {client}"], capture_output=True).returncode:
        pytest.skip(f"{client} is not installed there")
    program = tmp_path / "ask.py"  # some read their tools' source
    program.write_text(START + PROGRAMS[client] + "\nprint(json.dumps(dict(asked=asked, said=said, form=form)))\n")
    check([str(PYTHON), str(program), url])


def test_the_ai_sdk(url: str, tmp_path: Path):
    if not NODE_MODULES.is_dir():
        pytest.skip("the AI SDK is not installed: make test-clients, where node is")
    (tmp_path / "node_modules").symlink_to(NODE_MODULES)
    (tmp_path / "ask.mjs").write_text(NODE)
    check(["node", str(tmp_path / "ask.mjs"), url])


def check(command: list[str]) -> None:
    quiet = {"NO_PROXY": "127.0.0.1", "LITELLM_LOCAL_MODEL_COST_MAP": "True", "DO_NOT_TRACK": "1"}
    done = subprocess.run(command, env=os.environ | quiet, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert set(told["asked"]) == {"Bern"} and told["said"] in (SAID, None) and told["form"] in (WEATHER, None)
