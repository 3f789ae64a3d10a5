"""Chunkers choose the stretch of the corpus that a batch of conversations is about, by tokens, structure or characters.

By tokens, a window of random length slides over the document. It hangs over both ends, so that the first and the last
token are seen as often as any other, and is cut off where it does (but never below `min_tokens`). The other kinds cut
the document into pieces once, and a position in the document chooses among them.
"""

from __future__ import annotations

import asyncio
import bisect
import dataclasses
import itertools
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import tokenizers

from cartridges_jax.command_line.errors import UserError
from synth.config import ChunkerConfig
from synth.resources.reading import Corpus, Resource

_BELOW_ONE = 1 - 2**-53
_TOKENIZED_AT_ONCE = 32  # requests, where a server is asked
_LEAST_SHARE = 8  # of a text that is cut in two, the shorter part has at least an eighth
_BORDERS = tuple(map(re.compile, (r"\n[ \t]*\n\s*", r"\n", r"[.!?]\s+", r"\s+")))
_WORD_BEGIN, _LONGEST_WORD = re.compile(r"\s+"), 40
_SENTENCE_START = re.compile(r"(?:\n|[.!?][\"')\]]*\s)\s*")


class Tokenizer(Protocol):
    async def tokenize(self, text: str) -> list[int]: ...
    async def detokenize(self, token_ids: Sequence[int]) -> str: ...


class LocalTokenizer:
    """The tokenizer of a tokenizer.json, of a folder that holds one, or of a Hub id."""

    def __init__(self, source: str):
        path = Path(source)
        path = path / "tokenizer.json" if path.is_dir() else path
        try:
            is_file = path.is_file() or path.name == "tokenizer.json" or path.is_absolute()
            load = tokenizers.Tokenizer.from_file if is_file else tokenizers.Tokenizer.from_pretrained
            self._tokenizer = load(str(path) if is_file else source)
        except Exception as error:  # the library raises plain Exception for a missing file and for a bad one
            raise UserError(f"config.chunker.tokenizer {source!r} cannot be loaded: {error}") from error

    async def tokenize(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=False)


@dataclasses.dataclass(frozen=True)
class Chunk:
    text: str
    start: int  # in tokens of its resource, to within a character's; or in characters, if it was cut by characters
    end: int
    resource: str = ""  # the name of it


class Chunker(Protocol):
    async def chunk(self, rng: random.Random, position: float) -> Chunk:
        """The chunk at `position`, which goes over the corpus from 0 to 1, 1 excluded."""
        ...


async def create(config: ChunkerConfig, tokenizer: Tokenizer, corpus: Corpus) -> Chunker:
    """The chunker of a corpus. Of several resources, each gets a share of the positions by its weight."""
    chunkers = [await _create(config, tokenizer, resource) for resource in corpus.resources]
    return chunkers[0] if len(chunkers) == 1 else Mixture(chunkers, [r.weight for r in corpus.resources])


async def _create(config: ChunkerConfig, tokenizer: Tokenizer, resource: Resource) -> Chunker:
    if config.kind == "structure":
        return Pieces(await _by_structure(config, tokenizer, resource))
    if config.kind == "characters":
        return Pieces(_by_characters(config, resource))
    return await TokenChunker.create(config, tokenizer, resource.to_string(), resource.name)


class TokenChunker:
    def __init__(self, config: ChunkerConfig, tokenizer: Tokenizer, text: str, token_ids: Sequence[int], name: str):
        self._config, self._tokenizer, self._text, self._token_ids = config, tokenizer, text, token_ids
        self._name = name

    @classmethod
    async def create(cls, config: ChunkerConfig, tokenizer: Tokenizer, text: str, name: str = "") -> TokenChunker:
        return cls(config, tokenizer, text, await tokenizer.tokenize(text), name)

    def span(self, rng: random.Random, position: float) -> tuple[int, int]:
        """The tokens from start to before end of the window that is at `position` of its way over the document."""
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
            return Chunk(self._text, start, end, self._name)
        # Tokens at either edge may hold a part of a character only.
        text = (await self._tokenizer.detokenize(self._token_ids[start:end])).strip("\ufffd")
        # A chunk that begins with half a sentence invites questions about that half.
        found = _SENTENCE_START.search(text)
        if start > 0 and found:
            rest = text[found.end() :]
            kept = len(await self._tokenizer.tokenize(rest)) if rest else 0
            if self._config.min_tokens <= kept <= end - start:
                start, text = end - kept, rest
        return Chunk(text, start, end, self._name)


