"""The inner loops of the native product, as LLVM IR: a block of rows times columns.

Both forms compute `acc = fma(weight[i, k], x[k, column], acc)` for k = 0, 1, ... in
order (with two roundings on CPUs without it), so their results are the same bits. A
`WideBlock` has columns as lanes and multiplies them by one weight at a time; it is
bound by loading the weights one by one. A `TurnedBlock` has rows as lanes: it loads 16
weights of 16 rows, transposes them in registers, and multiplies them by one column at a
time, which is best for few columns.

Every function has the signature `_SIGNATURE`. It stores the rows from `skip` on to `y`,
`n` columns apart.
"""

import dataclasses

_SIGNATURE = (
    "(ptr %w, ptr %x, ptr %tail, ptr %y, i64 %size, i64 %main, i64 %n, "
    "i64 %columns, i64 %skip) #0"
)

# Registers of weights in a transposition, and how many there are of them.
_TURNED = 16


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

    def ir(self, fused: bool) -> str:
        """Write the function; `fused`: the CPU multiplies and adds at once."""
        return _wide(self, fused)


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

    def ir(self, fused: bool) -> str:
        """Write the function; `fused`: the CPU multiplies and adds at once."""
        return _turned(self, fused)


class _Writer:
    """Lines of a function of `rows` rows and vectors of `lanes`."""

    def __init__(self, name: str, rows: int, lanes: int, fused: bool):
        self.rows, self.lanes, self.fused = rows, lanes, fused
        self.vector = f"<{lanes} x float>"
        # Three rows are addressed from one pointer: [p], [p + 4 K], [p + 8 K].
        self.bases = range(0, rows, 3)
        self._out = [f"define internal void @{name}{_SIGNATURE} {{"]

    def label(self, name: str) -> None:
        self._out.append(f"{name}:")

    def add(self, line: str) -> None:
        self._out.append("  " + line)

    def text(self) -> str:
        return "\n".join([*self._out, "}", ""])

    def phi(self, name: str, kind: str, **by_label: str) -> None:
        pairs = ", ".join(f"[{value}, %{label}]" for label, value in by_label.items())
        self.add(f"{name} = phi {kind} {pairs}")

    def splat(self, name: str, pointer: str) -> None:
        """Load one float into all lanes."""
        vector = self.vector
        self.add(f"{name}l = load float, ptr {pointer}, align 4")
        self.add(f"{name}i = insertelement {vector} poison, float {name}l, i64 0")
        zeros = f"<{self.lanes} x i32> zeroinitializer"
        self.add(f"{name} = shufflevector {vector} {name}i, {vector} poison, {zeros}")

    def multiply_add(self, name: str, a: str, b: str, acc: str) -> None:
        vector = self.vector
        if self.fused:
            self.add(
                f"{name} = call {vector} @llvm.fma.v{self.lanes}f32("
                f"{vector} {a}, {vector} {b}, {vector} {acc})"
            )
        else:
            self.add(f"{name}p = fmul {vector} {a}, {b}")
            self.add(f"{name} = fadd {vector} {name}p, {acc}")

    def first_pointers(self, name: str) -> None:
        """Point to the first weight of every third row."""
        for b in self.bases:
            self.add(f"{name}o{b} = mul i64 %size, {b}")
            self.add(f"{name}{b} = getelementptr float, ptr %w, i64 {name}o{b}")

    def row_pointers(self, name: str, base: str) -> None:
        """Point to a weight of each row, given pointers to every third row's."""
        for r in range(self.rows):
            kind = ("i8", "float", "double")[r % 3]
            offset = "0" if r % 3 == 0 else "%size"
            pointer = f"{base}{r // 3 * 3}"
            self.add(f"{name}{r} = getelementptr {kind}, ptr {pointer}, i64 {offset}")

    def advance(self, name: str, base: str, count: int) -> None:
        for b in self.bases:
            self.add(f"{name}{b} = getelementptr float, ptr {base}{b}, i64 {count}")

    def start_prefetch(self) -> None:
        self.add(f"%next_block = mul i64 %size, {self.rows}")
        self.add("%ahead0 = getelementptr float, ptr %w, i64 %next_block")

    def prefetch(self, count: int, locality: int) -> None:
        """Fetch the next block's weights in the order in which they lie in memory.

        Args:
          count: floats of a pass of the loop.
          locality: 3 for the first cache, 2 for the second one.
        """
        for line in range(0, count * 4, 64):
            self.add(f"%fetch{line} = getelementptr i8, ptr %ahead, i64 {line}")
            self.add(
                f"call void @llvm.prefetch.p0(ptr %fetch{line}, i32 0, "
                f"i32 {locality}, i32 1)"
            )
        self.add(f"%ahead_next = getelementptr i8, ptr %ahead, i64 {count * 4}")

    def store(self, row_step: int, column_step: int) -> None:
        """Store what `%kept` holds; the steps are those of its floats."""
        self.add("br label %row")
        self.label("row")
        self.phi("%r", "i64", store="%skip", row_end="%r_next")
        self.add(f"%from_offset = mul i64 %r, {row_step}")
        self.add("%from = getelementptr float, ptr %kept, i64 %from_offset")
        self.add("%to_offset = mul i64 %r, %n")
        self.add("%to = getelementptr float, ptr %y, i64 %to_offset")
        self.add("br label %column")
        self.label("column")
        self.phi("%j", "i64", row="0", column="%j_next")
        self.add(f"%value_offset = mul i64 %j, {column_step}")
        self.add("%value_at = getelementptr float, ptr %from, i64 %value_offset")
        self.add("%value = load float, ptr %value_at")
        self.add("%result_at = getelementptr float, ptr %to, i64 %j")
        self.add("store float %value, ptr %result_at")
        self.add("%j_next = add i64 %j, 1")
        self.add("%column_more = icmp ult i64 %j_next, %columns")
        self.add("br i1 %column_more, label %column, label %row_end")
        self.label("row_end")
        self.add("%r_next = add i64 %r, 1")
        self.add(f"%row_more = icmp ult i64 %r_next, {self.rows}")
        self.add("br i1 %row_more, label %row, label %done")
        self.label("done")
        self.add("ret void")


