"""How deep drafted paths are accepted, from all calls of every depth at once."""

import math
from collections.abc import Sequence
from typing import Any

from tlt_jax.specdec import strategy as strategy_lib

Strategy = strategy_lib.Strategy
Family = tuple[str, int, int]


def family_of(strategy: Strategy) -> Family:
    """Return what strategies share whose steps score each other's levels.

    The first levels of a deep chain are a shallower chain: chains of one proposer are
    one family. A tree keeps the best `tokens_to_verify` nodes of all its levels, so
    trees share where `topk` and `tokens_to_verify` are equal; there a deeper one has
    given a few shallow nodes away, which is neglected.
    """
    size = strategy.tokens_to_verify if strategy.topk > 1 else 0
    return strategy.proposer, strategy.topk, size


class Survival:
    """Running estimates of the chance of acceptance at each depth.

    A step whose tree is D levels deep tells of every depth d <= D whether d drafted
    tokens were accepted, so one call scores all shallower strategies of its family, and
    says nothing of what lies below D: a lifetime that is censored at D. With `n[d]`
    row-steps that had d - 1 tokens accepted and drafted on, and `k[d]` of them that had
    d, the hazard is `k[d] / n[d]` whatever depths the calls had, and

        accept length of depth D = 1 + sum over d = 1..D of k[1]/n[1] * .. * k[d]/n[d].

    Where nothing was seen a depth has the hazard of the one above it, and there is a
    family's first estimate that of all families of its proposer. This counts as
    `prior_weight` row-steps. Evidence counts for at most `memory` row-steps, so old
    calls fade, at a depth only as new ones tell of it: what was learned of a depth that
    is not drafted any more is not learned again until `discount` says that it is worth
    less.

    What it does not tell: which of a tree's nodes were of use, so a narrower or smaller
    tree is not scored by a larger one; and that texts differ between rows and rollouts,
    except as the fading follows it.

    Reference: Kaplan and Meier, Nonparametric Estimation from Incomplete Observations,
    1958 (the product of hazards).
    """

    def __init__(
        self,
        *,
        memory: float = 200.0,
        prior_hazard: float = 0.7,
        prior_weight: float = 2.0,
    ):
        """Begin with nothing seen.

        Args:
          memory: row-steps at a depth that evidence counts for at most.
          prior_hazard: of the first depth.
          prior_weight: row-steps that a prior counts for.
        """
        self._memory = memory
        self._prior_hazard, self._prior_weight = prior_hazard, prior_weight
        # By family and depth: [row-steps at risk, those that survived].
        self._counts: dict[Family, list[list[float]]] = {}

    def add(self, strategy: Strategy, num_accepted: Sequence[int]) -> None:
        """Add a call's counts, as `tuner.Call` has them."""
        assert len(num_accepted) <= strategy.max_accept_length, num_accepted
        counts = self._counts.setdefault(family_of(strategy), [])
        for depth, (at_risk, survived) in enumerate(
            zip(num_accepted, num_accepted[1:], strict=False)
        ):
            if not at_risk:
                break
            if depth == len(counts):
                counts.append([0.0, 0.0])
            pair = [counts[depth][0] + at_risk, counts[depth][1] + survived]
            fade = min(1.0, self._memory / pair[0])
            counts[depth] = [fade * n for n in pair]

    def discount(self, factor: float, *, drafted_only: bool = False) -> None:
        """Let what was seen count `factor` of what it did.

        Args:
          factor: 0 to 1.
          drafted_only: what suffix matches alone did stays as it is.
        """
        for (proposer, _, _), counts in self._counts.items():
            if drafted_only and proposer == "ngram":
                continue
            for pair in counts:
                pair[:] = [factor * n for n in pair]

    def accept_length(self, strategy: Strategy, optimism: float = 0.0) -> float:
        """Estimate tokens per row and step.

        Args:
          strategy: any, tried or not.
          optimism: standard deviations added to every hazard.

        Returns:
          The estimate, 1 to `strategy.max_accept_length`.
        """
        family = family_of(strategy)
        own = self._counts.get(family, [])
        relatives = [
            counts
            for other, counts in self._counts.items()
            if other != family and other[0] == family[0]
        ]
        weight, mean = self._prior_weight, self._prior_hazard
        total = survival = 1.0
        for depth in range(strategy.draft_depth):
            n, k = own[depth] if depth < len(own) else (0.0, 0.0)
            if relatives:
                mean = self._pooled(relatives, depth, mean)
            if n + weight > 0:
                mean = (k + weight * mean) / (n + weight)
            hazard = mean
            if optimism:
                # Of a rule-of-succession mean: at 0 and 1, too, a few are no proof.
                spread = (mean * (1 - mean) + 0.25 / (n + 1)) / (n + max(weight, 1.0))
                hazard = min(1.0, mean + optimism * math.sqrt(spread))
            survival *= hazard
            total += survival
        return total

    def _pooled(self, relatives, depth: int, prior: float) -> float:
        n = k = 0.0
        for counts in relatives:
            if depth < len(counts):
                n, k = n + counts[depth][0], k + counts[depth][1]
        weight = self._prior_weight
        return (k + weight * prior) / (n + weight) if n + weight > 0 else prior

    def state(self) -> list[Any]:
        """Return the counts, as JSON has them."""
        return [
            [*family, [list(pair) for pair in counts]]
            for family, counts in self._counts.items()
        ]

    def restore(self, state: list[Any]) -> None:
        """Go on from a `state()`."""
        self._counts = {
            (proposer, topk, size): [list(pair) for pair in counts]
            for proposer, topk, size, counts in state
        }
