"""The engine: pages of keys and values on the device, and the calls that fill them, decode and score.

Which page holds what is the scheduler's business. A call turns that into arrays of fixed sizes (`serving.metadata`) and
runs a program on them (`serving.steps`). So few programs are compiled: decoding for a few sizes of batch, prefill for a
few sizes of chunk, and one program each to load, to copy, to clear and to score.

Nothing that a page held before reaches whoever has it now. Masked keys and biases do no harm, but masked values are
multiplied by zero, which leaves infinity and NaN what they are. So the values of a page are zeros where its owner has
written nothing: they are cleared when its first position is written, and what is loaded or copied ends in zeros.

Under `tensor` a cartridge's heads lie where their weights lie, so that each device holds the slots of its own heads, of
all layers. The sums over so many layers come close to one another, whatever the lengths of single heads are, and are
not levelled further: a cartridge takes as many head pages on every device as it needs on the one that has most slots.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cartridges_jax import kernels
from cartridges_jax.command_line.errors import UserError
from cartridges_jax.kernels.decode_attention import chosen
from cartridges_jax.kernels.decode_attention.pages import AttentionMetadata, lay_out_slots, slot_starts
from cartridges_jax.models.language_model import LanguageModel
from cartridges_jax.parallel import collectives, sharding
from cartridges_jax.serving import decoder, metadata, steps
from cartridges_jax.serving.cache import Prefix
from cartridges_jax.serving.logits_processors import LogitsParams, LogitsState, begin_row, empty_state, row_of
from cartridges_jax.serving.metadata import PAGE_SIZE
from cartridges_jax.serving.sampling import GREEDY, KINDS, Wants, kind_for
from cartridges_jax.serving.scheduler import BlockTable, Chunk, LogitsRules, Sampled, Scored, SequenceInput
from cartridges_jax.serving.sequences import DecodeBatch, Sequences


class PrefillSizes(NamedTuple):
    """The prefill programs of a platform: a number of tokens in a row, and of rows, and from how many on it is used.

    A row is a part of a prompt, and a long prompt has several. Fewer tokens and rows are padded, and the padding is
    written nowhere.
    """

    tokens: Mapping[int, int]
    rows: Mapping[int, Mapping[int, int]]  # by the tokens in a row
    max_num_batched_tokens: int


# On a CPU, two programs take no longer than one for as many tokens, if those are more than 16.
CPU_PREFILL = PrefillSizes(
    {16: 1, 32: 17, 64: 33, 96: 65, 128: 97, 256: 225},
    {16: {1: 1, 4: 3}} | {tokens: {1: 1} for tokens in (32, 64, 96, 128, 256)},
    1024,
)
# An accelerator takes as long for a few tokens as for hundreds.
ACCELERATOR_PREFILL = PrefillSizes({32: 1, 128: 33}, {32: {1: 1, 16: 2}, 128: {1: 1, 4: 2, 16: 5}}, 2048)
BATCH_SIZES = (1, *(4 << i for i in range(11)))  # on a CPU, 2 cost about as much as 4
NO_RULES = LogitsParams.of(LogitsRules())
SCORE_SIZE = 64  # for so many tokens, the logits over the vocabulary exist together


class Engine:
    """Holds the weights and the pages, and does what `scheduler.Engine` says. Only one thread may call it.

    Args:
      max_num_seqs: how many requests may decode together.
      max_length: how many positions a request may have in memory: its cartridge's slots, its prompt and its answer.
        It may exceed the model's window, which holds prompt and answer only.
      max_top_logprobs: how many alternatives a request may ask for with each token.
      cache_tokens: how many positions the memory holds; by default enough for `max_num_seqs` requests of `max_length`.
      batch_sizes: the sizes that decoding is compiled for, `max_num_seqs` the largest; a smaller batch is padded.
      attention: the implementation of `decode_attention`; by default the fastest that can run here.
      max_num_batched_tokens: how many tokens of prompts are written between two steps of decoding; by default few on a
        CPU, where they take their time.
    """

    def __init__(
        self,
        model: LanguageModel,
        max_num_seqs: int = 16,
        max_length: int = 2048,
        max_top_logprobs: int = 20,
        cache_tokens: int | None = None,
        batch_sizes: Sequence[int] | None = None,
        attention: str | None = None,
        max_num_batched_tokens: int | None = None,
    ):
        if max_num_seqs < 1:
            raise UserError(f"max_num_seqs is {max_num_seqs}, expected at least 1")
        # a cartridge and the tokens behind it each end on a page of their own, as far as a request is concerned
        self.pages_each = metadata.num_pages(max_length) + 1
        self.num_pages = max_num_seqs * self.pages_each if cache_tokens is None else metadata.num_pages(cache_tokens)
        if self.num_pages < self.pages_each:
            raise UserError(
                f"cache_tokens is {cache_tokens}, expected at least {self.pages_each * PAGE_SIZE} for a request of "
                f"{max_length} positions"
            )
        self.max_num_seqs, self.max_length, self.max_top_logprobs = max_num_seqs, max_length, max_top_logprobs
        self.page_size, self.max_position_embeddings = PAGE_SIZE, model.config.max_position_embeddings
        self._batch_sizes = batch_sizes or [*(size for size in BATCH_SIZES if size < max_num_seqs), max_num_seqs]
        self._config, self._mesh = model.config, sharding.mesh_of(model.params)
        # a CPU branches at no cost, and needs no other programs for what requests want of their sampling
        self._kinds = (GREEDY,) if kernels.platform() == "cpu" else KINDS
        attention = chosen(attention)  # once, since pages of one implementation's layout are no other's
        self._options: dict[str, Any] = {"config": self._config, "mesh": self._mesh, "implementation": attention}
        sharding.check(model.config, self._mesh)
        self._weights = decoder.to_decode_layout(model.params, model.config, self._mesh)
        dtype = self._weights["final_norm"].dtype
        self._cache = steps.empty_cache(self._config, self.num_pages, dtype, self._mesh, attention)
        self._heads = collectives.kv_heads_by_device(self._config, self._mesh.shape["tensor"])
        self.heads_per_page = self._config.num_layers * self._heads.shape[1]
        self._shape_lk = self._config.num_layers, self._heads.size
        # of the cartridges in pages, where the slots of each head start and how many they are, by the first head page
        self._loaded: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._last = jnp.zeros(max_num_seqs, jnp.int32)  # the last token that was sampled for each sequence
        self._logits_state: LogitsState | None = None  # until a request has rules for its logits
        self._rules: dict[int, LogitsParams] = {}  # of the sequences that have some
        put = functools.partial(steps.put, mesh=self._mesh)
        self._sequences = Sequences(max_num_seqs, self.pages_each, self._batch_sizes, self._metadata, put)
        self._prefill_sizes = CPU_PREFILL if kernels.platform() == "cpu" else ACCELERATOR_PREFILL
        self.max_num_batched_tokens = max_num_batched_tokens or self._prefill_sizes.max_num_batched_tokens

    def head_pages(self, prefix: Prefix) -> int:
        cartridge: Any = prefix.cartridge
        lengths = cartridge.checked(self._config).all_lengths
        return max(metadata.num_pages(int(lengths[:, own].sum())) for own in self._heads)

    def load(self, prefix: Prefix, slots: Sequence[int]) -> None:
        if not slots:  # a cartridge may have none
            return
        cartridge: Any = prefix.cartridge
        keys, values, bias = cartridge.checked(self._config).at_offset(0, self._config).prefix
        keys, values = np.asarray(keys), np.asarray(values)
        bias = np.zeros(keys.shape[:3], np.float32) if bias is None else np.asarray(bias)
        lengths, num_head_pages = cartridge.all_lengths, self.head_pages(prefix)
        whole = len(slots) * self.heads_per_page
        laid = [lay_out_slots(a, lengths, self._heads, PAGE_SIZE, whole) for a in (keys, values, bias)]
        for i, first in enumerate(slots):
            part = slice(i * self.heads_per_page, (i + 1) * self.heads_per_page)
            count = min(num_head_pages - part.start, self.heads_per_page)
            written = [a[:, part] for a in laid]
            self._cache = steps.load_slots(self._cache, first, count, *written, mesh=self._mesh)
        starts = np.concatenate([slot_starts(lengths[:, own]) for own in self._heads], axis=1)
        self._loaded[slots[0]] = starts, lengths[:, self._heads.reshape(-1)]

    def copy(self, source: int, target: int, count: int) -> None:
        self._cache = steps.copy_page(self._cache, source, target, count, heads=self.heads_per_page, mesh=self._mesh)

    def prefill(self, chunks: Sequence[Chunk]) -> None:
        for chunk in chunks:
            self._clear_begun(chunk)
        rows: dict[int, list[Chunk]] = {size: [] for size in reversed(self._prefill_sizes.tokens)}
        for chunk in chunks:
            for size, row in self._rows(chunk):
                rows[size].append(row)
        for size, of_size in rows.items():  # the largest first, with which every chunk begins
            while of_size:
                count = _fitting(self._prefill_sizes.rows[size], len(of_size))
                step = self._step(of_size[:count], count, size)
                self._cache = steps.prefill_step(self._weights, self._cache, step, **self._options)
                of_size = of_size[count:]

    def _rows(self, chunk: Chunk) -> Iterator[tuple[int, Chunk]]:
        """The rows of prefill programs in which a chunk is written, with the numbers of tokens that they have room for.

        These only fall from one to the next, so that a row's beginning is written before it or with it.
        """
        tokens, position, block_table = chunk
        while tokens:
            size = _fitting(self._prefill_sizes.tokens, len(tokens))
            yield size, Chunk(tokens[:size], position, block_table)
            tokens, position = tokens[size:], position + size

    def _step(self, rows: Sequence[Chunk], b: int, size: int) -> decoder.Step:
        """A step for parts of prompts, padded to b rows of `size` tokens."""
        tokens_bt = np.zeros((b, size), np.int32)
        block_table, starts, counts = np.full((b, self.pages_each), -1, np.int32), *np.zeros((2, b), np.int32)
        for r, row in enumerate(rows):
            tokens_bt[r, : len(row.tokens)] = row.tokens
            block_table[r, : len(row.block_table.pages)] = row.block_table.pages
            starts[r], counts[r] = row.position, len(row.tokens)
        nowhere = self.num_pages * PAGE_SIZE  # an index into a page that does not exist: a write there is dropped
        slots_bt = metadata.slot_mapping(block_table, starts, counts, size, nowhere)
        written = metadata.written_pages(block_table, starts + counts - 1)
        return decoder.Step(
            tokens_bt, slots_bt, self._metadata(starts, written, [row.block_table.slots for row in rows])
        )

    def _metadata(self, starts: np.ndarray, table: np.ndarray, slots: Sequence[Sequence[int]]) -> AttentionMetadata:
        # if all slots are one device's, it has so many times the average
        slot_pages_each = self.pages_each * self._mesh.shape["tensor"]
        return metadata.attention_metadata(starts, table, slots, slot_pages_each, self._shape_lk, self._loaded)

    def begin(self, sequence: SequenceInput) -> None:
        self._sequences.begin(sequence)
        self._rules.pop(sequence.index, None)
        if sequence.logits is not None:
            self._rules[sequence.index] = LogitsParams.of(sequence.logits)
            if self._logits_state is None:
                self._logits_state = empty_state(self.max_num_seqs, self._config.vocab_size)
            row = row_of(sequence.logits, self._config.vocab_size)
            self._logits_state = begin_row(self._logits_state, sequence.index, row)

    def extend(self, index: int, page: int) -> None:
        self._sequences.extend(index, page)

    def decode(self, indices: Sequence[int]) -> Any:
        batch, wants = self._next_batch(indices), self._wants
        if wants not in (None, GREEDY) or not self._rules.keys().isdisjoint(indices):
            return self.sample(self._forward(indices, batch), [])
        self._cache, self._last, advancing, sampled = steps.decode_step(
            self._weights,
            self._cache,
            self._last,
            batch,
            num_top=self.max_top_logprobs,
            wants=wants,
            **self._options,
        )
        self._sequences.advance(advancing)
        return sampled, self._num_top(indices)

    def forward(self, indices: Sequence[int]) -> Any:
        return self._forward(indices, self._next_batch(indices))

    def _forward(self, indices: Sequence[int], batch: DecodeBatch) -> Any:
        self._cache, advancing, logits = steps.logits_step(
            self._weights, self._cache, self._last, batch, **self._options
        )
        self._sequences.advance(advancing)
        return logits, batch, self._wants, list(indices)

    def sample(self, logits: Any, masks: Sequence[np.ndarray | None]) -> Any:
        logits_bv, batch, wants, indices = logits
        mask = np.full((len(logits_bv), -(-self._config.vocab_size // 32)), -1, np.int32)
        for row, words in zip(mask, masks, strict=False):
            if words is not None:  # a tokenizer may have fewer tokens than the model
                row[: len(words)] = words[: len(row)]
                row[len(words) :] = 0
        processing = None, None
        if not self._rules.keys().isdisjoint(indices):
            rules = [self._rules.get(i, NO_RULES) for i in indices]
            rules += [NO_RULES] * (len(logits_bv) - len(rules))
            processing = self._logits_state, jax.tree.map(lambda *own: np.stack(own), *rules)
        self._last, sampled, state = steps.sample_step(
            self._last,
            logits_bv,
            batch,
            mask,
            *processing,
            num_top=self.max_top_logprobs,
            wants=wants,
        )
        self._logits_state = self._logits_state if state is None else state
        return sampled, self._num_top(indices)

    def _next_batch(self, indices: Sequence[int]) -> DecodeBatch:
        batch, begun = self._sequences.batch(indices)
        for page in begun:
            self._clear(page)
        return batch

    @property
    def _wants(self) -> Wants | None:
        """What the batch wants of its sampling; None where branches find it out."""
        return kind_for(self._sequences.wants) if len(self._kinds) > 1 else None

    def _num_top(self, indices: Sequence[int]) -> list[int]:
        return [self._sequences.num_top[i] for i in indices]

    def harvest(self, decoded: Any) -> list[Sampled]:
        sampled, num_top = decoded
        count = len(num_top)
        if not any(num_top):  # then nothing else is brought here
            tokens, logprobs = (a[:count].tolist() for a in jax.device_get(sampled[:2]))
            return list(map(Sampled, tokens, logprobs))
        rows = zip(*(a[:count].tolist() for a in jax.device_get(sampled)), num_top, strict=True)
        return [Sampled(token, logprob, tuple(ids[:n]), tuple(best[:n])) for token, logprob, ids, best, n in rows]

    def block_table(self, prefix: Prefix | None, pages: Sequence[int]) -> BlockTable:
        """Gives pages to a request that shares none: the first ones whole to its cartridge, the rest to its tokens."""
        taken = self._whole_pages(prefix)
        return BlockTable(pages[taken:], [page * self.heads_per_page for page in pages[:taken]])

    def _whole_pages(self, prefix: Prefix | None) -> int:
        return -(-self.head_pages(prefix) // self.heads_per_page) if prefix else 0

    def score(self, chunk: Chunk, following: Sequence[int]) -> Any:
        self._clear_begun(chunk)
        found = []
        for done in range(0, len(chunk.tokens), SCORE_SIZE):
            part = Chunk(chunk.tokens[done : done + SCORE_SIZE], chunk.position + done, chunk.block_table)
            asked = np.zeros(SCORE_SIZE, np.int32)
            asked[: len(part.tokens)] = following[done : done + SCORE_SIZE]
            step = self._step([part], 1, SCORE_SIZE)
            self._cache, scores = steps.score_step(
                self._weights, self._cache, step, asked, num_top=self.max_top_logprobs, **self._options
            )
            found.append((following[done : done + SCORE_SIZE], scores))
        return found

    def scored(self, result: Any, num_top: int) -> list[Scored]:
        return [
            Scored(Sampled(token, logprob, tuple(ids[:num_top]), tuple(best[:num_top])), rank)
            for following, scores in result
            for token, logprob, rank, ids, best in zip(
                following, *(a[: len(following)].tolist() for a in jax.device_get(scores)), strict=True
            )
        ]

    def programs(self) -> list[Callable[[], object]]:
        """Calls that compile a program each, before the first request. After all of them, and those of
        `rare_programs`, nothing is compiled.
        """
        first_pages = BlockTable(range(self.pages_each))

        def decode(size: int, kind: Wants) -> None:
            for i in range(size):
                self.begin(_of_kind(kind, i, PAGE_SIZE - 1, BlockTable([0, 0])))
            for _ in range(2):  # as a new batch, and where pages begin
                self.harvest(self.decode(range(size)))

        def prefill(size: int, rows: int) -> None:
            chunk = Chunk([0] * min(size, self.max_length), 0, first_pages)
            step = self._step([chunk] * rows, rows, size)
            self._cache = steps.prefill_step(self._weights, self._cache, step, **self._options)

        def load() -> None:
            page = np.zeros((len(self._heads), self.heads_per_page, PAGE_SIZE, self._config.head_dim), np.float32)
            self._cache = steps.load_slots(self._cache, 0, 0, page, page, page[..., 0], mesh=self._mesh)

        return [
            *(functools.partial(prefill, *shape) for shape in self._prefill_shapes()),
            *(functools.partial(decode, size, kind) for size in self._batch_sizes for kind in self._kinds),
            load,
            functools.partial(self.copy, 0, 0, 0),
            functools.partial(self._clear, 0),
            lambda: self.scored(self.score(Chunk([0], 0, first_pages), [0]), 1),
        ]

    def _prefill_shapes(self) -> Iterator[tuple[int, int]]:
        """Yields the tokens of a row and the rows of each prefill program that requests can come to need."""
        largest = max(self._prefill_sizes.tokens)
        for size, rows in self._prefill_sizes.rows.items():
            for count, fewest in rows.items():
                # a chunk has one row at most of each size but the largest
                if size == largest or fewest <= self.max_num_seqs:
                    yield size, count

    def rare_programs(self) -> list[Callable[[], object]]:
        """The same for steps with forms or rules for logits, which few servers see: also between two requests.

        No page is written by them, since pages may hold what a later request has in common with an earlier one.
        """

        def decode(size: int, logits: LogitsRules | None, kind: Wants) -> None:
            for i in range(size):
                self.begin(dataclasses.replace(_of_kind(kind, i, 1, BlockTable(())), logits=logits))
            self.harvest(self.sample(self.forward(range(size)), []))
            self._logits_state = None

        choices = itertools.product(self._batch_sizes, (LogitsRules(), None), self._kinds)
        return [functools.partial(decode, *choice) for choice in choices]

    def _clear_begun(self, chunk: Chunk) -> None:
        """Clears the pages that begin with one of a chunk's positions, which are written next."""
        first, last = -(-chunk.position // PAGE_SIZE), (chunk.position + len(chunk.tokens) - 1) // PAGE_SIZE
        for page in chunk.block_table.pages[first : last + 1]:
            self._clear(page)

    def _clear(self, page: int) -> None:
        values = steps.clear_page(self._cache.values, page, heads=self.heads_per_page, mesh=self._mesh)
        self._cache = self._cache.replace(values=values)


def _of_kind(kind: Wants, index: int, position: int, block_table: BlockTable) -> SequenceInput:
    """A sequence that wants so much of its sampling."""
    temperature, top_p = float(kind.draws), 0.5 if kind.filters else 1.0
    return SequenceInput(index, 0, position, block_table, temperature, top_p, 0, 0, 0, int(kind.alternatives))


def _fitting(sizes: Mapping[int, int], number: int) -> int:
    """The largest size that is used for so many."""
    return max(size for size, fewest in sizes.items() if fewest <= number)
