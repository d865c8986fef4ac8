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
import typing

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from tlt_jax.pallas_kernels.verify_attention import arguments, reference
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
      rows, num_blocks: of queries in a block, and blocks of a row.
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
    """Cut a call up; see `arguments.Sizes` for the arguments."""
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


class _Operands(typing.NamedTuple):
    """What the kernel reads: arrays outside of it, references inside.

    Attributes:
      layer, window: `[1] int32`.
      lengths: `[B] int32`.
      table: `[B, max_pages] int32`.
      starts: `[B, num_blocks] int32`, the first slot that a block sees.
      query: `[B, K, rows, width]`, tokens x group in rows.
      positions: `[B, rows] int32`, of the queries; with a window, and so below.
      seen: `[B, ceil(T / 32), rows] int32` words; of trees, for a chain tells itself.
      fresh_keys, fresh_values: `[B, K, width, fresh]`, `[B, K, fresh, width]`.
      key_positions: `[B, fresh] int32`.
      keys, values: `[L, num_pages, K, H, page_size]`.
    """

    layer: Array
    lengths: Array
    table: Array
    starts: Array
    window: Array
    query: Array
    positions: Array
    seen: Array
    fresh_keys: Array
    fresh_values: Array
    key_positions: Array
    keys: Array
    values: Array


def verify_attention(
    args: arguments.Arguments, interpret: bool
) -> tuple[Array, Array | None]:
    """Run the kernel on pages as columns; see `api.verify_attention`."""
    batch, num_kv, group, num_tokens, head_dim = args.query.shape
    cut = plan(*args.sizes)
    operands = _operands(args, cut)
    num_rows = cut.num_blocks * cut.rows
    shape = (batch, num_kv, num_tokens * group)
    out_shape = [
        jax.ShapeDtypeStruct((*shape, head_dim), args.query.dtype),
        jax.ShapeDtypeStruct(shape, jnp.float32),
    ]
    part_shape = (batch, num_kv, cut.num_stretches, num_rows)
    of_rows = jax.ShapeDtypeStruct(part_shape, jnp.float32)
    total = jax.ShapeDtypeStruct((*part_shape, cut.width), jnp.float32)
    options = dict(
        compiler_params=plgpu.CompilerParams(
            num_warps=cut.num_warps, num_stages=cut.num_stages
        ),
        interpret=interpret,
    )
    only = cut.num_stretches == 1
    made = pl.pallas_call(
        functools.partial(_kernel, cut=cut, const=args.constants),
        grid=(cut.num_blocks, cut.num_stretches, batch * num_kv),
        out_shape=out_shape if only else [total, of_rows, of_rows],
        name="verify_attention",
        **options,
    )(*operands)
    if not only:
        made = pl.pallas_call(
            functools.partial(_join, cut=cut, num_kv=num_kv),
            grid=(cut.num_blocks, batch * num_kv),
            out_shape=out_shape,
            name="verify_attention_join",
            **options,
        )(operands.lengths, operands.starts, *made)
    out, log = made

    def unpacked(x):
        x = x.reshape(batch, num_kv, num_tokens, group, *x.shape[3:])
        return jnp.swapaxes(x, 2, 3)

    return unpacked(out), unpacked(log) if args.with_log_normaliser else None


def _operands(args: arguments.Arguments, cut: Plan) -> _Operands:
    """Bring a call's arrays into the kernel's order, padded to powers of two."""
    batch, _, group, num_tokens, _ = args.query.shape
    positions, window = args.positions, args.window
    num_rows = cut.num_blocks * cut.rows
    num_fresh = pl.cdiv(num_tokens, _FRESH) * _FRESH

    def packed(x):
        """Cut `[..., T, G, n]` into rows, `[..., num_rows, n]`."""
        x = x.reshape(*x.shape[:-3], num_tokens * group, x.shape[-1])
        return arguments.pad(x, -2, num_rows)

    query_rows = arguments.pad(packed(jnp.swapaxes(args.query, 2, 3)), -1, cut.width)

    def of_rows(x):
        """Repeat `[B, T]` for the heads of a group, `[B, num_rows]`."""
        x = jnp.broadcast_to(x[..., None, None], (*x.shape, group, 1))
        return packed(x)[..., 0]

    # What is not read is a constant: bringing it into order would start a kernel.
    seen = unread = np.zeros((1, 1, 1), np.int32)
    if args.words is not None:
        seen = lax.bitcast_convert_type(args.words, jnp.int32)
        seen = jax.vmap(of_rows, in_axes=2, out_axes=1)(seen)
    # A block begins reading at the first slot that its nearest query sees.
    position_rows = key_positions = unread[0]
    starts = jnp.zeros((batch, cut.num_blocks), jnp.int32)
    if window is not None:
        position_rows = of_rows(positions)
        key_positions = arguments.pad(positions, 1, num_fresh)
        farthest = jnp.iinfo(jnp.int32).max
        nearest = of_rows(positions)[:, : num_tokens * group]
        nearest = arguments.pad(nearest, 1, num_rows, constant_values=farthest)
        nearest = nearest.reshape(batch, cut.num_blocks, cut.rows).min(axis=2)
        starts = jnp.maximum(nearest - (window - 1), 0)
    fresh_keys, fresh_values = (
        arguments.pad(
            arguments.pad(x.astype(args.query.dtype), 2, cut.width), 3, num_fresh
        )
        for x in (args.keys, args.values)
    )
    fresh_values = fresh_values.swapaxes(2, 3)
    return _Operands(
        layer=jnp.full((1,), args.layer, jnp.int32),
        lengths=args.lengths,
        table=args.page_table,
        starts=starts,
        window=jnp.full((1,), 0 if window is None else window, jnp.int32),
        query=query_rows,
        positions=position_rows,
        seen=seen,
        fresh_keys=fresh_keys,
        fresh_values=fresh_values,
        key_positions=key_positions,
        keys=args.cache_keys,
        values=args.cache_values,
    )


