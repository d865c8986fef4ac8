"""Propose by a drafter that guesses whole blocks in one pass (`models.drafters.block`).

The pass takes in what was accepted last, as any learned drafter does, and reads the
masks behind it in the same forward. Then a tree grows level by level without another
one: behind a guessed token the logits are those of its depth, and what the token adds
to them. Tokens are ranked as elsewhere (`expansion`), coupled by default, so that the
guess of depth k behind the guess u is argmax(sharpness x log q_k(. | u) + noise).

Reference: Daliri, Musco and Suresh, Coupling without Communication and
Drafter-Invariant Speculative Decoding, 2024.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from tlt_jax.models import attention, kv_cache, ragged, transformer
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
        """Take in, and fill the masks behind it.

        What the head multiplies of each depth, `[D, B, draft_depth]`; and keys and
        values `[K, H, B, A]` of what was taken in.
        """
        size, width = self.cfg.block_size, state.tokens.shape[1]
        dtype, kernels = jnp.dtype(self.settings.dtype), self.settings.kernels
        places_BW, numbers_BW, seen_BWW = block_lib.lay_out(state.counts, width, size)
        tokens = jnp.take_along_axis(state.tokens, places_BW, axis=1)
        features = jnp.take_along_axis(state.features, places_BW[None], axis=2)
        numbers = numbers_BW
        positions = state.start[:, None] + jnp.arange(width + size - 1)
        ragged_rows = self._ragged_blocks(state, alive_B)
        if ragged_rows is not None:
            tokens, features, numbers, positions = map(
                ragged_rows.pack, (tokens, features, numbers, positions)
            )
        out = drafter.forward(
            weights.params,
            self.cfg,
            weights.embedded(tokens, dtype),
            drafter.fuse(weights.params, self.cfg, features.astype(dtype), kernels),
            positions,
            visibility=attention.Visibility(ancestors=seen_BWW),
            view=kv_cache.CacheView(state.pages, rows.page_table, state.start),
            rows=ragged_rows,
            added=block_lib.masks_of(weights.params.block, numbers, dtype),
            dtype=dtype,
            kernels=kernels,
        )
        if ragged_rows is not None:
            out = jax.tree.map(ragged_rows.unpack, out)
        # The root, and masks 1, 2, ... of each row.
        depths = jnp.arange(self.strategy.draft_depth)
        columns_BL = state.counts[:, None] - 1 + depths
        hidden_DBL = jnp.take_along_axis(out.hidden, columns_BL[None], axis=2)
        return hidden_DBL, out.keys[..., :width], out.values[..., :width]

    def _ragged_blocks(self, state, alive_B) -> ragged.Ragged | None:
        """Lay rows and their masks side by side, where rows share; see `_ragged`."""
        num_rows, width = state.tokens.shape
        if not self.strategy.shares(num_rows):
            return None
        more = self.cfg.block_size - 1
        counts_B = jnp.where(alive_B, state.counts + more, 0)
        num_columns = self.strategy.num_columns(num_rows) + num_rows * more
        return ragged.of_counts(counts_B, width + more, num_columns)

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
