"""The kernel for GPUs, in Pallas' Triton dialect.

Why Triton, which upstream deprecates, and not Mosaic GPU, to which it points: Triton's
products take float32 exactly and any number of rows from 16 on, and one program runs
from Ampere to Blackwell; Mosaic GPU's `wgmma` rounds float32 to 19 bits, wants 64 rows
and one generation of chips, and `plgpu.kernel` cannot be interpreted through a public
interface in jax 0.10. Both are alive in jax 0.10 to 0.12.

A program takes one kv head of one row, a block of its queries (tokens x group) and a
stretch of its pages; slots are neighbours in memory, so pages are read in whole lines.
The last stretch also takes the fresh keys. Where a row has several stretches a second
program joins them, in their order. How long a stretch is follows from shapes that do
not hold the batch, so a row's numbers do not depend on the batch.

Array sizes in Triton are powers of two: queries are padded, rows of a page are read
again for head dimensions between.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from tlt_jax.pallas_kernels.verify_attention import reference
from tlt_jax.types import Array

_HIDDEN = reference.HIDDEN
# The smallest product of tensor cores.
_MIN_ROWS = 16
_MAX_ROWS = 64
# Slots whose scores are worked on at once, and bytes of their keys.
_SLOTS, _TILE_BYTES = 64, 16 * 2**10
_FRESH = 32
# A stretch of pages is so long that writing and joining partial sums costs an eighth of
# reading the pages, or less; from this many rows on a row is not cut.
_MIN_STRETCH, _STRETCH_PER_ROW, _MAX_CUT_ROWS = 512, 16, 1024


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a call is cut up; follows from its shapes alone, and not from the batch.

    Attributes:
      rows: of queries in a block.
      num_blocks: query blocks of a row.
      width: of the head dimension, padded.
      tile: slots of a tile, which is part of one page.
      tiles_at_once: tiles that are worked on together.
      stretch: slots of a stretch, a multiple of those tiles.
      num_stretches: of the longest row.
      num_warps, num_stages: for Triton's compiler.
    """

    rows: int
    num_blocks: int
    width: int
    tile: int
    tiles_at_once: int
    stretch: int
    num_stretches: int
    num_warps: int
    num_stages: int


