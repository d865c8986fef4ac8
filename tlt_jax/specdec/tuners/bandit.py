"""BEG-MAB: the bucketed epsilon-greedy bandit of the system's paper."""

import collections
import statistics
from typing import Any

import numpy as np

from tlt_jax.specdec import strategy as strategy_lib
from tlt_jax.specdec.tuners import tuner

Strategy = strategy_lib.Strategy


class BegMab(tuner.Tuner):
    """An epsilon-greedy bandit per bucket over medians of recent rewards.

    The reward of a call is `accept_length * rows / seconds of a step`, tokens per
    second. Within a bucket an arm is drawn uniformly with probability `epsilon`; else
    the one with the largest median of its last `window` rewards is taken, the first of
    several; an untried arm counts as plus infinity. An arm's first reward is kept as it
    is. A bucket of one arm has no choice, and beyond the last bucket decoding is plain.

    The paper's buckets group arms by `tokens_to_verify`. Chains of different depth
    never share a group there, since a chain verifies all it drafts; so buckets are
    given as they are, and an arm in several has rewards in each. Old rewards leave by
    the window alone, whatever changed.

    Reference: the system's paper, section 5, algorithm BEG-MAB (epsilon 0.1 and window
    300 in its release).
    """

    NAME = "beg_mab"

    def __init__(
        self,
        arms: strategy_lib.Arms,
        *,
        seed: int,
        epsilon: float = 0.1,
        window: int = 300,
    ):
        """Begin with all arms untried.

        Raises:
          ValueError: `epsilon` or `window` is out of range.
        """
        if not 0 <= epsilon <= 1:
            raise ValueError(f"epsilon={epsilon} is no probability: give 0 to 1.")
        if window < 1:
            raise ValueError(f"window={window} keeps no reward: give at least 1.")
        self._arms, self._epsilon, self._window = arms, epsilon, window
        self._random = np.random.Generator(np.random.PCG64(seed))
        # Rewards and accept lengths by bucket and arm.
        self._rewards = self._empty()
        self._accept_lengths = self._empty()

    def _empty(self) -> dict[tuple[int, Strategy], collections.deque[float]]:
        return {
            (bucket, strategy): collections.deque(maxlen=self._window)
            for bucket, (_, strategies) in enumerate(self._arms.entries)
            for strategy in strategies
        }

    def strategies(self, num_rows: int) -> tuple[Strategy | None, ...]:
        return self._arms.of(num_rows) or (None,)

    def choose(self, num_rows: int) -> Strategy | None:
        bucket = self._arms.entry_of(num_rows)
        if bucket is None:
            return None
        group = self._arms.entries[bucket][1]
        if len(group) == 1:
            return group[0]
        if self._random.random() < self._epsilon:
            return group[self._random.integers(len(group))]

        def median(strategy):
            rewards = self._rewards[bucket, strategy]
            return statistics.median(rewards) if rewards else float("inf")

        return max(group, key=median)

    def record(self, call: tuner.Call) -> None:
        """Keep the reward of a speculative call.

        Over the call's row-steps, accepted tokens and the bonus of each, by its
        seconds: for a call of one step this is the paper's `a * b / elapsed`.

        Raises:
          ValueError: the strategy is no arm at that many rows.
        """
        if call.strategy is None or not call.speculated:
            return
        arm = self._arms.entry_of(call.num_rows), call.strategy
        if arm not in self._rewards:
            raise ValueError(
                f"strategy {call.strategy} is no arm at num_rows={call.num_rows}: "
                "record calls that this tuner chose."
            )
        self._accept_lengths[arm].append(call.accept_length)
        self._rewards[arm].append(sum(call.num_accepted) / call.elapsed_s)

    def state(self) -> dict[str, Any]:
        return super().state() | {
            "random": self._random.bit_generator.state,
            "arms": [
                [
                    self._arms.entries[bucket][0],
                    str(strategy),
                    list(self._rewards[bucket, strategy]),
                    list(self._accept_lengths[bucket, strategy]),
                ]
                for bucket, strategy in self._rewards
            ],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a state; arms that are no longer there are forgotten."""
        super().restore(state)
        self._random.bit_generator.state = state["random"]
        self._rewards, self._accept_lengths = self._empty(), self._empty()
        buckets = {limit: i for i, (limit, _) in enumerate(self._arms.entries)}
        for limit, text, rewards, lengths in state["arms"]:
            arm = buckets.get(limit), strategy_lib.parse(text)
            if arm in self._rewards:
                self._rewards[arm].extend(rewards)
                self._accept_lengths[arm].extend(lengths)
