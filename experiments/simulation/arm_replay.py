"""Rollouts replayed from texts and step times: what any tuner would have cost.

A text is, for each number of tokens already drawn, how many drafted tokens a chain
would have had accepted from there: so what any chain yields, wherever its steps begin,
is known, and not estimated. Together with the seconds of a step under every arm a
decode call under any arm can be computed from any state. The rows' texts do not depend
on what was chosen, so rollouts under different tuners are the same work.

Chains only: of trees it would have to be known which of their nodes were right.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import numpy as np

from tlt_jax.rl.engine import scheduler
from tlt_jax.specdec import strategy as strategy_lib
from tlt_jax.specdec.tuners import tuner as tuner_lib

Strategy = strategy_lib.Strategy
Kind = tuple[int, Strategy | None]


class Text:
    """A row's completion."""

    def __init__(self, lifetimes: np.ndarray):
        """Holds `[n] int`: accepted drafts of a long chain begun after i tokens."""
        self.lifetimes = [int(x) for x in lifetimes]
        self._sums: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.lifetimes)

    def accept_length(self, depth: int, start: int, stop: int) -> float:
        """Mean tokens of a step of `depth` levels over the bases in a stretch."""
        if depth not in self._sums:
            yields = 1 + np.minimum(self.lifetimes, depth)
            self._sums[depth] = np.concatenate([[0], np.cumsum(yields)])
        sums = self._sums[depth]
        stop = min(stop, len(self))
        return float(sums[stop] - sums[start]) / (stop - start)


@dataclasses.dataclass(frozen=True)
class Rollout:
    """One RL step's texts, in order of their starts, and what was updated before."""

    texts: tuple[Text, ...]
    changed: tuple[tuner_lib.Updated, ...] = ()


@dataclasses.dataclass(frozen=True)
class Machine:
    """Seconds of a step in each observed call of a kind, and the engine's sizes.

    `max_rows` are decoded at once, `tokens_per_call` are of a row.
    """

    step_s: dict[Kind, tuple[float, ...]]
    arms: strategy_lib.Arms
    max_rows: int
    tokens_per_call: int = 32

    @functools.cached_property
    def typical_s(self) -> dict[Kind, float]:
        """Seconds of a step by kind: the median."""
        return {kind: float(np.median(calls)) for kind, calls in self.step_s.items()}

    def choices(self, num_rows: int) -> tuple[Strategy | None, ...]:
        """All that an oracle may choose from."""
        return *self.arms.of(num_rows), None


@dataclasses.dataclass(frozen=True)
class Choice:
    """A decode call of a rollout, as the tuner was told it, beside the oracle's arm.

    It takes `seconds` typically (`call.elapsed_s` has the noise); the oracle's arm
    would have saved `regret_s` of them.
    """

    rollout: int
    call: tuner_lib.Call
    seconds: float
    regret_s: float
    best: Strategy | None


class _Row:
    def __init__(self, text: Text):
        self.text, self.position = text, 0

    @property
    def remaining(self) -> int:
        return len(self.text) - self.position


def replay(
    machine: Machine,
    rollouts: Sequence[Rollout],
    tuner: tuner_lib.Tuner | None,
    seed: int,
) -> Iterator[Choice]:
    """Runs rollouts under a tuner; yields their decode calls.

    The oracle of a call knows what every arm yields on the stretch of text ahead of
    each row (the mean over all bases of the next `tokens_per_call` tokens, so the luck
    of where steps begin is nobody's merit) and what steps typically take; it chooses
    the most tokens per second. The regret of a call is the part of its typical seconds
    that the oracle's arm would have saved on the same tokens.

    Without a tuner the oracle chooses. The seed is of the noise of times, which does
    not enter regrets.
    """
    rng = np.random.default_rng(seed)
    for number, rollout in enumerate(rollouts):
        if tuner is not None:
            for what in rollout.changed:
                tuner.changed(what)
        waiting = list(reversed(rollout.texts))
        rows: list[_Row] = []
        while waiting or rows:
            while waiting and len(rows) < machine.max_rows:
                rows.append(_Row(waiting.pop()))
            speeds = _speeds(machine, rows)
            best = max(speeds, key=speeds.get)
            chosen = best if tuner is None else tuner.choose(len(rows))
            bucket = tuner_lib.bucket_of(len(rows), machine.max_rows)
            quota = scheduler.finish_quota(len(rows), len(waiting), machine.max_rows)
            num_rows = len(rows)
            steps, tokens, accepted = decode(
                rows, chosen, machine.tokens_per_call, quota
            )
            observed = machine.step_s[bucket, chosen]
            noisy_s = steps * observed[rng.integers(len(observed))]
            seconds = steps * machine.typical_s[bucket, chosen]
            call = tuner_lib.Call(
                num_rows, bucket, chosen, noisy_s, steps, tokens, accepted
            )
            if tuner is not None:
                tuner.record(call)
            regret_s = seconds * (1 - speeds[chosen] / speeds[best])
            yield Choice(number, call, seconds, regret_s, best)
            rows = [row for row in rows if row.remaining]


def _speeds(machine: Machine, rows: list[_Row]) -> dict[Strategy | None, float]:
    """Tokens per second of every arm on what lies ahead of the rows."""
    bucket = tuner_lib.bucket_of(len(rows), machine.max_rows)
    speeds = {}
    for arm in machine.choices(len(rows)):
        depth = arm.draft_depth if arm else 0
        tokens = sum(
            row.text.accept_length(
                depth, row.position, row.position + machine.tokens_per_call
            )
            for row in rows
        )
        speeds[arm] = tokens / machine.typical_s[bucket, arm]
    return speeds


def decode(
    rows: Sequence[_Row], chosen: Strategy | None, limit: int, quota: int
) -> tuple[int, int, tuple[int, ...]]:
    """Advances the rows by one decode call, as `speculate.run` would.

    It ends once a row has `limit` tokens or `quota` rows have finished. Returns steps,
    tokens kept, and `num_accepted` as of `tuner.Call`. Drafts behind the end of a text
    are not counted as accepted: what they are is not known.
    """
    depth = chosen.draft_depth if chosen else 0
    counts = [0] * len(rows)
    lived = [0] * (depth + 1)
    steps = finished = 0
    while max(counts) < limit and finished < quota:
        steps += 1
        for i, row in enumerate(rows):
            left = row.remaining - counts[i]
            if not left:
                continue
            survived = min(row.text.lifetimes[row.position + counts[i]], depth)
            lived[survived] += 1
            taken = min(survived + 1, left, limit - counts[i])
            counts[i] += taken
            finished += taken == left
    for row, count in zip(rows, counts, strict=True):
        row.position += count
    accepted = tuple(int(n) for n in np.cumsum(lived[::-1])[::-1]) if chosen else ()
    return steps, sum(counts), accepted
