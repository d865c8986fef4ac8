"""Native kernels as jobs: what a call hands to its units of work.

A kernel names the pointers and numbers that its units read. Its handler fills them in
from the buffers of a call, and runs the units on the program's threads; a unit reads
them back by name.
"""

import dataclasses
from collections.abc import Callable, Sequence

from llvmlite import ir

from tlt_jax.cpu_kernels import code as code_lib
from tlt_jax.cpu_kernels import ffi


@dataclasses.dataclass(frozen=True)
class Fields:
    """What a job holds behind the runtime's header, eight bytes each.

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
        return ffi.JOB_HEADER + 8 * len(self.names)

    def load(self, code: code_lib.Code, job: ir.Value) -> dict[str, ir.Value]:
        """Read every field of a job."""
        return {
            name: code.load(
                self.place(code, job, name),
                typ=code_lib.I64 if name in self.numbers else code_lib.POINTER,
                align=8,
            )
            for name in self.names
        }

    def place(self, code: code_lib.Code, job: ir.Value, name: str) -> ir.Value:
        """Point to a field."""
        offset = ffi.JOB_HEADER + 8 * self.names.index(name)
        return code.at(job, offset, kind=code_lib.I8)


class Call:
    """The buffers of a call, as its handler sees them."""

    def __init__(self, made: code_lib.Module, code: code_lib.Code, frame: ir.Value):
        """Read from `frame`."""
        self._made, self._code, self._frame = made, code, frame

    def argument(self, index: int) -> ir.Value:
        """Point to an argument's first element."""
        return self._data("argument", index)

    def result(self, index: int) -> ir.Value:
        """Point to a result's first element."""
        return self._data("result", index)

    def dims(self, index: int, count: int) -> Sequence[ir.Value]:
        """Read the first `count` dimensions of an argument."""
        return self._dims("argument", index, count)

    def result_dims(self, index: int, count: int) -> Sequence[ir.Value]:
        """Read the first `count` dimensions of a result."""
        return self._dims("result", index, count)

    def _buffer(self, kind: str, index: int) -> ir.Value:
        asked = [self._frame, self._code.number(index)]
        return self._code.call(self._made.runtime(f"tlt_{kind}"), asked)

    def _data(self, kind: str, index: int) -> ir.Value:
        buffer = self._buffer(kind, index)
        return self._code.call(self._made.runtime("tlt_data"), [buffer])

    def _dims(self, kind: str, index: int, count: int) -> Sequence[ir.Value]:
        buffer, code = self._buffer(kind, index), self._code
        return [
            code.call(
                self._made.runtime("tlt_count"),
                [buffer, code.number(i), code.number(i + 1)],
            )
            for i in range(count)
        ]


def write_handler(
    made: code_lib.Module,
    name: str,
    unit: str,
    fields: Fields,
    numbers: Callable[[code_lib.Code, Call], tuple[dict[str, ir.Value], ir.Value]],
) -> None:
    """Write a handler that makes the job and runs its units on the program's threads.

    Args:
      made: to which the handler is added.
      name: of the handler.
      unit: function of `made`, of a job and a unit's number.
      fields: of the job.
      numbers: gives, for a call, the job's numbers and how many units there are.
    """
    code, (frame,) = made.function(
        name, code_lib.POINTER, code_lib.POINTER, exported=True
    )
    null = ir.Constant(code_lib.POINTER, None)
    with code.if_then(code.call(made.runtime("tlt_metadata"), [frame])):
        code.ret(null)
    call = Call(made, code, frame)
    values, units = numbers(code, call)
    values |= {name: call.argument(i) for i, name in enumerate(fields.arguments)}
    values |= {name: call.result(i) for i, name in enumerate(fields.results)}
    with code.if_then(code.icmp_signed("==", units, code.number(0))):
        code.ret(null)
    job = code.call(made.runtime("malloc"), [code.number(fields.num_bytes)])
    for field in fields.names:
        code.store(values[field], fields.place(code, job, field), align=8)
    threads = code.call(made.runtime("tlt_threads"), [frame])
    threads = code.least(threads, units)
    # The runtime frees the job.
    body = made.runtime(unit)
    code.call(made.runtime("tlt_run"), [frame, job, body, units, threads])
    code.ret(null)
