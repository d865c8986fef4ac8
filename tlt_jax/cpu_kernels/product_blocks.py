"""The inner loops of the native product: a block of rows times columns.

Both forms compute `acc = fma(weight[i, k], x[k, column], acc)` for k = 0, 1, ... in
order (with two roundings on CPUs without it), so their results are the same bits. A
`WideBlock` has columns as lanes and multiplies them by one weight at a time; it is
bound by loading the weights one by one. A `TurnedBlock` has rows as lanes: it loads 16
weights of 16 rows, transposes them in registers, and multiplies them by one column at a
time, which is best for few columns.
"""

import dataclasses
from collections.abc import Sequence

from llvmlite import ir

from tlt_jax.cpu_kernels import code as code_lib

F32, F64, I8, I32 = code_lib.F32, code_lib.F64, code_lib.I8, code_lib.I32
I64, POINTER, VOID = code_lib.I64, code_lib.POINTER, code_lib.VOID
# What a block's function takes: w, x, tail, y, size, main, n, columns, skip. It stores
# the rows from `skip` on to `y`, `n` columns apart.
SIGNATURE = (VOID, *[POINTER] * 4, *[I64] * 5)

# Registers of weights in a transposition, and how many there are of them.
_TURNED = code_lib.LANES


@dataclasses.dataclass(frozen=True)
class WideBlock:
    """Rows, and vectors of columns, that one pass over k keeps in registers.

    Vectors are read from `x` as it is: lanes beyond the last column hold what follows
    in memory and are dropped. The steps of k from `main` on, whose vectors would end
    behind `x`, are read from the padded copy `tail`.
    """

    lanes: int
    vectors: int
    rows: int
    is_packed = False

    @property
    def name(self) -> str:
        """Of the function."""
        return f"wide_{self.lanes}_{self.vectors}_{self.rows}"

    @property
    def width(self) -> int:
        """Columns of a panel."""
        return self.lanes * self.vectors

    @property
    def steps(self) -> int:
        """Steps of k in one pass of the loop.

        With more of them, or larger blocks, LLVM loads so many weights ahead that
        registers run out.
        """
        return 4 if self.vectors == 1 else 2

    def write(self, module: code_lib.Module) -> None:
        """Write the function."""
        code, arguments = module.begin(self.name, *SIGNATURE)
        w, x, tail, y, size, main, n, columns, skip = arguments
        lanes = self.lanes
        zero, kind = code.splat(0.0, lanes), ir.VectorType(F32, lanes)
        sums = [
            [code.variable(kind, zero) for _ in range(self.vectors)]
            for _ in range(self.rows)
        ]
        rows = _Rows(code, w, size, self.rows)
        place = code.variable(POINTER, x)

        def step(weights, k):
            vectors = [
                code.get_vector(place.value, v * lanes, lanes=lanes)
                for v in range(self.vectors)
            ]
            place.value = code.at(place.value, n)
            for pointer, totals in zip(weights, sums, strict=True):
                weight = code.splat(code.get(pointer, k), lanes)
                for total, vector in zip(totals, vectors, strict=True):
                    total.value = code.multiply_add(weight, vector, total.value)

        with code.loop(main, self.steps):
            weights = rows.pointers()
            for k in range(self.steps):
                step(weights, k)
            rows.prefetch(self.steps)
            rows.advance(self.steps)
        place.value = tail
        with code.loop(code.sub(size, main)):
            step(rows.pointers(), 0)
            rows.advance(1)
        sums = [total for totals in sums for total in totals]
        _store(code, sums, (self.width, 1), y, (skip, self.rows), columns, n)


@dataclasses.dataclass(frozen=True)
class TurnedBlock:
    """Sixteen rows times few columns; `x` must have exactly so many."""

    columns: int
    rows = _TURNED
    lanes = _TURNED
    is_packed = True

    @property
    def name(self) -> str:
        """Of the function."""
        return f"turned_{self.columns}"

    @property
    def width(self) -> int:
        """Columns of a panel."""
        return self.columns

    def write(self, module: code_lib.Module) -> None:
        """Write the function."""
        code, arguments = module.begin(self.name, *SIGNATURE)
        w, x, _, y, size, _, n, columns, skip = arguments
        zero = code.splat(0.0)
        sums = [code.variable(zero.type, zero) for _ in range(self.columns)]
        rows = _Rows(code, w, size, self.rows)
        place = code.variable(POINTER, x)

        def multiply(k, weights):
            """Add the products of step k: `weights` has a row's weight in each lane."""
            for c, total in enumerate(sums):
                factor = code.splat(code.get(place.value, k * self.columns + c))
                total.value = code.multiply_add(weights, factor, total.value)

        odd = code.urem(size, code.number(_TURNED))
        with code.loop(code.sub(size, odd), _TURNED):
            for k, weights in enumerate(_transposed(code, rows.pointers())):
                multiply(k, weights)
            rows.prefetch(_TURNED)
            rows.advance(_TURNED)
            place.value = code.at(place.value, _TURNED * self.columns)
        with code.loop(odd):
            weights = code.vector([code.get(row, 0) for row in rows.pointers()])
            multiply(0, weights)
            rows.advance(1)
            place.value = code.at(place.value, self.columns)
        _store(code, sums, (1, _TURNED), y, (skip, self.rows), columns, n)


