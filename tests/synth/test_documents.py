"""Office documents, books, notebooks and reStructuredText, made here and read through `reading`."""

from __future__ import annotations

import datetime
import json
import sys
import zipfile
from email.message import EmailMessage
from pathlib import Path

import pptx
import pytest
import xlsxwriter
from pptx.util import Inches

from cartridges_jax.command_line.errors import UserError
from synth.resources import archive, mail, reading
from synth.resources.config import ResourceConfig

WORD = "http://schemas.openxmlformats.org/wordprocessingml/2006/main"
PACKAGE = "http://schemas.openxmlformats.org/package/2006"
OFFICE = "application/vnd.openxmlformats-officedocument.wordprocessingml"
RELATION = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"


def read(path: Path) -> reading.Resource:
    return reading.read(ResourceConfig(str(path)), path.parent / "no run").resources[0]


def names(resource: reading.Resource) -> list[str]:
    return [section.name for section in resource.sections]


def zipped(path: Path, members: dict[str, str | bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as made:
        for name, data in members.items():
            made.writestr(name, data)
    return path


def paragraph(text: str, style: str = "") -> str:
    properties = f'<w:pPr><w:pStyle w:val="{style}"/></w:pPr>' if style else ""
    return f"<w:p>{properties}<w:r><w:t>{text}</w:t></w:r></w:p>"


def make_docx(path: Path, body: str, prologue: str = "") -> Path:
    xmlns = f'xmlns:w="{WORD}" xmlns:m="http://schemas.openxmlformats.org/officeDocument/2006/math"'
    kinds = {"document": "document.main", "styles": "styles", "footnotes": "footnotes"}
    overrides = "".join(
        f'<Override PartName="/word/{name}.xml" ContentType="{OFFICE}.{kind}+xml"/>' for name, kind in kinds.items()
    )
    rels = f'<Default Extension="rels" ContentType="{PACKAGE.replace("http://schemas", "application/vnd")}"/>'
    related = "".join(
        f'<Relationship Id="{name}" Type="{RELATION}/{name}" Target="{name}.xml"/>' for name in ("styles", "footnotes")
    )
    styles = "".join(
        f'<w:style w:type="paragraph" w:styleId="Heading{i}"><w:name w:val="heading {i}"/></w:style>' for i in (1, 2)
    )
    note = f'<w:footnote w:id="2">{paragraph("The note.")}</w:footnote>'
    return zipped(
        path,
        {
            "[Content_Types].xml": f'<Types xmlns="{PACKAGE}/content-types">{rels}{overrides}</Types>',
            "_rels/.rels": f'<Relationships xmlns="{PACKAGE}/relationships"><Relationship Id="r" '
            f'Type="{RELATION}/officeDocument" Target="word/document.xml"/></Relationships>',
            "word/_rels/document.xml.rels": f'<Relationships xmlns="{PACKAGE}/relationships">{related}</Relationships>',
            "word/document.xml": f"{prologue}<w:document {xmlns}><w:body>{body}</w:body></w:document>",
            "word/styles.xml": f"<w:styles {xmlns}>{styles}</w:styles>",
            "word/footnotes.xml": f"<w:footnotes {xmlns}>{note}</w:footnotes>",
            "word/header1.xml": f"<w:hdr {xmlns}/>",
            "word/media/image1.png": b"\x89PNG",
        },
    )


BODY = (
    paragraph("Before.")
    + paragraph("First", "Heading1")
    + "<w:p><w:r><w:t>Some</w:t></w:r><w:del><w:r><w:delText>gone</w:delText></w:r></w:del>"
    + "<w:ins><w:r><w:t> new words</w:t></w:r></w:ins><m:oMath><m:r><m:t>E</m:t></m:r></m:oMath>"
    + '<w:r><w:footnoteReference w:id="2"/></w:r></w:p>'
    + paragraph("Below", "Heading2")
    + f"<w:tbl><w:tr><w:tc>{paragraph('a')}</w:tc><w:tc>{paragraph('b')}{paragraph('c')}</w:tc></w:tr></w:tbl>"
)


def test_a_word_document(tmp_path: Path):
    found = read(make_docx(tmp_path / "a.docx", BODY))
    assert names(found) == ["a.docx", "First", "First > Below"]
    text = found.to_string()
    assert "Some new words" in text and "gone" not in text and "The note." in text
    assert "\n\na | b c\n\n" in text
    assert found.told.endswith("left out: 1 page headers, 1 pictures and films, 1 formulas")


def test_a_presentation(tmp_path: Path):
    made = pptx.Presentation()
    first = made.slides.add_slide(made.slide_layouts[1])
    first.shapes.title.text, first.placeholders[1].text = "Plans", "To begin\nTo end"
    first.notes_slide.notes_text_frame.text = "Say it slowly."
    made.slides.add_slide(made.slide_layouts[6])
    third = made.slides.add_slide(made.slide_layouts[6])
    group = third.shapes.add_group_shape()
    group.shapes.add_textbox(0, 0, Inches(1), Inches(1)).text_frame.text = "In a group"
    table = third.shapes.add_table(2, 2, 0, 0, Inches(2), Inches(2)).table
    for i, words in enumerate(("a", "b", "1", "2")):
        table.cell(i // 2, i % 2).text = words
    made.save(str(tmp_path / "p.pptx"))
    found = read(tmp_path / "p.pptx")
    assert names(found) == ["slide 1: Plans", "slide 3"]
    assert found.to_string() == ("Plans\nTo begin\nTo end\n\nNotes: Say it slowly.\n\nIn a group\na | b\n1 | 2\n\n")
    assert found.told == "p.pptx: read 2 slides, 70 characters; left out: 1 slides without text"


def test_words_that_the_library_for_word_passes_over(tmp_path: Path):
    run = "<w:r><w:t>{}</w:t></w:r>".format
    ruby = f"<w:ruby><w:rubyPr/><w:rt>{run('kan')}</w:rt><w:rubyBase>{run('base')}</w:rubyBase></w:ruby>"
    field = f'<w:fldSimple w:instr="TITLE">{run("a title")}</w:fldSimple><w:bdo w:val="rtl">{run(" turned")}</w:bdo>'
    choice = '<w:fldChar w:fldCharType="begin"><w:ffData><w:ddList></w:ddList></w:ffData></w:fldChar>'
    box = '<wps:txbx xmlns:wps="x">hidden</wps:txbx>'
    body = f"<w:p><w:r>{ruby}</w:r></w:p><w:p>{field}</w:p><w:p><w:r>{choice}</w:r><w:r>{box}</w:r></w:p>"
    found = read(make_docx(tmp_path / "a.docx", body))
    assert found.to_string().split() == ["base", "a", "title", "turned"]
    assert found.told.endswith("1 readings above words, 1 drop-down fields, 1 text boxes")


def test_shapes_of_slides_that_may_be_shown_in_two_ways(tmp_path: Path):
    made = pptx.Presentation()
    slide = made.slides.add_slide(made.slide_layouts[6])
    slide.shapes.add_textbox(0, 0, Inches(1), Inches(1)).text_frame.text = "In both ways"
    made.save(str(tmp_path / "p.pptx"))
    with zipfile.ZipFile(tmp_path / "p.pptx") as old:
        members = {name: old.read(name) for name in old.namelist()}
    choice = b'<mc:AlternateContent xmlns:mc="http://schemas.openxmlformats.org/markup-compatibility/2006"><mc:Choice>'
    formula = b'<m:oMath xmlns:m="x"/></mc:Choice><mc:Fallback/></mc:AlternateContent>'
    xml = (
        members["ppt/slides/slide1.xml"]
        .replace(b"<p:sp>", choice + b"<p:sp>")
        .replace(b"</p:sp>", b"</p:sp>" + formula)
    )
    members |= {"ppt/slides/slide1.xml": xml, "ppt/comments/comment1.xml": b"<p:cmLst><p:cm id='1'/><p:cm/></p:cmLst>"}
    found = read(zipped(tmp_path / "p.pptx", members))
    assert found.to_string() == "In both ways\n\n"
    assert found.told.endswith("left out: 1 formulas, 2 comments")


def test_what_a_spreadsheet_shows_beside_its_values(tmp_path: Path):
    path = tmp_path / "s.xlsx"
    with xlsxwriter.Workbook(path) as book:
        sheet = book.add_worksheet()
        sheet.write_row(0, 0, ["a", "b", "c"])
        sheet.write_formula(1, 0, "=1/0", None, "#DIV/0!")
        sheet.write_formula(1, 1, "=1+1", None, "")
        sheet.write_formula(1, 2, "=1+1", None, 2)
        sheet.insert_textbox(3, 3, "In a box")
        sheet.set_header("&LAbove")
    found = read(path)
    assert found.to_string() == "row 1\nc: 2\n\n"
    assert found.told.endswith(
        "left out: 1 cells with an error, 1 formulas without a saved value, 1 text boxes, 1 page headers"
    )


def test_a_spreadsheet(tmp_path: Path):
    path = tmp_path / "s.xlsx"
    with xlsxwriter.Workbook(path, {"default_date_format": "yyyy-mm-dd"}) as book:
        people, notes = book.add_worksheet("People"), book.add_worksheet("Notes")
        book.add_worksheet("Empty")
        people.write_row(0, 0, ["name", "age", "", "since"])
        people.write_row(1, 0, ["Ada", 36, 0.5])
        people.write_datetime(1, 3, datetime.datetime(2024, 5, 3))
        people.write_formula(2, 1, "=B2+1", None, 37)
        notes.write(0, 0, "Only this")
    found = read(path)
    assert names(found) == ["People, row 1", "People, row 2", "Notes, row 1"]
    assert found.to_string() == (
        "People, row 1\nname: Ada\nage: 36\ncolumn 3: 0.5\nsince: 2024-05-03\n\n"
        "People, row 2\nage: 37\n\nNotes, row 1\nOnly this\n\n"
    )
    assert found.told.startswith("s.xlsx: read 3 sheets, 3 rows, ")
    assert found.told.endswith("left out: 1 empty sheets")


def make_epub(path: Path, **changes: str) -> Path:
    xhtml = '<?xml version="1.0"?><!DOCTYPE html><html xmlns="http://www.w3.org/1999/xhtml"><head><title>{}</title>'
    xhtml += "</head><body>{}</body></html>"
    members = {
        "mimetype": "application/epub+zip",
        "META-INF/container.xml": '<container><rootfiles><rootfile full-path="OPS/book.opf"/></rootfiles></container>',
        "OPS/book.opf": '<opf:package xmlns:opf="x"><opf:manifest>'
        '<opf:item id="two" href="text/two%20b.xhtml" media-type="application/xhtml+xml"/>'
        '<opf:item id="one" href="one.xhtml#x" media-type="application/xhtml+xml"/>'
        '<opf:item id="cover" href="cover.xhtml" media-type="application/xhtml+xml"/>'
        '<opf:item id="lost" href="lost.xhtml" media-type="application/xhtml+xml"/>'
        '<opf:item id="extra" href="extra.xhtml" media-type="application/xhtml+xml"/>'
        '<opf:item id="pic" href="a.png" media-type="image/png"/></opf:manifest><opf:spine><opf:itemref idref="cover"/>'
        '<opf:itemref idref="one"/><opf:itemref idref="lost"/><opf:itemref idref="unknown"/>'
        '<opf:itemref idref="two"/></opf:spine></opf:package>',
        "OPS/one.xhtml": xhtml.format("T", "<h1>One</h1><p>First words, <a id='x'/>caf&#233;.</p>"),
        "OPS/text/two b.xhtml": xhtml.format("T", "<p>Before</p><h2>Two</h2><p>Last words.</p>"),
        "OPS/cover.xhtml": xhtml.format("Cover", "<img src='a.png'/>"),
        "OPS/extra.xhtml": xhtml.format("Extra", "<p>Aside.</p>"),
    }
    return zipped(path, members | changes)


def test_a_book(tmp_path: Path):
    found = read(make_epub(tmp_path / "b.epub"))
    assert names(found) == ["One", "T", "Two"]
    assert found.to_string().split("\n\n") == ["# One", "First words, café.\nBefore", "## Two", "Last words.\n"]
    assert found.told.startswith("b.epub: read 2 pages, 3 sections, ")
    assert found.told.endswith(
        "left out: 2 pages that are not there, 1 pages outside of the reading order, 1 pictures, 1 pages without text"
    )
    locked = {"META-INF/encryption.xml": '<e><enc:CipherReference URI="OPS/one.xhtml"/></e>'}
    with pytest.raises(UserError, match="is protected against being read"):
        read(make_epub(tmp_path / "l.epub", **locked))
    with pytest.raises(UserError, match="is no EPUB"):
        read(zipped(tmp_path / "n.epub", {"a.txt": "words"}))


def test_a_notebook(tmp_path: Path):
    def cell(kind: str, source: str | list[str], **fields: object) -> dict[str, object]:
        return {"cell_type": kind, "source": source, **fields}

    outputs = [
        {"output_type": "stream", "text": ["1\n", "2\n"]},
        {"output_type": "execute_result", "data": {"text/plain": ["'x'"], "image/png": "aGk="}},
        {"output_type": "error", "traceback": ["\x1b[31mBoom\x1b[0m"]},
    ]
    cells = [
        cell("markdown", ["# Title\n", "Words."]),
        cell("code", "# no heading\nprint('```')", outputs=outputs),
        cell("markdown", "## Below\n\u2028Last.", attachments={"a.png": {}}),
        cell("code", ""),
    ]
    path = tmp_path / "n.ipynb"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps({"cells": cells, "nbformat": 4}, ensure_ascii=False).encode())
    found = read(path)
    assert names(found) == ["Title", "Title > Below"]
    assert found.to_string() == (
        "# Title\nWords.\n\n````python\n# no heading\nprint('```')\n````\n\n```\n1\n2\n```\n\n```\n'x'\n```\n\n"
        "```\nBoom\n```\n\n## Below\n\u2028Last.\n"
    )
    assert found.told.endswith("read 4 cells, 115 characters; left out: 2 pictures")
    path.write_text('{"worksheets": [{"cells": [{"cell_type": "code", "input": "old = 1"}]}]}')
    assert "old = 1" in read(path).to_string()
    page = {"data": {"text/html": "<b>Only</b> HTML", "image/png": ""}}
    odd = {"cell_type": "heading", "level": "x", "source": "odd", "outputs": 3, "attachments": 4}
    path.write_text(
        json.dumps({"metadata": [], "cells": [odd, 5, {"cell_type": "code"}, {"outputs": [{"data": 3}, page]}]})
    )
    assert read(path).to_string() == "# odd\n\n```\nOnly HTML\n```\n"
    for nothing in ("[]", '{"cells": []}', '{"cells": 5}', "3"):
        path.write_text(nothing)
        with pytest.raises(UserError, match=r"is no notebook|is a notebook without words"):
            read(path)


@pytest.mark.parametrize(
    ("output", "text", "left_out"),
    [
        ({"data": {"text/plain": "<IPython.core.display.Markdown object>", "text/markdown": "**It**"}}, "**It**", ""),
        ({"data": {"text/plain": ["<a.B object at 0x7f>"], "text/html": "<b>It</b>"}}, "It", ""),
        ({"data": {"text/plain": "<a.B object>", "image/png": ""}}, "<a.B object>", "1 pictures"),
        ({"output_type": "error", "ename": "KeyError", "evalue": "'a'", "traceback": []}, "KeyError: 'a'", ""),
        ({"output_type": "pyout", "html": ["<b>It</b>"]}, "It", ""),
        ({"data": {"application/x.y+json": {}, "text/plain": "It"}}, "It", "1 outputs of type application/x.y+json"),
    ],
)
def test_outputs_of_a_notebook(tmp_path: Path, output: dict[str, object], text: str, left_out: str):
    path = tmp_path / "n.ipynb"
    cells = [{"cell_type": "code", "outputs": [output]}, {"cell_type": "markdown", "source": "", "attachments": 3}]
    path.write_text(json.dumps({"cells": cells}))
    found = read(path)
    assert found.to_string() == f"```\n{text}\n```\n"
    assert found.told.endswith(f"left out: {left_out}" if left_out else "nothing was left out")


RST = """Before.

=====
Title
=====

Words\u2028and ``more``. :unknown:`role`

.. unknown:: directive

   Kept.

Sub
---

::

    Not
    ===

.. include:: other.txt

.. toctree::
   :hidden:

   a
   The next <b>

.. tab::

   .. figure:: x.png

   .. literalinclude:: a.py

.. |picture| image:: y.png

.. csv-table:: Numbers
   :file: a.csv

.. automodule:: a

.. code-block:: rst

   .. include:: no.txt

Last
====
"""


def test_restructured_text_keeps_every_character(tmp_path: Path):
    path = tmp_path / "a.rst"
    path.write_text(RST)
    found = read(path)
    assert found.to_string() == RST
    assert names(found) == ["a.rst", "Title", "Title > Sub", "Title > Sub > Last"]
    assert found.sections[1].text.startswith("=====\nTitle")
    assert found.told.endswith(
        "2 pictures, 1 files named by include, 2 files named by toctree, 1 files named by literalinclude, "
        "1 files named by csv-table, 1 files named by automodule"
    )


@pytest.mark.parametrize("end", ["\r", "\r\n"])
def test_line_ends_of_restructured_text_in_a_folder(tmp_path: Path, end: str):
    (tmp_path / "a.rst").write_bytes(RST.replace("\n", end).encode())
    assert names(read(tmp_path)) == ["a.rst", "Title", "Title > Sub", "Title > Sub > Last"]


def test_documents_in_a_folder_and_attached_to_a_letter(tmp_path: Path):
    root = tmp_path / "folder"
    make_docx(root / "a.docx", BODY)
    make_epub(root / "b.epub")
    (root / "broken.docx").write_bytes(b"PK")
    (root / "c.rst").write_text(RST)
    found = read(root)
    assert "a.docx > First > Below" in names(found) and "b.epub > Two" in names(found) and "Title > Sub" in names(found)
    assert found.told.startswith("folder: read 3 files, ") and "1 documents that cannot be read" in found.told
    letter = EmailMessage()
    letter["Subject"] = "see"
    letter.set_content("Attached.")
    kind = {"maintype": "application", "subtype": "octet-stream"}
    letter.add_attachment((root / "a.docx").read_bytes(), filename="A.DOCX", **kind)
    letter.add_attachment(b"PK", filename="b.docx", **kind)
    (tmp_path / "m.mbox").write_bytes(b"From x Mon Jan  1 10:00:00 2024\n" + letter.as_bytes())
    mails = mail.read_mbox(str(tmp_path / "m.mbox"))
    assert "--- A.DOCX\n" in mails[0].text and "Some new words" in mails[0].text
    attached = "1 attachments of application/vnd.openxmlformats-officedocument.wordprocessingml.document"
    assert str(mails).endswith(f"left out: 1 page headers, 1 pictures and films, 1 formulas, {attached}")


@pytest.mark.parametrize("suffix", ["docx", "pptx", "xlsx", "epub"])
def test_bombs_and_damage(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(archive, "LARGEST", 2**22)
    path = tmp_path / f"a.{suffix}"
    with pytest.raises(FileNotFoundError, match="does not exist: expected"):
        read(path)
    path.write_bytes(b"")
    with pytest.raises(UserError, match="is empty: expected"):
        read(path)
    path.write_bytes(b"no archive")
    with pytest.raises(UserError, match="cannot be read as"):
        read(path)
    zipped(path, {"a.xml": b"<a/>", "b.bin": bytes(archive.LARGEST)})
    assert path.stat().st_size < 2**16
    with pytest.raises(UserError, match="unpacks to more than"):
        read(path)
    zipped(path, {"[Content_Types].xml": b"<Types/>"})
    with pytest.raises(UserError, match=r"cannot be read as|is no EPUB"):
        read(path)
    whole = make_docx(path, BODY).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="cannot be read as"):
        read(path)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
@pytest.mark.parametrize("suffix", ["docx", "pptx", "xlsx"])
def test_entities_are_refused(tmp_path: Path, suffix: str, encoding: str):
    levels = "".join(f'<!ENTITY e{i} "{f"&e{i - 1};" * 10}">' for i in range(1, 10))
    bomb = f'<?xml version="1.0" encoding="{encoding}"?><!DOCTYPE a [<!ENTITY e0 "boom">{levels}]><a>&e9;</a>'
    path = zipped(tmp_path / f"a.{suffix}", {"word/document.xml": bomb.encode(encoding)})
    with pytest.raises(UserError, match=r"defines entities in 'word/document\.xml'.*refused"):
        read(path)


def test_a_sheet_of_two_cells_that_are_far_apart(tmp_path: Path):
    path = tmp_path / "s.xlsx"
    with xlsxwriter.Workbook(path) as book:
        sheet = book.add_worksheet()
        sheet.write(0, 0, "here")
        sheet.write(1048575, 16383, "there")
    with pytest.raises(UserError, match=r"spans 17179869184 cells in 'xl/worksheets/sheet1\.xml', more than"):
        read(path)


def test_a_length_that_lies(tmp_path: Path):
    """What an archive says of a file's length is not believed further than it goes."""
    path = make_docx(tmp_path / "a.docx", BODY)
    data = bytearray(path.read_bytes())
    directory = data.index(b"PK\x01\x02")
    data[directory + 24 : directory + 28] = (5).to_bytes(4, "little")
    path.write_bytes(data)
    with pytest.raises(UserError, match="cannot be read as a Word document"):
        read(path)


def test_a_missing_library_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "mammoth", None)
    with pytest.raises(UserError, match=r"needs the package mammoth: pip install 'cartridges-jax\[documents\]'"):
        read(make_docx(tmp_path / "a.docx", BODY))
