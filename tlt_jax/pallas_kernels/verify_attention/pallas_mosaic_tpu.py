"""The kernel for TPUs.

The cache stays in HBM. A page of a layer, `[K, H, page_size]`, lies there in one piece
and is copied as it lies. With 128 slots these are the lanes: scores are `query [R, H] x
keys [H, slots]` without a transposition, and head dimensions of 64 or 80 pad nothing.
Arrays of smaller pages the compiler lays out with whole multiples of 128 features as
lanes, and the kernel then takes them as `[K, page_size, H]`, which moves nothing. Where
neither is a multiple of 128 pages lie packed (`page_layout`): `packing` features of a
slot stand in a row of lanes. Products are then made for each of these parts of the
features, and 128 scores of as many pages are brought together by moving lanes.

A grid step takes one block of one row's queries: R = tokens x group rows, packed so
that all query heads of a kv head share its pages. It walks the row's pages in blocks of
megabytes, which is what hides the latency of HBM: while one is worked on, the next is
on its way, be it the row's or the next row's first. Then come the fresh keys.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from tlt_jax.pallas_kernels.verify_attention import (
    page_layout,
    reference,
    tpu_plan,
    tpu_products,
)
from tlt_jax.types import Array

_HIDDEN = reference.HIDDEN
_LANES = page_layout.LANES


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
    packing: int,
    with_log_normaliser: bool,
    interpret,
) -> tuple[Array, Array | None]:
    """Run the kernel on arguments that were checked.

    Args:
      query, keys, values, cache_keys, cache_values, layer: see `api.verify_attention`.
      page_table, lengths, positions, words, scale, window, soft_cap: likewise.
      packing, with_log_normaliser: likewise.
      interpret: False, True, or `pltpu.InterpretParams`.

    Returns:
      Output `[B, K, G, T, H]` in the query's dtype and, if asked for, log normalisers
      `[B, K, G, T] float32`.
    """
    batch, num_kv, group, num_tokens, head_dim = query.shape
    page_size, max_pages = cache_keys.shape[-1] // packing, page_table.shape[1]
    cut = tpu_plan.plan(query.shape, query.dtype, page_size, max_pages)
    parts = cut.packing
    num_features = page_layout.padded(head_dim, parts)
    part_dim = num_features // parts
    padded_tokens = cut.num_blocks * cut.tokens

    def packed(x):
        """Cut `[..., T, G, n]` into blocks of rows, `[..., num_blocks, R, n]`."""
        x = _pad(x, -3, padded_tokens)
        lead, last = x.shape[:-3], x.shape[-1]
        x = x.reshape(*lead, cut.num_blocks, cut.tokens * group, last)
        return _pad(x, -2, cut.rows)

    def in_parts(x):
        """Split features that lie side by side, `[..., parts, n, H / parts]`."""
        x = _pad(x, -1, num_features)
        return jnp.moveaxis(x.reshape(*x.shape[:-1], part_dim, parts), -1, -3)

    # The rows of each part under those of the one before.
    query_rows = in_parts(packed(jnp.swapaxes(query, 2, 3)))
    query_rows = query_rows.reshape(*query_rows.shape[:3], parts * cut.rows, part_dim)
    # What each row of queries sees: its position, then its words or its own index.
    index = jnp.broadcast_to(jnp.arange(num_tokens), (batch, num_tokens))[..., None]
    seen = index if words is None else lax.bitcast_convert_type(words, jnp.int32)
    sight = jnp.concatenate([positions[..., None], seen], axis=-1)
    sight = jnp.broadcast_to(
        sight[:, :, None], (batch, num_tokens, group, sight.shape[-1])
    )
    sight = packed(sight)
    # Fresh columns become rows: few of them would be padded to 128 lanes.
    num_fresh = cut.num_tiles * cut.tile
    fresh_keys, fresh_values = (
        in_parts(_pad(x.swapaxes(2, 3).astype(query.dtype), 2, num_fresh))
        for x in (keys, values)
    )
    key_positions = _pad(positions, 1, num_fresh)[:, None]

    starts = jnp.zeros((batch, cut.num_blocks), jnp.int32)
    if window is not None:
        nearest = _pad(positions, 1, padded_tokens, mode="edge")
        nearest = jnp.min(nearest.reshape(batch, cut.num_blocks, cut.tokens), axis=2)
        starts = jnp.maximum(nearest - (window - 1), 0)

    if cut.turned:
        cache_keys, cache_values = (
            x.swapaxes(3, 4) for x in (cache_keys, cache_values)
        )
    elif packing != parts:
        # Interpreted; on a TPU this copies all pages and is refused.
        cache_keys, cache_values = (
            page_layout.pack(_pad(x, 3, num_features), parts)
            for x in (cache_keys, cache_values)
        )
    kernel = functools.partial(
        _kernel,
        cut=cut,
        batch=batch,
        max_pages=max_pages,
        page_size=page_size,
        scale=scale,
        soft_cap=soft_cap,
        windowed=window is not None,
        causal=words is None,
    )
    steps = (cut.cores, batch // cut.cores, cut.num_blocks)

    def row(core, i):
        return core * (batch // cut.cores) + i

    def per_block(core, i, j, *_):
        return row(core, i), 0, j, 0, 0

    def per_row(core, i, j, *_):
        return row(core, i), 0, 0, 0, 0

    row_shape, rows_shape = (1, num_kv, 1, cut.rows), (1, num_kv, 1, parts * cut.rows)
    out_shape = [jax.ShapeDtypeStruct(query_rows.shape, query.dtype)]
    out_specs = [pl.BlockSpec((*rows_shape, part_dim), per_block)]
    if with_log_normaliser:
        shape = (batch, num_kv, cut.num_blocks, cut.rows, _LANES)
        out_shape.append(jax.ShapeDtypeStruct(shape, jnp.float32))
        out_specs.append(pl.BlockSpec((*row_shape, _LANES), per_block))
    fresh_spec = pl.BlockSpec((1, num_kv, parts, num_fresh, part_dim), per_row)
    buffer = pltpu.VMEM((2, cut.pages, *cache_keys.shape[2:]), cache_keys.dtype)
    call = pl.pallas_call(
        kernel,
        out_shape=out_shape,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5,
            grid=steps,
            in_specs=[
                pl.BlockSpec((*rows_shape, part_dim), per_block),
                pl.BlockSpec(
                    (1, 1, cut.rows, sight.shape[-1]),
                    lambda core, i, j, *_: (row(core, i), j, 0, 0),
                ),
                fresh_spec,
                fresh_spec,
                pl.BlockSpec(
                    (1, 1, num_fresh), lambda core, i, j, *_: (row(core, i), 0, 0)
                ),
                pl.BlockSpec(memory_space=pl.ANY),
                pl.BlockSpec(memory_space=pl.ANY),
            ],
            out_specs=out_specs,
            scratch_shapes=[
                buffer,
                buffer,
                pltpu.VMEM((num_kv, cut.rows, _LANES), jnp.float32),
                pltpu.VMEM((num_kv, cut.rows, _LANES), jnp.float32),
                pltpu.VMEM((num_kv, parts * cut.rows, part_dim), jnp.float32),
                pltpu.SMEM((1,), jnp.int32),
                pltpu.SemaphoreType.DMA((2, 2)),
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=max(cut.vmem_bytes, 16 * 2**20),
        ),
        cost_estimate=tpu_plan.cost(
            query.shape, query.dtype, page_size, max_pages, window
        ),
        interpret=interpret,
        name="verify_attention",
    )
    outputs = call(
        jnp.full((1,), layer, jnp.int32),
        lengths.astype(jnp.int32),
        page_table.astype(jnp.int32).reshape(-1),
        starts.reshape(-1),
        jnp.full((1,), 0 if window is None else window, jnp.int32),
        query_rows,
        sight,
        fresh_keys,
        fresh_values,
        key_positions,
        cache_keys,
        cache_values,
    )

    def unpacked(x):
        x = x[..., : cut.tokens * group, :]
        x = x.reshape(batch, num_kv, padded_tokens, group, x.shape[-1])
        return jnp.swapaxes(x[:, :, :num_tokens], 2, 3)

    out = outputs[0].reshape(*outputs[0].shape[:3], parts, cut.rows, part_dim)
    out = jnp.moveaxis(out, 3, -1).reshape(*out.shape[:3], cut.rows, num_features)
    out = unpacked(out)[..., :head_dim]
    return out, unpacked(outputs[1])[..., 0] if with_log_normaliser else None


def _kernel(
    layer_ref,
    lengths_ref,
    table_ref,
    starts_ref,
    window_ref,
    query_ref,
    sight_ref,
    fresh_keys_ref,
    fresh_values_ref,
    key_positions_ref,
    keys_hbm,
    values_hbm,
    out_ref,
    *rest,
    cut: tpu_plan.Plan,
    batch: int,
    max_pages: int,
    page_size: int,
    scale: float,
    soft_cap: float | None,
    windowed: bool,
    causal: bool,
):
    *log_refs, keys_buf, values_buf, max_ref, sum_ref, acc_ref, turn_ref, sems = rest
    core, i, block = (pl.program_id(axis) for axis in range(3))
    rows_per_core = batch // cut.cores
    step = i * cut.num_blocks + block
    num_steps = rows_per_core * cut.num_blocks
    num_kv = keys_hbm.shape[2]
    # Pages whose scores are one array: slots follow each other along sublanes, or along
    # the lanes that packed pages leave.
    joined = cut.pages_at_once if cut.turned else cut.packing
    row = core * rows_per_core + i
    # Heads side by side hide each other's latency; large ones have enough of their own.
    unroll = num_kv if num_kv * cut.rows <= 1024 else 1
    length = lengths_ref[row]

    def bounds(step):
        """Row of a step, its first page, and behind its last one."""
        row = core * rows_per_core + step // cut.num_blocks
        first = starts_ref[core * num_steps + step] // page_size
        stop = pl.cdiv(lengths_ref[row], page_size)
        return row, jnp.minimum(first, stop), stop

    def copies(row, page, turn, slot):
        index = table_ref[row * max_pages + page]
        source = (layer_ref[0], index)
        return (
            pltpu.make_async_copy(
                keys_hbm.at[source], keys_buf.at[turn, slot], sems.at[turn, 0]
            ),
            pltpu.make_async_copy(
                values_hbm.at[source], values_buf.at[turn, slot], sems.at[turn, 1]
            ),
        )

    def fetch(row, first, stop, turn):
        """Start copying the block of pages from `first` on."""

        def start(slot, _):
            for copy in copies(row, first + slot, turn, slot):
                copy.start()

        count = jnp.clip(stop - first, 0, cut.pages)
        lax.fori_loop(0, count, start, None)

    _, first, stop = bounds(step)

    @pl.when(step == 0)
    def _():
        turn_ref[0] = 0
        fetch(row, first, stop, 0)

    max_ref[...] = jnp.full_like(max_ref, _HIDDEN)
    sum_ref[...] = jnp.zeros_like(sum_ref)
    acc_ref[...] = jnp.zeros_like(acc_ref)
    position = sight_ref[0, 0, :, 0:1]

    def update(head, scores, visible, weigh):
        """Add parts of the keys of one head, as lists: scores, masks, and what weighs
        the values."""
        scores = [
            jnp.where(mask, reference.cap(part * scale, soft_cap), _HIDDEN)
            for part, mask in zip(scores, visible, strict=True)
        ]
        old = max_ref[head, :, 0:1]
        new = old
        for part in scores:
            new = jnp.maximum(new, jnp.max(part, axis=1, keepdims=True))
        kept = jnp.exp(old - new)
        total = acc_ref[head] * _stack(kept, cut.packing)
        normaliser = sum_ref[head, :, 0:1] * kept
        for part, mask, add in zip(scores, visible, weigh, strict=True):
            weights = jnp.where(mask, jnp.exp(part - new), 0.0)
            normaliser += jnp.sum(weights, axis=1, keepdims=True)
            total += add(weights)
        acc_ref[head] = total
        max_ref[head] = jnp.broadcast_to(new, max_ref.shape[1:])
        sum_ref[head] = jnp.broadcast_to(normaliser, sum_ref.shape[1:])

    def part_of_block(part, at, turn):
        """Work on `pages_at_once` pages of the block that begins at page `at`."""
        first_slot = part * cut.pages_at_once
        first_page = at + first_slot

        def arrive(slot, _):
            for copy in copies(row, at + slot, turn, slot):
                copy.wait()

        behind = jnp.minimum(first_slot + cut.pages_at_once, stop - at)
        lax.fori_loop(first_slot, behind, arrive, None)

        def position_of(j, shape, axis):
            lane = lax.broadcasted_iota(jnp.int32, shape, axis)
            if cut.packing > 1 and len(shape) == 3:
                lane = lane % page_size
            return (first_page + j) * page_size + lane

        @pl.when((first_page + cut.pages_at_once) * page_size > length)
        def _():
            # NaN in a slot that nobody sees would survive its weight of zero.
            for j in range(cut.pages_at_once):
                here = values_buf[turn, first_slot + j]
                axis = 1 if cut.turned else 2
                readable = position_of(j, here.shape, axis) < length
                here = jnp.where(readable, here.astype(jnp.float32), 0.0)
                values_buf[turn, first_slot + j] = here.astype(values_buf.dtype)

        visible = []
        for j in range(0, cut.pages_at_once, joined):
            slots = position_of(j, (cut.rows, joined * page_size), 1)
            mask = slots < length
            if windowed:
                mask = mask & (position - slots < window_ref[0])
            visible.append(mask)

        def one_head(head, _):
            query = query_ref[0, head, 0]
            scores, weigh = [], []
            for j in range(0, cut.pages_at_once, joined):
                at = (turn, pl.ds(first_slot + j, joined), head)
                key, value = (
                    buf[at].astype(query.dtype) for buf in (keys_buf, values_buf)
                )
                if cut.packing > 1:
                    scores.append(
                        tpu_products.packed_scores(query, key, cut, page_size)
                    )
                    add = functools.partial(
                        tpu_products.packed_sum,
                        value=value,
                        cut=cut,
                        page_size=page_size,
                    )
                else:
                    key, value = (x.reshape(-1, x.shape[-1]) for x in (key, value))
                    scores.append(
                        tpu_products.dot(query, key, (1, 1 if cut.turned else 0))
                    )
                    contract = (1, 0 if cut.turned else 1)
                    add = functools.partial(
                        tpu_products.weighted, value=value, contract=contract
                    )
                weigh.append(add)
            update(head, scores, visible, weigh)

        lax.fori_loop(0, num_kv, one_head, None, unroll=unroll)

    num_page_blocks = jnp.maximum(pl.cdiv(stop - first, cut.pages), 1)

    def one_block(n, turn):
        at = first + n * cut.pages
        is_last = n + 1 == num_page_blocks

        @pl.when(jnp.logical_not(is_last))
        def _():
            fetch(row, at + cut.pages, stop, 1 - turn)

        @pl.when(is_last & (step + 1 < num_steps))
        def _():
            fetch(*bounds(step + 1), 1 - turn)

        count = jnp.clip(stop - at, 0, cut.pages)

        def part(k, _):
            part_of_block(k, at, turn)

        lax.fori_loop(0, pl.cdiv(count, cut.pages_at_once), part, None)
        return 1 - turn

    turn_ref[0] = lax.fori_loop(0, num_page_blocks, one_block, turn_ref[0])

    def one_tile(n, _):
        here = pl.ds(pl.multiple_of(n * cut.tile, cut.tile), cut.tile)
        column = lax.broadcasted_iota(jnp.int32, (cut.rows, cut.tile), 1)
        if causal:
            mask = column + n * cut.tile <= sight_ref[0, 0, :, 1:2]
        else:
            # One tile holds all nodes.
            word = jnp.zeros((cut.rows, cut.tile), jnp.int32)
            for w in range(sight_ref.shape[3] - 1):
                of_word = column // 32 == w
                word = jnp.where(of_word, sight_ref[0, 0, :, w + 1 : w + 2], word)
            mask = lax.shift_right_logical(word, column % 32) & 1 == 1
        if windowed:
            mask = mask & (position - key_positions_ref[0, :, here] < window_ref[0])

        def one_head(head, _):
            scores = sum(
                tpu_products.dot(
                    query_ref[0, head, 0, pl.ds(part * cut.rows, cut.rows)],
                    fresh_keys_ref[0, head, part, here],
                    (1, 1),
                )
                for part in range(cut.packing)
            )

            def add(weights):
                return jnp.concatenate(
                    [
                        tpu_products.weighted(
                            weights, fresh_values_ref[0, head, part, here], (1, 0)
                        )
                        for part in range(cut.packing)
                    ]
                )

            update(head, [scores], [mask], [add])

        lax.fori_loop(0, num_kv, one_head, None, unroll=unroll)

    num_tiles = cut.num_tiles
    # One tile may be narrower than the lanes: only a fixed place in them compiles.
    if causal and num_tiles > 1:
        num_tiles = jnp.minimum(pl.cdiv((block + 1) * cut.tokens, cut.tile), num_tiles)
    lax.fori_loop(0, num_tiles, one_tile, None)

    for head in range(num_kv):
        normaliser = sum_ref[head, :, 0:1]
        seen = normaliser > 0
        safe = jnp.where(seen, normaliser, 1.0)
        out = acc_ref[head] / _stack(safe, cut.packing)
        out_ref[0, head, 0] = out.astype(out_ref.dtype)
        for log_ref in log_refs:
            log = jnp.where(seen, max_ref[head, :, 0:1] + jnp.log(safe), _HIDDEN)
            log_ref[0, head, 0] = jnp.broadcast_to(log, log_ref.shape[3:])


def _stack(x: Array, count: int) -> Array:
    return jnp.concatenate([x] * count) if count > 1 else x


def _pad(x: Array, axis: int, size: int, mode: str = "constant") -> Array:
    axis %= x.ndim
    if x.shape[axis] == size:
        return x
    widths = [(0, size - n if i == axis else 0) for i, n in enumerate(x.shape)]
    return jnp.pad(x, widths, mode=mode)
