"""An endless line of drafter batches out of a buffer that is still filling.

The longest texts of a step are not there while the step's drafter training runs: they
are what it waits for. So a batch mixes the texts that this step has finished with those
of the steps before, long ones first ("one-step offset", TLT, section on the spot
trainer): a share `previous_frac` of the positions comes from the latter while there are
both, and everything from the one side while the other is empty.

On either side a text has the weight `num_bases ** length_power`, times `age_decay` for
every version beyond the first that it is behind. Texts are taken in the order of their
due times (stride scheduling): a text's first is a uniform share of 1 / weight after it
was first seen, and 1 / weight passes between its turns. Turns are thus proportional to
weights, no text waits for ever, and one that arrives late owes nothing. (A text without
room in a batch lets a shorter one go first, and keeps its turn.) The uniform numbers
depend on seed, version and id alone, so the line is a function of the seed and of what
was in the buffer at each batch, not of the order of arrival.
"""

import collections
import dataclasses
import threading
import time

import numpy as np

from tlt_jax.models import rows as rows_lib
from tlt_jax.specdec.texts import buffer as text_buffer
from tlt_jax.specdec.texts import layout
from tlt_jax.specdec.training import unroll

PREVIOUS, CURRENT = 0, 1
# Texts without room in a batch that are looked past before it is closed.
_LOOK_PAST = 16