def _wide(block: WideBlock, fused: bool) -> str:
    out = _Writer(block.name, block.rows, block.lanes, fused)
    rows, vectors, steps = block.rows, block.vectors, block.steps
    vector = out.vector
    cells = [(r, v) for r in range(rows) for v in range(vectors)]
    last = f"%u{steps - 1}s"

    def step(tag, x, x_next, weight, acc):
        """One k: `weight` and `acc` begin the names of pointers and of sums so far."""
        for v in range(vectors):
            out.add(f"%{tag}a{v} = getelementptr float, ptr {x}, i64 {v * block.lanes}")
            out.add(f"%{tag}x{v} = load {vector}, ptr %{tag}a{v}, align 4")
        out.add(f"{x_next} = getelementptr float, ptr {x}, i64 %n")
        for r in range(rows):
            out.splat(f"%{tag}w{r}", f"{weight}{r}")
            for v in range(vectors):
                out.multiply_add(
                    f"%{tag}s{r}_{v}", f"%{tag}w{r}", f"%{tag}x{v}", f"{acc}{r}_{v}"
                )

    out.label("entry")
    out.add(f"%kept = alloca [{len(cells)} x {vector}], align 64")
    out.first_pointers("%first")
    out.start_prefetch()
    out.add("%no_main = icmp eq i64 %main, 0")
    out.add("br i1 %no_main, label %middle, label %loop")

    out.label("loop")
    out.phi("%k", "i64", entry="0", loop="%k_next")
    out.phi("%at0", "ptr", entry="%x", loop=f"%at{steps}")
    out.phi("%ahead", "ptr", entry="%ahead0", loop="%ahead_next")
    for b in out.bases:
        out.phi(f"%main{b}", "ptr", entry=f"%first{b}", loop=f"%next{b}")
    for r, v in cells:
        cell = f"{r}_{v}"
        out.phi(f"%acc{cell}", vector, entry="zeroinitializer", loop=last + cell)
    out.row_pointers("%q", "%main")
    for u in range(steps):
        for r in range(rows):
            out.add(f"%u{u}q{r} = getelementptr float, ptr %q{r}, i64 {u}")
        acc = f"%u{u - 1}s" if u else "%acc"
        step(f"u{u}", f"%at{u}", f"%at{u + 1}", f"%u{u}q", acc)
    out.prefetch(rows * steps, 3)
    out.advance("%next", "%main", steps)
    out.add(f"%k_next = add i64 %k, {steps}")
    out.add("%more = icmp ult i64 %k_next, %main")
    out.add("br i1 %more, label %loop, label %middle")

    out.label("middle")
    for b in out.bases:
        out.phi(f"%mid{b}", "ptr", entry=f"%first{b}", loop=f"%next{b}")
    for r, v in cells:
        cell = f"{r}_{v}"
        out.phi(f"%half{cell}", vector, entry="zeroinitializer", loop=last + cell)
    out.add("%no_rest = icmp eq i64 %main, %size")
    out.add("br i1 %no_rest, label %store, label %rest")

    out.label("rest")
    out.phi("%rest_k", "i64", middle="%main", rest="%rest_next")
    out.phi("%rest_x", "ptr", middle="%tail", rest="%rest_xn")
    for b in out.bases:
        out.phi(f"%rest{b}", "ptr", middle=f"%mid{b}", rest=f"%rest_n{b}")
    for r, v in cells:
        cell = f"{r}_{v}"
        out.phi(f"%sum{cell}", vector, middle=f"%half{cell}", rest=f"%ts{cell}")
    out.row_pointers("%tq", "%rest")
    step("t", "%rest_x", "%rest_xn", "%tq", "%sum")
    out.advance("%rest_n", "%rest", 1)
    out.add("%rest_next = add i64 %rest_k, 1")
    out.add("%rest_more = icmp ult i64 %rest_next, %size")
    out.add("br i1 %rest_more, label %rest, label %store")

    out.label("store")
    for r, v in cells:
        cell = f"{r}_{v}"
        out.phi(f"%end{cell}", vector, middle=f"%half{cell}", rest=f"%ts{cell}")
    for i, (r, v) in enumerate(cells):
        out.add(f"%kept{i} = getelementptr {vector}, ptr %kept, i64 {i}")
        out.add(f"store {vector} %end{r}_{v}, ptr %kept{i}, align {block.lanes * 4}")
    out.store(row_step=block.width, column_step=1)
    return out.text()


