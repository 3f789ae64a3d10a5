from __future__ import annotations

import gzip
import io
import logging
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cartridges_jax.command_line.errors import UserError
from synth.resources import arxiv, latex
from synth.resources.latex import without_comments

MAIN = r"""% a comment alone
\documentclass{article}
\title{Small caches} % why so small?
\newcommand{\in}[1]{\input{#1}}
\begin{document}
\begin{abstract}Fifty \% less.\end{abstract}
\section{Introduction}
\input{sections/intro}
\subsection[short]{Of \emph{what} we
know}
\include{sections/results.tex}
\input{../outside} \input{/etc/hostname} \input{link}
\section*{End}
Done.
\end{document}
Never shown.
"""


@pytest.fixture
def paper(tmp_path: Path) -> Path:
    root = tmp_path / "paper"
    (root / "sections").mkdir(parents=True)
    (root / "main.tex").write_text(MAIN)
    (root / "sections" / "intro.tex").write_text("We begin.% note\n\\input{sections/deep}\n")
    (root / "sections" / "deep.tex").write_bytes("Caf\xe9 in Latin-1.\n".encode("latin-1"))
    (root / "sections" / "results.tex").write_text("Results follow.\n")
    (root / "unused.tex").write_text("\\documentclass{article} Unused.")
    (tmp_path / "outside.tex").write_text("SECRET")
    (root / "link.tex").symlink_to(tmp_path / "outside.tex")
    return root


@pytest.mark.parametrize("name", ["", "main.tex"])
def test_a_paper_is_one_text(paper: Path, name: str, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING, "synth"):
        sections = latex.read(str(paper / name))
    text = "".join(section.text for section in sections)
    assert "comment" not in text and "why" not in text and "note" not in text and "Never" not in text
    assert r"Fifty \% less." in text and "SECRET" not in text
    begins = [text.index(words) for words in ("We begin.", "Café in Latin-1.", "Results follow.", "Done.")]
    assert begins == sorted(begins)
    assert [section.name for section in sections] == [
        "beginning",
        "Introduction",
        r"Introduction > Of \emph{what} we know",
        "End",
    ]
    left_out = [record.message for record in caplog.records]
    assert len(left_out) == 3 and all("which is not there: left out" in message for message in left_out)


def test_comments():
    assert without_comments("a % b\n") == "a \n"
    assert without_comments("a % b\rc % d\r\ne") == "a \nc \ne"
    assert without_comments("a\\% b \\\\% c\n") == "a\\% b \\\\\n"
    assert without_comments("  % whole\nnext\n") == "next\n"
    verbatim = "\\begin{verbatim}\n100 % sure\n\\end{verbatim}\n"
    assert without_comments(verbatim + "x % y\n") == verbatim + "x \n"
    assert without_comments("a\n\\begin{comment}\nhidden\n\\end{comment}\nb\n") == "a\nb\n"
    assert without_comments("a\n\\begin{comment}\nno end\n") == "a\n\\begin{comment}\nno end\n"


