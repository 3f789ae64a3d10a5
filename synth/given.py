"""Chunks and questions that exist already: a folder of `chunks/*.md`, and beside them `questions/*.jsonl`.

No text is cut and no question is asked for: the teacher sees the chunk that a question names, and answers it. Where an
answer is given too, the teacher only scores it.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import unicodedata
from collections.abc import Callable
from pathlib import Path

from cartridges_jax.command_line import files
from cartridges_jax.command_line.errors import UserError
from synth import existing
from synth.config import SynthConfig
from synth.resources import sections

EXPECTED = 'expected {"question": ..., "chunk": "NAME.md"}, and "answer" where there is one'


@dataclasses.dataclass(frozen=True)
class GivenQuestion:
    """A line of a questions file, with the chunk that it names."""

    question: str
    answer: str | None
    chunk: str  # its file's name
    text: str  # of the chunk


def check(config: SynthConfig) -> None:
    """Raises a sentence unless the given questions, and the conversations that exist already, are there and suffice."""
    sources = (
        ("distill_existing", config.distill_existing, existing.read, "conversations"),
        ("given_questions", config.given_questions, _read, "questions"),
    )
    for name, source, read, what in sources:
        if source is None:
            continue
        found, wanted = len(read(source.path)), math.floor(config.num_conversations * source.share)
        if wanted > found:
            raise UserError(
                f"config.{name}.path: {source.path} holds {found} {what}, but {wanted} of {config.num_conversations} "
                f"conversations are to come from there: lower config.num_conversations or config.{name}.share"
            )


def question_of(number: int, config: SynthConfig) -> GivenQuestion | None:
    """The given question that conversation `number` begins with, or None: they are spread evenly over the dataset."""
    given = config.given_questions
    place = None if given is None else existing.place(number, given.share)
    return None if given is None or place is None else _read(given.path)[place]


def digest(config: SynthConfig) -> str | None:
    """A hash of the questions and their chunks, by which a run's folder knows them again."""
    if config.given_questions is None:
        return None
    everything = [dataclasses.astuple(one) for one in _read(config.given_questions.path)]
    return hashlib.sha256(json.dumps(everything).encode()).hexdigest()


def told(config: SynthConfig) -> str:
    """One sentence about what was read and what was left out, as there is one for every resource."""
    assert config.given_questions is not None
    root, read = Path(config.given_questions.path), _read(config.given_questions.path)
    chunks, named = _chunks(root), {one.chunk for one in read}
    files_there = sum(file.is_file() and not _is_note(file) for file in root.rglob("*"))
    others = files_there - len(chunks) - len(_inside(root, "questions", "jsonl"))
    left_out = {
        "chunks that no question names": len(chunks) - len(named),
        "files that are neither chunks/*.md nor questions/*.jsonl": others,
    }
    answered = sum(one.answer is not None for one in read)
    counts = f"{len(read)} questions, {answered} of them answered, about {len(named)} chunks"
    return f"{root.resolve().name}: read {counts}; {sections.told(left_out)}"


@functools.lru_cache(maxsize=2)
def _read(path: str) -> tuple[GivenQuestion, ...]:
    chunks = _chunks(Path(path))
    text_of = functools.cache(functools.partial(files.read_text, expected="a chunk"))
    read = [
        _parse(line, f"{file}, line {number}", chunks, text_of)
        for file in _inside(Path(path), "questions", "jsonl")
        for number, line in files.read_json_lines(file, "questions")
    ]
    if not read:
        raise UserError(f"{path} holds no question in questions/*.jsonl: {EXPECTED}")
    return tuple(read)


def _chunks(root: Path) -> dict[str, Path]:
    return {_composed(file.name): file for file in _inside(root, "chunks", "md")}


def _composed(name: str) -> str:
    """A name with letters and accents as one: some systems write files' names so, and others apart."""
    return unicodedata.normalize("NFC", name)


def _is_note(file: Path) -> bool:
    """Whether a file is one of a Mac's own notes about another file."""
    return file.name.startswith("._") or file.name == ".DS_Store"


def _inside(root: Path, name: str, suffix: str) -> list[Path]:
    """Raises: FileNotFoundError, UserError: there is no such file, or a link that leads out of the folder."""
    found = sorted(file for file in (root / name).glob(f"*.{suffix}") if not _is_note(file))
    if not found:
        raise FileNotFoundError(
            f"{root} holds no {name}/*.{suffix}: config.given_questions.path is a folder of chunks/*.md and "
            "questions/*.jsonl"
        )
    for file in found:
        if not file.resolve().is_relative_to(root.resolve()):
            raise UserError(f"{file} leads out of {root}: put the file itself there")
    return found


def _parse(line: str, where: str, chunks: dict[str, Path], text_of: Callable[[Path], str]) -> GivenQuestion:
    record = files.parse_json(line, f"{where},")
    if not isinstance(record, dict):
        raise UserError(f"{where} is no question: {EXPECTED}")
    question, name, answer = (record.get(key) for key in ("question", "chunk", "answer"))
    if not isinstance(question, str) or not question.strip():
        raise UserError(f"{where} has no question: {EXPECTED}")
    if not isinstance(name, str) or (name := _composed(name)) not in chunks:
        raise UserError(f"{where} names the chunk {name!r}, and there is no such file in chunks/: {EXPECTED}")
    if answer is not None and (not isinstance(answer, str) or not answer.strip()):
        raise UserError(f"{where} has an answer that is no text: leave it away, and the teacher answers")
    return GivenQuestion(question, answer, name, text_of(chunks[name]))
