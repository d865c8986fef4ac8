"""Propose by a drafter that guesses whole blocks in one pass (`models.drafters.block`).

What was accepted last is taken in, as by any learned drafter, but for keys and values
alone; the pass reads the last column of it and the masks behind. Then a tree grows
level by level without another one: behind a guessed token the logits are those of its
depth, and what the token adds to them. Tokens are ranked as elsewhere (`expansion`),
coupled by default, so that the guess of depth k behind the guess u is
argmax(sharpness x log q_k(. | u) + noise).

Reference: Daliri, Musco and Suresh, Coupling without Communication and
Drafter-Invariant Speculative Decoding, 2024.
"""

import dataclasses

import jax.numpy as jnp
from jax import lax

from tlt_jax.models import attention, kv_cache, transformer
from tlt_jax.models.drafters import block as block_lib
from tlt_jax.models.drafters import drafter
from tlt_jax.models.drafters import head as drafter_head
from tlt_jax.specdec import decode, protocols
from tlt_jax.specdec.proposers import expansion, learned
from tlt_jax.types import Array


@dataclasses.dataclass(frozen=True)
class Block(learned.Learned):
    """Proposes by one pass of the drafter a step; see `learned.Learned`.

    The strategy is no deeper than the drafter's blocks.
    """

    def propose(
        self,
        inputs: learned.Draft,
        state: learned.State,
        rows: decode.Rows,
        noise: Array,
    ) -> protocols.Proposal:
        """See `protocols.Proposer`."""
        assert self.strategy.draft_depth <= self.cfg.block_size, self.strategy
        weights, depth = inputs.weights, self.strategy.draft_depth
        grow = expansion.Expansion(
            self.strategy, self.settings, self.cfg, self._is_sampled
        )
        score, alive_B = self._score(inputs, noise), rows.remaining > 0
        hidden_DBL, keys, values = self._read(weights, state, rows, alive_B)
        # Of all depths at once: the head is read once.
        logits_BLV = drafter_head.logits(
            *(weights.params, self.cfg, weights.head, hidden_DBL, self.settings.kernels)
        )

        def children(tokens_BE, level):
            """Rank what may follow tokens of the level above."""
            of_level_B1V = lax.dynamic_index_in_dim(logits_BLV, level - 1, axis=1)
            follows_BEV = self._follows(weights, tokens_BE)
            draft_ids = weights.params.draft_ids
            return grow.ranked(draft_ids, score, of_level_B1V + follows_BEV, level)

        live = grow.begun(*children(rows.pending[:, None], 1))

        def goes_on(state):
            level, live = state
            return (level <= depth) & jnp.any(grow.may_matter(live, alive_B))

        def expand(state):
            level, live = state
            found = children(live.tokens, level)
            return level + 1, grow.grown(level, live, *found)[0]

        if depth > 1:
            _, live = lax.while_loop(goes_on, expand, (jnp.int32(2), live))
        laws = grow.laws(live, weights.params.draft_ids)
        return protocols.Proposal(live.found, laws, (keys, values, live.slopes))

    def _read(self, weights, state, rows, alive_B) -> tuple[Array, Array, Array]:
        """Take in, and fill the block.

        What the head multiplies of each depth, `[D, B, draft_depth]`; and keys and
        values `[K, H, B, A]` of what was taken in.
        """
        size = self.cfg.block_size
        how = jnp.dtype(self.settings.dtype), self.settings.kernels
        view = kv_cache.CacheView(state.pages, rows.page_table, state.start)
        ragged_rows = self._ragged(state, alive_B)
        # Of these columns keys and values alone are used: the compiler leaves the rest
        # of the layer out.
        taken_in = learned.take_in(
            weights, self.cfg, state.tokens, state.features, view, *how, ragged_rows
        )
        keys, values = taken_in.keys, taken_in.values
        if ragged_rows is not None:
            keys, values = map(ragged_rows.unpack, (keys, values))
        # The root's column once more, then its masks, [B, size].
        root_B1 = state.counts[:, None] - 1
        root_FB1 = jnp.take_along_axis(state.features, root_B1[None], axis=2)
        features_DB1 = drafter.fuse(
            weights.params, self.cfg, root_FB1.astype(how[0]), how[1]
        )
        embedded_DB1 = weights.embedded(rows.pending[:, None], how[0])
        shape = (*embedded_DB1.shape[:2], size)
        place_BL = jnp.broadcast_to(jnp.arange(size), shape[1:])
        # Before the root, which stands among the block's own columns.
        is_before_BA = jnp.arange(keys.shape[3]) < root_B1
        is_before_BLA = jnp.repeat(is_before_BA[:, None], size, axis=1)
        out = drafter.forward(
            weights.params,
            self.cfg,
            jnp.broadcast_to(embedded_DB1, shape),
            jnp.broadcast_to(features_DB1, shape),
            state.start[:, None] + root_B1 + place_BL,
            visibility=attention.Visibility(
                ancestors=jnp.broadcast_to(block_lib.seen(size), (shape[1], size, size))
            ),
            view=view,
            past=drafter.Past(keys, values, is_before_BLA),
            added=block_lib.masks_of(weights.params.block, place_BL, how[0]),
            dtype=how[0],
            kernels=how[1],
        )
        return out.hidden[..., : self.strategy.draft_depth], keys, values

    def _follows(self, weights, tokens_BE) -> Array:
        """Return what tokens add to the logits of the next, `[B, E, Vd] float32`."""
        embedded_DBE = weights.embedded(tokens_BE, jnp.dtype(self.settings.dtype))
        eps = self.cfg.layer.rms_norm_eps
        code_RBE = block_lib.code_of(weights.params.block, embedded_DBE, eps)
        kernels = self.settings.kernels
        return transformer.head_logits(weights.follow, code_RBE, kernels)
