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
# Calls of a kind beyond which the law has no say.
_LAW_CALLS = 10
# Calls of kinds with three or more of them, from which noise can be told.
_ENOUGH_CALLS = 12
# Least coefficient, of the prior: nothing is for nothing.
_LEAST = 0.01


def features(bucket: int, strategy: Strategy | None) -> tuple[float, float, float]:
    """Return what a step's cost is linear in, roughly: 1, tokens verified, levels."""
    if strategy is None:
        return 1.0, float(bucket), 0.0
    levels = strategy.draft_depth if strategy.drafts else 0
    return 1.0, float(strategy.num_columns(bucket)), float(levels)


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

    A kind has the median of its last calls, which single slow calls do not move, and
    what the other kinds let expect: a linear law of all that were tried (ridge
    regression of relative errors) with positive coefficients, so that neither more
    tokens nor more levels nor more rows seem cheaper. Each counts by its precision, so
    untried kinds have the law's word, and the noisier the calls are the more it weighs,
    until a kind has calls enough. The noise is measured. Up to the second call of a
    kind the law's word stands among its calls, too, the lower middle of which is taken:
    a first call that something else delayed does not condemn it.
    """

    def __init__(self, window: int = 15, spread: float = 0.12, misfit: float = 0.15):
        """Begin with nothing tried; see `CostModelConfig` for the arguments."""
        self._window, self._prior_spread, self._misfit = window, spread, misfit
        self._seconds: dict[Kind, collections.deque[float]] = {}
        self._medians: dict[Kind, float] = {}
        self._forget()

    def _forget(self) -> None:
        """Drop what follows from the calls."""
        self._estimates: dict[Kind, tuple[float, float]] = {}
        self._laws: dict[Kind | None, _Law] = {}
        self._spread: float | None = None

    def add(self, bucket: int, strategy: Strategy | None, step_s: float) -> None:
        """Add a call's seconds per step."""
        assert step_s > 0, step_s
        kind = bucket, strategy
        calls = self._seconds.setdefault(kind, collections.deque(maxlen=self._window))
        calls.append(step_s)
        self._medians[kind] = statistics.median_low(calls)
        self._forget()

    def tried(self, bucket: int, strategy: Strategy | None) -> bool:
        """Say whether there was any call of a kind."""
        return (bucket, strategy) in self._seconds

    def estimate(self, bucket: int, strategy: Strategy | None) -> tuple[float, float]:
        """Return a step's seconds, and their relative standard deviation.

        Before any call at all the seconds are in arbitrary units.
        """
        kind = bucket, strategy
        if kind not in self._estimates:
            self._estimates[kind] = self._estimate(kind)
        return self._estimates[kind]

    def _estimate(self, kind: Kind) -> tuple[float, float]:
        calls = list(self._seconds.get(kind, ()))
        if len(calls) > _LAW_CALLS:
            return self._medians[kind], self.spread() / math.sqrt(len(calls))
        few = 0 < len(calls) < 3 and len(self._seconds) > 1
        # Of few calls the law is not made: they are in doubt.
        law = self._law(without=kind if few else None)
        expected_s = law.seconds(features(*kind))
        doubt = math.hypot(self._misfit, law.spread(features(*kind)))
        if not calls:
            return expected_s, doubt
        own_s = statistics.median_low(calls + [expected_s] if few else calls)
        own_weight = len(calls) / self.spread() ** 2
        weight = doubt**-2
        total = own_weight + weight
        log_s = own_weight * math.log(own_s) + weight * math.log(expected_s)
        return math.exp(log_s / total), total**-0.5

    def spread(self) -> float:
        """Return the relative standard deviation of a call, robustly."""
        if self._spread is None:
            errors = [
                abs(s / self._medians[kind] - 1)
                for kind, calls in self._seconds.items()
                if len(calls) > 2
                for s in calls
            ]
            self._spread = self._prior_spread
            if len(errors) >= _ENOUGH_CALLS:
                # Three in four absolute errors are below 1.15 standard deviations.
                measured = sorted(errors)[3 * len(errors) // 4] / 1.15
                self._spread = min(max(measured, 0.02), 1.0)
        return self._spread

    def _law(self, without: Kind | None) -> _Law:
        if without not in self._laws:
            tried = [
                (features(*kind), self._medians[kind], len(calls))
                for kind, calls in self._seconds.items()
                if kind != without
            ]
            self._laws[without] = _fit(tried, self.spread())
        return self._laws[without]

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
        self._medians = {
            kind: statistics.median_low(calls) for kind, calls in self._seconds.items()
        }
        self._forget()


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
