"""Propose by a drafter that was trained for the target.

In each step the drafter first takes in what the target accepted last, at positions
behind those in its cache, and expands a tree from there (`expansion`). What it took in
is appended to its pages when the step ends; a call begins with what the host says that
the drafter has not seen.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from tlt_jax.models import kernels as kernels_lib
from tlt_jax.models import kv_cache, ragged
from tlt_jax.models import params as model_params
from tlt_jax.models.drafters import block, drafter
from tlt_jax.models.drafters import head as drafter_head
from tlt_jax.specdec import calibration, decode, protocols
from tlt_jax.specdec import strategy as strategy_lib
from tlt_jax.specdec.proposers import expansion
from tlt_jax.types import Array

RANKINGS = ("coupled", "deterministic")
# Not for users to choose: drawn from the drafter's laws, for a rule that compares laws.
SAMPLED = "sampled"


@struct.dataclass
class DrafterWeights:
    """What programs read of a drafter.

    Attributes:
      params: its own weights, without a head.
      embed: `[V, D]`, the target's embedding.
      head: `[Vd, D]`, the target's head rows of the draft vocabulary, or its own.
      follow: `[Vd, R]`, of a block drafter: from what a token says of the next one, see
        `models.drafters.block`, to logits; else None.
    """

    params: drafter.DrafterParams
    embed: Array
    head: Array
    follow: Array | None = None

    def embedded(self, tokens: Array, dtype) -> Array:
        """Look up `tokens [B, T]`, `[D, B, T]`."""
        return jnp.moveaxis(self.embed[tokens].astype(dtype), -1, 0)


def weights_of(
    params: drafter.DrafterParams, target: model_params.Params
) -> DrafterWeights:
    """Put a drafter's weights together with what it reads of its target."""
    head = params.head
    if head is None:
        head = drafter_head.head_rows(target, params.draft_ids)
    follow = None
    if params.block is not None:
        # Once for weights, and not for every step.
        follow = block.to_logits(params.block, head)
    return DrafterWeights(params.replace(head=None), target.embed, head, follow)


@struct.dataclass
class Draft:
    """What the host gives for a call.

    Attributes:
      weights: what the drafter computes with.
      tau: float32 scalar, temperature of the coupled score, at least about 0.1; see
        `expansion`.
      sharpness: float32 scalar, what the drafter's log-probabilities count for beside
        the noise; 1: as they are.
      lengths: `[B] int32`, positions in its cache, 1 to A fewer than in the target's.
      tokens: `[B, A] int32`, of positions `lengths + 1` on: the rest of the text.
    """

    weights: DrafterWeights
    tau: Array
    sharpness: Array
    lengths: Array
    tokens: Array


@struct.dataclass
class State:
    """What a step changes: the drafter's cache, and what it has still to take in.

    Attributes:
      pages: the cache.
      tokens: `[B, A] int32`, of positions `start + 1` on.
      features: `[n x D, B, A]`, the target's, of positions `start` on.
      start: `[B] int32`, positions in the cache.
      counts: `[B] int32`, 1 <= counts <= A columns that are meant.
      evidence: of what became of its drafts so far, where they were coupled.
    """

    pages: kv_cache.PagedCache
    tokens: Array
    features: Array
    start: Array
    counts: Array
    evidence: calibration.Evidence | None = None


