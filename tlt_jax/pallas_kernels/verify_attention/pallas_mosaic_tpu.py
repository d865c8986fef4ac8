"""The call for TPUs: how arguments reach the kernel, and its output comes back.

The cache stays in HBM. A page of a layer, `[K, H, page_size]`, lies there in one piece
and is copied as it lies. With 128 slots these are the lanes: scores are `query [R, H] x
keys [H, slots]` without a transposition, and head dimensions of 64 or 80 pad nothing.
Arrays of smaller pages the compiler lays out with whole multiples of 128 features as
lanes, and the kernel then takes them as `[K, page_size, H]`, which moves nothing. Where
neither is a multiple of 128 pages lie packed (`page_layout`): `packing` features of a
slot stand in a row of lanes. Products are then made for each of these parts of the
features, and 128 scores of as many pages are brought together by moving lanes.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from tlt_jax.pallas_kernels.verify_attention import (
    arguments,
    page_layout,
    tpu_kernel,
    tpu_plan,
)
from tlt_jax.types import Array


def verify_attention(
    args: arguments.Arguments, interpret
) -> tuple[Array, Array | None]:
    """Run the kernel; see `api.verify_attention`.

    `interpret` may also be `pltpu.InterpretParams`.
    """
    batch, num_kv, group, num_tokens, head_dim = args.query.shape
    cut = tpu_plan.plan(*args.sizes)
    operands = _operands(args, cut)
    parts, part_dim = cut.packing, operands.query.shape[-1]
    call = pl.pallas_call(
        functools.partial(tpu_kernel.kernel, cut=cut, const=args.constants),
        **_places(operands, cut, args),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=max(cut.vmem_bytes, 16 * 2**20),
        ),
        cost_estimate=tpu_plan.cost(args.sizes, args.window),
        interpret=interpret,
        name="verify_attention",
    )
    outputs = call(*operands)

    def unpacked(x):
        x = x[..., : cut.tokens * group, :]
        x = x.reshape(batch, num_kv, cut.num_blocks * cut.tokens, group, x.shape[-1])
        return jnp.swapaxes(x[:, :, :num_tokens], 2, 3)

    # Features of a part stand apart: back between those of the others.
    out = outputs[0].reshape(*outputs[0].shape[:3], parts, cut.rows, part_dim)
    out = jnp.moveaxis(out, 3, -1).reshape(*out.shape[:3], cut.rows, parts * part_dim)
    out = unpacked(out)[..., :head_dim]
    return out, unpacked(outputs[1])[..., 0] if args.with_log_normaliser else None


def _operands(args: arguments.Arguments, cut: tpu_plan.Plan) -> tpu_kernel.Operands:
    """Bring a call's arrays into the kernel's order."""
    batch, _, group, num_tokens, head_dim = args.query.shape
    positions, window, parts = args.positions, args.window, cut.packing
    num_features = page_layout.padded(head_dim, parts)
    part_dim = num_features // parts
    padded_tokens = cut.num_blocks * cut.tokens

    def packed(x):
        """Cut `[..., T, G, n]` into blocks of rows, `[..., num_blocks, R, n]`."""
        x = arguments.pad(x, -3, padded_tokens)
        lead, last = x.shape[:-3], x.shape[-1]
        x = x.reshape(*lead, cut.num_blocks, cut.tokens * group, last)
        return arguments.pad(x, -2, cut.rows)

    def in_parts(x):
        """Split features that lie side by side, `[..., parts, n, H / parts]`."""
        x = arguments.pad(x, -1, num_features)
        return jnp.moveaxis(x.reshape(*x.shape[:-1], part_dim, parts), -1, -3)

    # The rows of each part under those of the one before.
    query_rows = in_parts(packed(jnp.swapaxes(args.query, 2, 3)))
    query_rows = query_rows.reshape(*query_rows.shape[:3], parts * cut.rows, part_dim)
    # What each row of queries sees: its position, then its words or its own index.
    seen = jnp.broadcast_to(jnp.arange(num_tokens), (batch, num_tokens))[..., None]
    if args.words is not None:
        seen = lax.bitcast_convert_type(args.words, jnp.int32)
    sight = jnp.concatenate([positions[..., None], seen], axis=-1)
    shape = (batch, num_tokens, group, sight.shape[-1])
    sight = packed(jnp.broadcast_to(sight[:, :, None], shape))
    # Fresh columns become rows: few of them would be padded to 128 lanes.
    num_fresh = cut.num_tiles * cut.tile
    fresh_keys, fresh_values = (
        in_parts(arguments.pad(x.swapaxes(2, 3).astype(args.query.dtype), 2, num_fresh))
        for x in (args.keys, args.values)
    )
    key_positions = arguments.pad(positions, 1, num_fresh)[:, None]

    starts = jnp.zeros((batch, cut.num_blocks), jnp.int32)
    if window is not None:
        nearest = arguments.pad(positions, 1, padded_tokens, mode="edge")
        nearest = jnp.min(nearest.reshape(batch, cut.num_blocks, cut.tokens), axis=2)
        starts = jnp.maximum(nearest - (window - 1), 0)

    pages = args.cache_keys, args.cache_values
    if cut.turned:
        pages = tuple(x.swapaxes(3, 4) for x in pages)
    elif args.packing != parts:
        # Interpreted; on a TPU this copies all pages and is refused.
        pages = tuple(
            page_layout.pack(arguments.pad(x, 3, num_features), parts) for x in pages
        )
    return tpu_kernel.Operands(
        layer=jnp.full((1,), args.layer, jnp.int32),
        lengths=args.lengths.astype(jnp.int32),
        table=args.page_table.astype(jnp.int32).reshape(-1),
        starts=starts.reshape(-1),
        window=jnp.full((1,), 0 if window is None else window, jnp.int32),
        query=query_rows,
        sight=sight,
        fresh_keys=fresh_keys,
        fresh_values=fresh_values,
        key_positions=key_positions,
        keys=pages[0],
        values=pages[1],
    )


def _places(
    operands: tpu_kernel.Operands, cut: tpu_plan.Plan, args: arguments.Arguments
) -> dict:
    """Say what of the arrays each step has in its memory: its row's, or its block's."""
    batch, num_kv = args.query.shape[:2]
    rows_per_core = batch // cut.cores
    _, _, parts, num_fresh, part_dim = operands.fresh_keys.shape

    def row(core, i):
        return core * rows_per_core + i

    def per_block(core, i, j, *_):
        return row(core, i), 0, j, 0, 0

    row_shape, rows_shape = (1, num_kv, 1, cut.rows), (1, num_kv, 1, parts * cut.rows)
    out_shape = [jax.ShapeDtypeStruct(operands.query.shape, args.query.dtype)]
    out_specs = [pl.BlockSpec((*rows_shape, part_dim), per_block)]
    if args.with_log_normaliser:
        shape = (batch, num_kv, cut.num_blocks, cut.rows, page_layout.LANES)
        out_shape.append(jax.ShapeDtypeStruct(shape, jnp.float32))
        out_specs.append(pl.BlockSpec((*row_shape, page_layout.LANES), per_block))
    fresh_spec = pl.BlockSpec(
        (1, num_kv, parts, num_fresh, part_dim),
        lambda core, i, j, *_: (row(core, i), 0, 0, 0, 0),
    )
    buffer = pltpu.VMEM((2, cut.pages, *operands.keys.shape[2:]), operands.keys.dtype)
    of_rows = pltpu.VMEM((num_kv, cut.rows, page_layout.LANES), jnp.float32)
    scratch = tpu_kernel.Scratch(
        keys=buffer,
        values=buffer,
        maximum=of_rows,
        normaliser=of_rows,
        total=pltpu.VMEM((num_kv, parts * cut.rows, part_dim), jnp.float32),
        turn=pltpu.SMEM((1,), jnp.int32),
        arrived=pltpu.SemaphoreType.DMA((2, 2)),
    )
    return dict(
        out_shape=out_shape,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5,
            grid=(cut.cores, rows_per_core, cut.num_blocks),
            in_specs=[
                pl.BlockSpec((*rows_shape, part_dim), per_block),
                pl.BlockSpec(
                    (1, 1, cut.rows, operands.sight.shape[-1]),
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
            scratch_shapes=list(scratch),
        ),
    )
