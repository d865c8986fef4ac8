"""Five verbs by which a run's processes are operated, whoever operates them.

    start    make the members of a run, all or none
    call     call a method of one, see `member.Member`: run a program, end it, ...
    watch    wait until programs have ended, or members are gone
    restart  make a member anew, its program ended, its resources kept
    stop     end all

What is called and what comes of it is JSON: no object of another process is made here.
A world is what the members' programs do together, one start of `jax.distributed`; it is
started again as a whole (`launch`), since a collective does not outlive its processes.
`local` and `on_ray` do the same under one suite of tests.
"""

import abc
import dataclasses
import json
import signal
import time
from collections.abc import Sequence
from typing import Any

from tlt_jax.executors import member
from tlt_jax.runtime import failures

# What a member does for others.
METHODS = frozenset(["facts", "address", "run", "poll", "read", "terminate", "kill"])
# As a program's status: its member is gone, with its machine perhaps.
GONE = -int(signal.SIGKILL)


class ExecutorError(failures.UserError):
    """The executor is not there, or cannot give what was asked for."""


@dataclasses.dataclass(frozen=True)
class Share:
    """What each member has.

    Attributes:
      cpus: cores; None: its part of the machine's.
      devices: accelerators, where there are any; 0: it computes nothing on them, and on
        this machine keeps to no cores of its own.
    """

    cpus: float | None = None
    devices: int = 1


class Executor(abc.ABC):
    """Operates members, which are numbered from 0.

    Attributes:
      is_local: members are on this machine, and member 0 has its terminal.
      look_s: how often `watch` looks.
    """

    is_local: bool
    look_s: float

    @abc.abstractmethod
    def start(self, shares: Sequence[Share]) -> None:
        """Make a member of each share.

        Raises:
          ExecutorError: there is too little of something, which is named.
        """

    @abc.abstractmethod
    def restart(self, index: int) -> None:
        """Make a member anew; its program, if one runs, is ended first.

        Raises:
          ExecutorError: its resources are not to be had again.
        """

    @abc.abstractmethod
    def host(self, index: int) -> str:
        """Return the address at which other members find a member's machine.

        Raises:
          ExecutorError: the member is gone.
        """

    @abc.abstractmethod
    def stop(self) -> None:
        """End all members, and their programs at once."""

    @abc.abstractmethod
    def _call(self, index: int, method: str, arguments: list[Any]) -> Any:
        """Call a method; `ExecutorError`: the member is gone."""

    @abc.abstractmethod
    def _codes(self) -> list[int | None]:
        """Return the programs' statuses; `GONE`: the member is."""

    def call(self, index: int, method: str, *arguments: Any) -> Any:
        """Call a method of a member, one of `METHODS`.

        Raises:
          ValueError: there is no such method.
          ExecutorError: the member is gone.
          OSError, ...: what the method raises.
        """
        if method not in METHODS:
            raise ValueError(
                f"method={method!r}: members have {', '.join(sorted(METHODS))}."
            )
        return self._call(index, method, json.loads(json.dumps(arguments)))

    def watch(self, timeout_s: float = 0.0) -> list[int | None]:
        """Wait until a program has ended, for so long at most.

        Returns:
          By member its program's exit status, below 0 a signal's; None: it runs;
          `GONE`: the member itself has ended.
        """
        until_s = time.monotonic() + timeout_s
        while True:
            codes = self._codes()
            left_s = until_s - time.monotonic()
            if any(code is not None for code in codes) or left_s <= 0:
                return codes
            time.sleep(min(self.look_s, left_s))

    def check_same(self, num: int) -> None:
        """Make sure that all members have this process's code and libraries.

        Raises:
          ExecutorError: one has others.
        """
        own = member.versions()
        for index in range(num):
            facts = self.call(index, "facts")
            for name, wanted in own.items():
                if facts[name] != wanted:
                    raise ExecutorError(
                        f"process {index} on {facts['host']} has {name} "
                        f"{facts[name]}, and this machine {wanted}: install the same "
                        "on all, or let them read the same folders."
                    )
