"""The paged key/value cache.

A page holds `page_size` positions of one row in every layer. Pages hold columns like
the activations: `[L, num_pages, K, H, page_size]`. A row's `page_table` lists its pages
in order; several rows may list the same page (the full pages of a group's prompt).
For the TPU's kernel small pages lie packed, see `verify_attention.page_layout`.
Page 0 is nobody's: table entries without a page point at it, and writes that must not
land anywhere go there. A slot beyond a row's length holds anything and is never read.

Where a drafter is in use pages also hold the target's features that it reads: turning
speculation on, or taking new drafter weights, then needs no forward of the target.
"""

import functools

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jax.experimental import layout

from tlt_jax.models import config as model_config
from tlt_jax.pallas_kernels.verify_attention import page_layout
from tlt_jax.types import Array

SCRATCH_PAGE = 0

# Fresh columns of all layers, `[L, K, H, B, T]` or a tuple of L `[K, H, B, T]`.
Fresh = Array | tuple[Array, ...]


@struct.dataclass
class PagedCache:
    """Keys (already rotated) and values of all pages.

    Attributes:
      keys, values: `[L, num_pages, K, H, page_size]`.
      features: `[1, num_pages, 1, n x D, page_size]` or None, what a drafter reads.
      packing: features that lie side by side in each of these; 1: columns.
      routes: `[1, num_pages, 1, L x C, page_size]` of unsigned integers or None, the
        experts that a mixture chose for each position.
    """

    keys: Array
    values: Array
    features: Array | None = None
    packing: int = struct.field(pytree_node=False, default=1)
    routes: Array | None = None

    @property
    def num_pages(self) -> int:
        """Pages, the scratch page included."""
        return self.keys.shape[1]

    @property
    def page_size(self) -> int:
        """Positions in a page."""
        return self.keys.shape[4] // self.packing

    def columns(self, pages: Array) -> Array:
        """Return pages read from one of the arrays as columns, `[.., page_size]`."""
        return page_layout.unpack(pages, self.packing)


@struct.dataclass
class CacheView:
    """What a forward reads of the cache.

    Attributes:
      cache: the pages.
      page_table: `[B, max_pages] int32`.
      lengths: `[B] int32`, positions cached for each row; slots at or beyond are not
        read into any result.
    """

    cache: PagedCache
    page_table: Array
    lengths: Array


def create(
    cfg: model_config.ModelConfig,
    num_pages: int,
    page_size: int,
    dtype,
    feature_size: int = 0,
    packing: int = 1,
    keep_routes: bool = False,
) -> PagedCache:
    """Make an empty cache, zeros.

    Args:
      cfg: the model.
      num_pages: the scratch page included.
      page_size: positions in a page.
      dtype: of everything in it.
      feature_size: n x D, features kept of each position; 0: none.
      packing: see `page_layout`; divides `feature_size`.
      keep_routes: of a mixture of experts, its routes are kept, too.
    """

    def zeros(*shape, dtype=dtype):
        return page_layout.pack(jnp.zeros((*shape, page_size), dtype), packing)

    routes = None
    if keep_routes:
        count = cfg.num_layers * cfg.experts.per_token
        size = page_layout.padded(count, packing)
        routes = zeros(1, num_pages, 1, size, dtype=cfg.experts.route_dtype)

    num_features = page_layout.padded(cfg.head_dim, packing)
    shape = (cfg.num_layers, num_pages, cfg.num_kv_heads, num_features)
    return PagedCache(
        keys=zeros(*shape),
        values=zeros(*shape),
        features=zeros(1, num_pages, 1, feature_size) if feature_size else None,
        packing=packing,
        routes=routes,
    )


def logical_axes(cache: PagedCache) -> PagedCache:
    """Name the axes of a cache's arrays, see `sharding.ShardingRules`."""
    heads = (None, "page", "kv_heads", None, None)
    features = None if cache.features is None else (None, "page", None, "feature")
    routes = None if cache.routes is None else (None, "page")
    return cache.replace(keys=heads, values=heads, features=features, routes=routes)


def page_bytes(cfg: model_config.ModelConfig, page_size: int, dtype) -> int:
    """Bytes that one page takes in all layers, keys and values."""
    columns = cfg.num_layers * cfg.num_kv_heads * cfg.head_dim * page_size
    return 2 * columns * jnp.dtype(dtype).itemsize


