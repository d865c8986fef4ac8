"""Attention over the cached part and the fresh part, joined by online softmax.

A query sees its row's cached positions, walked page by page so that the cost follows
the real lengths and no gathered copy of the cache is made, and those fresh positions
that `Visibility` allows. Each part yields an unnormalised sum with its maximum and
normaliser (`Partial`); `join` adds them. A row's numbers do not depend on other rows: a
page beyond a row's length changes nothing in it, bit for bit.
"""

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from tlt_jax.models import kv_cache
from tlt_jax.models import layers as model_layers
from tlt_jax.types import Array

# Scores of invisible keys: finite, so that a query that sees nothing yields no NaN.
_HIDDEN = -1e30


@struct.dataclass
class Visibility:
    """Which fresh keys a fresh query sees.

    Always: keys at an index not after the query's own. Then, where `segment` is given,
    keys of the query's own segment or of its prefix; so a prompt and its responses in
    one packed row form a tree. Where `ancestors` is given, exactly those it names.

    Attributes:
      segment: `[B, T] int32` or None; -1 is padding, which nobody sees.
      prefix: `[B, T] int32` or None; the segment of the query's prompt.
      ancestors: `[B, T, T] bool` or None; query t sees key s where [b, t, s] holds.
    """

    segment: Array | None = None
    prefix: Array | None = None
    ancestors: Array | None = None

    def block(self, start: int, stop: int) -> Array:
        """Mask of queries `start:stop` over keys `0:stop`, `[B or 1, T', S'] bool`."""
        if self.ancestors is not None:
            return self.ancestors[:, start:stop, :stop]
        causal = jnp.arange(stop)[None, :] <= jnp.arange(start, stop)[:, None]
        if self.segment is None:
            return causal[None]
        key_segment = self.segment[:, None, :stop]
        same = key_segment == self.segment[:, start:stop, None]
        above = key_segment == self.prefix[:, start:stop, None]
        return causal[None] & (same | above) & (key_segment >= 0)


@struct.dataclass
class Partial:
    """Attention over a part of the keys.

    Attributes:
      total: `[B, K, M, H] float32`, sum of exp(score - maximum) x value.
      maximum: `[B, K, M] float32`, the largest visible score, or the hidden score.
      normaliser: `[B, K, M] float32`, sum of exp(score - maximum) over visible keys.
    """

    total: Array
    maximum: Array
    normaliser: Array


def join(left: Partial, right: Partial) -> Partial:
    """Add two parts over disjoint keys."""
    maximum = jnp.maximum(left.maximum, right.maximum)
    of_left = jnp.exp(left.maximum - maximum)
    of_right = jnp.exp(right.maximum - maximum)
    return Partial(
        total=left.total * of_left[..., None] + right.total * of_right[..., None],
        maximum=maximum,
        normaliser=left.normaliser * of_left + right.normaliser * of_right,
    )


def finish(partial: Partial) -> Array:
    """Normalise; a query that saw nothing yields zeros."""
    seen = partial.normaliser > 0
    safe = jnp.where(seen, partial.normaliser, 1.0)
    return partial.total / safe[..., None]


def _part(scores: Array, visible: Array, values: Array, spec: str) -> Partial:
    """Reduce masked scores `[B, K, M, S]` against values by the einsum `spec`."""
    scores = jnp.where(visible, scores, _HIDDEN)
    maximum = lax.stop_gradient(jnp.max(scores, axis=-1))
    weights = jnp.where(visible, jnp.exp(scores - maximum[..., None]), 0.0)
    total = jnp.einsum(
        spec,
        weights.astype(values.dtype),
        values,
        precision=model_layers.precision(values.dtype),
        preferred_element_type=jnp.float32,
    )
    return Partial(total, maximum, jnp.sum(weights, axis=-1))


