"""The three kernels of `gpu.py`: attention over parts of the keys, the merging of parts, and the writing of new keys.

A *part* is what one program reads of the keys that a request sees: some of its own head pages (those of its cartridge,
then those of its tokens), or some of what it shares. A program of a request's own has that request's queries as its
rows, and a program of a shared part those of a block of members. Of a request, parts of its own come first among the
results, then shared parts of its cartridge, then those of its tokens. Whether a part exists follows from lengths, and
the merging reads those that do.

Axis letters beyond those of `pages.py`: q chunks of requests (the requests themselves, unless they have many query
tokens), m the queries of a chunk that share a kv head, x rows of a program, i parts.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from cartridges_jax.kernels.decode_attention.pages import AttentionMetadata, Pages
from cartridges_jax.kernels.decode_attention.sharing import SLOTS, TOKENS, Thresholds
from cartridges_jax.kernels.prefix_attention.blockwise import MASKED, soft_capped

LEAST_ROWS = 16  # of a product, as Triton has them
div, rem = jax.lax.div, jax.lax.rem


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """How attention is cut into programs, and from when on requests read together."""

    thresholds: Thresholds
    rows: int  # queries of a program
    keys: int  # that a program multiplies at once; a power of two
    requests: int  # requests of a program that reads what they share
    programs: int  # that read what requests have of their own: a few for each multiprocessor of a large GPU
    fewest_parts: int  # a request's own keys are split into at most so many if there are many requests
    most_parts: int  # and if there are few
    shared_parts: int
    warps: int
    stages: int
    interpret: bool = False  # interpreted, the kernels run on every platform

    def blocks(self, r: int) -> int:
        """How many blocks of members r requests form at most, of both kinds of groups together."""
        users = self.thresholds.users
        return 2 * (-(-r // self.requests) + r // users) if r >= users else 0


class Order(NamedTuple):
    """What is worked out once for all layers; places are those of `sharing.by_group`."""

    is_shared: Int[Array, "o r"]
    common: Int[Array, " r"]  # how many pages of tokens a request reads together with others
    request_at: Int[Array, " r"]
    block_place: Int[Array, " c"]  # where a block of members begins, its kind times r before it; 2 r if there is none
    block_size: Int[Array, " c"]
    token_pages: Int[Array, " r"]
    longest: Int[Array, "2 l"]  # how many head pages a request has for a head: alone, and beside what it shares
    all_pages: Int[Array, "2 l"]  # of all requests and heads


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a call is cut into programs, and its options."""

    sizes: BlockSizes
    tokens: int  # of a chunk
    chunks_each: int  # of a request
    n: int
    k: int
    z: int
    own_parts: int  # of a request, at most
    shared_parts: int  # of what requests share of either kind, at most
    blocks: int  # of members, at most; 0 if each request reads alone
    window: int | None
    scale: float
    soft_cap: float | None

    @property
    def g(self) -> int:
        return self.n // self.k

    @property
    def m(self) -> int:
        return self.tokens * self.g

    @property
    def parts(self) -> int:
        return self.own_parts + 2 * self.shared_parts

    @property
    def shares(self) -> int:
        """Whether requests may read together."""
        return int(self.blocks > 0)


class Rows(NamedTuple):
    """The queries of a program."""

    chunk: Int[Array, " x"]  # whose queries they are
    query: Int[Array, " x"]  # which of its m queries
    exists: Array


class Span(NamedTuple):
    """Head pages that a program or a request reads: some of a cartridge, then some of tokens."""

    request: Int[Array, ""]  # whose block table has them
    num_slot_pages: Int[Array, ""]
    column: Int[Array, ""]  # of the first page of tokens
    num_token_pages: Int[Array, ""]

    @property
    def count(self) -> Array:
        return self.num_slot_pages + self.num_token_pages


class Tables(NamedTuple):
    """References to the metadata; the layer is an array of one number."""

    layer: Any
    starts: Any
    block_table: Any
    cartridge_ids: Any
    slot_block_table: Any
    slot_starts: Any
    slot_lens: Any
    order: Order

    @classmethod
    def of(cls, metadata: AttentionMetadata) -> Tables:
        layer = jnp.asarray(metadata.layer, jnp.int32).reshape(1)
        order = Order(*(a.astype(jnp.int32) for a in metadata.order))
        return cls(layer, *(jnp.asarray(a) for a in metadata[:6]), order)


