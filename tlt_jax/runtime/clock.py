"""Seconds of an RL step by stage, with waiting for compilers kept apart."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

from tlt_jax.runtime import programs


@dataclasses.dataclass
class Clock:
    """Seconds of the current step by stage; waiting for compilers apart."""

    pools: Sequence[programs.ProgramPool]
    spent: dict[str, float] = dataclasses.field(default_factory=dict)

    def time(self, name: str, fn: Callable[..., Any], *args, **kwargs) -> Any:
        """Call `fn` and add its seconds, less compilation, to stage `name`."""
        waited = self._waited()
        started = time.perf_counter()
        result = fn(*args, **kwargs)
        elapsed = time.perf_counter() - started
        # Several workers wait side by side: the longest wait is what was lost.
        pairs = zip(self._waited(), waited, strict=True)
        compiling = max((after - before for after, before in pairs), default=0.0)
        self._add(name, elapsed - compiling)
        self._add("compile", compiling)
        return result

    def row(self) -> dict[str, float]:
        """Return `time/<stage>_s` of every stage; stages that did not happen are 0."""
        stages = ("rollout", "reward", "inference", "update", "sync", "compile")
        spent = dict.fromkeys(stages, 0.0) | self.spent
        return {f"time/{name}_s": seconds for name, seconds in spent.items()}

    def _add(self, name: str, seconds: float) -> None:
        self.spent[name] = self.spent.get(name, 0.0) + max(seconds, 0.0)

    def _waited(self) -> list[float]:
        return [pool.stats.waited_s for pool in self.pools]
