"""Tools: a real MCP server over stdio, BM25 against its formula, and what a model's calls leave behind."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import math
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stub_server import MODEL

from cartridges_jax.command_line.errors import UserError
from synth.clients.base import Completion
from synth.config import ClientConfig, McpConfig, ResourceConfig, SamplingConfig, SynthConfig, ToolsConfig
from synth.tools import toolbox
from synth.tools.base import Tool
from synth.tools.search import PASSAGE_CHARACTERS, Search, passages
from synth.tools.use import as_context, call_tools

SERVER = McpConfig(sys.executable, (str(Path(__file__).parent / "mcp_server.py"),), ("UNIT=ounces",))
TEXT = "The owl sleeps in the barn.\n\n" * 60 + "A fox weighs 42 grams.\n\n" + "The hen sleeps in the yard.\n\n" * 60


def with_tools(config: ToolsConfig, action: Callable[[Sequence[Tool]], Awaitable[Any]], text: str = TEXT) -> Any:
    async def run() -> Any:
        whole = SynthConfig("out", 1, ResourceConfig("x"), ClientConfig("http://x", MODEL), tools=config)
        async with toolbox.opened(whole, text) as opened:
            return await action(opened)

    return asyncio.run(run())


class Says:
    """A model that answers with `text`, and keeps what it was shown."""

    def __init__(self, text: str):
        self.text, self.seen = text, []

    async def complete(self, messages: Any, sampling: SamplingConfig, seed: int, top_logprobs: int = 0) -> Completion:
        self.seen, self.sampling = list(messages), sampling
        return Completion(self.text, None, None, "stop", 1, 1, 0)


def call(name: str, **arguments: Any) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


SEEN = [{"role": "system", "content": "s"}, {"role": "user", "content": "How heavy?"}]
SAMPLING = SamplingConfig(temperature=0.3, stop=("\n",), thinking=1.0)


def ask(model: Says, opened: Sequence[Tool], config: ToolsConfig) -> Any:
    return call_tools(model, opened, SEEN, config, SAMPLING, 1)  # type: ignore[arg-type]


def test_tools_of_an_mcp_server():
    """Of a real one, over stdio; and an error of the run leaves bare, not in a group of errors."""
    config = ToolsConfig(mcp=(SERVER,))
    said = "\n".join([call("weight", animal="fox", number=3), call("weight", animal="unicorn"), call("fly")])
    model = Says(said)
    calls: list[dict[str, Any]] = []

    async def action(opened: Sequence[Tool]) -> None:
        calls.extend(await ask(model, opened, config))
        calls.extend(await ask(Says(call("stall")), opened, dataclasses.replace(config, timeout_seconds=0.2)))
        raise OSError("the network is gone")

    with pytest.raises(OSError, match="the network is gone"):
        with_tools(config, action)
    assert calls[0] == {
        "name": "weight",
        "input": {"animal": "fox", "number": 3},
        "output": "3 fox weighs 21 ounces",
        "success": True,
        "raw_request": json.dumps({"name": "weight", "arguments": {"animal": "fox", "number": 3}}),
    }
    assert [c["success"] for c in calls] == [True, False, False, False]
    assert "weight" in calls[1]["output"] and "fly" in calls[2]["output"]
    assert calls[3]["output"] == "no answer in 0.2 s"
    assert model.seen[0] == {"role": "system", "content": "s"}
    asked = model.seen[-1]["content"]
    assert "How heavy?" in asked and "Says what an animal weighs." in asked and '"animal"' in asked
    assert (model.sampling.max_tokens, model.sampling.stop, model.sampling.thinking) == (128, (), 0.0)
    assert as_context(calls).count("<tool_output>") == 1 and "21 ounces" in as_context(calls)


@pytest.mark.parametrize(
    ("said", "outputs"),
    [
        ("none", 0),
        ('<tool_call>{"name": "search", "arguments": {"query": "fox"}}', 1),  # cut off
        ("<tool_call>no json</tool_call>", 1),
        ("<tool_call>[1]</tool_call>", 1),
        (call("search", query="fox") * 9, 4),
    ],
)
def test_whatever_a_model_says(said: str, outputs: int):
    config = ToolsConfig(search=True)
    calls = with_tools(config, lambda opened: ask(Says(said), opened, config))
    assert len(calls) == outputs
    assert all(set(c) == {"name", "input", "output", "success", "raw_request"} for c in calls)


@pytest.mark.parametrize(
    ("server", "problem"), [(McpConfig("/no/such/program"), "No such file"), (McpConfig("true"), "")]
)
def test_a_server_that_is_none(server: McpConfig, problem: str):
    with pytest.raises(UserError, match=f"'{server.command}' does not start as an MCP server: .*{problem}"):
        with_tools(ToolsConfig(mcp=(server,)), lambda _: asyncio.sleep(0))


def test_two_tools_of_one_name():
    with pytest.raises(UserError, match="more than one tool is called search, so"):
        with_tools(ToolsConfig(mcp=(SERVER,), search=True), lambda _: asyncio.sleep(0))
    with pytest.raises(UserError, match="expected NAME=value"):
        McpConfig("x", env=("UNIT",))


def search(query: Any, **arguments: Any) -> str:
    return asyncio.run(Search(TEXT).call({"query": query, **arguments}))


def test_search():
    assert "A fox weighs 42 grams." in search("How heavy is a FOX?", top_k=1)
    animals = Search("\n\n".join(f"{animal} " * 200 for animal in ("owl", "pig", "hen")))
    apart = asyncio.run(animals.call({"query": "hen owl"}))
    assert apart.index("owl") < apart.index("\n...\n") < apart.index("hen"), "in the order of the text"
    assert "pig" not in apart
    for query, more in ((7, {}), ("fox", {"top_k": 0}), ("fox", {"top_k": True}), ("zebra", {})):
        with pytest.raises(UserError, match=r"expected a text|no passage"):
            search(query, **more)


def test_ranking_is_bm25():
    """Against the formula, written out."""
    words = [["a"] * 400, ["a"] * 100 + ["b"] * 300, ["b"] * 50 + ["c"] * 300, ["c"] * 350]
    docs = [" ".join(doc) for doc in words]
    index = Search("\n\n".join(docs))
    assert index._passages == docs
    mean = sum(map(len, words)) / 4

    def score(word: str, doc: list[str]) -> float:
        having = sum(word in other for other in words)
        rarity = math.log(1 + (4 - having + 0.5) / (having + 0.5))
        n = doc.count(word)
        return rarity * n * 2.5 / (n + 1.5 * (0.25 + 0.75 * len(doc) / mean))

    for word in "abc":
        assert index._scores[word] == pytest.approx({i: score(word, d) for i, d in enumerate(words) if word in d})
    assert index.rank("b a") == [1, 0, 2]


@settings(deadline=None)
@given(st.text(alphabet="ab \n", max_size=4000))
def test_passages_lose_nothing(text: str):
    found = passages(text)
    assert "".join("".join(found).split()) == "".join(text.split())
    assert all(len(p) <= PASSAGE_CHARACTERS or " " not in p for p in found)
