"""The builder of kernels: control flow, variables, and whole numbers, run for real."""

import jax
import jax.numpy as jnp
import numpy as np

from tests.cpu_kernels import hosts
from tlt_jax.cpu_kernels import code as code_lib
from tlt_jax.cpu_kernels import ffi, job

pytestmark = hosts.needs_native


def run(name, write, numbers, count):
    """Call a kernel that `write` fills in: `numbers` in, `count` integers out."""
    kernel = job.begin(fused=True)
    with job.handler(kernel, name) as (code, call):

        def put(value, *place):
            code.put(code.trunc(value, code_lib.I32), call.result(0), *place)

        write(code, lambda *at: code.get(call.argument(0), *at, kind=code_lib.I32), put)
    ffi.register(kernel, {name: name})
    result = jax.ShapeDtypeStruct((count,), jnp.int32)
    return np.asarray(jax.ffi.ffi_call(name, result)(np.int32(numbers))).tolist()


def test_variables_follow_branches_and_loops():
    def collatz(code, get, put):
        with code.loop(3) as i:
            n, steps = (code.variable(code_lib.I64, start) for start in (get(i), 0))
            with code.forever() as leave_if:
                leave_if(code.icmp_signed("==", n.value, code.number(1)))
                odd = code.trunc(n.value, code_lib.I1)
                with code.if_else(odd) as (is_odd, is_even):
                    with is_odd:
                        n.value = code.plus(code.times(n.value, 3), 1)
                    with is_even:
                        n.value = code.udiv(n.value, code.number(2))
                steps.value = code.plus(steps.value, 1)
            put(steps.value, i)

    assert run("test_collatz", collatz, [1, 7, 27], 3) == [0, 16, 111]


def test_loops_have_start_and_step():
    def visits(code, get, put):
        total = code.variable(code_lib.I64, 0)
        with code.loop(get(1), get(2), start=get(0)) as i, code.loop(2) as j:
            total.value = code.plus(code.times(total.value, 10), i, j)
        put(total.value, 0)

    assert run("test_visits", visits, [1, 6, 3], 1) == [1245]
    # A loop that begins at its end does nothing.
    assert run("test_no_visits", visits, [6, 6, 1], 1) == [0]


def test_whole_numbers():
    def numbers(code, get, put):
        a, b = get(0), get(1)
        values = (code.over(a, b), code.up(a, 8), code.least(a, b), code.most(a, 9))
        for i, value in enumerate(values):
            put(value, i)

    assert run("test_numbers", numbers, [7, 3], 4) == [3, 8, 3, 9]


def test_constants_keep_the_sign_of_zero():
    code, _ = code_lib.Module(fused=True).begin("any", code_lib.VOID)
    texts = [str(code.splat(zero, 2)) for zero in (0.0, -0.0)]
    assert ["0x8000000000000000" in text for text in texts] == [False, True]
