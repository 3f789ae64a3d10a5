"""Tools: what a request says about them, how they are told to a model, and how its calls are read from its text.

A chat template decides how a model writes its calls: Qwen and Hermes between `<tool_call>` and `</tool_call>`, Llama 3
as an answer that is JSON, Mistral behind `[TOOL_CALLS]`. Models whose template knows no tools are told in words, and
asked to write calls as Hermes does. Where a call is required, a grammar leads the answer.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from cartridges_jax.models.tokenizer import Tokenizer
from cartridges_jax.serving.grammar import JSON_OPTIONS, Grammar
from cartridges_jax.serving.protocol import ApiError, Fields, from_json, object_of, refuse, text

MAX_TOOLS = 128
MAX_CALLS = 16  # that a grammar allows in one answer
NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}")


@dataclass(frozen=True)
class ToolFormat:
    """How a family of models writes calls.

    Attributes:
      begin: what stands before calls; "" if an answer that begins with `{` is a call.
      end: what stands behind each call; "" if nothing does.
      arguments: the name of a call's arguments.
      before, between, behind: what a grammar writes around calls and between them; `begin` comes first.
      is_named: whether a call is its name, and behind it the arguments, instead of an object of both.
    """

    begin: str
    end: str
    arguments: str
    before: str = ""
    between: str = ""
    behind: str = ""
    is_named: bool = False


HERMES = ToolFormat("<tool_call>", "</tool_call>", "arguments", before="\n", between="\n", behind="\n")
LLAMA = ToolFormat("", "", "parameters", between="; ")
MISTRAL = ToolFormat("[TOOL_CALLS]", "", "arguments", before="[", between=", ", behind="]")
MISTRAL_NAMED = ToolFormat("[TOOL_CALLS]", "", "arguments", is_named=True)
PYTHON_TAG = "<|python_tag|>"  # Llama 3 may write it before a call
ARGS = "[ARGS]"


@dataclass(frozen=True)
class Tools:
    """What may be called, and whether something must be: `choice` is auto, required, or the name of the only one."""

    functions: tuple[dict[str, Any], ...]
    choice: str = "auto"
    parallel: bool = True
    strict: bool = False  # whether arguments keep to their schema also where nothing has to be called

    @property
    def callable(self) -> tuple[dict[str, Any], ...]:
        only = [function for function in self.functions if function["name"] == self.choice]
        return tuple(only) or self.functions


def read_tools(name: str, values: object) -> tuple[dict[str, Any], ...]:
    """OpenAI's `[{"type": "function", "function": {"name", "description", "parameters"}}]`: the functions."""
    if not isinstance(values, list) or len(values) > MAX_TOOLS:
        refuse(name, values, f"a list of at most {MAX_TOOLS} tools")
    functions = tuple(_read_tool(f"{name}[{i}]", value) for i, value in enumerate(values))
    names = [function["name"] for function in functions]
    if len(set(names)) < len(names):
        refuse(name, names, "functions of different names")
    return functions


def _read_tool(where: str, value: object) -> dict[str, Any]:
    tool = Fields(value, where)
    if tool.get("type", "function") != "function":
        refuse(f"{where}.type", tool.get("type"), "function")
    function = Fields(tool.get("function"), f"{where}.function")
    name = text(f"{where}.function.name", function.get("name"))
    if not NAME.fullmatch(name):
        refuse(f"{where}.function.name", name, "1 to 64 letters, digits, _, . and -")
    parameters = Fields(function.get("parameters", {}), f"{where}.function.parameters").values
    description = text(f"{where}.function.description", function.get("description", ""))
    parameters = parameters or {"type": "object", "properties": {}}
    strict = {"strict": True} if function.flag("strict") else {}
    return {"name": name, "description": description, "parameters": parameters} | strict


def read_tool_choice(name: str, value: object) -> str:
    """`none`, `auto`, `required`, or the name of a function, behind a `function:`."""
    if isinstance(value, str):
        return value if value in ("none", "auto", "required") else refuse(name, value, "none, auto or required")
    choice = Fields(value, name)
    if choice.get("type") != "function":
        refuse(f"{name}.type", choice.get("type"), "function")
    return "function:" + text(f"{name}.function.name", Fields(choice.get("function"), f"{name}.function").get("name"))


