"""Members on this machine, each with its share of the cores; see `executor`."""

import os
from collections.abc import Sequence
from typing import Any

from tlt_jax.executors import executor
from tlt_jax.executors import member as member_lib


class Local(executor.Executor):
    """Operates processes of this machine."""

    is_local = True
    look_s = 0.05

    def __init__(self):
        """Nothing is started yet."""
        self._shares: list[list[int]] = []
        self._members: list[member_lib.Member] = []

    def start(self, shares: Sequence[executor.Share]) -> None:
        # Not every system can say which cores are ours.
        own = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ()
        divided = iter(divide(sorted(own), sum(one.devices > 0 for one in shares)))
        self._shares = [next(divided) if one.devices else [] for one in shares]
        self._members = [member_lib.Member(cores) for cores in self._shares]

    def restart(self, index: int) -> None:
        self._members[index].kill()
        self._members[index] = member_lib.Member(self._shares[index])

    def host(self, index: int) -> str:
        return "127.0.0.1"

    def stop(self) -> None:
        for one in self._members:
            one.kill()

    def _call(self, index: int, method: str, arguments: list[Any]) -> Any:
        return getattr(self._members[index], method)(*arguments)

    def _codes(self) -> list[int | None]:
        return [one.poll() for one in self._members]


def divide(cores: Sequence[int], count: int) -> list[list[int]]:
    """Divide cores into `count` shares without overlap; too few: all for everybody."""
    if count > len(cores):
        return [list(cores)] * count
    bounds = [len(cores) * i // count for i in range(count + 1)]
    return [list(cores[a:b]) for a, b in zip(bounds, bounds[1:], strict=False)]
