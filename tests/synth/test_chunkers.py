from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from synth.chunkers import LocalTokenizer, TokenChunker
from synth.config import ChunkerConfig, ResourceConfig
from synth.resources.text import TextFile


class Bytes:
    async def tokenize(self, text: str) -> list[int]:
        return list(text.encode())

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        return bytes(token_ids).decode(errors="replace")


def chunker(text: str, low: int, high: int) -> TokenChunker:
    return asyncio.run(TokenChunker.create(ChunkerConfig(low, high), Bytes(), text))


@given(st.integers(1, 400), st.integers(1, 60), st.integers(0, 60), st.integers(0), st.floats(0, 1, exclude_max=True))
def test_span_is_inside_and_of_a_length_asked_for(total: int, low: int, more: int, seed: int, position: float):
    start, end = chunker("x" * total, low, low + more).span(random.Random(seed), position)
    assert 0 <= start < end <= total
    assert end - start == total or low <= end - start <= low + more


@settings(max_examples=20)
@given(st.integers(1, 40), st.integers(0, 40), st.integers(100, 300))
def test_every_token_is_covered_evenly_both_ends_too(low: int, more: int, total: int):
    """No token is seen half as often, or two and a half times as often, as an even share."""
    cut = chunker("x" * total, low, low + more)
    rng = random.Random(0)
    seen = [0] * total
    lengths = 0
    draws = 4000
    for i in range(draws):
        start, end = cut.span(rng, i / draws)
        lengths += end - start
        for token in range(start, end):
            seen[token] += 1
    fair = lengths / total
    assert min(seen) > 0.5 * fair
    assert max(seen) < 2.5 * fair


@given(st.text(alphabet="ab.\n é", min_size=80, max_size=400), st.integers(0), st.floats(0, 1, exclude_max=True))
def test_chunk_text_is_text_of_the_document_at_its_span(text: str, seed: int, position: float):
    chunk = asyncio.run(chunker(text, 20, 60).chunk(random.Random(seed), position))
    assert chunk.text in text
    around = text.encode()[max(0, chunk.start - 1) : chunk.end + 1].decode(errors="ignore")
    assert chunk.text in around and len(around) <= len(chunk.text) + 3
    assert 20 <= chunk.end - chunk.start <= 60 or chunk.text == text


def test_chunk_starts_with_a_sentence():
    text = "".join(f"This is sentence number {i}. " for i in range(100))
    cut = chunker(text, 50, 400)
    chunks = [asyncio.run(cut.chunk(random.Random(i), i / 50)) for i in range(50)]
    assert sum(chunk.text.startswith("This is") for chunk in chunks) > 40


def test_short_text_is_one_whole_chunk():
    assert asyncio.run(chunker("tiny", 10, 20).chunk(random.Random(0), 0.5)).text == "tiny"


def test_local_tokenizer(tmp_path: Path):
    model = tokenizers.models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?")
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()  # type: ignore[attr-defined]
    made.save(str(tmp_path / "tokenizer.json"))
    for source in (tmp_path, tmp_path / "tokenizer.json"):
        local = LocalTokenizer(str(source))
        assert asyncio.run(local.tokenize("a b a")) == [0, 1, 0]
        assert asyncio.run(local.detokenize([0, 1])) == "a b"
    with pytest.raises(ValueError, match=r"config\.chunker\.tokenizer .* cannot be loaded"):
        LocalTokenizer(str(tmp_path / "absent" / "tokenizer.json"))


def test_documents_that_cannot_be_used(tmp_path: Path):
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"empty\.txt is empty"):
        TextFile(ResourceConfig(str(tmp_path / "empty.txt"))).read()
    with pytest.raises(ValueError, match=r"latin\.txt is not UTF-8"):
        TextFile(ResourceConfig(str(tmp_path / "latin.txt"))).read()
    with pytest.raises(FileNotFoundError, match=r"absent\.txt does not exist"):
        TextFile(ResourceConfig(str(tmp_path / "absent.txt"))).read()
