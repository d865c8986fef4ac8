"""Draft a tree with the learned drafter.

The drafter first takes in what the target accepted last, then expands the tree level by
level: the `topk` best nodes of a level get `topk` children each. A node attends to the
drafter's cache, to its own ancestors and to itself.

Coupled ranking orders candidates by the same Gumbel noise with which the target will
draw that position, so that it guesses the sample and not the mode. A child's score
estimates the chance that it is the target's draw: softmax over the vocabulary of
(sharpness x draft_logprobs + noise) / tau, multiplied along the path. A drafter is less
certain than its target, as a rule; then the noise would outweigh what it knows, and a
sharpness above 1 makes up for it. Deterministic ranking, the paper's, takes the
drafter's probabilities themselves. With one child a node, tau and sharpness 1 and noise
that is not the target's, the tree is a chain sampled from the drafter's laws.

Reference: Li et al., EAGLE-2, 2024, section 4; Daliri, Musco and Suresh, Coupling
without Communication and Drafter-Invariant Speculative Decoding, 2024.
"""

import jax.numpy as jnp
from flax import struct
from jax import lax

from tlt_jax.models import attention, kv_cache, transformer
from tlt_jax.models import kernels as kernels_lib
from tlt_jax.models import params as model_params
from tlt_jax.models.drafters import drafter
from tlt_jax.models.drafters import head as drafter_head
from tlt_jax.specdec import candidates as candidates_lib
from tlt_jax.specdec import sampling
from tlt_jax.specdec import strategy as strategy_lib
from tlt_jax.types import Array

RANKINGS = ("coupled", "deterministic")


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


def weights_of(
    params: drafter.DrafterParams, target: model_params.Params
) -> DrafterWeights:
    """Put a drafter's weights together with what it reads of its target."""
    head = params.head
    if head is None:
        head = drafter_head.head_rows(target, params.draft_ids)
    return DrafterWeights(params.replace(head=None), target.embed, head)


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
class Drafted:
    """What the drafter made of every row.

    Attributes:
      candidates: `strategy.num_drafted` a row.
      keys, values: `[K, H, B, A]` of what was taken in, for the drafter's cache.
      probs: `[B, draft_depth, Vd]`, laws behind the first `draft_depth` tokens of a
        chain; None where they were not asked for.
    """

    candidates: candidates_lib.Candidates
    keys: Array
    values: Array
    probs: Array | None


def embedded(weights: DrafterWeights, tokens: Array, dtype) -> Array:
    """Look up `tokens [B, T]`, `[D, B, T]`."""
    return jnp.moveaxis(weights.embed[tokens].astype(dtype), -1, 0)


