"""The draft tree: guessed continuations of a row in fixed arrays.

Node 0 is the root, the row's pending token. Every node stands behind its parent. The
target reads the whole tree in one pass, in which a node sees the row's cached past, its
ancestors and itself.
"""

import jax.numpy as jnp
from flax import struct
from jax import lax

from tlt_jax.specdec import candidates as candidates_lib
from tlt_jax.types import Array

ROOT = 0
_WORD = 32


@struct.dataclass
class DraftTree:
    """A tree for each row.

    Attributes:
      tokens: `[B, W] int32`; nodes that are not valid hold token 0.
      parents: `[B, W] int32`, index of the parent; the root is its own.
      depths: `[B, W] int32`, 0 for the root.
      valid: `[B, W] bool`; the root always is, and so is a valid node's parent.
      chances: `[B, W] float32`, estimated probability that a node comes true if its
        parent does; the root's is 1, and so is that of nodes that are not valid.
      sources: `[B, W] int32`, the candidate that a node is; -1: none.
    """

    tokens: Array
    parents: Array
    depths: Array
    valid: Array
    chances: Array
    sources: Array


def select(
    candidates: candidates_lib.Candidates, root: Array, tokens_to_verify: int
) -> DraftTree:
    """Keep the best nodes of a candidate set as a tree.

    A node's score is never above its parent's and parents stand first, so that the best
    nodes by score, ties by index, contain the parents of all their members. Of W nodes,
    `tokens_to_verify`, one is the pending token, `root [B] int32`: at least W - 1
    candidates are given for each row, and where they are absent nodes are not valid.
    Valid nodes stand before those that are not.
    """
    batch, num = candidates.tokens.shape
    scores, best = lax.top_k(candidates.scores, tokens_to_verify - 1)
    # In their order, and behind them what is absent.
    best = jnp.sort(jnp.where(scores > -jnp.inf, best, num), axis=1)
    valid = best < num
    chosen = jnp.zeros((batch, num), jnp.int32)
    chosen = chosen.at[jnp.arange(batch)[:, None], best].set(1, mode="drop")
    # Node index of each chosen candidate; index -1, the root, wraps to the last column.
    index = jnp.concatenate(
        [jnp.cumsum(chosen, axis=1), jnp.zeros((batch, 1), jnp.int32)], axis=1
    )

    def take(x):
        return jnp.take_along_axis(x, jnp.minimum(best, num - 1), axis=1)

    parent_of = take(candidates.parents)
    parents = jnp.take_along_axis(index, parent_of % (num + 1), axis=1)

    def with_root(first, rest):
        return jnp.concatenate([first[:, None].astype(rest.dtype), rest], axis=1)

    zeros = jnp.zeros((batch,), jnp.int32)
    parents = with_root(zeros, jnp.where(valid, parents, ROOT))
    scores = with_root(zeros, jnp.where(valid, take(candidates.scores), 0.0))
    chances = jnp.exp(scores - jnp.take_along_axis(scores, parents, axis=1))
    return DraftTree(
        tokens=with_root(root, jnp.where(valid, take(candidates.tokens), 0)),
        parents=parents,
        depths=with_root(zeros, jnp.where(valid, take(candidates.depths), 0)),
        valid=with_root(jnp.ones((batch,), bool), valid),
        chances=chances,
        sources=with_root(zeros - 1, jnp.where(valid, best, -1)),
    )


def share(
    candidates: candidates_lib.Candidates,
    alive: Array,
    tokens_to_verify: int,
    budget: int,
) -> candidates_lib.Candidates:
    """Drop all but the best candidates of the whole batch.

    What is left and the roots of the rows that are `alive [B] bool` are at most
    `budget` nodes, and at most `tokens_to_verify` of a row; rows that are not keep
    nothing. Of equal scores those of earlier rows are kept, in a row those of lower
    index, so that with a candidate its parent is left as well.
    """
    batch, num = candidates.tokens.shape
    wanted = alive[:, None] & candidates.present()
    scores = jnp.where(wanted, candidates.scores, -jnp.inf)
    of_row, which = lax.top_k(scores, tokens_to_verify - 1)
    num_kept = min(budget, of_row.size)
    best, place = lax.top_k(of_row.reshape(-1), num_kept)
    room = budget - jnp.sum(alive)
    place = jnp.where(jnp.arange(num_kept) < room, place, of_row.size)
    row = place // (tokens_to_verify - 1)
    column = which.reshape(-1)[jnp.minimum(place, of_row.size - 1)]
    kept = jnp.full((batch, num), -jnp.inf, scores.dtype)
    return candidates.replace(scores=kept.at[row, column].set(best, mode="drop"))


def ancestor_words(tree: DraftTree, draft_depth: int) -> Array:
    """Say for each node which nodes it sees: its ancestors and itself, a bit each.

    No node is deeper than `draft_depth`. Of `[B, W, ceil(W / 32)] uint32` bit s % 32 of
    word s // 32 stands for node s.
    """
    num_nodes = tree.parents.shape[1]
    words = jnp.arange(-(-num_nodes // _WORD))
    node = jnp.broadcast_to(jnp.arange(num_nodes), tree.parents.shape)
    seen = jnp.zeros((*tree.parents.shape, words.shape[0]), jnp.uint32)
    for _ in range(draft_depth + 1):
        bit = jnp.uint32(1) << (node % _WORD).astype(jnp.uint32)
        here = (node // _WORD)[..., None] == words
        seen = seen | jnp.where(here, bit[..., None], jnp.uint32(0))
        node = jnp.take_along_axis(tree.parents, node, axis=1)
    return seen


def unpack_words(words: Array, num_nodes: int) -> Array:
    """Turn `[B, W, ceil(W / 32)] uint32` bits into a mask `[B, W, num_nodes] bool`."""
    node = jnp.arange(num_nodes)
    bits = words[..., node // _WORD] >> (node % _WORD).astype(jnp.uint32)
    return (bits & 1).astype(bool)
