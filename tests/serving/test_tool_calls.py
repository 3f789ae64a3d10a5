"""Calls of tools: read from any pieces of a text, and written by a grammar whatever the model would rather say."""

from __future__ import annotations

import json
import random
import time
from typing import Any, cast

import jsonschema
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from cartridges_jax.models.tokenizer import Tokenizer
from cartridges_jax.serving.grammar import Grammar, GrammarCompiler, read_grammar, read_response_format, without
from cartridges_jax.serving.protocol import ApiError
from cartridges_jax.serving.tools import (
    HERMES,
    LLAMA,
    MISTRAL,
    MISTRAL_NAMED,
    CallParser,
    ToolFormat,
    Tools,
    format_of,
    grammar_of,
    joined,
)

WEATHER = {
    "name": "get_weather",
    "description": "The weather.",
    "parameters": {
        "type": "object",
        "properties": {
            "city": {"type": "string", "maxLength": 8},
            "days": {"type": "integer", "minimum": 1, "maximum": 9},
        },
        "required": ["city"],
        "additionalProperties": False,
    },
}
CLOCK = {
    "name": "clock",
    "description": "",
    "parameters": {"type": "object", "properties": {}, "additionalProperties": False},
}
NAMES = ["get_weather", "clock"]
CLOCK_CALL = '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>\n'
ARGUMENTS = '{"city": "Bern {\\"}\\" é", "days": 3}'
FORMATS = {"hermes": HERMES, "llama": LLAMA, "mistral": MISTRAL, "mistral named": MISTRAL_NAMED}
TEMPLATES = {
    "hermes": tiny.TEMPLATE + "{% if tools %}<tool_call>{% endif %}",
    "llama": tiny.TEMPLATE + '{% if tools %}"parameters"{% endif %}',
    "mistral": tiny.TEMPLATE + "{% if tools %}[TOOL_CALLS]{% endif %}",
    "mistral named": tiny.TEMPLATE + "{% if tools %}[TOOL_CALLS][ARGS]{% endif %}",
}
TEXTS = {
    HERMES: [
        ('Let me see.\n<tool_call>\n{"name": "get_weather", "arguments": %s}\n</tool_call>\n', "Let me see.", 1),
        ('<tool_call>{"arguments": %s, "name": "get_weather"}</tool_call>', "", 1),
        (
            CLOCK_CALL + '<tool_call>\n{"name": "get_weather", "arguments": %s}\n</tool_call>',
            "",
            2,
        ),
    ],
    LLAMA: [
        ('{"name": "get_weather", "parameters": %s}', "", 1),
        ('<|python_tag|>{"type": "function", "name": "get_weather", "parameters": %s}', "", 1),
        ('{"name": "clock", "parameters": {}}; {"name": "get_weather", "parameters": %s}', "", 2),
    ],
    MISTRAL: [
        ('[TOOL_CALLS] [{"name": "get_weather", "arguments": %s}]', "", 1),
        ('Yes. [TOOL_CALLS][{"name": "clock", "arguments": {}}, {"name": "get_weather", "arguments": %s}]', "Yes.", 2),
    ],
    MISTRAL_NAMED: [
        ("[TOOL_CALLS]get_weather[ARGS]%s", "", 1),
        ("[TOOL_CALLS]clock[CALL_ID]a1b2[ARGS]{}[TOOL_CALLS]get_weather[ARGS]%s", "", 2),
    ],
}
NO_CALLS = [
    (HERMES, "a < b and <tool> is no call"),
    (HERMES, "<tool_call>never mind"),
    (HERMES, '<tool_call>{"name": "unknown", "arguments": {}}'),
    (LLAMA, '{"a": 1}'),
    (LLAMA, '{"name": "unknown", "parameters": {}}'),
    (LLAMA, 'Say {"name": "clock", "parameters": {}}'),
    (MISTRAL, "nothing to call"),
]


def parsed(form: ToolFormat, pieces: list[str]) -> tuple[str, list[Any]]:
    parser, said, parts = CallParser(form, NAMES), "", []
    for piece in pieces:
        text, calls = parser.push(piece)
        said, parts = said + text, parts + calls
    return said + parser.flush(), joined(parts)


def split(text: str, rng: random.Random) -> list[str]:
    cuts = sorted(rng.randrange(len(text)) for _ in range(rng.randrange(9)))
    return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]


