from __future__ import annotations

import base64
import functools
import json
import os
import subprocess
import zipfile
from collections.abc import Callable
from email.message import EmailMessage
from pathlib import Path
from typing import Any

import fpdf
import pypdf
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cartridges_jax.command_line.errors import UserError
from synth.resources import extras, html, mail, reading, slack
from synth.resources.config import ResourceConfig
from synth.resources.sections import Heading, Section, at_definitions, at_headings


def read(path: Path | str, tmp_path: Path, **settings: Any) -> reading.Resource:
    corpus = reading.read(ResourceConfig(str(path), **settings), tmp_path / "no run")
    return corpus.resources[0]


def names(resource: reading.Resource) -> list[str]:
    return [section.name for section in resource.sections]


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_a_text_file_is_its_very_text(tmp_path: Path):
    text = "  One.\r\n\nTwo — é.\n"
    assert read(write(tmp_path / "a.txt", text), tmp_path).to_string() == Path(tmp_path / "a.txt").read_text()


@pytest.mark.parametrize(
    ("encoding", "words"),
    [
        ("gbk", "这是一个关于机器学习的文本文件。模型的训练需要大量的数据。"),
        ("cp932", "これは日本語のテキストです。モデルの訓練にはデータが必要です。"),
        ("cp1251", "Это текст на русском языке, в котором много слов."),
        ("koi8-r", "# -*- coding: koi8-r -*- Это язык."),
        ("cp1251", "<?xml version='1.0' encoding='windows-1251'?><p>Это текст.</p>"),
        ("cp1252", "<meta charset=iso-8859-1>Die Größe „fünf“ wäre höher, le café a été créé."),
    ],
)
def test_texts_that_are_not_utf_8(tmp_path: Path, encoding: str, words: str):
    write(tmp_path / "folder" / "a.txt", f"{words}\n".encode(encoding))
    assert read(tmp_path / "folder", tmp_path).to_string() == f"File: a.txt\n\n{words}\n\n"


@pytest.mark.parametrize("name", ["a.txt", "a.html"])
def test_utf_16_without_a_mark_is_no_text(tmp_path: Path, name: str):
    with pytest.raises(UserError, match="holds zero bytes"):
        read(write(tmp_path / name, "words".encode("utf-16-le")), tmp_path)


MARKDOWN = """Before.

# Guide

    # in a code block

```
# in a fence
```

## Install **now**

> # in a quote

Set
===
Last.
"""


def test_markdown_is_cut_at_its_headings_and_keeps_every_character(tmp_path: Path):
    found = read(write(tmp_path / "guide.md", MARKDOWN), tmp_path)
    assert names(found) == ["guide.md", "Guide", "Guide > Install **now**", "Set"]
    assert found.to_string() == MARKDOWN
    assert found.sections[-1].text == "Set\n===\nLast.\n"


@given(st.text("ab \n"), st.lists(st.tuples(st.integers(0, 50), st.integers(1, 3))))
def test_sections_are_the_whole_text(text: str, marks: list[tuple[int, int]]):
    headings = [Heading(min(place, len(text)), level, f"h{level}") for place, level in sorted(marks)]
    assert "".join(section.text for section in at_headings(text, headings, "x")) == text
    assert "".join(section.text for section in at_definitions(text, "x")) == text


PYTHON = '''"""Module."""
import os

LIMIT = 3


# Why it is here.
@cached
def first(a):
    def inner():
        return a
    return inner


class Second:
    def method(self): ...


async def third(): ...
'''


@pytest.mark.parametrize(
    ("code", "found"),
    [
        (PYTHON, ["x", "x > first", "x > Second", "x > third"]),
        ("package a\n\nfunc (t *T) Do() {\n}\n\ntype T struct {\n}\n", ["x", "x > Do", "x > T"]),
        ("use a;\n\n#[test]\npub fn one() {}\n\nimpl<T> Two for T {\n}\n", ["x", "x > one", "x > Two"]),
        ("import a\n\nexport default async function go(x) {\n}\n", ["x", "x > go"]),
        ("#include <a.h>\n\nint main(int c, char **v) {\n  return f(c);\n}\n", ["x", "x > main"]),
    ],
)
def test_code_is_cut_at_its_outermost_definitions(code: str, found: list[str]):
    sections = at_definitions(code, "x")
    assert [section.name for section in sections] == found
    assert "".join(section.text for section in sections) == code


def test_a_decorator_belongs_to_what_it_decorates():
    _, first, *_ = at_definitions(PYTHON, "x")
    assert first.text.startswith("# Why it is here.\n@cached\ndef first")


