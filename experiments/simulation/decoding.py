"""A simulated decode call: what drafts bring each row, and when the call comes back."""

from collections.abc import Sequence

import numpy as np

from experiments.simulation import workload


def lifetimes(
    rng: np.random.Generator,
    survival: np.ndarray,
    known: Sequence[tuple[workload.Drafted | None, int]],
    num_steps: int,
) -> np.ndarray:
    """Draws how many drafts each step of each row has accepted, `[rows, num_steps]`.

    Args:
      rng: of rows of which nothing is known.
      survival: `[depth]`, the chance that at least 1, 2, ... drafts are accepted.
      known: of each row how its text fared before, or None, and its tokens so far.
      num_steps: drawn of each row.
    """
    draws = rng.random((len(known), num_steps))
    # At least d where the draw is below the chance of that.
    found = np.searchsorted(-survival, -draws, side="left")
    for i, (drafted, start) in enumerate(known):
        if drafted is not None:
            found[i] = drafted.accepted(start, len(survival), num_steps)
    return found


def decode(
    left: np.ndarray, lifetimes: np.ndarray | None, limit: int, quota: int
) -> tuple[int, np.ndarray, tuple[int, ...]]:
    """Decodes rows once, as the engine's program does.

    Steps are taken until a row has drawn `limit` tokens or `quota` rows have ended.

    Args:
      left: `[n] int`, tokens until each row ends.
      lifetimes: `[n, limit] int`, drafts accepted by each step; None: plain steps.
      limit: tokens of a row.
      quota: rows.

    Returns:
      Steps; tokens of each row, `[n] int`; `num_accepted` as of `tuner.Call`, up to
      the deepest draft that was accepted.
    """
    most = np.minimum(left, limit)
    if lifetimes is None:
        ended = np.sort(left)
        num_steps = int(min(ended[min(quota, len(left)) - 1], limit))
        return num_steps, np.minimum(left, num_steps), ()
    totals = np.minimum(np.cumsum(1 + lifetimes, axis=1), most[:, None])
    stops = (totals.max(axis=0) >= limit) | (
        (totals >= left[:, None]).sum(axis=0) >= quota
    )
    num_steps = int(np.argmax(stops)) + 1
    before = np.concatenate([np.zeros((len(left), 1), int), totals], axis=1)
    alive = before[:, :num_steps] < left[:, None]
    lived = np.bincount(lifetimes[:, :num_steps][alive])
    accepted = tuple(int(n) for n in np.cumsum(lived[::-1])[::-1])
    return num_steps, totals[:, num_steps - 1], accepted
