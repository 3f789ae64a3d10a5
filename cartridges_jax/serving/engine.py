"""The only jitted code of serving: pages of keys and values on the device, and what is done to them.

Which page holds what is the scheduler's business. A call turns that into arrays of fixed sizes, so that a handful of
compiled programs serves every mixture of requests: decoding for a few sizes of batch, prefill for a few sizes of chunk,
and one program each to load, to copy, to clear and to score.

Nothing that a page held before reaches whoever has it now. Masked keys and biases do no harm; of values even the masked
ones are multiplied, by zero, which leaves infinity and NaN what they are. So a page's values are zeros where its owner
has written nothing: they are cleared when its first place is written, and what is loaded or copied ends in zeros.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from cartridges_jax.command_line.errors import UserError
from cartridges_jax.kernels.prefix_decode_attention import Pages, Plan, Reading, own_entries, shared_entries
from cartridges_jax.models.config import ModelConfig
from cartridges_jax.models.language_model import LanguageModel
from cartridges_jax.models.params import decode_specs
from cartridges_jax.parallel import collectives, sharding
from cartridges_jax.serving import decoder
from cartridges_jax.serving.cache import Prefix
from cartridges_jax.serving.sampling import Sampling, normalizer, sample
from cartridges_jax.serving.scheduler import Place, Sampled, Scored, SlotInput

PAGE_SIZE = 128
# Tokens of a program, and how many are worth it; fewer are padded, the padding written nowhere. On a CPU, two programs
# take no longer than one for as many.
PREFILL_SIZES = {16: 1, 32: 17, 64: 33, 96: 65, 128: 97, 256: 225}
BATCH_SIZES = (1, *(4 << i for i in range(11)))  # on a CPU, 2 cost about as much as 4
ROWS_PER_USER = 8  # multiplying so many rows by a page, all but one for nothing, costs what reading it once more costs
SCORE_SIZE = 64  # tokens whose logits over the vocabulary exist together


@flax.struct.dataclass
class Step:
    """Where the tokens of one forward pass are, and what they see."""

    tokens: Int[Array, "b t"]
    positions: Int[Array, "b t"]
    page: Int[Array, "b t"]
    place: Int[Array, "b t"]
    plan: Plan


class Engine:
    """Memory and programs. One thread calls it; `max_length` counts cartridge slots, prompt and answer of a request.

    Args:
      num_slots: requests that decode together.
      max_top_logprobs: alternatives that a request may ask for with each token.
      cache_tokens: positions that the memory holds; by default enough for every slot to be as long as it may be.
      batch_sizes: the sizes that decoding is compiled for, `num_slots` the largest; a smaller batch is padded.
    """

    def __init__(
        self,
        model: LanguageModel,
        num_slots: int = 16,
        max_length: int = 2048,
        max_top_logprobs: int = 20,
        cache_tokens: int | None = None,
        batch_sizes: Sequence[int] | None = None,
    ):
        if max_length > (window := model.config.max_position_embeddings):
            raise UserError(f"max_length is {max_length}, expected at most {model.name}'s window, {window}")
        if num_slots < 1:
            raise UserError(f"num_slots is {num_slots}, expected at least 1")
        # a cartridge and the tokens behind it each end on a page of their own
        self.pages_each = -(-max_length // PAGE_SIZE) + 1
        self.num_pages = num_slots * self.pages_each if cache_tokens is None else -(-cache_tokens // PAGE_SIZE)
        if self.num_pages < self.pages_each:
            raise UserError(
                f"cache_tokens is {cache_tokens}, expected at least {self.pages_each * PAGE_SIZE} for a request of "
                f"{max_length} positions"
            )
        self.num_slots, self.max_length, self.max_top_logprobs = num_slots, max_length, max_top_logprobs
        self.page_size = PAGE_SIZE
        self._batch_sizes = batch_sizes or sorted({size for size in BATCH_SIZES if size < num_slots} | {num_slots})
        self._config, self._mesh = model.config, sharding.mesh_of(model.params)
        sharding.check(model.config, self._mesh)
        self._weights = decoder.rearranged(model.params, model.config, self._mesh)
        all_pages = self.num_pages + self.pages_each  # scoring has pages of its own
        self._cache = new_pages(model.config, all_pages, self._weights["final_norm"].dtype, self._mesh)
        self._nowhere = (all_pages, 0)  # a write to a page that does not exist is dropped
        self._last = jnp.zeros(num_slots, jnp.int32)  # what was sampled last for each slot

    def load(self, prefix: Prefix, pages: Sequence[int]) -> None:
        """Writes a cartridge to these pages."""
        cartridge: Any = prefix.cartridge
        keys, values, bias = cartridge.checked(self._config).prefix
        bias = np.zeros(keys.shape[:3], np.float32) if bias is None else bias
        whole = len(pages) * PAGE_SIZE
        arrays = [np.pad(a, [(0, 0), (0, whole - a.shape[1])] + [(0, 0)] * (a.ndim - 2)) for a in (keys, values, bias)]
        for i, page in enumerate(pages):
            slots = slice(i * PAGE_SIZE, (i + 1) * PAGE_SIZE)
            parts = [a[:, slots] for a in arrays]
            self._cache = _load(self._cache, page, *parts, config=self._config, mesh=self._mesh)

    def copy(self, source: int, target: int, count: int) -> None:
        """The target page becomes a copy of the source's first `count` places."""
        self._cache = _copy(self._cache, source, target, count, mesh=self._mesh)

    def prefill(self, tokens: Sequence[int], position: int, place: Place) -> None:
        """Writes the keys and values of `tokens` at `position`, `position` + 1, …"""
        while tokens:
            size = max(size for size, fewest in PREFILL_SIZES.items() if fewest <= len(tokens))
            step = self._chunk(tokens[:size], size, position, place)
            self._cache = _prefill(self._weights, self._cache, step, config=self._config, mesh=self._mesh)
            tokens, position = tokens[size:], position + size

    def decode(self, inputs: Sequence[SlotInput]) -> Any:
        """Writes each input's token at its position and samples the token that follows it; `harvest` waits for it."""
        return self._run(*self._batch(inputs)), [i.top_logprobs for i in inputs]

    def _batch(self, inputs: Sequence[SlotInput]) -> tuple[np.ndarray, Step, Sampling]:
        """What a step of decoding takes: slots, tokens (-1: the slot's last) and wishes, padded to a size of batch."""
        b = next(size for size in self._batch_sizes if size >= len(inputs))
        padding = b - len(inputs)
        for i in inputs:
            self._clear_begun(i.place, i.position, 1)
        slots = np.array([i.slot for i in inputs] + [self.num_slots] * padding, np.int32)
        tokens = np.array([-1 if i.token is None else i.token for i in inputs] + [0] * padding, np.int32)
        positions = np.array([i.position for i in inputs] + [0] * padding, np.int32)
        written = [_written(i.place, i.position) for i in inputs] + [self._nowhere] * padding
        page, place = np.array(written, np.int32).T
        step = Step(tokens[:, None], positions[:, None], page[:, None], place[:, None], self._plan(inputs, b))
        return slots, step, _wishes(inputs, padding)

    def _run(self, slots: np.ndarray, step: Step, sampling: Sampling) -> Any:
        self._cache, self._last, sampled = decode_step(
            self._weights,
            self._cache,
            self._last,
            slots,
            step,
            sampling,
            config=self._config,
            mesh=self._mesh,
            num_top=self.max_top_logprobs,
        )
        return sampled

    def harvest(self, decoded: Any) -> list[Sampled]:
        """The tokens of a `decode`, in the order of its inputs, each with the alternatives that it asked for."""
        sampled, counts = decoded
        tokens, logprobs, top_ids, top_logprobs = (a.tolist() for a in jax.device_get(sampled))
        return [
            Sampled(tokens[i], logprobs[i], tuple(top_ids[i][:count]), tuple(top_logprobs[i][:count]))
            for i, count in enumerate(counts)
        ]

    def score(self, tokens: Sequence[int], prefix: Prefix | None, num_top: int) -> list[Scored]:
        """Every token but the first, as the model would have sampled it; no request is touched."""
        p = prefix.length if prefix else 0
        pages = range(self.num_pages, self.num_pages + self.pages_each)
        if prefix is not None:
            self.load(prefix, pages[: -(-p // PAGE_SIZE)])
        scored = []
        for start in range(0, len(tokens) - 1, SCORE_SIZE):
            part = tokens[start : start + SCORE_SIZE]
            step = self._chunk(part, SCORE_SIZE, p + start, Place(pages, p))
            following = np.zeros(SCORE_SIZE, np.int32)
            following[: len(tokens) - 1 - start] = tokens[start + 1 : start + SCORE_SIZE + 1]
            options = {"config": self._config, "mesh": self._mesh, "num_top": self.max_top_logprobs}
            self._cache, found = _score(self._weights, self._cache, step, following, **options)
            rows = zip(following.tolist(), *(a.tolist() for a in jax.device_get(found)), strict=True)
            scored += [
                Scored(Sampled(token, logprob, tuple(ids[:num_top]), tuple(logprobs[:num_top])), rank)
                for token, logprob, rank, ids, logprobs in rows
            ]
        return scored[: len(tokens) - 1]

    def programs(self) -> list[Callable[[], object]]:
        """Calls that compile a program each; no request may be under way. Nothing is compiled after all of them."""
        place = Place(range(self.pages_each), 0)
        c = self._config
        zeros = np.zeros((c.num_layers, PAGE_SIZE, c.num_kv_heads, c.head_dim), np.float32)

        def decode(size: int) -> None:
            self.harvest(self.decode([SlotInput(i, 0, 0, Place([i], 0), 0.0, 1.0, 0, 0, 0) for i in range(size)]))

        def load() -> None:
            self._cache = _load(self._cache, 0, zeros, zeros, zeros[..., 0], config=c, mesh=self._mesh)

        return [
            *(functools.partial(self.prefill, [0] * min(size, self.max_length), 0, place) for size in PREFILL_SIZES),
            *(functools.partial(decode, size) for size in self._batch_sizes),
            load,
            functools.partial(self.copy, 0, 0, 0),
            functools.partial(self._clear_begun, place, 0, 1),
            functools.partial(self.score, [0, 0], None, 1),
        ]

    def warmup(self) -> None:
        """Compiles every program."""
        for compiled in self.programs():
            compiled()
        jax.block_until_ready(self._cache)

    def _clear_begun(self, place: Place, position: int, count: int) -> None:
        """Clears the pages whose first place is among the `count` positions from this one on, soon to be written."""
        first = position - place.prefix_length
        for start in range(-(-first // PAGE_SIZE) * PAGE_SIZE, first + count, PAGE_SIZE):
            values = _clear(
                [p.values for p in self._cache], _written(place, place.prefix_length + start)[0], mesh=self._mesh
            )
            self._cache = [p._replace(values=v) for p, v in zip(self._cache, values, strict=True)]

    def _chunk(self, tokens: Sequence[int], size: int, position: int, place: Place) -> Step:
        """Tokens of one request, padded to `size`."""
        self._clear_begun(place, position, len(tokens))
        padding = size - len(tokens)
        tokens_t = np.pad(np.asarray(tokens, np.int32), (0, padding))
        written = [_written(place, position + i) for i in range(len(tokens))]
        written += [self._nowhere] * padding
        page_t, place_t = np.array(written, np.int32).T
        seen = _seen(place, position + len(tokens) - 1)
        plan = Plan(
            Reading.of(seen, shared_entries(self.pages_each)),
            np.ones((shared_entries(self.pages_each), 1), bool),
            Reading.of([], 0),
            np.zeros(0, np.int32),
        )
        positions_t = np.arange(position, position + size, dtype=np.int32)
        return Step(tokens_t[None], positions_t[None], page_t[None], place_t[None], plan)

    def _plan(self, inputs: Sequence[SlotInput], b: int) -> Plan:
        """A page that several requests see is read once, and meets the queries of the whole batch."""
        seen = [_seen(i.place, i.position) for i in inputs]
        users = Counter(page for reading in seen for page, _, _ in reading)
        fewest = max(2, b // ROWS_PER_USER) if b > 1 else 1
        is_shared = {page for page, count in users.items() if count >= fewest}
        shared = {page: (page, count, first) for reading in seen for page, count, first in reading if page in is_shared}
        order = {page: c for c, page in enumerate(shared)}
        members = np.zeros((shared_entries(self.pages_each if b == 1 else self.num_pages), b), bool)
        own, reader = [], []
        for r, reading in enumerate(seen):
            for entry in reading:
                if entry[0] in order:
                    members[order[entry[0]], r] = True
                else:
                    own.append(entry)
                    reader.append(r)
        most = 0 if b == 1 else own_entries(b * self.pages_each, b)
        readers = np.zeros(most, np.int32)
        readers[: len(reader)] = reader
        return Plan(Reading.of(list(shared.values()), len(members)), members, Reading.of(own, most), readers)


def _seen(place: Place, position: int) -> list[tuple[int, int, int]]:
    """The pages that hold a sequence up to `position`, each with how many of its places are in use and the first's."""
    p, own = place.prefix_length, -(-place.prefix_length // PAGE_SIZE)
    slots = [(place.pages[i], min(PAGE_SIZE, p - i * PAGE_SIZE), i * PAGE_SIZE) for i in range(own)]
    count = (position - p) // PAGE_SIZE + 1
    return slots + [(place.pages[own + i], PAGE_SIZE, p + i * PAGE_SIZE) for i in range(count)]


def _written(place: Place, position: int) -> tuple[int, int]:
    """The page and the place in it of one position behind the cartridge."""
    page, place_in_page = divmod(position - place.prefix_length, PAGE_SIZE)
    return place.pages[-(-place.prefix_length // PAGE_SIZE) + page], place_in_page


def _wishes(inputs: Sequence[SlotInput], padding: int) -> Sampling:
    rows = [(i.temperature, i.top_p, i.top_k, i.seed & 0x7FFFFFFF, i.step, i.top_logprobs) for i in inputs]
    columns = zip(*rows, *[(0.0, 1.0, 0, 0, 0, 0)] * padding, strict=True)
    dtypes = (np.float32, np.float32, np.int32, np.int32, np.int32, np.int32)
    return Sampling(*(np.array(column, dtype) for column, dtype in zip(columns, dtypes, strict=True)))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def new_pages(config: ModelConfig, num_pages: int, dtype: Any, mesh: Mesh) -> list[Pages]:
    def local() -> list[Pages]:
        k = collectives.num_local_kv_heads(config)
        return [
            Pages(
                jnp.zeros((num_pages, k, config.head_dim, PAGE_SIZE), dtype),
                jnp.zeros((num_pages, k, PAGE_SIZE, config.head_dim), dtype),
                jnp.zeros((num_pages, k, PAGE_SIZE), jnp.float32),
            )
            for _ in range(config.num_layers)
        ]

    return sharding.on_mesh(local, mesh, (), sharding.PAGES)()


@functools.partial(jax.jit, static_argnames=("config", "mesh"), donate_argnums=0)
def _load(
    cache: list[Pages],
    page: Int[Array, ""],
    keys: Float[Array, "l z k h"],
    values: Float[Array, "l z k h"],
    bias: Float[Array, "l z k"],
    *,
    config: ModelConfig,
    mesh: Mesh,
) -> list[Pages]:
    def local(cache: list[Pages], page: Int[Array, ""], slots: tuple[Array, Array, Array]) -> list[Pages]:
        keys, values, bias = collectives.local_kv_heads(slots, config, axis=2)
        return [
            Pages(
                pages.keys.at[page].set(keys[l].transpose(1, 2, 0).astype(pages.keys.dtype)),
                pages.values.at[page].set(values[l].swapaxes(0, 1).astype(pages.values.dtype)),
                pages.bias.at[page].set(bias[l].T),
            )
            for l, pages in enumerate(cache)
        ]

    slots = keys, values, bias
    in_specs = sharding.PAGES, P(), sharding.fitted(slots, sharding.CARTRIDGE, mesh)
    return sharding.on_mesh(local, mesh, in_specs, sharding.PAGES)(cache, page, slots)


@functools.partial(jax.jit, static_argnames="mesh", donate_argnums=0)
def _copy(
    cache: list[Pages], source: Int[Array, ""], target: Int[Array, ""], count: Int[Array, ""], *, mesh: Mesh
) -> list[Pages]:
    def local(cache: list[Pages], source: Array, target: Array, count: Array) -> list[Pages]:
        is_copied_z1 = jnp.arange(PAGE_SIZE)[:, None] < count
        return [
            Pages(
                pages.keys.at[target].set(pages.keys[source]),
                pages.values.at[target].set(jnp.where(is_copied_z1, pages.values[source], 0)),
                pages.bias.at[target].set(pages.bias[source]),
            )
            for pages in cache
        ]

    return sharding.on_mesh(local, mesh, (sharding.PAGES, *[P()] * 3), sharding.PAGES)(cache, source, target, count)


@functools.partial(jax.jit, static_argnames="mesh", donate_argnums=0)
def _clear(values: list[Array], page: Int[Array, ""], *, mesh: Mesh) -> list[Array]:
    def local(values: list[Array], page: Array) -> list[Array]:
        return [layer.at[page].set(0) for layer in values]

    return sharding.on_mesh(local, mesh, (sharding.PAGES, P()), sharding.PAGES)(values, page)


@functools.partial(jax.jit, static_argnames=("config", "mesh"), donate_argnums=1)
def _prefill(
    weights: decoder.Weights, cache: list[Pages], step: Step, *, config: ModelConfig, mesh: Mesh
) -> list[Pages]:
    def local(weights: decoder.Weights, cache: list[Pages], step: Step) -> list[Pages]:
        return _forward(weights, cache, step, config)[1]

    in_specs = sharding.fitted(weights, decode_specs(config), mesh), sharding.PAGES, P()
    return sharding.on_mesh(local, mesh, in_specs, sharding.PAGES)(weights, cache, step)


@functools.partial(jax.jit, static_argnames=("config", "mesh", "num_top"), donate_argnums=(1, 2))
def decode_step(
    weights: decoder.Weights,
    cache: list[Pages],
    last: Int[Array, " slots"],
    slots: Int[Array, " b"],
    step: Step,
    sampling: Sampling,
    *,
    config: ModelConfig,
    mesh: Mesh,
    num_top: int,
) -> tuple[list[Pages], Array, Any]:
    def local(weights: decoder.Weights, cache: list[Pages], last: Array, slots: Array, step: Step, wishes: Sampling):
        tokens = jnp.where(step.tokens < 0, last[slots][:, None], step.tokens)
        hidden_bd, cache = _forward(weights, cache, step.replace(tokens=tokens), config)
        sampled = sample(decoder.logits(weights, hidden_bd), wishes, num_top)
        return cache, last.at[slots].set(sampled[0], mode="drop"), sampled

    in_specs = sharding.fitted(weights, decode_specs(config), mesh), sharding.PAGES, *[P()] * 4
    run = sharding.on_mesh(local, mesh, in_specs, (sharding.PAGES, P(), P()))
    return run(weights, cache, last, slots, step, sampling)


@functools.partial(jax.jit, static_argnames=("config", "mesh", "num_top"), donate_argnums=1)
def _score(
    weights: decoder.Weights,
    cache: list[Pages],
    step: Step,
    following: Int[Array, " t"],
    *,
    config: ModelConfig,
    mesh: Mesh,
    num_top: int,
) -> tuple[list[Pages], Any]:
    def local(weights: decoder.Weights, cache: list[Pages], step: Step, following: Array) -> tuple[list[Pages], Any]:
        hidden_td, cache = _forward(weights, cache, step, config)
        logits_tv = decoder.logits(weights, hidden_td)
        normalizer_t1 = normalizer(logits_tv)
        own_t1 = jnp.take_along_axis(logits_tv, following[:, None], axis=-1)
        top_tj, ids_tj = jax.lax.top_k(logits_tv, num_top)
        rank_t = 1 + (logits_tv > own_t1).sum(-1)
        return cache, ((own_t1 - normalizer_t1)[:, 0], rank_t, ids_tj, top_tj - normalizer_t1)

    in_specs = sharding.fitted(weights, decode_specs(config), mesh), sharding.PAGES, P(), P()
    return sharding.on_mesh(local, mesh, in_specs, (sharding.PAGES, P()))(weights, cache, step, following)


def _forward(weights: decoder.Weights, cache: list[Pages], step: Step, config: ModelConfig) -> Any:
    return decoder.forward(weights, cache, step.tokens, step.positions, step.page, step.place, step.plan, config)
