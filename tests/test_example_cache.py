"""What was laid out is kept, is what would be laid out again, and is made anew where it cannot be trusted."""

from __future__ import annotations

import dataclasses
import datetime
import logging
from collections.abc import Sequence
from pathlib import Path

import chat_templates
import numpy as np
import pytest
import tiny

from cartridges_jax.models.tokenizer import Tokenizer
from cartridges_jax.training import example_cache
from cartridges_jax.training.data import Example, read_examples
from cartridges_jax.training.example_cache import ExampleCache

VOCABULARY = 50_000  # of a model that any of these tokenizers could belong to


def assert_same(found: Sequence[Example], expected: Sequence[Example]) -> None:
    for one, other in zip(found, expected, strict=True):
        for field in dataclasses.fields(Example):
            mine, theirs = getattr(one, field.name), getattr(other, field.name)
            np.testing.assert_array_equal(mine, theirs)
            assert mine.dtype == theirs.dtype


@pytest.fixture
def dataset(tmp_path: Path) -> str:
    return str(tiny.write_dataset(tmp_path / "d.parquet", tiny.model(), count=6))


def kept(folder: Path, dataset: str, tokenizer: Tokenizer, vocab_size: int = VOCABULARY) -> list[Example]:
    cache = ExampleCache(folder, tokenizer, "logprobs", vocab_size)
    examples = cache.read(dataset)
    cache.keep()
    return examples


def test_it_is_read_once(tmp_path: Path, dataset: str, monkeypatch: pytest.MonkeyPatch):
    tokenizer = tiny.model().tokenizer
    laid_out = read_examples(dataset, tokenizer)
    cache = ExampleCache(tmp_path / "run", tokenizer, "logprobs", VOCABULARY)
    assert_same(cache.read(dataset), laid_out)
    assert not (tmp_path / "run").exists(), "a run that is refused leaves nothing"
    cache.keep()
    monkeypatch.setattr(example_cache, "read_examples", lambda *_: pytest.fail("laid out again"))
    assert_same(ExampleCache(tmp_path / "run", tokenizer, "logprobs", VOCABULARY).read(dataset), laid_out)


def test_whatever_rendering_depends_on_has_a_file_of_its_own(tmp_path: Path, dataset: str):
    tokenizer = tiny.model().tokenizer
    folder = tmp_path / "run"
    kept(folder, dataset, tokenizer)
    kept(folder, dataset, tokenizer.on(datetime.date(2025, 3, 1)))
    kept(folder, dataset, chat_templates.tokenizer("qwen3"))
    kept(folder, dataset, chat_templates.tokenizer("r1"))  # another template alone
    kept(folder, str(tiny.write_dataset(tmp_path / "other.parquet", tiny.model(), count=6, seed=1)), tokenizer)
    cache = ExampleCache(folder, tokenizer, "tokens", VOCABULARY)
    cache.read(dataset)
    cache.keep()
    kept(folder, dataset, tokenizer, vocab_size=VOCABULARY + 1)  # in which other rows are refused
    assert len(list(folder.iterdir())) == 7
    kept(folder, dataset, tokenizer)
    assert len(list(folder.iterdir())) == 7


def test_a_damaged_file_is_made_again(tmp_path: Path, dataset: str, caplog: pytest.LogCaptureFixture):
    tokenizer, folder = tiny.model().tokenizer, tmp_path / "run"
    laid_out = kept(folder, dataset, tokenizer)
    [path] = folder.iterdir()
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 3] ^= 1
    for damaged in (b"", whole[: len(whole) // 2], bytes(flipped), b"PK" + whole[:50]):
        path.write_bytes(damaged)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert_same(kept(folder, dataset, tokenizer), laid_out)
        assert "is damaged" in caplog.text and "laid out again" in caplog.text
        assert path.read_bytes() == whole
    with path.open("wb") as file:  # a whole archive that means nothing
        np.savez(file, tokens=np.array([{}], dtype=object))
    assert_same(kept(folder, dataset, tokenizer), laid_out)
