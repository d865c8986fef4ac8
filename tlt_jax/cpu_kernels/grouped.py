"""Weights of many experts times columns of which each has one, see `product`.

Every element is the chain of fused additions of `product`, whatever stands beside its
column. Columns of one expert are copied side by side, into panels no wider than the
widest block of `product_blocks`, and each panel takes the block that fits its number of
columns. Experts without a column are not read.
"""

import functools

import jax
import jax.numpy as jnp
from llvmlite import ir

from tlt_jax.cpu_kernels import code as code_lib
from tlt_jax.cpu_kernels import ffi, product_blocks
from tlt_jax.cpu_kernels import job as job_lib
from tlt_jax.cpu_kernels import product as product_lib
from tlt_jax.types import Array

_TARGET = "tlt_jax_grouped_product"
I64, POINTER, VOID = code_lib.I64, code_lib.POINTER, code_lib.VOID
I32 = code_lib.I32
# Units of work per thread, where there is work for several: panels take unlike times.
_UNITS = 8
# Floats that a block stores at most.
_STAGE = 64 * 16
_FIELDS = job_lib.Fields(
    arguments=("w",),
    results=("y",),
    numbers=("size", "num_rows", "num_columns", "per_panel", "panels", "order"),
)
# What a panel holds, eight bytes each: where its expert's weights and its copy of the
# columns begin (in floats), its first column in the order of experts, how many it has,
# and the block.
_PANEL = ("weights", "packed", "first", "columns", "block", "width", "rows", "main")
_PANEL_BYTES = 8 * len(_PANEL)


@functools.cache
def register() -> None:
    """Compile the kernel and make it known to XLA; see `product.register`."""
    ffi.register(kernel(ffi.host_features()), {_TARGET: _TARGET})


def product(weight: Array, x: Array, experts: Array) -> Array:
    """Multiply columns by the weights of one expert each.

    For programs on one CPU device: it cannot be partitioned or differentiated.

    Args:
      weight: `[X, *out, in] float32`.
      x: `[in, n] float32`, where n divides M: column m reads column m mod n.
      experts: `[M] int32`, each from 0 to X - 1; of others nothing is computed.

    Returns:
      `[*out, M] float32`.
    """
    if not weight.dtype == x.dtype == jnp.float32 or experts.dtype != jnp.int32:
        raise ValueError(
            f"a native grouped product got weights of {weight.dtype}, columns of "
            f"{x.dtype} and experts of {experts.dtype}: it takes float32, float32 and "
            "int32."
        )
    if weight.shape[-1] != x.shape[0] or len(experts) % x.shape[1]:
        raise ValueError(
            f"a native grouped product got weights of shape {weight.shape}, columns of "
            f"shape {x.shape} and {len(experts)} experts: the last axis of the first "
            "must be the first of the second, whose other one divides the third."
        )
    register()
    shape = (*weight.shape[1:-1], len(experts))
    return jax.ffi.ffi_call(_TARGET, jax.ShapeDtypeStruct(shape, jnp.float32))(
        weight, x, experts
    )


def kernel(features: frozenset[str]) -> code_lib.Module:
    """Write the kernel for a CPU with these features, as LLVM names them."""
    module = job_lib.begin(ffi.has_fma(features))
    blocks = product_lib.blocks_of(features)
    for block in blocks:
        block.write(module)
    _write_unit(module)
    with job_lib.handler(module, _TARGET) as (code, call):
        _write_call(code, call, blocks)
    return module