def _stretches(cut: Plan, length: Array, start: Array) -> tuple[Array, Array]:
    """First stretch of a row that is read, and the last one, which is always."""
    last = jnp.maximum(pl.cdiv(length, cut.stretch) - 1, 0)
    return jnp.minimum(start // cut.stretch, last), last


# The running sum of a block: total `[R, width]`, maximum and normaliser `[R]`.
_Carry = tuple[Array, Array, Array]


def _nothing(cut: Plan) -> _Carry:
    """The sum over no keys."""
    return (
        jnp.zeros((cut.rows, cut.width), jnp.float32),
        jnp.full((cut.rows,), _HIDDEN, jnp.float32),
        jnp.zeros((cut.rows,), jnp.float32),
    )


def _kernel(*refs, cut: Plan, const: arguments.Constants):
    """Walk a stretch of a row's pages with a block of one head's queries.

    The row's last stretch also takes the fresh keys.
    """
    num_operands = len(_Operands._fields)
    given, out_refs = _Operands(*refs[:num_operands]), refs[num_operands:]
    _, num_kv, group, num_tokens, _ = const.sizes.query_shape
    block, stretch = pl.program_id(0), pl.program_id(1)
    row, head = pl.program_id(2) // num_kv, pl.program_id(2) % num_kv
    length, start = given.lengths[row], given.starts[row, block]
    first_stretch, last_stretch = _stretches(cut, length, start)

    @pl.when((stretch >= first_stretch) & (stretch <= last_stretch))
    def _():
        walk = _Walk.begin(given, cut, const, block, row, head, length)
        unit = cut.tile * cut.tiles_at_once
        carry = _nothing(cut)
        # Whole groups of tiles first, then what stands around the row's end.
        begin = jnp.maximum(stretch * cut.stretch, start) // unit
        end = jnp.minimum((stretch + 1) * cut.stretch, length)
        whole = jnp.maximum(end // unit, begin)
        carry = lax.fori_loop(begin, whole, functools.partial(walk.pages, False), carry)
        ends = functools.partial(walk.pages, True)
        carry = lax.fori_loop(whole, pl.cdiv(end, unit), ends, carry)

        num_tiles = jnp.int32(pl.cdiv(num_tokens, _FRESH))
        if const.causal:
            last_token = ((block + 1) * cut.rows - 1) // group
            num_tiles = jnp.minimum(last_token // _FRESH + 1, num_tiles)
        num_tiles = jnp.where(stretch == last_stretch, num_tiles, jnp.int32(0))
        total, maximum, normaliser = lax.fori_loop(0, num_tiles, walk.fresh, carry)

        here = walk.here
        if len(out_refs) == 2:
            _finish(out_refs, (row, head, block), total, maximum, normaliser)
        else:
            total_ref, max_ref, sum_ref = out_refs
            total_ref[row, head, stretch, here, :] = total
            max_ref[row, head, stretch, here] = maximum
            sum_ref[row, head, stretch, here] = normaliser


@dataclasses.dataclass(frozen=True)
class _Walk:
    """A block of queries on its way over the keys that it sees.

    Attributes:
      given, cut, const: what the kernel reads, and of the call.
      layer, row, head: whose keys.
      here: the block's rows of queries.
      length: cached slots of the row.
      query: `[R, width]`.
      position: `[R] int32`, of the queries, or None without a window.
      features: `[width] int32`, rows of a page that are read.
      lanes: `[tile] int32`, slots of a tile.
    """

    given: _Operands
    cut: Plan
    const: arguments.Constants
    layer: Array
    row: Array
    head: Array
    here: pl.Slice
    length: Array
    query: Array
    position: Array | None
    features: Array
    lanes: Array

    @classmethod
    def begin(cls, given, cut, const, block, row, head, length) -> "_Walk":
        """Read the block's queries."""
        layer = given.layer[0]
        here = pl.ds(block * cut.rows, cut.rows)
        query = given.query[row, head, here, :]
        position = given.positions[row, here] if const.windowed else None
        # Rows of a page behind the last one are read as the last one: the query is zero
        # there, and what they add to the output is cut off.
        last = const.sizes.query_shape[4] - 1
        features = jnp.minimum(jnp.arange(cut.width), last)
        lanes = jnp.arange(cut.tile)
        place = (layer, row, head, here, length)
        return cls(given, cut, const, *place, query, position, features, lanes)

    def pages(self, is_end: bool, n: Array, carry: _Carry) -> _Carry:
        """Add the n-th group of tiles of cached slots.

        `is_end`: the row may end within them.
        """
        given, cut, page_size = self.given, self.cut, self.const.sizes.page_size
        scores, visible, read = [], [], []
        for j in range(cut.tiles_at_once):
            first = near = (n * cut.tiles_at_once + j) * cut.tile
            if is_end:
                # Behind the row's end its last tile is read again, and not seen.
                near = jnp.minimum(first, (self.length - 1) // cut.tile * cut.tile)
            page = given.table[self.row, lax.div(near, page_size)]
            slots = pl.multiple_of(lax.rem(near, page_size), cut.tile) + self.lanes
            place, features = (self.layer, page, self.head), self.features
            at = (*place, features[:, None], slots[None, :])
            key = plgpu.load(given.keys.at[at]).astype(self.query.dtype)
            # Turned by its addresses: loads behind which the compiler finds a
            # transposition it does by two bytes, and none ahead.
            at = (*place, features[None, :], slots[:, None])
            value = plgpu.load(given.values.at[at]).astype(self.query.dtype)
            slots = first + self.lanes
            mask = jnp.broadcast_to((slots < self.length)[None], (cut.rows, cut.tile))
            if self.const.windowed:
                distance = self.position[:, None] - slots[None, :]
                mask = mask & (distance < given.window[0])
            if is_end:
                # NaN in a slot that nobody sees would survive its weight of zero.
                still = near + self.lanes < self.length
                value = jnp.where(still[:, None], value, jnp.zeros_like(value))
            scores.append(reference.dot(self.query, key))
            visible.append(mask)
            read.append(value)
        return self._add(carry, scores, visible, read)

    def fresh(self, n: Array, carry: _Carry) -> _Carry:
        """Add the n-th tile of fresh keys."""
        given, row = self.given, self.row
        at = pl.ds(n * _FRESH, _FRESH)
        column = jnp.arange(_FRESH)
        if self.const.causal:
            # Tokens of a group's heads stand side by side.
            rows = self.here.start + jnp.arange(self.cut.rows)
            seen = lax.div(rows, jnp.int32(self.const.sizes.query_shape[2]))
            mask = n * _FRESH + column[None, :] <= seen[:, None]
        else:
            word = given.seen[row, n, self.here]
            mask = (word[:, None] >> column[None, :]) & 1 == 1
        if self.const.windowed:
            of_keys = given.key_positions[row, at]
            distance = self.position[:, None] - of_keys[None, :]
            mask = mask & (distance < given.window[0])
        scores = reference.dot(self.query, given.fresh_keys[row, self.head, :, at])
        values = given.fresh_values[row, self.head, at, :]
        return self._add(carry, [scores], [mask], [values])

    def _add(self, carry: _Carry, scores, visible, values) -> _Carry:
        """Add parts of the keys: scores and masks `[R, s]`, values `[s, width]`."""
        total, maximum, normaliser = carry
        scores = reference.masked(scores, visible, self.const)
        new = maximum
        for part in scores:
            new = jnp.maximum(new, jnp.max(part, axis=1))
        kept = jnp.exp(maximum - new)
        total, normaliser = total * kept[:, None], normaliser * kept
        for part, mask, value in zip(scores, visible, values, strict=True):
            weights = jnp.where(mask, jnp.exp(part - new[:, None]), 0.0)
            normaliser += jnp.sum(weights, axis=1)
            total += reference.dot(weights.astype(value.dtype), value)
        return total, new, normaliser


def _join(lengths_ref, starts_ref, *refs, cut: Plan, num_kv: int):
    """Join a block's stretches in their order."""
    (total_ref, max_ref, sum_ref), out_refs = refs[:3], refs[3:]
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

    nothing = _nothing(cut)
    carry = lax.fori_loop(first, last + 1, add, nothing)
    _finish(out_refs, (row, head, block), *carry)


def _finish(out_refs, at, total: Array, maximum: Array, normaliser: Array) -> None:
    """Write a block of a row's head, but for what pads it: no kernel cuts it off."""
    out_ref, log_ref = out_refs
    row, head, block = at
    num_rows, width = total.shape
    rows, features = block * num_rows + jnp.arange(num_rows), jnp.arange(width)
    is_query, is_feature = rows < log_ref.shape[2], features < out_ref.shape[3]
    seen = normaliser > 0
    safe = jnp.where(seen, normaliser, 1.0)
    plgpu.store(
        out_ref.at[row, head, rows[:, None], features[None, :]],
        (total / safe[:, None]).astype(out_ref.dtype),
        mask=is_query[:, None] & is_feature[None, :],
    )
    log = jnp.where(seen, maximum + jnp.log(safe), _HIDDEN)
    plgpu.store(log_ref.at[row, head, rows], log, mask=is_query)
