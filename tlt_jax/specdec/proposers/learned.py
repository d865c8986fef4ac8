"""Propose by a drafter that was trained for the target.

In each step the drafter first takes in what the target accepted last, at positions
behind those in its cache, and expands a tree from there (`expansion`). What it took in
is appended to its pages when the step ends; a call begins with what the host says that
the drafter has not seen.
"""

import dataclasses

import jax.numpy as jnp
from flax import struct
from jax import lax

from tlt_jax.models import kernels as kernels_lib
from tlt_jax.models import kv_cache
from tlt_jax.models import params as model_params
from tlt_jax.models.drafters import drafter
from tlt_jax.models.drafters import head as drafter_head
from tlt_jax.specdec import decode, protocols
from tlt_jax.specdec import strategy as strategy_lib
from tlt_jax.specdec.proposers import expansion
from tlt_jax.types import Array

RANKINGS = ("coupled", "deterministic")
# Not for users to choose: a chain drawn from the drafter's laws, for a chain rule.
SAMPLED = "sampled"


@struct.dataclass
class DrafterWeights:
    """What programs read of a drafter.

    Attributes:
      params: its own weights, without a head.
      embed: `[V, D]`, the target's embedding.
      head: `[Vd, D]`, the target's head rows of the draft vocabulary, or its own.
    """

    params: drafter.DrafterParams
    embed: Array
    head: Array

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
    return DrafterWeights(params.replace(head=None), target.embed, head)


@struct.dataclass
class Draft:
    """What the host gives for a call.

    Attributes:
      weights: what the drafter computes with.
      tau: float32 scalar, temperature of the coupled score, at least about 0.1.
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
class Accepted:
    """What the target took since the drafter's cache was last extended.

    Attributes:
      tokens: `[B, A] int32`, of positions `start + 1` on.
      features: `[n x D, B, A]`, the target's, of positions `start` on.
      start: `[B] int32`, positions in the drafter's cache.
      counts: `[B] int32`, 1 <= counts <= A columns that are meant.
    """

    tokens: Array
    features: Array
    start: Array
    counts: Array


@struct.dataclass
class State:
    """What a step changes.

    Attributes:
      pages: the drafter's cache.
      accepted: what it has still to take in.
    """

    pages: kv_cache.PagedCache
    accepted: Accepted


@dataclasses.dataclass(frozen=True)
class Learned(protocols.Proposer):
    """Proposes by a drafter that was trained for the target.

    Attributes:
      strategy: depth and width.
      settings: of the target; at temperature 0 there is no noise, and the drafter's
        laws are those of temperature 1, which keeps the order.
      cfg: the drafter.
      ranking: one of `RANKINGS`, or `SAMPLED`: draw a chain by noise that is not the
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
    def _dtype(self) -> jnp.dtype:
        return jnp.dtype(self.settings.dtype)

    def init(self, inputs: Draft, caches: protocols.Caches, rows: decode.Rows) -> State:
        """Find what the drafter has still to take in when a call begins."""
        behind_B = rows.lengths - inputs.lengths
        most = inputs.tokens.shape[1]
        features_FBA = kv_cache.read_features(
            caches.target, rows.page_table, inputs.lengths, most
        )[: self.cfg.num_read]
        meant_BA = jnp.arange(most) < behind_B[:, None]
        accepted = Accepted(
            tokens=inputs.tokens,
            # Slots that were never written may hold anything.
            features=jnp.where(meant_BA, features_FBA, 0),
            start=inputs.lengths,
            # A text of one token has no cached position to draft from: a zero feature.
            counts=jnp.maximum(behind_B, 1),
        )
        return State(caches.drafter, accepted)

    def propose(
        self, inputs: Draft, state: State, rows: decode.Rows, noise: Array
    ) -> protocols.Proposal:
        """Expand the tree of every row, see `protocols.Proposer`.

        Returns:
          `strategy.num_drafted` candidates a row; extra the keys and values
          `[K, H, B, A]` of what was taken in.
        """
        assert self.strategy.topk == 1 or not self._is_sampled, self.strategy
        weights, accepted = inputs.weights, state.accepted
        grow = expansion.Expansion(
            self.strategy, self.settings, self.cfg, self._is_sampled
        )
        score = self._score(inputs, noise)
        view = kv_cache.CacheView(state.pages, rows.page_table, accepted.start)
        taken_in = self._take_in(weights, accepted, view)
        # The root's output stands where the last token was taken in.
        last = (accepted.counts - 1)[None, :, None]
        root_DB1 = jnp.take_along_axis(taken_in.hidden, last, axis=2)
        live = grow.first_level(weights, score, accepted.counts, taken_in, root_DB1)
        if self.strategy.draft_depth > 1:
            root_position_B = accepted.start + accepted.counts - 1

            def expand(level, live):
                positions_B = root_position_B + level - 1
                return grow.expand(weights, score, view, positions_B, level, live)

            live = lax.fori_loop(2, self.strategy.draft_depth + 1, expand, live)
        laws = live.probs
        if self._is_sampled:
            laws = _whole_laws(
                laws, weights.params.draft_ids, self.settings.cfg.vocab_size
            )
        return protocols.Proposal(live.found, laws, (taken_in.keys, taken_in.values))

    def advance(
        self,
        inputs: Draft,
        state: State,
        rows: decode.Rows,
        proposal: protocols.Proposal,
        taken: protocols.Taken,
    ) -> State:
        """Keep what was taken in; what the target took now is next."""
        del inputs
        walk, alive_B, before = taken.walk, taken.alive, state.accepted
        keys, values = proposal.extra
        pages = kv_cache.append(
            state.pages,
            (keys,),
            (values,),
            rows.page_table,
            decode.after(walk.tokens, before.start),
            jnp.where(alive_B, before.counts, 0),
        )
        # Of the W nodes' features those along the path, `[n x D, B, A]`.
        features_FBA = jnp.take_along_axis(
            taken.features[: self.cfg.num_read], walk.path[None], axis=2
        )
        # In a row that rides along nothing changes.
        alive_B1 = alive_B[:, None]
        accepted = Accepted(
            tokens=jnp.where(alive_B1, walk.tokens, before.tokens),
            features=jnp.where(alive_B1, features_FBA, before.features),
            start=jnp.where(alive_B, rows.lengths, before.start),
            counts=jnp.where(alive_B, jnp.maximum(taken.counts, 1), before.counts),
        )
        return State(pages, accepted)

    def finish(
        self, state: State, caches: protocols.Caches
    ) -> tuple[protocols.Caches, Array]:
        """Give the pages back; tell `[B] int32`, the positions in them."""
        return caches.replace(drafter=state.pages), state.accepted.start

    def _score(self, inputs: Draft, noise: Array) -> expansion.Score:
        if self._is_sampled:
            return expansion.Score(noise, 1.0, 1.0)
        is_drawn = self.settings.sampling_cfg.temperature > 0
        coupled = self.ranking == "coupled" and is_drawn
        return expansion.Score(noise if coupled else None, inputs.tau, inputs.sharpness)

    def _take_in(
        self, weights: DrafterWeights, accepted: Accepted, view: kv_cache.CacheView
    ) -> drafter.Output:
        """Read what the target accepted last, `[..., B, A]`; no page changes."""
        width, kernels = accepted.tokens.shape[1], self.settings.kernels
        features_FBA = accepted.features.astype(self._dtype)
        return drafter.forward(
            weights.params,
            self.cfg,
            weights.embedded(accepted.tokens, self._dtype),
            drafter.fuse(weights.params, self.cfg, features_FBA, kernels),
            accepted.start[:, None] + jnp.arange(width),
            view=view,
            dtype=self._dtype,
            kernels=kernels,
        )