def plan(query_shape: tuple[int, ...], dtype, page_size: int, max_pages: int) -> Plan:
    """Cut a call up.

    Args:
      query_shape: `(B, K, G, T, H)`.
      dtype: of the query.
      page_size: slots of a page, a power of two.
      max_pages: pages of the longest row.

    Returns:
      The plan.
    """
    _, _, group, num_tokens, head_dim = query_shape
    num_rows = group * num_tokens
    width = pl.next_power_of_2(head_dim)
    rows = min(max(pl.next_power_of_2(num_rows), _MIN_ROWS), _MAX_ROWS)
    itemsize = jnp.dtype(dtype).itemsize
    if width * itemsize >= 512:
        # More do not fit into the registers.
        rows = min(rows, 16 if itemsize == 4 else 32)
    tile = min(page_size, _SLOTS, max(_TILE_BYTES // (width * itemsize), 16))
    at_once = max(_SLOTS // tile if width * itemsize <= 256 else 1, 1)
    unit = tile * at_once
    num_slots = max_pages * page_size
    stretch = max(_MIN_STRETCH, _STRETCH_PER_ROW * num_rows)
    if num_rows >= _MAX_CUT_ROWS or stretch >= num_slots:
        stretch = num_slots
    stretch = pl.cdiv(stretch, unit) * unit
    return Plan(
        rows=rows,
        num_blocks=pl.cdiv(num_rows, rows),
        width=width,
        tile=tile,
        tiles_at_once=at_once,
        stretch=stretch,
        num_stretches=pl.cdiv(num_slots, stretch),
        num_warps=4,
        num_stages=2 if itemsize == 4 else 3,
    )


def verify_attention(
    query: Array,
    keys: Array,
    values: Array,
    cache_keys: Array,
    cache_values: Array,
    layer: Array | int,
    page_table: Array,
    lengths: Array,
    positions: Array,
    words: Array | None,
    *,
    scale: float,
    window: Array | int | None,
    soft_cap: float | None,
    with_log_normaliser: bool,
    interpret: bool,
) -> tuple[Array, Array | None]:
    """Run the kernel on arguments that were checked.

    Args:
      query, keys, values, cache_keys, cache_values, layer: see `api.verify_attention`.
      page_table, lengths, positions, words, scale, window, soft_cap: likewise.
      with_log_normaliser: likewise.
      interpret: run its programs one by one on a CPU.

    Returns:
      Output `[B, K, G, T, H]` in the query's dtype and, if asked for, log normalisers
      `[B, K, G, T] float32`.
    """
    batch, num_kv, group, num_tokens, head_dim = query.shape
    page_size, max_pages = cache_keys.shape[-1], page_table.shape[1]
    cut = plan(query.shape, query.dtype, page_size, max_pages)
    num_rows = cut.num_blocks * cut.rows
    num_fresh = pl.cdiv(num_tokens, _FRESH) * _FRESH

    def packed(x):
        """Cut `[..., T, G, n]` into rows, `[..., num_rows, n]`."""
        x = x.reshape(*x.shape[:-3], num_tokens * group, x.shape[-1])
        return _pad(x, -2, num_rows)

    query_rows = _pad(packed(jnp.swapaxes(query, 2, 3)), -1, cut.width)

    def of_rows(x):
        """Repeat `[B, T]` for the heads of a group, `[B, num_rows]`."""
        x = jnp.broadcast_to(x[..., None, None], (*x.shape, group, 1))
        return packed(x)[..., 0]

    index = jnp.broadcast_to(jnp.arange(num_tokens), (batch, num_tokens))
    if words is None:
        seen = of_rows(index)[:, None]
    else:
        seen = lax.bitcast_convert_type(words, jnp.int32)
        seen = jax.vmap(of_rows, in_axes=2, out_axes=1)(seen)
    # A block begins reading at the first slot that its nearest query sees.
    position_rows = of_rows(positions)
    starts = jnp.zeros((batch, cut.num_blocks), jnp.int32)
    if window is not None:
        farthest = jnp.iinfo(jnp.int32).max
        nearest = _pad(
            of_rows(positions)[:, : num_tokens * group], 1, num_rows, farthest
        )
        nearest = nearest.reshape(batch, cut.num_blocks, cut.rows).min(axis=2)
        starts = jnp.maximum(nearest - (window - 1), 0)
    fresh_keys, fresh_values = (
        _pad(_pad(x.astype(query.dtype), 2, cut.width), 3, num_fresh)
        for x in (keys, values)
    )
    fresh_values = fresh_values.swapaxes(2, 3)

    only = cut.num_stretches == 1
    grid = (cut.num_blocks, cut.num_stretches, batch * num_kv)
    shape = (batch, num_kv, num_rows)
    out_shape = [
        jax.ShapeDtypeStruct((*shape, cut.width), query.dtype),
        jax.ShapeDtypeStruct(shape, jnp.float32),
    ]
    part_shape = (batch, num_kv, cut.num_stretches, num_rows)
    parts = [
        jax.ShapeDtypeStruct((*part_shape, cut.width), jnp.float32),
        jax.ShapeDtypeStruct(part_shape, jnp.float32),
        jax.ShapeDtypeStruct(part_shape, jnp.float32),
    ]
    compiler_params = plgpu.CompilerParams(
        num_warps=cut.num_warps, num_stages=cut.num_stages
    )
    made = pl.pallas_call(
        functools.partial(
            _kernel,
            cut=cut,
            num_kv=num_kv,
            group=group,
            num_tokens=num_tokens,
            page_size=page_size,
            head_dim=head_dim,
            scale=scale,
            soft_cap=soft_cap,
            windowed=window is not None,
            causal=words is None,
        ),
        grid=grid,
        out_shape=out_shape if only else parts,
        compiler_params=compiler_params,
        interpret=interpret,
        name="verify_attention",
    )(
        jnp.full((1,), layer, jnp.int32),
        lengths,
        page_table,
        starts,
        jnp.full((1,), 0 if window is None else window, jnp.int32),
        query_rows,
        position_rows,
        seen,
        fresh_keys,
        fresh_values,
        _pad(positions, 1, num_fresh),
        cache_keys,
        cache_values,
    )
    if not only:
        made = pl.pallas_call(
            functools.partial(_join, cut=cut, num_kv=num_kv),
            grid=(cut.num_blocks, batch * num_kv),
            out_shape=out_shape,
            compiler_params=compiler_params,
            interpret=interpret,
            name="verify_attention_join",
        )(lengths, starts, *made)
    out, log = made

    def unpacked(x):
        x = x[:, :, : num_tokens * group]
        x = x.reshape(batch, num_kv, num_tokens, group, *x.shape[3:])
        return jnp.swapaxes(x, 2, 3)

    return unpacked(out[..., :head_dim]), unpacked(log) if with_log_normaliser else None


def _stretches(cut: Plan, length: Array, start: Array) -> tuple[Array, Array]:
    """First stretch of a row that is read, and the last one, which is always."""
    last = jnp.maximum(pl.cdiv(length, cut.stretch) - 1, 0)
    return jnp.minimum(start // cut.stretch, last), last


def _kernel(
    layer_ref,
    lengths_ref,
    table_ref,
    starts_ref,
    window_ref,
    query_ref,
    positions_ref,
    seen_ref,
    fresh_keys_ref,
    fresh_values_ref,
    key_positions_ref,
    keys_ref,
    values_ref,
    *out_refs,
    cut: Plan,
    num_kv: int,
    group: int,
    num_tokens: int,
    page_size: int,
    head_dim: int,
    scale: float,
    soft_cap: float | None,
    windowed: bool,
    causal: bool,
):
    block, stretch = pl.program_id(0), pl.program_id(1)
    row, head = pl.program_id(2) // num_kv, pl.program_id(2) % num_kv
    length, start = lengths_ref[row], starts_ref[row, block]
    first_stretch, last_stretch = _stretches(cut, length, start)

    @pl.when((stretch >= first_stretch) & (stretch <= last_stretch))
    def _():
        layer = layer_ref[0]
        here = pl.ds(block * cut.rows, cut.rows)
        query = query_ref[row, head, here, :]
        position = positions_ref[row, here]
        # Rows of a page behind the last one are read as the last one: the query is zero
        # there, and what they add to the output is cut off.
        features = jnp.minimum(jnp.arange(cut.width), head_dim - 1)
        lanes = jnp.arange(cut.tile)

        def update(carry, scores, visible, values):
            """Add parts of the keys: scores and masks `[R, s]`, values `[s, H]`."""
            total, maximum, normaliser = carry
            scores = [
                jnp.where(mask, reference.cap(part * scale, soft_cap), _HIDDEN)
                for part, mask in zip(scores, visible, strict=True)
            ]
            new = maximum
            for part in scores:
                new = jnp.maximum(new, jnp.max(part, axis=1))
            kept = jnp.exp(maximum - new)
            total, normaliser = total * kept[:, None], normaliser * kept
            for part, mask, value in zip(scores, visible, values, strict=True):
                weights = jnp.where(mask, jnp.exp(part - new[:, None]), 0.0)
                normaliser += jnp.sum(weights, axis=1)
                total += _dot(weights.astype(value.dtype), value)
            return total, new, normaliser

        def tiles(is_end, n, carry):
            scores, visible, read = [], [], []
            for j in range(cut.tiles_at_once):
                first = near = (n * cut.tiles_at_once + j) * cut.tile
                if is_end:
                    # Behind the row's end its last tile is read again, and not seen.
                    near = jnp.minimum(first, (length - 1) // cut.tile * cut.tile)
                page = table_ref[row, lax.div(near, page_size)]
                slots = pl.multiple_of(lax.rem(near, page_size), cut.tile) + lanes
                at = (layer, page, head, features[:, None], slots[None, :])
                key = plgpu.load(keys_ref.at[at]).astype(query.dtype)
                # Turned by its addresses: loads behind which the compiler finds a
                # transposition it does by two bytes, and none ahead.
                at = (layer, page, head, features[None, :], slots[:, None])
                value = plgpu.load(values_ref.at[at]).astype(query.dtype)
                slots = first + lanes
                mask = jnp.broadcast_to((slots < length)[None], (cut.rows, cut.tile))
                if windowed:
                    mask = mask & (position[:, None] - slots[None, :] < window_ref[0])
                if is_end:
                    # NaN in a slot that nobody sees would survive its weight of zero.
                    still = near + lanes < length
                    value = jnp.where(still[:, None], value, jnp.zeros_like(value))
                scores.append(_dot(query, key))
                visible.append(mask)
                read.append(value)
            return update(carry, scores, visible, read)

        carry = (
            jnp.zeros((cut.rows, cut.width), jnp.float32),
            jnp.full((cut.rows,), _HIDDEN, jnp.float32),
            jnp.zeros((cut.rows,), jnp.float32),
        )
        unit = cut.tile * cut.tiles_at_once
        begin = jnp.maximum(stretch * cut.stretch, start) // unit
        end = jnp.minimum((stretch + 1) * cut.stretch, length)
        whole = jnp.maximum(end // unit, begin)
        carry = lax.fori_loop(begin, whole, functools.partial(tiles, False), carry)
        ends = functools.partial(tiles, True)
        carry = lax.fori_loop(whole, pl.cdiv(end, unit), ends, carry)

        def fresh_tile(n, carry):
            at = pl.ds(n * _FRESH, _FRESH)
            column = jnp.arange(_FRESH)
            if causal:
                seen = seen_ref[row, 0, here]
                mask = n * _FRESH + column[None, :] <= seen[:, None]
            else:
                word = seen_ref[row, n, here]
                mask = (word[:, None] >> column[None, :]) & 1 == 1
            if windowed:
                of_keys = key_positions_ref[row, at]
                near = position[:, None] - of_keys[None, :] < window_ref[0]
                mask = mask & near
            scores = _dot(query, fresh_keys_ref[row, head, :, at])
            return update(carry, [scores], [mask], [fresh_values_ref[row, head, at, :]])

        num_tiles = jnp.int32(pl.cdiv(num_tokens, _FRESH))
        if causal:
            last_token = ((block + 1) * cut.rows - 1) // group
            num_tiles = jnp.minimum(last_token // _FRESH + 1, num_tiles)
        num_tiles = jnp.where(stretch == last_stretch, num_tiles, jnp.int32(0))
        total, maximum, normaliser = lax.fori_loop(0, num_tiles, fresh_tile, carry)

        if len(out_refs) == 2:
            _finish(out_refs, (row, head, here), total, maximum, normaliser)
        else:
            total_ref, max_ref, sum_ref = out_refs
            total_ref[row, head, stretch, here, :] = total
            max_ref[row, head, stretch, here] = maximum
            sum_ref[row, head, stretch, here] = normaliser


def _join(
    lengths_ref,
    starts_ref,
    total_ref,
    max_ref,
    sum_ref,
    *out_refs,
    cut: Plan,
    num_kv: int,
):
    """Join a block's stretches in their order."""
    block = pl.program_id(0)
    row, head = pl.program_id(1) // num_kv, pl.program_id(1) % num_kv
    here = pl.ds(block * cut.rows, cut.rows)
    first, last = _stretches(cut, lengths_ref[row], starts_ref[row, block])

    def add(stretch, carry):
        total, maximum, normaliser = carry
        its_maximum = max_ref[row, head, stretch, here]
        new = jnp.maximum(maximum, its_maximum)
        kept, its = jnp.exp(maximum - new), jnp.exp(its_maximum - new)
        its_total = total_ref[row, head, stretch, here, :]
        total = total * kept[:, None] + its_total * its[:, None]
        its_sum = sum_ref[row, head, stretch, here]
        return total, new, normaliser * kept + its_sum * its

    start = (
        jnp.zeros((cut.rows, cut.width), jnp.float32),
        jnp.full((cut.rows,), _HIDDEN, jnp.float32),
        jnp.zeros((cut.rows,), jnp.float32),
    )
    carry = lax.fori_loop(first, last + 1, add, start)
    _finish(out_refs, (row, head, here), *carry)


def _finish(out_refs, at, total: Array, maximum: Array, normaliser: Array) -> None:
    out_ref, log_ref = out_refs
    seen = normaliser > 0
    safe = jnp.where(seen, normaliser, 1.0)
    out_ref[(*at, slice(None))] = (total / safe[:, None]).astype(out_ref.dtype)
    log_ref[at] = jnp.where(seen, maximum + jnp.log(safe), _HIDDEN)


def _dot(left: Array, right: Array) -> Array:
    exact = left.dtype == jnp.float32
    return lax.dot_general(
        left,
        right,
        (((1,), (0,)), ((), ())),
        precision=lax.Precision.HIGHEST if exact else None,
        preferred_element_type=jnp.float32,
    )


def _pad(x: Array, axis: int, size: int, value: int = 0) -> Array:
    axis %= x.ndim
    if x.shape[axis] == size:
        return x
    widths = [(0, size - n if i == axis else 0) for i, n in enumerate(x.shape)]
    return jnp.pad(x, widths, constant_values=value)