@pytest.mark.parametrize(
    "kept",
    [
        r"\url{http://a.b/c%20d} \href{http://a.b/%7Eme}{here} \path{a%b} \nolinkurl{x%y}",
        r"\url|a%b| \href[page=1]{u%v}{w}",
        r"\verb|100 % sure| \verb*+a%b+ \lstinline!a % b! \lstinline[language=C]{a % b} \mintinline{c}{a % b}",
        "\\begin{lstlisting}[language=C]\na % b;\n\\end{lstlisting}",
        "\\begin{minted}{c}\n% kept\n\\input{nothing} \\end{document}\n\\end{minted}",
        "\\begin{Verbatim}\n% kept \\begin{comment}\n\\end{Verbatim}",
        "\\lstnewenvironment{code}{}{}\n\\begin{code}\n% kept\n\\end{code}",
        r"\verb|\input{nothing}| \verb+\end{document}+ 50\% \\\% \verb|\\|",
        "\\begin{semiverbatim}\n5 % 3\n\\end{semiverbatim} \\Verb|5 % 3|",
        "\\newminted{python}{}\n\\begin{pythoncode}\n5 % 3\n\\end{pythoncode}",
        "\\newtcblisting[auto counter]{listed}{}\n\\begin{listed}\n5 % 3\n\\end{listed}",
        r"\MakeShortVerb{\|} |5 % 3| and |\end{document}|",
        r"\newcommand{\finish}{\end{document}} \def\stop{\endinput} {\endinput}",
        r"\ifdefined\x\endinput\fi \ifdefined\x \else \ifnum1=1 a\fi \endinput \fi",
    ],
)
def test_what_only_looks_like_a_comment_or_a_command(tmp_path: Path, kept: str, caplog: pytest.LogCaptureFixture):
    assert without_comments(f"{kept} % gone\n") == f"{kept} \n"
    (tmp_path / "main.tex").write_text(
        f"\\documentclass{{a}}\n\\begin{{document}}\n{kept} % gone\nEnd.\n\\end{{document}}\nNo."
    )
    with caplog.at_level(logging.WARNING, "synth"):
        found = latex.read(str(tmp_path))
    text = "".join(section.text for section in found)
    assert kept in text and "gone" not in text and text.endswith("End.\n") and not caplog.records


def test_a_verbatim_environment_of_the_main_files_own(tmp_path: Path):
    (tmp_path / "main.tex").write_text("\\documentclass{a}\\lstnewenvironment{code}{}{}\\begin{document}\\input{part}")
    part = "\\begin{code}\n5 % 3 \\input{none}\n\\end{code}\n"
    (tmp_path / "part.tex").write_text(part + "x % y\n")
    assert "".join(section.text for section in latex.read(str(tmp_path))).endswith(part + "x\n")


def test_what_other_packages_include(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    def file(name: str, text: str) -> None:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)

    subfile = "\\documentclass[../main]{{subfiles}}\n\\begin{{document}}\n{}\n\\end{{document}}\nNever {}.\n"
    file("parts/one.tex", subfile.format("First. \\input{piece}", "one"))
    file("parts/piece.tex", "Piece.\\endinput Never here.")
    file("parts/two.tex", subfile.format("Second.", "two"))
    file("chapters/a/text.tex", "Imported. \\input{local} \\subimport{deep/}{text}")
    file("chapters/a/local.tex", "Local.")
    file("chapters/a/deep/text.tex", "Deep. \\input{local} \\input{top}")
    file("chapters/a/deep/local.tex", "Deep local.")
    file("top.tex", "Top.")
    file("figures/plot.tex", "\\documentclass{standalone}\\begin{document}Plot.\\end{document}")
    file("code/run.c", "int main; // 5 % 3")
    file("elsewhere/found.tex", "Searched.")
    file("sections/named.tex", "By a macro.")
    file(
        "main.tex",
        r"""\documentclass{article}
\makeatletter\def\input@path{{elsewhere/}}\makeatother
\newcommand{\part}[1]{\clearpage\input{sections/#1}}
\begin{document}
\subfile{parts/one} Between. \subfile{parts/two.tex}
\import{chapters/a/}{text}
\includestandalone[mode=tex]{figures/plot} \lstinputlisting[language=C]{code/run.c}
\input{found} \part{named} \includegraphics{a.png} \includegraphicsx
\subimport{none/}{at all} \subfile{nor this} \import{../}{outside} \lstinputlisting{no.c}
\bibliography{refs}
Last.
\end{document}
""",
    )
    with caplog.at_level(logging.WARNING, "synth"):
        found = latex.read(str(tmp_path))
    text = "".join(section.text for section in found)
    order = ["First.", "Piece.", "Between.", "Second.", "Imported.", "Local.", "Deep.", "Deep local.", "Top.", "Plot."]
    order += ["int main; // 5 % 3", "Searched.", "By a macro.", "Last."]
    assert [text.count(words) for words in order] == [1] * len(order)
    assert [text.index(words) for words in order] == sorted(text.index(words) for words in order)
    assert "Never" not in text
    assert [record.message.partition(", which")[0] for record in caplog.records] == [
        "main.tex includes 'none/at all'",
        "main.tex includes 'nor this'",
        "main.tex includes '../outside'",
        "main.tex shows 'no.c'",
    ]
    told = str(found)
    assert told.startswith("read 13 files, ")
    assert told.endswith("left out: 4 included files that are not there, 1 pictures, 1 \\bibliography")


