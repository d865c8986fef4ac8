"""A runner that is loaded for each request and gone after it.

So systems that do not fit into memory beside each other take turns all the same.
"""

from collections.abc import Callable
from typing import Any, Protocol


class Runner(Protocol):
    """What is loaded; see `harness.Runner`."""

    def ask(self, command: str, *, timeout_s: float, **fields) -> dict:
        """Sends one request and returns its answer."""

    def close(self) -> None:
        """Ends the process."""


class Visitor:
    """Takes requests as a runner does, and has no process between them."""

    def __init__(
        self,
        start: Callable[[], Runner],
        request: dict[str, Any],
        timeout_s: float,
        versions: dict[str, Any],
    ):
        """Starts nothing yet.

        Args:
          start: starts a runner.
          request: for `load`.
          timeout_s: for that.
          versions: takes up what each load reports.
        """
        self._start, self._request = start, request
        self._timeout_s, self._versions = timeout_s, versions

    def ask(self, command: str, *, timeout_s: float, **fields) -> dict:
        """Loads, asks twice, and returns the second answer: the first one warms up.

        Raises:
          harness.RunnerError: as of a runner.
        """
        runner = self._start()
        try:
            answer = runner.ask("load", timeout_s=self._timeout_s, **self._request)
            self._versions.update(answer)
            runner.ask(command, timeout_s=timeout_s, **fields)
            return runner.ask(command, timeout_s=timeout_s, **fields)
        finally:
            runner.close()

    def close(self) -> None:
        """Does nothing: between requests there is no process."""
