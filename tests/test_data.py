"""Conversations as tokens and targets, and rows that hold each of them once, whole, and apart from its neighbours."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from chat_templates import write_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_runs import config_of, settings_in

from cartridges_jax.command_line.errors import UserError
from cartridges_jax.models.hub import ModelFiles
from cartridges_jax.models.tokenizer import Tokenizer, load_tokenizer
from cartridges_jax.training.data import (
    Example,
    MixConfig,
    PackedRows,
    batches,
    check_lengths,
    dataset_hash,
    example_of,
    exchanges,
    pack,
    read_examples,
    split_dataset,
)
from cartridges_jax.training.evals.during import EvalsConfig, LossEval
from cartridges_jax.training.run import train
from synth import conversation
from synth.conversation import Conversation, Message

# A tokenizer gives text more than one spelling; these ids spell "the cat", as no encoder would.
SAMPLED = "the cat"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tiny.model().tokenizer


def letters(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    """One id per character: valid, and not what `encode` gives."""
    ids = tuple(tokenizer.encode("".join(c))[0] for c in text)
    assert list(ids) != tokenizer.encode(text)
    return ids


def answer(tokenizer: Tokenizer, text: str, ended: bool, ks: list[int] | None = None) -> Message:
    """An answer sampled letter by letter; position i has `ks[i]` entries, the ids i, i+1, … and so on."""
    ids = letters(tokenizer, text) + ((tokenizer.encode(tiny.END)[0],) if ended else ())
    ks = [1] * len(ids) if ks is None else ks
    rows = [[(i + j, -0.5 - j) for j in range(k)] for i, k in zip(range(len(ids)), ks, strict=True)]
    return Message(text, "assistant", ids, tiny.top_logprobs(rows))


def talk(*messages: Message) -> Conversation:
    return Conversation(messages, "SECRET CONTEXT", {})


def test_the_frames_around_messages_are_those_of_the_chat_template(tokenizer: Tokenizer):
    [found] = example_of(talk(Message("Hi", "user"), answer(tokenizer, SAMPLED, ended=True)), tokenizer)
    start, end = tokenizer.encode(tiny.START), tokenizer.encode(tiny.END)
    user, assistant, newline = (tokenizer.encode(text) for text in ("user\n", "assistant\n", "\n"))
    question = tokenizer.encode("Hi")
    expected = [*start, *user, *question, *end, *newline, *start, *assistant, *letters(tokenizer, SAMPLED), *end]
    assert found.tokens.tolist() == expected
    assert found.tokens.dtype == np.int32


def test_a_conversation_without_samples_is_laid_out_as_a_server_would(tokenizer: Tokenizer):
    messages = [Message("Who sleeps in box 3?", "user"), Message("The owl.", "assistant"), Message("Why?", "user")]
    messages.append(Message("It flies.", "assistant"))
    first, second = (example.tokens.tolist() for example in example_of(talk(*messages), tokenizer))
    whole = tokenizer.chat_ids([{"role": m.role, "content": m.content} for m in messages], add_generation_prompt=False)
    assert second == whole[: len(second)] and first == whole[: len(first)]
    assert tokenizer.decode(whole[len(second) :], skip_special_tokens=False) == tiny.END + "\n"
    assert tokenizer.decode(first).endswith("The owl.")


@pytest.mark.parametrize(
    "metadata, role, sentence",
    [
        ({"thinking": "yes"}, "user", r"a conversation's metadata has thinking 'yes', expected true, false"),
        ({}, "narrator", r"the model's chat template refuses these messages: no role narrator"),
    ],
)
def test_what_cannot_be_laid_out_is_named_by_file_and_row(
    tmp_path: Path, metadata: dict[str, Any], role: str, sentence: str
):
    template = "{% if messages[0].role != 'user' %}{{ raise_exception('no role ' + messages[0].role) }}{% endif %}."
    wrong = Conversation((Message("Hi", role), Message("Hello", "assistant")), "", metadata)
    right = Conversation((Message("Hi", "user"), Message("Hello", "assistant")), "", {})
    conversation.write(tmp_path / "d.parquet", [right, right, wrong])
    write_tokenizer(tmp_path / "model", "bytes", template)
    reader = load_tokenizer(ModelFiles("model", directory=tmp_path / "model"))
    with pytest.raises(UserError, match=rf"d\.parquet, row 2 \(counted from 0\): {sentence}"):
        read_examples(tmp_path / "d.parquet", reader, "tokens")


def test_the_last_answer_ends_as_it_was_sampled(tokenizer: Tokenizer):
    question, end = Message("Hi", "user"), tokenizer.encode(tiny.END)[0]
    cut = example_of(talk(question, answer(tokenizer, SAMPLED, ended=False)), tokenizer)[0].tokens
    ended = example_of(talk(question, answer(tokenizer, SAMPLED, ended=True)), tokenizer)[0].tokens
    assert cut[-1] == letters(tokenizer, SAMPLED)[-1]
    assert ended.tolist() == [*cut.tolist(), end]


def test_an_answer_in_the_middle_is_ended_exactly_once(tokenizer: Tokenizer):
    question, more, last = Message("Hi", "user"), Message("And?", "user"), Message("No.", "assistant")
    both = [
        example_of(talk(question, answer(tokenizer, SAMPLED, ended=ended), more, last), tokenizer)[1].tokens.tolist()
        for ended in (True, False)
    ]
    assert both[0] == both[1]
    assert both[0].count(tokenizer.encode(tiny.END)[0]) == 3


def test_an_entry_predicts_the_token_after_its_position(tokenizer: Tokenizer):
    ks = [1, 0, 3, 2, 0, 1, 1, 2]  # ragged, with positions that no entry speaks of
    first = answer(tokenizer, SAMPLED, True, ks)
    conversation_ = talk(Message("Hi", "user"), first, Message("And?", "user"), answer(tokenizer, SAMPLED, False))
    found = example_of(conversation_, tokenizer)
    assert all((np.diff(one.target_index) >= 0).all() for one in found)
    of_first, of_second = (
        list(zip(one.target_index, one.target_ids, one.target_logprobs, strict=True)) for one in found
    )
    start = len(tokenizer.chat_ids([{"role": "user", "content": "Hi"}], add_generation_prompt=True))
    assert tuple(found[0].tokens[start:]) == first.token_ids
    expected = [(start + i - 1, i + j, -0.5 - j) for i, k in enumerate(ks) for j in range(k)]
    assert of_first == expected
    second = len(found[1].tokens) - len(SAMPLED)
    assert [e[0] for e in of_second] == [second + i - 1 for i in range(len(SAMPLED))]
    assert found[1].tokens[of_second[0][0] + 1 :].tolist() == list(letters(tokenizer, SAMPLED))


def test_targets_meet_the_token_that_was_sampled(tmp_path: Path):
    """In the tiny dataset the sampled token is always the likeliest entry: alignment, seen from the data."""
    model = tiny.model()
    for example in read_examples(tiny.write_dataset(tmp_path / "d.parquet", model), model.tokenizer):
        best = example.target_logprobs == np.float32(np.log(0.55))
        np.testing.assert_array_equal(example.tokens[example.target_index[best] + 1], example.target_ids[best])


def test_the_context_is_never_seen(tmp_path: Path):
    model = tiny.model()
    for example in read_examples(tiny.write_dataset(tmp_path / "d.parquet", model), model.tokenizer):
        assert "SECRET" not in model.tokenizer.decode(example.tokens.tolist(), skip_special_tokens=False)


def test_what_synthesis_writes_is_what_training_reads(tmp_path: Path, tokenizer: Tokenizer):
    written = [
        talk(Message("Hi", "user"), answer(tokenizer, SAMPLED, True, [2, 0, 1, 4, 1, 1, 0, 3])),
        talk(Message("No targets", "user"), Message("None.", "assistant")),
        talk(Message("Ho", "user"), answer(tokenizer, SAMPLED, False)),
    ]
    conversation.write(tmp_path / "d.parquet", written)
    found = read_examples(tmp_path / "d.parquet", tokenizer)
    expected = [*example_of(written[0], tokenizer), *example_of(written[2], tokenizer)]
    for a, b in zip(found, expected, strict=True):
        for field in dataclasses.fields(Example):
            np.testing.assert_array_equal(getattr(a, field.name), getattr(b, field.name))
            assert getattr(a, field.name).dtype == getattr(b, field.name).dtype


def test_a_dataset_without_log_probabilities_is_refused(tmp_path: Path, tokenizer: Tokenizer):
    plain = talk(Message("Hi", "user"), Message("Ho", "assistant", tuple(tokenizer.encode("Ho"))))
    for conversations in ([plain], [], [talk(Message("Hi", "user"), answer(tokenizer, SAMPLED, True, [0] * 8))]):
        conversation.write(tmp_path / "d.parquet", conversations)
        with pytest.raises(UserError, match=r"d\.parquet holds no teacher log-probabilities: synthesize with"):
            read_examples(tmp_path / "d.parquet", tokenizer)


def example(number: int, length: int, ks: list[int]) -> Example:
    """Tokens and targets that tell which example they belong to, and where."""
    entries = [(i, 100 * number + i, -float(j) - 0.25) for i, k in enumerate(ks) for j in range(k)]
    index, ids, logprobs = ([e[column] for e in entries] for column in range(3))
    return Example(
        (1000 * number + np.arange(length)).astype(np.int32),
        np.asarray(index, np.int32),
        np.asarray(ids, np.int32),
        np.asarray(logprobs, np.float32),
    )


@st.composite
def example_lists(draw: st.DrawFn) -> list[Example]:
    lengths = draw(st.lists(st.integers(2, 30), min_size=1, max_size=12))
    ks = st.integers(0, 3)
    made = []
    for number, length in enumerate(lengths, start=1):
        counts = draw(st.lists(ks, min_size=length, max_size=length))
        counts[draw(st.integers(0, length - 1))] = draw(st.integers(1, 3))
        made.append(example(number, length, counts))
    return made


@settings(max_examples=60, deadline=None)
@given(example_lists(), st.integers(4, 40), st.integers(1, 3), st.integers(1, 3), st.integers(0, 5))
def test_packed_rows(examples: list[Example], seq_len: int, batch_size: int, num_epochs: int, seed: int):
    rows = PackedRows(examples, seq_len, batch_size, num_epochs, seed)
    assert len(rows) % batch_size == 0
    all_rows = [rows[i] for i in range(len(rows))]
    seen: list[int] = []
    for row in all_rows:
        members = _check_row(row, examples, seq_len)
        seen += members
    # every conversation once an epoch; only what fills up the last batch comes again, from the first rows
    extra = Counter(seen)
    extra.subtract(Counter(range(1, len(examples) + 1)) if num_epochs == 1 else dict.fromkeys(extra, num_epochs))
    padding = Counter(itertools.chain(*(_members(row) for row in all_rows[: batch_size - 1])))
    assert min(extra.values()) >= 0
    assert all(count <= padding[number] * batch_size for number, count in extra.items())
    epoch = Counter(seen[: len(examples)])
    assert epoch == Counter(range(1, len(examples) + 1))


def _members(row: dict[str, np.ndarray]) -> list[int]:
    return [int(t) // 1000 for t in row["tokens"][(row["positions"] == 0) & (row["segment_ids"] > 0)]]


def _check_row(row: dict[str, np.ndarray], examples: list[Example], seq_len: int) -> list[int]:
    """Each segment is one example from its beginning, uncut unless longer than a row; the rest is zero."""
    segments = row["segment_ids"]
    used = int((segments > 0).sum())
    assert row["tokens"].shape == segments.shape == row["positions"].shape == (seq_len,)
    assert (segments[used:] == 0).all() and (row["tokens"][used:] == 0).all()
    assert not row["target_mask"][used:].any()
    assert set(np.diff(segments[:used])) <= {0, 1} and segments[0] == 1
    numbers = []
    for segment in range(1, segments.max() + 1):
        where = np.flatnonzero(segments == segment)
        number = int(row["tokens"][where[0]]) // 1000
        source = examples[number - 1]
        n = min(len(source.tokens), seq_len)
        assert len(where) == n
        np.testing.assert_array_equal(row["tokens"][where], source.tokens[:n])
        np.testing.assert_array_equal(row["positions"][where], np.arange(n))
        for i, position in enumerate(where):
            mask, mine = row["target_mask"][position], source.target_index == i
            assert mask[: mine.sum()].all() and not mask[mine.sum() :].any()
            np.testing.assert_array_equal(row["target_ids"][position][mask], source.target_ids[mine])
            np.testing.assert_array_equal(row["target_logprobs"][position][mask], source.target_logprobs[mine])
            assert not row["target_ids"][position][~mask].any()
        numbers.append(number)
    return numbers


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 50), max_size=200), st.integers(10, 40), st.randoms(use_true_random=False))
def test_packing_keeps_every_example_once_and_no_row_overflows(lengths: list[int], seq_len: int, rng):
    order = list(range(len(lengths)))
    rng.shuffle(order)
    rows = pack(lengths, seq_len, order)
    assert sorted(itertools.chain(*rows)) == sorted(order)
    assert all(sum(min(lengths[i], seq_len) for i in row) <= seq_len for row in rows)
    # first-fit leaves at most one row half empty, as long as every row stays open
    half_empty = [row for row in rows if sum(min(lengths[i], seq_len) for i in row) * 2 <= seq_len]
    assert len(half_empty) <= 1 or len(rows) > 64


def test_a_row_is_the_same_whenever_it_is_asked_for():
    examples = [example(i, 5 + i, [1] * (5 + i)) for i in range(1, 9)]
    rows, again = (PackedRows(examples, 24, 2, 2, seed=3) for _ in range(2))
    forwards = [rows[i] for i in range(len(rows))]
    for i in reversed(range(len(rows))):
        for name, array in again[i].items():
            np.testing.assert_array_equal(array, forwards[i][name])


def test_epochs_and_seeds_order_differently():
    examples = [example(i, 8, [1] * 8) for i in range(1, 21)]

    def order(seed: int) -> list[int]:
        rows = PackedRows(examples, 8, 1, 2, seed)
        return [_members(rows[i])[0] for i in range(len(rows))]

    first, second = order(0)[:20], order(0)[20:]
    assert sorted(first) == sorted(second) == list(range(1, 21))
    assert first != second
    assert order(0) == order(0) != order(1)


def test_the_last_batch_is_filled_up_with_the_first_rows():
    examples = [example(i, 8, [1] * 8) for i in range(1, 6)]
    rows = PackedRows(examples, 8, 4, 1, seed=0)
    assert len(rows) == 8
    assert [_members(rows[i]) for i in (5, 6, 7)] == [_members(rows[i]) for i in (0, 1, 2)]


def test_a_long_conversation_is_cut_and_said_so(caplog: pytest.LogCaptureFixture):
    examples = [example(1, 20, [2] * 20), example(2, 5, [1] * 5)]
    with caplog.at_level(logging.WARNING):
        check_lengths(examples, 8)
    rows = PackedRows(examples, 8, 1, 1, seed=0)
    assert "1 of 2 conversations are longer than seq_len 8 and are cut there" in caplog.text
    long = next(row for row in map(rows.__getitem__, range(2)) if _members(row) == [1])
    assert long["tokens"].tolist() == list(range(1000, 1008))
    assert long["target_mask"].all()  # the last position predicts the first token that was cut: still a target


def test_batches_begin_at_any_step():
    examples = [example(i, 5 + i % 3, [1 + i % 2] * (5 + i % 3)) for i in range(1, 15)]
    rows = PackedRows(examples, 16, 3, 2, seed=0)
    everything = list(batches(rows, 3, 0))
    assert len(everything) == len(rows) // 3
    for i, batch in enumerate(everything):
        np.testing.assert_array_equal(batch.tokens, np.stack([rows[3 * i + j]["tokens"] for j in range(3)]))
        assert batch.target_ids.shape == (3, 16, 2)
    for first in (1, len(everything) - 1):
        rest = list(batches(rows, 3, first))
        assert len(rest) == len(everything) - first
        np.testing.assert_array_equal(rest[0].target_logprobs, everything[first].target_logprobs)


@pytest.mark.parametrize("num_held_out", [1, 4, 12])
def test_a_split_keeps_every_conversation_on_one_side(tmp_path: Path, num_held_out: int):
    path = tiny.write_dataset(tmp_path / "d.parquet", tiny.model())
    rest, held_out = (conversation.read(side) for side in split_dataset(path, num_held_out, tmp_path))
    whole = conversation.read(path)
    assert len(held_out) == num_held_out and len(rest) + len(held_out) == len(whole) == 24
    assert sorted(map(str, rest + held_out)) == sorted(map(str, whole))
    places = [whole.index(c) for c in held_out]
    assert places == sorted(places) and max(np.diff([*places, 24])) == 24 // num_held_out


@pytest.mark.parametrize("num_held_out", [0, 13])
def test_a_split_that_leaves_too_few_is_refused(tmp_path: Path, num_held_out: int):
    path = tiny.write_dataset(tmp_path / "d.parquet", tiny.model())
    with pytest.raises(UserError, match=f"has 24 conversations, too few to keep {num_held_out} out of training"):
        split_dataset(path, num_held_out, tmp_path)


def test_exchanges_are_questions_with_their_answers(tmp_path: Path):
    path = tiny.write_dataset(tmp_path / "d.parquet", tiny.model())
    whole = conversation.read(path)
    assert exchanges(path) == [(c.messages[0].content, c.messages[1].content) for c in whole]
    assert exchanges(path)[0][0].startswith("What is in box")


def test_next_tokens_are_targets_of_every_answer(tokenizer: Tokenizer):
    said = answer(tokenizer, SAMPLED, ended=True)
    asked, plain = Message("question", "user"), Message("later", "assistant")
    examples = example_of(talk(asked, said, asked, plain), tokenizer, "tokens")
    for example, expected in zip(examples, [list(said.token_ids or ()), tokenizer.encode("later")], strict=True):
        assert example.target_ids.tolist() == expected
        np.testing.assert_array_equal(example.tokens[example.target_index + 1], expected)
        assert not example.target_logprobs.any()


def test_answers_without_log_probabilities_do_for_next_tokens(tmp_path: Path, tokenizer: Tokenizer):
    conversation.write(tmp_path / "plain.parquet", [talk(Message("q", "user"), Message("a", "assistant"))])
    with pytest.raises(UserError, match="or train on targets='tokens'"):
        read_examples(tmp_path / "plain.parquet", tokenizer)
    assert len(read_examples(tmp_path / "plain.parquet", tokenizer, "tokens")) == 1
    conversation.write(tmp_path / "none.parquet", [talk(Message("q", "user"))])
    with pytest.raises(UserError, match="holds no answer"):
        read_examples(tmp_path / "none.parquet", tokenizer, "tokens")


def test_a_datasets_hash_is_that_of_its_bytes(tmp_path: Path):
    paths = [tiny.write_dataset(tmp_path / f"{i}.parquet", tiny.model(), count=3, seed=i // 2) for i in range(3)]
    first, same, other = map(dataset_hash, paths)
    assert first == same != other and dataset_hash(*paths[:2]) != first


@pytest.mark.parametrize("where", ["dataset", "mix", "evals"])
def test_ids_beyond_the_models_vocabulary_stop_a_run_before_it_begins(tmp_path: Path, where: str):
    """The model's embedding may have more rows than its tokenizer has ids, and a teacher may name those."""
    model = tiny.model()
    good = tiny.write_dataset(tmp_path / "good.parquet", model)
    (tmp_path / "corpus.txt").write_text(tiny.TEXT)
    ids = (*model.tokenizer.encode("Ho"), model.config.vocab_size)
    top = tiny.top_logprobs([[(token, -0.5)] for token in ids])
    conversation.write(
        tmp_path / "bad.parquet",
        [*conversation.read(good), talk(Message("Hi", "user"), Message("Ho", "assistant", ids, top))],
    )
    bad = str(tmp_path / "bad.parquet")
    settings: dict[str, Any] = {
        "dataset": {"dataset": bad},
        "mix": {"mix": (MixConfig(bad, 0.1),)},
        "evals": {"evals": EvalsConfig(loss=(LossEval("held_out", bad),))},
    }[where]
    config = config_of(settings_in(tmp_path, tmp_path) | {"dataset": str(good)}, **settings)
    sentence = rf"bad\.parquet, row 24, message 1 .*: token_ids holds {ids[-1]}, .* vocabulary of {ids[-1]}"
    with pytest.raises(UserError, match=sentence):
        train(config, model)
    assert not (tmp_path / "run").exists()
    assert len(read_examples(bad, model.tokenizer, vocab_size=ids[-1] + 1)) == 25


@pytest.mark.parametrize("messages", [(), (Message("Hi", "user"),), (Message("a", "assistant"), Message("b", "user"))])
def test_exchanges_without_an_answer_are_refused_by_row(tmp_path: Path, messages: tuple[Message, ...]):
    whole = talk(Message("Hi", "user"), Message("Ho", "assistant"))
    conversation.write(tmp_path / "d.parquet", [whole, talk(*messages)])
    with pytest.raises(UserError, match=r"d\.parquet, row 1 .*: expected a conversation that begins with a question"):
        exchanges(tmp_path / "d.parquet")
    conversation.write(tmp_path / "d.parquet", [])
    with pytest.raises(UserError, match=r"d\.parquet holds no conversation"):
        exchanges(tmp_path / "d.parquet")
