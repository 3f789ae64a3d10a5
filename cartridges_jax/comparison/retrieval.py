"""Retrieval by words: the passages of a document that fit a question best, as many tokens of them as a budget has."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from cartridges_jax.command_line.errors import MissingPackage
from cartridges_jax.models.tokenizer import Tokenizer

LARGEST = 128  # tokens of a passage


def bm25_retriever(text: str, num_tokens: int, tokenizer: Tokenizer) -> Callable[[str], str]:
    """Returns a function from a question to its best passages, in the document's order and with blank lines between.

    The passages are of equal length, at most `LARGEST` tokens, and those of a question have `num_tokens` together.
    """
    count = -(-num_tokens // LARGEST)
    size = num_tokens // count
    ids = tokenizer.encode(text)
    passages = [tokenizer.decode(ids[start : start + size]) for start in range(0, len(ids), size)]
    best = bm25_ranking(passages, count)
    return lambda question: "\n\n".join(passages[i] for i in sorted(best(question)))


def bm25_ranking(passages: Sequence[str], count: int) -> Callable[[str], list[int]]:
    """Returns a function from a question to the numbers of the passages that fit its words best, the best first."""
    try:
        import bm25s
    except ImportError as error:
        raise MissingPackage("BM25 is computed by bm25s: pip install 'cartridges-jax[compare]'") from error
    logging.getLogger("bm25s").setLevel(logging.WARNING)  # it asks to log every index that it builds
    index = bm25s.BM25()
    index.index(bm25s.tokenize(list(passages), show_progress=False), show_progress=False)

    def rank(question: str) -> list[int]:
        asked = bm25s.tokenize([question], show_progress=False)
        found, _ = index.retrieve(asked, k=min(count, len(passages)), show_progress=False)
        return [int(i) for i in found[0]]

    return rank
