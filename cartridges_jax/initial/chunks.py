"""The chunks of a document that are compacted one by one, and the reference queries that ask for their tokens.

The queries are those of self-study conversations and of the chunk being repeated.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

from cartridges_jax.command_line.errors import UserError
from cartridges_jax.models.language_model import LanguageModel
from cartridges_jax.training.data import Example, PackedRows

ROW = 256  # tokens of a packed row of reference conversations
QUERY_TOKENS = 1024  # tokens of conversations whose queries are used; p slots need several times p queries


@dataclasses.dataclass(frozen=True)
class MatchingConfig:
    queries: Literal["repeat", "conversations", "both"] = "repeat"  # the document being repeated needs no self-study
    chunk_tokens: int = 4096  # tokens that are compacted at once; memory grows with their square
    fit_keys: bool | None = None  # None: below a thirtieth of the tokens (`attention_matching.AMPLE`)

    def __post_init__(self) -> None:
        if self.chunk_tokens < 2:
            raise UserError(f"init.matching.chunk_tokens is {self.chunk_tokens}, expected at least 2")


@dataclasses.dataclass(frozen=True)
class Chunk:
    """A part of a document in a system message, and packed rows of queries about it."""

    tokens: list[int]
    rows: list[dict[str, np.ndarray]]

    @property
    def queries(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The rows' tokens, segment ids and positions, each `[b, t]`."""
        tokens, segment_ids, positions = (
            np.stack([row[name] for row in self.rows]) for name in ("tokens", "segment_ids", "positions")
        )
        return tokens, segment_ids, positions


def chunks_of(model: LanguageModel, corpus: str, examples: Sequence[Example], config: MatchingConfig) -> list[Chunk]:
    """Cuts a document into chunks of one length, each of which stands in a system message as if it were alone.

    Raises:
      UserError: there is no query or no text, or a chunk leaves no room for a text.
    """
    if config.queries == "conversations" and not examples:
        raise UserError("init.matching.queries is 'conversations' and there are none: give a dataset, or use 'repeat'")
    texts, (before, after) = bodies(model, corpus, config)
    return [Chunk([*before, *body, *after], _queries(model, body, examples, config)) for body in texts]


def bodies(
    model: LanguageModel, corpus: str, config: MatchingConfig
) -> tuple[list[list[int]], tuple[list[int], list[int]]]:
    """Returns the document's tokens in chunks, and what stands before and after each in a system message.

    With that, no chunk has more than `config.chunk_tokens` tokens. The last chunk begins early enough to be as long as
    the others, so that one compiled program compacts them all.
    """
    size = min(config.chunk_tokens, model.config.max_position_embeddings - ROW)

    def message(text: str) -> list[int]:
        return model.tokenizer.chat_ids([{"role": "system", "content": text}], add_generation_prompt=False)

    whole, other = message(corpus), message("\N{SYMBOL FOR NULL}")
    before = _common(whole, other)
    after = _common(whole[before:][::-1], other[before:][::-1])
    frame = whole[:before], whole[len(whole) - after :]
    body, room = whole[before : len(whole) - after], size - before - after
    if room < 1:
        raise UserError(
            f"a chunk of {size} tokens leaves no room for a text: expected more than {size - room} of "
            f"init.matching.chunk_tokens, and {ROW} more than those of {model.name}'s window, "
            f"{model.config.max_position_embeddings}"
        )
    if not body:
        raise UserError("the document is empty: attention matching needs a text, or choose another init.kind")
    count = -(-len(body) // room)
    length = -(-len(body) // count)
    starts = [min(i * length, len(body) - length) for i in range(count)]
    return [body[start : start + length] for start in starts], frame


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Returns the length of the longest common beginning of two sequences."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _queries(
    model: LanguageModel, body: Sequence[int], examples: Sequence[Example], config: MatchingConfig
) -> list[dict[str, np.ndarray]]:
    """Returns packed rows whose queries a chunk's slots are fitted to; their number is the same for every choice."""
    repeated = 2 * len(body)
    counts = {"both": (QUERY_TOKENS, repeated), "conversations": (QUERY_TOKENS + repeated, 0), "repeat": (0, repeated)}
    asked, said = counts[config.queries]
    return _rows(examples, asked) + _rows(repetitions(model, body), said)


def _rows(examples: Sequence[Example], num_tokens: int) -> list[dict[str, np.ndarray]]:
    rows = PackedRows(examples, ROW, batch_size=1, num_epochs=1, seed=0)
    return [rows[i] for i in range(min(len(rows), math.ceil(num_tokens / ROW)))]


def repetitions(model: LanguageModel, tokens: Sequence[int], length: int = ROW, shift: float = 0.0) -> list[Example]:
    """Makes examples in which a text is repeated, piece by piece: their queries look for each of its tokens.

    Their targets are the text's own tokens.

    Args:
      length: the most tokens of an example.
      shift: the part of a piece, below 1, by which the first one is shorter than the others.

    Raises:
      UserError: `length` leaves no room for a text.
    """
    frame = model.tokenizer.turn_ids([{"role": "user", "content": "Repeat the text."}], add_generation_prompt=True)
    size = length - len(frame)
    if size < 1:
        raise UserError(
            f"a row of {length} tokens leaves no room for a text that is repeated: expected more than {len(frame)}"
        )
    starts = range(-int(shift * size), len(tokens), size)
    pieces = [np.asarray(tokens[max(start, 0) : start + size], np.int32) for start in starts]
    return [
        Example(
            np.concatenate([np.asarray(frame, np.int32), piece]),
            np.arange(len(frame) - 1, len(frame) + len(piece) - 1, dtype=np.int32),
            piece,
            np.zeros(len(piece), np.float32),
        )
        for piece in pieces
    ]