def _write_unit(module: code_lib.Module) -> None:
    """Multiply some of an expert's rows by one panel, and put columns in their places.

    The block stores side by side what belongs apart: a stage lies between.
    """
    code, (address, unit) = module.begin("grouped_unit", *job_lib.UNIT)
    job = _FIELDS.load(code, address)
    per_panel, size = job["per_panel"], job["size"]
    at = code.times(code.udiv(unit, per_panel), _PANEL_BYTES)
    panel = _load_panel(
        code, code.at(_pointer(code, job["panels"]), at, kind=code_lib.I8)
    )
    width, rows = panel["width"], panel["rows"]
    packed = _pointer(code, panel["packed"])
    tail = code.at(packed, code.times(panel["main"], width))
    weights = code.at(job["w"], panel["weights"])
    order = code.at(_pointer(code, job["order"]), panel["first"], kind=I64)
    stage = code.array(code_lib.F32, _STAGE)
    kind = ir.FunctionType(VOID, product_blocks.SIGNATURE[1:]).as_pointer()
    compute = code.inttoptr(panel["block"], kind)

    num_blocks = code.over(job["num_rows"], rows)
    share = code.over(num_blocks, per_panel)
    first = code.times(code.urem(unit, per_panel), share)
    stop = code.least(code.plus(first, share), num_blocks)
    last_row = code.sub(job["num_rows"], rows)
    with code.loop(stop, start=first) as i:
        # The last block overlaps with the one before it, and stores its own rows.
        wanted = code.times(i, rows)
        row = code.least(wanted, last_row)
        skip = code.sub(wanted, row)
        w = code.at(weights, code.times(row, size))
        numbers = [size, panel["main"], width, panel["columns"], skip]
        code.call(compute, [w, packed, tail, stage, *numbers])
        with code.loop(rows, start=skip) as r:
            source = code.at(stage, code.times(r, width))
            y = code.at(job["y"], code.times(code.plus(row, r), job["num_columns"]))
            with code.loop(panel["columns"]) as c:
                place = code.get(order, c, kind=I64)
                code.put(code.get(source, c), y, place)
    code.ret_void()


