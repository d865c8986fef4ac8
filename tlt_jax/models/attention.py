"""Attention over the cached part and the fresh part, joined by online softmax.

A query sees its row's cached positions, walked page by page so that the cost follows
the real lengths and no gathered copy of the cache is made, and those fresh positions
that `Visibility` allows. Each part yields an unnormalised sum with its maximum and
normaliser (`Partial`); `join` adds them. A row's numbers do not depend on other rows: a
page beyond a row's length changes nothing in it, bit for bit.
"""

import functools
import math

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
        causal_TS = jnp.arange(stop)[None, :] <= jnp.arange(start, stop)[:, None]
        if self.segment is None:
            return causal_TS[None]
        keys_B1S = self.segment[:, None, :stop]
        same_BTS = keys_B1S == self.segment[:, start:stop, None]
        above_BTS = keys_B1S == self.prefix[:, start:stop, None]
        return causal_TS[None] & (same_BTS | above_BTS) & (keys_B1S >= 0)

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
        causal_TS = (column + steps)[None, :] <= (row + steps)[:, None]
        if self.segment is None:
            return causal_TS[None]
        keys_B1S = _cut(self.segment, column, size)[:, None, :]
        same_BTS = keys_B1S == _cut(self.segment, row, size)[:, :, None]
        above_BTS = keys_B1S == _cut(self.prefix, row, size)[:, :, None]
        return causal_TS[None] & (same_BTS | above_BTS) & (keys_B1S >= 0)


@struct.dataclass
class Partial:
    """Attention over a part of the keys, of M = G x T queries, G outermost.

    Attributes:
      total: `[B, K, M, H] float32`, sum of exp(score - maximum) x value.
      maximum: `[B, K, M] float32`, the largest visible score, or the hidden score.
      normaliser: `[B, K, M] float32`, sum of exp(score - maximum) over visible keys.
    """

    total: Array
    maximum: Array
    normaliser: Array


def join(left: Partial, right: Partial) -> Partial:
    """Add two parts over disjoint keys.

    Both were measured from maxima of their own; brought to the larger one they add. An
    empty part weighs zero, whatever its maximum: its total and normaliser are.
    """
    maximum_BKM = jnp.maximum(left.maximum, right.maximum)
    of_left_BKM = jnp.exp(left.maximum - maximum_BKM)
    of_right_BKM = jnp.exp(right.maximum - maximum_BKM)
    return Partial(
        total=left.total * of_left_BKM[..., None]
        + right.total * of_right_BKM[..., None],
        maximum=maximum_BKM,
        normaliser=left.normaliser * of_left_BKM + right.normaliser * of_right_BKM,
    )


def _nothing(*shape: int) -> Partial:
    """Attention over no keys, its total in `shape`."""
    return Partial(
        total=jnp.zeros(shape, jnp.float32),
        maximum=jnp.full(shape[:-1], HIDDEN, jnp.float32),
        normaliser=jnp.zeros(shape[:-1], jnp.float32),
    )


def finish(partial: Partial) -> Array:
    """Normalise; a query that saw nothing yields zeros."""
    seen = partial.normaliser > 0
    safe = jnp.where(seen, partial.normaliser, 1.0)
    return partial.total / safe[..., None]


def _einsum(spec: str, left: Array, right: Array) -> Array:
    """Multiply arrays of one dtype; sums are float32."""
    precision = model_layers.precision(left.dtype)
    return jnp.einsum(
        spec, left, right, precision=precision, preferred_element_type=jnp.float32
    )


def _part(scores: Array, visible: Array, values: Array, spec: str) -> Partial:
    """Reduce masked scores `[B, K, M, S]` against values by the einsum `spec`."""
    scores = jnp.where(visible, scores, HIDDEN)
    # Any constant would do, for it cancels in `finish`: so it has no gradient.
    maximum = lax.stop_gradient(jnp.max(scores, axis=-1))
    if values.dtype != jnp.float32:
        # Weights are rounded to the values' type. About a power of two a key's weight
        # has the same digits in whichever part it stands, fresh or cached.
        maximum = jnp.ceil(maximum / math.log(2)) * math.log(2)
    # Where nothing is visible the maximum is the hidden score itself, or near it:
    # what is invisible must be masked once more.
    weights = jnp.where(visible, jnp.exp(scores - maximum[..., None]), 0.0)
    total = _einsum(spec, weights.astype(values.dtype), values)
    return Partial(total, maximum, jnp.sum(weights, axis=-1))


