from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import synth
from synth import conversation, dataset
from synth.conversation import Conversation, Message, flatten


def sample(i: int) -> Conversation:
    top = flatten([[(5, -0.1), (9, -2.5)]] * 3)
    metadata = {"seed_prompt_type": ("question", "cloze")[i % 2], "resource": "a.txt", "completion_tokens": [4, 3]}
    return Conversation((Message(f"Who? {i}", "user"), Message("Ada.", "assistant", (5, 7, 2), top)), "é", metadata)


def test_a_run_is_its_dataset_or_its_parts(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="holds no dataset: expected a"):
        dataset.files_of(tmp_path)
    for i in (1, 0):
        conversation.write(tmp_path / "parts" / f"part-{i}.parquet", [sample(i)] * 2)
    parts = dataset.files_of(tmp_path)
    assert [part.name for part in parts] == ["part-0.parquet", "part-1.parquet"]
    conversation.write_tables(tmp_path / "dataset.parquet", map(conversation.read_table, parts), dict)
    assert dataset.files_of(tmp_path) == dataset.files_of(tmp_path / "dataset.parquet")


@pytest.mark.parametrize("whole", [True, False])
def test_load(tmp_path: Path, whole: bool):
    for i in range(3):
        conversation.write(tmp_path / "parts" / f"part-{i}.parquet", [sample(i)])
    if whole:
        parts = map(conversation.read_table, dataset.files_of(tmp_path))
        conversation.write_tables(tmp_path / "dataset.parquet", parts, dict)
    table = synth.load(tmp_path)
    assert list(table.seed_prompt_type) == ["question", "cloze", "question"]
    assert list(table.question_tokens) == [4] * 3, "what metadata says, where there are no ids"
    assert list(table.answer_tokens) == [3] * 3
    assert table.messages[1] == [{"role": "user", "content": "Who? 1"}, {"role": "assistant", "content": "Ada."}]
    assert set(table.resource) == {"a.txt"} and table.metadata[0]["completion_tokens"] == [4, 3]


def test_load_reads_upstreams_files(tmp_path: Path):
    message = {"content": "hi", "role": "user", "token_ids": None, "top_logprobs": None}
    row = {"messages": [message], "system_prompt": "s", "metadata": {"seed_prompt": "x"}, "type": "todo"}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "d.parquet")
    table = synth.load(tmp_path / "d.parquet")
    assert (table.seed_prompt_type[0], table.question_tokens[0]) == ("todo", 0)


def test_top_logprobs_are_not_read(tmp_path: Path):
    conversation.write(tmp_path / "d.parquet", [sample(0)])
    with conversation.open_file(tmp_path / "d.parquet") as file:
        found = dataset.light_columns(file)
    assert any(path.endswith("token_ids.list.element") for path in found)
    assert not any("logprobs" in path for path in found)


def test_the_package_alone_brings_neither_pandas_nor_pyarrow():
    code = "import sys, synth; assert not {'pandas', 'pyarrow', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
