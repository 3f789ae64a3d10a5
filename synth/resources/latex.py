"""Reads LaTeX, from a folder or arXiv, as one text: the main file with all that it includes in the right places."""

from __future__ import annotations

import functools
import logging
import posixpath
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from cartridges_jax.command_line.errors import UserError
from synth.resources import arxiv
from synth.resources.sections import Heading, Sections, at_headings
from synth.resources.text import decode

DEEPEST = 20  # files that include one another
LONGEST_TEXT = 2**25  # characters: as a file may be included many times, a few can make a text without end
LEVELS = {name: i for i, name in enumerate(("part", "chapter", "section", "subsection", "subsubsection"), 1)}

# Inside of these a % or a command means nothing, so the scanner takes them whole, and escaped characters too.
_BRACED = r"\{(?:[^{}\n]|\{[^{}\n]*\})*\}"
_ARGUMENT = r"\{(?:[^{}]|\{[^{}]*\}){0,500}\}"
_OPTIONS = r"(?:\[(?:[^\[\]]|\[[^\[\]\n]*\]){0,300}\])?"
_VERBATIM = ("verbatim", "verbatim*", "Verbatim", "Verbatim*", "BVerbatim", "LVerbatim", "alltt", "lstlisting")
_VERBATIM += ("minted", "filecontents", "filecontents*", "semiverbatim", "spverbatim", "tcblisting")
_DEFINES_VERBATIM = re.compile(
    rf"""
    \\(?:lstnewenvironment | DefineVerbatimEnvironment | (?:re)?newtcblisting | (?:New|Renew|Provide|Declare)TCBListing)
    \*?[ \t]*{_OPTIONS}[ \t]*\{{(?P<environment>[\w*]+)\}}
  | \\newminted(?:\[(?P<code>[\w*]+)\]|\{{(?P<language>[\w+-]+)\}})
  | \\(?:MakeShortVerb\*?|DefineShortVerb|lstMakeShortInline){_OPTIONS}[ \t]*\{{?\\(?P<mark>[^\w\s])
    """,
    re.VERBOSE,
)
_LITERAL = rf"""
    \\begin\{{(?P<environment>NAMES)\}}[\s\S]*?(?:\\end\{{(?P=environment)\}}|\Z)
  | \\(?:(?:[vV]erb\*?|url|path|nolinkurl)(?![a-zA-Z])|lstinline{_OPTIONS}|mintinline{_OPTIONS}{_BRACED})
    (?:{_BRACED}|(?P<mark>[^\sa-zA-Z*{{\\\[(])[^\n]*?(?P=mark))
  | \\href{_OPTIONS}{_BRACED}
  | (?P<short>MARKS)[^\n]*?(?P=short)
"""
_COMMENT = r"""
    (?P<comment>^[ \t]*%[^\n]*(?:\n|\Z) | %[^\n]* | \\begin\{comment\}[\s\S]*?\\end\{comment\}[^\n]*\n?)
  | \\begin\{comment\}[\s\S]*  # without an end: it hides nothing
"""
# An \endinput before the \fi or \else of a condition may not be meant, so it ends nothing.
_INCLUDE = rf"""
    \\(?P<command>input|@input|include|subfile|subfileinclude|includestandalone|InputIfFileExists|loadglsentries)\*?
    (?![a-zA-Z@])\s*{_OPTIONS}\s*\{{(?P<name>[^{{}}]*)\}}
  | \\input[ \t]+(?P<bare>[^\s{{}}\\%]+)
  | \\(?P<import>(?:sub)?(?:import|inputfrom|includefrom))\*?\s*\{{(?P<folder>[^{{}}]*)\}}\s*\{{(?P<file>[^{{}}]*)\}}
  | \\(?:(?:inputminted|DTLloaddb)\s*{_OPTIONS}\s*\{{[^{{}}]*\}}
      | (?:lstinputlisting|(?:verbatim|Verbatim|BVerbatim|LVerbatim|markdown)[iI]nput|csvauto[a-z]+|csvreader
         | pgfplotstabletypeset)\*?\s*{_OPTIONS})
    \s*\{{(?P<listing>[^{{}}\\\n]*)\}}
  | (?<!Command)\\(?P<macro>NAMES)(?P<arguments>(?:[ \t]*{_ARGUMENT}){{1,9}})
  | (?P<picture>\\includegraphics\*?)(?![a-zA-Z])
  | \\(?P<unread>bibliography|printbibliography|includepdf|newmintedfile|tcbinputlisting)\*?(?![a-zA-Z])
  | (?P<begin>\\begin\{{document\}})
  | (?P<end>\\end\{{document\}}|\\endinput(?![a-zA-Z@])(?!(?:(?!\\if)[\s\S]){{0,1000}}?\\(?:fi|else)(?![a-zA-Z@])))
  | (?P<brace>[{{}}])
"""
_DEFINES_INCLUDE = re.compile(
    r"""
    \\(?:(?:new|renew|provide)command | DeclareRobustCommand | (?:New|Renew|Provide|Declare)DocumentCommand | [gex]?def)
    \*?[ \t]*\{?\\([a-zA-Z]+)\}?[ \t]*(?:\[\d\]|\{[m\s]*\}|[#\d]+)?\s*
    \{(?:[^{}]|\{[^{}]*\}){0,500}?\\(?:input|include|subfile)[ \t]*\{([^{}]*\#\d[^{}]*)\}
    """,
    re.VERBOSE,
)
_INPUT_PATH = re.compile(r"\\input@path[ \t]*\{((?:[ \t]*\{[^{}]*\})+)")
_ESCAPED = r"\\[\s\S]"
_HEADING = re.compile(rf"^[ \t]*\\({'|'.join(LEVELS)})\*?[ \t]*(?:\[[^\]\n]*\])?[ \t]*\{{", re.MULTILINE)