def chosen(fields: dict[str, Any]) -> Tools | None:
    """The tools of a request, if something may be called. Raises: ApiError."""
    functions, choice = fields["tools"], fields["tool_choice"]
    if choice == "none" or (choice in (None, "auto") and not functions):  # as clients say it that have no tools now
        return None
    choice = choice or "auto"
    if not functions:
        refuse("tool_choice", choice, "tools to choose from")
    only = choice.removeprefix("function:")
    if only != choice and only not in [function["name"] for function in functions]:
        refuse("tool_choice", only, f"one of {', '.join(function['name'] for function in functions)}")
    strict = any("strict" in function for function in functions)
    return Tools(functions, only, fields["parallel_tool_calls"] and only == choice, strict)


def format_of(tokenizer: Tokenizer) -> ToolFormat:
    """How the model of a tokenizer writes calls, as its chat template shows."""
    template = str(tokenizer.settings["chat_template"])
    if "[TOOL_CALLS]" in template:
        return MISTRAL_NAMED if ARGS in template else MISTRAL
    if knows_tools(tokenizer) and "<tool_call>" not in template and '"parameters"' in template:
        return LLAMA
    return HERMES


def knows_tools(tokenizer: Tokenizer) -> bool:
    return "tools" in tokenizer.template_variables


def template_tools(tools: Tools) -> list[dict[str, Any]]:
    return [{"type": "function", "function": function} for function in tools.functions]


def in_words(messages: Sequence[dict[str, Any]], tools: Tools | None) -> list[dict[str, Any]]:
    """A conversation for a template that knows no tools: they are told in its system message, calls in texts."""
    told = [_call_in_words(message) for message in messages]
    if tools is None:
        return told
    listed = "\n".join(json.dumps(function) for function in tools.functions)
    words = (
        f"You can call functions. These are there, as JSON:\n{listed}\nTo call one, write\n"
        '<tool_call>\n{"name": "the function", "arguments": {"a parameter": "its value"}}\n</tool_call>'
    )
    if told and told[0]["role"] == "system":
        return [told[0] | {"content": f"{told[0]['content']}\n\n{words}"}, *told[1:]]
    return [{"role": "system", "content": words}, *told]


def _call_in_words(message: dict[str, Any]) -> dict[str, Any]:
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}
    calls = [f"<tool_call>\n{json.dumps(call['function'])}\n</tool_call>" for call in message.get("tool_calls", ())]
    return {"role": message["role"], "content": "\n".join([message["content"]][: bool(message["content"])] + calls)}


def grammar_of(tools: Tools, tokenizer: Tokenizer, answer: Grammar | None) -> Grammar | None:
    """The grammar of what is written where tools may be called; None if that may be anything.

    Calls that are required are all there is. Otherwise there is the answer that is asked for instead of them, or any
    text between them.
    """
    if answer is not None and answer.form != "json":
        refuse(answer.param, answer.text, "a JSON schema, where tools may be called instead")
    form = format_of(tokenizer)
    is_between = tools.choice == "auto" and answer is None
    alone = is_between and (form.is_named or bool(form.end))  # then texts may be between calls, too
    calls, rules = _calls_of(replace(tools, parallel=False) if alone else tools, form, tokenizer)
    if tools.choice != "auto":
        start = calls
    elif answer is not None:
        start = f"({calls}) | answer"
        rules.append(f"answer: %json {_with_options(answer.text, answer.param)}")
    elif tools.strict:
        start = _between_texts(calls, rules, form, tokenizer, "*" if tools.parallel and alone else "?")
    else:
        return None
    return Grammar("grammar", "\n".join([f"start: {start}", *rules]) + "\n", "tools")


def _calls_of(tools: Tools, form: ToolFormat, tokenizer: Tokenizer) -> tuple[str, list[str]]:
    """One call, or several if they may be parallel, as the right side of a rule, and the rules that it needs."""
    functions = tools.callable
    rules = [_rule(f"call_{i}", form, function, tokenizer) for i, function in enumerate(functions)]
    any_call = " | ".join(f"call_{i}" for i in range(len(functions)))
    begin, end = (_marker(text, tokenizer) for text in (form.begin, form.end))
    before, between, behind = map(_literal, (form.before, form.between, form.behind))
    more = f" ({between} call){{0,{MAX_CALLS - 1}}}" if tools.parallel and form is not LLAMA else ""
    if form.is_named or form.end:
        return f"call{more}", [*rules, f"call: {begin} {before} ({any_call}) {behind} {end}"]
    return f"{begin} {before} call{more} {behind}", [*rules, f"call: {any_call}"]


