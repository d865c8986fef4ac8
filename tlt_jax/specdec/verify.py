"""Verification: walk the draft tree by the target's own position-keyed draws.

At a node of depth d the target draws the token of position `lengths + d + 1` with that
position's noise. If a child carries it, that child is accepted and the walk goes on
from there; else the token drawn is the recovered one, or the bonus behind a leaf. So
the tokens that come out are those of plain decoding, whatever was proposed.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import struct

from tlt_jax.models import ragged
from tlt_jax.specdec import decode, noise, sampling
from tlt_jax.specdec import tree as tree_lib
from tlt_jax.types import Array


@struct.dataclass
class Walk:
    """The accepted path of each row.

    Attributes:
      path: `[B, A] int32`, node at each depth; behind the accepted ones the last again.
      tokens: `[B, A] int32`, drawn at those nodes.
      num_accepted: `[B] int32`, nodes accepted below the root; the first
        `num_accepted + 1` entries of the others are meant.
    """

    path: Array
    tokens: Array
    num_accepted: Array


@struct.dataclass
class Chance:
    """The randomness of a step, of which proposers see a part.

    Attributes:
      draft: `[B, A, V]`, Gumbel noise of the positions behind depth 0 to A - 1, that
        part. By the keyed rule the target draws with it, so that a drafter can guess
        the draw; one column of zeros at temperature 0.
    """

    draft: Array


@dataclasses.dataclass(frozen=True)
class Keyed:
    """The rule by which tokens are those of plain decoding, see `protocols.Rule`."""

    def chance(
        self, keys: Array, lengths: Array, num: int, settings: decode.Settings
    ) -> Chance:
        """See `protocols.Rule`."""
        batch, vocab_size = lengths.shape[0], settings.cfg.vocab_size
        if settings.sampling_cfg.temperature == 0:
            return Chance(jnp.zeros((batch, num, 1), jnp.float32))
        positions_BA = lengths[:, None] + 1 + jnp.arange(num)
        noise_NV = noise.gumbel(
            jnp.repeat(keys, num, axis=0),
            positions_BA.reshape(-1),
            vocab_size,
            settings.kernels,
        )
        return Chance(noise_NV.reshape(batch, num, vocab_size))

    def judge(
        self,
        law: sampling.Law,
        tree: tree_lib.DraftTree,
        proposal: Any,
        chance: Chance,
        settings: decode.Settings,
        rows: ragged.Ragged | None = None,
    ) -> tuple[Walk, Array]:
        """Walk by the target's draws, whatever the proposal's laws were."""
        del proposal
        noise_BAV, which = chance.draft, tree.depths
        batch, most, vocab_size = noise_BAV.shape
        if rows is None:
            drawn_BW = law.draw(noise_BAV, which, settings.kernels)
            logprobs_BW = law.logprob_of(drawn_BW)
        else:
            # Of one row of columns each takes its own row's noise.
            which = rows.pack(which + most * jnp.arange(batch)[:, None])
            noise_1MV = noise_BAV.reshape(1, batch * most, vocab_size)
            drawn_1N = law.draw(noise_1MV, which, settings.kernels)
            drawn_BW, logprobs_BW = map(
                rows.unpack, (drawn_1N, law.logprob_of(drawn_1N))
            )
        taken = walk(tree, drawn_BW, most)
        return taken, jnp.take_along_axis(logprobs_BW, taken.path, axis=1)


# Tenths of chance, by which drafts are counted.
NUM_TENTHS = 10


def reliability(tree: tree_lib.DraftTree, walk: Walk, alive: Array) -> Array:
    """Count what came of the drafts that were given some chance, by tenths of it.

    A node had its chance if its parent came true, in a row that is `alive [B] bool`.
    Returns `[3, NUM_TENTHS] float32`: how many, the sum of their chances, and how many
    came true. Where chances are right the last two agree.
    """
    # Of a node of depth d, the path's node above it and the one beside it.
    above = jnp.maximum(tree.depths - 1, 0)
    most = walk.path.shape[1] - 1
    index = jnp.arange(tree.tokens.shape[1])

    def on_path(depth):
        return jnp.take_along_axis(walk.path, jnp.minimum(depth, most), axis=1)

    reached = walk.num_accepted[:, None]
    tried = tree.valid & (index > tree_lib.ROOT) & alive[:, None]
    tried = tried & (above <= reached) & (tree.parents == on_path(above))
    true = tried & (tree.depths <= reached) & (on_path(tree.depths) == index)
    tenth = jnp.clip((tree.chances * NUM_TENTHS).astype(jnp.int32), 0, NUM_TENTHS - 1)
    in_tenth = tenth == jnp.arange(NUM_TENTHS)[:, None, None]
    counted = jnp.stack([tried, jnp.where(tried, tree.chances, 0.0), true])
    return jnp.sum(jnp.where(in_tenth, counted[:, None], 0.0), axis=(2, 3))


def walk(tree: tree_lib.DraftTree, drawn: Array, max_accept_length: int) -> Walk:
    """Follow the drawn tokens down the trees.

    `drawn [B, W] int32` has the target's token at every node; `max_accept_length` is A,
    one more than the deepest node's depth.
    """
    num_nodes = tree.tokens.shape[1]
    index = jnp.arange(num_nodes)
    node = jnp.zeros(tree.tokens.shape[:1], jnp.int32)
    going = jnp.ones(node.shape, bool)
    num_accepted = jnp.zeros(node.shape, jnp.int32)
    path, tokens = [], []
    for _ in range(max_accept_length):
        token = jnp.take_along_axis(drawn, node[:, None], axis=1)[:, 0]
        path.append(node)
        tokens.append(token)
        is_child = tree.valid & (index > tree_lib.ROOT)
        is_child = is_child & (tree.parents == node[:, None])
        fits = is_child & (tree.tokens == token[:, None])
        going = going & jnp.any(fits, axis=1)
        child = jnp.min(jnp.where(fits, index, num_nodes - 1), axis=1)
        node = jnp.where(going, child.astype(jnp.int32), node)
        num_accepted = num_accepted + going
    return Walk(
        path=jnp.stack(path, axis=1),
        tokens=jnp.stack(tokens, axis=1),
        num_accepted=num_accepted,
    )
