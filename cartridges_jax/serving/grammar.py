"""Structured output: what a request says about the form of its answer, and the masks of tokens that keep to it.

`llguidance` compiles JSON schemas, regular expressions and context-free grammars, and says which tokens may come next.
It is imported when the first request needs it.
"""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from cartridges_jax.models.tokenizer import Tokenizer
from cartridges_jax.serving.protocol import ApiError, Fields, read_texts, refuse, text

if TYPE_CHECKING:
    import llguidance
    import numpy as np

MAX_GRAMMARS = 64  # that are kept compiled
MAX_CHARACTERS = 1 << 19  # of one grammar
# The work for one mask, for which all other requests wait, takes at most about a tenth of a second.
LIMITS = {"step_lexer_fuel": 20_000, "initial_lexer_fuel": 200_000, "step_max_items": 10_000}
LIMITS["max_grammar_size"] = 20_000  # parts of rules; 2,000 properties of a schema have as many
STACK_BYTES = 1 << 29  # of address space, for a rule within a rule within …; those of `MAX_CHARACTERS` need half of it
# Any amount of space would let a model write nothing else.
JSON_OPTIONS = {"whitespace_pattern": r"[ \n\t]{0,16}"}
ANY_OBJECT = '{"type": "object"}'
_STACK_SIZE = threading.Lock()
FORMS = ("json", "regex", "choice", "grammar", "json_object")  # of `structured_outputs`


@dataclass(frozen=True)
class Grammar:
    """A grammar as text: a JSON schema, a regular expression, a JSON list of texts, Lark or GBNF."""

    form: Literal["json", "regex", "choice", "grammar"]
    text: str
    param: str = ""  # the field that it stands in


def read_response_format(name: str, value: object) -> Grammar | None:
    """OpenAI's `{"type": "json_schema", "json_schema": {"schema": …}}`, and its other types."""
    fields = Fields(value, name)
    kind = fields.get("type")
    if kind == "text":
        return None
    if kind == "json_object" and fields.get("schema") is None:
        return Grammar("json", ANY_OBJECT, name)
    if kind == "json_object":  # llama.cpp and others let its schema stand beside it
        return read_grammar("json", f"{name}.schema", fields.get("schema"))
    if kind != "json_schema":
        refuse(f"{name}.type", kind, "text, json_object or json_schema")
    schema = Fields(fields.get("json_schema"), f"{name}.json_schema").get("schema", {})
    return read_grammar("json", f"{name}.json_schema.schema", schema)


def read_structured_outputs(name: str, value: object) -> Grammar:
    """vLLM's `{"json": schema}`, or regex, choice, grammar or json_object instead."""
    fields = Fields(value, name)
    given = [key for key in fields.values if fields.get(key) is not None]
    if len(given) != 1 or given[0] not in FORMS:
        refuse(name, value, f"one of {', '.join(FORMS)}, and nothing else")
    return read_grammar(given[0], f"{name}.{given[0]}", fields.get(given[0]))


def read_grammar(form: str, name: str, value: object) -> Grammar:
    if form == "json_object":
        return Grammar("json", ANY_OBJECT, name) if value is True else refuse(name, value, "true")
    if form == "json":
        return Grammar("json", value if isinstance(value, str) else _as_json(name, value), name)
    if form == "choice":
        return Grammar("choice", json.dumps(read_texts(name, value) or refuse(name, value, "a text to choose")), name)
    if form == "regex":
        return Grammar("regex", text(name, value), name)
    return Grammar("grammar", text(name, value), name)


def without(words: tuple[str, ...]) -> Grammar:
    """The grammar of all texts that hold none of these."""
    bad = "|".join("".join(c if c.isalnum() else f"\\x{{{ord(c):x}}}" for c in word) for word in words)
    return Grammar("grammar", f"start: TEXT\nTEXT: /(?s:.*)/ & ~/(?s:.*)({bad})(?s:.*)/\n", "bad_words")


def _as_json(name: str, value: object) -> str:
    if not isinstance(value, dict | bool):
        refuse(name, value, "a JSON schema")
    try:
        return json.dumps(value, allow_nan=False)
    except (ValueError, RecursionError):
        refuse(name, value, "a JSON schema of finite numbers that is not as deep")


class GrammarCompiler:
    """Compiles grammars for one tokenizer."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._compiled = functools.lru_cache(MAX_GRAMMARS)(self._compile)

    def constraint(self, grammar: Grammar) -> Callable[[], GrammarConstraint]:
        """Gives what makes the constraint of one answer. Raises: ApiError, if the grammar is none."""
        stop_ids = self._tokenizer.stop_ids
        if not stop_ids:
            refuse(grammar.param, grammar.text, "nothing: this model has no token that ends an answer")
        compiled = self._compiled(grammar)
        return lambda: GrammarConstraint(compiled.deep_copy(), self._tokenizer.vocab_size, stop_ids)

    def _compile(self, grammar: Grammar) -> llguidance.LLMatcher:
        if len(grammar.text) > MAX_CHARACTERS:
            message = f"{grammar.param} has {len(grammar.text)} characters, expected at most {MAX_CHARACTERS}"
            raise ApiError(400, message, grammar.param, "invalid_grammar")
        with _STACK_SIZE:  # of all threads that begin meanwhile
            before = threading.stack_size(STACK_BYTES)
            try:
                thread = ThreadPoolExecutor(1)
                made = thread.submit(self._compile_here, grammar)
            finally:
                threading.stack_size(before)
        with thread:
            return made.result()

    def _compile_here(self, grammar: Grammar) -> llguidance.LLMatcher:
        import llguidance

        try:
            if grammar.form == "json":
                made = llguidance.LLMatcher.grammar_from_json_schema(grammar.text, overrides=JSON_OPTIONS)
            else:
                made = llguidance.grammar_from(grammar.form, grammar.text)
            limits, vocabulary = llguidance.LLParserLimits(**LIMITS), self._tokenizer.grammar_vocabulary
            matcher = llguidance.LLMatcher(vocabulary, made, log_level=0, limits=limits)
            first = matcher.deep_copy()  # its mask takes the most work, and may be too much
            first.compute_bitmask()
            reason = matcher.get_error() or first.get_error()
        except ValueError as error:
            matcher, reason = None, str(error)
        if matcher is None or reason:
            message = f"{grammar.param} cannot be compiled: {' '.join(reason.split())[:300]}"
            raise ApiError(400, message, grammar.param, "invalid_grammar")
        return matcher


class GrammarConstraint:
    """The masks of one answer, as `Engine.sample` takes them; the engine's thread makes it.

    Where the grammar meets one of its limits it `is_broken`, and the answer ends.
    """

    def __init__(self, matcher: llguidance.LLMatcher, vocab_size: int, stop_ids: frozenset[int]):
        import numpy as np

        self._matcher = matcher
        self.is_broken = False
        self._mask = np.zeros((1, -(-vocab_size // 32)), np.int32)
        self._ends = np.zeros_like(self._mask)
        np.bitwise_or.at(self._ends.view(np.uint32)[0], [i // 32 for i in stop_ids], [1 << i % 32 for i in stop_ids])

    def mask(self) -> np.ndarray:
        """The bits of the tokens that may come next; only the end, if there are none."""
        from llguidance.numpy import fill_next_token_bitmask

        if not self._matcher.is_error():
            fill_next_token_bitmask(self._matcher, self._mask, 0)
        self.is_broken = self._matcher.is_error()
        return self._ends[0] if self.is_broken or not self._mask.any() else self._mask[0]

    def take(self, token: int) -> None:
        """The next token is this one."""
        self._matcher.consume_token(token)