@settings(max_examples=150, deadline=None)
@given(st.sampled_from([(form, *case) for form, cases in TEXTS.items() for case in cases]), st.integers(0, 9999))
def test_calls_are_read_from_any_pieces(case: Any, seed: int):
    form, template, said, count = case
    for pieces in (split(template % ARGUMENTS, random.Random(seed)), list(template % ARGUMENTS)):
        text, calls = parsed(form, pieces)
        assert text == said and [call["function"]["name"] for call in calls] == ["clock", "get_weather"][-count:]
        assert json.loads(calls[-1]["function"]["arguments"]) == json.loads(ARGUMENTS)
        assert len({call["id"] for call in calls}) == count and all(len(call["id"]) == 9 for call in calls)


@pytest.mark.parametrize(("form", "text"), NO_CALLS)
def test_what_is_no_call_is_said(form: ToolFormat, text: str):
    for seed in range(20):
        said, calls = parsed(form, split(text, random.Random(seed)))
        assert said == text and not calls


def test_arguments_arrive_as_they_are_written():
    parser, parts = CallParser(HERMES, NAMES), []
    for character in '<tool_call>\n{"name": "get_weather", "arguments": ' + ARGUMENTS:
        parts += parser.push(character)[1]
    assert len(parts) > 10 and parts[0]["function"] == {"name": "get_weather", "arguments": ""}


def tokenizer(name: str, added: bool) -> Tokenizer:
    """The tiny model's, with a template of another family, and with its markers as tokens or without them."""
    backend = type(tiny.model().tokenizer._backend).from_str(tiny.model().tokenizer._backend.to_str())
    if added:
        markers = {"hermes": ["<tool_call>", "</tool_call>"], "llama": ["<|python_tag|>"]}
        backend.add_special_tokens(
            [AddedToken(t, normalized=False) for t in markers.get(name, ["[TOOL_CALLS]", "[ARGS]"])]
        )
    wrapped = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=tiny.END, chat_template=TEMPLATES[name])
    return Tokenizer(wrapped, tiny.model().tokenizer.stop_ids)


