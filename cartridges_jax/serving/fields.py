"""The fields of a request for generation: one table gives their reader, their refusals and `/openapi.json`.

A field is honoured, or it is refused with a sentence unless its value asks for nothing, or it changes no answer and is
accepted. A name that the table lacks is refused, since nobody could say what it would have changed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from cartridges_jax.serving import protocol
from cartridges_jax.serving.grammar import read_grammar, read_response_format, read_structured_outputs
from cartridges_jax.serving.protocol import MAX_CARTRIDGES, MAX_STOPS, SEEDS, Fields, refuse
from cartridges_jax.serving.tools import read_tool_choice, read_tools

Route = Literal["chat", "text", "tokenize", "responses", "messages"]
Schema = dict[str, Any]

MAX_TOKEN_IDS = 1024  # in stop_token_ids, allowed_token_ids and logit_bias
TEXT: Schema = {"type": "string"}
FLAG: Schema = {"type": "boolean"}
IDS: Schema = {"type": "array", "items": {"type": "integer", "minimum": 0}}
NOTHING = (None, False, 0, "", [], {})  # values that ask for nothing, whatever the field is


@dataclass(frozen=True)
class Kind:
    """What values a field takes: `read` gives the checked value of what stands there under a name, or refuses it."""

    read: Callable[[str, Any], Any]
    schema: Schema


@dataclass(frozen=True)
class Field:
    """A field of the body. Absent and null, it has its default.

    Attributes:
      meaning: a sentence for `/openapi.json`.
      routes: the routes that have it.
      refused: why nothing but the default, or a value that asks for nothing, is taken; "" if the field is honoured.
    """

    name: str
    kind: Kind
    meaning: str
    default: Any = None
    routes: tuple[Route, ...] = ("chat", "text")
    refused: str = ""

    def read(self, values: Fields) -> Any:
        value = values.get(self.name)
        if value is None:
            return self.default
        if self.refused:
            asks_for_nothing = self.default is not True and value in NOTHING
            if value != self.default and not asks_for_nothing:
                refuse(self.name, value, f"nothing: {self.refused}")
            return self.default
        return self.kind.read(self.name, value)


@dataclass(frozen=True)
class FieldTable:
    """The fields that a server takes, with its bounds."""

    fields: tuple[Field, ...]

    def read(self, values: Fields, route: Route) -> dict[str, Any]:
        """The checked value of every field of a route. Raises: ApiError, which names the first that is wrong."""
        known = {field.name: field for field in self.fields if route in field.routes}
        values.has_only(*known, *NEUTRAL)
        return {name: field.read(values) for name, field in known.items()}

    def schema(self, route: Route) -> Schema:
        """The properties of a route's body in OpenAPI."""
        told = {field.name: _told(field) for field in self.fields if route in field.routes}
        return told | {name: {"description": "Accepted; it changes no answer."} for name in NEUTRAL}