class Pieces:
    """A chunker whose chunks were cut beforehand."""

    def __init__(self, chunks: Sequence[Chunk]):
        self._chunks = chunks

    async def chunk(self, rng: random.Random, position: float) -> Chunk:
        return self._chunks[int(position * len(self._chunks))]


class Mixture:
    def __init__(self, chunkers: Sequence[Chunker], weights: Sequence[float]):
        self._chunkers = chunkers
        self._ends = [end / sum(weights) for end in itertools.accumulate(weights)]

    async def chunk(self, rng: random.Random, position: float) -> Chunk:
        """Asks the chunker in whose share the position lies, for the position inside of that share."""
        which = min(bisect.bisect_right(self._ends, position), len(self._chunkers) - 1)
        start = self._ends[which - 1] if which else 0.0
        inside = (position - start) / (self._ends[which] - start)
        return await self._chunkers[which].chunk(rng, min(max(inside, 0.0), _BELOW_ONE))


def _by_characters(config: ChunkerConfig, resource: Resource) -> list[Chunk]:
    """Cuts a text into windows of one length; the last one is moved back so that it ends with the text."""
    text, size = resource.to_string(), config.characters
    last = max(0, len(text) - size)
    starts = [*range(0, last, size - config.overlap), last]
    return [Chunk(text[i : i + size], i, min(i + size, len(text)), resource.name) for i in starts]


@dataclasses.dataclass(frozen=True)
class _Unit:
    """A section, or a part of one that is too long for a chunk."""

    name: str
    text: str
    tokens: int  # with the name


async def _by_structure(config: ChunkerConfig, tokenizer: Tokenizer, resource: Resource) -> list[Chunk]:
    """Makes chunks of as many whole sections as fit, under the name of the first; long sections are cut at paragraphs.

    A chunk repeats about the last `overlap` tokens of the one before it, from the beginning of a word: all tokens of a
    unit are taken to be equally long.
    """
    room = config.max_tokens - config.overlap
    units = await _units([(section.name, section.text) for section in resource.sections], tokenizer, room)
    tokens = [0, *itertools.accumulate(unit.tokens for unit in units)]
    offsets = [0, *itertools.accumulate(len(unit.text) for unit in units)]
    text = "".join(unit.text for unit in units)
    chunks, first = [], 0
    while first < len(units):
        end = max(first + 1, bisect.bisect_right(tokens, tokens[first] + room) - 1)
        start = max(0, tokens[first] - config.overlap)
        within = bisect.bisect_right(tokens, start) - 1
        share = (start - tokens[within]) / (tokens[within + 1] - tokens[within])
        begin = offsets[within] + round(share * len(units[within].text))
        body = text[_next_word(text, begin, offsets[first]) if share else begin : offsets[end]]
        name = f"{units[within].name}\n\n" if len(resource.sections) > 1 else ""
        chunks.append(Chunk(f"{name}{body.strip()}", start, tokens[end], resource.name))
        first = end
    return chunks


def _next_word(text: str, place: int, end: int) -> int:
    """`place`, or the beginning of the next word if it is inside of one."""
    found = _WORD_BEGIN.search(text, max(0, place - 1), min(end, place + _LONGEST_WORD))
    return found.end() if found else place


async def _units(sections: Sequence[tuple[str, str]], tokenizer: Tokenizer, room: int) -> list[_Unit]:
    units = []
    for i in range(0, len(sections), _TOKENIZED_AT_ONCE):
        at_once = sections[i : i + _TOKENIZED_AT_ONCE]
        counts = await asyncio.gather(*(tokenizer.tokenize(f"{name}\n\n{text}") for name, text in at_once))
        for (name, text), ids in zip(at_once, counts, strict=True):
            halves = _halves(text) if len(ids) > room else None
            if halves:
                units += await _units([(name, half) for half in halves], tokenizer, room)
            else:
                units.append(_Unit(name, text, max(1, len(ids))))
    return units


def _halves(text: str) -> tuple[str, str] | None:
    """Cuts a text near its middle, between paragraphs if it can, else between lines, sentences, words or characters."""
    for border in _BORDERS:
        places = [found.end() for found in border.finditer(text) if 0 < found.end() < len(text)]
        if places:
            place = min(places, key=lambda p: abs(p - len(text) / 2))
            if min(place, len(text) - place) * _LEAST_SHARE >= len(text):
                return text[:place], text[place:]
    return (text[: len(text) // 2], text[len(text) // 2 :]) if len(text) > 1 else None