def _write_call(code: code_lib.Code, call: job_lib.Call, blocks) -> None:
    """Sort columns by expert, divide them into panels, copy these, and run the job."""
    last = code.plus(call.rank(0), -1)
    (num_experts,) = call.dims(0, 1)
    num_rows, size = call.size(0, 1, last), call.size(0, last, call.rank(0))
    num_sources, num_columns = call.size(1, 1, call.rank(1)), call.size(2, 0, 1)
    with code.if_then(
        code.icmp_signed("==", code.times(num_rows, num_columns), code.number(0))
    ):
        code.ret(code_lib.NULL)
    experts = call.argument(2)
    widest = code.number(blocks[-1].width)

    # Where each expert's columns end in their order: counts, summed up. What has no
    # expert here is counted behind the last one.
    ends_bytes = code.times(code.plus(num_experts, 1), 8)
    ends = code.invoke("malloc", ends_bytes)
    code.fill(ends, 0, ends_bytes)

    def expert_of(column):
        expert = code.get(experts, column, kind=I32)
        is_known = code.icmp_unsigned("<", expert, num_experts)
        return code.select(is_known, expert, num_experts)

    def count(place, number):
        total = code.plus(code.get(ends, place, kind=I64), number)
        code.put(total, ends, place)
        return total

    with code.loop(num_columns) as column:
        count(expert_of(column), 1)
    num_panels, widths = code.variable(I64, 0), code.variable(I64, 0)
    total = code.variable(I64, 0)
    with code.loop(num_experts) as expert:
        own = code.get(ends, expert, kind=I64)
        panels, chosen = _panels(code, blocks, own, widest, num_rows)
        num_panels.value = code.plus(num_panels.value, panels)
        widths.value = code.plus(widths.value, code.times(panels, chosen["width"]))
        total.value = code.plus(total.value, own)
        code.put(total.value, ends, expert)
    code.put(num_columns, ends, num_experts)

    # The job, and behind it panels, the order of columns and their copies: they are
    # freed with it.
    panel_bytes = code.times(num_panels.value, _PANEL_BYTES)
    packed_bytes = code.times(widths.value, size, 4)
    order_bytes = code.times(num_columns, 8)
    job = code.invoke(
        "malloc", code.plus(panel_bytes, order_bytes, packed_bytes, _FIELDS.num_bytes)
    )
    panels_at = code.at(job, _FIELDS.num_bytes, kind=code_lib.I8)
    order = code.at(panels_at, panel_bytes, kind=code_lib.I8)
    packed = code.variable(POINTER, code.at(order, order_bytes, kind=code_lib.I8))
    code.fill(packed.value, 0, packed_bytes)
    # From behind, so that ends become beginnings.
    with code.loop(num_columns) as i:
        column = code.sub(code.plus(num_columns, -1), i)
        code.put(column, order, count(expert_of(column), -1))

    panel_at = code.variable(POINTER, panels_at)
    with code.loop(num_experts) as expert:
        first = code.get(ends, expert, kind=I64)
        own = code.sub(code.get(ends, code.plus(expert, 1), kind=I64), first)
        panels, chosen = _panels(code, blocks, own, widest, num_rows)
        with code.loop(panels) as panel:
            start = code.times(panel, chosen["share"])
            columns = code.least(code.sub(own, start), chosen["share"])
            is_packed = code.icmp_signed("!=", chosen["is_packed"], code.number(0))
            main = code.and_(size, code.number(-product_lib.STEPS))
            values = dict(
                weights=code.times(expert, num_rows, size),
                packed=code.ptrtoint(packed.value, I64),
                first=code.plus(first, start),
                columns=columns,
                block=chosen["block"],
                width=chosen["width"],
                rows=chosen["rows"],
                main=code.select(is_packed, size, main),
            )
            for i, name in enumerate(_PANEL):
                code.put_field(values[name], panel_at.value, 8 * i)
            panel_at.value = code.at(panel_at.value, _PANEL_BYTES, kind=code_lib.I8)
            with code.loop(columns) as c:
                column = code.get(order, values["first"], c, kind=I64)
                source = code.at(call.argument(1), code.urem(column, num_sources))
                target = code.at(packed.value, c)
                with code.loop(size) as k:
                    value = code.get(source, code.times(k, num_sources))
                    code.put(value, target, code.times(k, values["width"]))
            packed.value = code.at(packed.value, code.times(size, values["width"]))
    code.invoke("free", ends)

    with code.if_then(code.icmp_signed("==", num_panels.value, code.number(0))):
        code.invoke("free", job)
        code.ret(code_lib.NULL)
    work = code.times(num_rows, size, num_panels.value)
    worth = code.plus(code.udiv(work, code.number(product_lib.GRAIN)), 1)
    threads = code.least(call.threads(), worth)
    is_alone = code.icmp_signed("<=", threads, code.number(1))
    wished = code.over(code.times(threads, _UNITS), num_panels.value)
    per_panel = code.select(is_alone, code.number(1), wished)
    values = dict(w=call.argument(0), y=call.result(0), size=size, num_rows=num_rows)
    values |= dict(num_columns=num_columns, per_panel=per_panel)
    values |= dict(
        panels=code.ptrtoint(panels_at, I64), order=code.ptrtoint(order, I64)
    )
    _FIELDS.store(code, job, values)
    units = code.times(num_panels.value, per_panel)
    call.run(job, "grouped_unit", units, code.least(threads, units))


def _panels(code, blocks, own, widest, num_rows):
    """Divide an expert's columns: how many panels, and the block that they take."""
    share = code.over(own, code.most(code.over(own, widest), 1))
    chosen = product_lib.choose(code, blocks, share, num_rows)
    panels = code.over(own, chosen["width"])
    return panels, chosen | {"share": code.over(own, code.most(panels, 1))}


def _load_panel(code, address) -> dict[str, ir.Value]:
    return {name: code.field(address, 8 * i, I64) for i, name in enumerate(_PANEL)}


def _pointer(code, number: ir.Value) -> ir.Value:
    return code.inttoptr(number, POINTER)
