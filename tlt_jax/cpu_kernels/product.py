"""Weights times few columns, streaming the weights once.

Every element of the result is the chain `acc = fma(weight[i, k], x[k, column], acc)`
over k = 0, 1, ..., whatever the number of columns, threads or lanes of the machine. So
decoding one row, decoding many, and verifying a tree give the same bits.

A block of rows is held in registers, a vector of columns per row. Vectors are read from
`x` as it is: lanes beyond the last column hold what follows in memory and are dropped.
Only the last steps, whose vectors would end behind `x`, read a padded copy.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from tlt_jax.cpu_kernels import ffi
from tlt_jax.types import Array

# Steps of k in one pass of the loop, for one vector of columns and for more. More of
# them, or larger blocks, make LLVM load so many weights ahead that registers run out.
_STEPS, _STEPS_OF_MANY = 4, 2
# Weights times vectors that one thread should have, or waking it does not pay.
_GRAIN = 32768
# Chunks per thread: threads that started late leave some to the others.
_CHUNKS = 4
# Rows of a transposed result that are collected before they are written.
_STAGE_ROWS = 64

_COLUMNS_FIRST, _ROWS_FIRST = "tlt_jax_product", "tlt_jax_product_transposed"


@dataclasses.dataclass(frozen=True)
class _Block:
    """Rows, and vectors of lanes, that one pass over k keeps in registers."""

    lanes: int
    vectors: int
    rows: int

    @property
    def name(self) -> str:
        return f"block_{self.lanes}_{self.vectors}_{self.rows}"

    @property
    def steps(self) -> int:
        return _STEPS if self.vectors == 1 else _STEPS_OF_MANY

    @property
    def width(self) -> int:
        return self.lanes * self.vectors


def _blocks() -> tuple[_Block, ...]:
    """Choose blocks for the host: for few columns, then for 1, 2, ... vectors."""
    features = ffi.host_features()
    if "avx512f" in features:
        rows = {1: 8, 2: 8, 3: 8, 4: 6}
        return _Block(8, 1, 8), *(_Block(16, v, rows[v]) for v in rows)
    if "avx2" in features:
        rows = {1: 8, 2: 6, 3: 4}
        return _Block(8, 1, 8), *(_Block(8, v, rows[v]) for v in rows)
    # 32 registers of four lanes on AArch64.
    rows = {1: 8, 2: 8, 3: 6, 4: 5} if "neon" in features else {1: 6, 2: 4}
    return _Block(4, 1, rows[1]), *(_Block(4, v, rows[v]) for v in rows)


def _block_ir(block: _Block) -> str:
    """Write the function that multiplies one block of rows by one panel of columns.

    Its `main` first steps of k read from `x`, the rest from `tail`, both with `n`
    columns a step. It stores rows from `skip` on.
    """
    lanes, vectors, rows = block.lanes, block.vectors, block.rows
    steps = block.steps
    vector = f"<{lanes} x float>"
    cells = [(r, v) for r in range(rows) for v in range(vectors)]
    # Addresses of three rows come from one pointer: [p], [p + 4 K], [p + 8 K].
    bases = range(0, rows, 3)
    out = [
        f"define internal void @{block.name}(ptr %w, ptr %x, ptr %tail, ptr %y, "
        "i64 %size, i64 %main, i64 %n, i64 %columns, i64 %skip) #0 {",
        "entry:",
        f"  %kept = alloca [{len(cells)} x {vector}], align 64",
    ]

    def add(line: str) -> None:
        out.append("  " + line)

    def multiply_add(result, factors, acc):
        if ffi.has_fma():
            call = f"call {vector} @llvm.fma.v{lanes}f32"
            add(f"{result} = {call}({factors}, {vector} {acc})")
        else:
            add(f"{result}p = fmul {factors.replace(f', {vector}', ',')}")
            add(f"{result} = fadd {vector} {result}p, {acc}")

    def step(tag, x, x_next, weight, acc):
        """One k: `weight(r)` names a pointer, `acc(r, v)` the sum so far."""
        for v in range(vectors):
            add(f"%{tag}xa{v} = getelementptr float, ptr {x}, i64 {v * lanes}")
            add(f"%{tag}x{v} = load {vector}, ptr %{tag}xa{v}, align 4")
        add(f"{x_next} = getelementptr float, ptr {x}, i64 %n")
        for r in range(rows):
            add(f"%{tag}w{r} = load float, ptr {weight(r)}, align 4")
            add(
                f"%{tag}i{r} = insertelement {vector} poison, float %{tag}w{r}, i64 0\n"
                f"  %{tag}b{r} = shufflevector {vector} %{tag}i{r}, {vector} poison, "
                f"<{lanes} x i32> zeroinitializer"
            )
            for v in range(vectors):
                factors = f"{vector} %{tag}b{r}, {vector} %{tag}x{v}"
                multiply_add(f"%{tag}s{r}_{v}", factors, acc(r, v))

    def row_pointers(tag, base):
        """Name a pointer to each row's weight, from one to every third row's."""
        for r in range(rows):
            kind = ("i8", "float", "double")[r % 3]
            offset = "0" if r % 3 == 0 else "%size"
            add(
                f"%{tag}p{r} = getelementptr {kind}, ptr {base(r // 3 * 3)}, "
                f"i64 {offset}"
            )

    for b in bases:
        add(f"%o{b} = mul i64 %size, {b}")
        add(f"%e{b} = getelementptr float, ptr %w, i64 %o{b}")
    add(f"%next_block = mul i64 %size, {rows}")
    add("%ahead0 = getelementptr float, ptr %w, i64 %next_block")
    add("%no_main = icmp eq i64 %main, 0")
    add("br i1 %no_main, label %middle, label %loop")

    out.append("loop:")
    last = f"u{steps - 1}"
    add("%k = phi i64 [0, %entry], [%k_next, %loop]")
    add(f"%x0 = phi ptr [%x, %entry], [%x{steps}, %loop]")
    add("%ahead = phi ptr [%ahead0, %entry], [%ahead_next, %loop]")
    for b in bases:
        add(f"%w{b} = phi ptr [%e{b}, %entry], [%n{b}, %loop]")
    for r, v in cells:
        add(
            f"%a{r}_{v} = phi {vector} [zeroinitializer, %entry], [%{last}s{r}_{v}, %loop]"
        )
    row_pointers("m", lambda b: f"%w{b}")
    for u in range(steps):
        tag = f"u{u}"
        for r in range(rows):
            add(f"%{tag}q{r} = getelementptr float, ptr %mp{r}, i64 {u}")
        step(
            tag,
            f"%x{u}",
            f"%x{u + 1}",
            lambda r, tag=tag: f"%{tag}q{r}",
            lambda r, v, u=u: f"%u{u - 1}s{r}_{v}" if u else f"%a{r}_{v}",
        )
    # The next block's weights, in the order in which they lie in memory.
    stride = rows * steps * 4
    for line in range(0, stride, 64):
        add(f"%f{line} = getelementptr i8, ptr %ahead, i64 {line}")
        add(f"call void @llvm.prefetch.p0(ptr %f{line}, i32 0, i32 3, i32 1)")
    add(f"%ahead_next = getelementptr i8, ptr %ahead, i64 {stride}")
    for b in bases:
        add(f"%n{b} = getelementptr float, ptr %w{b}, i64 {steps}")
    add(f"%k_next = add i64 %k, {steps}")
    add("%more = icmp ult i64 %k_next, %main")
    add("br i1 %more, label %loop, label %middle")

    out.append("middle:")
    for b in bases:
        add(f"%g{b} = phi ptr [%e{b}, %entry], [%n{b}, %loop]")
    for r, v in cells:
        add(
            f"%h{r}_{v} = phi {vector} [zeroinitializer, %entry], [%{last}s{r}_{v}, %loop]"
        )
    add("%no_rest = icmp eq i64 %main, %size")
    add("br i1 %no_rest, label %store, label %rest")

    out.append("rest:")
    add("%rest_k = phi i64 [%main, %middle], [%rest_next, %rest]")
    add("%rest_x = phi ptr [%tail, %middle], [%rest_xn, %rest]")
    for b in bases:
        add(f"%r{b} = phi ptr [%g{b}, %middle], [%rn{b}, %rest]")
    for r, v in cells:
        add(f"%c{r}_{v} = phi {vector} [%h{r}_{v}, %middle], [%ts{r}_{v}, %rest]")
    row_pointers("t", lambda b: f"%r{b}")
    step("t", "%rest_x", "%rest_xn", lambda r: f"%tp{r}", lambda r, v: f"%c{r}_{v}")
    for b in bases:
        add(f"%rn{b} = getelementptr float, ptr %r{b}, i64 1")
    add("%rest_next = add i64 %rest_k, 1")
    add("%rest_more = icmp ult i64 %rest_next, %size")
    add("br i1 %rest_more, label %rest, label %store")

    out.append("store:")
    for r, v in cells:
        add(f"%d{r}_{v} = phi {vector} [%h{r}_{v}, %middle], [%ts{r}_{v}, %rest]")
    for i, (r, v) in enumerate(cells):
        add(f"%ka{i} = getelementptr {vector}, ptr %kept, i64 {i}")
        add(f"store {vector} %d{r}_{v}, ptr %ka{i}, align {lanes * 4}")
    out.append(_STORE % dict(rows=rows, width=block.width))
    return "\n".join(out)


_STORE = """  br label %%row
row:
  %%r = phi i64 [%%skip, %%store], [%%r_next, %%row_end]
  %%from_offset = mul i64 %%r, %(width)d
  %%from = getelementptr float, ptr %%kept, i64 %%from_offset
  %%to_offset = mul i64 %%r, %%n
  %%to = getelementptr float, ptr %%y, i64 %%to_offset
  br label %%column
