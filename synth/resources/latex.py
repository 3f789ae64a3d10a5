"""LaTeX: a paper's source, from a folder or from arXiv, as the one text that its main file includes the others into."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from command_line.errors import UserError
from synth.resources import arxiv
from synth.resources.sections import Heading, Section, at_headings

DEEPEST = 20  # files that include one another
LONGEST_TEXT = 2**25  # characters; a file may be included more than once, and so may those that it includes
LEVELS = {name: i for i, name in enumerate(("part", "chapter", "section", "subsection", "subsubsection"), 1)}

_COMMENT = re.compile(r"(?<!\\)((?:\\\\)*)%.*")
_VERBATIM = re.compile(r"\\begin\{(comment|verbatim\*?|lstlisting|minted)\}")
_INPUT = re.compile(r"\\(?:input|include|subfile)[ \t]*\{([^{}]*)\}|\\input[ \t]+([^\s{}\\]+)")
_HEADING = re.compile(rf"^[ \t]*\\({'|'.join(LEVELS)})\*?[ \t]*(?:\[[^\]\n]*\])?[ \t]*\{{", re.MULTILINE)

log = logging.getLogger(__name__)


def read(path: str, api_url: str | None = None) -> list[Section]:
    """From the folder or the .tex file at `path`, or, as arxiv:ID or an address there, from arXiv.

    Comments are taken out; what \\input names is looked for in the folder only, and left out if it is not there.

    Raises:
      FileNotFoundError, UserError: there is no LaTeX at `path`.
    """
    if arxiv.is_address(path):
        texts = arxiv.fetch(path, api_url)
        names, get = list(texts), texts.get
    else:
        root, names = _names(Path(path))
        get = functools.partial(_read_inside, root)
    document = _Document(get)
    text = document.resolved(document.main_file(names, path))
    text = text.partition("\\end{document}")[0].strip() + "\n"
    return at_headings(text, _headings(text), "beginning")


def without_comments(text: str) -> str:
    """A line that is nothing but a comment goes with its end; what stands in a verbatim environment stays."""
    kept, inside = [], ""
    for line in text.replace("\r\n", "\n").splitlines(keepends=True):
        if inside:
            if inside != "comment":
                kept.append(line)
            inside = "" if f"\\end{{{inside}}}" in line else inside
            continue
        if line.lstrip().startswith("%"):
            continue
        if found := _VERBATIM.search(line):
            inside = "" if f"\\end{{{found[1]}}}" in line else found[1]
            if found[1] == "comment":
                continue
        kept.append(line if inside else _COMMENT.sub(r"\1", line))
    return "".join(kept)


def _names(path: Path) -> tuple[Path, list[str]]:
    """The folder to read in, and the files in it that may be the main one."""
    if path.is_file():
        return path.parent, [path.name]
    if not path.is_dir():
        raise FileNotFoundError(f"{path} does not exist: expected LaTeX, a folder or a file, or arxiv:ID")
    return path, sorted(file.relative_to(path).as_posix() for file in path.rglob("*.tex"))


def _read_inside(root: Path, name: str) -> str | None:
    """The text of a file, if it lies in `root`, even when links are followed."""
    file = (root / name).resolve()
    return arxiv.decode(file.read_bytes()) if file.is_relative_to(root.resolve()) and file.is_file() else None


class _Document:
    """Files that include one another; `get` gives the text of one, or None."""

    def __init__(self, get: Callable[[str], str | None]):
        self._get = functools.cache(lambda name: None if (text := get(name)) is None else without_comments(text))
        self._resolved: dict[str, str] = {}  # kept: else ten files that include each other ten times take an age

    def main_file(self, names: list[str], path: str) -> str:
        """The file that begins a document; of several, main.tex, or else the one that has the most to say."""
        starts = [name for name in names if re.search(r"\\document(?:class|style)\b", self._get(name) or "")]
        if not starts:
            raise UserError(f"{path} holds no LaTeX with \\documentclass: set config.resource.path to the main file")
        return max(starts, key=lambda name: (name == "main.tex", len(self.resolved(name))))

    def resolved(self, name: str, above: tuple[str, ...] = ()) -> str:
        """The text of `name` with everything that it includes, in the place where it does.

        Raises:
          UserError: files include one another without end, or so often that the text has no end either.
        """
        if name in above or len(above) >= DEEPEST:
            raise UserError(f"LaTeX files include one another without end: {' > '.join((*above, name))}")
        if name not in self._resolved:
            pieces, length = [], 0
            for piece in self._pieces((*above, name)):
                pieces.append(piece)
                length += len(piece)
                if length > LONGEST_TEXT:
                    raise UserError(f"{name} with what it includes is longer than {LONGEST_TEXT} characters")
            self._resolved[name] = "".join(pieces)
        return self._resolved[name]

    def _pieces(self, above: tuple[str, ...]) -> Iterator[str]:
        text, end = self._get(above[-1]) or "", 0
        for found in _INPUT.finditer(text):
            yield text[end : found.start()]
            end = found.end()
            wanted = (found[1] or found[2] or "").strip().strip('"')
            if included := self._find(wanted, above[0]):
                yield self.resolved(included, above)
            elif "#" not in wanted:  # else it stands in a macro's definition
                log.warning("%s includes %r, which is not there: left out", above[-1], wanted)
        yield text[end:]

    def _find(self, wanted: str, main: str) -> str | None:
        """TeX looks from the main file's folder, and adds .tex by itself."""
        for name in (f"{wanted}.tex", wanted):
            path = (PurePosixPath(main).parent / name).as_posix()
            if self._get(path) is not None:
                return path
        return None


def _headings(text: str) -> Iterator[Heading]:
    for found in _HEADING.finditer(text):
        title = " ".join(_braced(text, found.end()).split())
        yield Heading(found.start(), LEVELS[found[1]], title)


def _braced(text: str, start: int) -> str:
    """Up to the brace that closes the one before `start`, or to the end of the line if none does soon."""
    depth = 1
    for i in range(start, min(len(text), start + 500)):
        depth += (text[i] == "{") - (text[i] == "}")
        if not depth:
            return text[start:i]
    return text[start : start + 500].partition("\n")[0]