log = logging.getLogger(__name__)


def read(path: str, api_url: str | None = None) -> Sections:
    """The text of the folder or .tex file at `path`, or from arXiv, if that is arxiv:ID or an address there.

    Comments are taken out. A file that \\input names is looked for in the folder only, and left out if it is missing.

    Raises:
      FileNotFoundError, UserError: there is no LaTeX at `path`.
    """
    if arxiv.is_address(path):
        texts = arxiv.fetch(path, api_url)
        names, others, get = list(texts), set(texts), texts.get
    else:
        root, names, others = _names(Path(path))
        get = functools.partial(_read_inside, root)
    main = _Document(get).main_file(names, path)
    document = _Document(get)
    text = document.resolved(main).strip() + "\n"
    for sentence in document.missing:
        log.warning("%s", sentence)
    sections = at_headings(text, _headings(text), "beginning")
    left_out = Counter({"included files that are not there": len(document.missing)}) + document.left_out
    left_out["files of the folder that the document does not include"] = len(others - document.files)
    return Sections(sections, {"files": len(document.files), "sections": len(sections)}, left_out)


def without_comments(text: str, verbatim: Iterable[str] = _VERBATIM) -> str:
    """Takes comments out, with the whole line if there is nothing else on it. Verbatim text and addresses stay."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    literal = _literal({*verbatim, *_defined_verbatim(text)})
    return _scanner(f"{_COMMENT}|{literal}|{_ESCAPED}").sub(
        lambda found: "" if found["comment"] is not None else found[0], text
    )


def _defined_verbatim(text: str) -> Iterator[str]:
    """The environments whose text is verbatim, and the marks around such text, that a text defines."""
    for found in _DEFINES_VERBATIM.finditer(text):
        if found["language"]:
            yield from (f"{found['language']}code", f"{found['language']}code*")
        else:
            yield found["environment"] or found["code"] or found["mark"]


def _literal(verbatim: Iterable[str]) -> str:
    environments = [name for name in verbatim if name[0].isalnum()]
    return _LITERAL.replace("NAMES", _any_of(environments)).replace("MARKS", _any_of({*verbatim} - {*environments}))


def _any_of(names: Iterable[str]) -> str:
    return "|".join(map(re.escape, sorted(names))) or "(?!)"


@functools.lru_cache(maxsize=64)
def _scanner(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern, re.VERBOSE | re.MULTILINE)


def _names(path: Path) -> tuple[Path, list[str], set[str]]:
    """The folder of a document, the files in it that may be the main one, and all that the document may include."""
    if path.is_file():
        return path.parent, [path.name], set()
    if not path.is_dir():
        raise FileNotFoundError(f"{path} does not exist: expected LaTeX, a folder or a file, or arxiv:ID")
    files = {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()}
    visible = {file for file in files if "/." not in f"/{file}"}
    return path, sorted(file for file in files if file.endswith(".tex")), visible


def _read_inside(root: Path, name: str) -> str | None:
    """The text of a file, or None if it does not lie in `root` after all links are followed."""
    try:
        file = (root / name).resolve()
        is_inside = file.is_relative_to(root.resolve()) and file.is_file()
    except (OSError, RuntimeError, ValueError):  # links in a circle, a name that no file can have
        return None
    return decode(file.read_bytes()) if is_inside else None


class _Document:
    """A document of files that include one another. `get` returns the text of one, or None."""

    def __init__(self, get: Callable[[str], str | None]):
        self._get = functools.cache(get)
        self._clean: Callable[[str], str] = functools.cache(
            lambda name: without_comments(get(name) or "", self._verbatim)  # those of the files that include it
        )
        self._resolved: dict[tuple[str, str], str] = {}  # kept: else ten files that include each other take an age
        self._macros: dict[str, str] = {}  # of the document, that include what their argument names
        self._verbatim = set(_VERBATIM)
        self._folders: list[str] = []  # of \input@path
        self.missing: list[str] = []  # a sentence for each
        self.left_out: Counter[str] = Counter()
        self.files: set[str] = set()

    def main_file(self, names: list[str], path: str) -> str:
        """The file that begins the document: of several, main.tex, or else the one with the longest text."""
        starts = [name for name in names if re.search(r"\\document(?:class|style)\b", self._clean(name))]
        if not starts:
            raise UserError(f"{path} holds no LaTeX with \\documentclass: set config.resource.path to the main file")
        return max(starts, key=lambda name: (name == "main.tex", len(self.resolved(name))))

    def resolved(self, name: str, above: tuple[str, ...] = (), folder: str = "") -> str:
        """The text of a file, with every file that it includes in the place where it does.

        `folder` is the one that \\import has led to. If an included file is a document itself, only its body is taken.

        Raises:
          UserError: files include one another without end, or so often that the text has no end either.
        """
        if name in above or len(above) >= DEEPEST:
            raise UserError(f"LaTeX files include one another without end: {' > '.join((*above, name))}")
        if (name, folder) not in self._resolved:
            self.files.add(name)
            pieces, length = [], 0
            for piece in self._pieces((*above, name), folder):
                pieces.append(piece)
                length += len(piece)
                if length > LONGEST_TEXT:
                    raise UserError(f"{name} with what it includes is longer than {LONGEST_TEXT} characters")
            self._resolved[name, folder] = "".join(pieces)
        return self._resolved[name, folder]

    def _pieces(self, above: tuple[str, ...], folder: str) -> Iterator[str]:
        text = self._clean(above[-1])
        self._learn(text)
        found_all, place, end = self._span(text, is_included=len(above) > 1)
        for found in found_all:
            yield text[place : found.start()]
            place = found.end()
            if found["listing"] is not None:
                yield self._listing(found, above, folder)
            elif found["unread"] or found["picture"]:
                self.left_out["pictures" if found["picture"] else f"\\{found['unread']}"] += 1
                yield found[0]
            else:
                yield self._included(found, above, folder)
        yield text[place:end]

    def _learn(self, text: str) -> None:
        """Notes what a file says about how it, and those that it includes, are to be read."""
        self._verbatim |= set(_defined_verbatim(text))
        self._macros |= {name: wanted.strip() for name, wanted in _DEFINES_INCLUDE.findall(text)}
        for folders in _INPUT_PATH.findall(text):
            self._folders += re.findall(r"\{([^{}]*)\}", folders)

    def _span(self, text: str, is_included: bool) -> tuple[list[re.Match[str]], int, int]:
        """The inclusions in a text, and where it begins and ends: nothing is read after the document or \\endinput.

        An end in braces, such as one in a macro's definition, is none.
        """
        include = _INCLUDE.replace("NAMES", _any_of(self._macros))
        found_all: list[re.Match[str]] = []
        start = depth = 0
        for found in _scanner(f"{_literal(self._verbatim)}|{include}|{_ESCAPED}").finditer(text):
            if found["brace"]:
                depth = max(0, depth + (1 if found["brace"] == "{" else -1))
            elif found["begin"]:
                depth = 0  # whatever the preamble has done with braces
                if is_included:
                    found_all, start = [], found.end()
            elif found["end"]:
                if not depth:
                    return found_all, start, found.start()
            elif found.lastgroup not in (None, "environment", "mark", "short"):
                found_all.append(found)
        return found_all, start, len(text)

    def _included(self, found: re.Match[str], above: tuple[str, ...], folder: str) -> str:
        title = ""
        is_import, main_folder = found["import"] is not None, posixpath.dirname(above[0])
        if is_import:
            wanted = found["file"].strip()
            start = folder if found["import"].startswith("sub") else main_folder
            folder = posixpath.normpath(posixpath.join(start, found["folder"].strip()))
        elif found["macro"] is not None:
            title = found[0]  # another argument may be one
            wanted = self._macros[found["macro"]]
            for number, argument in enumerate(re.findall(_ARGUMENT, found["arguments"]), 1):
                wanted = wanted.replace(f"#{number}", argument[1:-1].strip())
        else:
            wanted = (found["name"] if found["bare"] is None else found["bare"]).strip().strip('"')
        if "#" in wanted:  # it stands in a macro's definition
            self.left_out["files that a macro's argument names"] += wanted not in self._macros.values()
            return title
        name = self._find(wanted, above, folder)
        if name is None:
            where = posixpath.join(found["folder"].strip(), wanted) if is_import else wanted
            self.missing.append(f"{above[-1]} includes {where!r}, which is not there: left out")
            return title
        is_subfile = (found["command"] or "").startswith("subfile")
        return title + self.resolved(name, above, posixpath.dirname(name) if is_subfile else folder)

    def _listing(self, found: re.Match[str], above: tuple[str, ...], folder: str) -> str:
        """A file that is shown as it stands, such as a program."""
        wanted = found["listing"].strip()
        if "#" in wanted:  # it stands in a macro's definition
            self.left_out["files that a macro's argument names"] += 1
            return found[0]
        name = self._find(wanted, above, folder)
        if name is None:
            self.missing.append(f"{above[-1]} shows {wanted!r}, which is not there: left out")
            return found[0]  # it may be a table that stands here itself
        self.files.add(name)
        return self._get(name) or ""

    def _find(self, wanted: str, above: tuple[str, ...], folder: str) -> str | None:
        """Finds a file as TeX does: where \\import leads to, then from the main file's folder, with .tex added."""
        folders = [folder, posixpath.dirname(above[0]), *self._folders, posixpath.dirname(above[-1])]
        for start in dict.fromkeys(folders):
            for name in (f"{wanted}.tex", wanted):
                path = posixpath.normpath(posixpath.join(start, name))
                if self._get(path) is not None:
                    return path
        return None


def _headings(text: str) -> Iterator[Heading]:
    for found in _HEADING.finditer(text):
        title = " ".join(_braced(text, found.end()).split())
        yield Heading(found.start(), LEVELS[found[1]], title)


def _braced(text: str, start: int) -> str:
    """The text up to the brace that closes the one before `start`, or of the line, if none closes it soon."""
    depth = 1
    for i in range(start, min(len(text), start + 500)):
        depth += (text[i] == "{") - (text[i] == "}")
        if not depth:
            return text[start:i]
    return text[start : start + 500].partition("\n")[0]
