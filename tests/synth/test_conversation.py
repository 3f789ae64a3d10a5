from __future__ import annotations

import math
import resource
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cartridges_jax.command_line.errors import UserError
from synth import conversation
from synth.conversation import Conversation, Message, TopLogprobs, flatten


def sample(number: int = 0) -> Conversation:
    top = flatten([[(5, -0.1), (9, -2.5)], [(7, -3.0), (8, -3.5)]])
    return Conversation(
        (Message(f"Wer? 你好 {number}", "user"), Message("Sie.", "assistant", (5, 7, 2), top)),
        "You know this: é",
        {"seed_prompt": "ask", "nested": {"a": [1, 2]}, "empty": []},
        "self_study",
    )


def test_round_trip(tmp_path: Path):
    path = tmp_path / "deep" / "d.parquet"
    made = [sample(i) for i in range(5)]
    conversation.write(path, made, {"requested": "5"})
    assert conversation.read(path) == made
    assert conversation.read_notes(path)[0] == 5
    assert conversation.read_notes(path)[1]["requested"] == "5"


def test_columns_and_types_are_upstreams(tmp_path: Path):
    conversation.write(tmp_path / "d.parquet", [sample()])
    schema = pq.read_schema(tmp_path / "d.parquet")
    assert schema.names == ["messages", "system_prompt", "metadata", "type"]
    message = {field.name: field.type for field in schema.field("messages").type.value_type}
    assert list(message) == ["content", "role", "token_ids", "top_logprobs"]
    assert message["token_ids"].value_type == pa.int64()
    top = {field.name: field.type.value_type for field in message["top_logprobs"]}
    assert top == {"token_idx": pa.int64(), "token_id": pa.int32(), "logprobs": pa.float32(), "shape": pa.int64()}
    assert schema.field("metadata").type == pa.string()


def test_reads_upstreams_inferred_types(tmp_path: Path):
    """Upstream lets pyarrow infer: metadata structs, `list<null>`, and nothing but nulls are all possible."""
    message = {"content": "hi", "role": "user", "token_ids": None, "top_logprobs": None}
    answer = message | {"role": "assistant", "token_ids": []}
    row = {
        "messages": [message, answer],
        "system_prompt": "s",
        "metadata": {"tool_calls": [], "a": "b"},
        "type": "todo",
    }
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "d.parquet")
    (read,) = conversation.read(tmp_path / "d.parquet")
    assert read.metadata == {"tool_calls": [], "a": "b"}
    assert read.messages == (Message("hi", "user"), Message("hi", "assistant", ()))


def test_tables_keep_order_and_content(tmp_path: Path):
    parts = []
    for i in range(7):
        parts.append(tmp_path / f"{i}.parquet")
        conversation.write(parts[-1], [sample(i)] * (i % 3), {"of": "a part"})
    whole = tmp_path / "all.parquet"
    conversation.write_tables(whole, map(conversation.read_table, parts), lambda: {"requested": "7"})
    made = [sample(i) for i in range(7) for _ in range(i % 3)]
    assert conversation.read(whole) == made
    assert conversation.read_notes(whole)[1].get("requested") == "7" and "of" not in conversation.read_notes(whole)[1]
    for outline, one in zip(conversation.outlines(pq.read_table(whole)), made, strict=True):
        assert [(m.content, m.role) for m in outline.messages] == [(m.content, m.role) for m in one.messages]
        assert outline.metadata == one.metadata


@pytest.mark.parametrize("keep", [0, 10, 0.5, -1])
def test_truncated_file_is_one_sentence(tmp_path: Path, keep: float):
    path = tmp_path / "d.parquet"
    conversation.write(path, [sample()])
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep) if 0 < keep < 1 else int(keep)])
    with pytest.raises(UserError, match=r"d\.parquet is not a whole Parquet file") as caught:
        conversation.read(path)
    assert "\n" not in str(caught.value)


def test_damage_inside_is_one_sentence(tmp_path: Path):
    path = tmp_path / "d.parquet"
    conversation.write(path, [sample(i) for i in range(50)])
    data = bytearray(path.read_bytes())
    data[4:200] = b"\xff" * 196
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"d\.parquet is damaged"):
        conversation.read(path)


def test_foreign_file_names_what_is_missing(tmp_path: Path):
    pq.write_table(pa.table({"messages": ["x"], "type": ["y"]}), tmp_path / "a.parquet")
    with pytest.raises(
        ValueError, match=r"a\.parquet is not a conversation dataset: it has no system_prompt, metadata"
    ):
        conversation.read(tmp_path / "a.parquet")
    row = {"messages": [{"content": "x", "role": "user"}], "system_prompt": "", "metadata": "{}", "type": ""}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "b.parquet")
    with pytest.raises(UserError, match=r"has no messages\[\]\.token_ids, messages\[\]\.top_logprobs"):
        conversation.read(tmp_path / "b.parquet")
    with pytest.raises(FileNotFoundError, match=r"c\.parquet does not exist"):
        conversation.read(tmp_path / "c.parquet")


def test_full_disk_is_one_sentence_and_no_half_file(tmp_path: Path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))
    try:
        with pytest.raises(OSError, match=r"cannot write .*d\.parquet"):
            conversation.write(tmp_path / "d.parquet", [sample()])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_top_logprobs_of_unequal_lengths_are_refused():
    with pytest.raises(UserError, match="2 token_idx, 1 token_id"):
        TopLogprobs(np.array([0, 0]), np.array([1]), np.array([-1.0]), (1, 2))


def test_flatten_keeps_the_leading_entries_that_make_the_mass():
    rows = [[(1, math.log(0.6)), (2, math.log(0.3)), (3, math.log(0.1))]]
    assert flatten(rows, 0.5).token_id.tolist() == [1]
    assert flatten(rows, 0.7).token_id.tolist() == [1, 2]
    assert flatten(rows, 0.95).token_id.tolist() == [1, 2, 3]


def test_flatten_keeps_all_of_a_row_that_never_reaches_the_mass():
    top = flatten([[(1, math.log(0.3)), (2, math.log(0.2))], [(4, math.log(0.995)), (5, math.log(0.001))]])
    assert top.token_idx.tolist() == [0, 0, 1]
    assert top.token_id.tolist() == [1, 2, 4]
    assert top.shape == (2, 2)


rows_of_pairs = st.lists(
    st.lists(st.tuples(st.integers(0, 99), st.floats(-30, -0.01)), max_size=6, unique_by=lambda pair: pair[0]),
    max_size=5,
)


@given(rows_of_pairs, st.floats(0.01, 1.0))
def test_flatten_property(rows: list[list[tuple[int, float]]], mass: float):
    top = flatten(rows, mass)
    for t, row in enumerate(rows):
        kept = [float(x) for x in top.logprobs[top.token_idx == t]]
        assert kept == [float(np.float32(x)) for _, x in sorted(row, key=lambda pair: -pair[1])][: len(kept)]
        probabilities = sorted((math.exp(x) for _, x in row), reverse=True)
        if len(kept) < len(row):
            assert sum(probabilities[: len(kept)]) >= mass * (1 - 1e-9)
        assert not kept or sum(probabilities[: len(kept) - 1]) < mass
