"""EPUB: a zip archive of XHTML pages, in the order that its package document gives them."""

from __future__ import annotations

import posixpath
import urllib.parse
import zipfile
from collections import Counter
from typing import Any

from cartridges_jax.command_line.errors import UserError
from synth.resources import archive, extras, html
from synth.resources.sections import Section, Sections
from synth.resources.text import decode

WHAT = "an EPUB"
_CONTAINER, _ENCRYPTION = "META-INF/container.xml", "META-INF/encryption.xml"
_PAGES = ("application/xhtml+xml", "text/html", "application/x-dtbook+xml")


def read(path: str) -> Sections:
    """The text of a book, in sections by the headings of its pages.

    Raises:
      FileNotFoundError, UserError: no such file, no EPUB, one that is damaged or protected, or without text.
    """
    left_out: Counter[str] = Counter()
    sections: list[Section] = []
    read_pages = 0
    with archive.opened(path, WHAT) as book:
        pages = _pages(book, path, left_out)
        pictures = left_out["pictures"]
        locked = {found.get("uri", found.get("URI")) for found in _tags(_xml(book, _ENCRYPTION), "cipherreference")}
        if locked & set(pages):
            raise UserError(f"{path} is protected against being read by other programs: use a copy that is not")
        for page in pages:
            try:
                found = html.sections_of(decode(book.read(page)), posixpath.basename(page))
            except KeyError:
                left_out["pages that are not there"] += 1
                continue
            left_out.update(found.left_out)
            with_text = [section for section in found if section.text.strip()]
            read_pages += bool(with_text)
            left_out["pages without text"] += not with_text
            sections += with_text
    left_out["pictures"] = pictures  # those of the package, which a page may show any number of times
    if not sections:
        raise UserError(f"{path} holds no text on its {len(pages)} pages")
    return Sections(sections, {"pages": read_pages, "sections": len(sections)}, left_out)


def _pages(book: zipfile.ZipFile, path: str, left_out: Counter[str]) -> list[str]:
    """The names of a book's pages in its archive, in reading order."""
    root = next(iter(_tags(_xml(book, _CONTAINER), "rootfile")), None)
    package_name = str(root.get("full-path")) if root is not None else ""
    package = _xml(book, package_name)
    items = {str(item.get("id")): item for item in _tags(package, "item")}
    refs = [str(one.get("idref")) for one in _tags(package, "itemref")]
    order = [items[ref] for ref in refs if ref in items]
    left_out["pages that are not there"] = len(refs) - len(order)
    if not order:
        raise UserError(f"{path} is no EPUB: it does not say which of its files are its pages")
    ordered = {id(item) for item in order}
    for item in items.values():
        kind = str(item.get("media-type"))
        if kind.startswith("image/"):
            left_out["pictures"] += 1
        elif kind in _PAGES and id(item) not in ordered and "nav" not in str(item.get("properties")):
            left_out["pages outside of the reading order"] += 1
    folder = posixpath.dirname(package_name)
    hrefs = (urllib.parse.unquote(urllib.parse.urldefrag(str(item.get("href"))).url) for item in order)
    return list(dict.fromkeys(posixpath.normpath(posixpath.join(folder, href)) for href in hrefs))


def _xml(book: zipfile.ZipFile, name: str) -> Any:
    """Parses a file as HTML, where a document can neither define entities of its own nor name files outside of it."""
    data = book.read(name) if name in book.namelist() else b""
    return extras.load("bs4", WHAT).BeautifulSoup(decode(data), "html.parser")


def _tags(soup: Any, name: str) -> list[Any]:
    return soup.find_all(lambda tag: tag.name.rpartition(":")[2] == name)
