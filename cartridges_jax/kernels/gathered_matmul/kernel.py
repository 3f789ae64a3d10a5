"""The kernel's code, in LLVM's language: what one thread does of a `gathered_matmul`.

A tile of a result stays in registers while its rows meet its columns, d times. What is streamed from memory is asked
for well before its turn: a core that multiplies does not look far enough ahead by itself, and then the times of memory
and of arithmetic add up.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

from llvmlite import ir

ITEM_BYTES = 1 << 18  # of right matrices, at most, that are done together
ITEM_ROWS = 128  # about as many; more are divided
LINE_BYTES = 64
NEAR_BYTES = 1 << 14  # of right columns, to be read again: half of the smallest nearest cache
AHEAD_BYTES = 1 << 13  # what a core reads in half a microsecond
BYTES = {"float32": 4, "bfloat16": 2}

Value = Any  # of LLVM's
SHORT, INT, LONG = (ir.IntType(bits) for bits in (16, 32, 64))
FLOAT, POINTER, VOID = ir.FloatType(), ir.PointerType(), ir.VoidType()
JOB = ir.LiteralStructType([LONG] * 6 + [POINTER] * 5)  # as in handler.ll
NEXT, DONE, ITEMS, AT_ONCE, PRODUCTS, LEFT, LEFT_OF, RIGHT, RIGHT_OF, OUT = range(1, 11)  # its fields


@dataclasses.dataclass(frozen=True)
class Kernel:
    """For products of one shape, on one machine.

    Args:
      left, right: dtypes.
      side_by_side: the products' rows stand behind one another.
      lanes: floats of a vector of the machine's.
      registers: vectors that it holds.
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
        """In XLA's programs, which are kept on disk: calls of one name take and give arrays of one kind."""
        order = "rows" if self.side_by_side else "matrices"
        return f"gathered_matmul_{order}_{self.x}_{self.d}_{self.y}_{self.left}_{self.right}"

    @functools.cached_property
    def tile(self) -> tuple[int, int]:
        """Rows and vectors that together take the fewest cycles. In one, a core does two products or two loads from
        its nearest cache; a load from the next takes three."""
        across = self.y // self.width
        most = min(self.x, ITEM_ROWS)

        def cost(tile: tuple[int, int]) -> tuple[int, int]:
            rows, vectors = tile
            down = -(-most // rows)
            is_near = down == 1 or self.d * vectors * self.width * BYTES[self.right] <= NEAR_BYTES
            turns = down * (across // vectors)
            return turns * max(rows * vectors, rows + vectors * (1 if is_near else 6)), turns

        tiles = [(rows, vectors) for rows in range(1, most + 1) for vectors in range(1, across + 1)]
        return min((t for t in tiles if across % t[1] == 0 and (t[0] + 1) * t[1] + 1 < self.registers), key=cost)

    def streams(self, rows: int, vectors: int) -> int:
        """Into how many parts d is divided, each with sums of its own: what is not asked for ahead comes faster in
        several streams, and sums of a small tile would wait for one another."""
        fitting = (n for n in (4, 2) if rows * vectors * n <= 8 and self.d % n == 0 and not self.asks_ahead)
        return next(fitting, 1)

    @property
    def width(self) -> int:
        """Floats of a vector: fewer than the machine's where y asks for it."""
        return next(lanes for lanes in (16, 8, 4) if lanes <= self.lanes and self.y % lanes == 0)

    @property
    def part_rows(self) -> int:
        """Rows of one item; only the last part has a tile that is not full."""
        rows = self.tile[0]
        return -(-min(self.x, ITEM_ROWS) // rows) * rows

    @property
    def asks_ahead(self) -> bool:
        """One row of float32 takes so little that a core looks ahead far enough."""
        return self.x * BYTES["float32"] > BYTES[self.right]

    @property
    def row_parts(self) -> int:
        return -(-self.x // self.part_rows)

    @property
    def most_at_once(self) -> int:
        """Products of one item, at most."""
        return max(1, ITEM_BYTES // (self.d * self.y * BYTES[self.right])) if self.row_parts == 1 else 1

    def code(self) -> str:
        """The function `run`, which does items of a job until none is left."""
        module = ir.Module()
        function = ir.Function(module, ir.FunctionType(VOID, [POINTER]), "run")
        _Writer(self, function).run()
        return str(function)  # what it calls is declared in handler.ll


@dataclasses.dataclass(frozen=True)
class _Rows:
    """Of a result: where the first begins, and how many numbers later the next does."""

    first: Value
    apart: Value


class _Writer:
    def __init__(self, kernel: Kernel, function: ir.Function):
        self._kernel, self._b = kernel, ir.IRBuilder(function.append_basic_block())
        (self._job,) = function.args
        self._vector = ir.VectorType(FLOAT, kernel.width)
        kinds = ir.FunctionType(VOID, [POINTER, INT, INT, INT])
        self._prefetch = ir.Function(function.module, kinds, "llvm.prefetch.p0")

    def run(self) -> None:
        b, kernel = self._b, self._kernel
        items, at_once, products = (b.load(self._field(i), typ=LONG) for i in (ITEMS, AT_ONCE, PRODUCTS))
        lists = {i: b.load(self._field(i), typ=POINTER) for i in (LEFT, LEFT_OF, RIGHT, RIGHT_OF, OUT)}
        take, work, end = (b.append_basic_block(name) for name in ("take", "work", "end"))
        b.branch(take)
        b.position_at_end(take)
        item = b.atomic_rmw("add", self._field(NEXT), LONG(1), "acq_rel")
        b.cbranch(b.icmp_signed("<", item, items), work, end)
        b.position_at_end(work)
        group, part = b.udiv(item, LONG(kernel.row_parts)), b.urem(item, LONG(kernel.row_parts))
        first = b.mul(group, at_once)
        stop = self._least(b.add(first, at_once), products)
        self._loop(first, stop, 1, lambda i: self._entry(lists, products, i, part))
        b.atomic_rmw("add", self._field(DONE), LONG(1), "acq_rel")
        b.branch(take)
        b.position_at_end(end)
        b.ret_void()

    def _entry(self, lists: dict[int, Value], products: Value, i: Value, part: Value) -> None:
        """Of product i, the rows of one part."""
        b, kernel = self._b, self._kernel
        following = self._least(b.add(i, LONG(1)), b.sub(products, LONG(1)))
        left_place, right_place, next_place = (
            b.sext(b.load(b.gep(lists[of], [entry], source_etype=INT), typ=INT), LONG)
            for of, entry in ((LEFT_OF, i), (RIGHT_OF, i), (RIGHT_OF, following))
        )
        # where the product begins, and how far apart its rows are
        first, apart = LONG(kernel.x * kernel.y), LONG(kernel.y)
        if kernel.side_by_side:
            first, apart = LONG(kernel.y), b.mul(products, LONG(kernel.y))
        out = _Rows(self._at(lists[OUT], b.mul(i, first), "float32"), apart)
        start = b.mul(part, LONG(kernel.part_rows))
        stop = self._least(b.add(start, LONG(kernel.part_rows)), LONG(kernel.x))
        with b.if_else(b.icmp_signed("<", right_place, LONG(0))) as (without, product):
            with without:
                self._loop(start, stop, 1, lambda row: self._clear(out, row))
            with product:
                left = self._at(lists[LEFT], b.mul(left_place, LONG(kernel.x * kernel.d)), kernel.left)
                rights = [
                    self._at(lists[RIGHT], b.mul(place, LONG(kernel.d * kernel.y)), kernel.right)
                    for place in (right_place, next_place)
                ]
                self._product(left, rights, out, start, stop)

    def _clear(self, out: _Rows, row: Value) -> None:
        for column in range(0, self._kernel.y, self._kernel.width):
            zeros = ir.Constant(self._vector, [0.0] * self._kernel.width)
            self._b.store(zeros, self._place(out, row, LONG(column)), align=4)

    def _product(self, left: Value, rights: list[Value], out: _Rows, start: Value, stop: Value) -> None:
        """Of these rows, with the first of the right matrices; the other is next."""
        b, kernel = self._b, self._kernel
        rows, vectors = kernel.tile
        rest = kernel.x % rows

        def columns(column: Value) -> None:
            def tile(rows: int, row: Value) -> None:
                left_here = self._at(left, b.mul(row, LONG(kernel.d)), kernel.left)
                out_here = _Rows(self._place(out, row, column), out.apart)
                self._tile(left_here, rights, column, out_here, rows, vectors)

            self._loop(start, b.sub(stop, LONG(rows - 1)), rows, functools.partial(tile, rows))
            if rest:
                with b.if_then(b.icmp_signed("==", stop, LONG(kernel.x))):
                    tile(rest, LONG(kernel.x - rest))

        self._loop(LONG(0), LONG(kernel.y), vectors * kernel.width, columns)

    def _tile(self, left: Value, rights: list[Value], column: Value, out: _Rows, rows: int, vectors: int) -> None:
        b, kernel = self._b, self._kernel
        streams = kernel.streams(rows, vectors)
        right = self._at(rights[0], column, kernel.right)
        before, multiply, end = b.block, b.append_basic_block("multiply"), b.append_basic_block("multiplied")
        b.branch(multiply)
        b.position_at_end(multiply)
        k = b.phi(LONG)
        tile = range(rows * vectors)
        sums = [[b.phi(self._vector) for _ in tile] for _ in range(streams)]
        totals = []
        for part, of_part in enumerate(sums):
            here = b.add(k, LONG(part * (kernel.d // streams)))
            first = b.mul(here, LONG(kernel.y))
            across = [
                self._loaded(right, b.add(first, LONG(v * kernel.width)), kernel.right, kernel.width)
                for v in range(vectors)
            ]
            pairs = itertools.product(self._down(left, here, rows), across)
            products = [b.fmul(number, numbers, flags=("contract",)) for number, numbers in pairs]
            # in one instruction with the product
            totals.append([b.fadd(*terms, flags=("contract",)) for terms in zip(products, of_part, strict=True)])
            for phi, total in zip(of_part, totals[-1], strict=True):
                phi.add_incoming(ir.Constant(self._vector, [0.0] * kernel.width), before)
                phi.add_incoming(total, multiply)
            if kernel.asks_ahead:
                self._ask_ahead(rights, first)
        following = b.add(k, LONG(1))
        k.add_incoming(LONG(0), before)
        k.add_incoming(following, multiply)
        b.cbranch(b.icmp_signed("<", following, LONG(kernel.d // streams)), multiply, end)
        b.position_at_end(end)
        for i, parts in zip(tile, zip(*totals, strict=True), strict=True):
            row, vector = divmod(i, vectors)
            here = self._place(out, LONG(row), LONG(vector * kernel.width))
            b.store(functools.reduce(b.fadd, parts), here, align=4)

    def _down(self, left: Value, k: Value, rows: int) -> list[Value]:
        """Number k of each row, each throughout a vector."""
        b, kernel = self._b, self._kernel
        numbers = [self._loaded(left, b.add(k, LONG(r * kernel.d)), kernel.left, 1) for r in range(rows)]
        mask = ir.Constant(ir.VectorType(INT, kernel.width), [0] * kernel.width)
        return [b.shuffle_vector(number, ir.Constant(number.type, ir.Undefined), mask) for number in numbers]

    def _ask_ahead(self, rights: list[Value], first: Value) -> None:
        """For what is used a while after number `first` of a right matrix: in it or in the next."""
        b, kernel = self._b, self._kernel
        size, ahead = kernel.d * kernel.y, AHEAD_BYTES // BYTES[kernel.right]
        place = b.add(first, LONG(min(ahead, size)))
        over = b.sub(place, LONG(size))
        is_over = b.icmp_signed(">=", over, LONG(0))
        matrix, place = b.select(is_over, rights[1], rights[0]), b.select(is_over, over, place)
        for line in range(0, kernel.y, LINE_BYTES // BYTES[kernel.right]):
            here = self._at(matrix, b.add(place, LONG(line)), kernel.right)
            b.call(self._prefetch, [here, INT(0), INT(3), INT(1)])  # to read, into the nearest cache, data

    def _loaded(self, array: Value, place: Value, dtype: str, count: int) -> Value:
        """Numbers that stand side by side, in float32."""
        b, here = self._b, self._at(array, place, dtype)
        if dtype == "float32":
            return b.load(here, typ=ir.VectorType(FLOAT, count), align=4)
        halves = b.load(here, typ=ir.VectorType(SHORT, count), align=2)
        wide = ir.VectorType(INT, count)
        return b.bitcast(b.shl(b.zext(halves, wide), ir.Constant(wide, [16] * count)), ir.VectorType(FLOAT, count))

    def _place(self, out: _Rows, row: Value, column: Value) -> Value:
        return self._at(out.first, self._b.add(self._b.mul(row, out.apart), column), "float32")

    def _at(self, array: Value, place: Value, dtype: str) -> Value:
        return self._b.gep(array, [place], source_etype=FLOAT if dtype == "float32" else SHORT)

    def _field(self, i: int) -> Value:
        return self._b.gep(self._job, [LONG(0), INT(i)], source_etype=JOB)

    def _least(self, a: Value, c: Value) -> Value:
        return self._b.select(self._b.icmp_signed("<", a, c), a, c)

    def _loop(self, start: Value, stop: Value, step: int, body: Callable[[Value], None]) -> None:
        """`for i in range(start, stop, step): body(i)`"""
        b = self._b
        before, head, inside, end = b.block, *(b.append_basic_block(name) for name in ("head", "inside", "end"))
        b.branch(head)
        b.position_at_end(head)
        i = b.phi(LONG)
        b.cbranch(b.icmp_signed("<", i, stop), inside, end)
        b.position_at_end(inside)
        body(i)
        i.add_incoming(start, before)
        i.add_incoming(b.add(i, LONG(step)), b.block)
        b.branch(head)
        b.position_at_end(end)
