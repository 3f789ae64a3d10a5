"""Texts and JSON that other programs wrote: every character arrives, and can be written again."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cartridges_jax.command_line import files
from cartridges_jax.command_line.errors import UserError

EXAMPLE = "examples/document.txt"  # the package brings it

# `str.splitlines` takes each of these for the end of a line, and JSON takes it for a character.
BREAKS = "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_says_how_a_text_is_encoded(tmp_path: Path, encoding: str):
    path = tmp_path / "a.txt"
    path.write_bytes("Grüße,\r\n中文\rend\n".encode(encoding))
    assert files.read_text(path, "a text") == "Grüße,\n中文\nend\n"
    path.write_bytes('{"a": "é"}'.encode(encoding))
    assert files.parse_json(files.read_text(path, "JSON"), "x") == {"a": "é"}


@given(st.lists(st.dictionaries(st.text(BREAKS + 'ab\\"'), st.text(BREAKS + "é\r\n\\u")), max_size=4))
def test_a_line_of_json_ends_with_a_line_feed_and_with_nothing_else(records: list[dict[str, str]]):
    text = "".join(json.dumps(record, ensure_ascii=False) + "\r\n\r\n" for record in records)
    found = [(number, files.parse_json(line, "x")) for number, line in files.json_lines(text)]
    assert found == [(2 * i + 1, record) for i, record in enumerate(records)]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (r'"a\ud800b"', "a\ufffdb"),
        (r'"\udc00\ud800"', "\ufffd\ufffd"),
        (r'"\ud83d\ude00"', "\U0001f600"),
        (r'"\uD83D\uDE00\ud83d"', "\U0001f600\ufffd"),
        (r'"\ud83d\ud83d\ude00"', "\ufffd\U0001f600"),
        (r'"C:\\ud800\\"', "C:\\ud800\\"),
        (r'"\\\ud800"', "\\\ufffd"),
        (r'{"\ud800": ["\udfff"]}', {"\ufffd": ["\ufffd"]}),
        (b'"\xed\xa0\x80!"', "\ufffd!"),
        (b'"\xed\xa0\xbd\xed\xb8\x80"', "\U0001f600"),
        (b'\xef\xbb\xbf{"a": 1}', {"a": 1}),
        ('\ufeff{"a": 1}', {"a": 1}),
    ],
)
def test_a_lone_surrogate_is_replaced(text: str | bytes, value: Any, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING, "cartridges_jax.command_line"):
        assert files.parse_json(text, "x") == value
    assert ("U+FFFD" in caplog.text) == ("\ufffd" in str(value))
    json.dumps(value, ensure_ascii=False).encode()


def test_what_is_no_json():
    with pytest.raises(UserError, match="is not JSON"):
        files.parse_json("[" * 100_000, "x")
    with pytest.raises(UserError, match="is not JSON"):
        files.parse_json(b"\xff\xfe\x00", "x")
    assert list(files.json_lines("\ufeff1\n\ufeff2")) == [(1, "1"), (2, "2")]


def test_a_shipped_file_is_taken_from_the_working_folder_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert files.read_text(EXAMPLE, "a text").startswith("Harn Point Tide Station")
    files.write_text(EXAMPLE, "mine")
    assert files.read_text(EXAMPLE, "a text") == "mine"


@pytest.mark.parametrize("name", ["serve.py", "command_line/files.py", "examples", "examples/none.txt", ".", "/none"])
def test_no_other_file_of_the_package_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    monkeypatch.chdir(tmp_path)
    assert files.find(name) == Path(name)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        files.read_text(name, "a text")
