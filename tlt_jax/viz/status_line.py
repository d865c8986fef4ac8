"""What a person sees while a command works: its stage, and how far it is."""

import contextlib
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, TextIO

_PLAIN_EVERY_S = 30.0
_LIVE_EVERY_S = 0.1
_ERASE = "\r\x1b[K"


class StatusLine(contextlib.AbstractContextManager):
    """Shows stages; a `runtime.watch.Observer`.

    On a terminal one line changes in place and is gone in the end. Elsewhere each stage
    is a line, and a long one a further line every 30 s.
    """

    def __init__(
        self,
        file: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Show on a file; None: standard error."""
        self._file = file or sys.stderr
        self._clock = clock
        self._live = self._file.isatty()
        self._stage, self._is_shown = "", False
        self._since = self._printed_at = clock()

    def __exit__(self, *_: object) -> None:
        self.clear()

    def stage(self, name: str) -> None:
        """Say what is done from now on; the same stage again says nothing new."""
        if name == self._stage:
            return
        self._stage, self._since = name, self._clock()
        self._show(f"{name} ...")

    def within(self, done: int, total: int, detail: str = "") -> None:
        """Say how far the stage is: `done` of `total`."""
        now = self._clock()
        if now - self._printed_at < (_LIVE_EVERY_S if self._live else _PLAIN_EVERY_S):
            return
        parts = [f"{self._stage} {done}/{total}", detail]
        parts.append(f"{now - self._since:.0f} s")
        self._show(", ".join(filter(None, parts)))

    def note(self, text: str) -> None:
        """Print a line that stays."""
        self.clear()
        print(text, file=self._file, flush=True)

    def record(self, row: Mapping[str, Any]) -> None:
        """Take a step's record: commands have none to show."""

    def clear(self) -> None:
        """Take the line away, for what others print."""
        if self._is_shown:
            print(_ERASE, end="", file=self._file, flush=True)
            self._is_shown = False

    def _show(self, text: str) -> None:
        self._printed_at = self._clock()
        if self._live:
            print(_ERASE + text, end="", file=self._file, flush=True)
            self._is_shown = True
        else:
            print(text, file=self._file, flush=True)
