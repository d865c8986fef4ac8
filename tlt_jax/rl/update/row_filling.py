"""Which responses lie in which packed row, and how wide the rows are.

A row costs what its width says, full or not, so the layout with the fewest columns in
all is sought: over the widths there may be, with groups kept whole, and with groups
spread over rows to fill them, at the price of a copy of the prompt in each.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np

from tlt_jax.models import rows as rows_lib

# A multiple, at least 1, or the next power of two.
Rounding = int | Literal["power_of_two"]


@dataclasses.dataclass(frozen=True)
class Tree:
    """A prompt with those of its responses that share a row, as (number, tokens)."""

    prompt: np.ndarray
    responses: tuple[tuple[int, np.ndarray], ...]

    @property
    def size(self) -> int:
        """Columns."""
        return len(self.prompt) + self.num_predictions

    @property
    def num_predictions(self) -> int:
        """Response tokens."""
        return sum(len(tokens) for _, tokens in self.responses)

    @property
    def least_width(self) -> int:
        """Columns that the prompt takes with its longest response."""
        return len(self.prompt) + max(len(tokens) for _, tokens in self.responses)


Layout = list[list[Tree]]


def choose(
    trees: Sequence[Tree],
    *,
    row_tokens: int,
    rows_multiple: Rounding,
    rounding: Rounding,
    most_trees: int | None = None,
) -> tuple[Layout, int]:
    """Choose the rows that cost least.

    Args:
      trees: of at most `row_tokens` columns for a prompt and one response.
      row_tokens: most columns in a row.
      rows_multiple: the number of rows is rounded up to it.
      rounding: the width is rounded up to it, but not beyond `row_tokens`.
      most_trees: of a row, or None; each has one response then.

    Returns:
      The trees of every row, and the rows' width. Of equally cheap layouts the one with
      the fewest rows, and then with whole groups.
    """
    best = None
    for width in _widths(max(t.least_width for t in trees), row_tokens, rounding):
        if most_trees is None:
            found = (_whole(trees, width), _filled(trees, width))
        else:
            found = (_whole(trees, width, -(-width // most_trees)),)
        for rows in found:
            # Rows narrower than what was asked for cost less still.
            longest = max(sum(tree.size for tree in row) for row in rows)
            needed = min(round_up(longest, rounding), row_tokens)
            num_rows = round_up(len(rows), rows_multiple)
            if best is None or (num_rows * needed, num_rows) < best[0]:
                best = (num_rows * needed, num_rows), rows, needed
    _, rows, width = best
    return rows, width


def round_up(value: int, rounding: Rounding) -> int:
    """Round up to a multiple or a power of two."""
    if rounding == "power_of_two":
        return 1 << (value - 1).bit_length()
    return -(-value // rounding) * rounding


# Layouts are tried for so many widths at most; a rounding of few tokens has many.
_MOST_WIDTHS = 8


def _widths(least: int, row_tokens: int, rounding: Rounding) -> list[int]:
    """Rounded widths from `least` on, the widest first."""
    found = []
    width = round_up(least, rounding)
    while width < row_tokens:
        found.append(width)
        width = round_up(width + 1, rounding)
    step = -(-len(found) // _MOST_WIDTHS) or 1
    return [row_tokens, *reversed(found[::step])]


def _whole(trees: Sequence[Tree], width: int, least: int = 0) -> Layout:
    """First fit decreasing of groups; what is wider than a row is split likewise.

    Smaller ones than `least` columns take as much room, so that few share a row.
    """
    parts = [part for tree in trees for part in _split(tree, width)]
    sizes = [max(part.size, least) for part in parts]
    rows = rows_lib.first_fit_decreasing(sizes, width)
    return [[parts[i] for i in row] for row in rows]


def _split(tree: Tree, width: int) -> list[Tree]:
    """Parts of the tree that fit a row each; the tree itself where it fits."""
    sizes = [len(tokens) for _, tokens in tree.responses]
    bins = rows_lib.first_fit_decreasing(sizes, width - len(tree.prompt))
    return [
        Tree(tree.prompt, tuple(tree.responses[i] for i in sorted(members)))
        for members in bins
    ]


def _filled(trees: Sequence[Tree], width: int) -> Layout:
    """First fit of responses, the largest group first and in it the longest.

    Rows that have the prompt come before those that need a copy.
    """
    rows = rows_lib.Rows(width)
    for index in sorted(range(len(trees)), key=lambda i: -trees[i].size):
        tree = trees[index]
        has_prompt: list[int] = []
        sizes = [len(tokens) for _, tokens in tree.responses]
        for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
            row = rows.find(sizes[i], among=has_prompt)
            if row is not None:
                rows.put((index, i), row, sizes[i])
                continue
            row = rows.place((index, i), len(tree.prompt) + sizes[i])
            has_prompt = sorted([*has_prompt, row])
    return [_joined(trees, members) for members in rows.items]


def _joined(trees: Sequence[Tree], members: Sequence[tuple[int, int]]) -> list[Tree]:
    """Trees of a row's responses, given as (tree, which of its responses)."""
    chosen: dict[int, list[int]] = {}
    for index, i in members:
        chosen.setdefault(index, []).append(i)
    return [
        Tree(trees[t].prompt, tuple(trees[t].responses[i] for i in sorted(some)))
        for t, some in chosen.items()
    ]
