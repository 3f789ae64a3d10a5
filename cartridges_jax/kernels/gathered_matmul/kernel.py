"""This writes the kernel of `gathered_matmul` in LLVM's language, for matrices of given shapes and dtypes.

A tile of the result stays in vector registers while d rows and columns are multiplied into it. The right matrices,
which come from memory, are prefetched well before their turn: a core that multiplies does not look far enough ahead by
itself, and the times of memory and of arithmetic would add up.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

from llvmlite import ir

ITEM_BYTES = 1 << 18  # an item has at most so many bytes of right matrices
ITEM_ROWS = 128  # and at most about so many rows of one product
CACHE_LINE_BYTES = 64
L1_BYTES = 1 << 14  # right columns of this size are still in the L1 cache when they are read again: half of a small one
PREFETCH_BYTES = 1 << 13  # the prefetch's distance: what a core reads in half a microsecond
BYTES = {"float32": 4, "bfloat16": 2}

Value = Any  # a value of LLVM's
I16, I32, I64 = (ir.IntType(bits) for bits in (16, 32, 64))
FLOAT, POINTER, VOID = ir.FloatType(), ir.PointerType(), ir.VoidType()
JOB = ir.LiteralStructType([I64] * 6 + [POINTER] * 5)  # as in handler.ll
NEXT, DONE, ITEMS, PRODUCTS_PER_ITEM, PRODUCTS, LEFT, LEFT_INDEX, RIGHT, RIGHT_INDEX, OUT = range(1, 11)  # its fields


@dataclasses.dataclass(frozen=True)
class Kernel:
    """The kernel for products of one shape [x, d] by [d, y] on one machine.

    Args:
      left, right: the dtypes of the matrices.
      side_by_side: the result is one matrix, in which the products stand from left to right.
      lanes: how many float32 numbers a vector register of the machine holds.
      registers: how many vector registers it has.
    """

    x: int
    d: int
    y: int
    left: str
    right: str
    side_by_side: bool
    lanes: int
    registers: int

    @property
    def name(self) -> str:
        """The name in XLA's programs, which are kept on disk: it says all that the arrays of a call depend on."""
        order = "rows" if self.side_by_side else "matrices"
        return f"gathered_matmul_{order}_{self.x}_{self.d}_{self.y}_{self.left}_{self.right}"

    @functools.cached_property
    def tile(self) -> tuple[int, int]:
        """The rows and vectors of a tile with which all rows and columns take the fewest cycles. In one cycle, a core
        does two products or two loads from the L1 cache; a load from the next cache takes three."""
        row_vectors = self.y // self.width
        max_rows = min(self.x, ITEM_ROWS)

        def cost(tile: tuple[int, int]) -> tuple[int, int]:
            rows, vectors = tile
            row_tiles = -(-max_rows // rows)
            is_in_l1 = row_tiles == 1 or self.d * vectors * self.width * BYTES[self.right] <= L1_BYTES
            tiles = row_tiles * (row_vectors // vectors)
            return tiles * max(rows * vectors, rows + vectors * (1 if is_in_l1 else 6)), tiles

        tiles = [(rows, vectors) for rows in range(1, max_rows + 1) for vectors in range(1, row_vectors + 1)]
        return min((t for t in tiles if row_vectors % t[1] == 0 and (t[0] + 1) * t[1] + 1 < self.registers), key=cost)

    def streams(self, rows: int, vectors: int) -> int:
        """How many parts d is divided into, of which each has its own accumulators: memory that is not prefetched
        comes faster in several streams, and the additions of a small tile would wait for one another."""
        fitting = (n for n in (4, 2) if rows * vectors * n <= 8 and self.d % n == 0 and not self.prefetches)
        return next(fitting, 1)

    @property
    def width(self) -> int:
        """How many float32 numbers a vector holds: fewer than a register does if y is no multiple of that."""
        return next(lanes for lanes in (16, 8, 4) if lanes <= self.lanes and self.y % lanes == 0)

    @property
    def block_rows(self) -> int:
        """How many rows an item has. Only the last block of rows has a tile that is not full."""
        rows = self.tile[0]
        return -(-min(self.x, ITEM_ROWS) // rows) * rows

    @property
    def prefetches(self) -> bool:
        """Whether right matrices are prefetched: with one row of float32, a core itself looks far enough ahead."""
        return self.x * BYTES["float32"] > BYTES[self.right]

    @property
    def row_blocks(self) -> int:
        return -(-self.x // self.block_rows)

    @property
    def max_products_per_item(self) -> int:
        return max(1, ITEM_BYTES // (self.d * self.y * BYTES[self.right])) if self.row_blocks == 1 else 1

    def code(self) -> str:
        """Writes the function `run`, which does items of a job until none is left."""
        module = ir.Module()
        function = ir.Function(module, ir.FunctionType(VOID, [POINTER]), "run")
        _Writer(self, function).run()
        return str(function)  # what it calls is declared in handler.ll


@dataclasses.dataclass(frozen=True)
class _Rows:
    """Rows of a result: where the first begins, and how many numbers later the next one does."""

    first: Value
    stride: Value


class _Writer:
    def __init__(self, kernel: Kernel, function: ir.Function):
        self._kernel, self._b = kernel, ir.IRBuilder(function.append_basic_block())
        (self._job,) = function.args
        self._vector = ir.VectorType(FLOAT, kernel.width)
        kinds = ir.FunctionType(VOID, [POINTER, I32, I32, I32])
        self._prefetch = ir.Function(function.module, kinds, "llvm.prefetch.p0")

    def run(self) -> None:
        b, kernel = self._b, self._kernel
        items, at_once, products = (b.load(self._field(i), typ=I64) for i in (ITEMS, PRODUCTS_PER_ITEM, PRODUCTS))
        lists = {i: b.load(self._field(i), typ=POINTER) for i in (LEFT, LEFT_INDEX, RIGHT, RIGHT_INDEX, OUT)}
        take, work, end = (b.append_basic_block(name) for name in ("take", "work", "end"))
        b.branch(take)
        b.position_at_end(take)
        item = b.atomic_rmw("add", self._field(NEXT), I64(1), "acq_rel")
        b.cbranch(b.icmp_signed("<", item, items), work, end)
        b.position_at_end(work)
        group, row_block = b.udiv(item, I64(kernel.row_blocks)), b.urem(item, I64(kernel.row_blocks))
        first = b.mul(group, at_once)
        stop = self._min(b.add(first, at_once), products)
        self._loop(first, stop, 1, lambda i: self._row_block(lists, products, i, row_block))
        b.atomic_rmw("add", self._field(DONE), I64(1), "acq_rel")
        b.branch(take)
        b.position_at_end(end)
        b.ret_void()

    def _row_block(self, lists: dict[int, Value], products: Value, i: Value, row_block: Value) -> None:
        """Computes one block of rows of product i."""
        b, kernel = self._b, self._kernel
        next_i = self._min(b.add(i, I64(1)), b.sub(products, I64(1)))
        left_index, right_index, next_right_index = (
            b.sext(b.load(b.gep(lists[indices], [product], source_etype=I32), typ=I32), I64)
            for indices, product in ((LEFT_INDEX, i), (RIGHT_INDEX, i), (RIGHT_INDEX, next_i))
        )
        # how far apart products begin, and rows of one
        offset, stride = I64(kernel.x * kernel.y), I64(kernel.y)
        if kernel.side_by_side:
            offset, stride = I64(kernel.y), b.mul(products, I64(kernel.y))
        out = _Rows(self._at(lists[OUT], b.mul(i, offset), "float32"), stride)
        start = b.mul(row_block, I64(kernel.block_rows))
        stop = self._min(b.add(start, I64(kernel.block_rows)), I64(kernel.x))
        with b.if_else(b.icmp_signed("<", right_index, I64(0))) as (is_zero, is_product):
            with is_zero:
                self._loop(start, stop, 1, lambda row: self._write_zeros(out, row))
            with is_product:
                left = self._at(lists[LEFT], b.mul(left_index, I64(kernel.x * kernel.d)), kernel.left)
                rights = [
                    self._at(lists[RIGHT], b.mul(index, I64(kernel.d * kernel.y)), kernel.right)
                    for index in (right_index, next_right_index)
                ]
                self._product(left, rights, out, start, stop)

    def _write_zeros(self, out: _Rows, row: Value) -> None:
        for column in range(0, self._kernel.y, self._kernel.width):
            zeros = ir.Constant(self._vector, [0.0] * self._kernel.width)
            self._b.store(zeros, self._out_at(out, row, I64(column)), align=4)

    def _product(self, left: Value, rights: list[Value], out: _Rows, start: Value, stop: Value) -> None:
        """Multiplies rows `start` to `stop` by the first of the right matrices; the other one comes next."""
        b, kernel = self._b, self._kernel
        rows, vectors = kernel.tile
        rest = kernel.x % rows

        def columns(column: Value) -> None:
            def tile(rows: int, row: Value) -> None:
                left_here = self._at(left, b.mul(row, I64(kernel.d)), kernel.left)
                out_here = _Rows(self._out_at(out, row, column), out.stride)
                self._tile(left_here, rights, column, out_here, rows, vectors)

            self._loop(start, b.sub(stop, I64(rows - 1)), rows, functools.partial(tile, rows))
            if rest:
                with b.if_then(b.icmp_signed("==", stop, I64(kernel.x))):
                    tile(rest, I64(kernel.x - rest))

        self._loop(I64(0), I64(kernel.y), vectors * kernel.width, columns)

    def _tile(self, left: Value, rights: list[Value], column: Value, out: _Rows, rows: int, vectors: int) -> None:
        b, kernel = self._b, self._kernel
        streams = kernel.streams(rows, vectors)
        right = self._at(rights[0], column, kernel.right)
        before, multiply, end = b.block, b.append_basic_block("multiply"), b.append_basic_block("multiplied")
        b.branch(multiply)
        b.position_at_end(multiply)
        k = b.phi(I64)
        tile = range(rows * vectors)
        accumulators = [[b.phi(self._vector) for _ in tile] for _ in range(streams)]
        sums = []
        for stream, accumulated in enumerate(accumulators):
            here = b.add(k, I64(stream * (kernel.d // streams)))
            first = b.mul(here, I64(kernel.y))
            columns = [
                self._load(right, b.add(first, I64(v * kernel.width)), kernel.right, kernel.width)
                for v in range(vectors)
            ]
            pairs = itertools.product(self._broadcast(left, here, rows), columns)
            products = [b.fmul(number, numbers, flags=("contract",)) for number, numbers in pairs]
            # "contract" lets LLVM make one instruction of the product and the sum
            sums.append([b.fadd(*terms, flags=("contract",)) for terms in zip(products, accumulated, strict=True)])
            for phi, added in zip(accumulated, sums[-1], strict=True):
                phi.add_incoming(ir.Constant(self._vector, [0.0] * kernel.width), before)
                phi.add_incoming(added, multiply)
            if kernel.prefetches:
                self._prefetch_rights(rights, first)
        next_k = b.add(k, I64(1))
        k.add_incoming(I64(0), before)
        k.add_incoming(next_k, multiply)
        b.cbranch(b.icmp_signed("<", next_k, I64(kernel.d // streams)), multiply, end)
        b.position_at_end(end)
        for i, of_streams in zip(tile, zip(*sums, strict=True), strict=True):
            row, vector = divmod(i, vectors)
            here = self._out_at(out, I64(row), I64(vector * kernel.width))
            b.store(functools.reduce(b.fadd, of_streams), here, align=4)

    def _broadcast(self, left: Value, k: Value, rows: int) -> list[Value]:
        """Loads number k of each row, and fills a vector with it."""
        b, kernel = self._b, self._kernel
        numbers = [self._load(left, b.add(k, I64(r * kernel.d)), kernel.left, 1) for r in range(rows)]
        mask = ir.Constant(ir.VectorType(I32, kernel.width), [0] * kernel.width)
        return [b.shuffle_vector(number, ir.Constant(number.type, ir.Undefined), mask) for number in numbers]

    def _prefetch_rights(self, rights: list[Value], first: Value) -> None:
        """Prefetches what is used a while after number `first` of a right matrix: in it, or in the next one."""
        b, kernel = self._b, self._kernel
        size, distance = kernel.d * kernel.y, PREFETCH_BYTES // BYTES[kernel.right]
        index = b.add(first, I64(min(distance, size)))
        over = b.sub(index, I64(size))
        is_over = b.icmp_signed(">=", over, I64(0))
        matrix, index = b.select(is_over, rights[1], rights[0]), b.select(is_over, over, index)
        for line in range(0, kernel.y, CACHE_LINE_BYTES // BYTES[kernel.right]):
            here = self._at(matrix, b.add(index, I64(line)), kernel.right)
            b.call(self._prefetch, [here, I32(0), I32(3), I32(1)])  # to read, into the L1 cache, data

    def _load(self, array: Value, index: Value, dtype: str, count: int) -> Value:
        """Loads numbers that stand side by side, as float32."""
        b, here = self._b, self._at(array, index, dtype)
        if dtype == "float32":
            return b.load(here, typ=ir.VectorType(FLOAT, count), align=4)
        halves = b.load(here, typ=ir.VectorType(I16, count), align=2)
        wide = ir.VectorType(I32, count)
        return b.bitcast(b.shl(b.zext(halves, wide), ir.Constant(wide, [16] * count)), ir.VectorType(FLOAT, count))

    def _out_at(self, out: _Rows, row: Value, column: Value) -> Value:
        return self._at(out.first, self._b.add(self._b.mul(row, out.stride), column), "float32")

    def _at(self, array: Value, index: Value, dtype: str) -> Value:
        return self._b.gep(array, [index], source_etype=FLOAT if dtype == "float32" else I16)

    def _field(self, i: int) -> Value:
        return self._b.gep(self._job, [I64(0), I32(i)], source_etype=JOB)

    def _min(self, a: Value, c: Value) -> Value:
        return self._b.select(self._b.icmp_signed("<", a, c), a, c)

    def _loop(self, start: Value, stop: Value, step: int, body: Callable[[Value], None]) -> None:
        """Writes `for i in range(start, stop, step): body(i)`."""
        b = self._b
        before, head, inside, end = b.block, *(b.append_basic_block(name) for name in ("head", "inside", "end"))
        b.branch(head)
        b.position_at_end(head)
        i = b.phi(I64)
        b.cbranch(b.icmp_signed("<", i, stop), inside, end)
        b.position_at_end(inside)
        body(i)
        i.add_incoming(start, before)
        i.add_incoming(b.add(i, I64(step)), b.block)
        b.branch(head)
        b.position_at_end(end)
