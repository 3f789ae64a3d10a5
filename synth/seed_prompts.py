"""What sets a conversation going: instructions to the side that asks, short enough for a model of 135M parameters.

The five types are the paper's. Every prompt asks for one message only, and for names, so that the question can be
understood by a reader who never saw the text.
"""

from __future__ import annotations

import random

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


def draw(kinds: tuple[str, ...], rng: random.Random) -> tuple[str, str]:
    """A type, and one of its prompts."""
    kind = rng.choice(kinds)
    return kind, rng.choice(SEED_PROMPTS[kind])
