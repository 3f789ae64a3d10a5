"""This file turns text into token ids and back, and conversations into text, without torch or JAX.

The tokenizer is a `transformers` one, either read from a Hugging Face folder or built from the metadata of a GGUF file
(transformers' own GGUF reader imports torch). `transformers` is imported when the first tokenizer is loaded.
GGUF's format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; its pre-tokenizers bear llama.cpp's names, and
their regexes are those of each model's published tokenizer.json.
"""

from __future__ import annotations

import copy
import datetime
import functools
import hashlib
import json
import logging
import mmap
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cartridges_jax.command_line.errors import UserError
from cartridges_jax.command_line.files import read_json
from cartridges_jax.models.hub import ModelFiles, gguf_parts

if TYPE_CHECKING:
    import llguidance
    import tokenizers
    from transformers import PreTrainedTokenizerFast

# Published in the tokenizer.json of Llama 3 and of Qwen 2; they differ in how many digits make one piece.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _WORDS % r"\p{N}{1,3}"
_QWEN2 = _WORDS % r"\p{N}"
_PRE_TOKENIZERS = ("gpt-2", "llama-bpe", "qwen2", "smollm")
_PROBES = (".", ",")  # system messages
_OPEN_END = "<<the message goes on here>>"  # is cut off with all that a template puts behind it

BYTES_OF_A_CHARACTER = 4  # at most
MAX_PENDING = 32  # tokens that a stream decodes together with those before them; no character has as many

