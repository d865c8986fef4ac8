"""A request to stop, by Ctrl-C or SIGTERM: heard at once, answered when it suits.

Python runs signal handlers between two steps of the main thread, which may be minutes
away where that compiles or computes. So signals are read by a thread of their own from
the descriptor that Python writes them to.
"""

import contextlib
import dataclasses
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator

from tlt_jax.runtime import distributed

SIGNALS = (signal.SIGINT, signal.SIGTERM)
INTERRUPTED = "interrupted."
_AT_ONCE = "ended at once: the same command resumes from the newest checkpoint."
_SHOW_CURSOR = b"\x1b[?25h\n"
_LONGEST_WAIT_S = 3600.0
_TOLD = "stopping after this step: saving; Ctrl-C again ends at once"


@dataclasses.dataclass(frozen=True)
class _Work:
    """What is not to be cut off; see `Stop.finishing`."""

    say: Callable[[str], None]
    grace_s: float
    abandon: Callable[[], None]


class Stop:
    """Whether a run shall stop.

    The first signal asks for it. Where nothing is to be finished the process ends at
    once, else the work is told, and has so long. A second Ctrl-C ends the process at
    once, whatever it does.

    Without `heard` nobody asks: programs that call a run have signals of their own.

    Attributes:
      signal: number of the first signal; 0: none has come.
      last_words: called at an end at once, by another thread: what is to be said.
    """

    def __init__(self):
        """Nobody has asked."""
        self.signal = 0
        self.last_words: Callable[[], str] = lambda: INTERRUPTED
        self._work: _Work | None = None
        self._until_s: float | None = None
        self._lock = threading.Lock()

    @property
    def status(self) -> int:
        """Exit status of a process that was stopped: 130 by Ctrl-C, 143 by SIGTERM."""
        return 128 + self.signal

    def agreed(self, group: distributed.Group) -> bool:
        """Say whether any process of the group was asked; all call this together."""
        if group.num > 1:
            found = group.exchange("stop", self.signal)
            self.signal = self.signal or max(found)
        return self.signal > 0

    @contextlib.contextmanager
    def finishing(
        self,
        say: Callable[[str], None],
        grace_s: float = float("inf"),
        abandon: Callable[[], None] = lambda: None,
    ) -> Iterator[None]:
        """Let the process go on within after a first signal; `signal` tells of it.

        Args:
          say: tells the user so.
          grace_s: seconds after the signal in which the work may go on.
          abandon: called then: what takes longer is to be given up. Both are called by
            another thread.
        """
        with self._lock:
            self._work = _Work(say, grace_s, abandon)
        try:
            yield
        finally:
            with self._lock:
                self._work = None

    def hear(self, number: int) -> None:
        """Take in a signal; returns where the process goes on."""
        with self._lock:
            work, is_first = self._work, not self.signal
            self.signal = self.signal or number
        if is_first and work is None:
            _end(self.status, self.last_words())
        elif is_first:
            self._until_s = time.monotonic() + work.grace_s
            # A terminal that is gone is no reason to stop listening.
            with contextlib.suppress(OSError):
                work.say(_TOLD)
        elif number == signal.SIGINT:
            # The display may be what hangs: nothing is asked of it.
            _end(self.status, _AT_ONCE)

    def look(self) -> float | None:
        """Give up what takes too long; return the seconds until the next look."""
        if self._until_s is None:
            return None
        left_s = self._until_s - time.monotonic()
        if left_s > 0:
            return min(left_s, _LONGEST_WAIT_S)
        self._until_s = None
        with self._lock:
            work = self._work
        if work is not None:
            work.abandon()
        return None


@contextlib.contextmanager
def heard() -> Iterator[Stop]:
    """Make a `Stop` that listens to signals; for the main thread of a command."""
    stop, (ear, mouth) = Stop(), socket.socketpair()
    mouth.setblocking(False)

    def listen() -> None:
        while True:
            ear.settimeout(stop.look())
            try:
                numbers = ear.recv(1)
            except TimeoutError:
                continue
            if not numbers:
                return
            if numbers[0] in SIGNALS:
                stop.hear(numbers[0])

    listener = threading.Thread(target=listen, daemon=True, name="signals")
    with contextlib.ExitStack() as closing:
        closing.enter_context(ear)
        closing.callback(listener.join)
        # By which the listener finds the end.
        closing.enter_context(mouth)
        for number in SIGNALS:
            before = signal.signal(number, _leave_it_to_the_listener)
            closing.callback(signal.signal, number, before)
        other = signal.set_wakeup_fd(mouth.fileno(), warn_on_full_buffer=False)
        closing.callback(signal.set_wakeup_fd, other)
        listener.start()
        yield stop


def _leave_it_to_the_listener(number: int, frame: object) -> None:
    """Stand where Python's own handler would raise `KeyboardInterrupt`."""


def _end(status: int, words: str) -> None:
    """End the process, wherever its threads are."""
    with contextlib.suppress(OSError):
        if os.isatty(1):
            os.write(1, _SHOW_CURSOR)
        os.write(2, f"{words}\n".encode())
    os._exit(status)
