"""One drafter for all processes: what one of them learned, the others take over.

Of several processes at most one trains beside a rollout, on its own workers and texts.
After every rollout they meet, so that the next one begins with the same drafter
everywhere, and a training of another process with what the last one learned.
"""

import dataclasses
from collections.abc import Callable
from typing import TypeVar

from tlt_jax.rl.adaptation import spot_trainer
from tlt_jax.runtime import distributed

_T = TypeVar("_T")


class Sharing:
    """A process's part in the meetings."""

    def __init__(self, group: distributed.Group):
        """Begin an RL step."""
        self._group = group
        self._num_known = 0

    def begin_step(self) -> None:
        """Begin the next RL step, with an empty report."""
        self._num_known = 0

    def meet(
        self, report: spot_trainer.Report, version: int, learned: Callable[[], _T]
    ) -> tuple[spot_trainer.Report, int, _T | None]:
        """Exchange what was learned since the last meeting; all processes call this.

        Args:
          report: of the RL step so far: the one of the last meeting, or an empty one,
            with what this process has trained since.
          version: of the drafter, as this process has it.
          learned: gives what this process has learned; asked only if it has trained.

        Returns:
          What all have now: the report of all trainings of the RL step, the drafter's
          newest version, and what the process that trained has learned, or None.
        """
        own = learned() if report.num_steps > self._num_known else None
        found = self._group.exchange("drafter", (report, version, own))
        # Reports grow from a common one: the longest is the one that has trained.
        newest, _, learned_there = max(found, key=lambda one: one[0].num_steps)
        self._num_known = newest.num_steps
        failures = dict.fromkeys(text for one, _, _ in found for text in one.failures)
        newest_version = max(version for _, version, _ in found)
        newest = dataclasses.replace(newest, failures=list(failures))
        return newest, newest_version, learned_there
