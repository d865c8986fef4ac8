"""Our tuner: expected tokens of a step by its expected seconds."""

import dataclasses
import math
from typing import Any

from tlt_jax.specdec import strategy as strategy_lib
from tlt_jax.specdec.tuners import step_times, survival, tuner

Strategy = strategy_lib.Strategy


@dataclasses.dataclass(frozen=True)
class CostModelConfig:
    """How the cost model learns.

    Attributes:
      optimism: of acceptance, in standard deviations; 0: takes estimates as they are.
      time_optimism: of seconds, the same.
      time_spread: relative standard deviation of a call's seconds per step, until it
        can be measured.
      time_misfit: of a kind's seconds from what others let expect, the same.
      memory: row-steps that evidence on acceptance counts for at most.
      shared_weight: row-steps that all buckets' acceptance counts for in each.
      window: calls of a kind kept for its seconds.
      target_discount: what evidence on acceptance is worth after the target changed.
      drafter_discount: the same after the drafter changed.
    """

    optimism: float = 0.1
    time_optimism: float = 0.25
    time_spread: float = 0.12
    time_misfit: float = 0.15
    memory: float = 200.0
    shared_weight: float = 20.0
    window: int = 15
    target_discount: float = 0.7
    drafter_discount: float = 0.1

    def __post_init__(self):
        for name in ("target_discount", "drafter_discount"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}: give 0 to 1.")
        for name in ("time_spread", "time_misfit"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(
                    f"{name}={getattr(self, name)}: give more than 0, less than 1."
                )
        for name in ("optimism", "time_optimism", "shared_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: give 0 or more.")
        for name in ("memory", "window"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: give 1 or more.")


class CostModel(tuner.Tuner):
    """Chooses the strategy with the most tokens per second that may be hoped for.

    Per row an arm yields `accept length / seconds of a step`; plain decoding is an arm
    of accept length 1. Accept lengths are read from one curve by depth and by nodes for
    each row alive, of which every call tells (`survival`), seconds come from the arm's
    own in the bucket, or from a law of all where there are none (`step_times`). Either
    enters with the optimism that its evidence leaves room for. So an untried arm is
    tried only if it may be the best, and a tried one is tried again only while its
    doubt exceeds its distance from the best: what it is worth is learned within a
    bounded number of calls, and exploring ends until `changed` discounts what is known
    of acceptance. Nothing is random.

    Two calls are owed whatever is hoped for. Plain decoding is the first call in each
    bucket: what speculation is measured against shall be no guess. And it tells nothing
    of the drafter, so after an update of that one call asks it, even if it was of no
    use before.

    Reference: Auer, Cesa-Bianchi and Fischer, Finite-time Analysis of the Multiarmed
    Bandit Problem, 2002 (upper confidence bounds; here without the term that grows with
    time).
    """

    NAME = "cost_model"

    def __init__(
        self,
        arms: strategy_lib.Arms,
        *,
        max_rows: int,
        cfg: CostModelConfig | None = None,
    ):
        """Begin with nothing tried.

        Raises:
          ValueError: `max_rows` is not positive.
        """
        if max_rows < 1:
            raise ValueError(f"max_rows={max_rows}: an engine has at least one row.")
        self._arms, self._max_rows = arms, max_rows
        self._cfg = cfg or CostModelConfig()
        self.survival = survival.Survival(
            memory=self._cfg.memory, shared_weight=self._cfg.shared_weight
        )
        self.step_times = step_times.StepTimes(
            self._cfg.window, self._cfg.time_spread, self._cfg.time_misfit
        )
        # Whether the drafter was asked since its last update.
        self._asked = True

    def strategies(self, num_rows: int) -> tuple[Strategy | None, ...]:
        return *self._arms.of(num_rows), None

    def choose(self, num_rows: int) -> Strategy | None:
        arms = self.strategies(num_rows)
        bucket = tuner.bucket_of(num_rows, self._max_rows)
        if not self.step_times.tried(bucket, None):
            return None
        if not self._asked:
            arms = tuple(s for s in arms if s is not None and s.drafts) or arms
        if len(arms) == 1:
            return arms[0]
        return max(arms, key=lambda strategy: self.speed(num_rows, strategy))

    def speed(self, num_rows: int, strategy: Strategy | None) -> float:
        """Return the tokens per second of a row that may be hoped for."""
        tokens, bucket = 1.0, tuner.bucket_of(num_rows, self._max_rows)
        if strategy is not None:
            optimism = self._cfg.optimism
            tokens = self.survival.accept_length(strategy, optimism, bucket, num_rows)
        seconds, doubt = self.step_times.estimate(bucket, strategy)
        return tokens / (seconds * math.exp(-self._cfg.time_optimism * doubt))

    def record(self, call: tuner.Call) -> None:
        if not call.num_steps or call.elapsed_s <= 0:
            return
        step_s = call.elapsed_s / call.num_steps
        self.step_times.add(call.bucket, call.strategy, step_s)
        if call.strategy is not None:
            self.survival.add(call)
            self._asked |= call.strategy.drafts

    def changed(self, what: tuner.Updated) -> None:
        """Discount what is known of acceptance; seconds stay as they are."""
        if what == "target":
            self.survival.discount(self._cfg.target_discount)
        else:
            self.survival.discount(self._cfg.drafter_discount, drafted_only=True)
            self._asked = False

    def state(self) -> dict[str, Any]:
        return super().state() | {
            "asked": self._asked,
            "accepted": self.survival.state(),
            "step_times": self.step_times.state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        super().restore(state)
        self._asked = bool(state["asked"])
        # An older version did not learn acceptance by room: it is learned anew.
        self.survival.restore(state.get("accepted", []))
        self.step_times.restore(state["step_times"])