def append(
    cache: PagedCache,
    keys: Fresh,
    values: Fresh,
    page_table: Array,
    lengths: Array,
    counts: Array,
    *,
    features: Array | None = None,
    routes: Array | None = None,
    sources: Array | None = None,
) -> PagedCache:
    """Write `counts` fresh columns of each row behind its `lengths` old ones.

    Args:
      cache: to donate: the write is in place.
      keys, values: `[L, K, H, B, T]` fresh columns, as the forward returns them.
      page_table: `[B, max_pages] int32`.
      lengths: `[B] int32`, columns that the row holds already.
      counts: `[B] int32`, columns to write, not more than `sources` names.
      features: `[n x D, B, T]`, of the same columns; None where the cache has none.
      routes: `[L, C, B, T]`, theirs as well; read where the cache keeps them.
      sources: `[B, A] int32`, which of the B x T fresh columns to write, in order (then
        they need not stand by row); None: the first of each row.
    """
    if sources is None:
        num_rows, width = jax.tree.leaves(keys)[0].shape[-2:]
        sources = jnp.arange(num_rows * width).reshape(num_rows, width)
    fresh = _fresh(cache, keys, values, features, routes)
    # Columns of packed pages are no columns in memory.
    columns = cache.packing == 1
    return lax.platform_dependent(
        *(cache, _Write(fresh, page_table, lengths, counts, sources)),
        tpu=_append_through_pages,
        cuda=_append_by_scatter if columns else _append_through_pages,
        default=_append_columns if columns else _append_through_pages,
    )


@struct.dataclass
class _Write:
    """Columns, `fresh` of `_fresh`, and where they belong, see `append`."""

    fresh: PagedCache
    page_table: Array
    lengths: Array
    counts: Array
    sources: Array


