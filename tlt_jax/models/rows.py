"""Texts side by side in rows: which text lies in which row, and what its columns are.

A row holds several texts that see only themselves (`attention.Visibility` with their
`segment`). Everything that computes over texts of many lengths fills rows here: the
policy's update, the drafter's training, and the making of a first model. They differ in
what is placed and in which order, not in how a place is found: the first row with room.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np


class Rows:
    """Rows that are filled first fit; `items` are those of each, as placed."""

    def __init__(
        self,
        *capacity: int,
        max_rows: int | None = None,
        num_open: int | None = None,
    ):
        """Begin without a row.

        Args:
          capacity: what a row holds, of each kind of room: columns, say, and bases.
          max_rows: None: as many as it takes.
          num_open: newest rows that are looked at; None: all. With a number, placing
            takes linear time; with 1, texts keep their order.
        """
        self.items: list[list[Any]] = []
        self._capacity = capacity
        self._room: list[list[int]] = []
        self._max_rows, self._num_open = max_rows, num_open

    def find(self, *size: int, among: Iterable[int] | None = None) -> int | None:
        """Find the first row with room.

        Args:
          size: of each kind of room.
          among: numbers of rows, rising; None: of those that are looked at.
        """
        if among is None:
            closed = len(self.items) - (self._num_open or len(self.items))
            among = range(max(closed, 0), len(self.items))
        for row in among:
            room = self._room[row]
            if all(r >= s for r, s in zip(room, size, strict=True)):
                return row
        return None

    def put(self, item: Any, row: int, *size: int) -> None:
        """Place an item in a row that has room for it."""
        self.items[row].append(item)
        self._room[row] = [r - s for r, s in zip(self._room[row], size, strict=True)]

    def open(self) -> int | None:
        """Begin another row; return its number, or None: there are enough."""
        if len(self.items) == self._max_rows:
            return None
        self.items.append([])
        self._room.append(list(self._capacity))
        return len(self.items) - 1

    def place(self, item: Any, *size: int) -> int | None:
        """Place an item in the first row with room, or in a new one; see `open`."""
        row = self.find(*size)
        row = self.open() if row is None else row
        if row is not None:
            self.put(item, row, *size)
        return row


def first_fit_decreasing(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Return indices of the items in each row; ties go in the order given."""
    rows = Rows(capacity)
    for item in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        rows.place(item, sizes[item])
    return rows.items


def blank(num_rows: int, num_columns: int) -> dict[str, np.ndarray]:
    """Make the columns of empty rows.

    Returns:
      `[B, T] int32`: `tokens`, padding 0; `positions`, counted within the text, padding
      0; `segment`, number of the text in its row, padding -1.
    """
    fills = {"tokens": 0, "positions": 0, "segment": -1}
    return {
        name: np.full((num_rows, num_columns), fill, np.int32)
        for name, fill in fills.items()
    }


def write(
    columns: dict[str, np.ndarray], row: int, first: int, segment: int, tokens
) -> slice:
    """Write a text into `blank`'s arrays from column `first` on; return its columns."""
    here = slice(first, first + len(tokens))
    columns["tokens"][row, here] = tokens
    columns["positions"][row, here] = np.arange(len(tokens))
    columns["segment"][row, here] = segment
    return here
