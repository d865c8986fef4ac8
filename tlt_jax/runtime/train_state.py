"""What training changes, and the guard of its steps: one that is not finite is skipped.

Policy and drafter are trained alike: the optimizer gets a gradient, and a loss or
gradient that is not finite leaves the state as it was. A few such steps are bad luck;
several in a row mean that training has diverged, and whoever counts them ends it.

Orbax keeps its trees as dicts and lists, leaves that are None as well, and compares
whole trees: a leaf that may be None and came in a later version would make all that was
written before unreadable, so it is asked for what was `written_like`.
"""

import dataclasses
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import struct

from tlt_jax.runtime import failures
from tlt_jax.types import Array


@struct.dataclass
class TrainState:
    """All that a step changes.

    Attributes:
      params: float32 masters; the policy's layers stacked, the drafter's without
        `draft_ids`.
      opt_state: of the optimizer.
      num_updates: int32, steps taken; skipped ones are not counted.
    """

    params: Any
    opt_state: Any
    num_updates: Array


def begin(params: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """Make the state before the first step."""
    return TrainState(params, optimizer.init(params), jnp.int32(0))


class Averaged(NamedTuple):
    """State of an optimizer that keeps a moving average of the weights.

    Attributes:
      inner: of the optimizer itself.
      average: of the weights.
      num_updates: int32, that it took in.
    """

    inner: Any
    average: Any
    num_updates: Array


def averaged(
    optimizer: optax.GradientTransformation, decay: float
) -> optax.GradientTransformation:
    """Let an optimizer keep a moving average of the weights that it makes.

    At a constant rate weights move about a better place, which their average finds.
    After n updates the decay is at most (1 + n) / (10 + n), so that the first weights
    are soon forgotten.

    Reference: Polyak and Juditsky, Acceleration of Stochastic Approximation by
    Averaging, 1992.
    """

    def init(params):
        return Averaged(optimizer.init(params), params, jnp.int32(0))

    def update(grads, state, params):
        updates, inner = optimizer.update(grads, state.inner, params)
        num = state.num_updates.astype(jnp.float32)
        kept = jnp.minimum(decay, (1 + num) / (10 + num))
        average = jax.tree.map(
            lambda old, new: kept * old + (1 - kept) * new,
            state.average,
            optax.apply_updates(params, updates),
        )
        return updates, Averaged(inner, average, state.num_updates + 1)

    return optax.GradientTransformation(init, update)


def average_of(state: TrainState) -> Any:
    """Return the average of the weights where one is kept, else the weights."""
    kept = isinstance(state.opt_state, Averaged)
    return state.opt_state.average if kept else state.params


def step(
    state: TrainState,
    grads: Any,
    loss: Array,
    optimizer: optax.GradientTransformation,
) -> tuple[TrainState, Array, Array]:
    """Take an optimizer step, unless the gradient or the scalar loss is not finite.

    Returns the state, bit for bit the old one where the step was skipped; the
    gradient's norm before clipping; and whether it was skipped, int32 0 or 1.
    """
    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(norm) & jnp.isfinite(loss)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    stepped = TrainState(
        params=optax.apply_updates(state.params, updates),
        opt_state=opt_state,
        num_updates=state.num_updates + 1,
    )
    # Selected and not branched: the state is donated, and both ways read all of it.
    state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), stepped, state)
    return state, norm, 1 - finite.astype(jnp.int32)


@dataclasses.dataclass
class Skips:
    """Counts steps that were skipped one after the other; `most` end the training."""

    most: int
    in_a_row: int = 0

    def count(self, skipped: Any) -> None:
        """Count a step that was taken or skipped."""
        self.in_a_row = self.in_a_row + 1 if skipped else 0

    def check(self, remedy: str = "") -> None:
        """End a training that has diverged; without a `remedy` the caller adds it.

        Raises:
          failures.NotFiniteError: too many steps in a row were skipped.
        """
        if self.in_a_row >= self.most:
            raise failures.NotFiniteError(
                f"{self.in_a_row} updates in a row were not finite"
                + (f": {remedy}" if remedy else "")
            )


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """What survives a kill of something that is trained beside other state.

    Beside the state of its training further arrays, by name and in host memory, and
    anything that JSON can hold.
    """

    state: TrainState
    arrays: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    meta: dict[str, Any] = dataclasses.field(default_factory=dict)


def written_like(path: pathlib.Path, tree: Any) -> Any:
    """Describe what was written to `path` by the leaves of `tree`: to ask Orbax for."""
    written = ocp.StandardCheckpointHandler().metadata(path).tree
    return _leaves_of(written, ocp.tree.serialize_tree(tree, keep_empty_nodes=True))


def restored(found: Any, tree: Any) -> Any:
    """Bring what Orbax has read into the form of `tree`."""
    names = ocp.tree.serialize_tree(tree, keep_empty_nodes=True)
    leaves = _leaves_of(names, found)
    made = ocp.tree.deserialize_tree(leaves, tree, keep_empty_nodes=True)
    # It does not give back what an optimizer's empty states are.
    return jax.tree.unflatten(jax.tree.structure(tree), jax.tree.leaves(made))


def _leaves_of(names: Any, tree: Any) -> Any:
    """Give what `names` names, of dicts and lists, the leaves of a tree; or None."""
    if isinstance(names, dict):
        there = tree or {}
        return {key: _leaves_of(part, there.get(key)) for key, part in names.items()}
    if isinstance(names, list | tuple):
        there = [*(tree or ()), *[None] * len(names)]
        return [_leaves_of(*pair) for pair in zip(names, there, strict=False)]
    return tree