def test_a_repository_without_what_gitignore_leaves_out(tmp_path: Path):
    root = tmp_path / "repo"
    kept = {
        "README.md": "# Title\nWords.\n",
        "src/main.py": "def run():\n    pass\n",
        "src/latin.txt": b"caf\xe9",
        "logs/keep.log": "kept",
        "deep/.gitignore": "*.tmp\n!wanted.tmp\n",
        "deep/wanted.tmp": "wanted",
    }
    ignored = {"logs/a.log": "no", "build/out.txt": "no", "deep/b.tmp": "no", "top.tmp2": "no", "deep/er/c.tmp": "no"}
    for name, content in (kept | ignored).items():
        write(root / name, content)
    write(root / ".gitignore", "*.log\n!keep.log\n/build/\n*.tmp2\n")
    write(root / "picture.png", b"\x89PNG\0\0")
    write(root / "empty.txt", "")
    (root / "link.txt").symlink_to(write(tmp_path / "outside.txt", "secret"))
    subprocess.run(["git", "init", "-q", str(root)], check=True)
    found = read(root, tmp_path)
    files = {name.partition(" > ")[0] for name in names(found) if name != "Title"} | {"README.md"}
    listed = subprocess.run(
        ["git", "-C", str(root), "ls-files", "--others", "--exclude-standard"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    texts = set(listed) - {"picture.png", "empty.txt", "link.txt"}
    assert files == texts == {*kept, ".gitignore"}, "what git itself would take"
    text = found.to_string()
    assert "File: src/main.py\n\ndef run" in text and "café" in text and "secret" not in text
    some = read(root, tmp_path, include=("*.py", "*.md"))
    assert "def run" in some.to_string() and "café" not in some.to_string()
    with pytest.raises(UserError, match=r"holds no text that fits config\.resource\.include"):
        read(root, tmp_path, include=("*.rs",))


def test_json_says_the_path_to_every_value(tmp_path: Path):
    tree = {"a": {"x": 1, "y": [True, None], "z": {}}, "b": "two\nlines", "c": [{"d": 0.5}]}
    found = read(write(tmp_path / "t.json", json.dumps(tree)), tmp_path)
    assert found.to_string().split("\n\n") == [
        "a/x: 1",
        "a/y/0: true\na/y/1: null",
        "a/z: {}",
        "b: two\nlines",
        "c/0/d: 0.5",
        "",
    ]
    assert names(found) == ["a", "a/y", "a", "t.json", "c/0"]


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text("xy", max_size=3),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab", min_size=1, max_size=2), inner),
        max_leaves=12,
    )
)
def test_every_path_of_json_is_there(tmp_path_factory: pytest.TempPathFactory, tree: Any):
    def leaves(node: Any, where: str) -> list[str]:
        children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        below = [leaf for key, child in children for leaf in leaves(child, f"{where}/{key}" if where else str(key))]
        return below or [f"{where or '.'}: {node if isinstance(node, str) else json.dumps(node)}"]

    path = write(tmp_path_factory.mktemp("json") / "t.json", json.dumps(tree))
    lines = [line for line in read(path, path.parent).to_string().split("\n") if line]
    assert lines == leaves(tree, "")


def test_a_name_that_occurs_twice_in_json_is_told_twice(tmp_path: Path):
    text = '{"a": "first", "b": {"c": 1, "c": {}}, "a": ["second"]}'
    for name, where in (("t.json", ""), ("t.jsonl", "1/")):
        said = read(write(tmp_path / name, text + "\n"), tmp_path).to_string()
        assert said.split() == f"{where}a: first {where}b/c: 1 {where}b/c: {{}} {where}a/0: second".split()


def test_numbers_of_json_are_as_they_are_written(tmp_path: Path):
    numbers = ("1.10", "12345678901234567890.123", "1e400", "-0", "7" * 5000)
    text = "[" + ", ".join(numbers) + ", true, null]"
    expected = "".join(f"{i}: {number}\n" for i, number in enumerate([*numbers, "true", "null"])) + "\n"
    assert read(write(tmp_path / "t.json", text), tmp_path).to_string() == expected


def test_json_lines_are_counted_from_one(tmp_path: Path):
    found = read(write(tmp_path / "t.jsonl", '{"q": "who"}\n\n{"q": "why"}\n'), tmp_path)
    assert names(found) == ["1", "3"] and "3/q: why" in found.to_string()
    with pytest.raises(UserError, match=r"t\.jsonl, line 2, is not JSON"):
        read(write(tmp_path / "t.jsonl", "1\n{"), tmp_path)
    with pytest.raises(UserError, match="is not JSON"):
        read(write(tmp_path / "deep.json", "[" * 100_000), tmp_path)


def test_csv_rows_stand_alone(tmp_path: Path):
    found = read(write(tmp_path / "t.csv", 'name;"the age"\nAda;36\n"B; C";\n\nD;1;extra\n'), tmp_path)
    assert found.to_string() == (
        "row 1\nname: Ada\nthe age: 36\n\nrow 2\nname: B; C\n\nrow 3\nname: D\nthe age: 1\ncolumn 3: extra\n\n"
    )
    named = read(write(tmp_path / "v.csv", "sep=|\na|b;c\n1|2\n"), tmp_path)
    assert named.to_string() == "row 1\na: 1\nb;c: 2\n\n"
    with pytest.raises(UserError, match="has no row below its first"):
        read(write(tmp_path / "u.csv", "a,b\n"), tmp_path)


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ('id;"Umsatz (EUR, netto, brutto)"\n1;5,30\n', [{"id": "1", "Umsatz (EUR, netto, brutto)": "5,30"}]),
        ('a,b\n"He said \\"hi, there\\"",2\n', [{"a": 'He said "hi, there"', "b": "2"}]),
        ('a,b\n1, "one, two"\n', [{"a": "1", "b": "one, two"}]),
        (
            'a\tb\n1\t"open\n2\tx\n3\t"y" z\n',
            [{"a": "1", "b": '"open'}, {"a": "2", "b": "x"}, {"a": "3", "b": '"y" z'}],
        ),
        ('a,b\n"x,\ny",1\n', [{"a": "x,\ny", "b": "1"}]),
        ('a,b\n"C:\\dir\\","say ""hi"""\n', [{"a": "C:\\dir\\", "b": 'say "hi"'}]),
    ],
)
def test_csv_as_programs_write_it(tmp_path: Path, text: str, rows: list[dict[str, str]]):
    written = (f"row {i}\n" + "".join(f"{k}: {v}\n" for k, v in row.items()) + "\n" for i, row in enumerate(rows, 1))
    found = read(write(tmp_path / "t.csv", text), tmp_path)
    assert found.to_string() == "".join(written) and found.told.endswith("nothing was left out")


