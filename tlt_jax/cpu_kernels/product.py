"""Weights times few columns, streaming the weights once.

Every element of the result is the chain `acc = fma(weight[i, k], x[k, column], acc)`
over k = 0, 1, ..., whatever the number of columns, threads or lanes of the machine. So
decoding one row, decoding many, and verifying a tree give the same bits.

`product_blocks` has the inner loops. Here is what lies around them: the block that fits
the number of columns is chosen, the end of `x` padded, and blocks of rows are dealt out
to threads.
"""

import functools

import jax
import jax.numpy as jnp

from tlt_jax.cpu_kernels import ffi, product_blocks
from tlt_jax.types import Array

# Weights times vectors that one thread should have, or waking it does not pay.
_GRAIN = 32768
# Chunks per thread: threads that started late leave some to the others.
_CHUNKS = 4
# Rows of a transposed result that are collected before they are written.
_STAGE_ROWS = 64

_COLUMNS_FIRST, _ROWS_FIRST = "tlt_jax_product", "tlt_jax_product_transposed"


def _blocks(
    features: frozenset[str],
) -> list[product_blocks.WideBlock | product_blocks.TurnedBlock]:
    """Choose blocks, from the narrowest to the widest."""
    wide = product_blocks.WideBlock
    if "avx512f" in features:
        few = [product_blocks.TurnedBlock(columns) for columns in (1, 2, 4, 8)]
        usual = ((1, 8), (2, 8), (3, 8), (4, 6))
        return [*few, *(wide(16, v, rows) for v, rows in usual)]
    if "avx2" in features:
        return [wide(8, v, rows) for v, rows in ((1, 8), (2, 6), (3, 4))]
    if "neon" in features:
        return [wide(4, v, rows) for v, rows in ((1, 8), (2, 8), (3, 6), (4, 5))]
    return [wide(4, v, rows) for v, rows in ((1, 6), (2, 4))]


# What a job of this kernel holds behind the runtime's header, eight bytes each.
_FIELDS = (
    *("w", "x", "tail", "y", "block", "size", "main", "n", "width", "rows"),
    *("num_rows", "num_blocks", "per_chunk", "transposed"),
)


def _fields_ir(job: str, names: tuple[str, ...], load: bool) -> str:
    """Load fields of a job into values of their names, or store these there."""
    out = []
    for name in names:
        offset = ffi.JOB_HEADER + 8 * _FIELDS.index(name)
        kind = "ptr" if name in ("w", "x", "tail", "y", "block") else "i64"
        out.append(f"  %{name}_at = getelementptr i8, ptr {job}, i64 {offset}")
        if load:
            out.append(f"  %{name} = load {kind}, ptr %{name}_at")
        else:
            out.append(f"  store {kind} %{name}, ptr %{name}_at")
    return "\n".join(out)


