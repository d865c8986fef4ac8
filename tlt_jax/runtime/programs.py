"""The pool of compiled programs: compiled once per key, ahead of need, never retraced.

A key says everything that decides a program's shapes (kind, batch bucket, strategy).
Programs may be prepared in the background while others run; asking for one that is not
ready waits for it. After warm-up a run compiles nothing, which `num_compiled` shows.
Pools of equal devices compile one after the other what the cache then gives the others.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import threading
import time
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import jax

from tlt_jax.runtime import compile_cache


@dataclasses.dataclass(frozen=True)
class Program:
    """A device program that can be had: `lower` traces and lowers it.

    The key says everything that decides its shapes: equal keys are one program.
    """

    key: Hashable
    lower: Callable[[], jax.stages.Lowered] = dataclasses.field(compare=False)


class Bound:
    """A function with its settings, which equal devices trace and lower once.

    What jax made of a function it finds by the object, whatever devices ask: so those
    whose settings are equal must have the same one, see `bound`, and ask one after the
    other.
    """

    def __init__(self, fn: Callable):
        """Take a function whose settings are bound."""
        self._fn = fn
        self._lock = threading.Lock()

    def lower(
        self, jit: Callable[[Callable], jax.stages.Wrapped], *args: Any
    ) -> jax.stages.Lowered:
        """Lower what `jit` makes of the function, for arguments or what they are."""
        with self._lock:
            return jit(self._fn).lower(*args)


@functools.lru_cache(maxsize=32)
def bound(fn: Callable, **settings: Hashable) -> Bound:
    """Bind settings to a function; equal ones are the same object."""
    return Bound(functools.partial(fn, **settings))


class Turn:
    """Lets the first of several go alone; the others wait, and then go side by side.

    So the others find in the cache what the first has compiled; and where they do not,
    they lose no more time than it took.
    """

    def __init__(self):
        self._lock = threading.Lock()
        self._is_over = False

    @contextlib.contextmanager
    def taken(self) -> Iterator[None]:
        """Go when it is one's turn."""
        with self._lock:
            if not self._is_over:
                try:
                    yield
                finally:
                    self._is_over = True
                return
        yield


@functools.lru_cache(maxsize=512)
def _turn(kind: Hashable, key: Hashable) -> Turn:
    return Turn()


# Two that ask for the same turn at once would get one each.
_ASKING = threading.Lock()


@dataclasses.dataclass
class PoolStats:
    """What the pool did so far; bytes are what compilers say."""

    num_compiled: int = 0
    compile_s: float = 0.0  # Wherever that happened.
    waited_s: float = 0.0  # For which a caller had to wait for a program.
    # When that was, from and until, by `time.perf_counter`.
    waits: list[tuple[float, float]] = dataclasses.field(default_factory=list)
    num_waiting: int = 0  # Callers that wait now.
    temp_bytes: int = 0  # The largest scratch memory of any program.
    code_bytes: int = 0  # Of all programs.


class ProgramPool:
    """Compiled programs by key. Safe to use from several threads."""

    def __init__(self, kind: Hashable = None):
        """Begin with none.

        Pools of equal `kind` have equal programs of equal keys, for one's own devices
        each; None: no other pool has.
        """
        self._kind = kind
        self.stats = PoolStats()
        self._programs: dict[Hashable, concurrent.futures.Future] = {}
        self._tasks: dict[Hashable, concurrent.futures.Future] = {}
        self._lock = threading.Lock()
        self._background = concurrent.futures.ThreadPoolExecutor(
            max_workers=1, thread_name_prefix="compile"
        )

    def __len__(self) -> int:
        return len(self._programs)

    def get(self, program: Program) -> jax.stages.Compiled:
        """Return a program compiled, compiling or waiting for it if need be.

        One that is only queued in the background is compiled here at once. An error of
        its compilation is raised, and its key forgotten.
        """
        future, mine = self._claim(program.key)
        if not mine and future.done():
            return future.result()
        with self._waiting():
            if mine or self._take_back(program.key):
                self._compile(program, future)
            return future.result()

    def prepare(self, program: Program) -> None:
        """Compile a program in the background, unless it is there.

        An error of its compilation is raised to whoever waits; later its key is
        forgotten, and `get` tries again.
        """
        future, mine = self._claim(program.key)
        if not mine:
            return
        try:
            task = self._background.submit(self._compile, program, future)
        except RuntimeError as error:  # the pool is closed
            self._fail(program.key, future, error)
            raise
        with self._lock:
            self._tasks[program.key] = task

    def is_ready(self, program: Program, timeout_s: float = 0.0) -> bool:
        """Tell whether a program can be had within `timeout_s`.

        If it was prepared, an error of its compilation is raised.
        """
        future = self._programs.get(program.key)
        if future is None:
            return False
        try:
            future.result(timeout_s)
        except concurrent.futures.TimeoutError:
            return False
        return True

    @property
    def is_idle(self) -> bool:
        """Whether nothing is being prepared."""
        with self._lock:
            return all(future.done() for future in self._programs.values())

    def wait(self) -> None:
        """Wait for everything that is being prepared; raise the first error of it."""
        with self._lock:
            pending = list(self._programs.values())
        for future in pending:
            future.result()

    def close(self) -> None:
        """Drop what is not yet begun, telling who waits for it; wait for the rest."""
        self._background.shutdown(wait=True, cancel_futures=True)
        with self._lock:
            dropped = [key for key, task in self._tasks.items() if task.cancelled()]
            self._tasks.clear()
        for key in dropped:
            self._fail(key, self._programs[key], concurrent.futures.CancelledError())

    @contextlib.contextmanager
    def _waiting(self) -> Iterator[None]:
        """Count a caller's wait; one that ends with an error is none."""
        started = time.perf_counter()
        with self._lock:
            self.stats.num_waiting += 1
        try:
            yield
            stopped = time.perf_counter()
            with self._lock:
                self.stats.waited_s += stopped - started
                self.stats.waits.append((started, stopped))
        finally:
            with self._lock:
                self.stats.num_waiting -= 1

    def _claim(self, key: Hashable) -> tuple[concurrent.futures.Future, bool]:
        with self._lock:
            future = self._programs.get(key)
            if future is not None:
                return future, False
            self._programs[key] = future = concurrent.futures.Future()
            return future, True

    def _take_back(self, key: Hashable) -> bool:
        """Take a program out of the background's queue, if it is not yet begun."""
        with self._lock:
            task = self._tasks.pop(key, None)
        return task is not None and task.cancel()

    def _fail(self, key, future, error: BaseException) -> None:
        with self._lock:
            del self._programs[key]
        future.set_exception(error)

    def _turn(self, program: Program) -> contextlib.AbstractContextManager[None]:
        if self._kind is None or not compile_cache.serves_equal_devices():
            return contextlib.nullcontext()
        with _ASKING:
            turn = _turn(self._kind, program.key)
        return turn.taken()

    def _compile(self, program: Program, future) -> None:
        started = time.perf_counter()
        try:
            with self._turn(program):
                compiled = program.lower().compile()
            memory = compiled.memory_analysis()
        # Whatever it is, whoever waits for the program must be told.
        except BaseException as error:
            self._fail(program.key, future, error)
            return
        elapsed = time.perf_counter() - started
        with self._lock:
            self.stats.num_compiled += 1
            self.stats.compile_s += elapsed
            if memory is not None:
                scratch = memory.temp_size_in_bytes
                self.stats.temp_bytes = max(self.stats.temp_bytes, scratch)
                self.stats.code_bytes += memory.generated_code_size_in_bytes
        future.set_result(compiled)
