"""What an engine did in a run, counted and timed."""

import collections
import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from tlt_jax.specdec import rooms, verify
from tlt_jax.specdec.tuners import tuner


@dataclasses.dataclass
class RolloutStats:
    """What a run of the engine did.

    Attributes:
      num_tokens: drawn and kept.
      num_steps: target forwards of decode calls.
      num_row_steps: the same times the batch bucket.
      num_calls: decode calls.
      num_ahead: those of them that were enqueued before the last one was read.
      num_thrown_away: enqueued so, too, and not among them: a row had finished in the
        last one, so that they took no step.
      num_prefill_tokens: prompt positions computed.
      num_fill_tokens: positions taken into the drafter's cache outside decode calls.
      num_preempted: rows put back for want of pages.
      num_accepted: over rows and speculative steps, how often at least d drafted tokens
        were accepted; entry 0 counts the row-steps.
      num_tried: the same of drafts at depth d + 1 whose parent was accepted, whether
        they were, too, or not: strategies differ in depth.
      reliability: `[3, 10]`, the learned drafter's drafts that had their chance by
        tenths of it, see `verify.reliability`.
      taus, sharpnesses: of coupled drafts, as they were when a run ended, one for each
        engine and run that had some; see `calibration`.
      by_rank: `[2, R]`, its nodes that were verified, and those accepted, by their rank
        in the batch: of `rooms.ROOMS` the first that holds them.
      strategies: decode calls by strategy; `none` is plain decoding.
      rule: by which the learned drafter's tokens were accepted, see
        `speculator.SpeculatorConfig`; empty: no engine here speculates.
      prefill_s, fill_s, decode_s: seconds on the host's clock, waiting for the device;
        no compilation.
      compile_s: seconds for which programs were waited for.
      active_rows: rows alive at the start of each decode call.
      call_s: seconds of each decode call; of one that was enqueued before the last was
        read, from then on.
      capture_s: seconds that decoding waited for finished texts' features.
    """

    num_tokens: int = 0
    num_steps: int = 0
    num_row_steps: int = 0
    num_calls: int = 0
    num_ahead: int = 0
    num_thrown_away: int = 0
    num_prefill_tokens: int = 0
    num_fill_tokens: int = 0
    num_preempted: int = 0
    num_accepted: list[int] = dataclasses.field(default_factory=list)
    num_tried: list[int] = dataclasses.field(default_factory=list)
    reliability: list[list[float]] = dataclasses.field(
        default_factory=lambda: np.zeros((3, verify.NUM_TENTHS)).tolist()
    )
    taus: list[float] = dataclasses.field(default_factory=list)
    sharpnesses: list[float] = dataclasses.field(default_factory=list)
    by_rank: list[list[int]] = dataclasses.field(
        default_factory=lambda: np.zeros((2, len(rooms.ROOMS)), int).tolist()
    )
    strategies: collections.Counter = dataclasses.field(
        default_factory=collections.Counter
    )
    rule: str = ""
    prefill_s: float = 0.0
    fill_s: float = 0.0
    decode_s: float = 0.0
    compile_s: float = 0.0
    active_rows: list[int] = dataclasses.field(default_factory=list)
    call_s: list[float] = dataclasses.field(default_factory=list)
    capture_s: float = 0.0

    @property
    def accept_length(self) -> float:
        """Tokens per row and speculative step, before limits cut them; 1 without."""
        return accept_length(self.num_accepted)

    def accept_rates(self) -> list[float]:
        """Chance of acceptance at each depth, given that its parent was accepted."""
        return accept_rates(self.num_accepted, self.num_tried)

    @property
    def most_used(self) -> str:
        """Strategy of most decode calls, plain ones aside; one must have speculated."""
        calls = {name: n for name, n in self.strategies.items() if name != "none"}
        return max(calls, key=calls.get)

    def add(self, call: tuner.Call, reliability: np.ndarray | float = 0.0) -> None:
        """Count a decode call; the tokens kept of it are counted where rows end.

        What chance a match has is learned anew when a run resumes, and so its record
        would differ: chances and ranks are counted of the learned drafter's alone.
        """
        chosen = call.strategy
        if chosen is not None and chosen.drafts and not chosen.matches:
            self.reliability = np.add(self.reliability, reliability).tolist()
            if call.accepted_by_room:
                within = call.accepted_by_room[0], call.accepted_by_room[-1]
                by_rank = np.diff(within, axis=1, prepend=0)
                self.by_rank = np.add(self.by_rank, by_rank).tolist()
        self.decode_s += call.elapsed_s
        self.call_s.append(call.elapsed_s)
        self.active_rows.append(call.num_rows)
        self.strategies["none" if call.strategy is None else str(call.strategy)] += 1
        self.num_calls += 1
        self.num_steps += call.num_steps
        self.num_row_steps += call.num_steps * call.bucket
        self.num_accepted = _sum(self.num_accepted, call.num_accepted)
        self.num_tried = _sum(self.num_tried, call.num_accepted[:-1])

    def join(self, other: "RolloutStats") -> "RolloutStats":
        """Add what another engine did; its calls come behind."""
        mine, its = vars(self), vars(other)
        values = {name: mine[name] + its[name] for name in mine if name != "rule"}
        for name in ("num_accepted", "num_tried"):
            values[name] = _sum(mine[name], its[name])
        for name in ("reliability", "by_rank"):
            values[name] = np.add(mine[name], its[name]).tolist()
        values["rule"] = self.rule or other.rule
        return dataclasses.replace(self, **values)


def _sum(left: Sequence[int], right: Sequence[int]) -> list[int]:
    pairs = itertools.zip_longest(left, right, fillvalue=0)
    return [int(a + b) for a, b in pairs]


def accept_length(num_accepted: Sequence[int]) -> float:
    """Tokens per row and step, of counts as `RolloutStats` has them; 1 without."""
    return sum(num_accepted) / num_accepted[0] if num_accepted else 1.0


def accept_rates(num_accepted: Sequence[int], num_tried: Sequence[int]) -> list[float]:
    """Chance of acceptance at each depth, given that its parent was accepted."""
    pairs = zip(num_accepted[1:], num_tried, strict=True)
    return [accepted / tried if tried else 0.0 for accepted, tried in pairs]
