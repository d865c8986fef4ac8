"""How deep drafted paths are accepted, from all calls of every depth at once."""

import math
from collections.abc import Sequence
from typing import Any

from tlt_jax.specdec import strategy as strategy_lib

Strategy = strategy_lib.Strategy
Family = tuple[str, int, int, int]


def family_of(strategy: Strategy, bucket: int | None = None) -> Family:
    """Return what strategies share whose steps score each other's levels.

    The first levels of a deep chain are a shallower chain: chains of one proposer are
    one family. A tree keeps the best `tokens_to_verify` nodes of all its levels, so
    trees share where `topk` and `tokens_to_verify` are equal; there a deeper one has
    given a few shallow nodes away, which is neglected. Where a batch of `bucket` rows
    has to share its budget, how deep a row comes is the budget's doing.
    """
    size = strategy.tokens_to_verify if strategy.topk > 1 else 0
    budget = strategy.budget if bucket and strategy.shares(bucket) else 0
    return strategy.proposer, strategy.topk, size, budget


class Survival:
    """Running estimates of the chance of acceptance at each depth.

    A step whose tree is D levels deep tells of every depth d <= D whether d drafted
    tokens were accepted, so one call scores all shallower strategies of its family, and
    says nothing of what lies below D: a lifetime that is censored at D. With `n[d]`
    row-steps that had d - 1 tokens accepted and drafted on, and `k[d]` of them that had
    d, the hazard is `k[d] / n[d]` whatever depths the calls had, and

        accept length of depth D = 1 + sum over d = 1..D of k[1]/n[1] * .. * k[d]/n[d].

    Where nothing was seen a depth has the hazard of the one above it (`prior_hazard`
    is the first's), and there is a family's first estimate that of all families of its
    proposer: `prior_weight` row-steps. Batch buckets differ, since the last rows of a
    rollout are not like the others: a bucket's hazards start from those of all, which
    count for `shared_weight` row-steps.

    Where rows share a budget, each batch size is by itself: before it was seen its
    hazards are those of the same proposer without a budget, as far down as an equal
    share of the nodes reaches.

    Evidence counts for at most `memory` row-steps, so old calls fade, at a depth only
    as new ones tell of it: what was learned of a depth that is not drafted any more is
    not learned again until `discount` says that it is worth less.

    What it does not tell: which of a tree's nodes were of use, so a narrower or smaller
    tree is not scored by a larger one. And where a text alternates between easy and
    hard stretches, the steps of shallow chains begin in easy ones more often than those
    of deep chains, so that each scores the other with a small bias (on a recorded
    trace 7 % at most; what is extrapolated was up to 49 % too high).

    Reference: Kaplan and Meier, Nonparametric Estimation from Incomplete Observations,
    1958 (the product of hazards).
    """

    def __init__(
        self,
        *,
        memory: float = 200.0,
        prior_hazard: float = 0.7,
        prior_weight: float = 2.0,
        shared_weight: float = 20.0,
        kept: float = 8.0,
    ):
        """Begin with nothing seen.

        After any discount old evidence counts for `kept` row-steps, if it did: how
        acceptance falls with depth is soon known anew, but no reason to draft deep in
        the meantime.
        """
        self._memory, self._shared_weight = memory, shared_weight
        self._kept = kept
        self._prior_hazard, self._prior_weight = prior_hazard, prior_weight
        # By family, bucket (None: all) and depth: [row-steps at risk, survivors].
        self._counts: dict[tuple[Family, int | None], list[list[float]]] = {}

    def add(self, strategy: Strategy, num_accepted: Sequence[int], bucket: int) -> None:
        """Add a call's counts, as `tuner.Call` has them."""
        assert len(num_accepted) <= strategy.max_accept_length, num_accepted
        family = family_of(strategy, bucket)
        # What one batch size makes of a budget says nothing of another.
        places = (bucket,) if family[-1] else (None, bucket)
        for where in places:
            counts = self._counts.setdefault((family, where), [])
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
        """Let what was seen count `factor` of what it did, or `kept` row-steps.

        With `drafted_only` what suffix matches alone did stays as it is.
        """
        for (family, _), counts in self._counts.items():
            if drafted_only and family[0] == "ngram":
                continue
            for pair in counts:
                least = min(self._kept, pair[0])
                scale = max(factor * pair[0], least) / pair[0] if pair[0] else 0.0
                pair[:] = [scale * n for n in pair]

    def accept_length(
        self, strategy: Strategy, optimism: float = 0.0, bucket: int | None = None
    ) -> float:
        """Estimate tokens per row and step, 1 to `strategy.max_accept_length`.

        `optimism` is in standard deviations, added to every hazard; `bucket` is of
        batches, None: any. The strategy need not have been tried.
        """
        family = family_of(strategy, bucket)
        share = None
        if family[-1]:
            share = strategy.num_columns(bucket) / bucket - 1
        every = self._counts.get((family, None), [])
        here = self._counts.get((family, bucket), []) if bucket is not None else []
        relatives = [
            counts
            for (other, where), counts in self._counts.items()
            if where is None and other != family and other[0] == family[0]
        ]
        weight, mean = self._prior_weight, self._prior_hazard
        total = survival = 1.0
        for depth in range(strategy.draft_depth):
            if relatives:
                mean = _mean(_sum(relatives, depth), weight, mean)
            n, k = every[depth] if depth < len(every) else (0.0, 0.0)
            mean = hazard = _mean((n, k), weight, mean)
            if share is not None:
                hazard *= min(max(share - depth, 0.0), 1.0)
            if depth < len(here):
                # Of all the evidence, so much as it counts for.
                n = here[depth][0] + min(n, self._shared_weight)
                hazard = _mean(here[depth], self._shared_weight, hazard)
            if optimism:
                # Of a rule-of-succession mean: at 0 and 1, too, a few are no proof.
                spread = hazard * (1 - hazard) + 0.25 / (n + 1)
                spread = math.sqrt(spread / (n + max(weight, 1.0)))
                hazard = min(1.0, hazard + optimism * spread)
            survival *= hazard
            total += survival
        return total

    def state(self) -> list[Any]:
        """Return the counts, as JSON has them."""
        return [
            [*family, bucket, [list(pair) for pair in counts]]
            for (family, bucket), counts in self._counts.items()
        ]

    def restore(self, state: list[Any]) -> None:
        """Go on from a `state()`."""
        self._counts = {
            (tuple(family), bucket): [list(pair) for pair in counts]
            for *family, bucket, counts in state
        }


def _mean(pair: Sequence[float], weight: float, prior: float) -> float:
    n, k = pair
    return (k + weight * prior) / (n + weight) if n + weight > 0 else prior


def _sum(families: list[list[list[float]]], depth: int) -> tuple[float, float]:
    pairs = [counts[depth] for counts in families if depth < len(counts)]
    return sum(n for n, _ in pairs), sum(k for _, k in pairs)
