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

import functools
from collections.abc import Callable, Sequence
from typing import Any

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
from cartridges_jax.serving.metadata import PAGE_SIZE, Row
from cartridges_jax.serving.sampling import SamplingParams
from cartridges_jax.serving.scheduler import BlockTable, Sampled, Scored, SequenceInput

# The number of tokens of each prefill program, and from how many tokens on it is used. Fewer are padded, and the
# padding is written nowhere. On a CPU, two programs take no longer than one for as many tokens.
PREFILL_SIZES = {16: 1, 32: 17, 64: 33, 96: 65, 128: 97, 256: 225}
BATCH_SIZES = (1, *(4 << i for i in range(11)))  # on a CPU, 2 cost about as much as 4
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
        # a CPU branches at no cost, and needs no second program for steps without a draw
        self._knows_greedy = kernels.platform() != "cpu"
        attention = chosen(attention)  # once, since pages of one implementation's layout are no other's
        self._options: dict[str, Any] = {"config": self._config, "mesh": self._mesh, "implementation": attention}
        sharding.check(model.config, self._mesh)
        self._weights = decoder.to_decode_layout(model.params, model.config, self._mesh)
        all_pages = self.num_pages + self.pages_each  # scoring has pages of its own
        dtype = self._weights["final_norm"].dtype
        self._cache = steps.empty_cache(self._config, all_pages, dtype, self._mesh, attention)
        self._heads = collectives.kv_heads_by_device(self._config, self._mesh.shape["tensor"])
        self.heads_per_page = self._config.num_layers * self._heads.shape[1]
        self._shape_lk = self._config.num_layers, self._heads.size
        # of the cartridges in pages, where the slots of each head start and how many they are, by the first head page
        self._loaded: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._nowhere = all_pages * PAGE_SIZE  # an index into a page that does not exist: a write there is dropped
        self._last = jnp.zeros(max_num_seqs, jnp.int32)  # the last token that was sampled for each sequence

    def head_pages(self, prefix: Prefix) -> int:
        cartridge: Any = prefix.cartridge
        lengths = cartridge.checked(self._config).all_lengths
        return max(-(-int(lengths[:, own].sum()) // PAGE_SIZE) for own in self._heads)

    def load(self, prefix: Prefix, slots: Sequence[int]) -> None:
        if not slots:  # a cartridge may have none
            return
        cartridge: Any = prefix.cartridge
        keys, values, bias = cartridge.checked(self._config).at_offset(0, self._config).prefix
        keys, values = np.asarray(keys), np.asarray(values)
        bias = np.zeros(keys.shape[:3], np.float32) if bias is None else np.asarray(bias)
        lengths = cartridge.all_lengths
        laid = [self._by_device(a, lengths) for a in (keys, values, bias)]
        num_head_pages = len(laid[0])
        for i, first in enumerate(slots):
            done = i * self.heads_per_page
            count = min(num_head_pages - done, self.heads_per_page)
            self._load(first, count, [a[done : done + count] for a in laid])
        starts = np.concatenate([slot_starts(lengths[:, own]) for own in self._heads], axis=1)
        self._loaded[slots[0]] = starts, lengths[:, self._heads.reshape(-1)]

    def _by_device(self, slots: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Lays out the slots of each device's heads, [e, devices, z, …]; e is what the fullest device has."""
        laid = [lay_out_slots(slots[:, :, own], lengths[:, own], PAGE_SIZE) for own in self._heads]
        most = max(map(len, laid))
        return np.stack([np.pad(a, [(0, most - len(a))] + [(0, 0)] * (a.ndim - 1)) for a in laid], axis=1)

    def _load(self, first: int, count: int, slots: Sequence[np.ndarray]) -> None:
        full = [np.pad(a, [(0, self.heads_per_page - len(a))] + [(0, 0)] * (a.ndim - 1)) for a in slots]
        self._cache = steps.load_slots(self._cache, first, count, *full, mesh=self._mesh)

    def copy(self, source: int, target: int, count: int) -> None:
        self._cache = steps.copy_page(self._cache, source, target, count, heads=self.heads_per_page, mesh=self._mesh)

    def prefill(self, tokens: Sequence[int], position: int, block_table: BlockTable) -> None:
        while tokens:
            size = max(size for size, fewest in PREFILL_SIZES.items() if fewest <= len(tokens))
            step = self._chunk(tokens[:size], size, position, block_table)
            self._cache = steps.prefill_step(self._weights, self._cache, step, **self._options)
            tokens, position = tokens[size:], position + size

    def decode(self, inputs: Sequence[SequenceInput]) -> Any:
        return self._run(*self._batch(inputs)), len(inputs)

    def _run(self, indices: np.ndarray, step: decoder.Step, sampling_params: SamplingParams) -> Any:
        """Dispatches the compiled program of a step, and returns what it samples."""
        arguments = self._weights, self._cache, self._last, indices, step, sampling_params
        draws_or_tells = sampling_params.temperature.any() or sampling_params.num_top.any()
        options = {"num_top": self.max_top_logprobs, "is_greedy": self._knows_greedy and not draws_or_tells}
        self._cache, self._last, sampled = steps.decode_step(*arguments, **options, **self._options)
        return sampled

    def _batch(self, inputs: Sequence[SequenceInput]) -> tuple[np.ndarray, decoder.Step, SamplingParams]:
        """What `decode_step` takes, padded to a size of batch; the token -1 stands for the sequence's last one."""
        b = next(size for size in self._batch_sizes if size >= len(inputs))
        for i in inputs:
            self._clear_begun(i.block_table, i.position, 1)
        padding = [SequenceInput(self.max_num_seqs, 0, 0, BlockTable(()), 0.0, 1.0, 0, 0, 0)] * (b - len(inputs))
        padded = [*inputs, *padding]
        indices = np.array([i.index for i in padded], np.int32)
        tokens = np.array([-1 if i.token is None else i.token for i in padded], np.int32)
        written = [metadata.slot_index(i.block_table, i.position) for i in inputs] + [self._nowhere] * len(padding)
        rows = [Row(i.block_table, i.position, i.position) for i in inputs]
        step = decoder.Step(tokens[:, None], np.array(written, np.int32)[:, None], self._metadata(rows, b))
        return indices, step, _sampling_params(padded)

    def _metadata(self, rows: Sequence[Row], b: int) -> AttentionMetadata:
        # if all slots are one device's, it has so many times the average
        slot_pages_each = self.pages_each * self._mesh.shape["tensor"]
        return metadata.attention_metadata(rows, b, self.pages_each, slot_pages_each, self._shape_lk, self._loaded)

    def harvest(self, decoded: Any) -> list[Sampled]:
        sampled, count = decoded
        rows = zip(*(a[:count].tolist() for a in jax.device_get(sampled)), strict=True)
        return [Sampled(token, logprob, tuple(ids), tuple(logprobs)) for token, logprob, ids, logprobs in rows]

    def block_table(self, prefix: Prefix | None, pages: Sequence[int]) -> BlockTable:
        """Gives pages to a request that shares none: the first ones whole to its cartridge, the rest to its tokens."""
        taken = self._whole_pages(prefix)
        return BlockTable(pages[taken:], [page * self.heads_per_page for page in pages[:taken]])

    def _whole_pages(self, prefix: Prefix | None) -> int:
        return -(-self.head_pages(prefix) // self.heads_per_page) if prefix else 0

    def score(self, tokens: Sequence[int], prefix: Prefix | None, num_top: int) -> list[Scored]:
        pages = range(self.num_pages, self.num_pages + self.pages_each)
        taken = self._whole_pages(prefix)
        if taken + metadata.num_pages(len(tokens)) > len(pages):
            raise UserError(
                f"a prompt of {len(tokens)} tokens behind this cartridge needs "
                f"{taken + metadata.num_pages(len(tokens))} pages and may have {len(pages)}: shorten the prompt"
            )
        block_table = self.block_table(prefix, pages)
        if prefix is not None:
            self.load(prefix, block_table.slots)
        scored = []
        for start in range(0, len(tokens) - 1, SCORE_SIZE):
            part = tokens[start : start + SCORE_SIZE]
            step = self._chunk(part, SCORE_SIZE, start, block_table)
            following = np.zeros(SCORE_SIZE, np.int32)
            following[: len(tokens) - 1 - start] = tokens[start + 1 : start + SCORE_SIZE + 1]
            self._cache, found = steps.score_step(
                self._weights, self._cache, step, following, num_top=self.max_top_logprobs, **self._options
            )
            rows = zip(following.tolist(), *(a.tolist() for a in jax.device_get(found)), strict=True)
            scored += [
                Scored(Sampled(token, logprob, tuple(ids[:num_top]), tuple(logprobs[:num_top])), rank)
                for token, logprob, rank, ids, logprobs in rows
            ]
        return scored[: len(tokens) - 1]

    def programs(self) -> list[Callable[[], object]]:
        """Calls that compile a program each; no request may be under way. Nothing is compiled after all of them."""
        first_pages, alternatives = BlockTable(range(self.pages_each)), (0, 1) if self._knows_greedy else (0,)
        nothing = np.zeros((0, len(self._heads), PAGE_SIZE, self._config.head_dim), np.float32)

        def decode(size: int, num_top: int) -> None:
            inputs = [SequenceInput(i, 0, 0, BlockTable([i]), 0.0, 1.0, 0, 0, 0, num_top) for i in range(size)]
            self.harvest(self.decode(inputs))

        def prefill(size: int) -> None:
            self.prefill([0] * min(size, self.max_length), 0, first_pages)

        return [
            *(functools.partial(prefill, size) for size in PREFILL_SIZES),
            *(functools.partial(decode, size, num_top) for size in self._batch_sizes for num_top in alternatives),
            functools.partial(self._load, 0, 0, (nothing, nothing, nothing[..., 0])),
            functools.partial(self.copy, 0, 0, 0),
            functools.partial(self._clear_begun, first_pages, 0, 1),
            functools.partial(self.score, [0, 0], None, 1),
        ]

    def _clear_begun(self, block_table: BlockTable, position: int, count: int) -> None:
        """Clears the pages that begin with one of the `count` positions from this one on, which are written next."""
        for start in range(-(-position // PAGE_SIZE) * PAGE_SIZE, position + count, PAGE_SIZE):
            page = metadata.slot_index(block_table, start) // PAGE_SIZE
            values = steps.clear_page(self._cache.values, page, heads=self.heads_per_page, mesh=self._mesh)
            self._cache = self._cache.replace(values=values)

    def _chunk(self, tokens: Sequence[int], size: int, position: int, block_table: BlockTable) -> decoder.Step:
        """A step for tokens of one request, padded to `size`."""
        self._clear_begun(block_table, position, len(tokens))
        padding = size - len(tokens)
        tokens_t = np.pad(np.asarray(tokens, np.int32), (0, padding))
        written = [metadata.slot_index(block_table, position + i) for i in range(len(tokens))]
        slot_mapping_t = np.array(written + [self._nowhere] * padding, np.int32)
        seen = self._metadata([Row(block_table, position, position + len(tokens) - 1)], 1)
        return decoder.Step(tokens_t[None], slot_mapping_t[None], seen)


def _sampling_params(inputs: Sequence[SequenceInput]) -> SamplingParams:
    rows = [(i.temperature, i.top_p, i.top_k, i.seed & 0x7FFFFFFF, i.step, i.top_logprobs) for i in inputs]
    columns = zip(*rows, strict=True)
    dtypes = (np.float32, np.float32, np.int32, np.int32, np.int32, np.int32)
    return SamplingParams(*(np.array(column, dtype) for column, dtype in zip(columns, dtypes, strict=True)))
