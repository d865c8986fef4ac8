"""Native kernels as jobs: what a call hands to its units of work, and who runs these.

A kernel names the pointers and numbers that its units read. Its handler fills them in
from the buffers of a call, and runs the units on the program's own threads; a unit
reads them back by name. Units are taken one by one from a counter, by the calling
thread as well, so that a job ends whether or not any other thread is free; a thread
that starts too late finds no unit left.

All CPU devices of a process have one pool of threads. A program of one device takes its
device's share of them and no more, so that devices do not slow one another down.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator

from llvmlite import ir

from tlt_jax.cpu_kernels import code as code_lib

I8, I32, I64 = code_lib.I8, code_lib.I32, code_lib.I64
POINTER, VOID, NULL = code_lib.POINTER, code_lib.VOID, code_lib.NULL
# What runs a unit, given the job and the unit's number.
UNIT = (VOID, POINTER, I64)
# Defined when the kernel is compiled: how many devices share the threads.
NUM_DEVICES = "tlt_devices"

# Where a job holds the next unit, how many are done, who still refers to it, how many
# units there are, and the function that runs one; the kernel's own fields follow.
_NEXT, _DONE, _REFERENCES, _UNITS, _BODY, _HEADER = 0, 8, 16, 24, 32, 64

# Offsets of the interface's C structs (`xla/ffi/api/c_api.h`) on 64-bit machines.
# Versions 0.3 and 0.4 (jaxlib 0.10 and 0.11) have the same ones; a runtime older than
# the version answered, or of another major one, refuses the handler when it is
# registered.
_FRAME = dict(extension=8, api=16, context=24, argument=72, result=112)
_BUFFER = dict(data=24, rank=32, dims=40)
_API = dict(destroy_error=64, schedule=136, num_threads=144)
_VERSION = (0, 3)


@dataclasses.dataclass(frozen=True)
class Fields:
    """What a job holds behind its header, eight bytes each.

    Attributes:
      arguments, results: pointers to the call's buffers, in their order; a call may
        have more arguments, which its handler reads itself.
      numbers: 64-bit integers.
    """

    arguments: tuple[str, ...]
    results: tuple[str, ...]
    numbers: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """All fields in the order of their places."""
        return self.arguments + self.results + self.numbers

    @property
    def num_bytes(self) -> int:
        """Size of a job, header included."""
        return _HEADER + 8 * len(self.names)

    def load(self, code: code_lib.Code, job: ir.Value) -> dict[str, ir.Value]:
        """Read every field of a job."""
        kinds = [I64 if name in self.numbers else POINTER for name in self.names]
        return {
            name: code.field(job, _HEADER + 8 * i, kind)
            for i, (name, kind) in enumerate(zip(self.names, kinds, strict=True))
        }

    def store(
        self, code: code_lib.Code, job: ir.Value, values: dict[str, ir.Value]
    ) -> None:
        """Write every field of a job."""
        for i, name in enumerate(self.names):
            code.put_field(values[name], job, _HEADER + 8 * i)


class Call:
    """A call of a handler: its buffers, and what XLA does for it."""

    def __init__(self, code: code_lib.Code, frame: ir.Value):
        """Read from `frame`."""
        self._code, self._frame = code, frame

    def argument(self, index: int) -> ir.Value:
        """Point to an argument's first element."""
        return self._code.field(self._buffer("argument", index), _BUFFER["data"])

    def result(self, index: int) -> ir.Value:
        """Point to a result's first element."""
        return self._code.field(self._buffer("result", index), _BUFFER["data"])

    def dims(self, index: int, count: int, kind: str = "argument") -> list[ir.Value]:
        """Read the first `count` dimensions of an argument or `result`."""
        dims = self._code.field(self._buffer(kind, index), _BUFFER["dims"])
        return [self._code.get(dims, i, kind=I64) for i in range(count)]

    def rank(self, index: int) -> ir.Value:
        """Count the dimensions of an argument."""
        return self._code.field(self._buffer("argument", index), _BUFFER["rank"], I64)

    def size(self, index: int, start: int | ir.Value, stop: int | ir.Value) -> ir.Value:
        """Multiply the dimensions start to stop - 1 of an argument."""
        code = self._code
        dims = code.field(self._buffer("argument", index), _BUFFER["dims"])
        size = code.variable(I64, 1)
        with code.loop(stop, start=start) as i:
            size.value = code.mul(size.value, code.get(dims, i, kind=I64))
        return size.value

    def threads(self) -> ir.Value:
        """Count the program's threads, its device's share; 1 where it has no pool."""
        return self._code.invoke("tlt_threads", self._frame)

    def run(self, job: ir.Value, unit: str, units: ir.Value, threads: ir.Value) -> None:
        """Run all units of a job on up to `threads` threads, and give the job up."""
        code = self._code
        code.invoke("tlt_run", self._frame, job, code.address(unit), units, threads)

    def _buffer(self, kind: str, index: int) -> ir.Value:
        every = self._code.field(self._frame, _FRAME[kind])
        return self._code.field(every, 8 * index)


def begin(fused: bool) -> code_lib.Module:
    """Begin the module of a kernel; `fused`: the CPU multiplies and adds at once."""
    module = code_lib.Module(fused)
    _write_threads(module)
    _write_release(module)
    _write_work(module)
    _write_run(module)
    return module


