"""Asks a model which tools it wants to call, and calls them.

It is asked in plain text, in the form that Qwen and Hermes models were taught (<tool_call> around a JSON object), so
that any server will do. A model that was not taught this form mostly calls nothing.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import re
from collections.abc import Sequence
from typing import Any

from synth.clients.base import ChatMessages, Client
from synth.config import SamplingConfig, ToolsConfig
from synth.tools.base import Tool

MOST_CALLS = 4  # of one message

_PROMPT = """You are about to answer this message:

<message>
{message}
</message>

Do not answer yet. If one of these tools would help you, call it now; if none would, write: none.

<tools>
{tools}
</tools>

A call is a JSON object with the tool's name and its arguments:
<tool_call>
{{"name": "...", "arguments": {{...}}}}
</tool_call>"""

# The last call may be cut off before its closing tag.
_CALL = re.compile(r"<tool_call>\s*(.*?)\s*(?:</tool_call>|$)", re.DOTALL)


async def call_tools(
    client: Client,
    tools: Sequence[Tool],
    seen: ChatMessages,
    config: ToolsConfig,
    sampling: SamplingConfig,
    seed: int,
) -> list[dict[str, Any]]:
    """Asks for calls before the next message, makes them, and returns a record of each.

    A record has `name`, `input`, `output`, `success` and `raw_request`.
    """
    definitions = "\n".join(
        json.dumps({"name": t.name, "description": t.description, "parameters": t.parameters}, ensure_ascii=False)
        for t in tools
    )
    request = {"role": "user", "content": _PROMPT.format(message=seen[-1]["content"], tools=definitions)}
    thinking = None if sampling.thinking is None else 0.0
    short = dataclasses.replace(sampling, max_tokens=config.max_tokens, stop=(), thinking=thinking)
    said = await client.complete([*seen[:-1], request], short, seed)
    by_name = {tool.name: tool for tool in tools}
    requests = _CALL.findall(said.text)[:MOST_CALLS]
    return list(await asyncio.gather(*(_call(request, by_name, config.timeout_seconds) for request in requests)))


def as_context(calls: Sequence[dict[str, Any]]) -> str:
    """The calls that succeeded, as a text that stands in the context of both sides."""
    return "\n\n".join(
        f"<tool_call>\n<tool_input>{json.dumps(call['input'], ensure_ascii=False)}</tool_input>\n"
        f"<tool_output>\n{call['output']}\n</tool_output>\n</tool_call>"
        for call in calls
        if call["success"]
    )


async def _call(request: str, tools: dict[str, Tool], timeout: float) -> dict[str, Any]:
    """Makes one call. A failure is noted in the record alone, since a model that calls nonsense should stop no run."""
    record: dict[str, Any] = {"name": None, "input": None, "success": False, "raw_request": request}
    try:
        asked = json.loads(request)
        record |= {"name": asked["name"], "input": asked["arguments"]}
        async with asyncio.timeout(timeout):
            output = await tools[asked["name"]].call(asked["arguments"])
    except TimeoutError:
        return record | {"output": f"no answer in {timeout:g} s"}
    except (ValueError, KeyError, TypeError) as error:
        return record | {"output": f"{type(error).__name__}: {error}"}
    return record | {"output": output, "success": True}
