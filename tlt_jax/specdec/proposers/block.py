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
from tlt_jax.specdec import candidates as candidates_lib
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
        assert self.strategy.topk == 1 or not self._is_sampled, self.strategy
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

        live = self._first_level(*children(rows.pending[:, None], 1))

        def goes_on(state):
            level, live = state
            return (level <= depth) & jnp.any(grow.may_matter(live, alive_B))

        def expand(state):
            level, live = state
            return level + 1, _next_level(level, live, *children(live.tokens, level))

        if depth > 1:
            _, live = lax.while_loop(goes_on, expand, (jnp.int32(2), live))
        laws = self._of_all_tokens(live.probs, weights.params.draft_ids)
        return protocols.Proposal(live.found, laws, (keys, values))

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

    def _first_level(self, ids_B1E, gains_B1E, probs_BV) -> expansion.Level:
        """Begin with the root's children: candidates, all of which are live."""
        topk, num = self.strategy.topk, self.strategy.num_drafted
        ids_BE, scores_BE = ids_B1E[:, 0], gains_B1E[:, 0]
        batch = ids_BE.shape[0]

        # Room for all levels: E candidates of this one, E x E of each further one.
        def begin(absent, values_BE):
            all_BC = jnp.full((batch, num), absent, values_BE.dtype)
            return all_BC.at[:, :topk].set(values_BE)

        if probs_BV is not None:
            shape = (batch, self.strategy.draft_depth, probs_BV.shape[-1])
            probs_BV = jnp.zeros(shape, probs_BV.dtype).at[:, 0].set(probs_BV)
        return expansion.Level(
            found=candidates_lib.Candidates(
                tokens=begin(0, ids_BE),
                parents=jnp.full((batch, num), candidates_lib.NO_PARENT, jnp.int32),
                depths=begin(0, jnp.ones_like(ids_BE)),
                scores=begin(-jnp.inf, scores_BE),
            ),
            # A block's keys were all there in its one pass.
            keys=None,
            values=None,
            mask=None,
            tokens=ids_BE,
            scores=scores_BE,
            index=jnp.broadcast_to(jnp.arange(topk, dtype=jnp.int32), (batch, topk)),
            features=None,
            probs=probs_BV,
        )

    def _of_all_tokens(self, laws, draft_ids) -> Array | None:
        """Spread laws `[B, draft_depth, Vd]` over all the vocabulary."""
        if laws is None or draft_ids is None:
            return laws
        shape = (*laws.shape[:-1], self.settings.cfg.vocab_size)
        return jnp.zeros(shape, laws.dtype).at[..., draft_ids].add(laws)


def _next_level(level, live, ids_BEE, gains_BEE, probs_BV) -> expansion.Level:
    """Add the children of the live nodes; the E best of them live on."""
    batch, topk = live.tokens.shape
    ids_BC = ids_BEE.reshape(batch, topk**2)
    scores_BC = (live.scores[..., None] + gains_BEE).reshape(batch, topk**2)
    # Those of the levels before stand first.
    first = topk + (level - 2) * topk**2

    def put(x_BC, new_BC):
        return lax.dynamic_update_slice_in_dim(x_BC, new_BC, first, axis=1)

    best_BE, chosen_BE = lax.top_k(scores_BC, topk)
    found, probs = live.found, live.probs
    return live.replace(
        found=candidates_lib.Candidates(
            tokens=put(found.tokens, ids_BC),
            parents=put(found.parents, jnp.repeat(live.index, topk, axis=1)),
            depths=put(found.depths, jnp.zeros_like(ids_BC) + level),
            scores=put(found.scores, scores_BC),
        ),
        tokens=jnp.take_along_axis(ids_BC, chosen_BE, axis=1),
        scores=best_BE,
        index=first + chosen_BE,
        probs=None if probs is None else probs.at[:, level - 1].set(probs_BV),
    )
