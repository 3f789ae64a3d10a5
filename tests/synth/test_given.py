"""Chunks and questions from a folder: what is asked, what is seen, what is scored, and what is refused."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from stub_server import MODEL
from test_self_study import Scorer

from cartridges_jax.command_line.errors import UserError
from synth import conversation, given
from synth.config import ClientConfig, ExistingConfig, GivenConfig, SynthConfig
from synth.conversation import Conversation
from synth.dry_run import describe
from synth.pipeline import synthesize

MakeConfig = Callable[..., SynthConfig]
CHUNKS = {"a.md": "Ada wrote the first program.\n", "b.md": "# Bees\n\nThey dance.\n", "c.md": "Never asked about.\n"}
QUESTIONS: dict[str, list[Any]] = {
    "1.jsonl": [
        {"question": "Who wrote\u2028it?", "chunk": "a.md"},
        {"question": "What was it?", "chunk": "a.md", "answer": "A program."},
    ],
    "2.jsonl": [{"question": "Who dances?", "chunk": "b.md", "answer": None}, {"question": "Why?", "chunk": "b.md"}],
}


@pytest.fixture
def scorer() -> Iterator[Scorer]:
    server = Scorer()
    server.start()
    yield server
    server.stop()


def folder(path: Path, chunks: dict[str, str] = CHUNKS, questions: dict[str, list[Any]] = QUESTIONS) -> str:
    for name, text in chunks.items():
        (path / "chunks" / name).parent.mkdir(parents=True, exist_ok=True)
        (path / "chunks" / name).write_text(text)
    for name, records in questions.items():
        (path / "questions").mkdir(exist_ok=True)
        lines = (one if isinstance(one, str) else json.dumps(one, ensure_ascii=False) for one in records)
        (path / "questions" / name).write_text("".join(line + "\n" for line in lines))
    return str(path)


def make(config: SynthConfig) -> list[Conversation]:
    return conversation.read(asyncio.run(synthesize(config)))


@pytest.fixture
def make_given(scorer: Scorer, make_config: MakeConfig, tmp_path: Path) -> MakeConfig:
    def made(**changes: Any) -> SynthConfig:
        client = ClientConfig(scorer.url, MODEL, timeout_seconds=30.0)
        given = GivenConfig(changes.pop("path", None) or folder(tmp_path / "given"), changes.pop("share", 1.0))
        return make_config(**{"client": client, "given_questions": given, "num_conversations": 4} | changes)

    return made


def test_questions_are_asked_as_they_stand_about_the_chunk_they_name(
    scorer: Scorer, make_given: MakeConfig, capsys: pytest.CaptureFixture[str]
):
    made = make(make_given(description="Notes."))
    assert [one.messages[0].content for one in made] == ["Who wrote\u2028it?", "What was it?", "Who dances?", "Why?"]
    for one, name in zip(made, ("a.md", "a.md", "b.md", "b.md"), strict=True):
        assert f"Notes.\n\n{CHUNKS[name]}" in one.system_prompt and one.metadata["chunk"] == name
        assert one.metadata["seed_prompt_type"] == "given" and one.messages[1].top_logprobs
        assert "Line 1 tells" not in one.system_prompt, "nothing of the resource"
    assert made[1].messages[1].content == "A program." and made[1].metadata["finish_reasons"] == ["given", "given"]
    assert [one.type for one in made] == ["self_study", "distill_existing", "self_study", "self_study"]
    answered = [body for body in scorer.requests if "prompt_logprobs" not in body]
    assert len(answered) == 3 and all(body["logprobs"] for body in answered), "nobody asks for a question"
    assert "given: read 4 questions, 1 of them answered, about 2 chunks; left out: 1 chunks that no" in (
        capsys.readouterr().out
    )


def test_what_lies_beside_the_chunks_stops_no_run_and_is_counted(make_given: MakeConfig, tmp_path: Path):
    chunks = {"cafe\u0301.md": "Coffee.", "empty.md": "", "._a.md": "\0", "deeper/d.md": "Deep.", "e.MD": "Loud."}
    questions: dict[str, list[Any]] = {
        "1.jsonl": [{"question": "What is it?", "chunk": "caf\u00e9.md"}],
        "._1.jsonl": ["\0"],
        "2.json": ["{}"],
    }
    config = make_given(path=folder(tmp_path / "beside", chunks, questions), num_conversations=1)
    assert given.told(config) == (
        "beside: read 1 questions, 0 of them answered, about 1 chunks; left out: 1 chunks that no question names, "
        "3 files that are neither chunks/*.md nor questions/*.jsonl"
    )
    (one,) = make(config)
    assert "Coffee." in one.system_prompt and one.metadata["chunk"] == "caf\u00e9.md"


def test_the_same_again_and_after_a_stop(make_given: MakeConfig, tmp_path: Path):
    whole = make(make_given())
    assert make(make_given(output_dir=str(tmp_path / "again"))) == whole
    part = make_given(output_dir=str(tmp_path / "part"), num_conversations=2)
    assert make(part) == whole[:2]
    moved = folder(tmp_path / "moved")
    grown = dataclasses.replace(part, num_conversations=4, given_questions=GivenConfig(moved))
    assert make(grown) == whole
    other = folder(tmp_path / "other", CHUNKS | {"a.md": "Another text."})
    with pytest.raises(UserError, match=r"given_questions\.path no longer holds the questions and chunks"):
        make(dataclasses.replace(grown, given_questions=GivenConfig(other)))


def test_mixed_into_self_study(make_given: MakeConfig):
    made = make(make_given(num_conversations=16, share=0.25))
    given = [one for one in made if one.metadata["seed_prompt_type"] == "given"]
    assert [one.metadata["conversation_index"] for one in given] == [3, 7, 11, 15] and len(made) == 16
    assert all("chunk_span" in one.metadata for one in made if one not in given)
    with pytest.raises(UserError, match=r"holds 4 questions, but 5 of 20 conversations are to come from there"):
        make(make_given(num_conversations=20, share=0.25))


def test_later_rounds_ask_on(make_given: MakeConfig):
    one, *_ = make(make_given(num_conversations=1, rounds=2))
    assert [message.role for message in one.messages] == ["user", "assistant"] * 2


def test_a_dry_run_shows_them(make_given: MakeConfig):
    shown = asyncio.run(describe(make_given()))
    assert (
        "conversation 0, given" in shown and "Ada wrote the first program." in shown and "Who wrote\u2028it?" in shown
    )


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("{", r"questions/1\.jsonl, line 2, is not JSON"),
        ("3", r"questions/1\.jsonl, line 2 is no question"),
        ({"chunk": "a.md"}, r"line 2 has no question"),
        ({"question": " ", "chunk": "a.md"}, r"line 2 has no question"),
        ({"question": "Who?"}, r"questions/1\.jsonl, line 2 names the chunk None"),
        ({"question": "Who?", "chunk": "d.md"}, r"questions/1\.jsonl, line 2 names the chunk 'd\.md'"),
        ({"question": "Who?", "chunk": "../secret.md"}, r"line 2 names the chunk '\.\./secret\.md'"),
        ({"question": "Who?", "chunk": ["a.md"]}, r"line 2 names the chunk \['a\.md'\]"),
        ({"question": "Who?", "chunk": "a.md", "answer": ""}, r"line 2 has an answer that is no text"),
        ({"question": "Who?", "chunk": "a.md", "answer": 3}, r"line 2 has an answer that is no text"),
    ],
)
def test_lines_that_are_refused(make_given: MakeConfig, tmp_path: Path, line: Any, sentence: str):
    (tmp_path / "secret.md").write_text("secret")
    path = folder(tmp_path / "bad", questions={"1.jsonl": [{"question": "Who?", "chunk": "a.md"}, line]})
    with pytest.raises(UserError, match=sentence):
        make(make_given(path=path, num_conversations=1))


def test_folders_that_are_refused(make_given: MakeConfig, tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"holds no chunks/\*\.md"):
        make(make_given(path=str(tmp_path / "none")))
    with pytest.raises(FileNotFoundError, match=r"holds no questions/\*\.jsonl"):
        make(make_given(path=folder(tmp_path / "half", questions={})))
    with pytest.raises(UserError, match="holds no question in"):
        make(make_given(path=folder(tmp_path / "empty", questions={"1.jsonl": []})))
    (tmp_path / "secret.md").write_text("secret")
    path = folder(tmp_path / "link")
    (tmp_path / "link" / "chunks" / "d.md").symlink_to(tmp_path / "secret.md")
    with pytest.raises(UserError, match=r"d\.md leads out of"):
        make(make_given(path=path))
    with pytest.raises(UserError, match="are both set"):
        make_given(distill_existing=ExistingConfig("logs.jsonl"))
    with pytest.raises(UserError, match=r"given_questions\.share is 0, expected more than 0"):
        GivenConfig("x", 0)
