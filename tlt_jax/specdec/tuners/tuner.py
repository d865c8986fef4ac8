"""Tuners: which strategy the next decode call uses. The interface, and fixed rules.

An engine asks `choose` before each decode call and tells `record` what came of it. A
tuner reads no clock, and given the same calls and the same state it chooses the same.
Several engines may share one; its user guards it by a lock.
"""

import dataclasses
from typing import Any, Literal, Protocol

from tlt_jax.specdec import strategy as strategy_lib

Strategy = strategy_lib.Strategy
Updated = Literal["target", "drafter"]


@dataclasses.dataclass(frozen=True)
class Call:
    """What a decode call of an engine did.

    Attributes:
      num_rows: alive at its start.
      bucket: rows that the program was compiled for.
      strategy: None: plain decoding.
      elapsed_s: seconds on the host's clock around the call, no compilation.
      num_steps: target forwards.
      num_tokens: kept, of all rows.
      num_accepted: over rows and steps, how often at least d drafted tokens were
        accepted; entry 0 counts the row-steps. Empty where decoding was plain.
      accepted_by_room: what less room and less depth would have had accepted, see
        `rooms.accepted_by_room`; empty: nothing is known beyond `num_accepted`.
    """

    num_rows: int
    bucket: int
    strategy: Strategy | None
    elapsed_s: float
    num_steps: int
    num_tokens: int
    num_accepted: tuple[int, ...] = ()
    accepted_by_room: tuple[tuple[int, ...], ...] = ()

    @property
    def accept_length(self) -> float:
        """Tokens per row and step, before limits cut them."""
        return sum(self.num_accepted) / self.num_accepted[0] if self.speculated else 1.0

    @property
    def speculated(self) -> bool:
        """Whether any row took a speculative step."""
        return bool(self.num_accepted and self.num_accepted[0])


class Tuner(Protocol):
    """Chooses the strategy of each decode call.

    One that learns nothing need not say so: the methods that follow `choose` do that.

    Attributes:
      NAME: of the tuner, in its state.
    """

    NAME: str

    def strategies(self, num_rows: int) -> tuple[Strategy | None, ...]:
        """List all that `choose(num_rows)` may ever return."""

    def choose(self, num_rows: int) -> Strategy | None:
        """Choose how to decode `num_rows` rows; None: plainly."""

    def record(self, call: Call) -> None:
        """Learn from a call."""

    def changed(self, what: Updated) -> None:
        """Note that the target, or the drafter, has new weights."""

    def for_engine(self) -> "Tuner":
        """Return who chooses for one more engine: itself, unless it follows its rows.

        What it learns, it learns for all engines and in one state.
        """
        return self

    def state(self) -> dict[str, Any]:
        """Return all that was learned, random state included, as JSON has it."""
        return {"tuner": self.NAME}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a `state()`: the later choices are the same.

        Raises:
          ValueError: the state is another tuner's.
        """
        found = state.get("tuner")
        if found != self.NAME:
            raise ValueError(
                f"the state is of tuner {found!r} and cannot be continued by "
                f"{self.NAME!r}: choose {found!r}, or begin a new run."
            )


def bucket_of(num_rows: int, max_rows: int) -> int:
    """Return the smallest batch bucket that holds `num_rows` rows.

    Buckets are the powers of two below `max_rows`, and `max_rows`: an engine has decode
    programs for these alone.
    """
    return min(1 << max(num_rows - 1, 0).bit_length(), max_rows)


class Static(Tuner):
    """Always the table's strategy."""

    NAME = "static"

    def __init__(self, table: strategy_lib.Arms):
        """Follow `table`.

        Raises:
          ValueError: an entry has several candidates.
        """
        table.check_single()
        self._table = table

    def strategies(self, num_rows: int) -> tuple[Strategy | None, ...]:
        return (self._table.first(num_rows),)

    def choose(self, num_rows: int) -> Strategy | None:
        return self._table.first(num_rows)


class Threshold(Tuner):
    """Speculate from a threshold of rows on downwards, with hysteresis.

    Speculation begins when the active batch has fallen to `start_rows` and ends when it
    has grown beyond `stop_rows`; in between it stays as it is. So a batch that swings
    around the threshold, as with rows admitted one by one, does not switch at each
    call. Which strategy, the table says; its last one holds beyond its last entry.

    Reference: the system's paper, section 5 (the elastic threshold, default 32 rows).
    """

    NAME = "threshold"

    def __init__(self, table: strategy_lib.Arms, start_rows: int, stop_rows: int):
        """Begin with plain decoding.

        Raises:
          ValueError: the table is empty, an entry has several candidates, or the
            thresholds are not in order.
        """
        table.check_single()
        if not table.entries:
            raise ValueError("tuner 'threshold' has no strategy: give at least one.")
        if not 1 <= start_rows <= stop_rows:
            raise ValueError(
                f"start_rows={start_rows} and stop_rows={stop_rows}: speculation "
                "begins at 1 row at least and ends at no fewer rows than it begins."
            )
        self._table = table
        self._start_rows, self._stop_rows = start_rows, stop_rows
        self._speculating = False
        # Of one engine each: the batches of workers grow and shrink by themselves.
        self._of_engines: list[Threshold] = []

    def strategies(self, num_rows: int) -> tuple[Strategy | None, ...]:
        if num_rows <= self._start_rows:
            return (self._strategy(num_rows),)
        if num_rows <= self._stop_rows:
            return self._strategy(num_rows), None
        return (None,)

    def choose(self, num_rows: int) -> Strategy | None:
        if num_rows <= self._start_rows:
            self._speculating = True
        elif num_rows > self._stop_rows:
            self._speculating = False
        return self._strategy(num_rows) if self._speculating else None

    def _strategy(self, num_rows: int) -> Strategy:
        return self._table.first(num_rows) or self._table.entries[-1][1][0]

    def for_engine(self) -> "Threshold":
        own = Threshold(self._table, self._start_rows, self._stop_rows)
        self._of_engines.append(own)
        return own

    def state(self) -> dict[str, Any]:
        state = super().state() | {"speculating": self._speculating}
        if self._of_engines:
            state["engines"] = [own.state() for own in self._of_engines]
        return state

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a state; engines that it knows nothing of begin plainly."""
        super().restore(state)
        self._speculating = bool(state["speculating"])
        for own, told in zip(self._of_engines, state.get("engines", ()), strict=False):
            own.restore(told)
