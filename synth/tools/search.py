"""A tool that searches the passages of the whole resource by BM25, and so shows what lies outside of the chunk.

The ranking is Okapi BM25 with Lucene's never-negative inverse document frequency (Robertson and Zaragoza 2009,
"The Probabilistic Relevance Framework: BM25 and Beyond").
"""

from __future__ import annotations

import collections
import itertools
import math
import re
from collections.abc import Mapping
from typing import Any

from cartridges_jax.command_line.errors import UserError

PASSAGE_CHARACTERS = 1000
K1, B = 1.5, 0.75
_WORD = re.compile(r"\w+")


class Search:
    name = "search"
    description = "Finds the passages of the text that fit a query best."
    parameters: Mapping[str, Any] = {
        "type": "object",
        "properties": {
            "query": {"type": "string", "description": "words to look for"},
            "top_k": {"type": "integer", "description": "how many passages (default 3)"},
        },
        "required": ["query"],
    }

    def __init__(self, text: str):
        self._passages = passages(text)
        counts = [collections.Counter(_words(passage)) for passage in self._passages]
        mean = sum(count.total() for count in counts) / max(len(counts), 1) or 1.0
        self._scores: dict[str, dict[int, float]] = collections.defaultdict(dict)  # of a word in each passage with it
        for i, count in enumerate(counts):
            length = 1 - B + B * count.total() / mean
            for word, n in count.items():
                self._scores[word][i] = n * (K1 + 1) / (n + K1 * length)
        for found in self._scores.values():
            rarity = math.log(1 + (len(counts) - len(found) + 0.5) / (len(found) + 0.5))
            found.update({i: rarity * score for i, score in found.items()})

    async def call(self, arguments: Mapping[str, Any]) -> str:
        query, top_k = arguments.get("query"), arguments.get("top_k", 3)
        if not isinstance(query, str) or type(top_k) is not int or top_k < 1:
            raise UserError(f"query is {query!r} and top_k {top_k!r}, expected a text and a number of 1 or more")
        best = sorted(self.rank(query)[:top_k])
        if not best:
            raise UserError(f"no passage has a word of {query!r}")
        parts = [self._passages[best[0]]]
        for before, this in itertools.pairwise(best):
            parts += [self._passages[this]] if this == before + 1 else ["...", self._passages[this]]
        return "\n".join(parts)

    def rank(self, query: str) -> list[int]:
        """The numbers of the passages that have any of the query's words, the best first."""
        totals: dict[int, float] = collections.defaultdict(float)
        for word in _words(query):
            for i, score in self._scores.get(word, {}).items():
                totals[i] += score
        return sorted(totals, key=lambda i: (-totals[i], i))


def passages(text: str) -> list[str]:
    """Cuts a text into passages of about `PASSAGE_CHARACTERS`, between paragraphs, or between words in a long one."""
    found: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text):
        words = paragraph.split(" ")
        while words:
            piece = [words.pop(0)]
            length = len(piece[0])
            while words and length + 1 + len(words[0]) <= PASSAGE_CHARACTERS:
                length += 1 + len(words[0])
                piece.append(words.pop(0))
            joined = " ".join(piece)
            if found and len(found[-1]) + len(joined) + 2 <= PASSAGE_CHARACTERS:
                found[-1] += f"\n\n{joined}"
            elif joined.strip():
                found.append(joined)
    return found


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())
