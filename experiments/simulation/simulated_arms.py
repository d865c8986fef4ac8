"""Machines, texts and drifts made up, against which tuners are replayed.

A row's drafts are accepted with a chance that falls with depth, differs between rows
and drifts: every update of the target takes some of it, every update of the drafter
brings it back towards the best that the drafter can reach, and once in a run the target
changes so much that the drafter is nearly worthless again. Lengths have a long tail, so
that the batch drains at the end of each rollout.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from experiments.simulation import arm_replay
from tlt_jax.rl.engine import scheduler
from tlt_jax.specdec import strategy as strategy_lib


@dataclasses.dataclass(frozen=True)
class Costs:
    """Seconds of a step: `base + token * max(tokens, free) + level * depth`.

    Tokens are those verified, over all rows; `free_tokens` cost as much as one: what
    memory bandwidth hides. `noise` is the relative standard deviation of a call's
    seconds; something delays `slow_frac` of the calls, twofold.
    """

    base_s: float
    token_s: float
    free_tokens: int
    level_s: float
    noise: float = 0.06
    slow_frac: float = 0.03

    def step_s(self, bucket: int, strategy: strategy_lib.Strategy | None) -> float:
        """Returns a step's seconds."""
        verified = strategy.tokens_to_verify if strategy else 1
        depth = strategy.draft_depth if strategy else 0
        tokens = max(bucket * verified, self.free_tokens)
        return self.base_s + self.token_s * tokens + self.level_s * depth

    def draw(
        self, bucket: int, strategy: strategy_lib.Strategy | None, rng
    ) -> tuple[float, ...]:
        """Draws seconds of calls."""
        factors = np.exp(self.noise * rng.normal(size=200))
        factors *= np.where(rng.random(200) < self.slow_frac, 2.0, 1.0)
        return tuple(self.step_s(bucket, strategy) * factors)


# About what SmolLM2-135M takes on two cores (results/cpu/speculation_speed.csv).
CPU = Costs(base_s=0.022, token_s=0.0006, free_tokens=1, level_s=0.0013)
# The shape of an accelerator: many tokens for the price of one, drafting bound by
# latency.
ACCELERATOR = Costs(base_s=0.010, token_s=2e-5, free_tokens=128, level_s=0.0006)


@dataclasses.dataclass(frozen=True)
class Drift:
    """Chance of acceptance at the first level, over a run.

    From `start`, an update of the drafter covers `learned` of the distance to `best`,
    and one of the target takes `lost`; at the part `shock_frac` of the run the target
    changes much, and it starts again. `level_decay` is a factor on the chance with each
    level, `row_spread` the standard deviation between rows.
    """

    start: float = 0.25
    best: float = 0.88
    learned: float = 0.25
    lost: float = 0.02
    shock_frac: float = 0.6
    level_decay: float = 0.985
    row_spread: float = 0.06

    def chances(self, num_rollouts: int) -> list[float]:
        """Returns the chance in each rollout."""
        chance, found = self.start, []
        for number in range(num_rollouts):
            if number == int(self.shock_frac * num_rollouts):
                chance = self.start
            found.append(chance)
            chance += self.learned * (self.best - chance) - self.lost
        return found


def machine(costs: Costs, arms: strategy_lib.Arms, seed: int) -> arm_replay.Machine:
    """Makes up what was observed of each arm at each bucket."""
    rng = np.random.default_rng((seed, 1))
    max_rows = arms.entries[-1][0]
    kinds = [
        (bucket, strategy)
        for bucket in scheduler.buckets(max_rows)
        for strategy in (None, *arms.strategies())
    ]
    step_s = {kind: costs.draw(*kind, rng) for kind in kinds}
    return arm_replay.Machine(step_s, arms, max_rows)


def rollouts(
    drift: Drift,
    *,
    num_rollouts: int,
    num_texts: int,
    median_tokens: int,
    max_tokens: int,
    max_levels: int,
    seed: int,
) -> Sequence[arm_replay.Rollout]:
    """Makes up rollouts with long-tailed lengths."""
    rng = np.random.default_rng((seed, 2))
    made = []
    for number, chance in enumerate(drift.chances(num_rollouts)):
        lengths = median_tokens * np.exp(0.9 * rng.normal(size=num_texts))
        lengths = np.clip(lengths, 4, max_tokens).astype(int)
        texts = []
        for length in lengths:
            here = np.clip(chance + drift.row_spread * rng.normal(), 0.02, 0.98)
            levels = here * drift.level_decay ** np.arange(max_levels)
            hits = rng.random((length, max_levels)) < levels
            lifetimes = np.cumprod(hits, axis=1).sum(axis=1)
            texts.append(arm_replay.Text(lifetimes))
        changed = ("target", "drafter") if number else ()
        made.append(arm_replay.Rollout(tuple(texts), changed))
    return made