# tokenizer.ggml.token_type; UNUSED is padding that converters add up to the size of the embedding.
_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5
_SCALARS = dict(enumerate("BbHhIif?", start=0)) | {10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MOST_ENTRIES = 1_000_000  # tensors, or keys, of a file; 405 billion weights are 1,138 tensors
# How vocabularies spell the end of a turn, of a message to a tool and of a text; llama.cpp too looks them up where the
# metadata names none.
_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<|end_of_turn|>", "<end_of_turn>", "<end_of_utterance>")
_TURN_ENDS += ("<EOT>", "_<EOT>", "[EOT]")
_STOPS = {"eos": ("<|endoftext|>", "<|end_of_text|>", "</s>"), "eot": _TURN_ENDS, "eom": ("<|eom_id|>",)}


class Tokenizer:
    """A model's tokenizer with its chat template.

    Text that spells a special token (`<|im_end|>`) becomes that token, in `encode` as in the contents of messages. This
    is what transformers and the servers built on it do, and what lets a template's own tokens become ids; it also means
    that the author of a message can end their turn and open another, so contents carry no authority of their own.
    """

    vocab_size: int  # one more than the largest id; a model's embedding may have more rows
    bos_id: int | None
    stop_ids: frozenset[int]  # ids that end an answer: end of text and end of turn

    def __init__(self, wrapped: PreTrainedTokenizerFast, stop_ids: frozenset[int]):
        self._wrapped = wrapped
        self._backend: tokenizers.Tokenizer = wrapped.backend_tokenizer
        # A tokenizer.json may carry the limits it was trained with, which would cut a long document without a word.
        self._backend.no_truncation()
        self._backend.no_padding()
        self.vocab_size = max(self._backend.get_vocab().values()) + 1
        bos = wrapped.bos_token_id
        self.bos_id = bos if isinstance(bos, int) else None
        self.stop_ids = stop_ids
        self._day: datetime.date | None = None

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Gives the ids of `text`; `add_special_tokens` adds what the model puts around a text, such as a BOS."""
        # `encode` would keep all other threads from running for as long as it takes.
        return self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Gives the text of `ids`; bytes that are no UTF-8 become U+FFFD, ids that name no token are left out."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        """Gives the bytes of a token, which may be a part of a character."""
        return self.grammar_vocabulary.decode_bytes([token_id])

    def is_special(self, token_id: int) -> bool:
        """Says whether a token is one that `decode` leaves out, such as the end of a turn."""
        return token_id in self._special_ids

    @functools.cached_property
    def _special_ids(self) -> frozenset[int]:
        return frozenset(i for i, token in self._backend.get_added_tokens_decoder().items() if token.special)

    @functools.cached_property
    def grammar_vocabulary(self) -> llguidance.LLTokenizer:
        """The vocabulary as grammars take it: the bytes of every token, and those that end an answer."""
        import llguidance

        return llguidance.LLTokenizer(self._backend.to_str(), self.vocab_size, sorted(self.stop_ids))

    @property
    def settings(self) -> dict[str, Any]:
        """What tokenizer_config.json says of it: class, special tokens and chat template."""
        special = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token")) | self._wrapped.special_tokens_map
        template = {"chat_template": self._wrapped.chat_template}
        return {"tokenizer_class": type(self._wrapped).__name__, "vocab_size": self.vocab_size, **special, **template}

    def on(self, day: datetime.date) -> Tokenizer:
        """Gives a tokenizer whose chat template is told that today is `day`, instead of the true date."""
        pinned = copy.copy(self)
        pinned._day = day
        return pinned

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool,
        thinking: bool | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Renders a conversation as text by the model's own Jinja template.

        Args:
          thinking: the template's `enable_thinking`, for models that know it; None leaves it to the template.
          variables: others of the template, such as `tools`; and `continue_final_message`, which leaves the last
            message open.

        Raises:
          UserError: the model has no chat template, or its template refuses these messages.
        """
        return self._render(messages, add_generation_prompt, thinking, variables)

    def chat_ids(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool,
        thinking: bool | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Gives the ids of `render_chat`'s text; no BOS is added, as templates write it. Raises: as `render_chat`."""
        return self.encode(self._render(messages, add_generation_prompt, thinking, variables))

    def render_turns(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool,
        thinking: bool | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Renders a conversation behind a cartridge, which takes the place of the BOS and of the system message.

        Many templates open with a system message of their own where none is given. Between a cartridge and a question
        it costs a small model most of what the cartridge knows, so it is left out; one among `messages` stays.
        Raises: as `render_chat`.
        """
        return self._parted(messages, add_generation_prompt, thinking, variables)[1]

    def turn_ids(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool,
        thinking: bool | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Gives the ids of `render_turns`' text, which follows a cartridge. Raises: as `render_chat`."""
        return self._ids_behind(*self._parted(messages, add_generation_prompt, thinking, variables))

    def continued_ids(self, text: str) -> list[int]:
        """Gives the ids of any text that follows a cartridge; those of `render_turns`' text are `turn_ids`."""
        return self._ids_behind(self._opening, text)

    def answered_ids(
        self,
        messages: Sequence[Mapping[str, str]],
        answer: str,
        *,
        behind_cartridge: bool = True,
        thinking: bool | None = None,
    ) -> tuple[list[int], list[int]]:
        """Gives the ids that ask for an answer, and behind them those of an answer that was written, not sampled.

        Raises: as `render_chat`.
        """
        if behind_cartridge:
            opening, turns = self._parted(messages, True, thinking)
        else:
            opening, turns = "", self.render_chat(messages, add_generation_prompt=True, thinking=thinking)
        prompt, whole = self._ids_behind(opening, turns), self._ids_behind(opening, turns + answer)
        return prompt, whole[len(prompt) :] if whole[: len(prompt)] == prompt else self.encode(answer)

    @functools.cached_property
    def template_variables(self) -> frozenset[str]:
        """The names that the chat template reads."""
        import jinja2.meta

        if not self._wrapped.chat_template:
            return frozenset()
        try:
            parsed = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(self._wrapped.get_chat_template())
        except jinja2.TemplateError:  # what it says itself is told when a conversation is rendered
            return frozenset()
        return frozenset(jinja2.meta.find_undeclared_variables(parsed))

    def _render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool,
        thinking: bool | None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        # `apply_chat_template` renders by it, too, but lets nobody say what day it is.
        from transformers.utils.chat_template_utils import _compile_jinja_template

        if not self._wrapped.chat_template:
            raise UserError("this model has no chat template: use an instruction-tuned model, or plain completions")
        options = {"tools": None, "documents": None, **self._wrapped.special_tokens_map, **(variables or {})}
        is_open = options.pop("continue_final_message", False)
        messages = [dict(message) for message in messages]
        if is_open:
            messages[-1]["content"] += _OPEN_END
        if thinking is not None:
            options["enable_thinking"] = thinking
        if self._day is not None:
            options["strftime_now"] = self._day.strftime
        try:
            text = _compile_jinja_template(self._wrapped.get_chat_template()).render(
                messages=messages, add_generation_prompt=add_generation_prompt, **options
            )
        except Exception as error:  # jinja's own, and whatever Python says to a template's expressions
            raise UserError(f"the model's chat template refuses these messages: {error}") from error
        return text.rpartition(_OPEN_END)[0] if is_open else text

    def _parted(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool,
        thinking: bool | None,
        variables: Mapping[str, Any] | None = None,
    ) -> tuple[str, str]:
        """Splits a rendering into what a cartridge stands for and the turns behind it."""
        apart = None
        if not any(message["role"] == "system" for message in messages):
            apart = self._behind_system_message(messages, add_generation_prompt, thinking, variables)
        if apart is None:  # a system message is asked for, or would leave a trace in the turns: as it is without
            apart = "", self._render(messages, add_generation_prompt, thinking, variables)
        opening, turns = apart
        bos = self._bos
        if bos and turns.startswith(bos) and bos not in opening:
            return opening + bos, turns.removeprefix(bos)
        return opening, turns

    def _behind_system_message(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool,
        thinking: bool | None,
        variables: Mapping[str, Any] | None,
    ) -> tuple[str, str] | None:
        """Splits a rendering into its system message and what follows; None if the template mixes the two.

        Two system messages are tried: if the template puts them into the user's turn, what follows differs.
        """
        systems = [{"role": "system", "content": content} for content in _PROBES]
        render = functools.partial(self._render, variables=variables)
        for render_system in (self._system_alone, self._system_without_eos, self._system_before_turns):
            try:
                wholes = [render([system, *messages], add_generation_prompt, thinking) for system in systems]
                openings = [render_system(system, thinking) for system in systems]
            except UserError:
                continue
            pairs = list(zip(openings, wholes, strict=True))
            turns = {whole[len(opening) :] for opening, whole in pairs if whole.startswith(opening)}
            if len(turns) == 1 and all(whole.startswith(opening) for opening, whole in pairs):
                return openings[0], turns.pop()
        return None

    def _system_alone(self, system: Mapping[str, str], thinking: bool | None) -> str:
        return self._render([system], False, thinking)

    def _system_without_eos(self, system: Mapping[str, str], thinking: bool | None) -> str:
        """Renders a system message without the EOS that some templates put behind a conversation that has ended."""
        return self._system_alone(system, thinking).removesuffix(str(self._wrapped.eos_token))

    def _system_before_turns(self, system: Mapping[str, str], thinking: bool | None) -> str:
        """Renders a system message for templates that refuse one alone: two rounds are compared to find its end."""
        round_ = [{"role": "user", "content": "."}, {"role": "assistant", "content": "."}]
        one, two = (self._render([system, *round_ * count], False, thinking) for count in (1, 2))
        return one.removesuffix(two.removeprefix(one))

    @functools.cached_property
    def _bos(self) -> str:
        """The token with which the template begins every conversation; "" if it begins every turn, too.

        Some models have one token for both purposes.
        """
        bos = self._wrapped.bos_token
        if not isinstance(bos, str):
            return ""
        turn = {"role": "user", "content": "."}
        conversation = [turn, {"role": "assistant", "content": "."}, turn]
        try:
            if not self._render(conversation, True, None, {"bos_token": ""}).startswith(bos):
                return bos  # the template itself calls it that
            return bos if self._render(conversation, True, None).count(bos) == 1 else ""
        except UserError:  # one that knows no second turn
            return bos

    @functools.cached_property
    def _opening(self) -> str:
        """The text that a cartridge stands for if it is not known which turns follow."""
        try:
            return self._parted([{"role": "user", "content": "."}], True, None)[0]
        except UserError:  # no chat template, or one that refuses even this
            return ""

    def _ids_behind(self, opening: str, text: str) -> list[int]:
        """Gives the ids of `text` behind `opening`, as many tokenizers put a space at the beginning of a text."""
        before, whole = self.encode(opening), self.encode(opening + text)
        return whole[len(before) :] if whole[: len(before)] == before else self.encode(text)

    @functools.cached_property
    def fingerprint(self) -> str:
        """The SHA-256 of vocabulary, merges and chat template, whichever files they came from.

        A GGUF file and a Hugging Face folder of one tokenizer have the same. It leaves out what they write differently:
        the pre-tokenizer (one split has several spellings), which tokens are called special, and BOS/EOS settings.
        """
        model = json.loads(self._backend.to_str())["model"]
        merges = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model.get("merges", [])]
        vocab = sorted(self._backend.get_vocab().items(), key=lambda item: item[1])
        parts = [vocab, merges, self._wrapped.chat_template or ""]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @property
    def rendering(self) -> str:
        """The SHA-256 of all that turns messages into ids: the tokenizer, its template, and the day if it is set."""
        parts = [self._backend.to_str(), self._wrapped.chat_template, self._wrapped.special_tokens_map, str(self._day)]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


class StreamDecoder:
    """Decodes one token at a time; the pieces put together are what `Tokenizer.decode` gives for all ids at once.

    A character may be spread over several tokens: its first bytes decode to U+FFFD, which is held back until the rest
    is there, or more bytes than a character has. A step decodes only what has come since the last whole character, or
    `MAX_PENDING` tokens, and the token before it (some decoders treat the first token of a text differently), so its
    cost does not grow with the text.
    Exact for byte-level vocabularies (GPT-2's kind: every model that a GGUF file can hold here).
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True):
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        self._context: list[int] = []  # tokens already emitted, which give those that follow their place
        self._pending: list[int] = []
        self._sent = 0  # characters of the decoded context and pending tokens that are out already

    def push(self, token_id: int) -> str:
        """Takes the next token and gives the text that it completes: none while a character is incomplete."""
        if self._skip and self._tokenizer.is_special(token_id):
            return ""
        self._pending.append(token_id)
        text = self._decode()
        held = min(len(text) - len(text.rstrip("\ufffd")), BYTES_OF_A_CHARACTER - 1)
        whole = text[: len(text) - held]
        piece = whole[self._sent :]
        if held and len(self._pending) > MAX_PENDING:
            self._context, self._pending = self._pending[:-held], self._pending[-held:]
            self._sent = len(self._decode()) - held
        elif held:
            self._sent = max(self._sent, len(whole))
        elif piece:
            self._context, self._pending = self._pending, []
            self._sent = len(self._decode())
        else:
            self._pending = []  # tokens without a text
        return piece

    def flush(self) -> str:
        """Gives what was held back, an incomplete character as U+FFFD, and begins anew."""
        piece = self._decode()[self._sent :]
        self._context, self._pending, self._sent = [], [], 0
        return piece

    def _decode(self) -> str:
        return self._tokenizer.decode(self._context + self._pending, skip_special_tokens=self._skip)


def load_tokenizer(files: ModelFiles) -> Tokenizer:
    """Loads the tokenizer that belongs to `files`.

    Raises:
      FileNotFoundError: the folder holds no tokenizer.
      UserError: a damaged file, or a kind of tokenizer that is not supported; the sentence says which.
    """
    if files.gguf is not None:
        return _from_gguf(files.gguf)
    assert files.directory is not None
    return _from_directory(files.directory)


def gguf_metadata(path: Path) -> dict[str, Any]:
    """Reads the key-value part of a GGUF file (version 2 or 3) as Python values.

    `gguf.GGUFReader` makes two numpy arrays for every string: that takes 2 s for a vocabulary of 49k, this 0.05 s.

    Raises:
      UserError: not a GGUF file, a version that is not supported, or a file that ends too early.
    """
    with open(path, "rb") as file:
        if file.read(4) != b"GGUF":
            raise UserError(f"{path} is not a whole GGUF file (it does not begin with 'GGUF'): download it again")
        try:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _read_metadata(data, path)
        except (struct.error, IndexError, KeyError, UnicodeDecodeError, RecursionError) as error:
            raise UserError(
                f"{path} is not a whole GGUF file (its metadata ends early or is garbled): download it again"
            ) from error


def _read_metadata(data: mmap.mmap, path: Path) -> dict[str, Any]:
    version, num_tensors, count = struct.unpack_from("<IQQ", data, 4)
    if version not in (2, 3):
        raise UserError(f"{path} is not a little-endian GGUF file of version 2 or 3: convert it again")
    if max(num_tensors, count) > _MOST_ENTRIES:
        raise IndexError(max(num_tensors, count))
    offset = 24

    def read(kind: int) -> Any:
        nonlocal offset
        if kind == _STRING:
            start = offset + 8
            offset = start + int.from_bytes(data[offset:start], "little")
            if offset > len(data):
                raise IndexError(offset)
            return data[start:offset].decode("utf-8")
        if kind == _ARRAY:
            item, length = struct.unpack_from("<IQ", data, offset)
            offset += 12
            if length > len(data) - offset:  # each has at least a byte
                raise IndexError(length)
            if item not in _SCALARS:
                return [read(item) for _ in range(length)]
            layout = f"<{length}{_SCALARS[item]}"
            values = list(struct.unpack_from(layout, data, offset))
        else:
            layout = f"<{_SCALARS[kind]}"
            (values,) = struct.unpack_from(layout, data, offset)
        offset += struct.calcsize(layout)
        return values

    metadata: dict[str, Any] = {}
    for _ in range(count):
        key = read(_STRING)
        if key in metadata:
            raise KeyError(key)
        (kind,) = struct.unpack_from("<I", data, offset)
        offset += 4
        metadata[key] = read(kind)
    return metadata


def _from_gguf(path: Path) -> Tokenizer:
    metadata = gguf_metadata(gguf_parts(path)[0])
    kind = metadata.get("tokenizer.ggml.model")
    if kind != "gpt2":
        raise UserError(f"{str(path)!r} has a tokenizer of kind {kind!r}: only byte-level BPE ('gpt2') is supported")
    for key in ("tokenizer.ggml.tokens", "tokenizer.ggml.merges"):
        if not isinstance(texts := metadata.get(key), list) or not all(isinstance(text, str) for text in texts):
            raise UserError(f"{str(path)!r} lacks {key}, a list of texts: download it again")
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]

    def token_id(name: str) -> int | None:
        found = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if found is not None and not _is_id(found, len(tokens)):
            raise UserError(f"{str(path)!r} names token {found} as its {name}, of {len(tokens)}: download it again")
        return found

    ids = {"bos": token_id("bos"), "eos": token_id("eos")}
    for name, key in (("unk", "unknown"), ("pad", "padding")):  # nothing here is computed from them
        found = metadata.get(f"tokenizer.ggml.{key}_token_id")
        ids[name] = found if _is_id(found, len(tokens)) else None
    named = {f"{name}_token": tokens[i] for name, i in ids.items() if i is not None}
    wrapped = _fast_class()(
        tokenizer_object=_backend(metadata, path), chat_template=metadata.get("tokenizer.chat_template"), **named
    )
    stops = {i for name in _STOPS if (i := token_id(name)) is not None}
    unnamed = {text for name, texts in _STOPS.items() if token_id(name) is None for text in texts}
    stops |= {i for i, text in enumerate(tokens) if text in unnamed}
    if not stops and wrapped.chat_template:
        raise UserError(f"{str(path)!r} names no token that ends an answer: convert it again, with its eos token")
    return Tokenizer(wrapped, frozenset(stops))


def _is_id(value: object, count: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < count


def _backend(metadata: Mapping[str, Any], path: Path) -> tokenizers.Tokenizer:
    from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
    from tokenizers import Tokenizer as Backend

    pre = metadata.get("tokenizer.ggml.pre")
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    types: list[int] = metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    if len(types) != len(tokens) or any(len(merge) != 2 for merge in merges):
        raise UserError(f"{str(path)!r} has a garbled vocabulary: download it again")
    typed = list(zip(tokens, types, strict=True))
    vocab = {token: i for i, (token, kind) in enumerate(typed) if kind != _UNUSED}
    # Llama 3 looks a whole word up before it merges, and is the one of the four that begins a text with a BOS.
    llama = pre == "llama-bpe"
    try:
        bpe = models.BPE(vocab=vocab, merges=merges, fuse_unk=False, byte_fallback=False, ignore_merges=llama)
    except Exception as error:  # tokenizers raises bare Exception for merges of tokens that are not there
        raise UserError(f"{str(path)!r} has a garbled vocabulary ({error}): download it again") from error
    backend = Backend(bpe)
    if pre == "smollm":
        first, own_regex = [pre_tokenizers.Digits(individual_digits=True)], True
    elif pre == "gpt-2":
        first, own_regex = [], True
    elif pre in ("llama-bpe", "qwen2"):
        first, own_regex = [pre_tokenizers.Split(Regex(_LLAMA3 if llama else _QWEN2), behavior="isolated")], False
    else:
        raise UserError(f"{str(path)!r} splits text by {pre!r}: known are {', '.join(map(repr, _PRE_TOKENIZERS))}")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=own_regex)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*first, byte_level])
    backend.decoder = decoders.ByteLevel()
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.add_special_tokens([AddedToken(t, normalized=False) for t, k in typed if k == _CONTROL])
    backend.add_tokens([AddedToken(t, normalized=False) for t, k in typed if k == _USER_DEFINED])
    around: list[list[int]] = []  # what stands before a text, and behind it
    for name, default in (("bos", llama), ("eos", False)):
        token = metadata.get(f"tokenizer.ggml.{name}_token_id")
        added = token is not None and metadata.get(f"tokenizer.ggml.add_{name}_token", default)
        around.append([token] if added else [])
    if any(around):
        before, behind = ([tokens[token] for token in side] for side in around)
        backend.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *behind],
            special_tokens=[(tokens[token], token) for side in around for token in side],
        )
    return backend


def _from_directory(path: Path) -> Tokenizer:
    if (path / "tokenizer.json").is_file():
        # The class that tokenizer_config.json names may rebuild the splitting rules; the file itself is the truth.
        load = _fast_class().from_pretrained
    elif any((path / name).is_file() for name in ("tokenizer.model", "vocab.json")):
        load = _auto_class().from_pretrained
    else:
        raise FileNotFoundError(f"{str(path)!r} has no tokenizer: expected tokenizer.json (or tokenizer.model) there")
    try:
        wrapped = load(str(path), local_files_only=True)
    except Exception as error:  # tokenizers raises bare Exception for a file it cannot parse
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"the tokenizer in {str(path)!r} cannot be read: {reason}") from error
    if getattr(wrapped, "backend_tokenizer", None) is None:
        raise UserError(f"the tokenizer in {str(path)!r} has no fast form: convert it to a tokenizer.json")
    stops = {wrapped.eos_token_id} - {None} | _listed_stops(path)
    if not stops and wrapped.chat_template:
        raise UserError(
            f"the tokenizer in {str(path)!r} names no token that ends an answer: say which in eos_token_id of "
            "generation_config.json"
        )
    return Tokenizer(wrapped, frozenset(stops))


def _listed_stops(path: Path) -> set[int]:
    """Reads `eos_token_id`, one or several, from generation_config.json, or from config.json if it is not there."""
    for name in ("generation_config.json", "config.json"):
        listed = read_json(path / name).get("eos_token_id") if (path / name).is_file() else None
        if listed is None:
            continue
        ids = listed if isinstance(listed, list) else [listed]
        if not all(_is_id(i, 2**31) for i in ids):
            raise UserError(f"{path / name} has eos_token_id {listed!r}, expected the ids that end an answer")
        return set(ids)
    return set()


def _fast_class() -> type[PreTrainedTokenizerFast]:
    with _QuietImport():
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast


def _auto_class() -> Any:
    with _QuietImport():
        from transformers import AutoTokenizer  # 0.3 s more than the class above

        return AutoTokenizer


class _QuietImport(logging.Filter):
    """A filter that drops the line which transformers logs at import when torch is absent."""

    def __enter__(self) -> None:
        logging.getLogger("transformers").addFilter(self)

    def __exit__(self, *_: object) -> None:
        logging.getLogger("transformers").removeFilter(self)

    def filter(self, record: logging.LogRecord) -> bool:
        return "PyTorch was not found" not in record.getMessage()