def _turned(block: TurnedBlock, fused: bool) -> str:
    out = _Writer(block.name, block.rows, block.lanes, fused)
    columns, count = range(block.columns), _TURNED
    vector = out.vector

    def multiply(tag, k, x, weights, acc):
        """Add the products of step k: `weights` has a row's weight in each lane."""
        for c in columns:
            out.add(
                f"%{tag}p{c} = getelementptr float, ptr {x}, "
                f"i64 {k * block.columns + c}"
            )
            out.splat(f"%{tag}x{c}", f"%{tag}p{c}")
            out.multiply_add(f"%{tag}s{c}", weights, f"%{tag}x{c}", f"{acc}{c}")

    out.label("entry")
    out.add(f"%kept = alloca [{block.columns} x {vector}], align 64")
    out.first_pointers("%first")
    out.start_prefetch()
    out.add(f"%odd = urem i64 %size, {count}")
    out.add("%whole = sub i64 %size, %odd")
    out.add("%no_main = icmp eq i64 %whole, 0")
    out.add("br i1 %no_main, label %middle, label %loop")

    out.label("loop")
    out.phi("%k", "i64", entry="0", loop="%k_next")
    out.phi("%at", "ptr", entry="%x", loop="%at_next")
    out.phi("%ahead", "ptr", entry="%ahead0", loop="%ahead_next")
    for b in out.bases:
        out.phi(f"%main{b}", "ptr", entry=f"%first{b}", loop=f"%next{b}")
    last = f"%k{count - 1}s"
    for c in columns:
        out.phi(f"%acc{c}", vector, entry="zeroinitializer", loop=f"{last}{c}")
    out.row_pointers("%q", "%main")
    _transpose(out)
    for k in range(count):
        acc = f"%k{k - 1}s" if k else "%acc"
        multiply(f"k{k}", k, "%at", f"%turned{k}", acc)
    out.prefetch(block.rows * count, 2)
    out.advance("%next", "%main", count)
    out.add(f"%at_next = getelementptr float, ptr %at, i64 {count * block.columns}")
    out.add(f"%k_next = add i64 %k, {count}")
    out.add("%more = icmp ult i64 %k_next, %whole")
    out.add("br i1 %more, label %loop, label %middle")

    out.label("middle")
    out.phi("%mid_x", "ptr", entry="%x", loop="%at_next")
    for b in out.bases:
        out.phi(f"%mid{b}", "ptr", entry=f"%first{b}", loop=f"%next{b}")
    for c in columns:
        out.phi(f"%half{c}", vector, entry="zeroinitializer", loop=f"{last}{c}")
    out.add("%no_rest = icmp eq i64 %whole, %size")
    out.add("br i1 %no_rest, label %store, label %rest")

    out.label("rest")
    out.phi("%rest_k", "i64", middle="%whole", rest="%rest_next")
    out.phi("%rest_x", "ptr", middle="%mid_x", rest="%rest_xn")
    for b in out.bases:
        out.phi(f"%rest{b}", "ptr", middle=f"%mid{b}", rest=f"%rest_n{b}")
    for c in columns:
        out.phi(f"%sum{c}", vector, middle=f"%half{c}", rest=f"%ts{c}")
    out.row_pointers("%tq", "%rest")
    for r in range(count):
        out.add(f"%one{r} = load float, ptr %tq{r}, align 4")
        before = f"%all{r - 1}" if r else "poison"
        out.add(f"%all{r} = insertelement {vector} {before}, float %one{r}, i64 {r}")
    multiply("t", 0, "%rest_x", f"%all{count - 1}", "%sum")
    out.add(f"%rest_xn = getelementptr float, ptr %rest_x, i64 {block.columns}")
    out.advance("%rest_n", "%rest", 1)
    out.add("%rest_next = add i64 %rest_k, 1")
    out.add("%rest_more = icmp ult i64 %rest_next, %size")
    out.add("br i1 %rest_more, label %rest, label %store")

    out.label("store")
    for c in columns:
        out.phi(f"%end{c}", vector, middle=f"%half{c}", rest=f"%ts{c}")
    for c in columns:
        out.add(f"%kept{c} = getelementptr {vector}, ptr %kept, i64 {c}")
        out.add(f"store {vector} %end{c}, ptr %kept{c}, align {count * 4}")
    out.store(row_step=1, column_step=count)
    return out.text()