# One chunk of a job: some blocks of rows, each times all panels of columns. Transposed
# results are collected for a group of blocks: writing a few rows at once to places that
# are `num_rows` apart would throw each line out of the cache before it is full.
_CHUNK = """
define internal void @product_chunk(ptr %%job, i64 %%chunk) {
entry:
%(load)s
  %%first = mul i64 %%chunk, %%per_chunk
  %%behind = add i64 %%first, %%per_chunk
  %%over = icmp slt i64 %%behind, %%num_blocks
  %%stop = select i1 %%over, i64 %%behind, i64 %%num_blocks
  %%last_row = sub i64 %%num_rows, %%rows
  %%is_staged = icmp ne i64 %%transposed, 0
  %%some_blocks = udiv i64 %(stage_rows)d, %%rows
  %%per_group = select i1 %%is_staged, i64 %%some_blocks, i64 %%per_chunk
  br i1 %%is_staged, label %%allocate, label %%group_head
allocate:
  %%stage_cells = mul i64 %%n, %(stage_rows)d
  %%stage_bytes = mul i64 %%stage_cells, 4
  %%allocated = call ptr @malloc(i64 %%stage_bytes)
  br label %%group_head
group_head:
  %%group = phi i64 [%%first, %%entry], [%%first, %%allocate],
      [%%group_stop, %%group_end]
  %%stage = phi ptr [null, %%entry], [%%allocated, %%allocate], [%%stage, %%group_end]
  %%group_more = icmp slt i64 %%group, %%stop
  br i1 %%group_more, label %%group_body, label %%done
group_body:
  %%group_behind = add i64 %%group, %%per_group
  %%group_over = icmp slt i64 %%group_behind, %%stop
  %%group_stop = select i1 %%group_over, i64 %%group_behind, i64 %%stop
  %%group_row = mul i64 %%group, %%rows
  %%group_offset = mul i64 %%group_row, %%n
  %%before_group = sub i64 0, %%group_offset
  %%staged_y = getelementptr float, ptr %%stage, i64 %%before_group
  %%target = select i1 %%is_staged, ptr %%staged_y, ptr %%y
  br label %%block_body
block_body:
  %%i = phi i64 [%%group, %%group_body], [%%i_next, %%block_end]
  ; The last block overlaps with the one before it, and stores its own rows only.
  %%wanted = mul i64 %%i, %%rows
  %%fits = icmp sle i64 %%wanted, %%last_row
  %%row = select i1 %%fits, i64 %%wanted, i64 %%last_row
  %%skip = sub i64 %%wanted, %%row
  %%w_offset = mul i64 %%row, %%size
  %%w_block = getelementptr float, ptr %%w, i64 %%w_offset
  %%y_offset = mul i64 %%row, %%n
  %%y_block = getelementptr float, ptr %%target, i64 %%y_offset
  br label %%panel
panel:
  %%column = phi i64 [0, %%block_body], [%%column_next, %%panel]
  %%x_panel = getelementptr float, ptr %%x, i64 %%column
  %%tail_panel = getelementptr float, ptr %%tail, i64 %%column
  %%y_panel = getelementptr float, ptr %%y_block, i64 %%column
  %%left = sub i64 %%n, %%column
  %%columns = call i64 @llvm.smin.i64(i64 %%left, i64 %%width)
  call void %%block(ptr %%w_block, ptr %%x_panel, ptr %%tail_panel, ptr %%y_panel,
      i64 %%size, i64 %%main, i64 %%n, i64 %%columns, i64 %%skip)
  %%column_next = add i64 %%column, %%width
  %%panel_more = icmp slt i64 %%column_next, %%n
  br i1 %%panel_more, label %%panel, label %%block_end
block_end:
  %%i_next = add i64 %%i, 1
  %%block_more = icmp slt i64 %%i_next, %%group_stop
  br i1 %%block_more, label %%block_body, label %%group_done
group_done:
  br i1 %%is_staged, label %%spread, label %%group_end
spread:
  %%behind_row = mul i64 %%group_stop, %%rows
  %%stop_row = call i64 @llvm.smin.i64(i64 %%behind_row, i64 %%num_rows)
  %%num_staged = sub i64 %%stop_row, %%group_row
  br label %%spread_column
spread_column:
  %%c = phi i64 [0, %%spread], [%%c_next, %%spread_column_end]
  %%from = getelementptr float, ptr %%stage, i64 %%c
  %%to_offset = mul i64 %%c, %%num_rows
  %%to_row = add i64 %%to_offset, %%group_row
  %%to = getelementptr float, ptr %%y, i64 %%to_row
  br label %%spread_row
spread_row:
  %%r = phi i64 [0, %%spread_column], [%%r_next, %%spread_row]
  %%from_offset = mul i64 %%r, %%n
  %%value_at = getelementptr float, ptr %%from, i64 %%from_offset
  %%value = load float, ptr %%value_at
  %%result_at = getelementptr float, ptr %%to, i64 %%r
  store float %%value, ptr %%result_at
  %%r_next = add i64 %%r, 1
  %%row_more = icmp slt i64 %%r_next, %%num_staged
  br i1 %%row_more, label %%spread_row, label %%spread_column_end
spread_column_end:
  %%c_next = add i64 %%c, 1
  %%column_more = icmp slt i64 %%c_next, %%n
  br i1 %%column_more, label %%spread_column, label %%group_end
group_end:
  br label %%group_head
done:
  call void @free(ptr %%stage)
  ret void
}
"""

