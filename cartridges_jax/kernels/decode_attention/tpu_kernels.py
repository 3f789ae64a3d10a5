"""The two kernels of `tpu.py`: attention over pages, and the writing of new keys and values.

Pages stay in the device's memory, and each kernel copies the parts of them that it needs. In attention, a *step* is a
page of tokens, with the head pages of all kv heads, or one head page of a cartridge for each kv head that has so many.
Steps have two buffers: while one is multiplied, the other is filled.

Axis letters beyond those of `pages.py`: q chunks of requests (the requests themselves, unless they have many query
tokens), m the queries of a chunk that share a kv head, padded to whole registers, x rows that are multiplied together.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from cartridges_jax.kernels.decode_attention.pages import AttentionMetadata, Pages
from cartridges_jax.kernels.decode_attention.sharing import SLOTS, TOKENS, Thresholds
from cartridges_jax.kernels.decode_attention.softmax import largest_divisor
from cartridges_jax.kernels.prefix_attention.blockwise import MASKED, soft_capped

NOWHERE = -(1 << 30)  # the position of a query that sees nothing
LANES = 128
BIAS_ROWS = 8  # of head pages, which are copied together: as many as a register has
div, rem = jax.lax.div, jax.lax.rem


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """How much is worked on at once, and from when on requests read together."""

    thresholds: Thresholds
    rows: int  # queries of a block of requests, of each kv head
    written: int  # requests whose new keys are written at once
    interpret: bool | pltpu.InterpretParams = False  # interpreted, the kernels run on every platform


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a call is cut into blocks, and its options."""

    sizes: BlockSizes
    tokens: int  # of a chunk
    chunks_each: int  # of a request
    n: int
    k: int
    m: int
    requests: int  # chunks of a block
    z: int
    window: int | None
    scale: float
    soft_cap: float | None

    @property
    def g(self) -> int:
        return self.n // self.k


class Tables(NamedTuple):
    """The metadata, as scalars."""

    layer: Any
    starts: Any
    block_table: Any
    cartridge_ids: Any
    slot_block_table: Any
    token_pages: Any
    leader: Any  # o r
    leads: Any  # o r: whether it is the first of its group in its block
    is_shared: Any  # o r
    common: Any


class Run(NamedTuple):
    """Steps that belong together: `slot_steps` of a request's cartridge, then pages of its tokens from a column on."""

    request: Any
    slot_steps: Any
    column: Any
    num_steps: Any


