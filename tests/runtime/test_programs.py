"""The pool compiles every program once, whoever asks, and tells of errors."""

import concurrent.futures
import dataclasses
import threading

import jax
import jax.numpy as jnp
import pytest

from tlt_jax.runtime import programs

TIMEOUT_S = 20


@dataclasses.dataclass
class Memory:
    temp_size_in_bytes: int
    generated_code_size_in_bytes: int


class Source:
    """Stands for a traced program: counts compilations, may wait or fail."""

    def __init__(self, name="program", error=None, memory=None):
        self.name = name
        self.error = error
        self.memory = memory
        self.num_lowered = 0
        self.begun = threading.Event()
        self.may_go_on = threading.Event()
        self.may_go_on.set()

    def __call__(self):
        self.num_lowered += 1
        self.begun.set()
        assert self.may_go_on.wait(TIMEOUT_S)
        if self.error is not None:
            raise self.error
        return self

    def compile(self):
        return self

    def memory_analysis(self):
        return self.memory


@pytest.fixture
def pool():
    pool = programs.ProgramPool()
    yield pool
    pool.close()


@pytest.fixture
def busy(pool):
    """Something that keeps the background busy until it may go on."""
    source = Source("busy")
    source.may_go_on.clear()
    pool.prepare(programs.Program("busy", source))
    assert source.begun.wait(TIMEOUT_S)
    yield source
    source.may_go_on.set()


@pytest.fixture
def other_thread():
    with concurrent.futures.ThreadPoolExecutor(8) as executor:
        yield executor.submit


def test_a_program_is_compiled_once_for_a_key(pool):
    first, second = Source(memory=Memory(10, 3)), Source(memory=Memory(7, 5))
    assert pool.get(programs.Program(("decode", 8), first)) is first
    assert pool.get(programs.Program(("decode", 8), second)) is first
    pool.prepare(programs.Program(("decode", 8), second))
    pool.wait()
    assert (first.num_lowered, second.num_lowered) == (1, 0)
    assert pool.get(programs.Program(("decode", 4), second)) is second
    assert len(pool) == pool.stats.num_compiled == 2
    assert (pool.stats.temp_bytes, pool.stats.code_bytes) == (10, 8)


def test_a_real_program_runs_without_tracing_again(pool):
    num_traced = 0

    def double(x):
        nonlocal num_traced
        num_traced += 1
        return 2 * x

    shape = jax.ShapeDtypeStruct((3,), jnp.float32)

    def lower():
        return jax.jit(double).lower(shape)

    pool.prepare(programs.Program(3, lower))
    for i in range(3):
        assert (
            pool.get(programs.Program(3, lower))(jnp.full(3, float(i))).tolist()
            == [2 * i] * 3
        )
    assert num_traced == pool.stats.num_compiled == 1
    assert pool.stats.compile_s > 0
    with pytest.raises(TypeError):
        pool.get(programs.Program(3, lower))(jnp.ones(4))


def test_preparing_does_not_wait_and_asking_does(pool, busy, other_thread):
    assert pool.stats.num_compiled == 0
    waiting = other_thread(pool.get, programs.Program("busy", Source()))
    with pytest.raises(concurrent.futures.TimeoutError):
        waiting.result(0.05)
    busy.may_go_on.set()
    assert waiting.result(TIMEOUT_S) is busy
    assert pool.stats.waited_s >= 0.04
    waited_s = pool.stats.waited_s
    pool.get(programs.Program("busy", Source()))
    assert pool.stats.waited_s == waited_s


def test_waits_are_noted_with_their_times(pool, other_thread):
    source = Source()
    source.may_go_on.clear()
    pool.prepare(programs.Program("key", source))
    waiting = other_thread(pool.get, programs.Program("key", source))
    assert source.begun.wait(TIMEOUT_S)
    while pool.stats.num_waiting < 1:
        assert waiting.running()
    assert pool.stats.waits == []
    source.may_go_on.set()
    waiting.result(TIMEOUT_S)
    ((start_s, stop_s),) = pool.stats.waits
    assert stop_s - start_s == pool.stats.waited_s > 0
    assert pool.stats.num_waiting == 0
    # What is there costs no wait.
    pool.get(programs.Program("key", source))
    assert len(pool.stats.waits) == 1


