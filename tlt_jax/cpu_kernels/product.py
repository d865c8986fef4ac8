"""Weights times few columns, streaming the weights once.

Every element of the result is the chain `acc = fma(weight[i, k], x[k, column], acc)`
over k = 0, 1, ..., whatever the number of columns, threads or lanes of the machine. So
decoding one row, decoding many, and verifying a tree give the same bits.

`product_blocks` has the inner loops. Here is what lies around them: the block that fits
the number of columns is chosen, the end of `x` padded, and blocks of rows are dealt out
to threads.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from llvmlite import ir

from tlt_jax.cpu_kernels import code as code_lib
from tlt_jax.cpu_kernels import ffi, product_blocks
from tlt_jax.cpu_kernels import job as job_lib
from tlt_jax.types import Array

I64, POINTER, VOID = code_lib.I64, code_lib.POINTER, code_lib.VOID
# Weights times vectors that one thread should have, or waking it does not pay.
GRAIN = 32768
# Chunks per thread: threads that started late leave some to the others.
_CHUNKS = 4
# Rows of a transposed result that are collected before they are written.
_STAGE_ROWS = 64
# A multiple of every block's steps of k in one pass.
STEPS = 4

_COLUMNS_FIRST, _ROWS_FIRST = "tlt_jax_product", "tlt_jax_product_transposed"
# What chunks of rows read.
_FIELDS = job_lib.Fields(
    arguments=("w", "x"),
    results=("y",),
    numbers=(
        *("block", "size", "main", "n", "width", "rows", "num_rows", "num_blocks"),
        *("per_chunk", "transposed"),
    ),
)


@functools.cache
def register() -> None:
    """Compile the kernel and make it known to XLA, once in a process.

    Programs with this kernel that come from the persistent compilation cache, or were
    exported, need it before they are loaded.
    """
    names = (_COLUMNS_FIRST, _ROWS_FIRST)
    ffi.register(kernel(ffi.host_features()), {name: name for name in names})


def product(weight: Array, x: Array) -> Array:
    """Multiply columns by a weight, each column in the same order of additions.

    For programs on one CPU device: it cannot be partitioned or differentiated.

    Args:
      weight: `[*out, in] float32`.
      x: `[in, ...] float32`.

    Returns:
      `[*out, ...] float32`.
    """
    shape = (*weight.shape[:-1], *x.shape[1:])
    return _call(_COLUMNS_FIRST, weight, x, shape)


def product_transposed(weight: Array, x: Array) -> Array:
    """Multiply columns by a weight; the result has the weight's rows last.

    Args:
      weight: `[out, in] float32`.
      x: `[in, ...] float32`.

    Returns:
      `[..., out] float32`, the same bits as those of `product`.
    """
    return _call(_ROWS_FIRST, weight, x, (*x.shape[1:], weight.shape[0]))


def _call(name: str, weight: Array, x: Array, shape: tuple[int, ...]) -> Array:
    if weight.dtype != jnp.float32 or x.dtype != jnp.float32:
        raise ValueError(
            f"a native product got weights of {weight.dtype} and columns of {x.dtype}: "
            "it computes float32 only; use the XLA product for others."
        )
    if weight.shape[-1] != x.shape[0]:
        raise ValueError(
            f"a native product got weights of shape {weight.shape} and columns of "
            f"shape {x.shape}: the last axis of one must be the first of the other."
        )
    register()
    return jax.ffi.ffi_call(name, jax.ShapeDtypeStruct(shape, jnp.float32))(weight, x)


def kernel(features: frozenset[str]) -> code_lib.Module:
    """Write the kernel for a CPU with these features, as LLVM names them."""
    module = job_lib.begin(ffi.has_fma(features))
    blocks = blocks_of(features)
    for block in blocks:
        block.write(module)
    _write_chunk(module)
    for name, transposed in ((_COLUMNS_FIRST, 0), (_ROWS_FIRST, 1)):
        with job_lib.handler(module, name) as (code, call):
            _write_call(code, call, blocks, transposed)
    return module


def blocks_of(
    features: frozenset[str],
) -> list[product_blocks.WideBlock | product_blocks.TurnedBlock]:
    """Choose blocks: for less rows than others have, then narrowest to widest."""
    wide, few = product_blocks.WideBlock, []
    if "avx512f" in features:
        few = [product_blocks.TurnedBlock(columns) for columns in (1, 2, 4, 8)]
        lanes, usual = 16, ((1, 8), (2, 8), (3, 8), (4, 6))
    elif "avx2" in features:
        lanes, usual = 8, ((1, 8), (2, 6), (3, 4))
    elif "neon" in features:
        lanes, usual = 4, ((1, 8), (2, 8), (3, 6), (4, 5))
    else:
        lanes, usual = 4, ((1, 6), (2, 4))
    single = wide(min(lanes, 8), 1, 1)
    return [single, *few, *(wide(lanes, vectors, rows) for vectors, rows in usual)]


def _write_chunk(module: code_lib.Module) -> None:
    """Compute some blocks of rows, each times all panels of columns.

    Transposed results are collected for a group of blocks: writing a few rows at once
    to places that are `num_rows` apart would throw each line out of the cache before it
    is full.
    """
    code, (address, chunk) = module.begin("product_chunk", *job_lib.UNIT)
    job = _FIELDS.load(code, address)
    rows, n, num_rows = job["rows"], job["n"], job["num_rows"]
    tail = code.at(address, _FIELDS.num_bytes, kind=code_lib.I8)
    first = code.times(chunk, job["per_chunk"])
    stop = code.least(code.plus(first, job["per_chunk"]), job["num_blocks"])
    last_row = code.sub(num_rows, rows)
    is_staged = code.icmp_signed("!=", job["transposed"], code.number(0))
    staged_blocks = code.udiv(code.number(_STAGE_ROWS), rows)
    per_group = code.select(is_staged, staged_blocks, job["per_chunk"])
    stage = code.variable(POINTER, code_lib.NULL)
    with code.if_then(is_staged):
        stage.value = code.invoke("malloc", code.times(n, 4 * _STAGE_ROWS))
    kind = ir.FunctionType(VOID, product_blocks.SIGNATURE[1:]).as_pointer()
    compute = code.inttoptr(job["block"], kind)

    with code.loop(stop, per_group, start=first) as group:
        group_stop = code.least(code.plus(group, per_group), stop)
        group_row = code.times(group, rows)
        staged_y = code.at(stage.value, code.times(group_row, n, -1))
        target = code.select(is_staged, staged_y, job["y"])
        with code.loop(group_stop, start=group) as i:
            # The last block overlaps with the one before it, and stores its own rows.
            wanted = code.times(i, rows)
            row = code.least(wanted, last_row)
            w = code.at(job["w"], code.times(row, job["size"]))
            y = code.at(target, code.times(row, n))
            with code.loop(n, job["width"]) as column:
                at = [code.at(base, column) for base in (job["x"], tail, y)]
                columns = code.least(code.sub(n, column), job["width"])
                sizes = [job["size"], job["main"], n, columns, code.sub(wanted, row)]
                code.call(compute, [w, *at, *sizes])
        with code.if_then(is_staged):
            stop_row = code.least(code.times(group_stop, rows), num_rows)
            count = code.sub(stop_row, group_row)
            whole = code.and_(count, code.number(-4))
            with code.loop(n) as column:
                source = code.at(stage.value, column)
                place = code.at(job["y"], code.times(column, num_rows), group_row)
                for start, behind, step in ((0, whole, 4), (whole, count, 1)):
                    with code.loop(behind, step, start) as row:
                        at = [code.times(code.plus(row, i), n) for i in range(step)]
                        values = code.vector([code.get(source, i) for i in at])
                        code.put_vector(values, place, row)
    code.invoke("free", stage.value)
    code.ret_void()


def _write_call(
    code: code_lib.Code,
    call: job_lib.Call,
    blocks: Sequence[product_blocks.WideBlock | product_blocks.TurnedBlock],
    transposed: int,
) -> None:
    """Choose the block, copy what must be padded of x, make the job, and run it."""
    num_rows = call.size(0, 0, code.plus(call.rank(0), -1))
    size, n = call.size(1, 0, 1), call.size(1, 1, call.rank(1))
    with code.if_then(code.icmp_signed("==", code.times(num_rows, n), code.number(0))):
        code.ret(code_lib.NULL)

    # Panels of equal width, as few as can be, of the narrowest block that holds them.
    panels = code.over(n, blocks[-1].width)
    share = code.over(n, panels)
    chosen = choose(code, blocks, share, num_rows)
    width, rows = chosen["width"], chosen["rows"]
    is_packed = code.icmp_signed("!=", chosen["is_packed"], code.number(0))
    fits = code.icmp_signed("==", n, width)

    # Packed: as many columns as the block has, x itself or a copy with zeros. Else the
    # steps whose vectors end within x, in the last panel too; a copy of the others.
    reach = code.times(code.over(n, width), width)
    spare = code.plus(code.times(size, n), code.times(reach, -1), n)
    within = code.udiv(code.most(spare, 0), n)
    safe = code.and_(code.least(within, size), code.number(-STEPS))
    main = code.select(is_packed, size, safe)
    rest = code.times(code.sub(size, main), n)
    copied = code.select(fits, code.number(0), code.times(size, width))
    tail_bytes = code.times(code.select(is_packed, copied, code.plus(rest, reach)), 4)
    job = code.invoke("malloc", code.plus(tail_bytes, _FIELDS.num_bytes))
    tail = code.at(job, _FIELDS.num_bytes, kind=code_lib.I8)
    code.fill(tail, 0, tail_bytes)
    given, x = call.argument(1), code.variable(POINTER, call.argument(1))
    with code.if_else(is_packed) as (packed, padded):
        with packed, code.if_then(code.not_(fits)):
            x.value = tail
            with code.loop(size) as k, code.loop(n) as column:
                value = code.get(given, code.times(k, n), column)
                code.put(value, tail, code.times(k, width), column)
        with padded:
            code.copy(tail, code.at(given, code.times(main, n)), code.times(rest, 4))

    # Threads that the work is worth, and chunks.
    num_blocks = code.over(num_rows, rows)
    work = code.times(num_rows, size, chosen["vectors"], panels)
    worth = code.plus(code.udiv(work, code.number(GRAIN)), 1)
    threads = code.least(call.threads(), worth)
    is_alone = code.icmp_signed("<=", threads, code.number(1))
    wished = code.select(is_alone, code.number(1), code.times(threads, _CHUNKS))
    per_chunk = code.over(num_blocks, wished)
    values = dict(w=call.argument(0), x=x.value, y=call.result(0), **chosen)
    values |= dict(size=size, main=main, n=n, num_rows=num_rows, num_blocks=num_blocks)
    values |= dict(per_chunk=per_chunk, transposed=code.number(transposed))
    _FIELDS.store(code, job, values)
    call.run(job, "product_chunk", code.over(num_blocks, per_chunk), threads)


def choose(
    code: code_lib.Code,
    blocks: Sequence[product_blocks.WideBlock | product_blocks.TurnedBlock],
    columns: ir.Value,
    num_rows: ir.Value,
) -> dict[str, ir.Value]:
    """Choose the narrowest of `blocks_of` that holds so many columns, see its numbers.

    Where the weight has fewer rows than it, that is the block of one row, which takes
    more than one panel for them.
    """
    single, *blocks = blocks
    chosen = _numbers_of(code, blocks[-1])
    for block in reversed(blocks[:-1]):
        fits = code.icmp_signed("<=", columns, code.number(block.width))
        chosen = _selected(code, fits, _numbers_of(code, block), chosen)
    is_low = code.icmp_signed("<", num_rows, chosen["rows"])
    return _selected(code, is_low, _numbers_of(code, single), chosen)


def _numbers_of(code, block) -> dict[str, ir.Value]:
    """What a call must know of a block: job function, and job sizes."""
    numbers = dict(width=block.width, rows=block.rows, is_packed=int(block.is_packed))
    numbers |= dict(vectors=-(-block.width // block.lanes))
    function = code.address(block.name).ptrtoint(I64)
    return dict(block=function) | {k: code.number(v) for k, v in numbers.items()}


def _selected(code, condition, yes, no) -> dict[str, ir.Value]:
    return {name: code.select(condition, yes[name], no[name]) for name in yes}