def generation_fields(max_top_logprobs: int, max_choices: int, vocab_size: int) -> FieldTable:
    """The table of a server: of its engine's log-probabilities, its queue and its model's vocabulary."""
    flag, text = Kind(protocol.read_flag, FLAG), Kind(protocol.text, TEXT)
    count, best = _integer(1, SEEDS), _integer(0, max_top_logprobs)
    ids = Kind(partial(_token_ids, vocab_size), IDS | {"maxItems": MAX_TOKEN_IDS})
    some = Kind(partial(_token_ids, vocab_size, least=1), ids.schema | {"minItems": 1})
    chat: tuple[Route, ...] = ("chat",)
    only_text: tuple[Route, ...] = ("text",)
    template: tuple[Route, ...] = ("chat", "tokenize")
    beginning: tuple[Route, ...] = ("text", "tokenize")
    every: tuple[Route, ...] = ("chat", "text", "tokenize")
    return FieldTable(
        (
            # what is asked
            Field("model", text, "The model, or `model:CARTRIDGE`.", routes=every),
            Field("cartridges", _CARTRIDGES, "Cartridges in front of the prompt, in their order.", (), every),
            Field("messages", _MESSAGES, "The conversation.", routes=template),
            Field("prompt", _PROMPTS, "One or several texts, or lists of token ids.", routes=beginning),
            Field("add_special_tokens", flag, "Puts the tokens of a text's beginning first.", routes=beginning),
            Field("add_generation_prompt", flag, "Opens the assistant's turn; true by default.", routes=template),
            Field("chat_template_kwargs", _OBJECT, "Variables of the model's chat template.", {}, template),
            Field("apply_chat_template_overrides", _OBJECT, "Tokasaurus' name of the same.", {}, template),
            Field("continue_final_message", flag, "Goes on with the last message.", False, template),
            Field("truncate_prompt_tokens", _integer(-1, SEEDS), "Keeps so many tokens at the end; -1: what fits."),
            # how the answer is drawn
            Field("temperature", _number(0, 2), "0 takes the best token.", 1.0),
            Field("top_p", _number(0, 1), "Keeps the best tokens of so much probability.", 1.0),
            Field("top_k", _integer(-1, SEEDS - 1), "Keeps so many best tokens; 0 and -1 keep all.", 0),
            Field("seed", _integer(-(2**63), 2**63 - 1), "The same seed draws the same answer."),
            Field("n", _integer(1, max_choices), "Answers to each prompt.", 1),
            Field("best_of", _integer(1, max_choices), "Writes so many, and tells the n most likely.", None, only_text),
            Field("min_p", _number(0, 1), "The least probability, as a part of the best token's.", 0.0),
            Field("frequency_penalty", _number(-2, 2), "What a token loses for each time in the answer.", 0.0),
            Field("presence_penalty", _number(-2, 2), "What a token loses for being in the answer.", 0.0),
            Field("repetition_penalty", _number(0.01, 100), "Divides logits of tokens that were there.", 1.0),
            Field("logit_bias", Kind(partial(_bias, vocab_size), {"type": "object"}), "Adds to tokens' logits.", ()),
            Field("allowed_token_ids", some, "The only tokens that may be drawn."),
            Field("bad_words", _WORDS, "Texts that are never written.", ()),
            # where it ends
            Field("max_tokens", count, "The most tokens of an answer.", routes=chat),
            Field("max_tokens", _integer(0, SEEDS), "The same; 0 with echo or prompt_logprobs.", 16, only_text),
            Field("max_completion_tokens", count, "The newer name of max_tokens.", routes=chat),
            Field("stop", _STOPS, "Texts that end the answer.", ()),
            Field("stop_token_ids", ids, "Tokens that end the answer.", ()),
            Field("ignore_eos", flag, "Goes on behind the model's own end.", False),
            Field("min_tokens", _integer(0, SEEDS - 1), "So many tokens come before any that ends the answer.", 0),
            # its form, and what it may call
            Field("response_format", Kind(read_response_format, {"type": "object"}), "A type, or a JSON schema."),
            Field("structured_outputs", Kind(read_structured_outputs, {"type": "object"}), "vLLM's json, regex, …"),
            *(
                Field(f"guided_{form}", Kind(partial(read_grammar, form), {}), "The older name of the same.")
                for form in ("json", "regex", "choice", "grammar")
            ),
            Field("tools", Kind(read_tools, _OBJECTS), "Functions that may be called.", (), template),
            Field("tool_choice", Kind(read_tool_choice, {}), "none, auto, required or a function.", None, template),
            Field("parallel_tool_calls", flag, "Whether one answer may call several.", True, template),
            # what is told about it
            Field("stream", flag, "Sends the answer as it is written.", False),
            Field("stream_options", _STREAM_OPTIONS, "`include_usage` sends a last chunk with counts.", {}),
            Field("logprobs", flag, "Tells each token's log-probability.", False, chat),
            Field("top_logprobs", best, "Tells so many best tokens with each.", 0, chat),
            Field("logprobs", best, "Tells log-probabilities and so many best tokens.", None, only_text),
            Field("prompt_logprobs", best, "Tells log-probabilities of the prompt's tokens, and so many best ones."),
            Field("echo", flag, "Tells the prompt in front of the answer.", False, only_text),
            Field("echo", flag, "", False, chat, "the prompt is told by return_token_ids and prompt_logprobs"),
            Field("include_stop_str_in_output", flag, "Shows what ended the answer, too.", False),
            Field("skip_special_tokens", flag, "Leaves special tokens out of the text.", True),
            Field("return_token_strs", flag, "Tells the tokens' texts.", False, ("tokenize",)),
            Field("return_token_ids", flag, "Tells the ids of prompt and answer.", False),
            Field("return_tokens_as_token_ids", flag, "Spells tokens as `token_id:N`.", False),
            Field("logprobs_in_fingerprint", flag, "Tokasaurus' packed log-probabilities.", False),
            # what is not done
            Field("suffix", text, "", "", only_text, "models here only continue a text; put what follows into prompt"),
            Field("functions", _ANY, "", [], chat, "send them as tools"),
            Field("function_call", _ANY, "", "none", chat, "send tool_choice instead"),
            Field("chat_template", _ANY, "", routes=chat, refused="the model's own template renders what is said"),
            Field("documents", _ANY, "", [], chat, "put documents into a message, or train a cartridge of them"),
            Field("modalities", _ANY, "", ["text"], chat, "answers are text"),
            Field("audio", _ANY, "", routes=chat, refused="answers are text"),
            Field("web_search_options", _ANY, "", routes=chat, refused="this server searches nothing"),
            Field("reasoning_effort", _ANY, "", "none", chat, "say it as the template does, in chat_template_kwargs"),
            Field("verbosity", _ANY, "", "medium", chat, "ask for a length in a message, or set max_tokens"),
            Field("prompt_embeds", _ANY, "", routes=only_text, refused="send prompt as a text or token ids"),
            Field("use_beam_search", _ANY, "", False, refused="answers are drawn token by token: ask for n"),
            Field("length_penalty", _ANY, "", 1, refused="it belongs to beam search, which is not done here"),
            Field("spaces_between_special_tokens", flag, "", True, refused="text is what the tokenizer decodes"),
            Field("logits_processors", _ANY, "", refused="code of requests is not run"),
        )
    )


