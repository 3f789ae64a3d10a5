"""Parts: whatever the order of what ends, and wherever a process ends, each conversation is there once."""

from __future__ import annotations

import random
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from synth import conversation, parts
from synth.conversation import Conversation, Message
from synth.parts import FEW_ROWS, MANY_PARTS, Parts


def one(index: int) -> Conversation:
    return Conversation((Message(f"q{index}", "user"), Message("a", "assistant")), "s", {"conversation_index": index})


def indices(made: Parts) -> list[int]:
    return [c.metadata["conversation_index"] for table in made.tables() for c in conversation.outlines(table)]


@settings(max_examples=5, deadline=None)
@given(st.integers(1, 80), st.integers(1, 9), st.randoms())
def test_each_is_there_once_and_in_order(count: int, most: int, rng: random.Random):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made = Parts(folder, count)
        missing = list(range(count))
        rng.shuffle(missing)
        while missing:
            batch = [missing.pop() for _ in range(min(len(missing), rng.randint(1, most)))]
            made.add([(index, one(index)) for index in batch])
            if rng.random() < 0.1:
                made = Parts(folder, count)
            assert made.finished == count - len(missing)
            assert not any(made.has(index) for index in missing)
        assert indices(made) == list(range(count))
        assert indices(Parts(folder, count)) == list(range(count))


def test_few_files_at_any_speed(tmp_path: Path):
    made = Parts(tmp_path, 150)
    for index in range(150):
        made.add([(index, one(index))])
        assert len(list(tmp_path.iterdir())) <= index // FEW_ROWS + MANY_PARTS + 1
    assert indices(made) == list(range(150))


def test_a_kill_between_joining_and_removing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(parts, "MANY_PARTS", 4)
    folder, copy = tmp_path / "parts", tmp_path / "copy"
    made = Parts(folder, 8)
    for index in range(3):
        made.add([(index, one(index))])
    shutil.copytree(folder, copy)
    made.add([(3, one(3))])
    shutil.copytree(copy, folder, dirs_exist_ok=True)
    again = Parts(folder, 8)
    assert again.finished == 4
    assert [path.name for path in sorted(folder.iterdir())] == ["part-00004.parquet"]
    again.add([(index, one(index)) for index in range(4, 8)])
    assert indices(again) == list(range(8))


def test_parts_of_another_kind_are_left_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    conversation.write(tmp_path / "part-00007.parquet", [one(0)])
    made = Parts(tmp_path, 1)
    assert made.finished == 0 and "was not written by this command" in caplog.text
    made.add([(0, one(0))])
    assert (tmp_path / "part-00008.parquet").exists() and indices(made) == [0]


def test_memory_does_not_grow_with_the_number_of_parts(tmp_path: Path):
    """Only so many parts are open at once, however they lie."""
    made = Parts(tmp_path, 3000)
    for first in range(0, 3000, 100):
        made.add([(index, one(index)) for index in range(first, first + 100)])
    blocks = [table.num_rows for table in made.tables()]
    assert blocks == [1024, 1024, 952]