def _between_texts(calls: str, rules: list[str], form: ToolFormat, tokenizer: Tokenizer, how_often: str) -> str:
    """Calls with any text before and behind them; it adds the rules that this needs."""
    if not form.begin:  # an answer is a call from its first character on, or it is none
        rules.append(r"TEXT: /([^{](.|\n)*)?/")
        return f"({calls}) | TEXT"
    begin = _literal(form.begin)
    rules.append(r"TEXT: /(.|\n)*/")
    if _marker(form.begin, tokenizer) != begin:  # text cannot hold it
        rules.append(f"called: TEXT {calls}")
    else:  # text ends as soon as it does
        rules[:] = [rule.replace(f"call: {begin}", "call:") for rule in rules]
        rules += [f"trigger[lazy]: TEXT {begin}", f"called: trigger {calls.removeprefix(begin)}"]
    return f"called{how_often} TEXT"


def _rule(name: str, form: ToolFormat, function: dict[str, Any], tokenizer: Tokenizer) -> str:
    schema = _with_options(function["parameters"], "tools")
    if form.is_named:
        return f"{name}: {_literal(function['name'])} {_marker(ARGS, tokenizer)} %json {schema}"
    head = f'{{"name": {json.dumps(function["name"])}, "{form.arguments}": '
    return f'{name}: {_literal(head)} %json {schema} "}}"'


def _with_options(schema: Any, param: str) -> str:
    """A JSON schema as text, with how `llguidance` is to take it."""
    try:
        schema = from_json(schema) if isinstance(schema, str) else schema
        return json.dumps({**schema, "x-guidance": JSON_OPTIONS}, allow_nan=False)
    except (ValueError, TypeError, RecursionError):
        raise ApiError(400, f"{param} holds what is no JSON schema", param, "invalid_grammar") from None


def _marker(written: str, tokenizer: Tokenizer) -> str:
    """A marker's own token, if there is one, or else its text."""
    ids = tokenizer.encode(written)
    return f"<[{ids[0]}]>" if len(ids) == 1 else _literal(written)


def _literal(written: str) -> str:
    return json.dumps(written) if written else ""


Call = dict[str, Any]  # a part of a call, as OpenAI's chunks have it