def attend(
    layout: Layout, q: Float[Array, "r t n h"], pages: Pages, metadata: AttentionMetadata
) -> tuple[Float[Array, "iqkm h"], Float[Array, "iqkm 2"]]:
    """Computes the outputs of all parts, not divided, and the maxima and the denominators of their softmaxes."""
    r, t, _, h = q.shape
    chunks = r * (t // layout.tokens)
    rows = layout.parts * chunks * layout.k * layout.m
    parts = max(layout.own_parts, layout.shared_parts)
    tables, tree = jax.tree.flatten(Tables.of(metadata))
    warps = layout.sizes.warps * (2 if h > 128 or q.dtype == jnp.float32 else 1)
    return pl.pallas_call(
        functools.partial(_attend_kernel, layout, tree),
        [jax.ShapeDtypeStruct((rows, h), jnp.float32), jax.ShapeDtypeStruct((rows, 2), jnp.float32)],
        grid=(layout.blocks + chunks, layout.k, parts),
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=layout.sizes.stages),
        interpret=layout.sizes.interpret,
        name="decode_attention",
    )(*tables, q.reshape(-1, h), pages.keys, pages.values, pages.bias)


def merge(
    layout: Layout,
    q: Float[Array, "r t n h"],
    o: Float[Array, "iqkm h"],
    stats: Float[Array, "iqkm 2"],
    metadata: AttentionMetadata,
    sinks: Float[Array, " n"] | None,
) -> Float[Array, "r t n h"]:
    """Merges the parts of each request, and the sinks."""
    r, t, n, h = q.shape
    tables, tree = jax.tree.flatten(Tables.of(metadata))
    given = [] if sinks is None else [sinks.astype(jnp.float32)]
    merged = pl.pallas_call(
        functools.partial(_merge_kernel, layout, tree),
        jax.ShapeDtypeStruct((r * t * n, h), q.dtype),
        grid=(r * (t // layout.tokens), layout.k),
        compiler_params=plgpu.CompilerParams(num_warps=layout.sizes.warps),
        interpret=layout.sizes.interpret,
        name="decode_attention_merge",
    )(*tables, *given, o, stats)
    return merged.reshape(q.shape)


def rotate_and_write(
    heads: Float[Array, "r t n+2k h"],
    cos: Float[Array, "r t h/2"],
    sin: Float[Array, "r t h/2"],
    slot_mapping: Int[Array, "r t"],
    pages: Pages,
    metadata: AttentionMetadata,
    interpret: bool,
) -> tuple[Float[Array, "r t n h"], Pages]:
    """Gives the rotated queries, and the pages with rotated keys and with values, which are written in place."""
    r, t, heads_each, h = heads.shape
    n = heads_each - 2 * metadata.kv_heads
    layer = jnp.asarray(metadata.layer, jnp.int32).reshape(1)
    given = layer, slot_mapping.reshape(-1), heads.reshape(r * t, heads_each, h)
    rope = (a.reshape(r * t, h // 2) for a in (cos, sin))
    q, keys, values = pl.pallas_call(
        functools.partial(_rotate_and_write_kernel, n, metadata.kv_heads, metadata.heads),
        [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (heads[..., :n, :].reshape(r * t, n, h), *_pools(pages))],
        grid=(r * t, heads_each),
        input_output_aliases={5: 1, 6: 2},
        compiler_params=plgpu.CompilerParams(num_warps=1),
        interpret=interpret,
        name="rotate_and_write",
    )(*given, *rope, *_pools(pages))
    return q.reshape(r, t, n, h), pages.replace(keys=keys, values=values)


def power_of_two(size: int) -> int:
    """The least one that is not below the size."""
    return 1 << (size - 1).bit_length()


def _pools(pages: Pages) -> tuple[Array, Array]:
    return pages.keys, pages.values


def _rotate_and_write_kernel(n: int, k: int, page_heads: int, *refs: Any) -> None:
    layer_ref, slot_mapping_ref, heads_ref, cos_ref, sin_ref, _, _, q_ref, keys_ref, values_ref = refs
    token, head = pl.program_id(0), pl.program_id(1)
    half = heads_ref.shape[2] // 2
    halves = pl.ds(0, half), pl.ds(half, half)
    first, second = (heads_ref[token, head, at] for at in halves)
    cos, sin, x, y = cos_ref[token], sin_ref[token], first.astype(jnp.float32), second.astype(jnp.float32)
    rotated = [a.astype(first.dtype) for a in (x * cos - y * sin, y * cos + x * sin)]
    z = keys_ref.shape[1]
    index = slot_mapping_ref[token]
    page, offset = div(index, z), rem(index, z)
    exists = page * page_heads < keys_ref.shape[0]

    def store(ref: Any, at: tuple[Any, Any], parts: list[Array]) -> None:
        for where, part in zip(halves, parts, strict=True):
            ref[(*at, where)] = part.astype(ref.dtype)

    @pl.when(head < n)
    def _() -> None:
        store(q_ref, (token, head), rotated)

    @pl.when((head >= n) & (head < n + k) & exists)
    def _() -> None:
        store(keys_ref, (page * page_heads + layer_ref[0] * k + head - n, offset), rotated)

    @pl.when((head >= n + k) & exists)
    def _() -> None:
        store(values_ref, (page * page_heads + layer_ref[0] * k + head - n - k, offset), [first, second])


def _attend_kernel(layout: Layout, tree: Any, *refs: Any) -> None:
    *table_refs, q_ref, keys_ref, values_ref, bias_ref, o_ref, stats_ref = refs
    tables = jax.tree.unflatten(tree, table_refs)
    number, head, i = (pl.program_id(axis) for axis in range(3))
    chunks = o_ref.shape[0] // (layout.parts * layout.k * layout.m)

    def read(rows: Rows, span: Span, each: Array, first_part: Array | int, parts: int) -> None:
        start, end = i * each, jnp.minimum((i + 1) * each, span.count)

        @pl.when((start < end) & (i < parts))
        def _() -> None:
            q_xh = _load_rows(q_ref, _query_index(layout, rows, head), rows.exists)
            o_xh, running_max_x, denominator_x = _visit(
                layout, tables, (keys_ref, values_ref, bias_ref), q_xh, rows, span, head, start, end
            )
            at_x = (((first_part + i) * chunks + rows.chunk) * layout.k + head) * layout.m + rows.query
            _store_rows(o_ref, at_x, o_xh, rows.exists)
            _store_rows(stats_ref, at_x, jnp.stack([running_max_x, denominator_x], axis=1), rows.exists)

    def own() -> None:
        chunk, query_x = number - layout.blocks, jnp.arange(max(power_of_two(layout.m), LEAST_ROWS))
        rows = Rows(jnp.zeros_like(query_x) + chunk, query_x, query_x < layout.m)
        read(rows, _own_span(layout, tables, chunk, head), _pages_each(layout, tables), 0, layout.own_parts)

    def shared() -> None:
        r, size = tables.starts.shape[0], power_of_two(layout.m)
        place = tables.order.block_place[number]
        is_block = place < 2 * r
        kind, place = div(place, r), rem(place, r)
        row_x = jnp.arange(max(layout.sizes.requests * size, LEAST_ROWS))
        member_x, query_x = div(row_x, size), rem(row_x, size)
        chunk_x = tables.order.request_at[jnp.minimum(place + member_x, r - 1)]
        exists_x = (member_x < tables.order.block_size[number]) & (query_x < layout.m) & is_block
        span = _shared_span(layout, tables, tables.order.request_at[place], head, kind)
        span = span._replace(
            num_slot_pages=jnp.where(is_block, span.num_slot_pages, 0),
            num_token_pages=jnp.where(is_block, span.num_token_pages, 0),
        )
        each = jnp.maximum(_cdiv(span.count, layout.shared_parts), 1)
        first_part = layout.own_parts + kind * layout.shared_parts
        read(Rows(chunk_x, query_x, exists_x), span, each, first_part, layout.shared_parts)

    if layout.blocks:
        pl.when(number < layout.blocks)(shared)
        pl.when(number >= layout.blocks)(own)
    else:
        own()


def _visit(
    layout: Layout,
    tables: Tables,
    pools: tuple[Any, Any, Any],
    q_xh: Array,
    rows: Rows,
    span: Span,
    head: Array,
    start: Array,
    end: Array,
) -> tuple[Array, Array, Array]:
    """Visits the head pages `start` to `end` - 1 of a span, some keys at a time."""
    keys_ref, values_ref, bias_ref = pools
    z, layer = layout.z, tables.layer[0]
    size = min(layout.sizes.keys, z)
    blocks = z // size
    request_x, offset_x = _request(layout, rows.chunk)
    position_x = tables.starts[request_x] + offset_x + div(rows.query, layout.g)
    cartridge = jnp.maximum(tables.cartridge_ids[span.request], 0)
    slot_start = tables.slot_starts[layer, cartridge, head]
    slot_end = slot_start + tables.slot_lens[layer, cartridge, head]
    page_heads = layout.k * tables.slot_lens.shape[0]

    def block(step: Array, state: Any) -> Any:
        running_max_x, denominator_x, o_xh = state
        entry, at = div(step, blocks), rem(step, blocks) * size
        is_slots = entry < span.num_slot_pages
        slot_page = div(slot_start, z) + entry
        column = jnp.clip(span.column + entry - span.num_slot_pages, 0, tables.block_table.shape[1] - 1)
        table_column = jnp.minimum(div(slot_page, page_heads), tables.slot_block_table.shape[1] - 1)
        of_slots = tables.slot_block_table[cartridge, table_column] + rem(slot_page, page_heads)
        of_tokens = tables.block_table[span.request, column] * page_heads + layer * layout.k + head
        head_page = jnp.where(is_slots, of_slots, of_tokens)
        index_s = jnp.where(is_slots, slot_page, column) * z + at + jnp.arange(size)
        is_slot_s = is_slots & (index_s >= slot_start) & (index_s < slot_end)
        is_token_xs = jnp.logical_not(is_slots) & (index_s <= position_x[:, None])
        if layout.window is not None:
            is_token_xs &= index_s > position_x[:, None] - layout.window
        seen_xs = is_slot_s | is_token_xs
        k_sh, v_sh = keys_ref[head_page, pl.ds(at, size)], values_ref[head_page, pl.ds(at, size)]
        bias_s = jnp.where(is_slots, bias_ref[head_page, pl.ds(at, size)], 0)
        scores_xs = _dot(q_xh.astype(k_sh.dtype), k_sh.T) * layout.scale
        scores_xs = soft_capped(scores_xs, layout.soft_cap) + bias_s
        scores_xs = jnp.where(seen_xs, scores_xs, MASKED)
        new_max_x = jnp.maximum(running_max_x, scores_xs.max(1))
        probs_xs = jnp.where(seen_xs, jnp.exp(scores_xs - new_max_x[:, None]), 0)
        rescale_x = jnp.exp(running_max_x - new_max_x)
        o_xh = o_xh * rescale_x[:, None] + _dot(probs_xs.astype(v_sh.dtype), v_sh)
        return new_max_x, denominator_x * rescale_x + probs_xs.sum(1), o_xh

    zeros_x = jnp.zeros(q_xh.shape[0], jnp.float32)
    state = zeros_x + MASKED, zeros_x, jnp.zeros(q_xh.shape, jnp.float32)
    running_max_x, denominator_x, o_xh = jax.lax.fori_loop(start * blocks, end * blocks, block, state)
    return o_xh, running_max_x, denominator_x


def _merge_kernel(layout: Layout, tree: Any, *refs: Any) -> None:
    *given_refs, o_ref, stats_ref, merged_ref = refs
    tables = jax.tree.unflatten(tree, given_refs[: tree.num_leaves])
    sink_refs = given_refs[tree.num_leaves :]
    chunk, head = pl.program_id(0), pl.program_id(1)
    chunks = o_ref.shape[0] // (layout.parts * layout.k * layout.m)
    query_x = jnp.arange(power_of_two(layout.m))
    rows = Rows(jnp.zeros_like(query_x) + chunk, query_x, query_x < layout.m)
    num_own = _cdiv(_own_span(layout, tables, chunk, head).count, _pages_each(layout, tables))
    num_of = [num_own, *(_num_shared_parts(layout, tables, chunk, head, kind) for kind in (SLOTS, TOKENS))]

    def add(i: Array, state: Any) -> Any:
        running_max_x, denominator_x, o_xh = state
        part = jnp.where(i < num_of[0], i, layout.own_parts + i - num_of[0])
        part = jnp.where(i < num_of[0] + num_of[1], part, part + layout.shared_parts - num_of[1])
        at_x = ((part * chunks + chunk) * layout.k + head) * layout.m + jnp.minimum(query_x, layout.m - 1)
        max_x, new_denominator_x = stats_ref[at_x, 0], stats_ref[at_x, 1]
        new_max_x = jnp.maximum(running_max_x, max_x)
        rescale_x, weight_x = jnp.exp(running_max_x - new_max_x), jnp.exp(max_x - new_max_x)
        o_xh = o_xh * rescale_x[:, None] + _load_rows(o_ref, at_x, rows.exists) * weight_x[:, None]
        return new_max_x, denominator_x * rescale_x + new_denominator_x * weight_x, o_xh

    zeros_x = jnp.zeros(query_x.shape, jnp.float32)
    running_max_x, denominator_x = zeros_x + MASKED, zeros_x
    for ref in sink_refs:
        running_max_x, denominator_x = ref[head * layout.g + rem(query_x, layout.g)], zeros_x + 1
    state = running_max_x, denominator_x, jnp.zeros((*query_x.shape, o_ref.shape[1]), jnp.float32)
    _, denominator_x, o_xh = jax.lax.fori_loop(0, sum(num_of), add, state)
    o_xh = o_xh / jnp.maximum(denominator_x, 1e-30)[:, None]
    at_x = _query_index(layout, rows, head)
    _store_rows(merged_ref, at_x, o_xh.astype(merged_ref.dtype), rows.exists)


def _query_index(layout: Layout, rows: Rows, head: Array) -> Int[Array, " x"]:
    """Where the queries of rows lie among all heads of all tokens."""
    token_x = rows.chunk * layout.tokens + div(rows.query, layout.g)
    return token_x * layout.n + head * layout.g + rem(rows.query, layout.g)


def _load_rows(ref: Any, at_x: Int[Array, " x"], exists_x: Array) -> Float[Array, "x h"]:
    return plgpu.load(ref.at[_rows(ref, at_x, exists_x)], mask=exists_x[:, None], other=0.0)


def _store_rows(ref: Any, at_x: Int[Array, " x"], values_xh: Float[Array, "x h"], exists_x: Array) -> None:
    plgpu.store(ref.at[_rows(ref, at_x, exists_x)], values_xh, mask=exists_x[:, None])


def _rows(ref: Any, at_x: Int[Array, " x"], exists_x: Array) -> tuple[Array, Array]:
    """The index of rows; those that do not exist lie behind the last, as the interpreter needs it."""
    return jnp.where(exists_x, at_x, ref.shape[0])[:, None], jnp.arange(ref.shape[1])[None]


def _request(layout: Layout, chunk: Array) -> tuple[Array, Array]:
    """The request of a chunk, and how many of its query tokens come before the chunk's."""
    return div(chunk, layout.chunks_each), rem(chunk, layout.chunks_each) * layout.tokens


def _own_span(layout: Layout, tables: Tables, chunk: Array, head: Array) -> Span:
    """What is read for a chunk of a request alone: all that its queries see, but for what it reads with others."""
    request, offset = _request(layout, chunk)
    num_slot_pages, column = _slot_pages(layout, tables, request, head), jnp.int32(0)
    if layout.shares:
        num_slot_pages = jnp.where(tables.order.is_shared[SLOTS, request] > 0, 0, num_slot_pages)
        column = tables.order.common[request]
    first = tables.starts[request] + offset
    if layout.window is not None:
        column = jnp.maximum(column, div(jnp.maximum(first - (layout.window - 1), 0), layout.z))
    end = jnp.minimum(tables.order.token_pages[request], div(first + layout.tokens - 1, layout.z) + 1)
    return Span(request, num_slot_pages, column, jnp.maximum(end - column, 0))


def _shared_span(layout: Layout, tables: Tables, request: Array, head: Array, kind: Array | int) -> Span:
    """What a request reads together with the others of a kind of group, if they are enough."""
    num_slot_pages = jnp.where(kind == SLOTS, _slot_pages(layout, tables, request, head), 0)
    return Span(request, num_slot_pages, jnp.int32(0), jnp.where(kind == TOKENS, tables.order.common[request], 0))


def _slot_pages(layout: Layout, tables: Tables, request: Array, head: Array) -> Array:
    """How many head pages hold slots of a head of a request's cartridge."""
    cartridge, layer = tables.cartridge_ids[request], tables.layer[0]
    start = tables.slot_starts[layer, jnp.maximum(cartridge, 0), head]
    end = start + tables.slot_lens[layer, jnp.maximum(cartridge, 0), head]
    exists = (cartridge >= 0) & (end > start)
    return jnp.where(exists, div(end - 1, layout.z) - div(start, layout.z) + 1, 0)


def _pages_each(layout: Layout, tables: Tables) -> Array:
    """How many head pages a part of a request's own has: few, so that there are enough parts, but enough for all."""
    longest, all_pages = (a[layout.shares, tables.layer[0]] for a in (tables.order.longest, tables.order.all_pages))
    for_programs = _cdiv(all_pages * layout.chunks_each, layout.sizes.programs)
    return jnp.maximum(jnp.maximum(for_programs, _cdiv(longest, layout.own_parts)), 1)


def _num_shared_parts(layout: Layout, tables: Tables, request: Array, head: Array, kind: int) -> Array:
    """How many parts what a request shares in a kind of group has."""
    if not layout.shares:
        return jnp.int32(0)
    count = _shared_span(layout, tables, request, head, kind).count
    parts = _cdiv(count, jnp.maximum(_cdiv(count, layout.shared_parts), 1))
    return jnp.where(tables.order.is_shared[kind, request] > 0, parts, 0)


def _cdiv(a: Array, b: Array | int) -> Array:
    return div(a + b - 1, b)


def _dot(a: Array, b: Array) -> Array:
    return jnp.dot(a, b, preferred_element_type=jnp.float32)
