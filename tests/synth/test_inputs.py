"""Nothing is lost on the way in: characters that end no line, marks, long cells, halves of pairs; and what is told."""

from __future__ import annotations

import asyncio
import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from stub_server import StubServer

from cartridges_jax.command_line.errors import UserError
from synth import conversation, existing
from synth.config import ExistingConfig, SynthConfig
from synth.conversation import Conversation, Message
from synth.pipeline import synthesize
from synth.resources import reading
from synth.resources.config import ResourceConfig

MakeConfig = Callable[..., SynthConfig]
BREAKS = "\u2028\u2029\x85\x0b\x0c\x1c"
WORDS = f"one{BREAKS}two"


def text_of(path: Path, content: bytes, **settings: Any) -> str:
    path.write_bytes(content)
    config = ResourceConfig(str(path), **settings)
    return reading.read(config, path.parent / "no run").to_string()


def line(record: Any) -> bytes:
    return json.dumps(record, ensure_ascii=False).encode() + b"\n"


def test_no_character_of_a_string_ends_a_line(tmp_path: Path):
    raw = line({"a": WORDS}) + line({"a": "next"})
    assert text_of(tmp_path / "a.jsonl", raw) == f"1/a: {WORDS}\n\n2/a: next\n\n"
    turns = [{"role": "user", "content": WORDS}, {"role": "assistant", "content": WORDS}]
    (tmp_path / "logs.jsonl").write_bytes(b"\xef\xbb\xbf" + line({"messages": turns}) * 2)
    found = existing.read(str(tmp_path / "logs.jsonl"))
    assert [one.messages for one in found] == [tuple(turns)] * 2


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("a.json", '{"é": 1}', "é: 1\n\n"),
        ("a.jsonl", '{"é": 1}\n', "1/é: 1\n\n"),
        ("a.csv", "é,b\n1,2\n", "row 1\né: 1\nb: 2\n\n"),
        ("a.txt", "é\n", "é\n"),
        ("a.md", "# é\n", "# é\n"),
        ("a.html", "<p>é</p>", "é\n"),
        ("a.rst", "é\n", "é\n"),
        ("a.tex", "\\documentclass{é}", "\\documentclass{é}\n"),
    ],
)
def test_byte_order_marks(tmp_path: Path, name: str, content: str, text: str, encoding: str):
    assert text_of(tmp_path / name, content.encode(encoding)) == text
    folder = tmp_path / "folder"
    folder.mkdir()
    assert content.strip() in text_of_folder(folder, name, content.encode(encoding))


def text_of_folder(folder: Path, name: str, content: bytes) -> str:
    (folder / name).write_bytes(content)
    return reading.read(ResourceConfig(str(folder), "directory"), folder).to_string()


def test_a_long_cell(tmp_path: Path):
    assert csv.field_size_limit() != 0
    cell = "x" * 200_000
    assert text_of(tmp_path / "a.csv", f"a,b\n1,{cell}\n".encode()) == f"row 1\na: 1\nb: {cell}\n\n"


def test_halves_of_surrogate_pairs_reach_no_file(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    assert (
        text_of(tmp_path / "a.json", rb'{"a\ud800": "b\udfff", "c": "\ud83d\ude00"}') == "a\ufffd: b\ufffd\nc: 😀\n\n"
    )
    assert "2 halves of surrogate pairs" in caplog.text
    assert text_of(tmp_path / "a.html", b"<p>a&#xD800;</p>") == "a\ufffd\n"
    name = b"caf\xe9.txt".decode("utf-8", "surrogateescape")  # a file name that is not UTF-8
    folder = tmp_path / "folder"
    folder.mkdir()
    assert text_of_folder(folder, name, b"words") == "File: caf\ufffd.txt\n\nwords\n\n"
    assert caplog.text.encode()  # the sentence that names it is itself fit for a terminal
    path = tmp_path / "d.parquet"
    messages = (Message("a\ud800", "user"), Message("b", "assistant"))
    conversation.write(path, [Conversation(messages, "\udc00", {"k": "\udc00"}, "x")])
    (written,) = conversation.read(path)
    assert (written.messages[0].content, written.system_prompt, written.metadata) == (
        "a\ufffd",
        "\ufffd",
        {"k": "\ufffd"},
    )


def test_a_server_that_cuts_a_pair_in_two(server: StubServer, make_config: MakeConfig, tmp_path: Path):
    answer = server._answer

    def cut(body: dict[str, Any]) -> dict[str, Any]:
        reply = answer(body)
        if not body.get("logprobs"):
            reply["choices"][0]["message"]["content"] += " \ud83d"
        return reply

    server._answer = cut  # pyrefly: ignore
    dataset = asyncio.run(synthesize(make_config()))
    made = conversation.read(dataset)
    assert len(made) == 10 and all(one.messages[0].content.endswith(" \ufffd") for one in made)


def test_a_run_says_what_was_read(make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.md").write_text("# A\n\nWords that are long enough to ask about, and a few more of them.\n" * 5)
    (folder / "b.bin").write_bytes(b"\0")
    (folder / "c.txt").write_text("")
    (folder / "d.txt").symlink_to("a.md")
    (folder / "e.log").write_text("x")
    (folder / ".gitignore").write_text("*.log\n")
    config = make_config(resource=ResourceConfig(str(folder), also=(ResourceConfig(str(tmp_path / "document.txt")),)))
    asyncio.run(synthesize(config))
    told = (Path(config.output_dir) / "resources.txt").read_text()
    first, second = told.splitlines()
    assert first.startswith("folder: read 2 files, 6 sections, ")
    assert first.endswith(
        "left out: 1 files that are no texts, 1 empty files, 1 links, 1 files and folders that .gitignore names"
    )
    length = len((tmp_path / "document.txt").read_text())
    assert second == f"document.txt: read 1 sections, {length} characters; nothing was left out"
    assert told in capsys.readouterr().out


def test_every_sentence_is_one(tmp_path: Path):
    """Counts of zero are not told."""
    (tmp_path / "m.mbox").write_bytes(b"From x Mon Jan  1 10:00:00 2024\nSubject: a\n\nb\n")
    found = reading.read(ResourceConfig(str(tmp_path / "m.mbox")), tmp_path).resources[0]
    assert found.told == "m.mbox: read 1 messages, 15 characters; nothing was left out"


def test_a_header_without_end(tmp_path: Path):
    addresses = ", ".join(f"Person {i} <p{i}@example.org>" for i in range(50_000))
    (tmp_path / "m.mbox").write_text(f"From x Mon Jan  1 10:00:00 2024\nTo: {addresses}\nSubject: a\n\nb\n")
    found = reading.read(ResourceConfig(str(tmp_path / "m.mbox")), tmp_path).resources[0]
    text = found.to_string()
    assert "Person 1 <p1@example.org>" in text and text.endswith("Subject: a\n\nb\n\n") and len(text) < 20_000
    assert found.told.endswith("left out: 1 ends of headers that are too long")


def test_an_empty_file_of_logs_is_refused(server: StubServer, make_config: MakeConfig, tmp_path: Path):
    (tmp_path / "logs.jsonl").write_text("\n")
    with pytest.raises(UserError, match="holds 0 conversations"):
        asyncio.run(synthesize(make_config(distill_existing=ExistingConfig(str(tmp_path / "logs.jsonl")))))