def test_what_is_only_queued_is_compiled_by_who_needs_it(pool, busy):
    queued = Source("queued")
    pool.prepare(programs.Program("queued", queued))
    own = Source("own")
    assert pool.get(programs.Program("queued", own)) is own
    busy.may_go_on.set()
    pool.wait()
    assert (queued.num_lowered, own.num_lowered) == (0, 1)
    assert pool.get(programs.Program("queued", Source())) is own
    assert pool.stats.num_compiled == 2


def test_many_threads_compile_once(pool, other_thread):
    source = Source()
    source.may_go_on.clear()
    barrier = threading.Barrier(8)

    def ask():
        barrier.wait(TIMEOUT_S)
        return pool.get(programs.Program("key", source))

    asked = [other_thread(ask) for _ in range(8)]
    assert source.begun.wait(TIMEOUT_S)
    source.may_go_on.set()
    assert [future.result(TIMEOUT_S) for future in asked] == [source] * 8
    assert source.num_lowered == pool.stats.num_compiled == 1


def test_programs_are_compiled_while_the_background_compiles(pool, busy, other_thread):
    source = Source()
    assert (
        other_thread(pool.get, programs.Program("other", source)).result(TIMEOUT_S)
        is source
    )
    assert not pool.stats.num_compiled - 1


@pytest.mark.parametrize("error", [ValueError("no room"), KeyboardInterrupt()])
def test_errors_are_raised_and_the_key_may_be_tried_again(pool, error):
    with pytest.raises(type(error)):
        pool.get(programs.Program("key", Source(error=error)))
    assert len(pool) == pool.stats.num_compiled == 0
    good = Source()
    assert pool.get(programs.Program("key", good)) is good


def test_errors_after_compiling_are_raised_too(pool):
    class Unanalysable(Source):
        def memory_analysis(self):
            raise RuntimeError("not on this device")

    with pytest.raises(RuntimeError, match="not on this device"):
        pool.get(programs.Program("key", Unanalysable()))
    assert len(pool) == 0


def test_errors_in_the_background_reach_those_who_wait(pool, other_thread):
    bad = Source(error=ValueError("no room"))
    bad.may_go_on.clear()
    pool.prepare(programs.Program("bad", bad))
    assert bad.begun.wait(TIMEOUT_S)
    waiting = [
        other_thread(pool.get, programs.Program("bad", Source())),
        other_thread(pool.wait),
    ]
    for future in waiting:
        with pytest.raises(concurrent.futures.TimeoutError):
            future.result(0.05)
    bad.may_go_on.set()
    for future in waiting:
        with pytest.raises(ValueError, match="no room"):
            future.result(TIMEOUT_S)
    good = Source()
    pool.prepare(programs.Program("bad", good))
    pool.wait()
    assert pool.get(programs.Program("bad", Source())) is good


def test_closing_drops_what_is_queued_and_finishes_what_is_begun(
    pool, busy, other_thread
):
    queued = Source()
    pool.prepare(programs.Program("queued", queued))
    waiting = other_thread(pool.wait)
    closing = other_thread(pool.close)
    with pytest.raises(concurrent.futures.TimeoutError):
        closing.result(0.05)
    busy.may_go_on.set()
    closing.result(TIMEOUT_S)
    with pytest.raises(concurrent.futures.CancelledError):
        waiting.result(TIMEOUT_S)
    assert queued.num_lowered == 0
    assert len(pool) == 1
    # Nothing hangs afterwards: what is there is given, what is not is compiled.
    assert pool.get(programs.Program("busy", Source())) is busy
    assert pool.get(programs.Program("queued", queued)) is queued
    with pytest.raises(RuntimeError):
        pool.prepare(programs.Program("late", Source()))
    late = Source()
    assert pool.get(programs.Program("late", late)) is late
    pool.close()
