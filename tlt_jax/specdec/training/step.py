"""A drafter's training step, in pieces between which it can be given up.

    under_way = begin(params, batch, target)
    for start in starts(num_bases, size):
        under_way = add(under_way, params, batch, target, start, size=size)
    grads = close(under_way.grads, under_way.seen_grads, params, batch, target)
    state, outcome = update(state, grads, under_way.sums, batch)

Bases see the columns of their row through `unroll.Seen` and nothing of one another, so
their losses and gradients add up, those with respect to what was seen as well: `close`
takes them back to the weights. Nothing changes the state but `update`. One piece of all
bases is the plain step.
"""

import jax
import jax.numpy as jnp
import optax
from flax import struct

from tlt_jax.models.drafters import drafter
from tlt_jax.runtime import train_state
from tlt_jax.specdec.training import objectives, unroll
from tlt_jax.types import Array


@struct.dataclass
class UnderWay:
    """A step of which some bases are done.

    Attributes:
      seen: what all bases see.
      grads: with respect to the weights, seen apart.
      seen_grads: with respect to `seen`.
      sums: of `objectives.sums_of`.
    """

    seen: unroll.Seen
    grads: drafter.DrafterParams
    seen_grads: unroll.Seen
    sums: dict[str, Array]


def starts(num_bases: int, size: int) -> range:
    """First bases of the pieces."""
    return range(0, num_bases, size)


def begin(
    params: drafter.DrafterParams,
    batch: unroll.Batch,
    target: unroll.Target,
    *,
    cfg: unroll.ForwardConfig,
    objective: objectives.Objective,
) -> UnderWay:
    """Begin a step; see `objectives.sums_of` for the arguments."""
    seen = unroll.see(params, batch, target, cfg=cfg)
    grads, seen_grads = jax.tree.map(jnp.zeros_like, (params, seen))
    zero = jnp.zeros(objective.num_steps, jnp.float32)
    return UnderWay(seen, grads, seen_grads, dict.fromkeys(objectives.SUMS, zero))


def add(
    under_way: UnderWay,
    params: drafter.DrafterParams,
    batch: unroll.Batch,
    target: unroll.Target,
    start: Array,
    *,
    size: int,
    cfg: unroll.ForwardConfig,
    objective: objectives.Objective,
) -> UnderWay:
    """Do the bases from `start` on, `size` of each row."""

    def compute(params, seen):
        sums = objectives.sums_of(
            params, seen, batch, target, start, size, cfg=cfg, objective=objective
        )
        return objectives.total_of(sums, batch, objective)[0], sums

    here, sums = jax.grad(compute, argnums=(0, 1), has_aux=True)(params, under_way.seen)
    before = under_way.grads, under_way.seen_grads, under_way.sums
    grads, seen_grads, sums = jax.tree.map(jnp.add, before, (*here, sums))
    return UnderWay(under_way.seen, grads, seen_grads, sums)


def close(
    grads: drafter.DrafterParams,
    seen_grads: unroll.Seen,
    params: drafter.DrafterParams,
    batch: unroll.Batch,
    target: unroll.Target,
    *,
    cfg: unroll.ForwardConfig,
) -> drafter.DrafterParams:
    """Take the gradient with respect to what was seen back to the weights, and add."""

    def see(params):
        return unroll.see(params, batch, target, cfg=cfg)

    (through_seen,) = jax.vjp(see, params)[1](seen_grads)
    return jax.tree.map(jnp.add, grads, through_seen)


def update(
    state: train_state.TrainState,
    grads: drafter.DrafterParams,
    sums: dict[str, Array],
    batch: unroll.Batch,
    *,
    objective: objectives.Objective,
    optimizer: optax.GradientTransformation,
) -> tuple[train_state.TrainState, dict[str, Array]]:
    """Take the optimizer's step, unless loss or gradient is not finite.

    `grads` are those of `close`, `sums` those of all bases. Returns the state, bit for
    bit the old one where the step was skipped, and the metrics of `objectives.total_of`
    with `loss`, `grad_norm` and `skipped` (0 or 1).
    """
    loss, metrics = objectives.total_of(sums, batch, objective)
    state, norm, skipped = train_state.step(state, grads, loss, optimizer)
    return state, metrics | {"loss": loss, "grad_norm": norm, "skipped": skipped}
