"""Let a drafter's scores follow what became of its drafts.

A coupled draft's chance is its share of softmax((sharpness x logprobs + noise) / tau),
and a verification tells whether it came true (`proposers.expansion`). Both numbers are
first what was measured with a version on held-out texts (`training.acceptance`). From
then on they are what makes the same sum of squares smallest, of chances less what came
true, over the drafts since: recursive least squares, linear at the numbers by which a
decode call gave its chances. What was measured, and later what a run began with, counts
like a few hundred drafts, so that few say little; and as texts and target move on,
older drafts count less at each run.

Tau is taken up at the next decode call. Sharpness has a say in what is drafted: it is
taken up at the next run, within which a chain stays a function of its text, whatever
rows are decoded beside it. Which tokens come out depends on neither, by the keyed rule;
by the others they mean nothing.

Reference: Ljung and Söderström, Theory and Practice of Recursive Identification, 1983,
section 2.2 (recursive least squares with forgetting); Guo et al., On Calibration of
Modern Neural Networks, 2017 (temperature as the one number of calibration).
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import struct

from tlt_jax.specdec import candidates as candidates_lib
from tlt_jax.specdec import sampling
from tlt_jax.types import Array

# What a run's first numbers count for beside earlier drafts, in the unit of
# `Evidence.weight`: on real text a draft weighs some 0.05 by log tau, 0.4 by log
# sharpness.
_PRIOR = (20.0, 100.0)
# What is left of the weight of earlier runs' drafts.
_KEPT = 0.8
# How far one step goes, in logarithms: chances are linear in small ones alone.
_MOST_STEP = 0.4
# The smallest and largest tau and sharpness; see `learned.Draft`.
_BOUNDS = np.log([[0.1, 0.5], [16.0, 8.0]])


@struct.dataclass
class Slopes:
    """Derivatives of the logarithms of chances, arrays of any one shape.

    Attributes:
      by_tau: by the logarithm of tau.
      by_sharpness: by that of sharpness.
    """

    by_tau: Array
    by_sharpness: Array


@struct.dataclass
class Evidence:
    """What drafts whose parent came true say, sums over them.

    Attributes:
      pull: `[2] float32`, of (1 where one came true, else 0, less its chance) x the
        slopes of its chance by the logarithms of tau and sharpness.
      weight: `[2, 2] float32`, of products of these slopes.
    """

    pull: Array
    weight: Array


def nothing() -> Evidence:
    """Return the evidence of no draft."""
    return Evidence(jnp.zeros((2,), jnp.float32), jnp.zeros((2, 2), jnp.float32))


def slopes(logits: Array, scores: Array, ids: Array, factor: Array) -> Slopes:
    """Differentiate the logarithms of the shares that entries have of all.

    Args:
      logits: `[..., V]`, the drafter's.
      scores: `[..., V]`, their multiple by `factor`, with noise: by shares of the
        softmax of these.
      ids: `[..., E] int32`, entries.
      factor: scalar, sharpness / tau.

    Returns:
      `[..., E]` each.
    """
    shares = jnp.exp(scores - sampling.log_sum_exp(scores)[..., None])

    def above_mean(x):
        own = jnp.take_along_axis(x, ids, axis=-1)
        # From the first entry on: of large numbers the difference would be rounded.
        first = own[..., :1]
        mean = jnp.sum(shares * (x - first), axis=-1, keepdims=True)
        return (own - first) - mean

    return Slopes(-above_mean(scores), factor * above_mean(logits))


def evidence(
    found: candidates_lib.Candidates, slopes: Slopes, drawn: Array, counts: Array
) -> Evidence:
    """Ask the tokens drawn in a step how true the chances of its candidates were.

    Those whose parent came true are asked, with room in the tree or without. See
    `candidates.came_true` for the arguments; the slopes are `[B, C]`.
    """
    accepted, had_chance = candidates_lib.came_true(found, drawn, counts)
    chances = candidates_lib.chances(found)
    off = jnp.where(had_chance, accepted - chances, 0.0)
    both = jnp.stack([slopes.by_tau, slopes.by_sharpness])
    both = jnp.where(had_chance, chances * both, 0.0)
    return Evidence(
        pull=jnp.sum(both * off, axis=(1, 2)),
        weight=jnp.sum(both[:, None] * both, axis=(2, 3)),
    )


class Calibration:
    """Tau and sharpness of the drafter that an engine has.

    Each engine has its own, of its own calls alone: which of several engines decodes
    first changes nothing.
    """

    def __init__(self):
        """Begin with no drafter's numbers."""
        self._version: int | None = None
        self._measured: list[float] = []
        # Logarithms of tau and sharpness: as the run, or the version, began; in use.
        self._first, self._logs = np.zeros(2), np.zeros(2)
        # Of all that was verified, what it weighs; of the run's, sums of slopes times
        # what is to be explained by logarithms other than the first ones.
        self._weight, self._pull = np.zeros((2, 2)), np.zeros(2)
        self._of_engines: list[Calibration] = []

    def for_engine(self) -> "Calibration":
        """Return that of one more engine, whose state is part of this one's."""
        self._of_engines.append(Calibration())
        return self._of_engines[-1]

    @property
    def tau(self) -> np.float32:
        """Temperature of the coupled score."""
        return np.float32(np.exp(self._logs[0]))

    @property
    def sharpness(self) -> np.float32:
        """What the drafter's log-probabilities count for beside the noise."""
        return np.float32(np.exp(self._logs[1]))

    def begin(self, version: int, tau: float, sharpness: float) -> None:
        """Begin with a version of the drafter, if it is another one.

        The numbers are its own, as measured; where they are those of the version
        before, it was not measured anew, and what was learned of that one is kept.
        """
        measured = [float(tau), float(sharpness)]
        if version == self._version and measured == self._measured:
            return
        if measured != self._measured:
            self._logs = np.log(measured)
        self._version, self._measured = version, measured
        self._first = self._logs.copy()
        self._weight, self._pull = np.zeros((2, 2)), np.zeros(2)

    def begin_run(self) -> None:
        """Take up both numbers, and let what they were learned from count less."""
        weight = np.diag(_PRIOR) + self._weight
        best = self._first + np.linalg.solve(weight, self._pull)
        for which in range(2):
            self._move(which, best[which])
        self._first = self._logs.copy()
        self._weight, self._pull = _KEPT * self._weight, np.zeros(2)

    def record(self, seen: Evidence) -> None:
        """Learn from a decode call, and take up a tau; a broken drafter says none."""
        pull, weight = (np.asarray(x, np.float64) for x in (seen.pull, seen.weight))
        if not (np.all(np.isfinite(pull)) and np.all(np.isfinite(weight))):
            return
        # What the chances lacked says how far from the numbers that gave them.
        off = self._logs - self._first
        self._weight = self._weight + weight
        self._pull = self._pull + pull + weight @ off
        # The best one beside the sharpness in use.
        rest = self._pull[0] - self._weight[0, 1] * off[1]
        rest /= _PRIOR[0] + self._weight[0, 0]
        self._move(0, self._first[0] + rest)

    def _move(self, which: int, best: float) -> None:
        """Bring a logarithm to its best value, or part of the way there."""
        step = np.clip(best - self._logs[which], -_MOST_STEP, _MOST_STEP)
        self._logs[which] = np.clip(self._logs[which] + step, *_BOUNDS[:, which])

    def state(self) -> dict[str, Any]:
        """Return all that was learned, as JSON has it."""
        arrays = self._first, self._logs, self._weight, self._pull
        return {
            "version": self._version,
            "measured": list(self._measured),
            "numbers": [x.tolist() for x in arrays],
            "engines": [own.state() for own in self._of_engines],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a `state()`; engines that it knows nothing of begin anew."""
        self._version, self._measured = state["version"], list(state["measured"])
        self._first, self._logs, self._weight, self._pull = map(
            np.array, state["numbers"]
        )
        for own, told in zip(self._of_engines, state["engines"], strict=False):
            own.restore(told)