def attend(
    layout: Layout,
    q: Float[Array, "q t n h"],
    sinks: Float[Array, "k m"] | None,
    pages: Pages,
    tables: Tables,
    slots: Int[Array, "l 1 2ak"],
    page_heads: int,
) -> Float[Array, "q t n h"]:
    """Computes attention.

    Args:
      sinks: the score of the sink of each query.
      slots: where the slots of each head of each cartridge start, and then how many they are.
      page_heads: how many head pages a page has.
    """
    chunks, t, n, h = q.shape
    shape = (layout.k, layout.requests, layout.m)
    block = pl.BlockSpec((layout.requests, t, n, h), lambda i, *_: (i, 0, 0, 0))
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    given = [] if sinks is None else [jnp.broadcast_to(sinks[..., None], (*sinks.shape, LANES))]
    of_given = [pl.BlockSpec((layout.k, layout.m, LANES), lambda i, *_: (0, 0, 0))] * len(given)
    buffers = [pltpu.VMEM((2, layout.k, layout.z, h), a.dtype) for a in (pages.keys, pages.values)]
    buffers.append(pltpu.VMEM((2, layout.k, BIAS_ROWS, layout.z), jnp.float32))
    states = [pltpu.VMEM((*shape, width), jnp.float32) for width in (h, h, LANES, LANES)]  # and the queries
    scalars = [jnp.asarray(a).reshape(-1).astype(jnp.int32) for a in tables]
    widths = tables.block_table.shape[1], tables.slot_block_table.shape[1]
    return pl.pallas_call(
        functools.partial(_attend_kernel, layout, page_heads, widths),
        jax.ShapeDtypeStruct(q.shape, q.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(chunks // layout.requests,),
            in_specs=[block, *[anywhere] * 4, *of_given],
            out_specs=block,
            scratch_shapes=[
                *states,
                *buffers,
                pltpu.SMEM(slots.shape[1:], jnp.int32),
                pltpu.SemaphoreType.DMA((2, 3)),
            ],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        interpret=layout.sizes.interpret,
        name="decode_attention",
    )(*scalars, q, slots, pages.keys, pages.values, pages.bias, *given)


def rotate_and_write(
    sizes: BlockSizes,
    heads: Float[Array, "r t n+2k h"],
    cos: Float[Array, "r t h"],
    sin: Float[Array, "r t h"],
    slot_mapping: Int[Array, "r t"],
    layer: Int[Array, 1],
    pages: Pages,
    metadata: AttentionMetadata,
) -> tuple[Float[Array, "r t n h"], Pages]:
    """Gives the rotated queries, and the pages with rotated keys and with values, which are written in place.

    Args:
      cos, sin: what each number, and the one half a head before or behind it, is multiplied by.
    """
    r, t, heads_each, h = heads.shape
    k, rows = metadata.kv_heads, 32 // pages.keys.dtype.itemsize
    n = heads_each - 2 * k
    b = largest_divisor(r, sizes.written)
    tiles = (rows - 1 + t - 1) // rows + 1
    block = functools.partial(pl.BlockSpec, index_map=lambda i, *_: (i, 0, 0, 0))
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    buffers = [pltpu.VMEM((b, k, rows, h), a.dtype) for a in (pages.keys, pages.values)]
    q, keys, values = pl.pallas_call(
        functools.partial(_rotate_and_write_kernel, n, metadata.heads, t),
        [jax.ShapeDtypeStruct((r, t, n, h), heads.dtype)]
        + [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (pages.keys, pages.values)],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(r // b, tiles),
            in_specs=[block((b, t, heads_each, h)), block((b, t, 1, h)), block((b, t, 1, h)), anywhere, anywhere],
            out_specs=[block((b, t, n, h)), anywhere, anywhere],
            scratch_shapes=[*buffers, pltpu.SemaphoreType.DMA((b, 2))],
        ),
        input_output_aliases={5: 1, 6: 2},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary", "arbitrary")),
        interpret=sizes.interpret,
        name="rotate_and_write",
    )(layer, slot_mapping.reshape(-1), heads, cos[:, :, None], sin[:, :, None], pages.keys, pages.values)
    return q, pages.replace(keys=keys, values=values)


def _rotate_and_write_kernel(n: int, page_heads: int, t: int, *refs: Any) -> None:
    """Of a block of requests, the tokens whose positions lie in one tile of each: it is read, changed and written."""
    layer_ref, slot_ref, heads_ref, cos_ref, sin_ref, _, _, q_ref, *pool_refs = refs[:10]
    *buffer_refs, semaphores = refs[10:]
    b, k, rows, h = buffer_refs[0].shape
    z = pool_refs[0].shape[1]
    block, tile = pl.program_id(0), pl.program_id(1)

    def place(i: Array) -> tuple[Array, Array, Array, Array, Array]:
        """The first and the last token, where their tile lies, and whether it exists."""
        own = (block * b + i) * t
        before = rem(slot_ref[own], rows)
        first, end = jnp.maximum(tile * rows - before, 0), jnp.minimum((tile + 1) * rows - before, t)
        index = slot_ref[own + jnp.minimum(first, t - 1)]
        page, offset = div(index, z), rem(index, z)
        head_page = page * page_heads + layer_ref[0] * k
        exists = (first < end) & (page < div(pool_refs[0].shape[0], page_heads))
        return first, end, head_page, pl.multiple_of(div(offset, rows) * rows, rows), exists

    def transfer(action: str, i: Array, is_back: bool) -> None:
        _, _, head_page, offset, exists = place(i)

        @pl.when(exists)
        def _() -> None:
            for number, (pool, buffer) in enumerate(zip(pool_refs, buffer_refs, strict=True)):
                there, here = pool.at[pl.ds(head_page, k), pl.ds(offset, rows)], buffer.at[i]
                pair = (here, there) if is_back else (there, here)
                getattr(pltpu.make_async_copy(*pair, semaphores.at[i, number]), action)()

    def change(i: Array, _: Any) -> None:
        transfer("wait", i, False)
        first, end, _, _, exists = place(i)

        def token(j: Array, _: Any) -> None:
            x = heads_ref[i, j].astype(jnp.float32)
            turned = x * cos_ref[i, j] + pltpu.roll(x, h // 2, 1) * sin_ref[i, j]
            q_ref[i, j] = turned[:n].astype(q_ref.dtype)
            index = slot_ref[(block * b + i) * t + j]
            is_written = exists & (index < pool_refs[0].shape[0] // page_heads * z)
            is_row = jax.lax.broadcasted_iota(jnp.int32, (rows, h), 0) == jnp.where(is_written, rem(index, rows), -1)
            turned = turned.astype(heads_ref.dtype).astype(jnp.float32)
            for head in range(k):
                for buffer, new, at in ((buffer_refs[0], turned, n + head), (buffer_refs[1], x, n + k + head)):
                    old = buffer[i, head].astype(jnp.float32)
                    buffer[i, head] = jnp.where(is_row, new[at : at + 1], old).astype(buffer.dtype)

        jax.lax.fori_loop(first, end, token, None)
        transfer("start", i, True)

    def over(action: Callable[[Array], None]) -> None:
        jax.lax.fori_loop(0, b, lambda i, _: action(i), None)

    over(lambda i: transfer("start", i, False))
    jax.lax.fori_loop(0, b, change, None)
    over(lambda i: transfer("wait", i, True))


def _attend_kernel(layout: Layout, page_heads: int, widths: tuple[int, int], *refs: Any) -> None:
    tables, refs = Tables(*refs[: len(Tables._fields)]), refs[len(Tables._fields) :]
    q_ref, all_slots_ref, *pool_refs = refs[:5]
    *sinks_refs, o_ref = refs[5:-9]
    sum_ref, rows_ref, max_ref, denominator_ref, *buffer_refs, slots_ref, semaphores = refs[-9:]
    _, requests, m, _ = rows_ref.shape
    first_chunk = pl.program_id(0) * requests
    of_layer = pltpu.make_async_copy(all_slots_ref.at[tables.layer[0]], slots_ref, semaphores.at[0, 0])
    of_layer.start()
    _gather_rows(layout, q_ref, rows_ref)
    sum_ref[...] = jnp.zeros(sum_ref.shape, jnp.float32)
    max_ref[...] = jnp.full(max_ref.shape, MASKED)
    denominator_ref[...] = jnp.zeros(denominator_ref.shape, jnp.float32)
    for ref in sinks_refs:
        max_ref[...] = jnp.broadcast_to(ref[...][:, None], max_ref.shape)
        denominator_ref[...] = jnp.ones(denominator_ref.shape, jnp.float32)
    of_layer.wait()
    of = _Metadata(layout, tables, slots_ref, page_heads, widths)
    states = sum_ref, max_ref, denominator_ref
    fetch = functools.partial(_transfer, of, pool_refs, buffer_refs, semaphores)
    multiply = functools.partial(_multiply, of, rows_ref, buffer_refs, states)
    is_together = requests > 1 and layout.chunks_each == 1
    if is_together:
        for kind in (SLOTS, TOKENS):
            _read_together(of, kind, first_chunk, requests, m, fetch, multiply)

    def request(i: Array, buffer: Array) -> Array:
        run = of.own_run(first_chunk + i, is_together)
        following = of.own_run(first_chunk + jnp.minimum(i + 1, requests - 1), is_together)
        number, offset = div(first_chunk + i, layout.chunks_each), rem(first_chunk + i, layout.chunks_each)
        query_mz = div(jax.lax.broadcasted_iota(jnp.int32, (m, layout.z), 0), layout.g)
        position_mz = tables.starts[number] + offset * layout.tokens + query_mz

        def step(s: Array, buffer: Array) -> Array:
            is_last = s + 1 == run.num_steps

            @pl.when(jnp.logical_not(is_last & (i + 1 == requests)))
            def _() -> None:
                upcoming = Run(*(jnp.where(is_last, b, a) for a, b in zip(run, following, strict=True)))
                fetch("start", upcoming, jnp.where(is_last, 0, s + 1), 1 - buffer)

            fetch("wait", run, s, buffer)
            multiply(run, s, buffer, i, position_mz)
            return 1 - buffer

        return jax.lax.fori_loop(0, run.num_steps, step, buffer)

    fetch("start", of.own_run(first_chunk, is_together), jnp.int32(0), jnp.int32(0))
    jax.lax.fori_loop(0, requests, request, jnp.int32(0))
    _scatter_rows(layout, states, o_ref)


def _gather_rows(layout: Layout, q_ref: Any, rows_ref: Any) -> None:
    """Puts the queries of each kv head side by side, token by token; behind them are zeros."""
    k, requests, m, h = rows_ref.shape
    g, rest = layout.g, m - layout.tokens * layout.g

    def chunk(i: Array, _: Any) -> None:
        tokens = [q_ref[i, j].astype(jnp.float32) for j in range(layout.tokens)]
        for head in range(k):
            rows = [token[head * g : (head + 1) * g] for token in tokens]
            rows_ref[head, i] = jnp.concatenate(rows + [jnp.zeros((rest, h), jnp.float32)] * (rest > 0))

    jax.lax.fori_loop(0, requests, chunk, None)


def _scatter_rows(layout: Layout, state_refs: Any, o_ref: Any) -> None:
    """Divides the sums and puts the heads of each token side by side."""
    sum_ref, _, denominator_ref = state_refs
    k, requests, _, _ = sum_ref.shape
    g = layout.g

    def chunk(i: Array, _: Any) -> None:
        found = [sum_ref[head, i] / jnp.maximum(denominator_ref[head, i][:, :1], 1e-30) for head in range(k)]
        for j in range(layout.tokens):
            o_ref[i, j] = jnp.concatenate([rows[j * g : (j + 1) * g] for rows in found]).astype(o_ref.dtype)

    jax.lax.fori_loop(0, requests, chunk, None)


def _read_together(
    of: _Metadata,
    kind: int,
    first_chunk: Array,
    requests: int,
    m: int,
    fetch: Callable[..., None],
    multiply: Callable[..., None],
) -> None:
    """Reads what the members of a block share, group by group; rows of other requests see nothing of it."""
    tables, r = of.tables, of.tables.starts.shape[0]

    def group(i: Array, _: Any) -> None:
        request = first_chunk + i

        @pl.when(tables.leads[kind * r + request] > 0)
        def _() -> None:
            leader = tables.leader[kind * r + request]
            parts = []
            for j in range(requests):
                is_member = tables.leader[kind * r + first_chunk + j] == leader
                start = jnp.where(is_member, tables.starts[first_chunk + j], NOWHERE)
                parts.append(jnp.full((m, of.layout.z), start, jnp.int32))
            start_xz = jnp.concatenate(parts)
            row_xz = jax.lax.broadcasted_iota(jnp.int32, start_xz.shape, 0)
            position_xz = start_xz + div(rem(row_xz, m), of.layout.g)
            steps = of.slot_steps(request) if kind == SLOTS else jnp.int32(0)
            run = Run(request, steps, jnp.int32(0), steps if kind == SLOTS else tables.common[request])
            fetch("start", run, jnp.int32(0), jnp.int32(0))

            def step(s: Array, buffer: Array) -> Array:
                @pl.when(s + 1 < run.num_steps)
                def _() -> None:
                    fetch("start", run, s + 1, 1 - buffer)

                fetch("wait", run, s, buffer)
                multiply(run, s, buffer, None, position_xz)
                return 1 - buffer

            jax.lax.fori_loop(0, run.num_steps, step, jnp.int32(0))

    jax.lax.fori_loop(0, requests, group, None)


def _multiply(
    of: _Metadata,
    rows_ref: Any,
    buffer_refs: Any,
    state_refs: Any,
    run: Run,
    step: Array,
    buffer: Array,
    i: Array | None,
    position_xz: Int[Array, "x z"],
) -> None:
    """Adds a step to the softmax of a chunk, or, if `i` is None, of all chunks of the block."""
    (sum_ref, max_ref, denominator_ref), (keys_ref, values_ref, bias_ref) = state_refs, buffer_refs
    layout, h = of.layout, rows_ref.shape[3]
    is_slots, first = step < run.slot_steps, of.column(run, step) * layout.z
    at_xz = jax.lax.broadcasted_iota(jnp.int32, position_xz.shape, 1)
    last_xz = jnp.minimum(position_xz, of.tables.token_pages[run.request] * layout.z - 1) - first
    from_xz = jnp.zeros_like(at_xz) if layout.window is None else position_xz - first - (layout.window - 1)
    for head in range(layout.k):
        slots = of.slots(run.request, head, step)
        low = jnp.where(is_slots, slots.low, from_xz)
        high = jnp.where(is_slots, jnp.where(position_xz >= 0, slots.high - 1, -1), last_xz)
        seen_xz = (at_xz >= low) & (at_xz <= high)
        at = (head,) if i is None else (head, i)
        keys, values = keys_ref[buffer, head], values_ref[buffer, head]
        q_xh = rows_ref[at].reshape(-1, h).astype(keys.dtype)
        scores_xz = jax.lax.dot_general(q_xh, keys, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
        bias_row = jax.lax.broadcasted_iota(jnp.int32, bias_ref.shape[2:], 0) == rem(slots.head_page, BIAS_ROWS)
        bias_1z = jnp.where(bias_row & is_slots, bias_ref[buffer, head], 0).sum(0, keepdims=True)
        scores_xz = soft_capped(scores_xz * layout.scale, layout.soft_cap) + bias_1z
        scores_xz = jnp.where(seen_xz, scores_xz, MASKED)
        max_x, denominator_x = (ref[at].reshape(-1, LANES)[:, :1] for ref in (max_ref, denominator_ref))
        new_max_x = jnp.maximum(max_x, scores_xz.max(1, keepdims=True))
        probs_xz = jnp.where(seen_xz, jnp.exp(scores_xz - new_max_x), 0.0)
        rescale_x = jnp.exp(max_x - new_max_x)
        # a buffer that nothing was copied to holds anything, and so do slots of other heads
        at_zh = jax.lax.broadcasted_iota(jnp.int32, values.shape, 0)
        is_value = (at_zh >= jnp.where(is_slots, slots.low, 0)) & (at_zh < jnp.where(is_slots, slots.high, layout.z))
        values = jnp.where(is_value, values.astype(jnp.float32), 0.0).astype(values.dtype)
        weighed_xh = jnp.dot(probs_xz.astype(values.dtype), values, preferred_element_type=jnp.float32)
        denominator_x = denominator_x * rescale_x + probs_xz.sum(1, keepdims=True)
        wide = (len(max_x), LANES)
        for ref, value in (
            (sum_ref, sum_ref[at].reshape(-1, h) * rescale_x + weighed_xh),
            (max_ref, jnp.broadcast_to(new_max_x, wide)),
            (denominator_ref, jnp.broadcast_to(denominator_x, wide)),
        ):
            ref[at] = value.reshape(ref[at].shape)


def _transfer(
    of: _Metadata, pool_refs: Any, buffer_refs: Any, semaphores: Any, action: str, run: Run, step: Array, buffer: Array
) -> None:
    """Starts the copies of a step, or waits for them."""
    is_slots = step < run.slot_steps

    def copy(number: int, there: Any, here: Any) -> None:
        getattr(pltpu.make_async_copy(there, here, semaphores.at[buffer, number]), action)()

    @pl.when(jnp.logical_not(is_slots))
    def _() -> None:
        first = of.token_head_page(run, step)
        for number in range(2):
            copy(number, pool_refs[number].at[pl.ds(first, of.layout.k)], buffer_refs[number].at[buffer])

    for head in range(of.layout.k):
        slots = of.slots(run.request, head, step)

        @pl.when(is_slots & slots.exists)
        def _(head: int = head, slots: Slots = slots) -> None:
            for number in range(2):
                copy(number, pool_refs[number].at[slots.head_page], buffer_refs[number].at[buffer, head])
            rows = pl.multiple_of(div(slots.head_page, BIAS_ROWS) * BIAS_ROWS, BIAS_ROWS)
            copy(2, pool_refs[2].at[pl.ds(rows, BIAS_ROWS)], buffer_refs[2].at[buffer, head])


class Slots(NamedTuple):
    """A head page of a cartridge, for one head."""

    head_page: Any
    exists: Any
    low: Any  # from which of its positions on the slots are the head's, and up to which
    high: Any


@dataclasses.dataclass(frozen=True)
class _Metadata:
    """What follows from the scalars, for each chunk, head and step."""

    layout: Layout
    tables: Tables
    slots_ref: Any  # of the layer: where the slots of each head of each cartridge start, and then how many they are
    page_heads: int
    widths: tuple[int, int]  # columns of the block tables, of tokens and of slots

    @property
    def cartridges(self) -> int:
        return self.tables.slot_block_table.shape[0] // self.widths[1]

    def range_of(self, cartridge: Array, head: int) -> tuple[Array, Array]:
        """Where the slots of a head start, and how many they are; of no cartridge, those of any."""
        k = self.layout.k
        at = jnp.maximum(cartridge, 0) * k + head
        return self.slots_ref[0, at], self.slots_ref[0, self.cartridges * k + at]

    def slots(self, request: Array, head: int, step: Array) -> Slots:
        cartridge = self.tables.cartridge_ids[request]
        (start, length), z = self.range_of(cartridge, head), self.layout.z
        end = start + length
        number = div(start, z) + step
        exists = (cartridge >= 0) & (end > start) & (number * z < end)
        column = jnp.minimum(div(number, self.page_heads), self.widths[1] - 1)
        first = self.tables.slot_block_table[jnp.maximum(cartridge, 0) * self.widths[1] + column]
        low, high = start - number * z, jnp.where(exists, end - number * z, 0)
        return Slots(first + rem(number, self.page_heads), exists, low, high)

    def slot_steps(self, request: Array) -> Array:
        """How many head pages hold slots of the head that has most."""
        cartridge = self.tables.cartridge_ids[request]
        most, z = jnp.int32(0), self.layout.z
        for head in range(self.layout.k):
            start, length = self.range_of(cartridge, head)
            most = jnp.maximum(most, jnp.where(length > 0, div(start + length - 1, z) - div(start, z) + 1, 0))
        return jnp.where(cartridge >= 0, most, 0)

    def own_run(self, chunk: Array, is_together: bool) -> Run:
        """What is read for a chunk alone; at least one step, of which nothing may be seen."""
        layout, tables = self.layout, self.tables
        r = tables.starts.shape[0]
        request, offset = div(chunk, layout.chunks_each), rem(chunk, layout.chunks_each) * layout.tokens
        steps, column = self.slot_steps(request), jnp.int32(0)
        if is_together:
            steps = jnp.where(tables.is_shared[SLOTS * r + request] > 0, 0, steps)
            column = tables.common[request]
        first = tables.starts[request] + offset
        if layout.window is not None:
            column = jnp.maximum(column, div(jnp.maximum(first - (layout.window - 1), 0), layout.z))
        end = jnp.minimum(tables.token_pages[request], div(first + layout.tokens - 1, layout.z) + 1)
        return Run(request, steps, column, jnp.maximum(steps + jnp.maximum(end - column, 0), 1))

    def column(self, run: Run, step: Array) -> Array:
        return run.column + step - run.slot_steps

    def token_head_page(self, run: Run, step: Array) -> Array:
        """The first head page of a page of tokens in this layer."""
        column = jnp.clip(self.column(run, step), 0, self.widths[0] - 1)
        page = jnp.maximum(self.tables.block_table[run.request * self.widths[0] + column], 0)
        return page * self.page_heads + self.tables.layer[0] * self.layout.k
