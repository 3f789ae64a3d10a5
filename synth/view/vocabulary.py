"""Turns token ids into texts, by the bytes that a tokenizer.json or a GGUF file gives for each.

A token may be a part of a character only, so the bytes of a message's tokens are joined before they are decoded.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers

from cartridges_jax.command_line.errors import UserError

_SPACE = "▁"  # of SentencePiece
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """The bytes of every token, and which tokens are special."""

    tokens: dict[int, bytes]
    special: frozenset[int]

    def text(self, token_id: int) -> str:
        return self.tokens.get(token_id, f"⟨{token_id}⟩".encode()).decode(errors="replace")

    def texts(self, token_ids: Sequence[int]) -> list[str]:
        """A text for each token; joined, they are what the ids spell. A token gets the characters it completes."""
        texts, pending = [], b""
        for place, token_id in enumerate(token_ids):
            pending += self.tokens.get(token_id, f"⟨{token_id}⟩".encode())
            is_last = place == len(token_ids) - 1
            whole = pending if is_last else pending[: len(pending) - _incomplete(pending)]
            texts.append(whole.decode(errors="replace"))
            pending = pending[len(whole) :]
        return texts


def find_vocabulary(source: str | None, model: str | None) -> Vocabulary | None:
    """The vocabulary of `source`, or else of `model` in the Hub's cache, or None, so that the page shows ids.

    Raises:
      UserError: `source` cannot be read.
    """
    if source is None:
        cached = _in_hub_cache(model or "")
        if cached is None:
            log.warning("tokens of %s are shown as ids: name their --tokenizer", model)
        return None if cached is None else _from_json(cached, str(cached))
    path = Path(source).expanduser()
    if path.suffix == ".gguf":
        return _from_gguf(path)
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        file = _in_hub_cache(source) or file
    return _from_json(file, source)


def _in_hub_cache(model: str) -> Path | None:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        return None
    from huggingface_hub import try_to_load_from_cache  # slow, and needed by few

    found = try_to_load_from_cache(model, "tokenizer.json")
    return Path(found) if isinstance(found, str) else None


def _from_json(path: Path, source: str) -> Vocabulary:
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception for a missing file and for a bad one
        raise UserError(f"--tokenizer {source} cannot be read: {error}") from error
    is_byte_level = '"ByteLevel"' in json.dumps(json.loads(tokenizer.to_str()).get("decoder"))
    added = tokenizer.get_added_tokens_decoder()
    names = ((token_id, name) for name, token_id in tokenizer.get_vocab().items())
    return _vocabulary(names, {i: token.content for i, token in added.items()}, is_byte_level)


def _from_gguf(path: Path) -> Vocabulary:
    from gguf import GGUFReader  # needed by few

    try:
        fields = GGUFReader(str(path)).fields
        names = [bytes(fields["tokenizer.ggml.tokens"].parts[i]).decode() for i in fields["tokenizer.ggml.tokens"].data]
        kinds = [int(fields["tokenizer.ggml.token_type"].parts[i][0]) for i in fields["tokenizer.ggml.token_type"].data]
        is_byte_level = bytes(fields["tokenizer.ggml.model"].parts[-1]).decode() == "gpt2"
    except (OSError, KeyError, ValueError, IndexError) as error:
        raise UserError(f"--tokenizer {path} cannot be read: {error!r}") from error
    literal = {i: name for i, (name, kind) in enumerate(zip(names, kinds, strict=True)) if kind in (3, 4)}
    return _vocabulary(enumerate(names), literal, is_byte_level)


def _vocabulary(names: Iterable[tuple[int, str]], literal: dict[int, str], is_byte_level: bool) -> Vocabulary:
    read = _byte_level if is_byte_level else _sentence_piece
    tokens = {token_id: read(name) for token_id, name in names}
    tokens |= {token_id: name.encode() for token_id, name in literal.items()}
    return Vocabulary(tokens, frozenset(literal))


def _byte_level(name: str) -> bytes:
    """The bytes of a token of GPT-2's kind, which writes every byte as a printable character."""
    try:
        return bytes(_BYTES[character] for character in name)
    except KeyError:
        return name.encode()


def _sentence_piece(name: str) -> bytes:
    if found := _BYTE.fullmatch(name):
        return bytes([int(found[1], 16)])
    return name.replace(_SPACE, " ").encode()


def _gpt2_alphabet() -> dict[str, int]:
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printed]
    return {chr(b): b for b in printed} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTES = _gpt2_alphabet()


def _incomplete(data: bytes) -> int:
    """How many bytes at the end begin a character that they do not finish."""
    for back in range(1, min(4, len(data)) + 1):
        byte = data[-back]
        if byte >= 0xC0:
            length = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return back if back < length else 0
        if byte < 0x80:
            return 0
    return 0
