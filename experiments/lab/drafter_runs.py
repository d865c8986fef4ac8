"""RL runs of small recipes whose drafter is trained by a plan, and not by the clock.

The drafter learns after the rollouts that the plan names, a counted number of updates
each time, so that a run is a function of its settings and not of the machine's load.
"""

import contextlib
import dataclasses
import pathlib
import tempfile
from collections.abc import Callable, Mapping

import jax
import numpy as np

from experiments.lab import harness, small_runs
from tlt_jax import config, train
from tlt_jax.rl.adaptation import budget
from tlt_jax.runtime import compile_cache
from tlt_jax.workdir import progress

# The drafter's time is no limit: `adaptation.max_steps` is.
_UNLIMITED_FRAC = 1e9


@dataclasses.dataclass(frozen=True)
class Planned(budget.Budget):
    """Trains now or not, whether that pays or not.

    Attributes:
      now: whether.
    """

    now: bool = False

    def seconds(self, rollout_s: float, max_frac: float) -> float:
        """Returns the limit, or 0."""
        return max_frac * rollout_s if self.now else 0.0

    def trained(self, seconds: float, before: float, after: float) -> "Planned":
        """Learns nothing."""
        del seconds, before, after
        return self


def settings_of(
    recipe: str, overrides: Mapping[str, object], num_updates: int
) -> config.RunConfig:
    """Returns a recipe with a drafter that learns `num_updates` times when it does."""
    return small_runs.settings_of(
        recipe,
        {
            **small_runs.DRAFTER,
            "adaptation.max_frac": _UNLIMITED_FRAC,
            "adaptation.max_steps": num_updates,
            **overrides,
        },
    )


def run(settings: config.RunConfig, trains: Callable[[int], bool]) -> list[harness.Row]:
    """Runs a recipe to its end; returns the records of its steps.

    Args:
      settings: of `settings_of`.
      trains: whether the drafter learns after the rollout of a step, counted from 0.

    Returns:
      Each step's record, and with it `policy_distance`: how far the policy's weights
      have gone from where they began, as a part of their own length.
    """
    compile_cache.enable()
    rows = []
    with contextlib.ExitStack() as closing:
        folder = pathlib.Path(closing.enter_context(tempfile.TemporaryDirectory()))
        display = progress.Progress(settings.num_steps, mode="off")
        trainer = closing.enter_context(train.Trainer(settings, folder, display))
        trainer.begin()
        first = weights(trainer)
        for number in range(settings.num_steps):
            trainer.parts.adaptation.budget = Planned(now=trains(number))
            row = trainer.take_step()
            moved = np.linalg.norm(weights(trainer) - first) / np.linalg.norm(first)
            rows.append({**row, "policy_distance": float(moved)})
    return rows


def weights(trainer: train.Trainer) -> np.ndarray:
    """Returns all weights of the policy, in a row."""
    leaves = jax.tree.leaves(jax.device_get(trainer.parts.updater.train_state.params))
    return np.concatenate([np.ravel(leaf) for leaf in leaves])