@pytest.mark.parametrize(
    "command",
    [
        r"\def\inc#1{\input{#1}}\inc{part}",
        r"\NewDocumentCommand{\inc}{m}{\input{#1}}\inc{part}",
        r"\NewDocumentCommand\inc{m m}{\input{#2}}\inc{x}{part}",
        r"\newcommand{\chap}[2]{\section{#1}\label{#2}\input{#2}}\chap{The \emph{first}}{part}",
        "\\lstinputlisting[language={[LaTeX]TeX},\n  caption=It]{part.tex}",
        r"\loadglsentries{part} \csvreader[head]{part.tex}{}{\x}" + "\\input%\n  {part}",
        r"\markdownInput{part.tex} \csvautotabular{part.tex} \DTLloaddb{data}{part.tex}",
        r"\pgfplotstabletypeset[sep=comma]{part.tex} \pgfplotstabletypeset{\data}",
    ],
)
def test_every_way_to_name_a_file(tmp_path: Path, command: str):
    (tmp_path / "part.tex").write_text("Words.")
    (tmp_path / "main.tex").write_text(f"\\documentclass{{a}}\\begin{{document}}{command}\\end{{document}}")
    found = latex.read(str(tmp_path))
    assert "".join(section.text for section in found).count("Words.") == command.count("{part")
    assert not found.left_out