column:
  %%j = phi i64 [0, %%row], [%%j_next, %%column]
  %%value_at = getelementptr float, ptr %%from, i64 %%j
  %%value = load float, ptr %%value_at
  %%result_at = getelementptr float, ptr %%to, i64 %%j
  store float %%value, ptr %%result_at
  %%j_next = add i64 %%j, 1
  %%column_more = icmp ult i64 %%j_next, %%columns
  br i1 %%column_more, label %%column, label %%row_end
row_end:
  %%r_next = add i64 %%r, 1
  %%row_more = icmp ult i64 %%r_next, %(rows)d
  br i1 %%row_more, label %%row, label %%done
done:
  ret void
}
"""


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
  %%group = phi i64 [%%first, %%entry], [%%first, %%allocate], [%%group_stop, %%group_end]
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

# A call: chooses the block, copies the end of x, makes the job.
_CALL = """
declare void @llvm.memcpy.p0.p0.i64(ptr, ptr, i64, i1)
declare void @llvm.memset.p0.i64(ptr, i8, i64, i1)
declare void @llvm.prefetch.p0(ptr, i32, i32, i32)
%(declared)s
@blocks = internal constant [%(num_blocks)d x { ptr, i64, i64 }] [%(table)s]

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
  %%x = call ptr @tlt_data(ptr %%x_buffer)
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
  ; Panels of equal width, of as few vectors as hold them.
  %%n_up = add i64 %%n, %(widest_1)d
  %%panels = udiv i64 %%n_up, %(widest)d
  %%n_share = add i64 %%n, %%panels
  %%n_share_1 = sub i64 %%n_share, 1
  %%share = udiv i64 %%n_share_1, %%panels
  %%share_up = add i64 %%share, %(lanes_1)d
  %%vectors = udiv i64 %%share_up, %(lanes)d
  %%is_few = icmp ule i64 %%n, %(few)d
  %%usual = select i1 %%is_few, i64 0, i64 %%vectors
  %%is_low = icmp ult i64 %%num_rows, %(most_rows)d
  %%index = select i1 %%is_low, i64 %(single)d, i64 %%usual
  %%entry_at = getelementptr { ptr, i64, i64 }, ptr @blocks, i64 %%index
  %%block = load ptr, ptr %%entry_at
  %%width_from = getelementptr i8, ptr %%entry_at, i64 8
  %%width = load i64, ptr %%width_from
  %%rows_from = getelementptr i8, ptr %%entry_at, i64 16
  %%rows = load i64, ptr %%rows_from
  %%rows_1 = sub i64 %%rows, 1
  %%rows_up = add i64 %%num_rows, %%rows_1
  %%num_blocks = udiv i64 %%rows_up, %%rows
  ; Steps whose vectors end within x, in the last panel too.
  %%n_1 = sub i64 %%n, 1
  %%full_panels = udiv i64 %%n_1, %%width
  %%last_panel = mul i64 %%full_panels, %%width
  %%reach = add i64 %%last_panel, %%width
  %%x_count = mul i64 %%size, %%n
  %%spare = sub i64 %%x_count, %%reach
  %%some = icmp sge i64 %%spare, 0
  %%within = sdiv i64 %%spare, %%n
  %%within_1 = add i64 %%within, 1
  %%safe = select i1 %%some, i64 %%within_1, i64 0
  %%too_many = icmp sgt i64 %%safe, %%size
  %%safe_main = select i1 %%too_many, i64 %%size, i64 %%safe
  %%odd = urem i64 %%safe_main, %(steps)d
  %%main = sub i64 %%safe_main, %%odd
  %%rest = sub i64 %%size, %%main
  %%rest_count = mul i64 %%rest, %%n
  %%rest_bytes = mul i64 %%rest_count, 4
  %%pad_bytes = mul i64 %%reach, 4
  %%tail_bytes = add i64 %%rest_bytes, %%pad_bytes
  %%job_bytes = add i64 %%tail_bytes, %(job_bytes)d
  %%job = call ptr @malloc(i64 %%job_bytes)
  %%tail = getelementptr i8, ptr %%job, i64 %(job_bytes)d
  %%x_rest_offset = mul i64 %%main, %%n
  %%x_rest = getelementptr float, ptr %%x, i64 %%x_rest_offset
  call void @llvm.memcpy.p0.p0.i64(ptr %%tail, ptr %%x_rest, i64 %%rest_bytes, i1 false)
  %%pad = getelementptr i8, ptr %%tail, i64 %%rest_bytes
  call void @llvm.memset.p0.i64(ptr %%pad, i8 0, i64 %%pad_bytes, i1 false)
  ; Threads that the work is worth, and chunks.
  %%weights = mul i64 %%num_rows, %%size
  %%work = mul i64 %%weights, %%vectors
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
declare i64 @llvm.smin.i64(i64, i64)
"""


def _ir() -> str:
    """Write the kernel for the host's CPU."""
    few, *usual = _blocks()
    single = _Block(few.lanes, 1, 1)
    table = [few, *usual, single]
    kinds = sorted({f"<{block.lanes} x float>" for block in table})
    declared = [
        f"declare {kind} @llvm.fma.v{kind.split()[0][1:]}f32({kind}, {kind}, {kind})"
        for kind in kinds
    ]
    widths = '"prefer-vector-width"="512" "min-legal-vector-width"="512"'
    declared.append(f"attributes #0 = {{ nounwind {widths} }}")
    return (
        "\n".join(_block_ir(block) for block in dict.fromkeys(table))
        + (
            _CHUNK
            % dict(load=_fields_ir("%job", _FIELDS, load=True), stage_rows=_STAGE_ROWS)
        )
        + _CALL
        % dict(
            declared="\n".join(declared),
            num_blocks=len(table),
            table=", ".join(
                f"{{ ptr, i64, i64 }} {{ ptr @{b.name}, i64 {b.width}, i64 {b.rows} }}"
                for b in table
            ),
            columns_first=_COLUMNS_FIRST,
            rows_first=_ROWS_FIRST,
            widest=usual[-1].width,
            widest_1=usual[-1].width - 1,
            lanes=usual[0].lanes,
            lanes_1=usual[0].lanes - 1,
            few=few.width,
            most_rows=max(block.rows for block in table),
            single=len(table) - 1,
            steps=_STEPS,
            job_bytes=ffi.JOB_HEADER + 8 * len(_FIELDS),
            grain=_GRAIN,
            chunks=_CHUNKS,
            store=_fields_ir("%job", _FIELDS, load=False),
        )
    )


@functools.cache
def register():
    """Compile the kernel and make it known to XLA, once in a process.

    Programs with this kernel that come from the persistent compilation cache, or were
    exported, need it before they are loaded.

    Returns:
      The machine code, which must live as long as any program.
    """
    engine = ffi.compile_ir(_ir())
    ffi.register(engine, (_COLUMNS_FIRST, _ROWS_FIRST))
    return engine


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
            f"a native product got weights of shape {weight.shape} and columns of shape "
            f"{x.shape}: the last axis of the first must be the first of the second."
        )
    register()
    return jax.ffi.ffi_call(name, jax.ShapeDtypeStruct(shape, jnp.float32))(weight, x)