class Sampler:
    """Draws batches; one thread at a time.

    Attributes:
      num_taken: positions so far, of the steps before and of the step at the time.
    """

    def __init__(
        self,
        buffer: text_buffer.TextBuffer,
        *,
        row_tokens: int,
        row_bases: int,
        num_rows: int,
        seed: int,
        previous_frac: float = 0.5,
        length_power: float = 1.0,
        age_decay: float = 0.5,
    ):
        """Begin a line of batches.

        They have B rows (`num_rows`) of T and M, see `layout.span_of`. `previous_frac`
        is the share of the positions from the steps before this one. With a
        `length_power` of 0 every text counts alike, of 1 in proportion to its
        positions; `age_decay` is the weight of a text two versions old against one
        version old.

        Raises:
          ValueError: a setting makes no sense.
        """
        if not 0 <= previous_frac <= 1:
            raise ValueError(f"previous_frac={previous_frac}: give a share in [0, 1].")
        if not 0 < age_decay <= 1 or length_power < 0:
            raise ValueError(
                f"age_decay={age_decay}, length_power={length_power}: give one in "
                "(0, 1] and one of at least 0."
            )
        self._buffer = buffer
        self._sizes = {"row_tokens": row_tokens, "row_bases": row_bases}
        self._num_rows, self._seed = num_rows, seed
        self._previous_frac = previous_frac
        self._length_power, self._age_decay = length_power, age_decay
        self._lock = threading.Lock()
        self._due: dict[int, float] = {}
        # Of the two sides: the due time of the last turn.
        self._clock = np.zeros(2)
        self.num_taken = [0, 0]
        self._owed = 0.0
        self._version = self._num_batches = 0

    def next_batch(self, wait_s: float = 0.0) -> unroll.Batch | None:
        """Make the next batch of what is there now, in host memory.

        A text is at most once in a batch, so that rows may be empty. None: there is no
        text to learn from, not after `wait_s` either.
        """
        until = time.monotonic() + wait_s
        with self._lock:
            while True:
                listed = self._meet(self._buffer.view())
                rows, owed = self._choose(listed)
                if rows:
                    batch = self._lay_out(listed, rows, owed)
                    if batch is not None:
                        return batch
                elif (left := until - time.monotonic()) > 0:
                    self._buffer.wait(left)
                else:
                    return None

    def state(self) -> dict[str, np.ndarray]:
        """Return all that the line depends on besides the texts, as arrays."""
        with self._lock:
            ids = sorted(self._due)
            return {
                "ids": np.array(ids, np.int64),
                "due": np.array([self._due[i] for i in ids], np.float64),
                "clock": self._clock.copy(),
                "taken": np.array(self.num_taken, np.int64),
                "owed": np.array(self._owed),
                "progress": np.array([self._version, self._num_batches], np.int64),
            }

    def restore(self, state: dict[str, np.ndarray]) -> None:
        """Go on where `state` was taken, with the same texts in the buffer."""
        with self._lock:
            ids, due = np.asarray(state["ids"]), np.asarray(state["due"])
            self._due = dict(zip(ids.tolist(), due.tolist(), strict=True))
            self._clock = np.array(state["clock"], np.float64)
            self.num_taken = np.asarray(state["taken"]).tolist()
            self._owed = float(state["owed"])
            self._version, self._num_batches = np.asarray(state["progress"]).tolist()

    def _meet(self, view: text_buffer.View) -> "_Listed":
        """Give due times to texts that are new, and forget those that are gone."""
        version = self._buffer.version
        if version != self._version:
            # Texts change sides and weights: everybody begins anew.
            self._version, self._owed = version, 0.0
            self._clock[:] = 0
            self._due = {}
        ids = view.text_ids.tolist()
        self._due = {i: self._due[i] for i in ids if i in self._due}
        sides = (view.versions >= version).astype(int)
        strides = 1 / self._weights(view, version)
        for index, text_id in enumerate(ids):
            if text_id not in self._due:
                rng = np.random.default_rng((self._seed, version, text_id))
                begin = self._clock[sides[index]]
                self._due[text_id] = float(begin + rng.random() * strides[index])
        return _Listed(view, sides, strides)

    def _weights(self, view: text_buffer.View, version: int) -> np.ndarray:
        columns = view.lengths.tolist(), view.response_starts.tolist()
        bases = np.array([*map(layout.num_bases, *columns)], float)
        behind = np.maximum(version - view.versions - 1, 0)
        return bases**self._length_power * self._age_decay**behind

    def _choose(self, listed: "_Listed") -> tuple[list[list[layout.Span]], float]:
        """Fill rows from both sides, each in the order of due times.

        Second the positions that the steps before are owed once the rows are taken.
        """
        view = listed.view
        queues = self._queues(listed)
        mixed = all(queues)
        owed = self._owed
        placed = rows_lib.Rows(*self._sizes.values(), max_rows=self._num_rows)
        rng = np.random.default_rng((self._seed, self._num_batches))
        num_past = 0
        while any(queues) and num_past < _LOOK_PAST:
            side = self._side(owed) if all(queues) else int(not queues[PREVIOUS])
            index = queues[side].popleft()
            span = layout.span_of(
                index,
                view.lengths[index],
                view.response_starts[index],
                rng=rng,
                **self._sizes,
            )
            if span is None:
                continue
            if placed.place(span, span.num_tokens, span.num_bases) is None:
                num_past += 1
            elif mixed:
                from_previous = span.num_bases * (side == PREVIOUS)
                owed += self._previous_frac * span.num_bases - from_previous
        return placed.items, owed

    def _queues(self, listed: "_Listed") -> list[collections.deque[int]]:
        ids = listed.view.text_ids
        due = np.array([self._due[i] for i in ids.tolist()])
        order = np.lexsort((ids, due))
        return [
            collections.deque(order[listed.sides[order] == side].tolist())
            for side in (PREVIOUS, CURRENT)
        ]

    def _side(self, owed: float) -> int:
        """The side that is behind its share."""
        if owed == 0:
            return PREVIOUS if self._previous_frac >= 0.5 else CURRENT
        return PREVIOUS if owed > 0 else CURRENT

    def _lay_out(
        self, listed: "_Listed", rows: list[list[layout.Span]], owed: float
    ) -> unroll.Batch | None:
        """Read a plan's texts and count their turns; None if one has gone since."""
        view = listed.view
        spans = [span for row in rows for span in row]
        rows = rows + [[]] * (self._num_rows - len(rows))
        with view.holding([span.index for span in spans]) as all_there:
            if not all_there:
                return None
            try:
                batch = layout.lay_out(view, rows, **self._sizes)
            except text_buffer.TextGoneError:
                return None
        for span in spans:
            text_id, side = int(view.text_ids[span.index]), listed.sides[span.index]
            self._clock[side] = max(self._clock[side], self._due[text_id])
            self._due[text_id] += float(listed.strides[span.index])
            self.num_taken[side] += span.num_bases
        limit = self._num_rows * self._sizes["row_bases"]
        self._owed = float(np.clip(owed, -limit, limit))
        self._num_batches += 1
        return batch


@dataclasses.dataclass(frozen=True)
class _Listed:
    """The texts of a moment; for each, its side and the time between its turns."""

    view: text_buffer.View
    sides: np.ndarray
    strides: np.ndarray
