"""How much is accepted by depth and room, from all calls of every shape at once."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from tlt_jax.specdec import rooms
from tlt_jax.specdec import strategy as strategy_lib
from tlt_jax.specdec.tuners import tuner

Strategy = strategy_lib.Strategy
Kind = tuple[str, int, int]

_ROOMS = np.array(rooms.ROOMS)
# Each row's of a pair of counts.
_AT_RISK, _SURVIVED = 0, 1


def kind_of(strategy: Strategy) -> Kind:
    """Return what strategies share that one curve is about.

    The first levels of a deep chain are a shallower chain, and the best nodes of a
    batch are what a smaller budget has: chains of one proposer are one kind. Of a tree
    no row may have more than `tokens_to_verify`, whatever room there is.
    """
    size = strategy.tokens_to_verify if strategy.topk > 1 else 0
    return strategy.proposer, strategy.topk, size


def room_of(strategy: Strategy, num_rows: int, bucket: int) -> float:
    """Return the drafted nodes for each of `num_rows` rows in a batch of `bucket`."""
    columns = strategy.num_columns(bucket) / num_rows
    return min(columns, strategy.tokens_to_verify) - 1


class Survival:
    """Running estimates of one curve: tokens accepted per row and step, by depth, room.

    A step tells for every depth d up to its own, and for every room r up to its own
    (drafted nodes per live row), how many tokens `a(d, r)` it would have had accepted
    (`rooms.accepted_by_room`): so one call scores all strategies of its kind that are
    shallower, or have less budget. Deeper and roomier ones are extrapolated. At a room,
    what depth d adds, `a(d, r) - a(d - 1, r)`, is of what the depth above it added the
    part that survived, the hazard

        h(d, r) = (a(d, r) - a(d - 1, r)) / (a(d - 1, r) - a(d - 2, r)),

    of row-steps at d = 1; where nobody lacks room this is the chance that a draft is
    accepted whose parent was. Calls of other depths are lifetimes censored there, so
    sums of both differences are kept, of all calls that reach to d, and

        accept length of depth D = 1 + sum over d = 1..D of h(1, r) * .. * h(d, r).

    Where nothing was seen a depth has the hazard of the one above it (`prior_hazard`
    is the first's), and there is a kind's first estimate that of all kinds of its
    proposer: `prior_weight` row-steps. With more room than was had the shallow depths
    are known that would not have used it. Batch buckets differ, since the last rows of
    a rollout are not like the others: a bucket's hazards start from those of all, which
    count for `shared_weight` row-steps. Between two of `rooms.ROOMS` accept lengths are
    linear.

    Of a call that knows only how much was accepted at each depth, a chain's rows are
    taken each by itself, with an equal share of the room.

    Evidence counts for at most `memory` row-steps, so old calls fade, at a depth and
    room only as new ones tell of it: what was learned of a depth that is not drafted
    any more is not learned again until `discount` says that it is worth less.

    What it does not tell: how good a tree of other width or size is. And where a text
    alternates between easy and hard stretches, the steps of shallow chains begin in
    easy ones more often than those of deep chains, so that each scores the other with a
    small bias (on a recorded trace 7 % at most; what is extrapolated was up to 49 % too
    high).

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
        # By kind and bucket (None: all): [at risk and survived, depth, room].
        self._counts: dict[tuple[Kind, int | None], np.ndarray] = {}

    def add(self, call: tuner.Call) -> None:
        """Add a call; one that did not speculate tells nothing.

        Of depths that `num_accepted` does not name nothing is known.
        """
        if not call.speculated or len(call.num_accepted) == 1:
            return
        added, known = _added(call)
        depth, kind = len(known), kind_of(call.strategy)
        for place in (None, call.bucket):
            counts = self._counts.get((kind, place), np.zeros((2, 0, len(_ROOMS))))
            if counts.shape[1] < depth:
                missing = np.zeros((2, depth - counts.shape[1], len(_ROOMS)))
                counts = np.concatenate([counts, missing], axis=1)
                self._counts[kind, place] = counts
            more = counts[:, :depth] + np.stack([added[:-1], added[1:]])
            fade = self._memory / np.maximum(more[_AT_RISK], self._memory)
            np.copyto(counts[:, :depth], fade * more, where=known)

    def discount(self, factor: float, *, drafted_only: bool = False) -> None:
        """Let what was seen count `factor` of what it did, or `kept` row-steps.

        With `drafted_only` what suffix matches alone did stays as it is.
        """
        for ((proposer, *_), _), counts in self._counts.items():
            if drafted_only and proposer == "ngram":
                continue
            at_risk = counts[_AT_RISK]
            left = np.maximum(factor * at_risk, np.minimum(self._kept, at_risk))
            counts *= np.divide(
                left, at_risk, out=np.ones_like(left), where=at_risk > 0
            )

    def accept_length(
        self,
        strategy: Strategy,
        optimism: float = 0.0,
        bucket: int | None = None,
        num_rows: int | None = None,
    ) -> float:
        """Estimate tokens per row and step, 1 to `strategy.max_accept_length`.

        `optimism` is in standard deviations, added to every hazard; `bucket` is of
        batches, None: any, in which rows have all the room they can use; `num_rows` of
        it are alive, None: all. The strategy need not have been tried.
        """
        room = math.inf
        if bucket is not None:
            room = room_of(strategy, num_rows or bucket, bucket)
        most = _most_nodes(strategy, strategy.draft_depth)
        # Between the room that is kept below and the one above.
        above = int(np.searchsorted(_ROOMS, room)) if room < most else len(_ROOMS) - 1
        upper = self._at_room(strategy, above, optimism, bucket)
        high = min(rooms.ROOMS[above], most)
        if room >= high:
            return upper
        low = rooms.ROOMS[above - 1] if above else 0.0
        lower = self._at_room(strategy, above - 1, optimism, bucket) if above else 1.0
        return lower + (upper - lower) * (room - low) / (high - low)

    def _at_room(
        self, strategy: Strategy, column: int, optimism: float, bucket: int | None
    ) -> float:
        """Estimate the accept length at one of `rooms.ROOMS`."""
        kind = kind_of(strategy)
        every = _pairs(self._counts.get((kind, None)), column)
        here = (
            [] if bucket is None else _pairs(self._counts.get((kind, bucket)), column)
        )
        relatives = [
            _pairs(counts, column)
            for (other, place), counts in self._counts.items()
            if place is None and other != kind and other[0] == kind[0]
        ]
        weight, mean = self._prior_weight, self._prior_hazard
        total = survival = 1.0
        for depth in range(strategy.draft_depth):
            if relatives:
                mean = _mean(_sum(relatives, depth), weight, mean)
            n, k = every[depth] if depth < len(every) else (0.0, 0.0)
            mean = hazard = _mean((n, k), weight, mean)
            if depth < len(here) and here[depth][_AT_RISK]:
                # Of all the evidence, so much as it counts for.
                n = here[depth][_AT_RISK] + min(n, self._shared_weight)
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
            [*kind, place, counts.tolist()]
            for (kind, place), counts in self._counts.items()
        ]

    def restore(self, state: list[Any]) -> None:
        """Go on from a `state()`."""
        self._counts = {
            (tuple(kind), place): np.array(counts, float)
            for *kind, place, counts in state
        }


