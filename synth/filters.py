"""Finds what is wrong with a conversation, as far as words tell. Each finding has a name and a switch in the config.

The filters run when all conversations are there, in the order of their indices, so that the same are kept whatever the
order in which they ended. Nothing is thrown away before, so a run's filters may be changed afterwards.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence

import numpy as np

from synth import support
from synth.config import FilterConfig
from synth.conversation import Conversation

SIMILARITY = 0.85  # of two questions: the share of their runs of five characters that both have
LONGEST_WORD = 30  # characters, on average: text with longer ones is written without spaces
_SHINGLE, _BITS = 5, 128

_TEXT_TALK = re.compile(
    r"\b(?:the|this|that|your|given|provided|above)\s+(?:(?:given|provided|above|following)\s+)?"
    r"(?:(?:text|passage|excerpt)(?!\s+(?:box|editor|field|file|message|of)\b)"
    r"|context(?!\s+(?:of|in|for|that|where|window)\b)|(?:document|information)\s+(?:provided|given|above)\b)",
    re.IGNORECASE,
)
_REFUSAL = re.compile(
    r"\s*(?:(?:i['\u2019]m|i am)\s+(?:very\s+|really\s+)?(?:sorry|afraid|unable)"
    r"|(?:sorry|unfortunately),?\s+(?:but\s+)?i\b"
    r"|i\s+(?:apologi[sz]e|can(?:no|['\u2019])t|could\s+not|do\s+not\s+have|don['\u2019]t\s+have|won['\u2019]t)\b"
    r"|as an ai\b)",
    re.IGNORECASE,
)


def findings(conversation: Conversation) -> set[str]:
    """The fields of `FilterConfig` that apply to the conversation, except `near_duplicate`."""
    answers = [message.content for message in conversation.messages if message.role == "assistant"]
    if not answers or not all(message.content.strip() for message in conversation.messages):
        return {"empty"}
    found = {
        "truncated": "length" in conversation.metadata.get("finish_reasons", ()),
        "repetition": any(map(_repeats, answers)),
        "text_talk": any(map(_TEXT_TALK.search, answers)),
        "refusal": any(map(_REFUSAL.match, answers)),
        "unsupported": _is_unsupported(conversation),
    }
    return {name for name, is_so in found.items() if is_so}


def _repeats(text: str) -> bool:
    """Whether most runs of four words occurred before in the answer, as in a loop, but not in a list."""
    words: Sequence[str] = text.split()
    if len(text) > LONGEST_WORD * len(words):
        words = text
    runs = list(zip(words, words[1:], words[2:], words[3:], strict=False))
    return len(runs) >= 12 and len(set(runs)) < len(runs) / 2


def _is_unsupported(conversation: Conversation) -> bool:
    """Whether an answer claims what neither the teacher's context nor a question says, if there is a context at all."""
    context = conversation.system_prompt
    answers = [m.content.rpartition("</think>")[2] for m in conversation.messages if m.role == "assistant"]
    if not context or not any(map(support.may_claim, answers)):
        return False
    source = support.source_of(context)
    if not any(map(source.lacks, answers)):
        return False
    asked = "\n\n".join(message.content for message in conversation.messages if message.role != "assistant")
    return any(map(source.with_words_of(support.Source(asked)).lacks, answers))


class Filter:
    """Applies the config's filters to one conversation after another, in the order of their indices."""

    def __init__(self, config: FilterConfig):
        self._config = config
        self._questions = _Questions()

    def check(self, conversation: Conversation) -> tuple[set[str], bool]:
        """What is wrong with the conversation, and whether it is kept."""
        found = findings(conversation)
        drop = any(getattr(self._config, name) for name in found)
        question = next((message.content for message in conversation.messages if message.role == "user"), "")
        # a conversation that is dropped makes no later one a duplicate
        if not drop and self._questions.add(question):
            found.add("near_duplicate")
            drop = self._config.near_duplicate
        return found, not drop


class _Questions:
    """The questions asked so far, 24 bytes each, as signatures whose distance tells how alike two of them are.

    A signature is 128 one-bit minwise hashes (arXiv 0910.3349): for two sets, each bit agrees with probability
    (1 + J) / 2 for a Jaccard similarity J. Questions that differ in a number are never alike.
    """

    def __init__(self):
        self._count = 0
        self._signs = np.zeros((2, 1024), np.uint64)
        self._numbers = np.zeros(1024, np.uint32)

    def add(self, question: str) -> bool:
        """Whether a question like it was asked before. If none was, it is added."""
        words = " ".join(re.findall(r"\w+", question.lower()))
        sign = _sign(words)
        numbers = zlib.crc32(" ".join(re.findall(r"\d+", words)).encode())
        n = self._count
        first, second = (np.bitwise_count(self._signs[i, :n] ^ sign[i]) for i in range(2))
        alike = first + second <= (1 - SIMILARITY) / 2 * _BITS
        if (alike & (self._numbers[:n] == numbers)).any():
            return True
        if n == len(self._numbers):
            self._signs = np.concatenate([self._signs, np.zeros_like(self._signs)], axis=1)
            self._numbers = np.concatenate([self._numbers, np.zeros_like(self._numbers)])
        self._signs[:, n], self._numbers[n] = sign, numbers
        self._count += 1
        return False


# `RandomState`'s stream is the one that NumPy never changes
_FACTORS, _OFFSETS = np.random.RandomState(0).randint(1, 2**32, (2, _BITS, 1), np.uint32) | np.uint32(1)


def _sign(words: str) -> np.ndarray:
    letters = np.frombuffer(words.encode().ljust(_SHINGLE), np.uint8).astype(np.uint32)
    shingles = np.zeros(len(letters) - _SHINGLE + 1, np.uint32)
    for i in range(_SHINGLE):
        shingles = (shingles ^ letters[i : len(letters) - _SHINGLE + 1 + i]) * np.uint32(16777619)
    shingles ^= shingles >> 15
    hashes = (shingles * _FACTORS) ^ _OFFSETS
    hashes ^= hashes >> 16
    least = (hashes * np.uint32(0x85EBCA6B)).min(axis=1)
    return np.packbits((least >> 7) & 1).view(np.uint64)
