from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from cartridges_jax.command_line.errors import UserError
from synth import chunkers
from synth.chunkers import Chunk, LocalTokenizer, Pieces, TokenChunker
from synth.config import ChunkerConfig
from synth.resources.reading import Corpus, Resource
from synth.resources.sections import Section
from synth.resources.text import read


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
    with pytest.raises(UserError, match=r"config\.chunker\.tokenizer .* cannot be loaded"):
        LocalTokenizer(str(tmp_path / "absent" / "tokenizer.json"))


def test_documents_that_cannot_be_used(tmp_path: Path):
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"empty\.txt is empty"):
        read(str(tmp_path / "empty.txt"))
    with pytest.raises(UserError, match=r"latin\.txt is not UTF-8"):
        read(str(tmp_path / "latin.txt"))
    with pytest.raises(FileNotFoundError, match=r"absent\.txt does not exist"):
        read(str(tmp_path / "absent.txt"))


def corpus_of(*resources: Sequence[tuple[str, str]], weights: Sequence[float] = (1.0,) * 9) -> Corpus:
    return Corpus(
        tuple(
            Resource(f"r{i}", tuple(Section(name, text) for name, text in sections), weight)
            for i, (sections, weight) in enumerate(zip(resources, weights, strict=False))
        )
    )


def pieces(config: ChunkerConfig, corpus: Corpus) -> list[Chunk]:
    async def cut_all() -> list[Chunk]:
        cut = await chunkers.create(config, Bytes(), corpus)
        assert isinstance(cut, Pieces)
        return list(dict.fromkeys([await cut.chunk(random.Random(0), i / 500) for i in range(500)]))

    return asyncio.run(cut_all())


def test_tokens_stay_the_default_and_know_their_resource():
    corpus = corpus_of([("a", "x" * 50), ("b", "y" * 50)])
    made = asyncio.run(chunkers.create(ChunkerConfig(10, 20), Bytes(), corpus))
    alone = chunker("x" * 50 + "y" * 50, 10, 20)
    for i in range(20):
        one, other = (asyncio.run(c.chunk(random.Random(i), i / 20)) for c in (made, alone))
        assert (one.text, one.start, one.end, one.resource) == (other.text, other.start, other.end, "r0")


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 300), st.integers(1, 50), st.data())
def test_characters_repeat_the_end_of_the_chunk_before(total: int, size: int, data: st.DataObject):
    overlap = data.draw(st.integers(0, size // 2))
    text = "".join(chr(97 + i % 26) for i in range(total))
    config = ChunkerConfig(kind="characters", characters=size, overlap=overlap)
    found = pieces(config, corpus_of([("a", text)]))
    assert found[0].start == 0 and found[-1].end == total
    for chunk in found:
        assert chunk.text == text[chunk.start : chunk.end] and len(chunk.text) == min(size, total)
    for before, after in itertools.pairwise(found):
        assert before.end - after.start >= overlap and after.end > before.end
        assert not overlap or before.text[-overlap:] == after.text[before.end - overlap - after.start :][:overlap]


SECTIONS = [(f"h{i}", f"# h{i}\n" + f"This is sentence {i}.\n\n" * (i % 7 + 1)) for i in range(30)]


@pytest.mark.parametrize("overlap", [0, 40])
def test_structure_keeps_sections_whole(overlap: int):
    config = ChunkerConfig(1, 400, kind="structure", overlap=overlap)
    found = pieces(config, corpus_of(SECTIONS))
    whole = "".join(text for _, text in SECTIONS)
    for before, after in itertools.pairwise(found):
        shared = before.end - after.start
        assert shared == overlap
        body = after.text.partition("\n\n")[2]
        repeated = max((n for n in range(len(body)) if before.text.endswith(body[:n].rstrip())), default=0)
        assert repeated >= 0.5 * overlap, "the text itself is repeated"
        assert body.rstrip() in whole
        assert overlap or body.startswith("# h"), "cut where a section begins"
    assert max(len(chunk.text.encode()) for chunk in found) <= 400
    assert all(any(text.strip() in chunk.text for chunk in found) for _, text in SECTIONS)
    assert found[1].text.startswith("h"), "the name of the section leads"


def test_a_section_that_is_too_long_is_cut_between_paragraphs_lines_or_words():
    config = ChunkerConfig(1, 100, kind="structure")
    paragraphs = "".join(f"Paragraph {i} has a few words in it.\n\n" for i in range(20))
    for text in (paragraphs, paragraphs.replace("\n\n", "\n"), paragraphs.replace("\n", " "), "x" * 1000):
        found = pieces(config, corpus_of([("long", text)]))
        assert max(len(chunk.text) for chunk in found) <= 100
        assert "".join("".join(chunk.text.split()) for chunk in found) == "".join(text.split())
        if "\n" in text:
            assert all(chunk.text.startswith("Paragraph") for chunk in found)


@settings(max_examples=40, deadline=None)
@given(st.text("ab .\n", min_size=1, max_size=500), st.integers(10, 60))
def test_structure_loses_nothing(text: str, room: int):
    found = pieces(ChunkerConfig(1, room, kind="structure"), corpus_of([("", text)]))
    assert "".join("".join(chunk.text.split()) for chunk in found) == "".join(text.split())


def test_resources_have_shares_by_weight_each_covered_evenly():
    corpus = corpus_of([("a", "x" * 1000)], [("b", "y" * 1000)], weights=(3.0, 1.0))

    async def draw() -> list[Chunk]:
        cut = await chunkers.create(ChunkerConfig(10, 10), Bytes(), corpus)
        return [await cut.chunk(random.Random(i), i / 4000) for i in range(4000)]

    found = asyncio.run(draw())
    first = [chunk for chunk in found if chunk.resource == "r0"]
    assert len(first) == 3000 and all(set(chunk.text) == {"x"} for chunk in first)
    for part in (first, found[3000:]):
        assert {place for chunk in part for place in range(chunk.start, chunk.end)} == set(range(1000))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"overlap": 1}, "overlap is 1, expected at most 0: windows at random places overlap as they fall"),
        ({"kind": "structure", "overlap": 600}, "overlap is 600, expected at most 512, half a chunk"),
        ({"kind": "characters", "characters": 10, "overlap": 6}, "overlap is 6, expected at most 5, half a chunk"),
        ({"characters": 0}, r"config\.chunker\.characters is 0, expected at least 1"),
    ],
)
def test_chunker_settings_that_cannot_be(settings: dict[str, Any], sentence: str):
    with pytest.raises(UserError, match=sentence):
        ChunkerConfig(**settings)
