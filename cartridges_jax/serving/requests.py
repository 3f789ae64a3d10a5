"""From the body of an HTTP request to a `GenerationRequest`: what to answer, checked.

API shapes: OpenAI's chat completions and completions, with vLLM's `return_token_ids`, `return_tokens_as_token_ids`,
`prompt_logprobs` and `chat_template_kwargs`, and Tokasaurus' `cartridges`, `logprobs_in_fingerprint` and
`apply_chat_template_overrides`.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from cartridges_jax.command_line.errors import UserError
from cartridges_jax.models.tokenizer import Tokenizer
from cartridges_jax.serving import protocol
from cartridges_jax.serving import tools as toolbox
from cartridges_jax.serving.fields import generation_fields
from cartridges_jax.serving.grammar import GrammarCompiler, without
from cartridges_jax.serving.protocol import SEEDS, ApiError, Fields, refuse, shorten
from cartridges_jax.serving.scheduler import Constraint, Engine, LogitsRules, Prefix, Request, most_tokens
from cartridges_jax.serving.store import CartridgeStore, Reference
from cartridges_jax.serving.tools import Tools, grammar_of

MAX_LOGPROBS = 1 << 21  # in all answers that are sent in one piece; each costs a few hundred bytes until then


@dataclass(frozen=True)
class GenerationRequest:
    """Asks for answers. Its `requests`, one for each prompt, lack what only the engine thread knows."""

    kind: Literal["chat", "text"]
    model: str
    cartridges: tuple[Reference, ...]
    requests: tuple[Request, ...]
    max_tokens: int | None  # None: as many as fit
    n: int = 1  # answers that are written to each prompt
    kept: int = 1  # of which so many are told
    stops: tuple[str, ...] = ()
    tools: Tools | None = None  # whose calls are read from the answer
    include_stops: bool = False  # what ends the answer is shown
    skip_special_tokens: bool = True
    stream: bool = False
    include_usage: bool = False
    logprobs: bool = False
    return_token_ids: bool = False
    tokens_as_ids: bool = False
    prompt_logprobs: int | None = None  # so many alternatives at each token of the prompt; None: nothing about it
    fingerprint: bool = False  # Tokasaurus' `system_fingerprint` with the token ids
    echo: bool = False  # the prompt is told in front of the answer
    truncates: bool = False  # prompts lose their beginning where they do not fit
    packed: bool = False  # and with log-probabilities, instead of `logprobs`
    # The prompt in a mode of thinking, of a chat that does not say which: then it is the cartridge's.
    in_mode: Callable[[bool | None], tuple[int, ...]] | None = None

    @property
    def num_choices(self) -> int:
        return len(self.requests) * self.n

    def prompt_alternatives(self, nth: int) -> int | None:
        """How many alternatives are told of the prompt's tokens with its nth answer; None, if nothing is."""
        if self.echo and (self.logprobs or self.max_tokens == 0):
            return max(self.prompt_logprobs or 0, self.requests[0].top_logprobs)
        return None if nth else self.prompt_logprobs


@dataclass(frozen=True)
class Conversation:
    """What is talked about with whom: `prompt_of` gives its token ids in a mode of thinking.

    It `is_open` if the mode is the cartridge's to choose.
    """

    model: str
    cartridges: tuple[Reference, ...]
    is_open: bool
    prompt_of: Callable[[bool | None], tuple[int, ...]]


