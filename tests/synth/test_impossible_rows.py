"""Rows that cannot be true are refused by file and row, whoever reads them; upstream's types all read as they are."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_legacy import FlatTopLogprobs, TrainingExample, upstream  # noqa: F401  the fixture names their module

from cartridges_jax.command_line.errors import UserError
from synth import conversation, legacy
from synth.conversation import Conversation, Message, TopLogprobs

VOCABULARY = 50
NAN, INF = float("nan"), float("inf")


def row() -> dict[str, Any]:
    """As upstream writes one: two rounds, and a shape of (rows, k)."""
    top = {"token_idx": [0, 0, 1], "token_id": [5, 9, 7], "logprobs": [-0.1, -2.5, 0.0], "shape": [3, 2]}
    asked = {"content": "q", "role": "user", "token_ids": [1, 2], "top_logprobs": None}
    answer = {"content": "a", "role": "assistant", "token_ids": [5, 7, 49], "top_logprobs": top}
    return {"messages": [asked, answer, asked, answer], "system_prompt": "s", "metadata": "{}", "type": "t"}


def changed(message: int, **changes: Any) -> dict[str, Any]:
    """A row with other values in a message, or in its top log-probabilities."""
    made = row()
    found = dict(made["messages"][message])
    top = {**found["top_logprobs"]} if found["top_logprobs"] else {}
    for name, value in changes.items():
        (top if name in top else found)[name] = value
    made["messages"][message] = found | {"top_logprobs": top or None}
    return made


# what is changed in which message, and the sentence
IMPOSSIBLE: dict[str, tuple[int, dict[str, Any], str]] = {
    "an id below 0": (1, {"token_ids": [5, -1, 7]}, "token_ids holds -1, expected ids"),
    "a question's id below 0": (2, {"token_ids": [-7]}, "token_ids holds -7, expected ids"),
    "an id beyond int32": (0, {"token_ids": [2**31]}, "token_ids holds 2147483648, expected ids"),
    "an id that is null": (1, {"token_ids": [5, None, 7]}, "token_ids holds None, expected ids"),
    "an alternative below 0": (3, {"token_id": [5, -9, 7]}, "token_id holds -9, expected ids"),
    "an alternative that wraps": (3, {"token_id": [5, 2**32 + 9, 7]}, "token_id holds 4294967305, expected ids"),
    "an alternative that is null": (1, {"token_id": [5, 9, None]}, "token_id holds None, expected ids"),
    "a place before the message": (1, {"token_idx": [-1, 0, 1]}, "token_idx holds -1, expected places in"),
    "a place behind the message": (3, {"token_idx": [0, 1, 3]}, "token_idx holds 3, expected places in"),
    "places of a message without ids": (1, {"token_ids": None}, "token_idx holds 0, expected places in"),
    "a place that is null": (1, {"token_idx": [0, None, 1]}, "token_idx holds None, expected places in"),
    "places in disorder": (3, {"token_idx": [1, 0, 1]}, "token_idx is not sorted"),
    "a log-probability above 0": (1, {"logprobs": [-0.1, 0.01, -1.0]}, "logprobs holds 0.01.*, expected finite"),
    "one that is NaN": (1, {"logprobs": [-0.1, NAN, -1.0]}, "logprobs holds nan, expected finite"),
    "one that is infinite": (3, {"logprobs": [INF, -1.0, -1.0]}, "logprobs holds inf, expected finite"),
    "one that is -infinity": (3, {"logprobs": [-INF, -1.0, -1.0]}, "logprobs holds -inf, expected finite"),
    "one beyond float32": (3, {"logprobs": [-1e300, -1.0, -1.0]}, "logprobs holds -.*, expected finite"),
    "one that is null": (1, {"logprobs": [-0.1, None, -1.0]}, "logprobs holds None, expected finite"),
    "more entries than k": (3, {"shape": [3, 1]}, "a position has 2 entries, more than the k of 1"),
    "a token twice": (1, {"token_id": [5, 5, 7]}, "a position has the same token_id twice"),
    "a shape below 0": (1, {"shape": [-1, 2]}, "shape holds -1"),
    "a shape of one number": (1, {"shape": [3]}, "shape is not that of rows of k"),
    "a shape that is missing": (1, {"shape": None}, "shape or token_id is missing"),
    "too few log-probabilities": (3, {"logprobs": [-1.0]}, "1 logprobs for 3 token_id"),
    "too many places": (3, {"token_idx": [0, 0, 1, 1]}, "4 token_idx for 3 token_id"),
    "no role": (2, {"role": None}, "its role is null"),
}


INT, FLOAT = pa.int64(), pa.float64()


def schema(token_id: pa.DataType = INT, logprob: pa.DataType = FLOAT) -> pa.Schema:
    """Wider than ours, as pandas and pyarrow infer it."""
    top = {"token_idx": pa.int64(), "token_id": token_id, "logprobs": logprob, "shape": pa.int64()}
    fields = {
        "content": pa.string(),
        "role": pa.string(),
        "token_ids": pa.list_(token_id),
        "top_logprobs": pa.struct([(name, pa.large_list(kind)) for name, kind in top.items()]),
    }
    messages = pa.list_(pa.struct(list(fields.items())))
    return pa.schema([("messages", messages), *((n, pa.string()) for n in ("system_prompt", "metadata", "type"))])


def write(path: Path, rows: list[dict[str, Any]], kind: pa.Schema | None = None) -> Path:
    pq.write_table(pa.Table.from_pylist(rows, schema=kind or schema()), path)
    return path


@pytest.mark.parametrize("case", IMPOSSIBLE)
@pytest.mark.parametrize("place", [0, 600])
def test_what_cannot_be_true_is_refused_by_file_and_row(tmp_path: Path, case: str, place: int):
    message, changes, sentence = IMPOSSIBLE[case]
    path = write(tmp_path / "d.parquet", [*[row()] * place, changed(message, **changes), row()])
    with pytest.raises(UserError, match=rf"d\.parquet, row {place}, message {message} .*: {sentence}") as caught:
        conversation.read(path)
    assert "\n" not in str(caught.value)


def test_only_a_model_says_which_ids_there_are(tmp_path: Path):
    path = write(tmp_path / "d.parquet", [row(), row()])
    assert len(conversation.read(path)) == len(conversation.read(path, vocab_size=VOCABULARY)) == 2
    with pytest.raises(UserError, match=r"row 0, message 1 .*: token_ids holds 49, expected ids of the model's voc"):
        conversation.read(path, vocab_size=VOCABULARY - 1)
    path = write(tmp_path / "d.parquet", [row(), changed(3, token_id=[5, 50, 7])])
    with pytest.raises(UserError, match=r"row 1, message 3 .*: token_id holds 50, expected ids of the model's voc"):
        conversation.read(path, vocab_size=VOCABULARY)


@pytest.mark.parametrize("kind", [pa.int32(), pa.uint16(), pa.uint64(), pa.int64(), pa.float64()])
def test_every_type_of_numbers_reads_the_same(tmp_path: Path, kind: pa.DataType):
    expected = conversation.read(write(tmp_path / "a.parquet", [row()]))
    assert conversation.read(write(tmp_path / "b.parquet", [row()], schema(kind, pa.float32()))) == expected
    assert expected[0].messages[3].token_ids == (5, 7, 49)


def test_what_is_no_number_is_one_sentence(tmp_path: Path):
    made = changed(1, token_id=["5", "9", "7"], token_ids=["5", "7", "9"])
    made["messages"] = [made["messages"][1]]
    with pytest.raises(UserError, match=r"d\.parquet is damaged: numbers are of type .*string, expected integers"):
        conversation.read(write(tmp_path / "d.parquet", [made], schema(pa.string())))
    halves = write(tmp_path / "d.parquet", [changed(0, token_ids=[1.5])], schema(pa.float64()))
    with pytest.raises(UserError, match=r"d\.parquet, row 0, message 0 .*: token_ids holds 1\.5"):
        conversation.read(halves)


TEXTLESS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "content of bytes": (lambda message: message | {"content": b"q"}, "is damaged: content is of type binary"),
    "content of numbers": (lambda message: message | {"content": 1}, "is damaged: content is of type int64"),
    "roles that are numbers": (lambda message: message | {"role": 1}, "is damaged: role is of type int64"),
    "a list for top_logprobs": (
        lambda message: message | {"top_logprobs": [1]},
        "is damaged: what should have token_idx is",
    ),
    "a number for ids": (lambda message: message | {"token_ids": 5}, "is damaged: "),
    "messages of texts": (lambda message: "q", r"it has no messages\[\]\.content"),
}


@pytest.mark.parametrize("case", TEXTLESS)
def test_columns_of_another_kind_are_one_sentence(tmp_path: Path, case: str):
    change, sentence = TEXTLESS[case]
    made = row()
    made["messages"] = [change(made["messages"][0])]
    pq.write_table(pa.Table.from_pylist([made]), tmp_path / "d.parquet")
    with pytest.raises(UserError, match=rf"d\.parquet {sentence}|d\.parquet is not .* {sentence}"):
        conversation.read(tmp_path / "d.parquet")
    pq.write_table(pa.Table.from_pylist([row() | {"messages": made["messages"][0]}]), tmp_path / "d.parquet")
    with pytest.raises(UserError, match=r"d\.parquet is not a conversation dataset: it has no messages\[\]\.content"):
        conversation.read(tmp_path / "d.parquet")


@pytest.mark.parametrize("metadata", ["[1]", "7", "{", '"a"', "[" * 100_000])
def test_metadata_that_is_none(tmp_path: Path, metadata: str):
    path = write(tmp_path / "d.parquet", [row()] * 300 + [row() | {"metadata": metadata}])
    with pytest.raises(UserError, match=r"d\.parquet, row 300 .*: its metadata is no JSON object"):
        conversation.read(path)


def test_the_log_probability_of_certainty_may_be_rounded(tmp_path: Path):
    conversation.read(write(tmp_path / "d.parquet", [changed(1, logprobs=[1e-7, -1.0, 0.0])]))


def test_ids_that_an_array_cannot_hold_are_refused_when_it_is_made():
    for name, value in (("token_id", 2**32 + 5), ("token_id", 1.5), ("token_idx", 0.25)):
        fields: dict[str, Any] = {"token_idx": [0], "token_id": [5], "logprobs": [-1.0], "shape": (1, 1)}
        with pytest.raises(UserError, match=f"in its {name}, expected integers that fit"):
            TopLogprobs(**fields | {name: np.array([value])})


CASES_OF_PICKLES: list[tuple[Callable[[Any], None], str]] = [
    (lambda m: setattr(m, "token_ids", [5, -1]), "token_ids holds -1"),
    (lambda m: setattr(m, "token_ids", [5, 2**70]), "token_ids should be integers"),
    (lambda m: setattr(m, "token_ids", [5, 2.5]), "token_ids should be integers"),
    (lambda m: setattr(m, "token_ids", np.array([5, np.nan])), "token_ids should be integers"),
    (lambda m: setattr(m.top_logprobs, "token_idx", [0, 2]), "token_idx holds 2"),
    (lambda m: setattr(m.top_logprobs, "token_idx", [1, 0]), "token_idx is not sorted"),
    (lambda m: setattr(m.top_logprobs, "logprobs", [-0.1, 0.5]), "logprobs holds 0.5"),
    (lambda m: setattr(m.top_logprobs, "logprobs", [-0.1, None]), "logprobs holds nan"),
    (lambda m: setattr(m.top_logprobs, "token_id", np.array([5, 2**33])), "token_id"),
    (lambda m: setattr(m.top_logprobs, "shape", (2, 0)), "more than the k of 0"),
]


@pytest.mark.parametrize("number", range(len(CASES_OF_PICKLES)))
def test_pickles_too(tmp_path: Path, number: int):
    change, sentence = CASES_OF_PICKLES[number]

    def example() -> TrainingExample:
        top = FlatTopLogprobs([0, 1], [5, 7], [-0.5, -0.25], (2, 20))
        return TrainingExample([TrainingExample.Message("a", "assistant", [5, 7], top)])

    bad = example()
    change(bad.messages[0])
    path = tmp_path / "old.pkl"
    path.write_bytes(pickle.dumps([example(), bad]))
    for read in (lambda: list(legacy.read(path)), lambda: legacy.convert(path, tmp_path / "new.parquet")):
        with pytest.raises(UserError, match=rf"old\.pkl, row 1\b.*{sentence}"):
            read()
    assert not (tmp_path / "new.parquet").exists()


@st.composite
def conversations(draw: st.DrawFn) -> Conversation:
    messages = []
    for _ in range(draw(st.integers(0, 3))):
        ids = draw(st.none() | st.lists(st.integers(0, VOCABULARY - 1), max_size=5))
        top = None
        if ids is not None and draw(st.booleans()):
            one = st.lists(st.integers(0, VOCABULARY - 1), unique=True, max_size=3)
            entries = [(i, token) for i in range(len(ids)) for token in draw(one)]
            logprobs = draw(st.lists(st.floats(-50, 0, width=32), min_size=len(entries), max_size=len(entries)))
            top = TopLogprobs([i for i, _ in entries], [t for _, t in entries], logprobs, (len(ids), 3))
        messages.append(Message(draw(st.text(max_size=3)), "user", None if ids is None else tuple(ids), top))
    return Conversation(tuple(messages), "", {"a": draw(st.integers(0, 9))})


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(conversations(), max_size=6))
def test_what_can_be_true_reads_back(tmp_path: Path, made: list[Conversation]):
    conversation.write(tmp_path / "d.parquet", made)
    assert conversation.read(tmp_path / "d.parquet", VOCABULARY) == made