def random_answer(made: Tokenizer, grammar: Grammar, seed: int, most: int = 600) -> str | None:
    """What a model that knows nothing writes; None if it has not come to an end."""
    rng, constraint, ids = random.Random(seed), GrammarCompiler(made).constraint(grammar)(), cast(list[int], [])
    for _ in range(most):
        allowed = np.flatnonzero(np.unpackbits(constraint.mask().view(np.uint8), bitorder="little"))
        token = int(rng.choice(list(allowed)))
        if token in made.stop_ids:
            return made.decode(ids, skip_special_tokens=False)
        ids.append(token)
        constraint.take(token)
    return None


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_required_calls_are_valid_whoever_writes_them(name: str, added: bool):
    made, ended = tokenizer(name, added), 0
    assert format_of(made) is FORMATS[name]
    for choice, parallel in (("required", False), ("required", True), ("clock", False), ("get_weather", False)):
        grammar = grammar_of(Tools((WEATHER, CLOCK), choice, parallel), made, None)
        assert grammar is not None
        for seed in range(6):
            if (answer := random_answer(made, grammar, seed)) is None:
                continue
            ended += 1
            said, calls = parsed(FORMATS[name], [answer])
            assert not said and calls and (parallel or len(calls) == 1)
            for call in calls:
                function = {"get_weather": WEATHER, "clock": CLOCK}[call["function"]["name"]]
                jsonschema.validate(json.loads(call["function"]["arguments"]), function["parameters"])
                assert choice in ("required", function["name"])
    assert ended > 15


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_strict_calls_are_valid_between_any_texts(name: str, added: bool):
    made, strict = tokenizer(name, added), Tools((WEATHER, CLOCK), "auto", True, strict=True)
    grammar = grammar_of(strict, made, None)
    assert grammar is not None and grammar_of(Tools((WEATHER,)), made, None) is None
    matcher = GrammarCompiler(made).constraint(grammar)()
    call = {"hermes": TEXTS[HERMES][0][0], "llama": TEXTS[LLAMA][0][0], "mistral": TEXTS[MISTRAL][0][0]}
    text = call.get(name, TEXTS[MISTRAL_NAMED][0][0]).replace("] [", "][") % '{"city": "Bern", "days": 3}'
    for token in made.encode(text):
        assert matcher.mask()[token // 32] >> token % 32 & 1, made.token_bytes(token)
        matcher.take(token)
    assert any(matcher.mask()[stop // 32] >> stop % 32 & 1 for stop in made.stop_ids)
    broken = GrammarCompiler(made).constraint(grammar)()
    for token in made.encode(text.replace("3", "x")):
        if not broken.mask()[token // 32] >> token % 32 & 1:
            return
        broken.take(token)
    raise AssertionError("arguments that the schema forbids were let through")


SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "string", "maxLength": 4}, "b": {"enum": ["x", 1, None]}, "c": {"type": "boolean"}},
    "required": ["a", "b"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("seed", range(8))
def test_a_model_that_knows_nothing_keeps_to_a_form(seed: int):
    made = tiny.model().tokenizer
    answer = random_answer(made, read_grammar("json", "f", SCHEMA), seed)
    assert answer is not None
    jsonschema.validate(json.loads(answer), SCHEMA)
    assert random_answer(made, read_grammar("choice", "f", ["yes", "no"]), seed) in ("yes", "no")
    assert (random_answer(made, read_grammar("regex", "f", "[ab]{3}"), seed) or "").strip("ab") == ""
    assert random_answer(made, read_grammar("grammar", "f", 'root ::= "<" [0-9]{2} ">"'), seed) is not None
    left = random_answer(made, without(("e", "cat", "\n")), seed, 3000)
    assert left is None or not any(word in left for word in ("e", "cat", "\n"))


@pytest.mark.parametrize("pattern", ["(a{1000}){1000}", "a{1000000}b", "(a?){3000}a{3000}"])
def test_a_grammar_that_never_ends_ends_its_answer_and_holds_up_nobody(pattern: str):
    made = tiny.model().tokenizer
    start = time.process_time()
    answer = random_answer(made, read_grammar("regex", "f", pattern), 0, 20)
    assert time.process_time() - start < 3 and (answer is None or not answer.strip("a"))


@pytest.mark.parametrize(
    ("form", "value"),
    [("json", {"type": "nonsense"}), ("json", "{"), ("regex", "(("), ("grammar", "no grammar"), ("choice", [])],
)
def test_what_is_no_grammar_is_refused(form: str, value: Any):
    with pytest.raises(ApiError) as refused:
        GrammarCompiler(tiny.model().tokenizer).constraint(read_grammar(form, "field", value))
    assert refused.value.status == 400 and refused.value.param == "field"


@pytest.mark.parametrize("form", FORMATS.values())
def test_a_call_that_is_cut_leaves_nothing_behind(form: ToolFormat):
    text = next(text for text, _, count in TEXTS[form] if count == 2) % ARGUMENTS
    whole, _ = parsed(form, [text])
    for end in range(len(text)):
        said, calls = parsed(form, [text[:end]])
        assert whole.startswith(said) or not calls


@pytest.mark.parametrize("form", FORMATS.values())
def test_the_only_call_is_the_last_word(form: ToolFormat):
    text = next(text for text, _, count in TEXTS[form] if count == 2) % ARGUMENTS
    parser, calls = CallParser(form, NAMES, parallel=False), []
    for character in text:
        calls += parser.push(character)[1]
        if parser.is_done:
            break
    assert len(joined(calls)) == 1 and parser.is_done and parser.flush() == ""
    assert CallParser(form, NAMES, parallel=False).push(text)[1][0]["index"] == 0
    assert len(joined(CallParser(form, NAMES, parallel=False).push(text)[1])) == 1


def test_a_long_answer_that_begins_as_a_call_takes_time_in_proportion():
    parser, start = CallParser(LLAMA, NAMES), time.perf_counter()
    for _ in range(8000):
        parser.push('{"a": [' if not parser.count else "")
    assert time.perf_counter() - start < 2


def test_a_grammar_stands_in_the_field_that_was_sent():
    plain = read_response_format("response_format", {"type": "json_object"})
    with_schema = read_response_format("response_format", {"type": "json_object", "schema": CLOCK["parameters"]})
    assert plain and plain.param == "response_format"
    assert with_schema and with_schema.param == "response_format.schema"