class CallParser:
    """Reads calls from a text that comes in pieces: what is said beside them, and parts of calls as they are complete.

    What looks like a call and is none is text. What follows the only call, if they are not `parallel`, is nothing.
    """

    def __init__(self, form: ToolFormat, names: Sequence[str], parallel: bool = True):
        self._form, self._names, self._parallel = form, names, parallel
        self._state: Literal["text", "calls", "arguments", "closing"] = "text"
        self._readers = {
            "text": self._text,
            "calls": self._calls,
            "arguments": self._arguments,
            "closing": self._closing,
        }
        self._held = ""
        self._scan, self._scanned = _ValueScan(), 0  # of an object in the held text, and how far
        self._said = False
        self.count = 0

    @property
    def is_done(self) -> bool:
        """Whether the only call that there may be is complete."""
        return not self._parallel and self.count > 0 and self._state not in ("arguments", "closing")

    def push(self, piece: str) -> tuple[str, list[Call]]:
        """Takes the next piece; gives the text and the calls' parts that are certain now."""
        self._held += piece
        said, calls = "", []
        while True:
            before = self._state, self._held
            said += self._readers[self._state](calls)
            if self.is_done or (self._state, self._held) == before:
                self._said |= bool(said.strip())
                return said, calls

    def flush(self) -> str:
        """The text that was held back, at the end of the answer."""
        held, self._held = self._held, ""
        if self.count or (self._state == "calls" and not held.strip(" \n];,")):
            return ""  # the beginning of another call, which was cut
        return held

    def _text(self, _: list[Call]) -> str:
        begin = self._form.begin
        if not begin:
            return self._maybe_call()
        at = self._held.find(begin)
        if at >= 0:
            said, self._held, self._state = self._held[:at].rstrip(), self._held[at + len(begin) :], "calls"
            return said
        # its end may be the beginning of a call, and space before one is not said
        longest = max((i for i in range(len(begin)) if self._held.endswith(begin[:i])), default=0)
        certain = self._held[: len(self._held) - longest].rstrip()
        self._held = self._held[len(certain) :]
        return certain

    def _maybe_call(self) -> str:
        """An answer that begins with an object may be a call."""
        start = self._held.lstrip()
        if not self._said and (start.startswith(PYTHON_TAG) or PYTHON_TAG.startswith(start)):
            if start.startswith(PYTHON_TAG):
                self._held, self._state = start.removeprefix(PYTHON_TAG), "calls"
            return ""
        if not self._said and start.startswith("{"):
            self._state = "calls"
            return ""
        said, self._held = self._held, ""
        return said

    def _calls(self, calls: list[Call]) -> str:
        held = self._held.lstrip(" \n" if self._form.is_named else " \n,;[]")
        if self._form.end and held.startswith(self._form.end):
            self._held, self._state = held.removeprefix(self._form.end), "text"
            return ""
        if self._form.is_named and self._form.begin.startswith(held[: len(self._form.begin)]):
            if held.startswith(self._form.begin):
                self._held = held.removeprefix(self._form.begin)
            return ""
        if not held or (self._form.end and self._form.end.startswith(held)):
            return ""
        head = self._head(held)
        if head is not None:
            name, rest = head
            self._open(name, calls)
            self._held, self._state = rest, "arguments"
            self._scan, self._scanned = _ValueScan(), 0
            return ""
        return self._whole(held, calls)

    def _head(self, held: str) -> tuple[str, str] | None:
        """The name of a call and what follows it, once the arguments have begun."""
        if self._form.is_named:
            found = re.match(r"([a-zA-Z0-9_.-]+)(?:\[CALL_ID\][a-zA-Z0-9]+)?(?:\[ARGS\])?\s*(?=\{)", held)
        else:
            found = re.match(r'\{\s*"name"\s*:\s*"([^"\\]*)"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)', held)
        if found is None or found[1] not in self._names:
            return None
        return found[1], held[found.end() :]

    def _whole(self, held: str, calls: list[Call]) -> str:
        """A call whose parts come in another order, or what turns out to be none."""
        if held.startswith("{"):
            read, self._scanned = self._scanned, len(held)
            end = self._scan.push(held[read:])
            if end is None:
                return ""  # not complete yet
            self._scan, self._scanned = _ValueScan(), 0
            made = object_of(held[: read + end])
            arguments = made.get("arguments") or made.get("parameters") or {}
            if made.get("name") in self._names and isinstance(arguments, dict):
                self._open(made["name"], calls)
                calls.append({"index": self.count - 1, "function": {"arguments": json.dumps(arguments)}})
                self._held = held[read + end :]
                return ""
        elif self._form.is_named and "{" not in held and len(held) < 100:
            return ""  # a name, so far
        said = (self._form.begin if self._form.end else "") + self._held
        self._held, self._state, self._said = "", "text", True
        return said

    def _open(self, name: str, calls: list[Call]) -> None:
        id = uuid.uuid4().hex[:9]  # Mistral's templates insist on 9 letters and digits
        calls.append({"index": self.count, "id": id, "type": "function", "function": {"name": name, "arguments": ""}})
        self.count += 1

    def _arguments(self, calls: list[Call]) -> str:
        if not self._held:
            return ""
        end = self._scan.push(self._held)
        part = self._held if end is None else self._held[:end]
        calls.append({"index": self.count - 1, "function": {"arguments": part}})
        self._held = self._held[len(part) :]
        if end is not None:
            self._state = "calls" if self._form.is_named else "closing"
        return ""

    def _closing(self, _: list[Call]) -> str:
        """The end of the object that a call is."""
        held = self._held.lstrip()
        if held:
            self._held, self._state = held.removeprefix("}"), "calls"
        return ""


class _ValueScan:
    """Finds the end of a JSON object that comes in pieces."""

    def __init__(self) -> None:
        self._depth, self._in_string, self._escaped = 0, False, False

    def push(self, piece: str) -> int | None:
        """Where in the piece the object has ended, if it has."""
        for at, character in enumerate(piece, start=1):
            if self._in_string:
                self._in_string = self._escaped or character != '"'
                self._escaped = not self._escaped and character == "\\"
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth == 0:
                    return at
        return None


def joined(parts: Sequence[Call]) -> list[Call]:
    """One part for each call: whole calls, if these are all parts."""
    calls: dict[int, Call] = {}
    for part in parts:
        if part["index"] in calls:
            calls[part["index"]]["function"]["arguments"] += part["function"]["arguments"]
        else:
            calls[part["index"]] = part | {"function": dict(part["function"])}
    return list(calls.values())