# A call: chooses the block, copies what must be padded of x, makes the job.
_CALL = """
declare void @llvm.memcpy.p0.p0.i64(ptr, ptr, i64, i1)
declare void @llvm.memset.p0.i64(ptr, i8, i64, i1)
declare void @llvm.prefetch.p0(ptr, i32, i32, i32)
declare i64 @llvm.smin.i64(i64, i64)
declare i64 @llvm.smax.i64(i64, i64)
%(declared)s

; Function, columns of a panel, rows, whether x must have as many columns, vectors.
%%entry = type { ptr, i64, i64, i64, i64 }
@blocks = internal constant [%(num_blocks)d x %%entry] [%(blocks)s]
; By columns of a panel, which block.
@choices = internal constant [%(num_choices)d x i64] [%(choices)s]

define ptr @%(columns_first)s(ptr %%frame) {
  %%error = call ptr @product_call(ptr %%frame, i64 0)
  ret ptr %%error
}

define ptr @%(rows_first)s(ptr %%frame) {
  %%error = call ptr @product_call(ptr %%frame, i64 1)
  ret ptr %%error
}

define internal ptr @product_call(ptr %%frame, i64 %%transposed) {
  %%asked = call i1 @tlt_metadata(ptr %%frame)
  br i1 %%asked, label %%end, label %%shapes
shapes:
  %%w_buffer = call ptr @tlt_argument(ptr %%frame, i64 0)
  %%x_buffer = call ptr @tlt_argument(ptr %%frame, i64 1)
  %%y_buffer = call ptr @tlt_result(ptr %%frame, i64 0)
  %%w = call ptr @tlt_data(ptr %%w_buffer)
  %%x_given = call ptr @tlt_data(ptr %%x_buffer)
  %%y = call ptr @tlt_data(ptr %%y_buffer)
  %%w_rank = call i64 @tlt_rank(ptr %%w_buffer)
  %%w_outer = sub i64 %%w_rank, 1
  %%num_rows = call i64 @tlt_count(ptr %%w_buffer, i64 0, i64 %%w_outer)
  %%size = call i64 @tlt_count(ptr %%x_buffer, i64 0, i64 1)
  %%x_rank = call i64 @tlt_rank(ptr %%x_buffer)
  %%n = call i64 @tlt_count(ptr %%x_buffer, i64 1, i64 %%x_rank)
  %%results = mul i64 %%num_rows, %%n
  %%empty = icmp eq i64 %%results, 0
  br i1 %%empty, label %%end, label %%choose
choose:
  ; Panels of equal width, as few as can be, of the narrowest block that holds them.
  %%n_1 = sub i64 %%n, 1
  %%more_panels = udiv i64 %%n_1, %(widest)d
  %%panels = add i64 %%more_panels, 1
  %%n_share = add i64 %%n, %%more_panels
  %%share = udiv i64 %%n_share, %%panels
  %%choice_at = getelementptr i64, ptr @choices, i64 %%share
  %%choice = load i64, ptr %%choice_at
  %%chosen = getelementptr %%entry, ptr @blocks, i64 %%choice
  %%chosen_rows_at = getelementptr i8, ptr %%chosen, i64 16
  %%chosen_rows = load i64, ptr %%chosen_rows_at
  %%is_low = icmp slt i64 %%num_rows, %%chosen_rows
  %%single = getelementptr %%entry, ptr @blocks, i64 %(single)d
  %%entry_at = select i1 %%is_low, ptr %%single, ptr %%chosen
  %%block = load ptr, ptr %%entry_at
  %%width_from = getelementptr i8, ptr %%entry_at, i64 8
  %%width = load i64, ptr %%width_from
  %%rows_from = getelementptr i8, ptr %%entry_at, i64 16
  %%rows = load i64, ptr %%rows_from
  %%packed_from = getelementptr i8, ptr %%entry_at, i64 24
  %%packed = load i64, ptr %%packed_from
  %%vectors_from = getelementptr i8, ptr %%entry_at, i64 32
  %%vectors = load i64, ptr %%vectors_from
  %%rows_1 = sub i64 %%rows, 1
  %%rows_up = add i64 %%num_rows, %%rows_1
  %%num_blocks = udiv i64 %%rows_up, %%rows
  %%x_count = mul i64 %%size, %%n
  %%is_packed = icmp ne i64 %%packed, 0
  %%fits = icmp eq i64 %%n, %%width
  br i1 %%is_packed, label %%packing, label %%padding
packing:
  ; As many columns as the block has: x itself, or a copy with zeros.
  %%packed_size = mul i64 %%size, %%width
  %%copied_size = select i1 %%fits, i64 0, i64 %%packed_size
  br label %%allocate
padding:
  ; Steps whose vectors end within x, in the last panel too; a copy of the others.
  %%full_panels = udiv i64 %%n_1, %%width
  %%last_panel = mul i64 %%full_panels, %%width
  %%reach = add i64 %%last_panel, %%width
  %%spare = sub i64 %%x_count, %%reach
  %%spare_n = add i64 %%spare, %%n
  %%spare_n_0 = call i64 @llvm.smax.i64(i64 %%spare_n, i64 0)
  %%within = udiv i64 %%spare_n_0, %%n
  %%safe = call i64 @llvm.smin.i64(i64 %%within, i64 %%size)
  %%odd = urem i64 %%safe, %(steps)d
  %%padded_main = sub i64 %%safe, %%odd
  %%rest = sub i64 %%size, %%padded_main
  %%rest_count = mul i64 %%rest, %%n
  %%tail_size = add i64 %%rest_count, %%reach
  br label %%allocate
allocate:
  %%main = phi i64 [%%size, %%packing], [%%padded_main, %%padding]
  %%tail_count = phi i64 [%%copied_size, %%packing], [%%tail_size, %%padding]
  %%tail_bytes = mul i64 %%tail_count, 4
  %%job_bytes = add i64 %%tail_bytes, %(job_bytes)d
  %%job = call ptr @malloc(i64 %%job_bytes)
  %%tail = getelementptr i8, ptr %%job, i64 %(job_bytes)d
  call void @llvm.memset.p0.i64(ptr %%tail, i8 0, i64 %%tail_bytes, i1 false)
  br i1 %%is_packed, label %%pack, label %%pad
pack:
  br i1 %%fits, label %%copied, label %%pack_step
pack_step:
  %%i = phi i64 [0, %%pack], [%%i_next, %%pack_step_end]
  %%pack_from_offset = mul i64 %%i, %%n
  %%pack_from = getelementptr float, ptr %%x_given, i64 %%pack_from_offset
  %%pack_to_offset = mul i64 %%i, %%width
  %%pack_to = getelementptr float, ptr %%tail, i64 %%pack_to_offset
  br label %%pack_column
pack_column:
  %%j = phi i64 [0, %%pack_step], [%%j_next, %%pack_column]
  %%pack_value_at = getelementptr float, ptr %%pack_from, i64 %%j
  %%pack_value = load float, ptr %%pack_value_at
  %%pack_result_at = getelementptr float, ptr %%pack_to, i64 %%j
  store float %%pack_value, ptr %%pack_result_at
  %%j_next = add i64 %%j, 1
  %%j_more = icmp slt i64 %%j_next, %%n
  br i1 %%j_more, label %%pack_column, label %%pack_step_end
pack_step_end:
  %%i_next = add i64 %%i, 1
  %%i_more = icmp slt i64 %%i_next, %%size
  br i1 %%i_more, label %%pack_step, label %%copied
pad:
  %%x_rest_offset = mul i64 %%main, %%n
  %%x_rest = getelementptr float, ptr %%x_given, i64 %%x_rest_offset
  %%rest_steps = sub i64 %%size, %%main
  %%rest_floats = mul i64 %%rest_steps, %%n
  %%rest_bytes = mul i64 %%rest_floats, 4
  call void @llvm.memcpy.p0.p0.i64(ptr %%tail, ptr %%x_rest, i64 %%rest_bytes, i1 false)
  br label %%copied
copied:
  %%x = phi ptr [%%x_given, %%pack], [%%x_given, %%pad], [%%tail, %%pack_step_end]
  ; Threads that the work is worth, and chunks.
  %%weights = mul i64 %%num_rows, %%size
  %%panel_work = mul i64 %%weights, %%vectors
  %%work = mul i64 %%panel_work, %%panels
  %%worth = udiv i64 %%work, %(grain)d
  %%worth_1 = add i64 %%worth, 1
  %%pool = call i64 @tlt_threads(ptr %%frame)
  %%threads = call i64 @llvm.smin.i64(i64 %%pool, i64 %%worth_1)
  %%alone = icmp sle i64 %%threads, 1
  %%many = mul i64 %%threads, %(chunks)d
  %%wished = select i1 %%alone, i64 1, i64 %%many
  %%wished_1 = sub i64 %%wished, 1
  %%blocks_up = add i64 %%num_blocks, %%wished_1
  %%per_chunk = udiv i64 %%blocks_up, %%wished
  %%per_chunk_1 = sub i64 %%per_chunk, 1
  %%chunks_up = add i64 %%num_blocks, %%per_chunk_1
  %%num_chunks = udiv i64 %%chunks_up, %%per_chunk
%(store)s
  call void @tlt_run(ptr %%frame, ptr %%job, ptr @product_chunk, i64 %%num_chunks,
      i64 %%threads)
  br label %%end
end:
  ret ptr null
}
"""


