"""Claims about the results, each decided by reading its experiment's table.

A claim is of the paper (does what it says hold here, at this scale?) or of ours. What
does not hold is as much a result as what does, and stays in the list.
"""

import operator
from collections.abc import Callable, Mapping, Sequence

from experiments.lab import tables

HOLDS, FAILS, NO_DATA = "holds", "fails", "no data"
Rows = Sequence[tables.Row]
# Whether it holds, and what was found.
Finding = tuple[bool, str]
# What is claimed -> what decides it, by the summary, or the rows where there is none.
Claims = Mapping[str, Callable[[Rows], Finding]]


def only(rows: Rows, **wanted: object) -> tables.Row:
    """Returns the row with these entries.

    Raises:
      LookupError: there is none.
    """
    for row in tables.where(rows, **wanted):
        return row
    raise LookupError(f"no row with {wanted}")


def at_least(column: str, least: float, **wanted: object) -> Callable[[Rows], Finding]:
    """Decides whether an entry is large enough."""
    return _bounded(column, operator.ge, f"at least {least:g}", least, wanted)


def at_most(column: str, most: float, **wanted: object) -> Callable[[Rows], Finding]:
    """Decides whether an entry is small enough."""
    return _bounded(column, operator.le, f"at most {most:g}", most, wanted)


def _bounded(column, holds, claimed, bound, wanted):
    def decide(rows):
        value = only(rows, **wanted)[column]
        return holds(value, bound), f"{column} {value:.3g}, claimed {claimed}"

    return decide


def in_order(column: str, key: str, names: Sequence[str]) -> Callable[[Rows], Finding]:
    """Decides whether an entry rises along the named rows."""

    def decide(rows):
        values = [only(rows, **{key: name})[column] for name in names]
        told = ", ".join(f"{n} {v:.3g}" for n, v in zip(names, values, strict=True))
        return values == sorted(values), told

    return decide


def all_zero(column: str, what: str) -> Callable[[Rows], Finding]:
    """Decides whether a column's entries add up to nothing."""

    def decide(rows):
        total = sum(row[column] or 0 for row in rows)
        return total == 0, f"{what}: {total}"

    return decide