class Reader:
    """Reads bodies for one model and its cartridges."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        store: CartridgeStore,
        model: str,
        *,
        max_choices: int,
        rng: random.Random,
    ):
        self._engine, self._tokenizer, self._store, self._model = engine, tokenizer, store, model
        self._max_choices, self._rng = max_choices, rng
        self._compiler = GrammarCompiler(tokenizer)
        self.table = generation_fields(engine.max_top_logprobs, max_choices, tokenizer.vocab_size)

    def chat(self, body: Fields, fingerprint: bool = False) -> GenerationRequest:
        fields = self.table.read(body, "chat")
        if fields["top_logprobs"] and not fields["logprobs"]:
            refuse("top_logprobs", fields["top_logprobs"], "logprobs to be true as well")
        max_tokens = fields["max_completion_tokens"] or fields["max_tokens"]
        tools = toolbox.chosen(fields)
        conversation = self._conversation(fields)

        def prompt_of(thinking: bool | None = None) -> tuple[int, ...]:
            return _truncated(conversation.prompt_of(thinking), fields)

        return self._read_shared(
            fields,
            [prompt_of()],
            fields["top_logprobs"],
            kind="chat",
            model=conversation.model,
            cartridges=conversation.cartridges,
            max_tokens=max_tokens,
            logprobs=fields["logprobs"],
            fingerprint=fingerprint,
            tools=tools,
            in_mode=prompt_of if conversation.is_open else None,
        )

    def completion(self, body: Fields, fingerprint: bool = False) -> GenerationRequest:
        fields = self.table.read(body, "text")
        model, cartridges = self._read_model(fields, ())
        prompts = self._read_prompts(fields, bool(cartridges))
        return self._read_shared(
            fields,
            [_truncated(prompt, fields) for prompt in prompts],
            fields["logprobs"] or 0,
            kind="text",
            model=model,
            cartridges=cartridges,
            max_tokens=fields["max_tokens"],
            echo=fields["echo"],
            logprobs=fields["logprobs"] is not None,
            fingerprint=fingerprint,
        )

    def tokenize(self, body: Fields) -> tuple[GenerationRequest, bool]:
        """A request for a text or a conversation as answering it would take it, and whether texts of ids are asked for.

        Raises: ApiError.
        """
        fields = self.table.read(body, "tokenize")
        if fields["messages"] is not None and fields["prompt"] is not None:
            refuse("prompt", fields["prompt"], "either messages or a prompt")
        if fields["messages"] is None:
            protocol.text("prompt", fields["prompt"])
            model, cartridges = self._read_model(fields, ())
            (prompt,) = self._read_prompts(fields, bool(cartridges))
            generation = GenerationRequest("text", model, cartridges, (Request("", prompt),), 0)
        else:
            asked = self._conversation(fields)
            in_mode = asked.prompt_of if asked.is_open else None
            requests = (Request("", asked.prompt_of(None)),)
            generation = GenerationRequest("chat", asked.model, asked.cartridges, requests, 0, in_mode=in_mode)
        return generation, fields["return_token_strs"]

    def _conversation(self, fields: dict[str, Any]) -> Conversation:
        messages, tagged = protocol.take_tags(protocol.read_messages(fields["messages"]))
        if not messages:
            refuse("messages", fields["messages"], "a message beside the cartridge's")
        model, cartridges = self._read_model(fields, tagged)
        encode = self._tokenizer.turn_ids if cartridges else self._tokenizer.chat_ids
        is_open = bool(cartridges) and _thinking(fields) is None
        return Conversation(model, cartridges, is_open, functools.partial(self.encode_chat, messages, fields, encode))

    def encode_chat(
        self,
        messages: list[dict[str, Any]],
        fields: dict[str, Any],
        encode: Callable[..., list[int]],
        thinking: bool | None = None,
    ) -> tuple[int, ...]:
        """A conversation's token ids, by tools and template options in `fields`; `thinking` where they have none of it.

        Raises: ApiError.
        """
        tools = toolbox.chosen(fields)
        variables = self._template_variables(fields)
        if not toolbox.knows_tools(self._tokenizer):
            messages = toolbox.in_words(messages, tools)
        elif tools:
            variables["tools"] = toolbox.template_tools(tools)
        asked = _thinking(fields)
        if (thinking := thinking if asked is None else asked) is not None:
            encode = functools.partial(encode, thinking=thinking)
        is_open = fields["continue_final_message"]
        if is_open and (fields["add_generation_prompt"] or messages[-1]["role"] != "assistant"):
            refuse("continue_final_message", True, "the assistant's message last and add_generation_prompt to be false")
        if is_open:
            variables["continue_final_message"] = True
        if variables:
            encode = functools.partial(encode, variables=variables)
        opens_turn = not is_open if fields["add_generation_prompt"] is None else fields["add_generation_prompt"]
        try:
            return tuple(encode(messages, add_generation_prompt=opens_turn))
        except UserError as error:
            raise ApiError(400, str(error), "messages", "invalid_value") from error

    def _template_variables(self, fields: dict[str, Any]) -> dict[str, Any]:
        """What a request gives the chat template, beside `enable_thinking`, which every template may be told."""
        given = {}
        for name in ("chat_template_kwargs", "apply_chat_template_overrides"):
            for key, value in fields[name].items():
                if key in ("messages", "tools", "add_generation_prompt", "continue_final_message"):
                    refuse(f"{name}.{key}", value, f"{key} beside {name}, not in it")
                if key != "enable_thinking" and key not in self._tokenizer.template_variables:
                    refuse(f"{name}.{key[:80]}", value, "nothing: the model's chat template does not read it")
                given[key] = value
        return {key: value for key, value in given.items() if key != "enable_thinking"}

    def _read_shared(
        self, fields: dict[str, Any], prompts: list[tuple[int, ...]], top_logprobs: int, **known: Any
    ) -> GenerationRequest:
        """Checks and takes the fields that all routes share."""
        stream, packed, prompt_logprobs = (
            fields[name] for name in ("stream", "logprobs_in_fingerprint", "prompt_logprobs")
        )
        if prompt_logprobs is not None and stream:
            refuse("prompt_logprobs", prompt_logprobs, "stream to be false")
        if packed and (stream or known.get("echo")):
            refuse("logprobs_in_fingerprint", packed, "stream and echo to be false")
        seed = self._rng.randrange(SEEDS) if fields["seed"] is None else fields["seed"] % SEEDS
        max_tokens, echo = known["max_tokens"], known.get("echo", False)
        if max_tokens == 0 and not (echo or prompt_logprobs is not None):
            refuse("max_tokens", max_tokens, "at least 1, or echo or prompt_logprobs")
        if max_tokens is not None and fields["min_tokens"] > max_tokens:
            refuse("min_tokens", fields["min_tokens"], f"at most max_tokens, {max_tokens}")
        eos_ids = frozenset() if fields["ignore_eos"] else self._tokenizer.stop_ids
        stop_ids = eos_ids | set(fields["stop_token_ids"])
        request = Request(
            id="",
            prompt=(),
            temperature=fields["temperature"],
            top_p=fields["top_p"],
            top_k=max(fields["top_k"], 0),  # vLLM's clients write -1 for "all"
            seed=seed,
            stop_ids=stop_ids,
            top_logprobs=top_logprobs,
            logits=self._logits_rules(fields, stop_ids),
            constraint=self._constraint(fields, known.get("tools")),
        )
        n, best_of = fields["n"], fields.get("best_of") or fields["n"]
        if best_of < n or (best_of > n and stream):
            refuse("best_of", best_of, f"at least n, {n}, and stream to be false")
        if best_of * len(prompts) > self._max_choices:
            name = "n" if best_of == n else "best_of"
            refuse(name, best_of, f"at most {self._max_choices} answers in one request, for {len(prompts)} prompts")
        generation = GenerationRequest(
            **known,
            requests=tuple(replace(request, prompt=prompt) for prompt in prompts),
            n=best_of,
            kept=n,
            stops=fields["stop"],
            include_stops=fields["include_stop_str_in_output"],
            skip_special_tokens=fields["skip_special_tokens"],
            stream=stream,
            include_usage=fields["stream_options"].get("include_usage", False),
            return_token_ids=fields["return_token_ids"],
            tokens_as_ids=fields["return_tokens_as_token_ids"],
            prompt_logprobs=prompt_logprobs,
            packed=packed,
            truncates=fields["truncate_prompt_tokens"] == -1,
        )
        check_logprobs(self.num_logprobs(generation), "top_logprobs" if generation.kind == "chat" else "logprobs")
        return generation

    def _logits_rules(self, fields: dict[str, Any], stop_ids: frozenset[int]) -> LogitsRules | None:
        """What is asked to be done to the logits; None, if nothing is."""
        penalties = ("frequency_penalty", "presence_penalty", "repetition_penalty", "min_p", "min_tokens")
        rules = LogitsRules(
            **{name: fields[name] for name in penalties},
            bias=fields["logit_bias"],
            allowed=fields["allowed_token_ids"],
        )
        return None if rules == LogitsRules() else replace(rules, stop_ids=stop_ids)

    def _constraint(self, fields: dict[str, Any], tools: Tools | None) -> Callable[[], Constraint] | None:
        """What the form that is asked for says about each next token; None, if none is asked for."""
        names = ("response_format", "structured_outputs", *(name for name in fields if name.startswith("guided_")))
        grammars = [fields[name] for name in names if fields[name] is not None]
        if fields["bad_words"]:
            grammars.append(without(fields["bad_words"]))
        if len(grammars) > 1:
            refuse(grammars[1].param, grammars[1].text, f"nothing beside {grammars[0].param}: give one grammar")
        grammar = grammars[0] if grammars else None
        if tools is not None:
            grammar = grammar_of(tools, self._tokenizer, grammar) or grammar
        if grammar is None:
            return None
        for name in ("ignore_eos", "min_tokens"):
            if fields[name]:
                refuse(name, fields[name], f"nothing beside {grammar.param}: the grammar says where the answer ends")
        return self._compiler.constraint(grammar)

    def fitted(self, generation: GenerationRequest, prefix: Prefix | None) -> GenerationRequest:
        """The request with as much of its prompts' ends as fits behind its cartridges, if it asks for that."""
        if not generation.truncates:
            return generation
        most = max(most_tokens(self._engine, prefix) - (generation.max_tokens or 1), 1)
        ends = tuple(replace(request, prompt=request.prompt[-most:]) for request in generation.requests)
        return replace(generation, requests=ends)

    def num_logprobs(self, generation: GenerationRequest) -> int:
        """The most log-probabilities that are kept until its answers are complete; none if they are streamed."""
        count = sum(len(request.prompt) for request in generation.requests) * (1 + (generation.prompt_logprobs or 0))
        count = 0 if generation.prompt_logprobs is None else count
        if generation.stream or not generation.logprobs:
            return count
        longest = most_tokens(self._engine, None)
        tokens = longest if generation.max_tokens is None else min(generation.max_tokens, longest)
        answers = generation.num_choices * tokens
        if generation.echo:
            answers += generation.n * sum(len(request.prompt) for request in generation.requests)
        return count + answers * (1 + generation.requests[0].top_logprobs)

    def _read_prompts(self, fields: dict[str, Any], behind_cartridge: bool) -> list[tuple[int, ...]]:
        """The prompts of `prompt`, which is a text, a list of token ids, or a list of either."""
        prompt = fields["prompt"]
        single = isinstance(prompt, str) or (isinstance(prompt, list) and bool(prompt) and type(prompt[0]) is int)
        prompts = [prompt] if single else prompt
        if not isinstance(prompts, list) or not 0 < len(prompts) <= self._max_choices:
            refuse("prompt", prompt, f"a text, a list of token ids, or a list of 1 to {self._max_choices} of either")
        special = not behind_cartridge if fields["add_special_tokens"] is None else fields["add_special_tokens"]
        encode = functools.partial(self._tokenizer.encode, add_special_tokens=special)
        if behind_cartridge and special and self._tokenizer.encode("", add_special_tokens=True):
            refuse("add_special_tokens", special, "false: a cartridge holds the beginning of the text already")
        encode = self._tokenizer.continued_ids if behind_cartridge else encode
        return [
            protocol.token_ids("prompt", one, self._tokenizer.vocab_size)
            if isinstance(one, list)
            else tuple(encode(protocol.text("prompt", one)))
            for one in prompts
        ]

    def _read_model(self, fields: dict[str, Any], tagged: tuple[Reference, ...]) -> tuple[str, tuple[Reference, ...]]:
        """The model's name and the cartridges, which `cartridges`, tags in the messages or the name may choose."""
        name = self._model if fields["model"] is None else fields["model"]
        asked = fields["cartridges"]
        if asked and tagged:
            refuse("cartridges", asked[0].id, "cartridges either here or as tags in the messages")
        asked = asked or tagged
        protocol.check_cartridges(self._store, asked, "cartridges")
        chosen = self.read_model_name(name)
        if chosen is None:
            return name, asked
        if asked and [reference.name for reference in asked] != [chosen.name]:
            refuse("cartridges", asked[0].id, f"the cartridge that the model's name chooses, {chosen.id!r}, or none")
        return name, asked or (chosen,)

    def read_model_name(self, name: str) -> Reference | None:
        """The cartridge that a model's name chooses, if any. Raises: ApiError, if there is no such model."""
        if name == self._model:
            return None
        base, _, id = name.rpartition(":")
        if base != self._model:
            message = f"model {shorten(name)} does not exist: ask for {self._model!r} or '{self._model}:CARTRIDGE'"
            raise ApiError(404, message, "model", "model_not_found")
        protocol.check_cartridges(self._store, [Reference(id)], "model", "model_not_found")
        return Reference(id)


def _truncated(prompt: tuple[int, ...], fields: dict[str, Any]) -> tuple[int, ...]:
    """The end of a prompt that is asked for; where that is what fits, `Reader.fitted` takes it."""
    most = fields["truncate_prompt_tokens"]
    return prompt if most in (None, -1) else prompt[max(len(prompt) - most, 0) :]


def check_logprobs(count: int, param: str) -> None:
    """Refuses more log-probabilities than one reply may hold. Raises: ApiError."""
    if count > MAX_LOGPROBS:
        message = (
            f"the answers may have {count:,} log-probabilities, and one reply holds {MAX_LOGPROBS:,}: ask for fewer "
            "answers, max_tokens or top_logprobs, or stream them"
        )
        raise ApiError(400, message, param, "too_many_logprobs")


def _thinking(fields: dict[str, Any]) -> bool | None:
    """The template's `enable_thinking` that is asked for, if any. Raises: ApiError."""
    asked = None
    for name in ("chat_template_kwargs", "apply_chat_template_overrides"):
        if fields[name].get("enable_thinking") is not None:
            asked = protocol.read_flag(f"{name}.enable_thinking", fields[name]["enable_thinking"])
    return asked