def test_csv_with_a_quote_that_is_not_closed(tmp_path: Path):
    found = read(write(tmp_path / "t.csv", "a,b\n" + '"x, y",1\n' * 9 + '"z,1\nq,2\n'), tmp_path)
    assert "q,2" in found.to_string() and found.told.endswith("left out: 1 quotes that are not closed")


HTML = """<!doctype html><html><head><title>The  page</title><style>p {}</style></head><body>
<nav><a href="/">Home</a></nav><h1>First <em>part</em></h1><p>Some <b>bold</b>
text &amp; more.<!-- hidden --></p><ul><li>one<li>two</ul><h2></h2>
<table><tr><th>a</th><th>b</th></tr><tr><td>1</td><td>2</td></tr></table>
<h2>Below</h2><pre>x  =  1
y</pre><script>alert(1)</script></body></html>"""


def test_html_is_what_a_reader_sees(tmp_path: Path):
    found = read(write(tmp_path / "p.html", HTML), tmp_path)
    assert found.to_string().split("\n\n") == [
        "# First part",
        "Some bold text & more.",
        "- one",
        "- two",
        "a | b",
        "1 | 2",
        "## Below",
        "x  =  1\ny\n",
    ]
    assert names(found) == ["First part", "First part > Below"]
    with pytest.raises(UserError, match="holds no text outside its scripts"):
        read(write(tmp_path / "q.html", "<script>1</script>"), tmp_path)


@pytest.mark.parametrize(
    ("page", "text"),
    [
        ("<head><title>T</title><p>words", "words"),
        ("<head><title>T<p>words", "T\n\nwords"),
        ("a<nav><ul><li>b</ul><p>c", "a\n\n- b\n\nc"),
        ("<h2><button>Why?</button></h2>So.", "## Why?\n\nSo."),
        ("10<sup>6</sup>, x<sup>n+1</sup>, the 1<sup>st</sup>, Ca<sup>2+</sup>", "10^6, x^(n+1), the 1st, Ca^2+"),
        ("so<a href=#n><sup>12</sup></a>, so<sup><a href=#n>[3]</a></sup>", "so[12], so[3]"),
        ("<li><sup>12</sup> A note.", "- 12 A note."),
        ("<ruby>漢<rt>kan</rt></ruby><ruby>字<rp>(</rp><rt>ji</rt><rp>)</rp></ruby>", "漢(kan)字(ji)"),
        ("<p>a<![CDATA[ & b]]>", "a & b"),
        ("a<form>b<fieldset>c<select><option>d<option>e</select></form>f<center>g", "a\n\nb\n\nc\n\nd\n\ne\n\nf\n\ng"),
        ("<pre>\n  x = 1\ny\n</pre>", "  x = 1\ny"),
    ],
)
def test_html_as_it_is_written(page: str, text: str):
    assert html.to_text(page) == f"{text}\n"


def test_what_is_left_out_of_html_is_counted(tmp_path: Path):
    page = "<nav>a</nav><nav></nav>Words<button>b</button><noscript>c</noscript><img src=d><svg><title>e</title></svg>"
    found = read(write(tmp_path / "p.html", page + "<iframe src=f></iframe><template>g</template>"), tmp_path)
    assert found.to_string() == "Words\n"
    assert found.told.endswith(
        "left out: 1 navigation menus, 1 buttons, 1 texts for browsers without scripts, 2 pictures, 1 frames"
        ", 1 templates"
    )


def test_html_of_any_depth():
    assert "deep" in html.to_text("<div>" * 20_000 + "deep")


def make_pdf(path: Path, pages: list[str]) -> Path:
    made = fpdf.FPDF()
    made.set_font("Helvetica", size=12)
    for page in pages:
        made.add_page()
        made.multi_cell(0, text=page)
    made.output(str(path))
    return path


def test_pdf_pages(tmp_path: Path):
    found = read(make_pdf(tmp_path / "a.pdf", ["The first page.", "", "The third."]), tmp_path)
    assert names(found) == ["page 1", "page 3"]
    assert found.to_string() == "The first page.\n\nThe third.\n\n"
    inside = read(make_pdf(write(tmp_path / "d" / "x.txt", "y").parent / "b.pdf", ["In a folder."]).parent, tmp_path)
    assert names(inside) == ["b.pdf > page 1", "x.txt"] and "File: b.pdf\n\nIn a folder." in inside.to_string()


