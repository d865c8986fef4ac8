"""What people see of a run: its parts tell an observer, whoever listens shows it."""

from collections.abc import Mapping
from typing import Any, Protocol


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