def _transpose(out: _Writer) -> None:
    """Load 16 weights of the rows at `%q0` to `%q15` into `%turned0` to `%turned15`.

    Halves of rows r and r + 4 are loaded into one register, which costs less than
    shuffling. Then two stages within quarters of four lanes, and one that exchanges
    quarters: all of them are single instructions of x86.
    """

    def shuffle(name, a, b, lanes, kind=out.vector):
        mask = ", ".join(f"i32 {lane}" for lane in lanes)
        mask = f"<{len(lanes)} x i32> <{mask}>"
        out.add(f"{name} = shufflevector {kind} {a}, {kind} {b}, {mask}")

    def in_quarters(pick):
        return [quarter + lane for quarter in range(0, 16, 4) for lane in pick]

    low_singles, high_singles = in_quarters((0, 16, 1, 17)), in_quarters((2, 18, 3, 19))
    low_pairs, high_pairs = in_quarters((0, 1, 16, 17)), in_quarters((2, 3, 18, 19))
    even_quarters = [half + lane for half in (0, 8, 16, 24) for lane in range(4)]
    odd_quarters = [lane + 4 for lane in even_quarters]
    for half in (0, 8):
        for r in (0, 1, 2, 3, 8, 9, 10, 11):
            for row in (r, r + 4):
                at = f"%q{row}_{half}"
                out.add(f"{at} = getelementptr float, ptr %q{row}, i64 {half}")
                out.add(f"{at}h = load <8 x float>, ptr {at}, align 4")
            both = f"%q{r}_{half}h", f"%q{r + 4}_{half}h"
            shuffle(f"%row{half}_{r}", *both, range(16), "<8 x float>")
        for r in (0, 2, 8, 10):
            both = f"%row{half}_{r}", f"%row{half}_{r + 1}"
            shuffle(f"%single{half}_{r}", *both, low_singles)
            shuffle(f"%single{half}_{r + 1}", *both, high_singles)
        for r in (0, 8):
            for i in (0, 1):
                both = f"%single{half}_{r + i}", f"%single{half}_{r + i + 2}"
                shuffle(f"%pair{half}_{r + 2 * i}", *both, low_pairs)
                shuffle(f"%pair{half}_{r + 2 * i + 1}", *both, high_pairs)
        for i in range(4):
            both = f"%pair{half}_{i}", f"%pair{half}_{i + 8}"
            shuffle(f"%turned{half + i}", *both, even_quarters)
            shuffle(f"%turned{half + i + 4}", *both, odd_quarters)