def ir(features: frozenset[str]) -> str:
    """Write the kernel for a CPU with these features, as LLVM names them."""
    blocks = _blocks(features)
    single = product_blocks.WideBlock(8 if blocks[-1].lanes > 4 else 4, 1, 1)
    widest = blocks[-1].width
    choices = [
        next(i for i, block in enumerate(blocks) if block.width >= columns)
        for columns in range(widest + 1)
    ]
    blocks.append(single)
    lanes = sorted({block.lanes for block in blocks})
    vectors = [f"<{n} x float>" for n in lanes]
    declared = [
        f"declare {v} @llvm.fma.v{n}f32({v}, {v}, {v})"
        for n, v in zip(lanes, vectors, strict=True)
    ]
    widths = '"prefer-vector-width"="512" "min-legal-vector-width"="512"'
    declared.append(f"attributes #0 = {{ nounwind {widths} }}")
    entries = (
        f"%entry {{ ptr @{b.name}, i64 {b.width}, i64 {b.rows}, i64 {b.is_packed:d}, "
        f"i64 {-(-b.width // b.lanes)} }}"
        for b in blocks
    )
    parts = [block.ir(ffi.has_fma(features)) for block in blocks]
    parts.append(
        _CHUNK
        % dict(load=_fields_ir("%job", _FIELDS, load=True), stage_rows=_STAGE_ROWS)
    )
    parts.append(
        _CALL
        % dict(
            declared="\n".join(declared),
            num_blocks=len(blocks),
            blocks=", ".join(entries),
            num_choices=len(choices),
            choices=", ".join(f"i64 {choice}" for choice in choices),
            columns_first=_COLUMNS_FIRST,
            rows_first=_ROWS_FIRST,
            widest=widest,
            single=len(blocks) - 1,
            steps=4,
            job_bytes=ffi.JOB_HEADER + 8 * len(_FIELDS),
            grain=_GRAIN,
            chunks=_CHUNKS,
            store=_fields_ir("%job", _FIELDS, load=False),
        )
    )
    return "\n".join(parts)


@functools.cache
def register() -> None:
    """Compile the kernel and make it known to XLA, once in a process.

    Programs with this kernel that come from the persistent compilation cache, or were
    exported, need it before they are loaded.
    """
    names = (_COLUMNS_FIRST, _ROWS_FIRST)
    ffi.register(ir(ffi.host_features()), {name: name for name in names})


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