def _append_columns(cache: PagedCache, new: _Write) -> PagedCache:
    """Write every column where it belongs."""
    page_size = cache.page_size
    stops = jnp.cumsum(new.counts)

    # One wanted column of one row after the other, in place.
    def write(i, cache):
        row = jnp.sum(stops <= i)
        t = i - stops[row] + new.counts[row]
        position = new.lengths[row] + t
        page, slot = new.page_table[row, position // page_size], position % page_size
        return _write_columns(cache, new.fresh, new.sources[row, t], page, slot)

    return lax.fori_loop(0, stops[-1], write, cache)


def _append_by_scatter(cache: PagedCache, new: _Write) -> PagedCache:
    """Write all columns of all rows at once, one kernel for each array of pages.

    A loop over columns starts a kernel for each: at batch 32 that costs a GPU a tenth
    of a 7B model's step. The compiler for CPUs makes this a loop over single numbers.
    """
    page_size = cache.page_size
    # Where each of the A columns of a row belongs: its page's place in the table, which
    # for columns that are not wanted may lie behind its end.
    column_A = jnp.arange(new.sources.shape[1])
    position_BA = new.lengths[:, None] + column_A
    index_BA = jnp.minimum(position_BA // page_size, new.page_table.shape[1] - 1)
    page_BA = jnp.take_along_axis(new.page_table, index_BA, axis=1)
    # What is not wanted goes to pages that are not there, each to its own: so that no
    # two writes meet, and the compiler needs no atomic ones.
    absent = cache.num_pages + jnp.arange(new.sources.size).reshape(new.sources.shape)
    page = jnp.where(column_A < new.counts[:, None], page_BA, absent).ravel()
    slot = (position_BA % page_size).ravel()

    # [B x A, L, K, H]: with the written axis first, as the indexed update has it.
    def put(pages, fresh):
        block = jnp.moveaxis(fresh[..., new.sources.ravel()], 3, 0)
        return pages.at[:, page, :, :, slot].set(
            block.astype(pages.dtype), mode="drop", unique_indices=True
        )

    return jax.tree.map(put, cache, new.fresh)


def _append_through_pages(cache: PagedCache, new: _Write) -> PagedCache:
    """Read the pages that a row's columns belong to, and write them back whole.

    For a write narrower than a tile of 128 slots the compiler for TPUs gives all pages
    a layout of their own, and copies the whole cache into it and back at every step.
    """
    page_size = cache.page_size
    num_rows, width = new.sources.shape
    # Pages that `width` columns touch at most, wherever they begin.
    per_row = 1 + (width - 1 + page_size - 1) // page_size

    def write(i, cache):
        row, j = i // per_row, i % per_row
        first = new.lengths[row] // page_size + j
        # Which of the columns stands in each slot of the page, and whether any does.
        column = first * page_size + jnp.arange(page_size) - new.lengths[row]
        wanted = (column >= 0) & (column < new.counts[row])
        page = jnp.where(
            jnp.any(wanted),
            new.page_table[row, jnp.minimum(first, new.page_table.shape[1] - 1)],
            SCRATCH_PAGE,
        )

        # The page in all layers, [L, 1, K, H, page_size]; column after column takes the
        # place of what stood in its slot.
        def put(pages, fresh):
            sizes = (*pages.shape[:1], 1, *pages.shape[2:])
            whole = cache.columns(lax.dynamic_slice(pages, (0, page, 0, 0, 0), sizes))
            for t in range(width):
                from_column = (0, 0, 0, new.sources[row, t])
                block = lax.dynamic_slice(fresh, from_column, (*fresh.shape[:3], 1))
                block = _padded(block[:, None], whole.shape[3])
                block = block.astype(pages.dtype)
                whole = jnp.where(wanted & (column == t), block, whole)
            whole = page_layout.pack(whole, cache.packing)
            pages = lax.dynamic_update_slice(pages, whole, (0, page, 0, 0, 0))
            return _as_it_lies(pages)

        return jax.tree.map(put, cache, new.fresh)

    return lax.fori_loop(0, num_rows * per_row, write, cache)


def append_pages(
    cache: PagedCache,
    keys: Fresh,
    values: Fresh,
    page_table: Array,
    lengths: Array,
    counts: Array,
    *,
    features: Array | None = None,
    routes: Array | None = None,
) -> PagedCache:
    """Write fresh columns page by page, where rows start at page boundaries.

    See `append` for the arguments, with lengths and T in multiples of the page size.
    Pages without a column among the first `counts` are dropped. Slots behind `counts`
    in the last page written hold what the fresh columns hold there: they are beyond the
    row's length.

    Raises:
      ValueError: T is no multiple of the page size.
    """
    num_rows, width = jax.tree.leaves(keys)[0].shape[-2:]
    fresh = _fresh(cache, keys, values, features, routes)
    page_size = cache.page_size
    # With that no write begins or ends within a page.
    if width % page_size:
        raise ValueError(
            f"append_pages got {width} columns a row, not a multiple of page_size="
            f"{page_size}: use append."
        )
    pages_per_row = width // page_size

    def write(i, cache):
        row, j = i // pages_per_row, i % pages_per_row
        first = lengths[row] // page_size + j
        page = jnp.where(
            j * page_size < counts[row], page_table[row, first], SCRATCH_PAGE
        )
        column = row * width + j * page_size
        return _write_columns(cache, fresh, column, page, 0, page_size)

    return lax.fori_loop(0, num_rows * pages_per_row, write, cache)


def copy_pages(cache: PagedCache, sources: Array, targets: Array) -> PagedCache:
    """Copy page `sources[i]` to page `targets[i]`; pairs (0, 0) do nothing.

    Args:
      cache: to donate: the write is in place.
      sources, targets: `[n] int32`.
    """

    def copy(i, cache):
        def move(pages):
            page = lax.dynamic_slice_in_dim(pages, sources[i], 1, axis=1)
            return lax.dynamic_update_slice_in_dim(pages, page, targets[i], axis=1)

        return jax.tree.map(move, cache)

    return lax.fori_loop(0, sources.shape[0], copy, cache)


def read_features(
    cache: PagedCache, page_table: Array, start: Array, count: int
) -> Array:
    """Read the features of `count` positions of each row.

    Args:
      cache: with features.
      page_table: `[B, max_pages] int32`.
      start: `[B] int32`, first position of each row.
      count: T.

    Returns:
      `[n x D, B, T]`; of positions beyond a row's length anything.
    """
    # Columns of packed pages are no columns in memory.
    columns = cache.packing == 1
    return lax.platform_dependent(
        *(cache, page_table, start),
        tpu=functools.partial(_read_through_pages, count=count),
        default=functools.partial(
            _read_columns if columns else _read_through_pages, count=count
        ),
    )


def _read_columns(
    cache: PagedCache, page_table: Array, start: Array, *, count: int
) -> Array:
    """Read every column where it is, see `read_features`."""
    # Positions of a row may reach behind the table's end, where nothing is wanted.
    last = page_table.shape[1] - 1
    positions_BT = start[:, None] + jnp.arange(count)
    index_BT = jnp.minimum(positions_BT // cache.page_size, last)
    pages_BT = jnp.take_along_axis(page_table, index_BT, axis=1)
    columns = cache.features[0, pages_BT, 0, :, positions_BT % cache.page_size]
    return jnp.moveaxis(columns, -1, 0)  # from [B, T, n x D]


def _read_through_pages(
    cache: PagedCache, page_table: Array, start: Array, *, count: int
) -> Array:
    """Read the pages that a row's columns belong to, and pick the columns from them.

    One page after the other, and columns by where they stand: if pages are gathered, or
    columns sliced out of them, the compiler for TPUs copies the whole cache before.
    """
    page_size, last = cache.page_size, page_table.shape[1] - 1
    sizes = (1, 1, *cache.features.shape[2:])

    def read(row):
        pages, at = row
        columns = 0
        for j in range((count - 1) // page_size + 2):
            index = at // page_size + j
            page = pages[jnp.minimum(index, last)]
            block = lax.dynamic_slice(cache.features, (0, page, 0, 0, 0), sizes)
            # [n x D, page_size, 1]; of all slots one at most is the column wanted, and
            # the others may hold anything.
            block = cache.columns(block)[0, 0, 0, :, :, None]
            position = index * page_size + jnp.arange(page_size)
            wanted = position[:, None] == at + jnp.arange(count)
            columns += jnp.sum(jnp.where(wanted, block, 0), axis=1)
        return columns

    return jnp.moveaxis(lax.map(read, (page_table, start)), 0, 1)


def read_feature_pages(cache: PagedCache, pages: Array) -> tuple[Array, ...]:
    """Read what whole pages `[n] int32` keep, each `[page_size, n x D]`."""
    return _read_pages(cache, cache.features, pages)


def read_route_pages(cache: PagedCache, pages: Array) -> tuple[Array, ...]:
    """Read the routes that whole pages `[n] int32` keep, each `[page_size, L x C]`.

    Behind them may be rows that packing needs.
    """
    return _read_pages(cache, cache.routes, pages)


def _read_pages(cache, array: Array, pages: Array) -> tuple[Array, ...]:
    """Read each page by itself: the host takes those that are wanted."""
    sizes = (1, 1, *array.shape[2:])
    blocks = (
        lax.dynamic_slice(array, (0, pages[i], 0, 0, 0), sizes)
        for i in range(pages.shape[0])
    )
    # A position's numbers side by side, as the host wants them.
    return tuple(cache.columns(block)[0, 0, 0].T for block in blocks)


def _as_it_lies(pages: Array) -> Array:
    """Keep the compiler from laying pages out otherwise between the kernel's calls."""
    by_lanes = [axis for axis in (4, 3) if pages.shape[axis] % page_layout.LANES == 0]
    if not by_lanes:
        return pages
    order = (0, 1, 2, 7 - by_lanes[0], by_lanes[0])
    return layout.with_layout_constraint(pages, layout.Layout(major_to_minor=order))


def _padded(block: Array, num_features: int) -> Array:
    """Give columns `[L, 1, K, H, n]` as many features as pages have room for."""
    spare = num_features - block.shape[3]
    return jnp.pad(block, [(0, spare if i == 3 else 0) for i in range(block.ndim)])


def _fresh(cache, keys: Fresh, values: Fresh, features, routes=None) -> PagedCache:
    """Bring fresh columns into the order of the pages' axes, `[L, K, H, B x T]`."""
    if (features is None) != (cache.features is None):
        raise ValueError(
            f"features is {'not ' if features is None else ''}given, but the cache "
            f"holds {'some' if features is None else 'none'}: make the cache with "
            "feature_size if and only if a drafter reads them."
        )
    if features is not None:
        features = features[None, None]
    stacked = (jnp.stack(x) if isinstance(x, tuple) else x for x in (keys, values))
    routes = (
        None if cache.routes is None else routes.reshape(1, 1, -1, *routes.shape[2:])
    )
    fresh = PagedCache(*stacked, features, cache.packing, routes)
    return jax.tree.map(lambda x: x.reshape(*x.shape[:3], -1), fresh)


def _write_columns(cache, fresh, column, page, slot, width=1) -> PagedCache:
    """Write neighbouring columns into a page; whole pages where they are packed."""

    # [L, K, H, width] becomes [L, 1, K, H, width], packed as the pages are.
    def put(pages, fresh):
        sizes = (*fresh.shape[:3], width)
        block = lax.dynamic_slice(fresh, (0, 0, 0, column), sizes)[:, None]
        block = _padded(block, pages.shape[3] * cache.packing)
        block = page_layout.pack(block, cache.packing)
        return lax.dynamic_update_slice(
            pages, block.astype(pages.dtype), (0, page, 0, 0, slot)
        )

    return jax.tree.map(put, cache, fresh)