@dataclasses.dataclass(frozen=True)
class Learned(protocols.Proposer):
    """Proposes by a drafter that was trained for the target.

    `strategy.num_drafted` candidates a row; a proposal's extra are the keys and values
    `[K, H, B, A]` of what was taken in, and the slopes of its candidates' chances. The
    host is told `[B] int32`, the positions in the drafter's pages, and the evidence of
    the call, which is None where drafts are not coupled.

    Attributes:
      strategy: depth and width.
      settings: of the target; at temperature 0 there is no noise, and the drafter's
        laws are those of temperature 1, which keeps the order.
      cfg: the drafter.
      ranking: one of `RANKINGS`, or `SAMPLED`: draw a tree by noise that is not the
        target's, and keep the laws that it is drawn from.
    """

    strategy: strategy_lib.Strategy
    settings: decode.Settings
    cfg: drafter.DrafterConfig
    ranking: str = "coupled"

    @property
    def _is_sampled(self) -> bool:
        return self.ranking == SAMPLED

    @property
    def _is_coupled(self) -> bool:
        is_drawn = self.settings.sampling_cfg.temperature > 0
        return self.ranking == "coupled" and is_drawn

    def init(self, inputs: Draft, caches: protocols.Caches, rows: decode.Rows) -> State:
        behind_B = rows.lengths - inputs.lengths
        where = rows.page_table, inputs.lengths, inputs.tokens.shape[1]
        return State(
            pages=caches.drafter,
            tokens=inputs.tokens,
            features=_features(
                *(caches.target, *where, behind_B, self.cfg, self.settings.kernels)
            ),
            start=inputs.lengths,
            # A text of one token has no cached position to draft from: a zero feature.
            counts=jnp.maximum(behind_B, 1),
            evidence=calibration.nothing() if self._is_coupled else None,
        )

    def propose(
        self, inputs: Draft, state: State, rows: decode.Rows, noise: Array
    ) -> protocols.Proposal:
        weights = inputs.weights
        grow = expansion.Expansion(
            self.strategy, self.settings, self.cfg, self._is_sampled
        )
        score = self._score(inputs, noise)
        view = kv_cache.CacheView(state.pages, rows.page_table, state.start)
        how = jnp.dtype(self.settings.dtype), self.settings.kernels
        alive_B = rows.remaining > 0
        ragged_rows = self._ragged(state, alive_B)
        taken_in = take_in(
            weights, self.cfg, state.tokens, state.features, view, *how, ragged_rows
        )
        # The root's output stands where the last token was taken in.
        last_B1 = jnp.maximum(state.counts - 1, 0)[:, None]
        if ragged_rows is None:
            root_DB1 = jnp.take_along_axis(taken_in.hidden, last_B1[None], axis=2)
        else:
            root_DB1 = taken_in.hidden[:, 0, ragged_rows.columns(last_B1)]
            taken_in = jax.tree.map(ragged_rows.unpack, taken_in)
        live = grow.first_level(weights, score, state.counts, taken_in, root_DB1)
        root_position_B = state.start + state.counts - 1

        def goes_on(last, state):
            level, live, matters_BE = state
            return (level <= last) & jnp.any(matters_BE)

        def expand(num_columns, state):
            level, live, matters_BE = state
            positions_B = root_position_B + level - 1
            packed = grow.side_by_side(matters_BE, num_columns)
            live = grow.expand(weights, score, view, positions_B, level, live, packed)
            return level + 1, live, grow.may_matter(live, alive_B)

        grown = jnp.int32(2), live, grow.may_matter(live, alive_B)
        for last, num_columns in grow.spans(alive_B.shape[0]):
            more = functools.partial(goes_on, last)
            one = functools.partial(expand, num_columns)
            grown = lax.while_loop(more, one, grown)
        live = grown[1]
        laws = grow.laws(live, weights.params.draft_ids)
        extra = taken_in.keys, taken_in.values, live.slopes
        return protocols.Proposal(live.found, laws, extra)

    def advance(
        self,
        inputs: Draft,
        state: State,
        rows: decode.Rows,
        proposal: protocols.Proposal,
        taken: protocols.Taken,
    ) -> State:
        walk, alive_B = taken.walk, taken.alive
        keys, values, slopes = proposal.extra
        pages = kv_cache.append(
            state.pages,
            (keys,),
            (values,),
            rows.page_table,
            decode.after(walk.tokens, state.start),
            jnp.where(alive_B, state.counts, 0),
        )
        features_FBA = taken.features[: self.cfg.num_read]
        evidence = state.evidence
        if evidence is not None:
            found = proposal.candidates
            here = calibration.evidence(found, slopes, walk.tokens, taken.counts)
            evidence = jax.tree.map(jnp.add, evidence, here)
        # In a row that rides along nothing changes.
        alive_B1 = alive_B[:, None]
        return State(
            pages=pages,
            tokens=jnp.where(alive_B1, walk.tokens, state.tokens),
            features=jnp.where(alive_B1, features_FBA, state.features),
            start=jnp.where(alive_B, rows.lengths, state.start),
            counts=jnp.where(alive_B, jnp.maximum(taken.counts, 1), state.counts),
            evidence=evidence,
        )

    def finish(
        self, state: State, caches: protocols.Caches
    ) -> tuple[protocols.Caches, tuple[Array, calibration.Evidence | None]]:
        return caches.replace(drafter=state.pages), (state.start, state.evidence)

    def _ragged(self, state: State, alive: Array) -> ragged.Ragged | None:
        """Lay what rows take in side by side, where they share: few take in much.

        All together they accepted at most what was verified of them, or are told by
        the host, which sees to it.
        """
        (num_rows, width), strategy = state.tokens.shape, self.strategy
        if not strategy.shares(num_rows):
            return None
        counts_B = jnp.where(alive, state.counts, 0)
        return ragged.of_counts(counts_B, width, strategy.num_columns(num_rows))

    def _score(self, inputs: Draft, noise: Array) -> expansion.Score:
        if self._is_sampled:
            return expansion.Score(noise, 1.0, 1.0)
        noise = noise if self._is_coupled else None
        return expansion.Score(noise, inputs.tau, inputs.sharpness)


