"""Candidate continuations of rows, as every proposer gives them, in fixed arrays.

A set is a forest: a candidate continues its parent, or the row's text. No two
candidates of a row have the same parent and the same token, so a path stands for one
candidate.
"""

import jax.numpy as jnp
from flax import struct
from jax import lax

from tlt_jax.types import Array

NO_PARENT = -1


@struct.dataclass
class Candidates:
    """Guessed tokens after each row's text.

    Attributes:
      tokens: `[B, C] int32`; absent candidates hold 0.
      parents: `[B, C] int32`, index of the candidate continued, less than one's own;
        -1: the root, that is the row's text. Absent ones hold -1.
      depths: `[B, C] int32`, 1 for children of the root; absent ones hold 0.
      scores: `[B, C] float32`, log of the estimated probability that the whole path
        down to the candidate is accepted, never above the parent's; -inf: absent.
    """

    tokens: Array
    parents: Array
    depths: Array
    scores: Array

    def present(self) -> Array:
        """Say which candidates there are, `[B, C] bool`."""
        return self.scores > -jnp.inf


def combine(first: Candidates, second: Candidates) -> Candidates:
    """Unite two sets: candidates with equal paths become one, with the better score.

    A child's score stays at or below its parent's, as each of the two that became one
    is at or below one of the two parents that did. The cost is Ca x Cb compares a
    level of `second`: the smaller and flatter set goes there.

    Of `[B, Ca]` and `[B, Cb]` candidates come `[B, Ca + Cb]`: those of `first` keep
    their places, those of `second` follow in order, and those that `first` has too are
    absent there.
    """
    num_first, num_second = first.tokens.shape[1], second.tokens.shape[1]
    there = first.present()[:, None, :]
    alike = (second.tokens[:, :, None] == first.tokens[:, None, :]) & there
    itself = num_first + jnp.arange(num_second, dtype=jnp.int32)

    def equals(places):
        """Pairs `[B, Cb, Ca]` with equal tokens after equal parents."""
        parents = _of_parent(places, second.parents, NO_PARENT)
        return alike & (parents[:, :, None] == first.parents[:, None, :])

    def unite(_, places):
        # Right down to one level more each time.
        index = jnp.arange(num_first, dtype=jnp.int32)
        found = jnp.where(equals(places), index, num_first)
        found = jnp.min(found, axis=2, initial=num_first)
        return jnp.where(found < num_first, found, itself)

    alone = jnp.broadcast_to(itself, second.tokens.shape)
    places = lax.fori_loop(0, jnp.max(second.depths, initial=0), unite, alone)
    theirs = jnp.where(equals(places), second.scores[:, :, None], -jnp.inf)
    scores = jnp.maximum(first.scores, jnp.max(theirs, axis=1, initial=-jnp.inf))
    new = second.present() & (places == itself)
    parents = _of_parent(places, second.parents, NO_PARENT)

    def join(values, others, absent):
        return jnp.concatenate([values, jnp.where(new, others, absent)], axis=1)

    return Candidates(
        tokens=join(first.tokens, second.tokens, 0),
        parents=join(first.parents, parents, NO_PARENT),
        depths=join(first.depths, second.depths, 0),
        scores=join(scores, second.scores, -jnp.inf),
    )


def came_true(
    candidates: Candidates, drawn: Array, counts: Array
) -> tuple[Array, Array]:
    """Say which candidates the target's draws bore out, and whose parents.

    The tokens drawn in a step judge every candidate, those that no tree had room for
    included.

    Args:
      candidates: of the step.
      drawn: `[B, A] int32`, tokens drawn in it: the accepted ones and what followed.
      counts: `[B] int32`, how many; 0: the row took no part.

    Returns:
      `[B, C] bool` twice: those that came true, and those behind whose parent, which
      did, a token was drawn.
    """
    present = candidates.present()
    place = candidates.depths - 1
    reached = present & (place < counts[:, None])
    column = jnp.clip(place, 0, drawn.shape[1] - 1)
    wanted = jnp.take_along_axis(drawn, column, axis=1)
    hit = reached & (candidates.tokens == wanted)
    parent_true = reached & (candidates.parents < 0)
    for _ in range(drawn.shape[1] - 1):
        accepted = (hit & parent_true).astype(jnp.int32)
        parent_true = reached & (_of_parent(accepted, candidates.parents, 1) == 1)
    return hit & parent_true, parent_true


def judge(candidates: Candidates, drawn: Array, counts: Array) -> tuple[Array, Array]:
    """Say which candidates the target's draws bore out, and which had their chance.

    A candidate had its chance if its parent came true, a token was drawn after it, and
    no earlier child of the parent was that token. See `came_true` for the arguments.

    Returns:
      accepted `[B, C] bool`, and tried `[B, C] bool`; whatever is accepted was tried.
    """
    accepted, parent_true = came_true(candidates, drawn, counts)
    index = jnp.arange(accepted.shape[1])
    siblings = candidates.parents[:, :, None] == candidates.parents[:, None, :]
    settled = siblings & accepted[:, None, :] & (index < index[:, None])
    return accepted, parent_true & ~jnp.any(settled, axis=2)


def chances(candidates: Candidates) -> Array:
    """Estimate how likely each comes true if its parent does, `[B, C]`; absent: 0."""
    parents = jnp.where(candidates.present(), candidates.parents, NO_PARENT)
    return jnp.exp(candidates.scores - _of_parent(candidates.scores, parents, 0))


def _of_parent(values: Array, parents: Array, at_root: int) -> Array:
    """Give each candidate its parent's value, `[B, C]`."""
    of_parent = jnp.take_along_axis(values, jnp.maximum(parents, 0), axis=1)
    return jnp.where(parents < 0, at_root, of_parent)