def attend_cached(
    query: Array,
    view: kv_cache.CacheView,
    layer: Array | int,
    *,
    scale: float,
    positions: Array | None = None,
    window: Array | int | None = None,
) -> Partial:
    """Attend over a layer's cached keys, page by page; empty rows have normaliser 0.

    Args:
      query: `[B, K, M, H]`, M = G x T, G outermost.
      view: the cached past.
      layer: which layer's pages.
      scale: multiplies the scores.
      positions: `[B, M] int32` of the queries; needed with `window`.
      window: see only keys at distance below this, or None.
    """
    cache, lengths = view.cache, view.lengths
    page_size = cache.page_size
    # The longest row decides how far all walk; shorter ones see nothing further on.
    num_pages = (jnp.max(lengths) + page_size - 1) // page_size

    def body(state):
        j, partial = state
        # The j-th page of every row, whose S slots are its columns: no copy of the
        # cache is made but this.
        pages_B = lax.dynamic_index_in_dim(view.page_table, j, axis=1, keepdims=False)
        keys_BKHS, values_BKHS = (
            cache.columns(x[layer, pages_B])[..., : query.shape[-1], :]
            for x in (cache.keys, cache.values)
        )
        keys_BKHS = keys_BKHS.astype(query.dtype)
        scores_BKMS = _einsum("bkmh,bkhs->bkms", query, keys_BKHS)
        # Every query of a row sees all that is filled, or what of it is near.
        slots_S = j * page_size + jnp.arange(page_size)
        visible_B1MS = (slots_S[None, :] < lengths[:, None])[:, None, None, :]
        if window is not None:
            near_BMS = positions[:, :, None] - slots_S[None, None, :] < window
            visible_B1MS = visible_B1MS & near_BMS[:, None]
        # A slot that must not be seen may hold anything: NaN times 0 is not 0.
        readable_B11S = slots_S[None, None, None, :] < lengths[:, None, None, None]
        values_BKHS = jnp.where(readable_B11S, values_BKHS, 0).astype(query.dtype)
        part = _part(scores_BKMS * scale, visible_B1MS, values_BKHS, "bkms,bkhs->bkmh")
        return j + 1, join(partial, part)

    start = (jnp.int32(0), _nothing(*query.shape))
    _, partial = lax.while_loop(lambda state: state[0] < num_pages, body, start)
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
    """
    num_tokens = query.shape[3]
    if num_tokens > _MAX_UNROLLED_BLOCKS * block:
        tiles = _Tiles(visibility, positions, window)
        size = _TILE_BLOCKS * block
        return merge_queries(_attend_tiles(query, keys, values, tiles, scale, size))

    one_block = functools.partial(_part_of_queries, scale=scale)
    # Scores of one block are as large as all of a short call's: those are kept.
    if num_tokens > block:
        one_block = jax.checkpoint(one_block)
    parts = []
    for start in range(0, num_tokens, block):
        stop = min(start + block, num_tokens)
        mask_BTS = visibility.block(start, stop)
        if window is not None:
            distance_BTS = positions[:, start:stop, None] - positions[:, None, :stop]
            mask_BTS = mask_BTS & (distance_BTS < window)
        query_BKGTH = query[:, :, :, start:stop]
        parts.append(
            one_block(query_BKGTH, keys[..., :stop], values[..., :stop], mask_BTS)
        )
    # Blocks of queries side by side: a part over [B, K, G, T].
    if len(parts) > 1:
        parts = [jax.tree.map(lambda *x: jnp.concatenate(x, axis=3), *parts)]
    return merge_queries(parts[0])


def attend_masked(
    query: Array, keys: Array, values: Array, mask: Array, *, scale: float
) -> Partial:
    """Attend over keys that stand in no order, under an explicit mask.

    Args:
      query, scale: see `attend_fresh`.
      keys, values: `[B, K, H, S]`; finite, also where nobody sees them.
      mask: `[B, T, S] bool`, who sees whom.
    """
    return merge_queries(_part_of_queries(query, keys, values, mask, scale))


def _scores(query: Array, keys: Array) -> Array:
    """Multiply queries `[B, K, G, T, H]` by keys `[B, K, H, S]`."""
    return _einsum("bkgth,bkhs->bkgts", query, keys)


def _part_of_queries(query, keys, values, mask, scale) -> Partial:
    """Attend with queries `[B, K, G, T, H]` over keys `[B, K, H, S]`.

    Heads see alike: the mask is `[B or 1, T, S]`.
    """
    scores_BKGTS = _scores(query, keys)
    visible_B11TS = mask[:, None, None]
    return _part(scores_BKGTS * scale, visible_B11TS, values, "bkgts,bkhs->bkgth")


def attend_same(query: Array, keys: Array, values: Array, *, scale: float) -> Partial:
    """Attend to one key each, the one at the query's own index.

    See `attend_fresh` for the arguments.
    """
    # An axis for the group: all query heads of a kv head meet the same key.
    keys_BK1TH, values_BK1TH = (x.swapaxes(2, 3)[:, :, None] for x in (keys, values))
    products_BKGTH = query.astype(jnp.float32) * keys_BK1TH.astype(jnp.float32)
    scores_BKGT = jnp.sum(products_BKGTH, axis=-1) * scale
    total_BKGTH = jnp.broadcast_to(values_BK1TH.astype(jnp.float32), query.shape)
    # One key weighs exp(0), whatever its score.
    one = jnp.ones_like(scores_BKGT)
    return merge_queries(Partial(total_BKGTH, scores_BKGT, one))


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
        mask_BTS = self.visibility.tile(row, column, size)
        if self.window is None:
            return mask_BTS
        queries_BT1 = _cut(self.positions, row, size)[:, :, None]
        keys_B1S = _cut(self.positions, column, size)[:, None, :]
        return mask_BTS & (queries_BT1 - keys_B1S < self.window)

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
    batch, num_kv, group, _, head_dim = query.shape

    # A row of tiles: T = size queries, from the left to the diagonal. Within a tile
    # there are as many keys, S = size.
    def one_row(row):
        query_BKGTH = _cut(query, row, size, axis=3)

        def add(i, partial):
            column = i * size
            scores_BKGTS = _scores(query_BKGTH, _cut(keys, column, size))
            visible_B11TS = tiles.mask(row, column, size)[:, None, None]
            values_BKHS = _cut(values, column, size)
            part = _part(
                scores_BKGTS * scale, visible_B11TS, values_BKHS, "bkgts,bkhs->bkgth"
            )
            return join(partial, part)

        nothing = _nothing(batch, num_kv, group, size, head_dim)
        return lax.fori_loop(0, row // size + 1, add, nothing)

    # [rows of tiles, B, K, G, size, ...] back to [B, K, G, T, ...].
    def unrolled(x):
        return jnp.moveaxis(x, 0, 3).reshape(*query.shape[:4], *x.shape[5:])

    rows = lax.map(one_row, jnp.arange(0, query.shape[3], size))
    return jax.tree.map(unrolled, rows)


def _tiled_forward(scale, size, query, keys, values, tiles):
    whole = _tiled(scale, size, query, keys, values, tiles)
    return whole, (query, keys, values, tiles, whole.maximum)


def _tiled_backward(scale, size, kept, slope):
    """Walk the tiles again; a name with `d_` is the loss's slope by what it names."""
    query, keys, values, tiles, maximum = kept
    num_tokens = query.shape[3]

    # A row of tiles finishes its queries' slope, and adds to those of all keys and
    # values up to the diagonal: the first leaves the scan, the others are carried.
    def one_row(sums, row):
        query_BKGTH = _cut(query, row, size, axis=3)
        maximum_BKGT1 = _cut(maximum, row, size)[..., None]
        d_total_BKGTH = _cut(slope.total, row, size, axis=3).astype(values.dtype)
        d_normaliser_BKGT1 = _cut(slope.normaliser, row, size)[..., None]

        def add(i, carry):
            d_query_BKGTH, d_keys_BKHS, d_values_BKHS = carry
            column = i * size
            keys_BKHS = _cut(keys, column, size)
            values_BKHS = _cut(values, column, size)
            # The weights once more, as the forward had them.
            visible_B11TS = tiles.mask(row, column, size)[:, None, None]
            scores_BKGTS = _scores(query_BKGTH, keys_BKHS) * scale
            weights_BKGTS = jnp.where(
                visible_B11TS, jnp.exp(scores_BKGTS - maximum_BKGT1), 0.0
            )
            # A weight stands in the total and in the normaliser; exp is its own slope.
            d_weights_BKGTS = _scores(d_total_BKGTH, values_BKHS)
            d_scores_BKGTS = (
                weights_BKGTS * (d_weights_BKGTS + d_normaliser_BKGT1) * scale
            )
            d_scores_BKGTS = d_scores_BKGTS.astype(query.dtype)
            weights_BKGTS = weights_BKGTS.astype(values.dtype)
            # Through both products, to each of their factors.
            d_query_BKGTH += _einsum("bkgts,bkhs->bkgth", d_scores_BKGTS, keys_BKHS)
            here = _einsum("bkgts,bkgth->bkhs", d_scores_BKGTS, query_BKGTH)
            d_keys_BKHS = _add_at(d_keys_BKHS, here, column)
            here = _einsum("bkgts,bkgth->bkhs", weights_BKGTS, d_total_BKGTH)
            d_values_BKHS = _add_at(d_values_BKHS, here, column)
            return d_query_BKGTH, d_keys_BKHS, d_values_BKHS

        start = (jnp.zeros(query_BKGTH.shape, jnp.float32), *sums)
        d_query_BKGTH, *sums = lax.fori_loop(0, row // size + 1, add, start)
        return tuple(sums), d_query_BKGTH.astype(query.dtype)

    zeros = jnp.zeros(keys.shape, jnp.float32)
    (d_keys, d_values), d_query = lax.scan(
        one_row, (zeros, zeros), jnp.arange(0, num_tokens, size)
    )
    d_query = jnp.moveaxis(d_query, 0, 3).reshape(query.shape)
    # Who sees whom has no slope.
    return d_query, d_keys.astype(keys.dtype), d_values.astype(values.dtype), None


def _add_at(sums: Array, here: Array, column: Array) -> Array:
    """Add a tile's sum to columns from `column` on."""
    there = _cut(sums, column, here.shape[-1])
    return lax.dynamic_update_slice_in_dim(sums, there + here, column, sums.ndim - 1)


_tiled.defvjp(_tiled_forward, _tiled_backward)