def _features(cache, page_table, start, width, counts, cfg, kernels) -> Array:
    """Read the target's features at `counts` positions from `start` on, `[F, B, T]`."""
    features_FBT = kv_cache.read_features(cache, page_table, start, width)
    # Pages of a device have a part of each; a sum over parts would be another one.
    features_FBT = kernels.whole(features_FBT)
    # Slots that were never written may hold anything.
    meant_BT = jnp.arange(width) < counts[:, None]
    return jnp.where(meant_BT, features_FBT[: cfg.num_read], 0)


def take_in(
    weights: DrafterWeights,
    cfg: drafter.DrafterConfig,
    tokens: Array,
    features: Array,
    view: kv_cache.CacheView,
    dtype: jnp.dtype,
    kernels: kernels_lib.Kernels,
    rows: ragged.Ragged | None = None,
) -> drafter.Output:
    """Read tokens and features behind the view's, `[..., B, T]`; no page changes.

    What comes of it is `[..., 1, N]` where `rows` lay them side by side.
    """
    positions = view.lengths[:, None] + jnp.arange(tokens.shape[1])
    if rows is not None:
        tokens, positions, features = map(rows.pack, (tokens, positions, features))
    return drafter.forward(
        weights.params,
        cfg,
        weights.embedded(tokens, dtype),
        drafter.fuse(weights.params, cfg, features.astype(dtype), kernels),
        positions,
        view=view,
        rows=rows,
        dtype=dtype,
        kernels=kernels,
    )


def fill(
    weights: DrafterWeights,
    cache: kv_cache.PagedCache,
    drafter_cache: kv_cache.PagedCache,
    tokens: Array,
    counts: Array,
    page_table: Array,
    start: Array,
    *,
    cfg: drafter.DrafterConfig,
    dtype=jnp.float32,
    kernels: kernels_lib.Kernels = kernels_lib.PORTABLE,
) -> kv_cache.PagedCache:
    """Extend the drafter's cache by a chunk, from the target's features in the pages.

    Args:
      weights, cfg: the drafter.
      cache: the target's pages; their features are read.
      drafter_cache: the drafter's pages, which are returned: donate them.
      tokens: `[B, T] int32`, of positions `start + 1` on; T a multiple of the page
        size.
      counts: `[B] int32`, positions to fill.
      page_table: `[B, max_pages] int32`.
      start: `[B] int32`, multiples of the page size.
      dtype, kernels: see `transformer.forward`.
    """
    where = page_table, start, tokens.shape[1]
    features = _features(cache, *where, counts, cfg, kernels)
    view = kv_cache.CacheView(drafter_cache, page_table, start)
    out = take_in(weights, cfg, tokens, features, view, dtype, kernels)
    return kv_cache.append_pages(
        drafter_cache, (out.keys,), (out.values,), page_table, start, counts
    )