def test_files_that_are_not_read_are_counted(tmp_path: Path):
    for name in ("README.md", "src/a.py", "supplement.tex", ".git/config"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("\\documentclass{a}")
    command = r"\newcommand{\inc}[2][x]{\input{#2}}\inc{supplement} \newmintedfile{python}{} \pythonfile{src/a.py}"
    (tmp_path / "main.tex").write_text(r"\documentclass{a}\begin{document}" + command)
    assert str(latex.read(str(tmp_path))).endswith(
        "left out: 1 files that a macro's argument names, 1 \\newmintedfile, "
        "3 files of the folder that the document does not include"
    )
    assert "of the folder" not in str(latex.read(str(tmp_path / "main.tex")))


def test_files_that_include_one_another_end(tmp_path: Path):
    (tmp_path / "main.tex").write_text("\\documentclass{a}\\input{a}")
    (tmp_path / "a.tex").write_text("\\input{main}")
    with pytest.raises(UserError, match=r"include one another without end: main\.tex > a\.tex > main\.tex"):
        latex.read(str(tmp_path))
    for i in range(9):  # ten to the ninth includes
        (tmp_path / f"f{i}.tex").write_text(f"\\input{{f{i + 1}}}" * 10)
    (tmp_path / "main.tex").write_text("\\documentclass{a}\\input{f0}")
    (tmp_path / "f9.tex").write_text("")
    assert latex.read(str(tmp_path))
    (tmp_path / "f9.tex").write_text("boom")
    with pytest.raises(UserError, match="is longer than"):
        latex.read(str(tmp_path))


def test_a_folder_without_a_main_file(tmp_path: Path):
    (tmp_path / "a.tex").write_text("words")
    with pytest.raises(UserError, match=r"holds no LaTeX with \\documentclass"):
        latex.read(str(tmp_path))


def archive(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for info, data in members:
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def test_an_archive_is_read_in_memory():
    data = archive((member("d", tarfile.DIRTYPE), b""), (member("./d/a.tex"), b"caf\xe9"), (member("b.eps"), b"%!PS"))
    assert arxiv.unpack(data, "it") == {"d/a.tex": "café"}
    assert arxiv.unpack(gzip.decompress(data), "it") == {"d/a.tex": "café"}
    assert arxiv.unpack(gzip.compress(b"\\documentclass"), "it") == {"main.tex": "\\documentclass"}


@pytest.mark.parametrize(
    ("bad", "sentence"),
    [
        (member("/etc/a.tex"), "outside its own folder"),
        (member("d/../../a.tex"), "outside its own folder"),
        (member("..\\a.tex"), "outside its own folder"),
        (member("a.tex", tarfile.SYMTYPE, "/etc/passwd"), "a link or a device"),
        (member("a.tex", tarfile.LNKTYPE, "b.tex"), "a link or a device"),
        (member("a.tex", tarfile.CHRTYPE), "a link or a device"),
        (member("a.tex", tarfile.FIFOTYPE), "a link or a device"),
    ],
)
def test_an_archive_that_reaches_out_is_refused(bad: tarfile.TarInfo, sentence: str):
    with pytest.raises(UserError, match=rf"^it has a member .*{sentence}.*: refused$"):
        arxiv.unpack(archive((member("main.tex"), b"x"), (bad, b"")), "it")


def test_bombs_are_refused(monkeypatch: pytest.MonkeyPatch):
    bomb = gzip.compress(bytes(2**24))
    monkeypatch.setattr(arxiv, "LARGEST_SOURCE", 2**20)
    with pytest.raises(UserError, match="unpacks to more than 1048576 bytes: refused"):
        arxiv.unpack(bomb, "it")
    sparse = member("a.tex")
    header = bytearray(sparse.tobuf())
    header[124:136] = b"77777777777\0"  # 8 GiB are claimed, none are there
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    with pytest.raises(UserError, match=r"more than 10000 files or 1048576 bytes|damaged"):
        arxiv.unpack(bytes(header) + bytes(1024), "it")
    monkeypatch.setattr(arxiv, "MOST_FILES", 3)
    with pytest.raises(UserError, match="more than 3 files"):
        arxiv.unpack(archive(*((member(f"{i}.tex"), b"") for i in range(4))), "it")


def test_what_is_no_source():
    with pytest.raises(UserError, match="it is a PDF, its authors gave no LaTeX"):
        arxiv.unpack(b"%PDF-1.5", "it")
    with pytest.raises(UserError, match="it is damaged"):
        arxiv.unpack(b"\x1f\x8b\x08nonsense", "it")


@settings(deadline=None)  # the first noise imports a library that guesses encodings
@given(st.binary(max_size=2000), st.integers(0, 400))
def test_no_bytes_do_anything_but_a_sentence(noise: bytes, place: int):
    """Archives that were damaged anywhere give texts or a ValueError."""
    whole = gzip.decompress(archive((member("main.tex"), b"x" * 600), (member("b.tex"), b"y")))
    for data in (noise, whole[:place] + noise + whole[place + len(noise) :]):
        try:
            assert all(isinstance(text, str) for text in arxiv.unpack(data, "it").values())
        except ValueError as error:
            assert str(error).startswith("it ")


@pytest.mark.parametrize("address", ["arxiv:2506.06266", "arxiv:2506.06266v2", "https://arxiv.org/abs/hep-th/9901001"])
def test_addresses(address: str):
    assert arxiv.is_address(address)


@pytest.mark.parametrize("address", ["arxiv:../../etc", "arxiv:2506.06266?x=1", "https://arxiv.org/abs/"])
def test_addresses_of_no_paper(address: str):
    with pytest.raises(UserError, match="names no paper on arXiv: expected something like arxiv:2506"):
        arxiv.fetch(address, "http://127.0.0.1:9")


def test_includes_that_no_file_can_be_are_left_out(tmp_path: Path):
    (tmp_path / "loop.tex").symlink_to(tmp_path / "loop.tex")
    names = ("loop", "a" * 300, "a\0b", "/" * 5000)
    included = "".join(rf"\input{{{name}}}" for name in names)
    (tmp_path / "main.tex").write_text(rf"\documentclass{{article}}\begin{{document}}{included}kept\end{{document}}")
    said = latex.read(str(tmp_path / "main.tex"), None)
    assert "kept" in "".join(section.text for section in said)