def test_a_pdf_with_notes_and_a_form(tmp_path: Path):
    made = fpdf.FPDF()
    made.add_page()
    made.set_font("Helvetica", size=12)
    made.multi_cell(0, text="Words.")
    made.text_annotation(x=10, y=10, text="Not so.")
    made.link(10, 10, 5, 5, "https://a.b")
    made.output(str(tmp_path / "plain.pdf"))
    writer = pypdf.PdfWriter(clone_from=tmp_path / "plain.pdf")
    name, string, array, mapping = (
        getattr(pypdf.generic, f"{kind}Object") for kind in ("Name", "TextString", "Array", "Dictionary")
    )
    values = {"Path": ("Tx", string("/a")), "Agreed": ("Btn", name("/Yes")), "Sent": ("Btn", name("/Off"))}
    values["Signed"] = ("Sig", mapping())
    fields = [
        mapping({name("/T"): string(title), name("/FT"): name(f"/{kind}"), name("/V"): value})
        for title, (kind, value) in values.items()
    ]
    form = {name("/Fields"): array(map(writer._add_object, fields))}
    writer.root_object[name("/AcroForm")] = mapping(form)
    writer.write(tmp_path / "a.pdf")
    found = read(tmp_path / "a.pdf", tmp_path)
    assert found.to_string() == "Words.\n\nNote: Not so.\n\nPath: /a\nAgreed: Yes\n\n"
    assert names(found) == ["page 1", "form"] and "read 1 pages, " in found.told
    form[name("/Fields")] = array(fields)  # which the format does not allow
    writer.root_object[name("/AcroForm")] = mapping(form)
    writer.write(tmp_path / "b.pdf")
    assert read(tmp_path / "b.pdf", tmp_path).told.endswith("left out: 1 forms that cannot be read")


def test_pdfs_that_cannot_be_read(tmp_path: Path):
    whole = make_pdf(tmp_path / "a.pdf", ["Words."])
    with pytest.raises(UserError, match="cannot be read as a PDF"):
        read(write(tmp_path / "cut.pdf", whole.read_bytes()[:100]), tmp_path)
    with pytest.raises(UserError, match="holds no text on its 1 pages: run it through OCR"):
        read(make_pdf(tmp_path / "scan.pdf", [""]), tmp_path)
    locked = pypdf.PdfWriter(clone_from=str(whole))
    locked.encrypt("secret", algorithm="RC4-128")
    locked.write(str(tmp_path / "locked.pdf"))
    with pytest.raises(UserError, match="needs a password"):
        read(tmp_path / "locked.pdf", tmp_path)


def test_mbox(tmp_path: Path):
    plain, rich = EmailMessage(), EmailMessage()
    plain["From"], plain["Subject"] = "Ada <ada@example.org>", "Grüße"
    plain.set_content("Hello.\nFrom here on.\n")
    plain.add_attachment(b"\0", maintype="image", subtype="png")
    rich["From"], rich["Date"] = "b@example.org", "Mon, 1 Jan 2024 10:00:00 +0000"
    rich.set_content("<p>Only <b>HTML</b>.</p><script>no</script>", subtype="html")
    strange = b"Subject: odd\nContent-Type: text/plain; charset=klingon\n\ncaf\xe9\n"
    stored = b"".join(
        b"From x Mon Jan  1 10:00:00 2024\n" + raw.replace(b"\nFrom ", b"\n>From ") + b"\n"
        for raw in (plain.as_bytes(), rich.as_bytes(), strange)
    )
    found = read(write(tmp_path / "m.mbox", stored), tmp_path)
    assert names(found) == ["Grüße", "no subject", "odd"]
    first, second, third = (section.text for section in found.sections)
    assert first.startswith("From: Ada <ada@example.org>\nSubject: Grüße\n\nHello.\n")
    assert second.endswith("\n\nOnly HTML.\n\n") and "Date: Mon, 01 Jan 2024" in second
    assert "café" in third
    with pytest.raises(UserError, match="holds no message"):
        read(write(tmp_path / "n.mbox", "no mail"), tmp_path)


def read_mails(tmp_path: Path, *messages: bytes, envelope: bytes = b"From x Mon Jan  1 10:00:00 2024\n"):
    stored = b"".join(envelope + raw + b"\n" for raw in messages)
    return mail.read_mbox(str(write(tmp_path / "m.mbox", stored)))


@pytest.mark.parametrize(
    "envelope",
    [
        b"From x Mon Jan  1 10:00:00 2024\n",
        b"From 1800@xxx Mon Jan 01 10:00:00 +0000 2024\r\n",
        b"From a b@c.d 2024-01-01 10:00:00\n",
        b"From nobody\n",
    ],
)
def test_a_line_of_a_letter_that_begins_with_from(tmp_path: Path, envelope: bytes):
    first = b"Subject: one\n\nHello.\n\nFrom here on: no header.\nFrom\n>From quoted\n\nFrom Oslo at 10:30\n\nEnd.\n"
    found = read_mails(tmp_path, first, b"Subject: two\n\nFrom the start.\n", envelope=envelope)
    assert [section.name for section in found] == ["one", "two"]
    assert found[0].text.endswith(
        "\n\nHello.\n\nFrom here on: no header.\nFrom\nFrom quoted\n\nFrom Oslo at 10:30\n\nEnd.\n\n"
    )
    assert found[1].text.endswith("From the start.\n\n")


def test_the_first_letter_behind_a_mark_and_one_without_an_empty_line_above(tmp_path: Path):
    envelope = b"From x Mon Jan  1 10:00:00 2024\n"
    stored = b"\xef\xbb\xbf" + envelope + b"Subject: one\n\nWords.\n" + envelope + b"Subject: two\n\nMore.\n"
    found = mail.read_mbox(str(write(tmp_path / "m.mbox", stored)))
    assert [section.name for section in found] == ["one", "two"]


