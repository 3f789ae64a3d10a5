"""Which stretch of the document a batch of conversations is about.

A window of random length slides over the document, hanging over both ends so that the first and the last token are
seen as often as any other, and is cut where it hangs over (but never below `min_tokens`).
"""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import tokenizers

from synth.config import ChunkerConfig

_SENTENCE_START = re.compile(r"(?:\n|[.!?][\"')\]]*\s)\s*")


class Tokenizer(Protocol):
    async def tokenize(self, text: str) -> list[int]: ...
    async def detokenize(self, token_ids: Sequence[int]) -> str: ...


class LocalTokenizer:
    """A tokenizer.json, a folder that holds one, or a Hub id."""

    def __init__(self, source: str):
        path = Path(source)
        path = path / "tokenizer.json" if path.is_dir() else path
        try:
            is_file = path.is_file() or path.name == "tokenizer.json" or path.is_absolute()
            load = tokenizers.Tokenizer.from_file if is_file else tokenizers.Tokenizer.from_pretrained
            self._tokenizer = load(str(path) if is_file else source)
        except Exception as error:  # the library raises plain Exception for a missing file and for a bad one
            raise ValueError(f"config.chunker.tokenizer {source!r} cannot be loaded: {error}") from error

    async def tokenize(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=False)


@dataclasses.dataclass(frozen=True)
class Chunk:
    text: str
    start: int  # in tokens of the document, to within one character
    end: int


class TokenChunker:
    def __init__(self, config: ChunkerConfig, tokenizer: Tokenizer, text: str, token_ids: Sequence[int]):
        self._config, self._tokenizer, self._text, self._token_ids = config, tokenizer, text, token_ids

    @classmethod
    async def create(cls, config: ChunkerConfig, tokenizer: Tokenizer, text: str) -> TokenChunker:
        return cls(config, tokenizer, text, await tokenizer.tokenize(text))

    def span(self, rng: random.Random, position: float) -> tuple[int, int]:
        """Tokens [start, end) of the window whose place on its way over the document is `position`, in [0, 1)."""
        shortest, total = self._config.min_tokens, len(self._token_ids)
        length = rng.randint(shortest, self._config.max_tokens)
        if total <= length:
            return 0, total
        start = int(position * (total + length - 1)) - (length - 1)
        end = start + length
        return max(0, min(start, total - shortest)), min(total, max(end, shortest))

    async def chunk(self, rng: random.Random, position: float) -> Chunk:
        start, end = self.span(rng, position)
        if (start, end) == (0, len(self._token_ids)):
            return Chunk(self._text, start, end)
        # Tokens at either edge may hold a part of a character only.
        text = (await self._tokenizer.detokenize(self._token_ids[start:end])).strip("\ufffd")
        # A chunk that begins with half a sentence invites questions about that half.
        found = _SENTENCE_START.search(text)
        if start > 0 and found:
            rest = text[found.end() :]
            kept = len(await self._tokenizer.tokenize(rest)) if rest else 0
            if self._config.min_tokens <= kept <= end - start:
                start, text = end - kept, rest
        return Chunk(text, start, end)