def _added(call: tuner.Call) -> tuple[np.ndarray, np.ndarray]:
    """Return what each depth added to what was accepted, and where that is known.

    `[depth + 1, R]`, of the last at each room, entry 0: row-steps; and `[depth, R]`.
    """
    strategy, num_accepted = call.strategy, np.array(call.num_accepted)
    depth = len(num_accepted) - 1
    assert depth <= strategy.draft_depth, num_accepted
    room = room_of(strategy, call.num_rows, call.bucket)
    # What it had counts for the next room that is kept; and depths that had all they
    # could use would have had no more with more room.
    most_D1 = np.array([[_most_nodes(strategy, d + 1)] for d in range(depth)])
    own = np.searchsorted(_ROOMS, room)
    known_DR = (np.arange(len(_ROOMS)) <= own) | (most_D1 <= room)
    if call.accepted_by_room:
        within_DR = np.array(call.accepted_by_room[1:])
    elif strategy.topk == 1:
        within_DR = rooms.of_chains(num_accepted, depth)[1:]
    else:
        # Which of a tree's nodes were of use is not known.
        within_DR = np.tile(np.cumsum(num_accepted[1:])[:, None], len(_ROOMS))
        known_DR = known_DR & (np.arange(len(_ROOMS)) >= own)
    row_steps_1R = np.full((1, len(_ROOMS)), num_accepted[0])
    added_DR = np.diff(within_DR, axis=0, prepend=0)
    return np.concatenate([row_steps_1R, added_DR]), known_DR


def _most_nodes(strategy: Strategy, depth: int) -> int:
    """Return how many nodes down to a depth a row can have verified at most."""
    if strategy.topk == 1 and strategy.proposer in ("drafter", "ngram"):
        return depth
    return strategy.tokens_to_verify - 1


def _pairs(counts: np.ndarray | None, column: int) -> list[tuple[float, float]]:
    """Return what is at risk and survived by depth, 0 where nothing was seen."""
    if counts is None:
        return []
    return [(n, k) if n > 0 else (0.0, 0.0) for n, k in counts[:, :, column].T.tolist()]


def _mean(pair: Sequence[float], weight: float, prior: float) -> float:
    """Return the share that survived; deeper drafts may have cost shallow ones."""
    n, k = pair
    return min(max((k + weight * prior) / (n + weight), 0.0), 1.0) if n else prior


def _sum(kinds: list[list[tuple[float, float]]], depth: int) -> tuple[float, float]:
    pairs = [counts[depth] for counts in kinds if depth < len(counts)]
    return sum(n for n, _ in pairs), sum(k for _, k in pairs)