def test_a_letter_in_utf_8_with_one_bad_byte(tmp_path: Path):
    kind = b"Content-Type: text/plain; charset=utf-8\n\n"
    first, second = read_mails(tmp_path, kind + "Grüße, né".encode() + b"\xff\n", kind + b"caf\xe9\n")
    assert first.text == "Grüße, né\ufffd\n\n" and second.text == "café\n\n"


def test_what_is_attached_to_a_letter(tmp_path: Path):
    inner, outer = EmailMessage(), EmailMessage()
    inner["From"], inner["Subject"] = "c@example.org", "inner"
    inner.set_content("Deep words.\n")
    inner.add_attachment("a;b\n1;2\n", subtype="csv", filename="deep.csv")
    outer["Subject"] = "outer"
    outer.set_content("See below.\n")
    outer.add_alternative("<p>See <b>below</b>.</p>", subtype="html")
    outer.add_attachment(inner)
    outer.add_attachment("café\n".encode("latin-1"), maintype="application", subtype="octet-stream", filename="n.txt")
    outer.add_attachment(b'{"a": 1}', maintype="application", subtype="json", filename="d.json")
    outer.add_attachment(inner.as_bytes(), maintype="application", subtype="octet-stream", filename="kept.eml")
    outer.add_attachment(b"\0", maintype="image", subtype="png", filename="p.png")
    found = read_mails(tmp_path, outer.as_bytes())
    text = found[0].text
    order = ["Subject: outer", "See below.", "From: c@example.org", "Deep words.", "--- deep.csv", "1;2"]
    order += ["--- n.txt", "café", '{"a": 1}', "--- kept.eml", "Deep words."]
    place = 0
    for words in order:
        place = text.index(words, place)
    assert text.count("below") == 1, "one of two forms"
    assert str(found).startswith("read 1 messages, ") and str(found).endswith("left out: 1 attachments of image/png")


def test_a_letter_between_pictures_and_one_whose_plain_form_is_empty(tmp_path: Path):
    def part(kind: str, text: str) -> str:
        return f"--x\nContent-Type: {kind}\n\n{text}\n"

    mixed = "Content-Type: multipart/mixed; boundary=x\n\n" + part("text/plain", "Above.") + part("image/png", "..")
    mixed += part("text/plain", "Below.") + part("text/html", "<p>List's footer</p>") + "--x--\n"
    empty = "Content-Type: multipart/alternative; boundary=x\n\n" + part("text/plain", " ")
    empty += part("text/html", "<p>Only here.</p>") + "--x--\n"
    damaged = b"Content-Type: multipart/mixed\n\nStill words.\n"
    first, second, third = read_mails(tmp_path, mixed.encode(), empty.encode(), damaged)
    assert "Still words." in third.text
    assert "Above.\nBelow.\nList's footer" in first.text and "Only here." in second.text


@pytest.mark.parametrize(
    "envelope",
    [
        b"From bob@x 2024-01-02 10:00:00\n",
        b"From MAILER-DAEMON\n",
        b"From - Di Jan 02 10:00:00 2024\n",
        b"From bob@x Tue, 2 Jan 2024 10:00:00 +0000\n",
    ],
)
def test_letters_below_envelopes_of_several_forms(tmp_path: Path, envelope: bytes):
    parts = b"Subject: one\nContent-Type: multipart/mixed; boundary=x\n\n--x\n\nHello.\n--x--\n"
    body = b"\nFrom Mon 10:00 to Fri 17:30, 2024\nNote: bring a pen\n\nFrom Mon 9:00, 2024\nNote: and paper\n\n"
    stored = b"From a@b Mon Jan  1 10:00:00 2024\n" + parts + b"\n" + envelope + b"Received: now\nSubject: two\n" + body
    found = mail.read_mbox(str(write(tmp_path / "m.mbox", stored)))
    assert [section.name for section in found] == ["one", "two"]
    assert "Note: bring a pen\n\nFrom Mon 9:00, 2024\nNote: and paper" in found[1].text


def test_the_forms_and_ends_of_a_letter(tmp_path: Path):
    def parts(kind: str, *inside: str, behind: str = "") -> bytes:
        return (
            f"Content-Type: {kind}; boundary=x\n\n" + "".join(f"--x\n{p}\n" for p in inside) + f"--x--\n{behind}"
        ).encode()

    stub = "Content-Type: text/plain\n\nYour program shows no HTML."
    page = f"Content-Type: text/html\n\n<p>{'What it says. ' * 20}</p>"
    calendar = "Content-Type: text/calendar\n\n" + "RULE\n" * 99 + "LOCATION:Oslo"
    report = "Content-Type: message/delivery-status\n\nReporting-MTA: dns; x\n\nFinal-Recipient: a@b\nStatus: 5.1.1"
    abuse = "Content-Type: message/feedback-report\n\nFeedback-Type: abuse"
    clear_below = b"Content-Transfer-Encoding: base64\n\nSGVsbG8u\n\n_______________\nList mailing list\n"
    letters = read_mails(
        tmp_path,
        parts("multipart/alternative", stub, page),
        parts("multipart/alternative", "\nAt three in Oslo.", calendar),
        parts("multipart/report", report, abuse, behind="The list's footer.\n"),
        clear_below,
    )
    forms, meeting, reports, clear = (letter.text for letter in letters)
    assert "What it says." in forms and "no HTML" not in forms
    assert "At three in Oslo." in meeting and "LOCATION:Oslo" in meeting
    for words in ("Status: 5.1.1", "Feedback-Type: abuse", "The list's footer."):
        assert words in reports
    assert clear == "Hello.\n_______________\nList mailing list\n\n"
    assert str(letters).endswith("nothing was left out")


