"""Candidate nodes of a draft tree."""

from flax import struct

from tlt_jax.types import Array


@struct.dataclass
class Candidates:
    """Guessed continuations of each row as a tree over candidates.

    Attributes:
      tokens: `[B, C] int32`.
      parents: `[B, C] int32`, index of a candidate before it; -1: the root.
      depths: `[B, C] int32`, 1 for children of the root.
      scores: `[B, C] float32`, log of the estimated probability that the whole path
        down to the node is accepted; -inf: absent. Never above the parent's.
    """

    tokens: Array
    parents: Array
    depths: Array
    scores: Array
