"""Completions as a few long arrays, the form in which processes send them."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from tlt_jax import types

_REASONS = ("eos", "stop", "length")


@dataclasses.dataclass(frozen=True)
class Columns:
    """Completions whose values lie end to end; see `types.Completion`.

    Attributes:
      request_id: `[n] int64`.
      length: `[n] int64`, tokens of each.
      reason: `[n] uint8`, its place among the reasons.
      tokens, logprobs: `[sum of length]`.
      was_drafted: the same; None: nobody noted it.
      num_routes: `[n] int64`, positions of each that have routes.
      routes: `[sum of num_routes, L, C]`; None: there are none.
    """

    request_id: np.ndarray
    length: np.ndarray
    reason: np.ndarray
    tokens: np.ndarray
    logprobs: np.ndarray
    was_drafted: np.ndarray | None
    num_routes: np.ndarray
    routes: np.ndarray | None


def of_completions(completions: Sequence[types.Completion]) -> Columns | None:
    """Lay completions out; None: there are none.

    Of all of them it was noted what was drafted, and so of routes, or of none.
    """
    if not completions:
        return None

    def joined(name):
        values = [getattr(one, name) for one in completions]
        return None if values[0] is None else np.concatenate(values)

    def counts(values):
        return np.array([0 if v is None else len(v) for v in values], np.int64)

    return Columns(
        request_id=np.array([one.request_id for one in completions], np.int64),
        length=counts([one.tokens for one in completions]),
        reason=np.array(
            [_REASONS.index(one.finish_reason) for one in completions], np.uint8
        ),
        tokens=joined("tokens"),
        logprobs=joined("logprobs"),
        was_drafted=joined("was_drafted"),
        num_routes=counts([one.routes for one in completions]),
        routes=joined("routes"),
    )


def completions_of(columns: Columns | None) -> list[types.Completion]:
    """Return the completions again, in their order; their arrays are views."""
    if columns is None:
        return []

    def parts(values, lengths):
        if values is None:
            return [None] * len(lengths)
        return np.split(values, np.cumsum(lengths)[:-1])

    lists = zip(
        columns.request_id.tolist(),
        parts(columns.tokens, columns.length),
        parts(columns.logprobs, columns.length),
        [_REASONS[reason] for reason in columns.reason],
        parts(columns.was_drafted, columns.length),
        parts(columns.routes, columns.num_routes),
        strict=True,
    )
    return [types.Completion(*values) for values in lists]