class _Rows:
    """Where the next weights of a block's rows lie, and those of the next block."""

    def __init__(self, code: code_lib.Code, w: ir.Value, size: ir.Value, count: int):
        self._code, self._size, self._count = code, size, count
        # Three rows are addressed from one pointer: [p], [p + 4 K], [p + 8 K].
        self._thirds = [
            code.variable(POINTER, code.at(w, code.times(size, row)))
            for row in range(0, count, 3)
        ]
        self._ahead = code.variable(POINTER, code.at(w, code.times(size, count)))

    def pointers(self) -> list[ir.Value]:
        """Point to a weight of each row."""
        code, pointers = self._code, []
        for third in self._thirds:
            base, size = third.value, self._size
            pointers += [base, code.at(base, size), code.at(base, size, kind=F64)]
        return pointers[: self._count]

    def advance(self, count: int) -> None:
        """Go on by `count` weights of each row."""
        for third in self._thirds:
            third.value = self._code.at(third.value, count)

    def prefetch(self, count: int) -> None:
        """Fetch the next block's weights in the order in which they lie in memory.

        Into the second cache: the first one is too small for them beside the columns,
        which every block reads. A pass of the loop takes `count` weights of each row.
        """
        code, num_bytes = self._code, count * self._count * 4
        flags = [ir.Constant(I32, flag) for flag in (0, 2, 1)]
        ahead = self._ahead.value
        for line in range(0, num_bytes, 64):
            place = code.at(ahead, line, kind=I8)
            code.intrinsic("llvm.prefetch.p0", VOID, place, *flags)
        self._ahead.value = code.at(ahead, num_bytes, kind=I8)


def _store(code, sums, steps, y, rows, columns, n) -> None:
    """Store sums to `y`; `steps` are those of a row and of a column in their floats."""
    kind = sums[0].value.type
    kept = code.array(kind, len(sums))
    for i, total in enumerate(sums):
        code.store(total.value, code.at(kept, i, kind=kind), align=kind.count * 4)
    row_step, column_step = steps
    skip, num_rows = rows
    with code.loop(num_rows, start=skip) as row:
        source = code.at(kept, code.times(row, row_step))
        target = code.at(y, code.times(row, n))
        with code.loop(columns) as column:
            value = code.get(source, code.times(column, column_step))
            code.put(value, target, column)
    code.ret_void()


def _transposed(code: code_lib.Code, rows: Sequence[ir.Value]) -> list[ir.Value]:
    """Load 16 weights of each of 16 rows; vector k holds weight k of every row.

    Halves of rows r and r + 4 are loaded into one register, which costs less than
    shuffling. Then two stages within quarters of four lanes, and one that exchanges
    quarters: all of them are single instructions of x86.
    """

    def in_quarters(*pick):
        return [quarter + lane for quarter in range(0, 16, 4) for lane in pick]

    low_singles, high_singles = in_quarters(0, 16, 1, 17), in_quarters(2, 18, 3, 19)
    low_pairs, high_pairs = in_quarters(0, 1, 16, 17), in_quarters(2, 3, 18, 19)
    even_quarters = [half + lane for half in (0, 8, 16, 24) for lane in range(4)]
    odd_quarters = [lane + 4 for lane in even_quarters]

    def joined(vectors, apart, *masks):
        """Shuffle vectors i and i + apart, once by each mask."""
        return [
            code.shuffled(vectors[i], vectors[i + apart], mask)
            for i in range(len(vectors))
            if not i & apart
            for mask in masks
        ]

    turned = []
    for half in (0, 8):
        whole = [
            code.shuffled(
                code.get_vector(rows[r], half, lanes=8),
                code.get_vector(rows[r + 4], half, lanes=8),
                range(16),
            )
            for r in (0, 1, 2, 3, 8, 9, 10, 11)
        ]
        singles = joined(whole, 1, low_singles, high_singles)
        pairs = joined(singles, 2, low_pairs, high_pairs)
        quarters = joined(pairs, 4, even_quarters, odd_quarters)
        turned += quarters[::2] + quarters[1::2]
    return turned
