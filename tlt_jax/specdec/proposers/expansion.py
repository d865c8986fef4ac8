"""Expand the learned drafter's tree level by level.

The `topk` best nodes of a level get `topk` children each. A node attends to the
drafter's cache, to its own ancestors and to itself.

Coupled ranking orders candidates by the same Gumbel noise with which the target will
draw that position, so that it guesses the sample and not the mode. A child's score
estimates the chance that it is the target's draw: softmax over the vocabulary of
(sharpness x draft_logprobs + noise) / tau, multiplied along the path. A drafter is less
certain than its target, as a rule; then the noise would outweigh what it knows, and a
sharpness above 1 makes up for it. Tau says how far off the drafter is all the same: the
softmax is the law of the draw, given the noise, where the target's log-probabilities
are the sharpened ones plus Gumbel noise of scale tau. Both are measured with each
version of a drafter (`training.acceptance`) and follow what becomes of its drafts
(`calibration`), for which a chance comes with its slopes. Deterministic ranking, the
paper's, takes the drafter's probabilities themselves.

For a rule that compares laws the tree is sampled from the drafter's: tau and sharpness
are 1, the noise is not the target's. The children of a node, the largest of its
log-probabilities plus noise in order, are then draws without replacement. Which nodes
there are may not depend on what was drawn: a tree that was cut where its tokens look
unlikely is no sample of the laws. So the scores of a tree that is sampled are a prior,
by the ranks along the path alone (`_RANK_PRIOR`): its shape is a function of the
strategy, with a node it has the node's parent and the sibling drawn before it.

Reference: Li et al., EAGLE-2, 2024, section 4; Daliri, Musco and Suresh, Coupling
without Communication and Drafter-Invariant Speculative Decoding, 2024; Kool, van Hoof
and Welling, Stochastic Beams and Where to Find Them, 2019, section 2 (draws without
replacement).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from tlt_jax.models import attention, ragged
from tlt_jax.models.drafters import drafter
from tlt_jax.models.drafters import head as drafter_head
from tlt_jax.specdec import calibration, decode, protocols, sampling
from tlt_jax.specdec import candidates as candidates_lib
from tlt_jax.specdec import strategy as strategy_lib
from tlt_jax.types import Array

# Log of the chance that a sampled node is accepted if its parent is: of a node's first
# child, and what each child drawn before it takes off. Sums of both are exact in
# float32, so that ties are ties.
_RANK_PRIOR = (-0.25, -1.75)


@struct.dataclass
class Score:
    """By what the children of a node are ordered."""

    noise: Array | None  # [B, >= draft_depth, V], of depth 1 on; None: by probability
    tau: Array
    sharpness: Array


@struct.dataclass
class Level:
    """State between levels: what was found, and the nodes to be expanded next.

    Keys, values, mask and features are of drafters that read a level by its own.
    """

    found: candidates_lib.Candidates
    tokens: Array  # [B, E]
    scores: Array  # [B, E]
    index: Array  # [B, E], of the live node among the candidates
    probs: Array | None  # [B, X, Vd], laws behind the root and all that were expanded
    behind: Array | None = None  # [B, C], which of them is the one behind a candidate
    slopes: calibration.Slopes | None = None  # [B, C], of the candidates' log chances
    keys: Array | None = None  # [K, H, B, S]: what was taken in, a slot for each node
    values: Array | None = None
    mask: Array | None = None  # [B, E, S]: who is an ancestor of the live node
    features: Array | None = None  # [D, B, E], the drafter's output at its parent


@dataclasses.dataclass(frozen=True)
class Expansion:
    """What the expansion of a tree is compiled for.

    Attributes:
      strategy: depth and width.
      settings: of the target; temperature 0 counts as 1, which keeps the order.
      cfg: the drafter.
      keep_laws: the tree is sampled, keep the laws that it is sampled from.
    """

    strategy: strategy_lib.Strategy
    settings: decode.Settings
    cfg: drafter.DrafterConfig
    keep_laws: bool

    def first_level(self, weights, score, counts_B, taken_in, root_DB1) -> Level:
        """Find the root's children: they are candidates, and all of them are live."""
        _, _, batch, width = taken_in.keys.shape
        depth, topk = self.strategy.draft_depth, self.strategy.topk
        live = self.begun(*self._children(weights, score, root_DB1, 1))
        # Nodes see the columns that were just taken in, and later their ancestors,
        # each of which will stand in a slot behind those columns.
        slots = width + (depth - 1) * topk
        seen_BS = jnp.arange(slots) < counts_B[:, None]
        shape = (*taken_in.keys.shape[:3], slots)
        zeros = jnp.zeros(shape, jnp.dtype(self.settings.dtype))
        return live.replace(
            keys=zeros.at[..., :width].set(taken_in.keys),
            values=zeros.at[..., :width].set(taken_in.values),
            mask=jnp.broadcast_to(seen_BS[:, None], (batch, topk, slots)),
            features=jnp.broadcast_to(root_DB1, (root_DB1.shape[0], batch, topk)),
        )

    def begun(
        self,
        ids_B1E: Array,
        gains_B1E: Array,
        slopes_B1E: calibration.Slopes | None,
        probs_B1V: Array | None,
    ) -> Level:
        """Begin with the root's children: they are candidates, and all of them live."""
        ids_BE, scores_BE = ids_B1E[:, 0], gains_B1E[:, 0]
        (batch, topk), num = ids_BE.shape, self.strategy.num_drafted
        behind_BC = None
        if probs_B1V is not None:
            # Of the root, and of E nodes of each level but the last.
            more = (self.strategy.draft_depth - 1) * topk
            probs_B1V = jnp.pad(probs_B1V, [(0, 0), (0, more), (0, 0)])
            behind_BC = jnp.zeros((batch, num), jnp.int32)

        # Room for all levels: E candidates of this one, E x E of each further one.
        def begin(absent, values_BE):
            all_BC = jnp.full((batch, num), absent, values_BE.dtype)
            return all_BC.at[:, :topk].set(values_BE)

        return Level(
            found=candidates_lib.Candidates(
                tokens=begin(0, ids_BE),
                parents=jnp.full((batch, num), candidates_lib.NO_PARENT, jnp.int32),
                depths=begin(0, jnp.ones_like(ids_BE)),
                scores=begin(-jnp.inf, scores_BE),
            ),
            tokens=ids_BE,
            scores=scores_BE,
            index=jnp.broadcast_to(jnp.arange(topk, dtype=jnp.int32), (batch, topk)),
            probs=probs_B1V,
            behind=behind_BC,
            slopes=jax.tree.map(lambda x_B1E: begin(0, x_B1E[:, 0]), slopes_B1E),
        )

    def grown(
        self,
        level: Array,
        live: Level,
        ids_BEE: Array,
        gains_BEE: Array,
        slopes_BEE: calibration.Slopes | None,
        probs_BEV: Array | None,
    ) -> tuple[Level, Array]:
        """Add the children of the live nodes; the E best of them live on.

        Second `[B, E]`, which of the live nodes is the parent of each.
        """
        batch, topk = live.tokens.shape
        # E x E candidates (C), each with its path's score; those of the levels before
        # stand first.
        ids_BC = ids_BEE.reshape(batch, topk**2)
        scores_BC = (live.scores[..., None] + gains_BEE).reshape(batch, topk**2)
        first = topk + (level - 2) * topk**2

        def put(x_BC, new_BC):
            return lax.dynamic_update_slice_in_dim(x_BC, new_BC, first, axis=1)

        best_BE, chosen_BE = lax.top_k(scores_BC, topk)
        found = live.found
        if probs_BEV is not None:
            slot = 1 + (level - 2) * topk
            probs_BXV = lax.dynamic_update_slice_in_dim(
                live.probs, probs_BEV, slot, axis=1
            )
            row_B1 = jnp.arange(batch)[:, None]
            behind_BC = live.behind.at[row_B1, live.index].set(slot + jnp.arange(topk))
            live = live.replace(probs=probs_BXV, behind=behind_BC)
        grown = live.replace(
            found=candidates_lib.Candidates(
                tokens=put(found.tokens, ids_BC),
                parents=put(found.parents, jnp.repeat(live.index, topk, axis=1)),
                depths=put(found.depths, jnp.zeros_like(ids_BC) + level),
                scores=put(found.scores, scores_BC),
            ),
            tokens=jnp.take_along_axis(ids_BC, chosen_BE, axis=1),
            scores=best_BE,
            index=first + chosen_BE,
            slopes=jax.tree.map(
                lambda x_BC, new_BEE: put(x_BC, new_BEE.reshape(batch, topk**2)),
                *(live.slopes, slopes_BEE),
            ),
        )
        return grown, chosen_BE // topk

    def expand(self, weights, score, view, positions_B, level, live, rows) -> Level:
        """Find the children of the live nodes, and which of them live on.

        Of those alone that `rows` lay side by side; None: of all.
        """
        (batch, topk), dtype = live.tokens.shape, jnp.dtype(self.settings.dtype)
        width = live.keys.shape[3] - (self.strategy.draft_depth - 1) * topk
        # Live nodes do not see each other: none is another's ancestor.
        eye_BEE = jnp.broadcast_to(jnp.eye(topk, dtype=bool), (batch, topk, topk))
        positions_BE = jnp.broadcast_to(positions_B[:, None], (batch, topk))
        columns = (live.tokens, live.features, positions_BE)
        if rows is not None:
            columns = tuple(map(rows.pack, columns))
        tokens, features, positions = columns
        out = drafter.forward(
            weights.params,
            self.cfg,
            weights.embedded(tokens, dtype),
            features,
            positions,
            visibility=attention.Visibility(ancestors=eye_BEE),
            view=view,
            past=drafter.Past(live.keys, live.values, live.mask),
            rows=rows,
            dtype=dtype,
            kernels=self.settings.kernels,
        )
        children = self._children(weights, score, out.hidden, level, rows)
        if rows is not None:
            out = jax.tree.map(rows.unpack, out)
        # Each node that lives on sees what its parent saw, and its parent.
        grown, parent_BE = self.grown(level, live, *children)
        slot = width + (level - 2) * topk
        is_parent_BES = slot + parent_BE[..., None] == jnp.arange(live.mask.shape[2])
        mask_BES = jnp.take_along_axis(live.mask, parent_BE[..., None], axis=1)

        def put_columns(x_KHBS, new_KHBE):
            return lax.dynamic_update_slice_in_dim(x_KHBS, new_KHBE, slot, axis=3)

        return grown.replace(
            keys=put_columns(live.keys, out.keys),
            values=put_columns(live.values, out.values),
            mask=mask_BES | is_parent_BES,
            features=jnp.take_along_axis(out.hidden, parent_BE[None], axis=2),
        )

    def may_matter(self, live: Level, alive: Array) -> Array:
        """Say of which live nodes a child may yet be verified, `[B, E] bool`.

        Not where as many nodes as are verified score at least as high: of the row all
        that it can have, or all that the rows `alive [B] bool` share. For a child's
        score is at most its parent's. In a row those that matter stand first: live
        nodes fall in score.
        """
        num_rows, width = live.tokens.shape[0], self.strategy.tokens_to_verify
        all_fit = self.strategy.num_drafted < width
        if all_fit and not self.strategy.shares(num_rows):
            return jnp.broadcast_to(alive[:, None], live.tokens.shape)
        room = self.strategy.num_columns(num_rows) - jnp.sum(alive)

        def num_above(scores):
            """Nodes of each row that score at least so high, `[..., B]`."""
            is_above = live.found.scores >= scores[..., None, None]
            return jnp.minimum(jnp.sum(is_above & alive[:, None], axis=-1), width - 1)

        above_BEB = num_above(live.scores)
        of_own_BE = jnp.diagonal(above_BEB, axis1=0, axis2=2).T
        in_row_BE = alive[:, None] & (of_own_BE < width - 1)
        return in_row_BE & (jnp.sum(above_BEB, axis=2) < room)

    def most_expanded(self, num_rows: int, level: int) -> int:
        """Say how many live nodes matter at most before a level is drafted.

        Where k nodes of a row matter, at least k + level - 2 of its nodes score as high
        as the worst of all that do: they, and a path to them. With the row's root, and
        with one child that is yet to be verified, they are among the N nodes of the
        batch, and among the W of the row. So rows of which as many matter as can, one
        after another, are the most; what is left of N may hold a part of one more.
        """
        strategy = self.strategy
        of_row = min(strategy.topk, strategy.tokens_to_verify - level)
        room, path = strategy.num_columns(num_rows) - 1, level - 1
        num_full = min(num_rows, room // (of_row + path))
        rest = room - num_full * (of_row + path)
        part = max(rest - path, 0) if num_full < num_rows else 0
        return num_full * of_row + part

    def spans(self, num_rows: int) -> tuple[tuple[int, int], ...]:
        """Part the levels by how many nodes are expanded: last level, and columns.

        The deeper, the fewer; with half as many or fewer another span begins, whose
        program is one of its own. Levels without any are left out. Where laws are kept
        each node keeps its place.
        """
        depth, spans = self.strategy.draft_depth, []
        if self.keep_laws and depth > 1:
            return ((depth, num_rows * self.strategy.topk),)
        for level in range(2, depth + 1):
            most = self.most_expanded(num_rows, level)
            if most == 0:
                break
            if spans and 2 * most > spans[-1][1]:
                spans[-1] = level, spans[-1][1]
            else:
                spans.append((level, most))
        return tuple(spans)

    def side_by_side(self, matters: Array, num_columns: int) -> ragged.Ragged | None:
        """Lay the live nodes of which `matters [B, E] bool` says so side by side.

        None: there might be as many of them as there are nodes.
        """
        num_rows, topk = matters.shape
        if num_columns >= num_rows * topk:
            return None
        counts_B = jnp.sum(matters, axis=1, dtype=jnp.int32)
        return ragged.of_counts(counts_B, topk, num_columns)

    def _children(self, weights, score, hidden_DBE, level, rows=None) -> tuple:
        """Choose the best children behind nodes, from the drafter's outputs at them.

        See `ranked`.
        """
        kernels = self.settings.kernels
        scores_BEV = drafter_head.logits(
            weights.params, self.cfg, weights.head, hidden_DBE, kernels
        )
        return self.ranked(weights.params.draft_ids, score, scores_BEV, level, rows)

    def ranked(
        self,
        draft_ids: Array | None,
        score: Score,
        scores_BEV: Array,
        level: Array,
        rows: ragged.Ragged | None = None,
    ) -> tuple[Array, Array, calibration.Slopes | None, Array | None]:
        """Choose the best children behind nodes of a level, from the drafter's logits.

        Tokens, and log of the estimated chances to be the target's draw, `[B, E', E]`
        (E' is 1 at the root, then E), with its slopes where it is coupled; and, where
        laws are kept, those behind the nodes, `[B, E', Vd]`. Logits may be laid side by
        side, `[1, N, Vd]`: nodes that are not among them have no children.
        """
        kernels = self.settings.kernels
        temperature = self.settings.sampling_cfg.temperature
        if temperature not in (0, 1):
            scores_BEV = scores_BEV / temperature
        # The law is looked at before chance and sharpness change the scores.
        probs_BEV = None
        if self.keep_laws:
            normaliser_BE = sampling.log_sum_exp(scores_BEV)
            probs_BEV = jnp.exp(scores_BEV - normaliser_BE[..., None])
        elif (
            score.noise is not None
            and self.strategy.topk == 1
            and kernels.rank is not None
        ):
            chosen = self._only_child(draft_ids, score, scores_BEV, level, rows)
            return *self._by_row(*chosen, rows), None
        logits_BEV = scores_BEV
        if score.noise is not None:
            noise_B1V = lax.dynamic_index_in_dim(score.noise, level - 1, axis=1)
            if draft_ids is not None:
                noise_B1V = noise_B1V[..., draft_ids]
            if rows is not None:
                noise_B1V = noise_B1V[rows.owners(), 0][None]
            scores_BEV = (scores_BEV * score.sharpness + noise_B1V) / score.tau
        # Of each node's V scores the E best, with their share of all.
        best_BEE, ids_BEE = best_of(scores_BEV, self.strategy.topk)
        slopes_BEE = None
        if score.noise is not None and not self.keep_laws:
            slopes_BEE = calibration.slopes(
                *(logits_BEV, scores_BEV, ids_BEE, score.sharpness / score.tau)
            )
        if draft_ids is not None:
            ids_BEE = draft_ids[ids_BEE]
        if self.keep_laws and self.strategy.topk > 1:
            first, further = _RANK_PRIOR
            ranks = jnp.arange(self.strategy.topk, dtype=jnp.float32)
            gains_BEE = jnp.broadcast_to(first + further * ranks, ids_BEE.shape)
        else:
            gains_BEE = best_BEE - sampling.log_sum_exp(scores_BEV)[..., None]
        return *self._by_row(ids_BEE, gains_BEE, slopes_BEE, rows), probs_BEV

    def laws(self, live: Level, draft_ids: Array | None) -> protocols.Laws | None:
        """Return the laws that the candidates were sampled from, where they are."""
        if not self.keep_laws:
            return None
        return protocols.Laws(live.probs, live.behind, draft_ids)

    def _by_row(self, ids, gains, slopes, rows) -> tuple[Array, Array, Any]:
        """Bring children `[1, N, E]` of nodes side by side to `[B, E', E]`."""
        if rows is None:
            return ids, gains, slopes
        # Columns last as they are unpacked, [E, 1, N] to [E, B, E'], and back.
        ids_BEE, gains_BEE, slopes_BEE = jax.tree.map(
            lambda x: jnp.moveaxis(rows.unpack(jnp.moveaxis(x, -1, 0)), 0, -1),
            (ids, gains, slopes),
        )
        own_BE = jnp.arange(rows.width) < rows.counts[:, None]
        gains_BEE = jnp.where(own_BE[..., None], gains_BEE, -jnp.inf)
        return ids_BEE, gains_BEE, slopes_BEE

    def _only_child(self, draft_ids, score, scores_BEV, level, rows) -> tuple:
        """Choose the child of each chain's node by a kernel, `[..., 1]` each."""
        batch, num, vocab_size = score.noise.shape
        owners = jnp.arange(batch) if rows is None else rows.owners()
        if draft_ids is None:
            # The kernel reads each row's noise where it lies.
            noise_RV = score.noise.reshape(-1, vocab_size)
            owners = owners * num + level - 1
        else:
            noise_RV = lax.dynamic_index_in_dim(
                score.noise, level - 1, axis=1, keepdims=False
            )[:, draft_ids]
        shape = scores_BEV.shape[:-1]
        ids, *chances = self.settings.kernels.rank(
            scores_BEV.reshape(-1, scores_BEV.shape[-1]),
            noise_RV,
            *(owners.astype(jnp.int32), score.sharpness, score.tau),
        )
        if draft_ids is not None:
            ids = draft_ids[ids]
        gains, *by = (x.reshape(*shape, 1) for x in chances)
        return ids.reshape(*shape, 1), gains, calibration.Slopes(*by)


def best_of(scores: Array, k: int) -> tuple[Array, Array]:
    """Return the k largest entries of `[..., V]` and their indices, largest first.

    For few of them, one reduction each: it vectorises, and sorting does not.
    """
    if k > 4:
        return lax.top_k(scores, k)
    values, ids = [], []
    for _ in range(k):
        index = sampling.argmax(scores)
        values.append(jnp.take_along_axis(scores, index[..., None], axis=-1)[..., 0])
        ids.append(index)
        if len(ids) < k:
            here = jnp.arange(scores.shape[-1]) == index[..., None]
            scores = jnp.where(here, -jnp.inf, scores)
    return jnp.stack(values, axis=-1), jnp.stack(ids, axis=-1)
