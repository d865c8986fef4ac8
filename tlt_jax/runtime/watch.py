"""The stages of an RL step: timed, with waiting for compilers kept apart, and shown."""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from tlt_jax.runtime import programs

# Every record has the seconds of these, whether they happened or not.
_STAGES = ("rollout", "reward", "inference", "update", "sync", "compile")


class Observer(Protocol):
    """Takes what a run's parts say; see `workdir.progress.Progress`, which shows it."""

    def stage(self, name: str) -> None:
        """Say what is done from now on: rollout, reward, update, ..."""

    def within(self, done: int, total: int, detail: str = "") -> None:
        """Say how far the stage is: `done` of `total`."""

    def note(self, text: str) -> None:
        """Say something that shall stay to be read."""

    def record(self, row: Mapping[str, Any]) -> None:
        """Take a finished step's record."""


class Silent(Observer):
    """Shows nothing."""


class Watch:
    """Times the stages of one step and tells an observer of them.

    Attributes:
      spent: seconds by stage so far; `compile` is the waiting for compilers, which no
        stage's own seconds hold.
    """

    def __init__(
        self,
        pools: Sequence[programs.ProgramPool] = (),
        observer: Observer | None = None,
        step: int = 0,
    ):
        """Begin the step behind `step` others; it may wait for programs of `pools`."""
        self._pools = tuple(pools)
        self._observer = observer or Silent()
        self._step = step
        self.spent: dict[str, float] = {}

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Show a stage, and add its seconds, less compilation, to what was spent."""
        self._observer.stage(name)
        waited = self._waited()
        started = time.perf_counter()
        yield
        elapsed = time.perf_counter() - started
        # Several workers wait side by side: the longest wait is what was lost.
        pairs = zip(self._waited(), waited, strict=True)
        compiling = max((after - before for after, before in pairs), default=0.0)
        self._add(name, elapsed - compiling)
        self._add("compile", compiling)

    def within(self, done: int, total: int, detail: str = "") -> None:
        """Say how far the stage is."""
        self._observer.within(done, total, detail)

    def note(self, text: str) -> None:
        """Say something of this step that shall stay to be read."""
        self._observer.note(f"  step {self._step + 1}: {text}")

    def add(self, seconds: Mapping[str, float]) -> None:
        """Add what was spent beside this step, by stage: under another watch."""
        for name, spent_s in seconds.items():
            self._add(name, spent_s)

    def row(self) -> dict[str, float]:
        """Return `time/<stage>_s` of every stage; stages that did not happen are 0."""
        spent = dict.fromkeys(_STAGES, 0.0) | self.spent
        return {f"time/{name}_s": seconds for name, seconds in spent.items()}

    def _add(self, name: str, seconds: float) -> None:
        self.spent[name] = self.spent.get(name, 0.0) + max(seconds, 0.0)

    def _waited(self) -> list[float]:
        return [pool.stats.waited_s for pool in self._pools]