@pytest.mark.parametrize(
    ("label", "codec", "words"),
    [
        ("gb2312", "gbk", "\u670b\u53cb\u5011"),
        ("shift_jis", "cp932", "\u2460 \u30c6\u30b9\u30c8"),
        ("ks_c_5601-1987", "cp949", "\ub620\ubc29\uac01\ud558"),
        ("iso-8859-1", "cp1252", "\u201cfive\u201d \u20ac"),
    ],
)
def test_charsets_as_letters_label_them(tmp_path: Path, label: str, codec: str, words: str):
    coded = base64.b64encode(words.encode(codec)).decode()
    subject = f"Subject: =?{label}?B?{coded}?=\n"
    plain = f"{subject}Content-Type: text/plain; charset={label}\n\n".encode() + words.encode(codec) + b"\xff.\n"
    page = f'Content-Type: text/html\n\n<meta charset="{label}">'.encode() + words.encode(codec)
    raw = b"Subject: caf\xe9\n\nwords\n"
    first, second, third = read_mails(tmp_path, plain, page, raw)
    assert first.name == words and words in first.text and words in second.text and third.name == "caf\u00e9"


def test_letters_in_files_of_other_names(tmp_path: Path):
    letter = b"Thread-Topic: one\nSubject: one\n\nHello.\n"
    stored = b"From x Mon Jan  1 10:00:00 2024\n" + letter
    root = tmp_path / "folder"
    paths = (
        write(root / "a.eml", letter),
        write(root / "Inbox", stored),
        write(root / "Work.mbox" / "mbox", stored).parent,
    )
    for path in paths:
        assert read(path, tmp_path).to_string() == "Subject: one\n\nHello.\n\n"
    write(root / "notes.txt", "From here on at 10:00:\nno letter.\n")
    assert names(read(root, tmp_path)) == ["Inbox > one", "Work.mbox/mbox > one", "a.eml > one", "notes.txt"]


def test_letters_inside_of_letters_without_end(tmp_path: Path):
    raw = b"Content-Type: message/rfc822\n\n" * 3000 + b"Subject: x\n\nend\n"
    found = read_mails(tmp_path, raw, b"Subject: good\n\nwords\n")
    assert found[-1].name == "good" and found.left_out


USERS = [{"id": "U1", "name": "ada", "profile": {"real_name": "Ada L"}}, {"id": "U2", "name": "bob", "profile": {}}]
DAY = [
    {
        "type": "message",
        "user": "U1",
        "text": "Hi <@U2>, see <https://a.b|this> &lt;now&gt;",
        "ts": "1704103200.000100",
    },
    {"type": "message", "user": "U2", "text": "late reply", "ts": "1704300000.0", "thread_ts": "1704103200.000100"},
    {"type": "message", "user": "U2", "text": "", "ts": "1704103300.0", "files": [{"name": "plan.pdf"}]},
    {"type": "message", "username": "bot", "text": "<!here> done", "ts": "1704103400.0"},
]


@pytest.fixture
def slack_export(tmp_path: Path) -> Path:
    root = tmp_path / "export"
    write(root / "users.json", json.dumps(USERS))
    write(root / "channels.json", json.dumps([{"id": "C1", "name": "general"}]))
    write(root / "general" / "2024-01-01.json", json.dumps(DAY))
    return root


@pytest.mark.parametrize("zipped", [False, True])
def test_slack_export(slack_export: Path, tmp_path: Path, zipped: bool):
    path = slack_export
    if zipped:
        path = tmp_path / "export.zip"
        with zipfile.ZipFile(path, "w") as archive:
            for file in sorted(slack_export.rglob("*.json")):
                archive.write(file, file.relative_to(slack_export))
    found = read(path, tmp_path)
    assert names(found) == ["#general, 2024-01-01"]
    assert found.to_string() == (
        "#general, 2024-01-01\n"
        "10:00 Ada L: Hi @bob, see this (https://a.b) <now>\n"
        "  > 16:40 bob: late reply\n"
        "10:01 bob: [file: plan.pdf]\n"
        "10:03 bot: @here done\n\n"
    )


def slack_text(tmp_path: Path, *messages: dict[str, Any]) -> tuple[str, str]:
    """What is read of messages, without its first line, and the sentence about it."""
    root = tmp_path / "export"
    write(root / "users.json", json.dumps(USERS))
    write(root / "general" / "2024-01-01.json", json.dumps(messages))
    found = slack.read_export(str(root))
    return found[0].text.partition("\n")[2].strip("\n"), str(found)


def at(minute: int, **fields: Any) -> dict[str, Any]:
    return {"type": "message", "user": "U1", "text": "", "ts": str(1704103200 + 60 * minute)} | fields


