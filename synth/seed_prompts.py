"""Seed prompts: instructions to the side that asks first, short enough for a model of 135M parameters.

Five types are the paper's. Every prompt asks for one message only, and for names, so that the question can be
understood by a reader who never saw the text.

`generic` and `qa` are upstream's looser two. Two more are for models too small to find something worth asking in a
whole chunk. `sentence` shows side A one sentence and wants a question about it. `cloze` needs no side A, since the
prompt itself is the question: it gives the beginning of a sentence and wants the rest.

A type may also be the user's own: a text file of prompts with blank lines between them, or a function as
`package.module:function`, which is given the chunk and a `random.Random` and returns a prompt's text or a `SeedPrompt`.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from cartridges_jax.command_line import files
from cartridges_jax.command_line.errors import UserError

FORMATS = ("JSON", "YAML", "TOML", "INI", "XML", "plain text")

_STRUCTURING = (
    "Pick one part of the text. Write one request that asks an assistant to put the facts of that part into {format}. "
    "Say which part you mean, and which names, dates and numbers must be there. Write only the request.",
    "Pick one person, thing or topic from the text. Write one request that asks an assistant to list what is known "
    "about it as {format}. Name it, and say which details are wanted. Write only the request.",
)

SEED_PROMPTS: dict[str, tuple[str, ...]] = {
    "structuring": tuple(prompt.format(format=name) for prompt in _STRUCTURING for name in FORMATS),
    "summarization": (
        "Pick one part of the text. Write one request for a short summary of it. Say by name which part you mean. "
        "Write only the request.",
        "Write one message that asks an assistant to sum up a topic from the text in a few sentences. Name the topic, "
        "and the people, places or dates that belong to it. Write only the message.",
        "Write one request for the main points of a section of the text. Name the section by its title or subject. "
        "Write only the request.",
    ),
    "question": (
        "Write one question about a fact in the text. Use full names, so that it is clear to someone who has not read "
        "the text. Write only the question.",
        "Write one question that tests whether someone remembers a detail of the text: a name, a number, a date or a "
        "reason. Do not give the answer. Write only the question.",
        "Write one question that needs two facts of the text to be answered. Name what it is about. Write only the "
        "question.",
        "Write one question that begins with Why or How and that the text answers. Name what it is about. Write only "
        "the question.",
    ),
    "use_case": (
        "Think of someone who needs this text for their work. Write one question or task that they would give to an "
        "assistant. Name the things it is about. Write only the question or task.",
        "Think of a real problem that this text helps to solve. Write one message in which someone asks for help with "
        "that problem. Give the details that matter. Write only the message.",
    ),
    "creative": (
        "Write one playful request about something in the text: a story, a poem, a letter or a dialogue. Name what it "
        "should be about. Write only the request.",
        "Write one open question that starts an unusual conversation about an idea in the text. Name the idea. Write "
        "only the question.",
        "Ask an assistant to explain one thing from the text with a surprising comparison. Name the thing. Write only "
        "the request.",
    ),
}

# These two are drawn only if the config names them.
MORE_PROMPTS: dict[str, tuple[str, ...]] = {
    "generic": (
        "Write the first message of a conversation with an assistant about something in the text. Ask for something, "
        "or ask about something, and name it. Write only the message.",
    ),
    "qa": (
        "Write one question about something in the text, to be answered in a few sentences. Name what it is about. "
        "Write only the question.",
    ),
}

# Side A sees one sentence of the chunk in place of {sentence}.
SENTENCE_PROMPTS = (
    'Sentence: "{sentence}"\nWrite a question about this sentence. Use the names in it. Write only the question.',
)

# Asked as they stand, with the beginning of a sentence of the chunk in place of {cue}.
CLOZE_PROMPTS = (
    "Fill in the rest: {cue} ...",
    "Fill in the rest: {cue} ... Answer in a few words.",
    "{cue} ...",
    "{cue} ... what? Answer in a few words.",
    "How does this sentence end? {cue}",
)
KINDS = (*SEED_PROMPTS, *MORE_PROMPTS, "sentence", "cloze")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+")
_FEWEST_WORDS = 5  # of a sentence to ask about: some to show, some to hide
_LONGEST_CUE = 16  # words; a sentence, or a text without full stops, may be much longer
_LONGEST_SENTENCE = 40  # words


@dataclasses.dataclass(frozen=True)
class SeedPrompt:
    kind: str
    text: str
    is_question: bool  # the prompt itself opens the conversation, nobody rephrases it


def check(kinds: Sequence[str], weights: Sequence[float]) -> None:
    """Raises a sentence unless every type is known or can be loaded, and the weights fit the types."""
    if not kinds:
        raise UserError(f"config.seed_prompts is empty, known types are {', '.join(KINDS)}")
    for kind in kinds:
        if kind not in KINDS:
            _own(kind)
    if weights and (len(weights) != len(kinds) or min(weights) < 0 or not sum(weights) > 0):
        raise UserError(
            f"config.seed_prompt_weights is {tuple(weights)}, expected {len(kinds)} numbers, one for each of "
            "config.seed_prompts, none below 0 and not all 0"
        )


def draw(kinds: Sequence[str], chunk: str, rng: random.Random, weights: Sequence[float] = ()) -> SeedPrompt:
    """Draws a type by its weight (one that is named twice comes twice as often), and one of its prompts."""
    kind = rng.choices(kinds, weights)[0] if weights else rng.choice(kinds)
    if kind == "cloze":
        template = rng.choice(CLOZE_PROMPTS)
        return SeedPrompt(kind, template.format(cue=_cue(_sentence(chunk, rng), rng)), is_question=True)
    if kind == "sentence":
        sentence = " ".join(_sentence(chunk, rng)[:_LONGEST_SENTENCE])
        return SeedPrompt(kind, rng.choice(SENTENCE_PROMPTS).format(sentence=sentence), is_question=False)
    if kind in KINDS:
        return SeedPrompt(kind, rng.choice((SEED_PROMPTS | MORE_PROMPTS)[kind]), is_question=False)
    prompt = _own(kind)(chunk, rng)
    return prompt if isinstance(prompt, SeedPrompt) else SeedPrompt(kind, prompt, is_question=False)


@functools.cache
def _own(kind: str) -> Callable[[str, random.Random], SeedPrompt | str]:
    """A function that draws one of the user's own prompts: one that `kind` names, or one for the file at `kind`."""
    module, colon, name = kind.partition(":")
    if colon and all(part.isidentifier() for part in (*module.split("."), name)):
        try:
            return getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise UserError(f"config.seed_prompts names {kind!r}, which cannot be imported: {error}") from error
    if not Path(kind).suffix:
        near = difflib.get_close_matches(kind, KINDS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(KINDS)}, a file and module:function"
        raise UserError(f"config.seed_prompts names an unknown type {kind!r}: {hint}")
    text = files.read_text(kind, "the seed prompts that config.seed_prompts names, with blank lines between them")
    prompts = [prompt.strip() for prompt in re.split(r"\n\s*\n", text) if prompt.strip()]
    return lambda _, rng: SeedPrompt(Path(kind).stem, rng.choice(prompts), is_question=False)


def _sentence(chunk: str, rng: random.Random) -> list[str]:
    """The words of a sentence that is long enough to ask about, or of the whole chunk if there is none."""
    sentences = [s.split() for s in _SENTENCE_END.split(chunk)]
    return rng.choice([s for s in sentences if len(s) >= _FEWEST_WORDS] or [chunk.split()])


def _cue(words: list[str], rng: random.Random) -> str:
    return " ".join(words[: rng.randint(3, max(3, min(len(words) - 2, _LONGEST_CUE)))])