def draft(
    weights: DrafterWeights,
    cache: kv_cache.PagedCache,
    page_table: Array,
    accepted: Accepted,
    noise: Array | None,
    tau: Array,
    sharpness: Array,
    *,
    cfg: drafter.DrafterConfig,
    strategy: strategy_lib.Strategy,
    temperature: float,
    keep_laws: bool = False,
    dtype=jnp.float32,
    kernels: kernels_lib.Kernels = kernels_lib.PORTABLE,
) -> Drafted:
    """Expand the tree of every row.

    Args:
      weights: the drafter.
      cache: its pages; they are read only.
      page_table: `[B, max_pages] int32`.
      accepted: what to take in first.
      noise: `[B, >= draft_depth, V]` of the positions of depth 1 on; None: rank
        deterministically.
      tau: float32 scalar, temperature of the coupled score, at least about 0.1.
      sharpness: float32 scalar, what the drafter's log-probabilities count for beside
        the noise; 1: as they are.
      cfg: the drafter.
      strategy: depth and width.
      temperature: of the sampling law; 0 counts as 1, which keeps the order.
      keep_laws: return the laws of a chain, too.
      dtype: of activations.
      kernels: see `transformer.forward`.

    Returns:
      The candidates, and what belongs to them.
    """
    depth, topk = strategy.draft_depth, strategy.topk
    assert topk == 1 or not keep_laws, strategy
    batch, width = accepted.tokens.shape
    view = transformer.CacheView(cache, page_table, accepted.start)
    out = drafter.forward(
        weights.params,
        cfg,
        embedded(weights, accepted.tokens, dtype),
        drafter.fuse(weights.params, cfg, accepted.features.astype(dtype), kernels),
        accepted.start[:, None] + jnp.arange(width),
        view=view,
        dtype=dtype,
        kernels=kernels,
    )
    last = (accepted.counts - 1)[None, :, None]
    root = jnp.take_along_axis(out.hidden, last, axis=2)

    def rank_natively(scores, level):
        if weights.params.draft_ids is None:
            rows = noise.reshape(-1, noise.shape[-1])
            which = jnp.arange(batch) * noise.shape[1] + level - 1
        else:
            rows = lax.dynamic_index_in_dim(noise, level - 1, axis=1, keepdims=False)
            rows = rows[:, weights.params.draft_ids]
            which = jnp.arange(batch)
        which = which.astype(jnp.int32)
        ids, shares = kernels.rank(scores[:, 0], rows, which, sharpness, tau)
        if weights.params.draft_ids is not None:
            ids = weights.params.draft_ids[ids]
        return ids[:, None, None], shares[:, None, None]

    def rank(hidden, level):
        """Children of nodes `hidden [D, B, E']`: `[B, E', topk]` ids and scores.

        Third the law behind the first node, `[B, Vd]`, where it is asked for.
        """
        logits = drafter_head.logits(weights.params, cfg, weights.head, hidden, kernels)
        scores = logits if temperature in (0, 1) else logits / temperature
        if (
            noise is not None
            and topk == 1
            and kernels.rank is not None
            and not keep_laws
        ):
            return *rank_natively(scores, level), None
        probs = None
        if keep_laws:
            probs = jnp.exp(scores - sampling.log_sum_exp(scores)[..., None])[:, 0]
        if noise is not None:
            here = lax.dynamic_index_in_dim(noise, level - 1, axis=1, keepdims=True)
            if weights.params.draft_ids is not None:
                here = here[..., weights.params.draft_ids]
            scores = (scores * sharpness + here) / tau
        best, ids = best_of(scores, topk)
        if weights.params.draft_ids is not None:
            ids = weights.params.draft_ids[ids]
        return ids, best - sampling.log_sum_exp(scores)[..., None], probs

    num = strategy.num_drafted
    ids, scores, probs = rank(root, 1)
    if keep_laws:
        shape = (batch, depth, probs.shape[-1])
        probs = jnp.zeros(shape, probs.dtype).at[:, 0].set(probs)
    found = candidates_lib.Candidates(
        tokens=jnp.zeros((batch, num), jnp.int32).at[:, :topk].set(ids[:, 0]),
        parents=jnp.full((batch, num), -1, jnp.int32),
        depths=jnp.ones((batch, num), jnp.int32),
        scores=jnp.zeros((batch, num), jnp.float32).at[:, :topk].set(scores[:, 0]),
    )
    if depth == 1:
        return Drafted(found, out.keys, out.values, probs)

    slots = width + (depth - 1) * topk
    seen = jnp.arange(slots) < accepted.counts[:, None]
    shape = (*out.keys.shape[:3], slots)
    live = _Level(
        found=found,
        keys=jnp.zeros(shape, dtype).at[..., :width].set(out.keys),
        values=jnp.zeros(shape, dtype).at[..., :width].set(out.values),
        mask=jnp.broadcast_to(seen[:, None], (batch, topk, slots)),
        tokens=ids[:, 0],
        scores=scores[:, 0],
        index=jnp.broadcast_to(jnp.arange(topk, dtype=jnp.int32), (batch, topk)),
        features=jnp.broadcast_to(root, (root.shape[0], batch, topk)),
        probs=probs,
    )
    alone = attention.Visibility(
        ancestors=jnp.broadcast_to(jnp.eye(topk, dtype=bool), (batch, topk, topk))
    )
    last_position = accepted.start + accepted.counts - 1

    def expand(level, live):
        out = drafter.forward(
            weights.params,
            cfg,
            embedded(weights, live.tokens, dtype),
            live.features,
            jnp.broadcast_to((last_position + level - 1)[:, None], (batch, topk)),
            visibility=alone,
            view=view,
            past=drafter.Past(live.keys, live.values, live.mask),
            dtype=dtype,
            kernels=kernels,
        )
        ids, gains, behind = rank(out.hidden, level)
        scores = (live.scores[..., None] + gains).reshape(batch, topk**2)
        first = topk + (level - 2) * topk**2
        parents = jnp.repeat(live.index, topk, axis=1)
        ids = ids.reshape(batch, topk**2)

        def put(x, new):
            return lax.dynamic_update_slice_in_dim(x, new, first, axis=1)

        found = candidates_lib.Candidates(
            tokens=put(live.found.tokens, ids),
            parents=put(live.found.parents, parents),
            depths=put(live.found.depths, jnp.zeros_like(ids) + level),
            scores=put(live.found.scores, scores),
        )
        slot = width + (level - 2) * topk
        best, chosen = lax.top_k(scores, topk)
        parent = chosen // topk
        own = slot + parent[..., None] == jnp.arange(slots)
        mask = jnp.take_along_axis(live.mask, parent[..., None], axis=1) | own
        return _Level(
            found=found,
            keys=lax.dynamic_update_slice_in_dim(live.keys, out.keys, slot, axis=3),
            values=lax.dynamic_update_slice_in_dim(
                live.values, out.values, slot, axis=3
            ),
            mask=mask,
            tokens=jnp.take_along_axis(ids, chosen, axis=1),
            scores=best,
            index=first + chosen,
            features=jnp.take_along_axis(out.hidden, parent[None], axis=2),
            probs=live.probs.at[:, level - 1].set(behind) if keep_laws else None,
        )

    live = lax.fori_loop(2, depth + 1, expand, live)
    return Drafted(live.found, out.keys, out.values, live.probs)


@struct.dataclass
class _Level:
    """State between levels: what was found, and the nodes to be expanded next."""

    found: candidates_lib.Candidates
    keys: Array  # [K, H, B, slots]: what was taken in, then a slot for each live node
    values: Array
    mask: Array  # [B, E, slots]: who is an ancestor of the live node
    tokens: Array  # [B, E]
    scores: Array
    index: Array  # of the live node among the candidates
    features: Array  # [D, B, E], the drafter's own output at the live node's parent
    probs: Array | None  # [B, draft_depth, Vd], see Drafted


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
        embedded(weights, tokens, dtype),
        drafter.fuse(weights.params, cfg, features.astype(dtype), kernels),
        start[:, None] + jnp.arange(width),
        view=transformer.CacheView(drafter_cache, page_table, start),
        dtype=dtype,
        kernels=kernels,
    )
    return kv_cache.append_pages(
        drafter_cache, (out.keys,), (out.values,), page_table, start, counts
    )