RICH = {
    "type": "rich_text",
    "elements": [
        {
            "type": "rich_text_section",
            "elements": [
                {"type": "text", "text": "Ask "},
                {"type": "user", "user_id": "U2"},
                {"type": "text", "text": " about "},
                {"type": "link", "url": "https://a.b", "text": "this"},
                {"type": "emoji", "name": "tada"},
            ],
        },
        {
            "type": "rich_text_list",
            "elements": [
                {"type": "rich_text_section", "elements": [{"type": "text", "text": "first"}]},
                {"type": "rich_text_section", "elements": [{"type": "text", "text": "second"}]},
            ],
        },
        {"type": "rich_text_preformatted", "elements": [{"type": "text", "text": "x = 1\ny = 2"}]},
    ],
}
APP = [
    {"type": "header", "text": {"type": "plain_text", "text": "Deploy 7"}},
    {
        "type": "section",
        "text": {"type": "mrkdwn", "text": "By <@U1> &amp; co"},
        "fields": [{"type": "mrkdwn", "text": "*Took* 12 s"}],
        "accessory": {"type": "image", "image_url": "https://i", "alt_text": "a graph"},
    },
    {"type": "context", "elements": [{"type": "mrkdwn", "text": "in Oslo"}]},
    {"type": "actions", "elements": [{"type": "button", "text": {"type": "plain_text", "text": "Undo"}}]},
]


def test_slack_messages_of_blocks_and_attachments(tmp_path: Path):
    attached = {"pretext": "New:", "title": "Crash", "text": "in <https://a.b|main>", "fallback": "never shown"}
    nested = {"blocks": APP[:1], "fallback": "[no preview]"}
    text, _ = slack_text(
        tmp_path,
        at(0, blocks=[RICH]),
        at(1, blocks=APP),
        at(2, text="Deploy 7", blocks=APP[:2]),
        at(3, text="Ask @bob about this", blocks=[RICH]),
        at(4, attachments=[attached, nested, {"fallback": "only this"}]),
    )
    assert text.split("\n") == [
        "10:00 Ada L: Ask @bob about this (https://a.b):tada:",
        "- first",
        "- second",
        "x = 1",
        "y = 2",
        "10:01 Ada L: Deploy 7",
        "By @Ada L & co",
        "*Took* 12 s",
        "a graph",
        "in Oslo",
        "10:02 Ada L: Deploy 7",
        "By @Ada L & co",
        "*Took* 12 s",
        "a graph",
        "10:03 Ada L: Ask @bob about this",
        "10:04 Ada L: New:",
        "Crash",
        "in main (https://a.b)",
        "Deploy 7",
        "only this",
    ]


def test_what_slack_says_of_itself_is_no_knowledge(tmp_path: Path):
    text, told = slack_text(
        tmp_path,
        at(0, subtype="channel_join", text="<@U1> has joined the channel"),
        at(1, subtype="group_leave", text="<@U1> has left the group"),
        at(2, subtype="channel_topic", text="set the channel topic: x"),
        at(3, subtype="tombstone", text="This message was deleted.", thread_ts=at(3)["ts"]),
        at(4, text="still an answer", thread_ts=at(3)["ts"]),
        at(5, subtype="bot_message", username="bot", user=None, text="a bot's words"),
        at(6, subtype="me_message", text="waves"),
        at(7),
        at(8, files=[{"id": "F1", "mode": "tombstone"}, {"name": "a.py", "mode": "snippet", "preview": "x = 1"}]),
        at(9, user="U9", user_profile={"real_name": "Guest"}, text="hello"),
    )
    assert text.split("\n") == [
        "  > 10:04 Ada L: still an answer",
        "10:05 bot: a bot's words",
        "10:06 Ada L: waves",
        "10:08 Ada L: [file: a.py]",
        "x = 1",
        "10:09 Guest: hello",
    ]
    assert told.startswith("read 5 messages, 1 channels, ")
    assert told.endswith(
        "left out: 2 joins and leaves, 1 notices of Slack's (topics, names, pins, archiving), 1 deleted messages, "
        "1 messages without words, 1 deleted or hidden files"
    )


def test_a_slack_message_is_what_its_last_edit_left(tmp_path: Path):
    edit = at(0, text="final", edited={"user": "U1", "ts": "1704105000.0"})
    earlier = at(0, text="between", edited={"user": "U1", "ts": "1704104000.0"})
    text, told = slack_text(
        tmp_path,
        at(30, subtype="message_changed", message=edit, previous_message=earlier),
        at(0, text="draft"),
        at(20, subtype="message_changed", message=earlier),
        at(1, text="gone"),
        at(31, subtype="message_deleted", deleted_ts=at(1)["ts"]),
        at(2, text="gone, too"),
        at(32, subtype="message_changed", message=at(2, subtype="tombstone", text="This message was deleted.")),
    )
    odd = at(3, text="odd", blocks="x", attachments=5, files=3)
    assert slack_text(tmp_path, odd, {"ts": "1"}, {"text": "no time"})[0].endswith("odd")
    assert text == "10:00 Ada L: final" and "read 1 messages" in told and "2 deleted messages" in told


def test_a_slack_message_keeps_what_only_looks_as_if_it_were_said_twice(tmp_path: Path):
    hidden = {"type": "rich_text", "elements": [{"type": "text", "text": "The disk is full."}]}
    snippet = {"name": "a.py", "preview": "x = 1", "lines_more": 90}
    text, told = slack_text(
        tmp_path,
        at(0, text="-5", attachments=[{"text": "15"}]),
        at(1, text="C++", attachments=[{"text": "C"}, {"text": "\U0001f44d"}]),
        at(2, text="New alert", blocks=[hidden], bot_id="B1"),
        at(3, text="*Same*  words", attachments=[{"text": "Same words"}]),
        at(4, files=[snippet]),
    )
    assert text.split("\n") == [
        *("10:00 Ada L: -5", "15"),
        *("10:01 Ada L: C++", "C", "\U0001f44d"),
        *("10:02 Ada L: New alert", "The disk is full."),
        "10:03 Ada L: *Same*  words",
        *("10:04 Ada L: [file: a.py]", "x = 1"),
    ]
    assert told.endswith("left out: 1 files, but for their beginnings")