@contextlib.contextmanager
def handler(module: code_lib.Module, name: str) -> Iterator[tuple[code_lib.Code, Call]]:
    """Write a handler whose work is what is inside; it may return `NULL` early."""
    code, (frame,) = module.begin(name, POINTER, POINTER, exported=True)
    # XLA may ask which interface the handler was written for.
    extension = code.field(frame, _FRAME["extension"])
    with code.if_then(code.icmp_unsigned("!=", extension, NULL)):
        kind = code.field(extension, 8, I32)
        with code.if_then(code.icmp_signed("==", kind, ir.Constant(I32, 1))):
            metadata = code.field(extension, 24)
            for i, value in enumerate((*_VERSION, 0)):  # and no traits
                code.put_field(ir.Constant(I32, value), metadata, 24 + 4 * i)
            code.ret(NULL)
    yield code, Call(code, frame)
    code.ret(NULL)


def write_handler(
    module: code_lib.Module,
    name: str,
    unit: str,
    fields: Fields,
    numbers: Callable[[code_lib.Code, Call], tuple[dict[str, ir.Value], ir.Value]],
) -> None:
    """Write a handler that makes the job and runs its units on the program's threads.

    `unit` is a function of the module, of a job and a unit's number; `numbers` gives,
    for a call, the job's numbers and how many units there are.
    """
    with handler(module, name) as (code, call):
        values, units = numbers(code, call)
        values |= {name: call.argument(i) for i, name in enumerate(fields.arguments)}
        values |= {name: call.result(i) for i, name in enumerate(fields.results)}
        with code.if_then(code.icmp_signed("==", units, code.number(0))):
            code.ret(NULL)
        job = code.invoke("malloc", fields.num_bytes)
        fields.store(code, job, values)
        call.run(job, unit, units, code.least(call.threads(), units))


def _ask(code, frame, function: str, *arguments: int | ir.Value) -> ir.Value:
    """Call a function of XLA's; it answers null or an error."""
    size = 8 * (2 + len(arguments))
    record = code.array(I8, size)
    for i, value in enumerate((size, NULL, *arguments)):
        code.put_field(code.number(value), record, 8 * i)
    pointer = ir.FunctionType(POINTER, [POINTER]).as_pointer()
    api = code.field(frame, _FRAME["api"])
    return code.call(code.field(api, _API[function], pointer), [record])


@contextlib.contextmanager
def _if_failed(code, frame, error: ir.Value) -> Iterator[None]:
    """Do what is inside where XLA answered with an error, and free that."""
    with code.if_then(code.icmp_unsigned("!=", error, NULL)):
        _ask(code, frame, "destroy_error", error)
        yield


def _write_threads(module: code_lib.Module) -> None:
    module.declare(NUM_DEVICES, I64)
    code, (frame,) = module.begin("tlt_threads", I64, POINTER)
    count = code.array(I64, 1)
    context = code.field(frame, _FRAME["context"])
    error = _ask(code, frame, "num_threads", context, count)
    with _if_failed(code, frame, error):
        code.ret(code.number(1))
    share = code.udiv(code.field(count, 0, I64), code.invoke(NUM_DEVICES))
    is_some = code.icmp_signed(">", share, code.number(1))
    code.ret(code.select(is_some, share, code.number(1)))


def _write_release(module: code_lib.Module) -> None:
    """Drop one reference to the job; the last one frees it."""
    code, (job,) = module.begin("tlt_release", VOID, POINTER)
    references = code.at(job, _REFERENCES, kind=I8)
    before = code.atomic_rmw("sub", references, code.number(1), "acq_rel")
    with code.if_then(code.icmp_signed("==", before, code.number(1))):
        code.invoke("free", job)
    code.ret_void()


def _write_work(module: code_lib.Module) -> None:
    """Take units until there are none; and the same as a task of another thread."""
    code, (job,) = module.begin("tlt_work", VOID, POINTER)
    units = code.field(job, _UNITS, I64)
    body = code.field(job, _BODY, ir.FunctionType(UNIT[0], UNIT[1:]).as_pointer())
    one, done = code.number(1), code.at(job, _DONE, kind=I8)
    with code.forever() as leave_if:
        unit = code.atomic_rmw("add", job, one, "monotonic")
        leave_if(code.icmp_signed(">=", unit, units))
        code.call(body, [job, unit])
        code.atomic_rmw("add", done, one, "release")
    code.ret_void()
    code, (job,) = module.begin("tlt_task", VOID, POINTER)
    code.invoke("tlt_work", job)
    code.invoke("tlt_release", job)
    code.ret_void()


def _write_run(module: code_lib.Module) -> None:
    """Run all units of a job, see `Call.run`."""
    code, (frame, job, body, units, threads) = module.begin(
        "tlt_run", VOID, POINTER, POINTER, POINTER, I64, I64
    )
    header = {_NEXT: 0, _DONE: 0, _REFERENCES: threads, _UNITS: units, _BODY: body}
    for place, value in header.items():
        code.put_field(code.number(value), job, place)
    context = code.field(frame, _FRAME["context"])
    with code.loop(threads, start=1):
        error = _ask(code, frame, "schedule", context, code.address("tlt_task"), job)
        with _if_failed(code, frame, error):
            code.invoke("tlt_release", job)
    code.invoke("tlt_work", job)
    spins, done = code.variable(I64, 0), code.at(job, _DONE, kind=I8)
    with code.forever() as leave_if:
        so_far = code.load_atomic(done, "acquire", 8, typ=I64)
        leave_if(code.icmp_signed("==", so_far, units))
        # Others are within their last unit; where cores are scarce they need this one.
        is_long = code.icmp_signed(">", spins.value, code.number(4096))
        with code.if_then(is_long):
            code.invoke("sched_yield")
        spins.value = code.plus(spins.value, 1)
    code.invoke("tlt_release", job)
    code.ret_void()
