"""What a smaller tree of the same step would have had accepted, counted by its room.

Nodes are ordered over the whole batch by score, so what a smaller budget verifies is
the beginning of the order: one verification tells of every smaller budget, and without
deeper nodes, which take no place in the order, of every smaller depth.
"""

import math

import jax.numpy as jnp
import numpy as np
from jax import lax

from tlt_jax.specdec import candidates as candidates_lib
from tlt_jax.specdec import strategy as strategy_lib
from tlt_jax.specdec import verify
from tlt_jax.types import Array

# Drafted nodes for each live row, by which counts are kept: R of them. The last is all.
ROOMS = (
    *(0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0),
    *(6.0, 8.0, 10.0, 12.0, 16.0, 24.0, 32.0, 48.0, 64.0, math.inf),
)


def accepted_by_room(
    candidates: candidates_lib.Candidates,
    walk: verify.Walk,
    alive: Array,
    strategy: strategy_lib.Strategy,
) -> Array:
    """Count what a step would have had accepted with less room, and less depth.

    With depth D' and room r the rows that are `alive [B] bool` have the best
    `r x number of them` nodes down to depth D', at most `tokens_to_verify - 1` each, in
    the order of `tree.share` and `tree.select`. Nodes that were left out, and come in
    where deeper ones are, count if they are what was drawn behind the path; what would
    have been drawn behind them is not known.

    Args:
      candidates: of the step, all that were proposed.
      walk: the path that was accepted.
      alive: rows that took part.
      strategy: of the step; `A - 1` levels, and the room that there was at most.

    Returns:
      `[A, R] int32`, entry 0: nodes verified within each of `ROOMS`; entry D' those
      accepted, of all rows. The last of entry A - 1 is all that was accepted.
    """
    num_rows, num = candidates.tokens.shape
    most_BW = strategy.tokens_to_verify - 1
    present_BC = candidates.present() & alive[:, None]
    left_some_out = strategy.shares(num_rows) or num > most_BW
    on_path_BC = _drawn(candidates, present_BC, walk, left_some_out)
    # Rows in the order of their scores, ties by index; what is absent stands last.
    losses_BC = jnp.where(present_BC, -candidates.scores, jnp.inf)
    depths_BC = jnp.where(present_BC, candidates.depths, strategy.max_accept_length)
    losses_BC, depths_BC, on_path_BC = lax.sort(
        (losses_BC, depths_BC, on_path_BC.astype(jnp.int32)), num_keys=1, is_stable=True
    )
    # Without deeper nodes, D': who is among the row's best, and in what place of all.
    levels_D = jnp.arange(1, strategy.max_accept_length)
    fits_BCD = depths_BC[..., None] <= levels_D
    fits_BCD = fits_BCD & (jnp.cumsum(fits_BCD, axis=1) <= most_BW)
    fits_ND = fits_BCD.reshape(-1, strategy.draft_depth)
    on_path_N = on_path_BC.reshape(-1)
    if num_rows > 1:
        order_N = jnp.argsort(losses_BC.reshape(-1), stable=True)
        fits_ND, on_path_N = fits_ND[order_N], on_path_N[order_N]
    place_ND = jnp.cumsum(fits_ND, axis=0)  # From 1 on.
    num_alive = jnp.sum(alive)
    room = strategy.num_columns(num_rows) - num_alive
    accepted_ND = fits_ND & (on_path_N[:, None] > 0) & (place_ND <= room)
    most_R = jnp.array(ROOMS) * jnp.maximum(num_alive, 1)
    within_NDR = accepted_ND[..., None] & (place_ND[..., None] <= most_R)
    verified = jnp.minimum(place_ND[-1, -1], room)
    verified_R = jnp.minimum(jnp.floor(most_R), verified).astype(jnp.int32)
    accepted_DR = jnp.sum(within_NDR, axis=0, dtype=jnp.int32)
    return jnp.concatenate([verified_R[None], accepted_DR])


def _drawn(candidates, present, walk, left_some_out) -> Array:
    """Say which candidates are what was drawn, `[B, C] bool`: a path in each row.

    It may be one longer than what was accepted where some nodes were not verified.
    """
    index = jnp.arange(present.shape[1])
    node_B1 = jnp.full((present.shape[0], 1), candidates_lib.NO_PARENT)
    drawn = jnp.zeros(present.shape, bool)
    for depth in range(walk.tokens.shape[1] - 1):
        known_B1 = depth < walk.num_accepted[:, None] + left_some_out
        fits = present & known_B1 & (candidates.parents == node_B1)
        fits = fits & (candidates.tokens == walk.tokens[:, depth : depth + 1])
        drawn = drawn | fits
        # Beyond the last candidate, which is nobody's parent, where none fits.
        node_B1 = jnp.min(jnp.where(fits, index, index.shape[0]), 1, keepdims=True)
    return drawn


def of_chains(num_accepted: Array | np.ndarray, num_verified: int) -> Array:
    """Make the same counts of chains that share nothing, each with room for itself.

    `num_accepted [A] int32` are counts as `speculate.Speculated` has them, of rows that
    each verified `num_verified` nodes below the root. At one row this is exact.
    """
    depth = num_accepted.shape[0] - 1
    levels = np.arange(1, depth + 1)
    # A chain's node stands in the place of its depth.
    within_DR = levels[:, None] <= np.array(ROOMS)
    counted_DDR = (levels[:, None] <= levels)[..., None] & within_DR[:, None]
    weights = counted_DDR.astype(np.int32).reshape(depth, -1)
    accepted_DR = (num_accepted[1:] @ weights).reshape(depth, -1)
    verified_R = np.sum(within_DR[:num_verified], axis=0).astype(np.int32)
    xp = jnp if isinstance(num_accepted, Array) else np
    return xp.concatenate([num_accepted[0] * verified_R[None], accepted_DR])