@pytest.mark.parametrize("users", [None, 3, [{"id": "U1", "profile": "x", "name": "Ada L"}, 4]])
def test_a_slack_export_that_was_packed_anew(tmp_path: Path, users: Any):
    members = {
        "top/users.json": json.dumps(users),
        "top/channels.json": "[]",
        "top/general/canvas_in_the_conversation.json": "[]",
        "top/general/2024-01-01.json": json.dumps([at(0, text="words")]),
        "top/general/2024-01-02.json": "",
        "top/general/._2024-01-01.json": "\0",
        "__MACOSX/top/general/2024-01-01.json": "\0",
    }
    with zipfile.ZipFile(tmp_path / "export.zip", "w") as archive:
        for name, text in members.items():
            archive.writestr(name, text)
    found = slack.read_export(str(tmp_path / "export.zip"))
    assert [section.name for section in found] == ["#general, 2024-01-01"]
    assert str(found).startswith("read 1 messages, 1 channels, ")
    assert str(found).endswith(
        "left out: 2 files that are neither users.json nor a day of a channel, 1 files that cannot be read"
    )


def test_no_slack_export(tmp_path: Path):
    with pytest.raises(UserError, match="is not a zip file"):
        read(write(tmp_path / "a.zip", "no"), tmp_path)
    with pytest.raises(UserError, match="is no Slack export"):
        read(write(tmp_path / "d" / "a.txt", "no").parent, tmp_path, kind="slack")


def test_what_is_not_there_is_one_sentence(tmp_path: Path):
    for name in ("a.txt", "a.pdf", "a.mbox", "a.zip", "a.tex", "a.json"):
        with pytest.raises(FileNotFoundError, match=rf"{name} does not exist: expected"):
            read(tmp_path / name, tmp_path)
    with pytest.raises(NotADirectoryError, match="is not a folder"):
        read(tmp_path / "none", tmp_path, kind="directory")
    with pytest.raises(UserError, match="is empty"):
        read(write(tmp_path / "blank.md", " \n"), tmp_path)
    with pytest.raises(UserError, match=r"weight is 0\.0, expected a number above 0"):
        ResourceConfig("a", weight=0.0)
    with pytest.raises(
        ImportError, match=r"a PDF needs the package no_such: pip install 'cartridges-jax\[documents\]'"
    ):
        extras.load("no_such.thing", "a PDF")


def test_several_resources_are_one_corpus(tmp_path: Path):
    one, two = write(tmp_path / "a.txt", "One."), write(tmp_path / "b.md", "# Two\n")
    config = ResourceConfig(str(one), also=(ResourceConfig(str(two), weight=3.0),))
    corpus = reading.read(config, tmp_path)
    assert [(r.name, r.weight) for r in corpus.resources] == [("a.txt", 1.0), ("b.md", 3.0)]
    assert corpus.to_string() == "One.\n\n# Two\n"
    assert corpus.resources[0].sections == (Section("a.txt", "One."),)


def test_lines_of_gitignore_that_are_no_patterns_name_nothing(tmp_path: Path):
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("kept.txt", "left.txt"):
        (folder / name).write_text(name)
    (folder / ".gitignore").write_bytes(b"\xff\n[\n!!\n\\\nleft.txt\n!\na\\")
    said = read(folder, tmp_path).to_string()
    assert "kept.txt" in said and "File: left.txt" not in said


def test_what_no_person_wrote_is_left_out_of_a_folder_and_counted(tmp_path: Path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "kept.txt").write_text("kept")
    os.mkfifo(folder / "pipe.txt")
    for name in ("a.txt", "a.pdf", "a.ipynb", "a.docx"):
        with open(folder / name, "wb") as file:
            file.truncate(10 << 30)
    found = read(folder, tmp_path)
    assert found.to_string() == "File: kept.txt\n\nkept\n\n"
    for words in ("1 pipes and devices", "1 files of more than 1048576 bytes", "3 files of more than 268435456 bytes"):
        assert words in found.told


def test_what_may_not_be_read_stops_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    root = tmp_path / "folder"
    for name in ("kept.txt", "secret.txt", "closed/a.txt"):
        write(root / name, "words")
    write(root / "empty.docx", "")
    write(root / "list.rst", "Words.\n\n.. toctree::\n\n   one\n   two\n")

    def refuse(path: Path, function: Callable[[Path], Any]) -> Any:
        if path.name in ("secret.txt", "closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return function(path)

    for what, function in (("read_bytes", Path.read_bytes), ("iterdir", Path.iterdir)):
        monkeypatch.setattr(Path, what, functools.partialmethod(refuse, function))
    found = read(root, tmp_path)
    assert found.to_string().startswith("File: kept.txt\n\nwords\n\nFile: list.rst\n\nWords.")
    expected = "left out: 2 files and folders that may not be read, 1 empty files, 2 files named by toctree"
    assert found.told.endswith(expected)
