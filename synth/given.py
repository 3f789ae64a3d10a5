"""Chunks and questions that exist already: a folder of `chunks/*.md`, and beside them `questions/*.jsonl`.

Nobody cuts and nobody asks: the teacher sees the chunk that a question names, and answers or has its answer scored.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
from pathlib import Path

from cartridges_jax.command_line import files
from cartridges_jax.command_line.errors import UserError
from synth import existing
from synth.config import SynthConfig

EXPECTED = 'expected {"question": ..., "chunk": "NAME.md"}, and "answer" where there is one'


@dataclasses.dataclass(frozen=True)
class Given:
    question: str
    answer: str | None
    chunk: str  # its file's name
    text: str  # and what that holds


def check(config: SynthConfig) -> None:
    """Raises a sentence unless the folder is there, is what it should be, and holds enough questions."""
    given = config.given_questions
    if given is None:
        return
    held, wanted = len(_read(given.path)), math.floor(config.num_conversations * given.share)
    if wanted > held:
        raise UserError(
            f"config.given_questions.path: {given.path} holds {held} questions, but {wanted} of "
            f"{config.num_conversations} conversations are to begin with them: lower config.num_conversations or "
            "their share"
        )


def question_of(number: int, config: SynthConfig) -> Given | None:
    """The one that the dataset's conversation `number` begins with, spread evenly at the configured share."""
    given = config.given_questions
    place = None if given is None else existing.place(number, given.share)
    return None if given is None or place is None else _read(given.path)[place]


def digest(config: SynthConfig) -> str | None:
    """What a run's folder remembers of the questions and their chunks."""
    if config.given_questions is None:
        return None
    everything = [dataclasses.astuple(one) for one in _read(config.given_questions.path)]
    return hashlib.sha256(json.dumps(everything).encode()).hexdigest()


def told(config: SynthConfig) -> str:
    """One sentence, as for a resource."""
    assert config.given_questions is not None
    read = _read(config.given_questions.path)
    chunks, named = _chunks(Path(config.given_questions.path)), {one.chunk for one in read}
    unnamed = len(chunks) - len(named)
    left_out = f"left out: {unnamed} chunks that no question names" if unnamed else "nothing was left out"
    answered = sum(one.answer is not None for one in read)
    name = Path(config.given_questions.path).resolve().name
    return f"{name}: read {len(read)} questions, {answered} of them answered, about {len(named)} chunks; {left_out}"


@functools.lru_cache(maxsize=2)
def _read(path: str) -> tuple[Given, ...]:
    chunks = _chunks(Path(path))
    read = [
        _parse(line, f"{file}, line {number}", chunks)
        for file in _inside(Path(path), "questions", "jsonl")
        for number, line in files.read_json_lines(file, "questions")
    ]
    if not read:
        raise UserError(f"{path} holds no question in questions/*.jsonl: {EXPECTED}")
    return tuple(read)


def _chunks(root: Path) -> dict[str, str]:
    return {file.name: files.read_text(file, "a chunk") for file in _inside(root, "chunks", "md")}


def _inside(root: Path, name: str, suffix: str) -> list[Path]:
    """Raises: FileNotFoundError, UserError: there is no such file, or a link that leads out of the folder."""
    found = sorted((root / name).glob(f"*.{suffix}"))
    if not found:
        raise FileNotFoundError(
            f"{root} holds no {name}/*.{suffix}: config.given_questions.path is a folder of chunks/*.md and "
            "questions/*.jsonl"
        )
    for file in found:
        if not file.resolve().is_relative_to(root.resolve()):
            raise UserError(f"{file} leads out of {root}: put the file itself there")
    return found


def _parse(line: str, where: str, chunks: dict[str, str]) -> Given:
    record = files.parse_json(line, f"{where},")
    if not isinstance(record, dict):
        raise UserError(f"{where} is no question: {EXPECTED}")
    question, name, answer = (record.get(key) for key in ("question", "chunk", "answer"))
    if not isinstance(question, str) or not question.strip():
        raise UserError(f"{where} has no question: {EXPECTED}")
    if not isinstance(name, str) or name not in chunks:
        raise UserError(f"{where} names the chunk {name!r}, and there is no such file in chunks/: {EXPECTED}")
    if answer is not None and (not isinstance(answer, str) or not answer.strip()):
        raise UserError(f"{where} has an answer that is no text: leave it away, and the teacher answers")
    return Given(question, answer, name, chunks[name])