def _whole_laws(probs: Array, draft_ids: Array | None, vocab_size: int) -> Array:
    """Spread laws over the draft vocabulary, `[..., Vd]`, over all of it, `[..., V]`.

    Tokens that cannot be drafted have 0.
    """
    if draft_ids is None:
        return probs
    zeros = jnp.zeros((*probs.shape[:-1], vocab_size), probs.dtype)
    return zeros.at[..., draft_ids].add(probs)


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
      weights: the drafter.
      cache: the target's pages; their features are read.
      drafter_cache: the drafter's pages; donate them.
      tokens: `[B, T] int32`, of positions `start + 1` on; T a multiple of the page
        size.
      counts: `[B] int32`, positions to fill.
      page_table: `[B, max_pages] int32`.
      start: `[B] int32`, multiples of the page size.
      cfg: the drafter.
      dtype: of activations.
      kernels: see `transformer.forward`.

    Returns:
      The drafter's pages.
    """
    width = tokens.shape[1]
    features = kv_cache.read_features(cache, page_table, start, width)[: cfg.num_read]
    # Slots that were never written may hold anything.
    features = jnp.where(jnp.arange(width) < counts[:, None], features, 0)
    out = drafter.forward(
        weights.params,
        cfg,
        weights.embedded(tokens, dtype),
        drafter.fuse(weights.params, cfg, features.astype(dtype), kernels),
        start[:, None] + jnp.arange(width),
        view=kv_cache.CacheView(drafter_cache, page_table, start),
        dtype=dtype,
        kernels=kernels,
    )
    return kv_cache.append_pages(
        drafter_cache, (out.keys,), (out.values,), page_table, start, counts
    )