def attend_cached(
    query: Array,
    cache: kv_cache.PagedCache,
    layer: Array | int,
    page_table: Array,
    lengths: Array,
    *,
    scale: float,
    positions: Array | None = None,
    window: Array | int | None = None,
) -> Partial:
    """Attend over a layer's cached keys, page by page.

    Args:
      query: `[B, K, M, H]`, M = G x T, G outermost.
      cache: the pages.
      layer: which layer's pages.
      page_table: `[B, max_pages] int32`.
      lengths: `[B] int32`; slots at or beyond are not read into the result.
      scale: multiplies the scores.
      positions: `[B, M] int32` of the queries; needed with `window`.
      window: see only keys at distance below this, or None.

    Returns:
      The part; empty rows have normaliser 0.
    """
    page_size = cache.page_size
    batch, num_kv, num_queries, head_dim = query.shape
    prec = model_layers.precision(query.dtype)
    num_pages = (jnp.max(lengths) + page_size - 1) // page_size

    def body(state):
        j, partial = state
        pages = lax.dynamic_index_in_dim(page_table, j, axis=1, keepdims=False)
        keys_BKHS = cache.keys[layer, pages]
        values_BKHS = cache.values[layer, pages]
        scores = jnp.einsum(
            "bkmh,bkhs->bkms",
            query,
            keys_BKHS.astype(query.dtype),
            precision=prec,
            preferred_element_type=jnp.float32,
        )
        slots = j * page_size + jnp.arange(page_size)
        visible = (slots[None, :] < lengths[:, None])[:, None, None, :]
        if window is not None:
            near = positions[:, :, None] - slots[None, None, :] < window
            visible = visible & near[:, None]
        # A slot that must not be seen may hold anything: NaN times 0 is not 0.
        readable = slots[None, None, None, :] < lengths[:, None, None, None]
        values_BKHS = jnp.where(readable, values_BKHS, 0).astype(query.dtype)
        part = _part(scores * scale, visible, values_BKHS, "bkms,bkhs->bkmh")
        return j + 1, join(partial, part)

    empty = Partial(
        total=jnp.zeros((batch, num_kv, num_queries, head_dim), jnp.float32),
        maximum=jnp.full((batch, num_kv, num_queries), _HIDDEN, jnp.float32),
        normaliser=jnp.zeros((batch, num_kv, num_queries), jnp.float32),
    )
    _, partial = lax.while_loop(
        lambda state: state[0] < num_pages, body, (jnp.int32(0), empty)
    )
    return partial


def attend_fresh(
    query: Array,
    keys: Array,
    values: Array,
    visibility: Visibility,
    *,
    scale: float,
    positions: Array | None = None,
    window: Array | int | None = None,
    block: int = 256,
) -> Partial:
    """Attend over the fresh keys.

    Queries are taken in blocks, each against the keys up to its end only, so that the
    upper triangle costs nothing; a block's scores are computed again in the backward
    pass instead of kept.

    Args:
      query: `[B, K, G, T, H]`.
      keys, values: `[B, K, H, T]`.
      visibility: who sees whom.
      scale: multiplies the scores.
      positions: `[B, T] int32`; needed with `window`.
      window: see only keys at distance below this, or None.
      block: queries in a block.

    Returns:
      The part over M = G x T queries, G outermost.
    """
    batch, num_kv, group, num_tokens, head_dim = query.shape
    prec = model_layers.precision(query.dtype)

    def one_block(query, keys, values, mask):
        scores = jnp.einsum(
            "bkgth,bkhs->bkgts",
            query,
            keys,
            precision=prec,
            preferred_element_type=jnp.float32,
        )
        visible = mask[:, None, None]
        return _part(scores * scale, visible, values, "bkgts,bkhs->bkgth")

    if num_tokens > block:
        one_block = jax.checkpoint(one_block)
    parts = []
    for start in range(0, num_tokens, block):
        stop = min(start + block, num_tokens)
        mask = visibility.block(start, stop)
        if window is not None:
            distance = positions[:, start:stop, None] - positions[:, None, :stop]
            mask = mask & (distance < window)
        parts.append(
            one_block(
                query[:, :, :, start:stop], keys[..., :stop], values[..., :stop], mask
            )
        )
    whole = (
        parts[0]
        if len(parts) == 1
        else jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=3), *parts)
    )
    merged = (batch, num_kv, group * num_tokens)
    return Partial(
        total=whole.total.reshape(*merged, head_dim),
        maximum=whole.maximum.reshape(merged),
        normaliser=whole.normaliser.reshape(merged),
    )
