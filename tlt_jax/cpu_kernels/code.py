"""LLVM IR written by Python: functions, loops, memory, vectors.

A kernel reads as it would in C: variables live in stack slots until `ffi.register` puts
them into registers. Instructions stay in the order in which they are written.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence

from llvmlite import ir

F32, I1, I8, I32, I64 = ir.FloatType(), *(ir.IntType(n) for n in (1, 8, 32, 64))
F64 = ir.DoubleType()
POINTER, VOID = ir.PointerType(), ir.VoidType()
NULL = ir.Constant(POINTER, None)
LANES = 16
F32V, I8V, I32V = (ir.VectorType(kind, LANES) for kind in (F32, I8, I32))

_SIZES = {F32: 4, I8: 1, I32: 4, I64: 8, POINTER: 8}

# What kernels call of the C library.
_LIBRARY = {
    "malloc": (POINTER, I64),
    "free": (VOID, POINTER),
    "sched_yield": (I32,),
}

# Without it LLVM uses half of the widest registers.
_ATTRIBUTES = (
    'attributes #0 = { nounwind "prefer-vector-width"="512" '
    '"min-legal-vector-width"="512" }'
)


# Kept, since llvmlite takes long to write a vector of constants.
@functools.cache
def integers(*values: int) -> ir.Constant:
    """Make a vector of 32-bit integers."""
    return ir.Constant(ir.VectorType(I32, len(values)), list(values))


class Module:
    """Functions that are compiled together."""

    def __init__(self, fused: bool):
        """Begin with none; `fused`: the CPU multiplies and adds in one rounding."""
        self.fused = fused
        self._module = ir.Module()
        self._functions: dict[str, ir.Function] = {}

    def text(self) -> str:
        """Write the functions, and declare what they call besides."""
        parts = [_ATTRIBUTES]
        for fn in self._functions.values():
            head, *body = str(fn).split("\n", 1)
            parts += [f"{head} #0", *body] if body[0] else [head]
        return "\n".join(parts)

    def begin(
        self, name: str, result: ir.Type, *kinds: ir.Type, exported: bool = False
    ) -> tuple["Code", Sequence[ir.Value]]:
        """Begin a function; return where its code goes, and its arguments."""
        fn = self.declare(name, result, *kinds)
        if not exported:
            fn.linkage = "internal"
        return Code(self, fn), fn.args

    def declare(self, name: str, result: ir.Type, *kinds: ir.Type) -> ir.Function:
        """Point to a function of these types, which may be written elsewhere."""
        if name not in self._functions:
            kind = ir.FunctionType(result, list(kinds))
            self._functions[name] = ir.Function(self._module, kind, name)
        return self._functions[name]

    def function(self, name: str) -> ir.Function:
        """Point to a function of this module or of the C library."""
        return self._functions.get(name) or self.declare(name, *_LIBRARY[name])


class Variable:
    """What a loop changes: read and write its `value`."""

    def __init__(self, code: "Code", slot: ir.AllocaInstr):
        """Keep it in `slot`, which nothing else writes."""
        self._code, self._slot = code, slot
        # Within a block the value is at hand.
        self._block, self._value = None, None

    @property
    def value(self) -> ir.Value:
        """What was stored last."""
        if self._block is not self._code.block:
            self._block, self._value = self._code.block, self._code.load(self._slot)
        return self._value

    @value.setter
    def value(self, value: int | ir.Value) -> None:
        """Store it."""
        self._block, self._value = self._code.block, self._code.number(value)
        self._code.store(self._value, self._slot)


class Code(ir.IRBuilder):
    """A function's instructions; numbers of Python stand for constants of 64 bits."""

    def __init__(self, module: Module, fn: ir.Function):
        """Begin the body of `fn`."""
        super().__init__(fn.append_basic_block("entry"))
        self._module, self._slots = module, ir.IRBuilder(self.block)
        begin = fn.append_basic_block("begin")
        self._slots.position_before(self.branch(begin))
        self.position_at_end(begin)

    def invoke(self, name: str, *arguments: int | ir.Value) -> ir.Value:
        """Call a function of the module or of the C library."""
        return self.call(self.address(name), [self.number(each) for each in arguments])

    def address(self, name: str) -> ir.Function:
        """Point to a function of the module or of the C library."""
        return self._module.function(name)

    def intrinsic(
        self, name: str, result: ir.Type, *arguments: ir.Value | int
    ) -> ir.Value:
        """Call one of LLVM's functions."""
        arguments = [self.number(each) for each in arguments]
        kinds = [argument.type for argument in arguments]
        return self.call(self._module.declare(name, result, *kinds), arguments)

    def number(self, value: int | ir.Value) -> ir.Value:
        """Make a constant of a Python number."""
        return ir.Constant(I64, value) if isinstance(value, int) else value

    def array(self, kind: ir.Type, count: int) -> ir.Value:
        """Point to memory of the function's own, aligned for every vector."""
        slot = self._slots.alloca(kind, count)
        slot.align, slot.type = 64, POINTER
        return slot

    def variable(self, kind: ir.Type, start: int | ir.Value) -> Variable:
        """Make a variable with a value to start with."""
        variable = Variable(self, self._slots.alloca(kind))
        variable.value = start
        return variable

    @contextlib.contextmanager
    def forever(self) -> Iterator[Callable[[ir.Value], None]]:
        """Repeat what is inside until a condition, given to what this yields, holds."""
        head, after = self.append_basic_block(), self.append_basic_block()
        self.branch(head)
        self.position_at_end(head)

        def leave_if(condition: ir.Value) -> None:
            rest = self.append_basic_block()
            self.cbranch(condition, after, rest)
            self.position_at_end(rest)

        yield leave_if
        self.branch(head)
        self.position_at_end(after)

    @contextlib.contextmanager
    def loop(
        self, stop: int | ir.Value, step: int | ir.Value = 1, start: int | ir.Value = 0
    ) -> Iterator[ir.Value]:
        """Repeat what is inside for start, start + step, ... below `stop`."""
        stop, index = self.number(stop), self.variable(I64, start)
        with self.forever() as leave_if:
            at = index.value
            leave_if(self.icmp_signed(">=", at, stop))
            yield at
            index.value = self.plus(at, step)

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

    def over(self, value: ir.Value, unit: int | ir.Value) -> ir.Value:
        """Divide a number, and round up."""
        unit = self.number(unit)
        return self.udiv(self.plus(value, unit, -1), unit)

    def least(self, left: ir.Value, right: int | ir.Value) -> ir.Value:
        """Take the smaller of two 64-bit numbers."""
        return self.smallest(left, self.number(right))

    def most(self, left: ir.Value, right: int | ir.Value) -> ir.Value:
        """Take the larger of two 64-bit numbers."""
        right = self.number(right)
        return self.select(self.icmp_signed(">", left, right), left, right)

    def fill(self, target: ir.Value, byte: int, num_bytes: ir.Value) -> None:
        """Set bytes of memory."""
        fixed = ir.Constant(I8, byte), num_bytes, ir.Constant(I1, 0)
        self.intrinsic("llvm.memset.p0.i64", VOID, target, *fixed)

    def copy(self, target: ir.Value, source: ir.Value, num_bytes: ir.Value) -> None:
        """Copy bytes of memory."""
        fixed = num_bytes, ir.Constant(I1, 0)
        self.intrinsic("llvm.memcpy.p0.p0.i64", VOID, target, source, *fixed)

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

    def get_vector(
        self, base: ir.Value, *terms: int | ir.Value, lanes: int = LANES
    ) -> ir.Value:
        """Load a vector of floats from the sum of `terms` on."""
        return self.load(self.at(base, *terms), typ=ir.VectorType(F32, lanes), align=4)

    def field(self, record: ir.Value, offset: int, kind: ir.Type = POINTER) -> ir.Value:
        """Load what lies so many bytes behind a pointer."""
        return self.load(self.at(record, offset, kind=I8), typ=kind)

    def put_field(self, value: ir.Value, record: ir.Value, offset: int) -> None:
        """Store what lies so many bytes behind a pointer."""
        self.store(value, self.at(record, offset, kind=I8))

    def put_vector(
        self, value: ir.Value, base: ir.Value, *terms: int | ir.Value
    ) -> None:
        """Store a vector of floats from the sum of `terms` on."""
        self.store(value, self.at(base, *terms), align=4)

    def flags(self, base: ir.Value, *terms: int | ir.Value) -> ir.Value:
        """Load a vector of bytes from the sum of `terms` on, as truths."""
        place = self.at(base, *terms, kind=I8)
        return self.icmp_signed(
            "!=", self.load(place, typ=I8V, align=1), ir.Constant(I8V, None)
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
            return ir.Constant(vector, [ir.Constant(kind, value)] * lanes)
        nothing = ir.Constant(vector, ir.Undefined)
        one = self.insert_element(nothing, value, ir.Constant(I32, 0))
        zeros = ir.Constant(ir.VectorType(I32, lanes), None)
        return self.shuffle_vector(one, nothing, zeros)

    def vector(self, values: Sequence[ir.Value]) -> ir.Value:
        """Make a vector of its lanes."""
        kind = ir.VectorType(values[0].type, len(values))
        vector = ir.Constant(kind, ir.Undefined)
        for lane, value in enumerate(values):
            vector = self.insert_element(vector, value, ir.Constant(I32, lane))
        return vector

    def shuffled(
        self, left: ir.Value, right: ir.Value, lanes: Sequence[int]
    ) -> ir.Value:
        """Take lanes of two vectors, counted through both."""
        return self.shuffle_vector(left, right, integers(*lanes))

    def multiply_add(self, a: ir.Value, b: ir.Value, acc: ir.Value) -> ir.Value:
        """Compute a x b + acc, of floats or vectors."""
        if not self._module.fused:
            return self.fadd(self.fmul(a, b), acc)
        lanes = "" if acc.type == F32 else f"v{acc.type.count}"
        return self.intrinsic(f"llvm.fma.{lanes}f32", acc.type, a, b, acc)

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
            lanes = integers(*(i ^ step for i in range(LANES)))
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
        bits = self.add(bits, self.splat_integer(127))
        bits = self.shl(bits, self.splat_integer(23))
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
