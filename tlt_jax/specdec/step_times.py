"""What a step costs by batch bucket and strategy, tried or not."""

import collections
import dataclasses
import math
import statistics
from typing import Any

from tlt_jax.specdec import strategy as strategy_lib

Strategy = strategy_lib.Strategy
Kind = tuple[int, Strategy | None]

# Of a step by itself, a verified token of a row, a level drafted: what matters is
# their proportion, and only until there are measurements.
_PRIOR = (1.0, 0.02, 0.05)
# Relative standard deviation of each of these.
_PRIOR_SPREAD = 1.0
# Calls that a kind counts for at most in the law.
_MOST_CALLS = 4
_SWEEPS = 40
# Least coefficient, of the prior: nothing is for nothing.
_LEAST = 0.01


def features(bucket: int, strategy: Strategy | None) -> tuple[float, float, float]:
    """Return what a step's cost is linear in, roughly: 1, tokens verified, levels."""
    if strategy is None:
        return 1.0, float(bucket), 0.0
    levels = strategy.draft_depth if strategy.drafts else 0
    return 1.0, float(bucket * strategy.tokens_to_verify), float(levels)


@dataclasses.dataclass(frozen=True)
class _Law:
    """Seconds are linear in `features`: posterior of the coefficients.

    Attributes:
      mean: positive.
      covariance: of the coefficients, without that bound.
    """

    mean: tuple[float, ...]
    covariance: tuple[tuple[float, ...], ...]

    def seconds(self, x: tuple[float, ...]) -> float:
        return math.fsum(c * f for c, f in zip(self.mean, x, strict=True))

    def spread(self, x: tuple[float, ...]) -> float:
        """Return the relative standard deviation of `seconds`."""
        rows = zip(x, self.covariance, strict=True)
        variance = sum(
            f * math.fsum(c * g for c, g in zip(row, x, strict=True)) for f, row in rows
        )
        return math.sqrt(max(variance, 0.0)) / self.seconds(x)


class StepTimes:
    """Running estimates of a step's seconds for each (bucket, strategy).

    Tried kinds have the median of their last calls: single slow calls do not move it. A
    kind that is untried is predicted by a linear law of all that were tried (ridge
    regression of relative errors), with coefficients that are positive, so that
    neither more tokens nor more levels nor more rows seem cheaper. Up to the second
    call of a kind its prediction from the others stands among its calls as one more,
    the lower middle of which is taken: a first call that something else delayed does
    not condemn it.
    """

    def __init__(self, window: int = 15, spread: float = 0.12, misfit: float = 0.3):
        """Begin with nothing tried.

        Args:
          window: calls of a kind that are kept.
          spread: relative standard deviation of a call.
          misfit: of what is tried from the law, the same.
        """
        self._window, self._spread, self._misfit = window, spread, misfit
        self._seconds: dict[Kind, collections.deque[float]] = {}
        self._estimates: dict[Kind, float] = {}
        self._law: _Law | None = None

    def add(self, bucket: int, strategy: Strategy | None, step_s: float) -> None:
        """Add a call's seconds per step."""
        assert step_s > 0, step_s
        kind = bucket, strategy
        if kind not in self._seconds:
            self._seconds[kind] = collections.deque(maxlen=self._window)
        self._seconds[kind].append(step_s)
        self._estimates.clear()
        self._law = None

    def doubt(self, bucket: int, strategy: Strategy | None) -> float:
        """Return the relative standard deviation of an estimate.

        It falls with the square root of a kind's calls; of untried kinds it is large
        where the law is asked for what no call has told of.
        """
        calls = len(self._seconds.get((bucket, strategy), ()))
        if calls:
            return self._spread / math.sqrt(calls)
        return math.hypot(
            self._misfit, self._fitted().spread(features(bucket, strategy))
        )

    def tried(self, bucket: int, strategy: Strategy | None) -> bool:
        """Say whether there was any call of a kind."""
        return (bucket, strategy) in self._seconds

    def estimate(self, bucket: int, strategy: Strategy | None) -> float:
        """Return a step's seconds; before any call at all, in arbitrary units."""
        kind = bucket, strategy
        if kind not in self._estimates:
            calls = list(self._seconds.get(kind, ()))
            if len(calls) < 3:
                # Not from its own calls, which are in doubt.
                law = self._fitted() if not calls else self._fit(without=kind)
                calls.append(law.seconds(features(*kind)))
            self._estimates[kind] = statistics.median_low(calls)
        return self._estimates[kind]

    def _fitted(self) -> _Law:
        if self._law is None:
            self._law = self._fit(without=None)
        return self._law

    def _fit(self, without: Kind | None) -> _Law:
        tried = [
            (features(*kind), statistics.median_low(calls), len(calls))
            for kind, calls in self._seconds.items()
            if kind != without
        ]
        # The only kind tried may be slow or not: nothing says which.
        return _fit(tried, self._spread) if tried or not without else self._fitted()

    def state(self) -> list[Any]:
        """Return the calls kept, as JSON has them."""
        return [
            [bucket, None if strategy is None else str(strategy), list(calls)]
            for (bucket, strategy), calls in self._seconds.items()
        ]

    def restore(self, state: list[Any]) -> None:
        """Go on from a `state()`."""
        self._seconds = {
            (bucket, text and strategy_lib.parse(text)): collections.deque(
                calls, maxlen=self._window
            )
            for bucket, text, calls in state
        }
        self._estimates, self._law = {}, None


def _fit(tried: list[tuple[tuple[float, ...], float, int]], spread: float) -> _Law:
    """Fit the law to (features, seconds, calls), by relative errors."""

    def proportion(x):
        return math.fsum(c * f for c, f in zip(_PRIOR, x, strict=True))

    scale = statistics.median([s / proportion(x) for x, s, _ in tried] or [1.0])
    prior = [scale * c for c in _PRIOR]
    size = range(len(prior))
    # In units of the prior, u: minimise |A u - 1|^2 + ridge |u - 1|^2 over u >= least.
    ridge = (spread / _PRIOR_SPREAD) ** 2
    gram = [[ridge * (i == j) for j in size] for i in size]
    right = [ridge for _ in size]
    for x, seconds, calls in tried:
        weight = min(calls, _MOST_CALLS)
        row = [x[i] * prior[i] / seconds for i in size]
        for i in size:
            right[i] += weight * row[i]
            for j in size:
                gram[i][j] += weight * row[i] * row[j]
    inverse = _inverse(gram)
    units = [math.fsum(inverse[i][j] * right[j] for j in size) for i in size]
    if min(units) < _LEAST:
        units = [max(u, _LEAST) for u in units]
        for _ in range(_SWEEPS):
            for i in size:
                rest = math.fsum(gram[i][j] * units[j] for j in size if j != i)
                units[i] = max(_LEAST, (right[i] - rest) / gram[i][i])
    covariance = tuple(
        tuple(spread**2 * inverse[i][j] * prior[i] * prior[j] for j in size)
        for i in size
    )
    return _Law(tuple(u * c for u, c in zip(units, prior, strict=True)), covariance)


def _inverse(a: list[list[float]]) -> list[list[float]]:
    """Invert a symmetric matrix of three rows, by its cofactors."""
    minors = [
        [
            a[(j + 1) % 3][(i + 1) % 3] * a[(j + 2) % 3][(i + 2) % 3]
            - a[(j + 1) % 3][(i + 2) % 3] * a[(j + 2) % 3][(i + 1) % 3]
            for j in range(3)
        ]
        for i in range(3)
    ]
    determinant = math.fsum(a[0][i] * minors[i][0] for i in range(3))
    return [[m / determinant for m in row] for row in minors]
