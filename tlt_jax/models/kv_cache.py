"""The paged key/value cache.

A page holds `page_size` positions of one row in every layer. Pages hold columns like
the activations: `[L, num_pages, K, H, page_size]`. A row's `page_table` lists its pages
in order; several rows may list the same page (the full pages of a group's prompt).
Page 0 is nobody's: table entries without a page point at it, and writes that must not
land anywhere go there. A slot beyond a row's length holds anything and is never read.
"""

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from tlt_jax.models import config as model_config
from tlt_jax.types import Array

SCRATCH_PAGE = 0

# Fresh columns of all layers, `[L, K, H, B, T]` or a tuple of L `[K, H, B, T]`.
Fresh = Array | tuple[Array, ...]


@struct.dataclass
class PagedCache:
    """Keys (already rotated) and values of all pages.

    Attributes:
      keys, values: `[L, num_pages, K, H, page_size]`.
    """

    keys: Array
    values: Array

    @property
    def num_pages(self) -> int:
        """Pages, the scratch page included."""
        return self.keys.shape[1]

    @property
    def page_size(self) -> int:
        """Positions in a page."""
        return self.keys.shape[4]


def create(
    cfg: model_config.ModelConfig, num_pages: int, page_size: int, dtype
) -> PagedCache:
    """Make an empty cache of `num_pages` pages, the scratch page included."""
    shape = (cfg.num_layers, num_pages, cfg.num_kv_heads, cfg.head_dim, page_size)
    return PagedCache(keys=jnp.zeros(shape, dtype), values=jnp.zeros(shape, dtype))


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
) -> PagedCache:
    """Write each row's first `counts` fresh columns behind its `lengths` old ones.

    Args:
      cache: the cache; donate it, the write is in place.
      keys, values: `[L, K, H, B, T]` fresh columns, as the forward returns them.
      page_table: `[B, max_pages] int32`.
      lengths: `[B] int32`, columns that the row holds already.
      counts: `[B] int32`, 0 <= counts <= T; later columns are dropped.

    Returns:
      The cache with the columns written.
    """
    keys, values = _stacked(keys), _stacked(values)
    page_size = cache.page_size
    num_rows, width = keys.shape[3], keys.shape[4]

    def write(i, cache):
        row, t = i // width, i % width
        position = lengths[row] + t
        page = jnp.where(
            t < counts[row], page_table[row, position // page_size], SCRATCH_PAGE
        )
        return _write_columns(cache, keys, values, row, t, page, position % page_size)

    return lax.fori_loop(0, num_rows * width, write, cache)


def append_pages(
    cache: PagedCache,
    keys: Fresh,
    values: Fresh,
    page_table: Array,
    lengths: Array,
    counts: Array,
) -> PagedCache:
    """Write fresh columns page by page, where rows start at page boundaries.

    Slots behind `counts` in the last page written hold what the fresh columns hold
    there: they are beyond the row's length.

    Args:
      cache: the cache; donate it, the write is in place.
      keys, values: `[L, K, H, B, T]` with T a multiple of the page size.
      page_table: `[B, max_pages] int32`.
      lengths: `[B] int32`, multiples of the page size.
      counts: `[B] int32`; pages without a column among the first `counts` are dropped.

    Returns:
      The cache with the pages written.
    """
    keys, values = _stacked(keys), _stacked(values)
    page_size = cache.page_size
    num_rows, width = keys.shape[3], keys.shape[4]
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
        return _write_columns(
            cache, keys, values, row, j * page_size, page, 0, page_size
        )

    return lax.fori_loop(0, num_rows * pages_per_row, write, cache)


def copy_pages(cache: PagedCache, sources: Array, targets: Array) -> PagedCache:
    """Copy page `sources[i]` to page `targets[i]`; pairs (0, 0) do nothing.

    Args:
      cache: the cache; donate it.
      sources, targets: `[n] int32`.

    Returns:
      The cache with the pages copied.
    """

    def copy(i, cache):
        def move(pages):
            page = lax.dynamic_slice_in_dim(pages, sources[i], 1, axis=1)
            return lax.dynamic_update_slice_in_dim(pages, page, targets[i], axis=1)

        return jax.tree.map(move, cache)

    return lax.fori_loop(0, sources.shape[0], copy, cache)


def _stacked(columns: Fresh) -> Array:
    return jnp.stack(columns) if isinstance(columns, tuple) else columns


def _write_columns(cache, keys, values, row, t, page, slot, width=1) -> PagedCache:
    def put(pages, fresh):
        num_layers, num_heads, head_dim = fresh.shape[:3]
        columns = lax.dynamic_slice(
            fresh,
            (0, 0, 0, row, t),
            (num_layers, num_heads, head_dim, 1, width),
        )
        block = columns.reshape(num_layers, 1, num_heads, head_dim, width)
        return lax.dynamic_update_slice(
            pages, block.astype(pages.dtype), (0, page, 0, 0, slot)
        )

    return PagedCache(keys=put(cache.keys, keys), values=put(cache.values, values))
