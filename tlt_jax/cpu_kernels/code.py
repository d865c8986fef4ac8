"""LLVM IR written by Python: functions, loops, vectors, and what the runtime offers.

Variables live in stack slots until LLVM's optimiser puts them into registers
(`ffi.register(..., optimise=True)`), so a kernel reads as it would in C.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence

from llvmlite import ir

F32, I1, I8, I32, I64 = ir.FloatType(), *(ir.IntType(n) for n in (1, 8, 32, 64))
POINTER, VOID = ir.PointerType(), ir.VoidType()
LANES = 16
F32V, I8V, I32V = (ir.VectorType(kind, LANES) for kind in (F32, I8, I32))

_SIZES = {F32: 4, I8: 1, I32: 4, I64: 8, POINTER: 8}

# What `ffi.runtime` defines or declares.
_RUNTIME = {
    "tlt_metadata": (I1, POINTER),
    "tlt_argument": (POINTER, POINTER, I64),
    "tlt_result": (POINTER, POINTER, I64),
    "tlt_data": (POINTER, POINTER),
    "tlt_count": (I64, POINTER, I64, I64),
    "tlt_threads": (I64, POINTER),
    "tlt_run": (VOID, POINTER, POINTER, POINTER, I64, I64),
    "malloc": (POINTER, I64),
    "free": (VOID, POINTER),
}

# Without it LLVM uses half of the widest registers.
_ATTRIBUTES = (
    'attributes #0 = { nounwind "prefer-vector-width"="512" '
    '"min-legal-vector-width"="512" }'
)


class Module:
    """Functions that are compiled together."""

    def __init__(self, fused: bool):
        """Begin with none; `fused`: the CPU multiplies and adds in one rounding."""
        self.fused = fused
        self._module = ir.Module()
        self._known: dict[str, ir.Function] = {}
        self._defined: list[str] = []

    def text(self) -> str:
        """Write the functions, and declare what they call besides the runtime."""
        parts = [_ATTRIBUTES]
        for name, fn in self._known.items():
            if name in self._defined:
                head, body = str(fn).split("\n", 1)
                parts.append(f"{head} #0\n{body}")
            elif name not in _RUNTIME:
                parts.append(str(fn))
        return "\n".join(parts)

    def function(
        self, name: str, result: ir.Type, *kinds: ir.Type, exported: bool = False
    ) -> tuple["Code", Sequence[ir.Value]]:
        """Begin a function; return where its code goes, and its arguments."""
        fn = self.declare(name, result, *kinds)
        if not exported:
            fn.linkage = "internal"
        self._defined.append(name)
        return Code(self, fn), fn.args

    def declare(self, name: str, result: ir.Type, *kinds: ir.Type) -> ir.Function:
        """Find a function, or say what it takes and returns."""
        if name not in self._known:
            kind = ir.FunctionType(result, list(kinds))
            self._known[name] = ir.Function(self._module, kind, name)
        return self._known[name]

    def runtime(self, name: str) -> ir.Function:
        """Find a function of this module or of the runtime."""
        return self._known.get(name) or self.declare(name, *_RUNTIME[name])


class Code(ir.IRBuilder):
    """A function's instructions; numbers of Python stand for constants of 64 bits."""

    def __init__(self, module: Module, fn: ir.Function):
        """Begin the body of `fn`."""
        super().__init__(fn.append_basic_block("entry"))
        self._own, self._slots = module, self.block
        self._first = ir.IRBuilder(fn.append_basic_block("begin"))
        self.branch(self._first.block)
        self._end_of_slots = self.block.instructions[-1]
        self.position_at_end(self._first.block)

    def module_function(
        self, name: str, result: ir.Type, *kinds: ir.Type
    ) -> ir.Function:
        """Find a function of the module or of LLVM, see `Module.declare`."""
        return self._own.declare(name, result, *kinds)

    def number(self, value: int | ir.Value) -> ir.Value:
        """Make a constant of a Python number."""
        return ir.Constant(I64, value) if isinstance(value, int) else value

    def variable(self, kind: ir.Type, start: ir.Value) -> ir.Value:
        """Make a variable; `load(it, typ=kind)` and `store(value, it)` use it."""
        slots = ir.IRBuilder(self._slots)
        slots.position_before(self._end_of_slots)
        slot = slots.alloca(kind)
        self.store(start, slot)
        return slot

    @contextlib.contextmanager
    def loop(self, stop: int | ir.Value, step: int = 1) -> Iterator[ir.Value]:
        """Repeat what is inside for 0, step, ... below `stop`."""
        stop = self.number(stop)
        slot = self.variable(I64, self.number(0))
        head, body, after = (self.append_basic_block() for _ in range(3))
        self.branch(head)
        self.position_at_end(head)
        index = self.load(slot, typ=I64)
        self.cbranch(self.icmp_signed("<", index, stop), body, after)
        self.position_at_end(body)
        yield index
        self.store(self.add(index, self.number(step)), slot)
        self.branch(head)
        self.position_at_end(after)

    def plus(self, *terms: int | ir.Value) -> ir.Value:
        """Add 64-bit numbers."""
        first, *others = map(self.number, terms)
        for other in others:
            first = self.add(first, other)
        return first

    def times(self, *factors: int | ir.Value) -> ir.Value:
        """Multiply 64-bit numbers."""
        first, *others = map(self.number, factors)
        for other in others:
            first = self.mul(first, other)
        return first

    def up(self, value: ir.Value, unit: int) -> ir.Value:
        """Round a number up to a multiple of `unit`, a power of two."""
        return self.and_(self.plus(value, unit - 1), self.number(-unit))

    def least(self, left: ir.Value, right: int | ir.Value) -> ir.Value:
        """Take the smaller of two 64-bit numbers."""
        right = self.number(right)
        return self.select(self.icmp_signed("<", left, right), left, right)

    def at(
        self, base: ir.Value, *terms: int | ir.Value, kind: ir.Type = F32
    ) -> ir.Value:
        """Point to the element of `base` at the sum of `terms`."""
        return self.gep(base, [self.plus(*terms)], source_etype=kind)

    def get(
        self, base: ir.Value, *terms: int | ir.Value, kind: ir.Type = F32
    ) -> ir.Value:
        """Load the element at the sum of `terms`; 32-bit integers become 64-bit."""
        place = self.at(base, *terms, kind=kind)
        value = self.load(place, typ=kind, align=_SIZES[kind])
        return self.sext(value, I64) if kind == I32 else value

    def put(self, value: ir.Value, base: ir.Value, *terms: int | ir.Value) -> None:
        """Store an element, of the value's own kind."""
        place = self.at(base, *terms, kind=value.type)
        self.store(value, place, align=_SIZES[value.type])

    def get_vector(self, base: ir.Value, *terms: int | ir.Value) -> ir.Value:
        """Load a vector of floats from the sum of `terms` on."""
        return self.load(self.at(base, *terms), typ=F32V, align=4)

    def put_vector(
        self, value: ir.Value, base: ir.Value, *terms: int | ir.Value
    ) -> None:
        """Store a vector of floats from the sum of `terms` on."""
        self.store(value, self.at(base, *terms), align=4)

    def flags(self, base: ir.Value, *terms: int | ir.Value) -> ir.Value:
        """Load a vector of bytes from the sum of `terms` on, as truths."""
        place = self.at(base, *terms, kind=I8)
        return self.icmp_signed(
            "!=", self.load(place, typ=I8V, align=1), ir.Constant(I8V, [0] * LANES)
        )

    def splat(self, value: ir.Value | float, lanes: int = LANES) -> ir.Value:
        """Put a float into all lanes."""
        return self._spread(F32, value, lanes)

    def splat_integer(self, value: ir.Value | int, lanes: int = LANES) -> ir.Value:
        """Put a 32-bit integer into all lanes."""
        return self._spread(I32, value, lanes)

    def _spread(self, kind, value, lanes) -> ir.Value:
        vector = ir.VectorType(kind, lanes)
        if not isinstance(value, ir.Value):
            return ir.Constant(vector, [value] * lanes)
        nothing = ir.Constant(vector, ir.Undefined)
        one = self.insert_element(nothing, value, ir.Constant(I32, 0))
        zeros = ir.Constant(ir.VectorType(I32, lanes), [0] * lanes)
        return self.shuffle_vector(one, nothing, zeros)

    def shuffled(
        self, left: ir.Value, right: ir.Value, lanes: Sequence[int]
    ) -> ir.Value:
        """Take lanes of two vectors, those of the second from `LANES` on."""
        return self.shuffle_vector(left, right, ir.Constant(I32V, list(lanes)))

    def multiply_add(self, a: ir.Value, b: ir.Value, acc: ir.Value) -> ir.Value:
        """Compute a x b + acc, of floats or vectors."""
        if not self._own.fused:
            return self.fadd(self.fmul(a, b), acc)
        kind = acc.type
        name = "llvm.fma.f32" if kind == F32 else f"llvm.fma.v{kind.count}f32"
        return self.call(self._own.declare(name, kind, kind, kind, kind), [a, b, acc])

    def largest(self, left: ir.Value, right: ir.Value) -> ir.Value:
        """Take the larger of each lane; neither is NaN."""
        return self.select(self.fcmp_ordered(">", left, right), left, right)

    def smallest(self, left: ir.Value, right: ir.Value) -> ir.Value:
        """Take the smaller integer of each lane."""
        return self.select(self.icmp_signed("<", left, right), left, right)

    def reduced(
        self, vector: ir.Value, join: Callable[[ir.Value, ir.Value], ir.Value]
    ) -> ir.Value:
        """Join all lanes in a tree; every lane of the result holds it."""
        step = LANES // 2
        while step:
            lanes = ir.Constant(I32V, [i ^ step for i in range(LANES)])
            vector = join(vector, self.shuffle_vector(vector, vector, lanes))
            step //= 2
        return vector

    def sums(self, vectors: Sequence[ir.Value]) -> ir.Value:
        """Sum the lanes of each of 16 vectors; lane i holds the sum of vector i."""
        vectors, step = list(vectors), LANES // 2
        # Each pass halves the vectors and joins them two by two.
        while step:
            keep = [i if not i & step else LANES + (i ^ step) for i in range(LANES)]
            swap = [i ^ step if not i & step else LANES + i for i in range(LANES)]
            half = len(vectors) // 2
            vectors = [
                self.fadd(
                    self.shuffled(low, high, keep), self.shuffled(low, high, swap)
                )
                for low, high in zip(vectors[:half], vectors[half:], strict=True)
            ]
            step //= 2
        return vectors[0]

    def exponential(self, x: ir.Value) -> ir.Value:
        """Compute exp of a vector of numbers of at most 0, within 2 units of 2^-24.

        Reference: the ranges and coefficients are those of the Cephes library's expf.
        """
        x = self.largest(x, self.splat(-87.0))
        magic = self.splat(12582912.0)  # 1.5 x 2^23: adding it rounds to an integer.
        turns = self.multiply_add(x, self.splat(1.44269504088896341), magic)
        whole = self.fsub(turns, magic)
        rest = self.multiply_add(whole, self.splat(-0.693359375), x)
        rest = self.multiply_add(whole, self.splat(2.12194440e-4), rest)
        value = self.splat(1.9875691500e-4)
        for coefficient in (
            *(1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2),
            *(1.6666665459e-1, 5.0000001201e-1),
        ):
            value = self.multiply_add(value, rest, self.splat(coefficient))
        value = self.multiply_add(self.fmul(value, rest), rest, rest)
        value = self.fadd(value, self.splat(1.0))
        bits = self.fptosi(whole, I32V)
        bits = self.add(bits, ir.Constant(I32V, [127] * LANES))
        bits = self.shl(bits, ir.Constant(I32V, [23] * LANES))
        return self.fmul(value, self.bitcast(bits, F32V))

    def logarithm(self, x: ir.Value, less: ir.Value | None = None) -> ir.Value:
        """Compute log of a vector of normal positive numbers, within 2 units.

        Args:
          x: the numbers; each is 1 - `less` to rounding, if that is given.
          less: 1 - x, exact where x is near 1.

        Reference: range and coefficients are those of the Cephes library's logf.
        """
        lanes = x.type.count
        integers = ir.VectorType(I32, lanes)

        def number(value):
            return self.splat(value, lanes)

        def integer(value):
            return self.splat_integer(value, lanes)

        bits = self.bitcast(x, integers)
        from_root = self.sub(bits, integer(0x3F3504F3))  # of the root of 1/2
        exponent = self.ashr(from_root, integer(23))
        bits = self.sub(bits, self.shl(exponent, integer(23)))
        rest = self.fsub(self.bitcast(bits, x.type), number(1.0))
        if less is not None:
            is_near = self.icmp_signed("==", exponent, integer(0))
            rest = self.select(is_near, self.fsub(number(-0.0), less), rest)
        square = self.fmul(rest, rest)
        value = number(7.0376836292e-2)
        for coefficient in (
            *(-1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1),
            *(-1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1),
        ):
            value = self.multiply_add(value, rest, number(coefficient))
        value = self.fmul(self.fmul(value, rest), square)
        exponent = self.sitofp(exponent, x.type)
        value = self.multiply_add(exponent, number(-2.12194440e-4), value)
        value = self.multiply_add(square, number(-0.5), value)
        value = self.fadd(rest, value)
        return self.multiply_add(exponent, number(0.693359375), value)
