"""Attention over the cached part and the fresh part, joined by online softmax.

A query sees its row's cached positions, walked page by page so that the cost follows
the real lengths and no gathered copy of the cache is made, and those fresh positions
that `Visibility` allows. Each part yields an unnormalised sum with its maximum and
normaliser (`Partial`); `join` adds them. A row's numbers do not depend on other rows: a
page beyond a row's length changes nothing in it, bit for bit.
"""

import functools

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from tlt_jax.models import kv_cache
from tlt_jax.models import layers as model_layers
from tlt_jax.types import Array

# Scores of invisible keys: finite, so that a query that sees nothing yields no NaN.
HIDDEN = -1e30

# Fresh parts of more blocks than this are walked in loops: compilers take minutes over
# a hundred unrolled blocks, and seconds over a loop.
_MAX_UNROLLED_BLOCKS = 8
# A tile of those loops is this many blocks wide and high: fewer, larger products.
_TILE_BLOCKS = 4


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
      words: `[B, T, ceil(T / 32)] uint32` or None; `ancestors` as bits, for kernels.
    """

    segment: Array | None = None
    prefix: Array | None = None
    ancestors: Array | None = None
    words: Array | None = None

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

    def tile(self, row: Array, column: Array, size: int) -> Array:
        """Mask of `size` queries from `row` over as many keys from `column`.

        As `block`, for starts that are known on the device only; `[B or 1, size, size]
        bool`.
        """
        if self.ancestors is not None:
            starts = (jnp.zeros_like(row), row, column)
            shape = (self.ancestors.shape[0], size, size)
            return lax.dynamic_slice(self.ancestors, starts, shape)
        steps = jnp.arange(size)
        causal = (column + steps)[None, :] <= (row + steps)[:, None]
        if self.segment is None:
            return causal[None]
        key_segment = _cut(self.segment, column, size)[:, None, :]
        same = key_segment == _cut(self.segment, row, size)[:, :, None]
        above = key_segment == _cut(self.prefix, row, size)[:, :, None]
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
    scores = jnp.where(visible, scores, HIDDEN)
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
        keys_BKHS, values_BKHS = (
            cache.columns(x[layer, pages])[..., :head_dim, :]
            for x in (cache.keys, cache.values)
        )
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
        maximum=jnp.full((batch, num_kv, num_queries), HIDDEN, jnp.float32),
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
    pass instead of kept. Beyond a few blocks the program walks tiles of queries and
    keys in loops: its size does not grow with T.

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
    num_tokens = query.shape[3]
    prec = model_layers.precision(query.dtype)
    if num_tokens > _MAX_UNROLLED_BLOCKS * block:
        tiles = _Tiles(visibility, positions, window)
        size = _TILE_BLOCKS * block
        return merge_queries(_attend_tiles(query, keys, values, tiles, scale, size))

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
    return merge_queries(whole)


def attend_masked(
    query: Array, keys: Array, values: Array, mask: Array, *, scale: float
) -> Partial:
    """Attend over keys that stand in no order, under an explicit mask.

    Args:
      query: `[B, K, G, T, H]`.
      keys, values: `[B, K, H, S]`; finite, also where nobody sees them.
      mask: `[B, T, S] bool`, who sees whom.
      scale: multiplies the scores.

    Returns:
      The part over M = G x T queries, G outermost.
    """
    scores = jnp.einsum(
        "bkgth,bkhs->bkgts",
        query,
        keys,
        precision=model_layers.precision(query.dtype),
        preferred_element_type=jnp.float32,
    )
    visible = mask[:, None, None]
    part = _part(scores * scale, visible, values, "bkgts,bkhs->bkgth")
    return merge_queries(part)


def attend_same(query: Array, keys: Array, values: Array, *, scale: float) -> Partial:
    """Attend to one key each, the one at the query's own index.

    Args:
      query: `[B, K, G, T, H]`.
      keys, values: `[B, K, H, T]`.
      scale: multiplies the scores.

    Returns:
      The part over M = G x T queries, G outermost.
    """
    keys_BKTH, values_BKTH = (x.swapaxes(2, 3)[:, :, None] for x in (keys, values))
    products = query.astype(jnp.float32) * keys_BKTH.astype(jnp.float32)
    scores = jnp.sum(products, axis=-1) * scale
    total = jnp.broadcast_to(values_BKTH.astype(jnp.float32), query.shape)
    # One key weighs exp(0), whatever its score.
    return merge_queries(Partial(total, scores, jnp.ones_like(scores)))


def merge_queries(partial: Partial) -> Partial:
    """Turn a part over `[B, K, G, T]` queries into one over `[B, K, M]`."""
    batch, num_kv, group, num_tokens = partial.maximum.shape
    merged = (batch, num_kv, group * num_tokens)
    return jax.tree.map(lambda x: x.reshape(*merged, *x.shape[4:]), partial)


def _cut(x: Array, start: Array, size: int, axis: int = -1) -> Array:
    return lax.dynamic_slice_in_dim(x, start, size, axis % x.ndim)


@struct.dataclass
class _Tiles:
    """What decides who sees whom; see `attend_fresh` for the fields."""

    visibility: Visibility
    positions: Array | None
    window: Array | int | None

    def mask(self, row: Array, column: Array, size: int) -> Array:
        """Mask of one tile, `[B or 1, size, size] bool`."""
        mask = self.visibility.tile(row, column, size)
        if self.window is None:
            return mask
        of_queries = _cut(self.positions, row, size)[:, :, None]
        of_keys = _cut(self.positions, column, size)[:, None, :]
        return mask & (of_queries - of_keys < self.window)

    def padded(self, spare: int) -> "_Tiles":
        """Add `spare` columns that nobody sees at the end."""

        def pad(x, num_axes, value):
            if x is None:
                return None
            widths = [(0, 0)] * (x.ndim - num_axes) + [(0, spare)] * num_axes
            return jnp.pad(x, widths, constant_values=value)

        visibility = Visibility(
            segment=pad(self.visibility.segment, 1, -1),
            prefix=pad(self.visibility.prefix, 1, -1),
            ancestors=pad(self.visibility.ancestors, 2, False),
        )
        return self.replace(visibility=visibility, positions=pad(self.positions, 1, 0))


def _attend_tiles(
    query: Array, keys: Array, values: Array, tiles: _Tiles, scale: float, size: int
) -> Partial:
    """Attend tile by tile; the part over `[B, K, G, T]` queries."""
    num_tokens = query.shape[3]
    spare = -num_tokens % size
    if spare:
        # Behind all queries, so that no causal one sees them.
        query = jnp.pad(query, [(0, 0)] * 3 + [(0, spare), (0, 0)])
        keys, values = (jnp.pad(x, [(0, 0)] * 3 + [(0, spare)]) for x in (keys, values))
        tiles = tiles.padded(spare)
    whole = _tiled(scale, size, query, keys, values, tiles)
    return jax.tree.map(lambda x: x[:, :, :, :num_tokens], whole)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _tiled(
    scale: float, size: int, query: Array, keys: Array, values: Array, tiles: _Tiles
) -> Partial:
    """Walk the tiles on and below the diagonal; T is a multiple of `size`.

    A loop whose length the device decides has no derivative of its own. The backward
    pass walks the same tiles and makes each one's weights again from the maximum,
    which counts as a constant: it cancels in what `finish` returns.

    Reference: Dao et al., FlashAttention, 2022, algorithms 1 and 4.
    """
    batch, num_kv, group, num_tokens, head_dim = query.shape
    prec = model_layers.precision(query.dtype)

    def one_row(row):
        query_row = _cut(query, row, size, axis=3)

        def add(i, partial):
            column = i * size
            scores = jnp.einsum(
                "bkgth,bkhs->bkgts",
                query_row,
                _cut(keys, column, size),
                precision=prec,
                preferred_element_type=jnp.float32,
            )
            visible = tiles.mask(row, column, size)[:, None, None]
            values_here = _cut(values, column, size)
            part = _part(scores * scale, visible, values_here, "bkgts,bkhs->bkgth")
            return join(partial, part)

        shape = (batch, num_kv, group, size)
        empty = Partial(
            total=jnp.zeros((*shape, head_dim), jnp.float32),
            maximum=jnp.full(shape, HIDDEN, jnp.float32),
            normaliser=jnp.zeros(shape, jnp.float32),
        )
        return lax.fori_loop(0, row // size + 1, add, empty)

    rows = lax.map(one_row, jnp.arange(0, num_tokens, size))
    return jax.tree.map(
        lambda x: jnp.moveaxis(x, 0, 3).reshape(
            batch, num_kv, group, num_tokens, *x.shape[5:]
        ),
        rows,
    )


def _tiled_forward(scale, size, query, keys, values, tiles):
    whole = _tiled(scale, size, query, keys, values, tiles)
    return whole, (query, keys, values, tiles, whole.maximum)


def _tiled_backward(scale, size, kept, slope):
    query, keys, values, tiles, maximum = kept
    einsum = functools.partial(
        jnp.einsum,
        precision=model_layers.precision(query.dtype),
        preferred_element_type=jnp.float32,
    )
    num_tokens = query.shape[3]

    def one_row(sums, row):
        query_row = _cut(query, row, size, axis=3)
        maximum_row = _cut(maximum, row, size)[..., None]
        of_total = _cut(slope.total, row, size, axis=3).astype(values.dtype)
        of_normaliser = _cut(slope.normaliser, row, size)[..., None]

        def add(i, carry):
            of_query, of_keys, of_values = carry
            column = i * size
            keys_here = _cut(keys, column, size)
            values_here = _cut(values, column, size)
            visible = tiles.mask(row, column, size)[:, None, None]
            scores = einsum("bkgth,bkhs->bkgts", query_row, keys_here) * scale
            weights = jnp.where(visible, jnp.exp(scores - maximum_row), 0.0)
            of_weights = einsum("bkgth,bkhs->bkgts", of_total, values_here)
            of_scores = weights * (of_weights + of_normaliser) * scale
            of_scores = of_scores.astype(query.dtype)
            weights = weights.astype(values.dtype)
            of_query += einsum("bkgts,bkhs->bkgth", of_scores, keys_here)
            here = einsum("bkgts,bkgth->bkhs", of_scores, query_row)
            of_keys = _add_at(of_keys, here, column)
            here = einsum("bkgts,bkgth->bkhs", weights, of_total)
            of_values = _add_at(of_values, here, column)
            return of_query, of_keys, of_values

        start = (jnp.zeros(query_row.shape, jnp.float32), *sums)
        of_query, *sums = lax.fori_loop(0, row // size + 1, add, start)
        return tuple(sums), of_query.astype(query.dtype)

    zeros = jnp.zeros(keys.shape, jnp.float32)
    (of_keys, of_values), of_query = lax.scan(
        one_row, (zeros, zeros), jnp.arange(0, num_tokens, size)
    )
    of_query = jnp.moveaxis(of_query, 0, 3).reshape(query.shape)
    return of_query, of_keys.astype(keys.dtype), of_values.astype(values.dtype), None


def _add_at(sums: Array, here: Array, column: Array) -> Array:
    """Add a tile's sum to columns from `column` on."""
    there = _cut(sums, column, here.shape[-1])
    return lax.dynamic_update_slice_in_dim(sums, there + here, column, sums.ndim - 1)


_tiled.defvjp(_tiled_forward, _tiled_backward)