# They say who asks, or how to work; no answer depends on them.
NEUTRAL = (
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"),
    *("prediction", "request_id", "priority", "cache_salt"),
)


def _integer(low: int, high: int) -> Kind:
    return Kind(
        partial(protocol.read_integer, low=low, high=high), {"type": "integer", "minimum": low, "maximum": high}
    )


def _number(low: float, high: float) -> Kind:
    read = partial(protocol.read_number, low=float(low), high=float(high))
    return Kind(read, {"type": "number", "minimum": low, "maximum": high})


def _token_ids(vocab_size: int, name: str, value: object, least: int = 0) -> tuple[int, ...]:
    if not isinstance(value, list) or not least <= len(value) <= MAX_TOKEN_IDS:
        refuse(name, value, f"a list of {least} to {MAX_TOKEN_IDS} token ids")
    return protocol.token_ids(name, value, vocab_size)


def _bias(vocab_size: int, name: str, value: object) -> tuple[tuple[int, float], ...]:
    """`{"token id": bias}`."""
    made = []
    for key, bias in Fields(value, name).values.items():
        ids = [int(key)] if key.isascii() and key.isdigit() and len(key) < 10 else [key]
        made.append((*protocol.token_ids(name, ids, vocab_size), protocol.read_number(name, bias, -100.0, 100.0)))
    if len(made) > MAX_TOKEN_IDS:
        refuse(name, value, f"at most {MAX_TOKEN_IDS} tokens")
    return tuple(made)


def _object(name: str, value: object) -> dict[str, Any]:
    return Fields(value, name).values


def _stream_options(name: str, value: object) -> dict[str, Any]:
    options = Fields(value, name)
    if options.flag("continuous_usage_stats"):
        refuse(f"{name}.continuous_usage_stats", True, "false: the last chunk has the counts, with include_usage")
    return {"include_usage": options.flag("include_usage")}


def _told(field: Field) -> Schema:
    if field.refused:
        return {"description": f"Refused: {field.refused}.", "enum": [field.default, None]}
    schema = field.kind.schema
    if field.name not in ("messages", "prompt"):
        schema = {"anyOf": [*schema.get("anyOf", [schema]), {"type": "null"}]}
    default = {} if field.default in (None, ()) else {"default": field.default}
    return schema | {"description": field.meaning} | default


_OBJECTS: Schema = {"type": "array", "items": {"type": "object"}}
_ANY = Kind(lambda _, value: value, {})
_OBJECT = Kind(_object, {"type": "object"})
_STREAM_OPTIONS = Kind(_stream_options, {"type": "object", "properties": {"include_usage": FLAG}})
_WORDS = Kind(
    lambda name, value: protocol.read_texts(name, value), {"type": "array", "items": TEXT, "maxItems": MAX_STOPS}
)
_STOPS = Kind(
    lambda name, value: protocol.read_texts(name, [value] if isinstance(value, str) else value),
    {"anyOf": [TEXT, {"type": "array", "items": TEXT, "maxItems": MAX_STOPS}]},
)
_REFERENCE: Schema = {"$ref": "#/components/schemas/CartridgeReference"}
_CARTRIDGES = Kind(
    lambda _, value: protocol.read_cartridges(value),
    {"type": "array", "items": _REFERENCE, "maxItems": MAX_CARTRIDGES},
)
_MESSAGES = Kind(
    lambda _, value: value,  # `Reader` reads them, together with the cartridges that they may name
    {"type": "array", "items": {"$ref": "#/components/schemas/Message"}, "minItems": 1},
)
_PROMPTS = Kind(
    lambda _, value: value,  # what it may be depends on the cartridge
    {"anyOf": [TEXT, IDS, {"type": "array", "items": {"anyOf": [TEXT, IDS]}, "minItems": 1}]},
)
