"""The sequences that decode, as arrays: on the host they change in place, and the device gets them only when they do.

From one step to the next a batch of the same sequences changes in numbers that the device can work out: positions and
counts of tokens go up by one, and the last tokens are those that it has sampled. So a step returns them for the next
one. The host sends a batch anew when its sequences are others, and its block table when a sequence begins a page.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import numpy as np
from jaxtyping import Array, Int

from cartridges_jax.kernels.decode_attention.pages import AttentionMetadata
from cartridges_jax.serving.metadata import PAGE_SIZE, written_pages
from cartridges_jax.serving.sampling import GREEDY, SamplingParams, Wants
from cartridges_jax.serving.scheduler import BlockTable, SequenceInput


@flax.struct.dataclass
class DecodeBatch:
    """What a decoding step is told about its rows, the last of which may belong to no sequence.

    Attributes:
      indices: the row's sequence; one past the last for a row that only pads.
      tokens: what is written; -1 stands for the last token that was sampled for the sequence.
    """

    indices: Int[Array | np.ndarray, " b"]
    tokens: Int[Array | np.ndarray, " b"]
    metadata: AttentionMetadata
    sampling_params: SamplingParams

    @property
    def advancing(self) -> tuple[Any, Any, Any]:
        """What differs at the next step, if that has the same rows."""
        return self.tokens, self.metadata.starts, self.sampling_params.step

    def advanced(self, tokens: Any, starts: Any, step: Any) -> DecodeBatch:
        """The batch with other numbers of `advancing`."""
        params = self.sampling_params.replace(step=step)
        return self.replace(tokens=tokens, metadata=self.metadata._replace(starts=starts), sampling_params=params)


class Sequences:
    """The sequences of an engine by their indices, and one more, with which batches are padded.

    Args:
      pages_each: how many pages the tokens of a sequence have at most.
      batch_sizes: how many rows a batch may have, in ascending order.
      attention_metadata: makes that of a batch, of `starts`, `block_table` and `slots` as `metadata` does.
      put: brings a batch, or one of its arrays, to the devices.
    """

    def __init__(
        self,
        max_num_seqs: int,
        pages_each: int,
        batch_sizes: Sequence[int],
        attention_metadata: Callable[..., AttentionMetadata],
        put: Callable[[Any], Any],
    ):
        self._none = max_num_seqs
        self._batch_sizes, self._attention_metadata, self._put = batch_sizes, attention_metadata, put
        nothing = SequenceInput(max_num_seqs, 0, 0, BlockTable(()), 0.0, 1.0, 0, 0, 0)
        self._block_table = np.full((max_num_seqs + 1, pages_each), -1, np.int32)
        self._num_pages = [0] * (max_num_seqs + 1)
        self._slots: list[Sequence[int]] = [()] * (max_num_seqs + 1)
        self._tokens, self._positions = (np.zeros(max_num_seqs + 1, np.int32) for _ in range(2))
        self._sampling_params = jax.tree.map(lambda a: np.full(max_num_seqs + 1, a), _sampling_params(nothing))
        self.num_top = [0] * (max_num_seqs + 1)  # how many alternatives each wants
        self._indices: list[int] = []  # those of the batch on the device
        self._rows = np.zeros(0, np.int32)  # the same, as an array
        self._batch: DecodeBatch | None = None
        self.wants = GREEDY  # what the sequences of the batch want of their sampling

    def begin(self, sequence: SequenceInput) -> None:
        """Puts a sequence in the place of the one that has had its index."""
        i, pages = sequence.index, sequence.block_table.pages
        self._block_table[i] = -1
        self._block_table[i, : len(pages)] = pages
        self._num_pages[i], self._slots[i] = len(pages), sequence.block_table.slots
        self._tokens[i], self._positions[i] = sequence.token, sequence.position
        for of_all, own in zip(*map(jax.tree.leaves, (self._sampling_params, _sampling_params(sequence))), strict=True):
            of_all[i] = own
        self.num_top[i] = sequence.top_logprobs
        self._indices = []  # a new batch

    def extend(self, index: int, page: int) -> None:
        """Adds a page behind those of a sequence's tokens."""
        self._block_table[index, self._num_pages[index]] = page
        self._num_pages[index] += 1

    def batch(self, indices: Sequence[int]) -> tuple[DecodeBatch, list[int]]:
        """The next step of these sequences, on the device, and the pages that begin in it."""
        indices = list(indices)
        is_new = self._batch is None or indices != self._indices
        if is_new:
            self._indices, self._rows = indices, np.array(indices, np.int32)
        positions = self._positions[self._rows]
        begins = positions % PAGE_SIZE == 0
        if is_new:
            self._batch = self._put(self._made())
        assert self._batch is not None
        if not begins.any():
            return self._batch, []
        if not is_new:
            table = self._put(self._written_pages(self._padded_rows()))
            self._batch = self._batch.replace(metadata=self._batch.metadata._replace(block_table=table))
        return self._batch, self._block_table[self._rows[begins], positions[begins] // PAGE_SIZE].tolist()

    def advance(self, advancing: tuple[Any, Any, Any]) -> None:
        """Goes on to the next step, with what this one's program has returned for it."""
        assert self._batch is not None
        self._tokens[self._rows] = -1
        self._positions[self._rows] += 1
        self._sampling_params.step[self._rows] += 1
        self._batch = self._batch.advanced(*advancing)

    def _made(self) -> DecodeBatch:
        rows_b = self._padded_rows()
        slots = [self._slots[i] for i in self._indices]
        metadata = self._attention_metadata(self._positions[rows_b], self._written_pages(rows_b), slots)
        params = jax.tree.map(lambda of_all: of_all[rows_b], self._sampling_params)
        draws_b, filters_b = params.temperature > 0, (params.top_p < 1) | (params.top_k > 0)
        wanted = draws_b, draws_b & filters_b, params.num_top > 0
        self.wants = Wants(*(bool(by_row.any()) for by_row in wanted))
        return DecodeBatch(rows_b, self._tokens[rows_b], metadata, params)

    def _padded_rows(self) -> np.ndarray:
        b = next(size for size in self._batch_sizes if size >= len(self._rows))
        return np.pad(self._rows, (0, b - len(self._rows)), constant_values=self._none)

    def _written_pages(self, rows_b: np.ndarray) -> np.ndarray:
        return written_pages(self._block_table[rows_b], self._positions[rows_b])


def _sampling_params(sequence: SequenceInput) -> SamplingParams:
    """One row's, as numbers of numpy."""
    return SamplingParams(
        np.float32(sequence.temperature),
        np.float32(sequence.top_p),
        np.int32(sequence.top_k),
        np.int32(sequence.seed & 0x7FFFFFFF),
        np.int32(sequence.step),
        np.int32(sequence.top_logprobs),
    )
