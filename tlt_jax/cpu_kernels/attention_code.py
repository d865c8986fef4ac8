"""The loops of the native attention over a paged cache, as LLVM IR.

A unit of work is a row's queries of one kv head. It rotates them, walks the row's pages
of the cache and then the keys that are in no page in tiles, with an online softmax for
every query, and divides at the end. Slots are lanes: pages hold columns, so that scores
of 16 slots are products of a query's elements with vectors of the page, and of 16
elements of the result the sums over lanes are taken together.

A query's numbers are the same whatever other rows and queries there are.
"""

import dataclasses

from llvmlite import ir

from tlt_jax.cpu_kernels import code as code_lib
from tlt_jax.cpu_kernels import job as job_lib

HANDLER = "tlt_jax_attention"
LANES = code_lib.LANES
F32, I8, I32, I64 = code_lib.F32, code_lib.I8, code_lib.I32, code_lib.I64
F32V, POINTER, VOID = code_lib.F32V, code_lib.POINTER, code_lib.VOID
# Queries whose scores are computed together.
_QUERIES = 4
# Below any score; it is never read, since what is not visible weighs nothing.
_HIDDEN = -1e30

_FIELDS = job_lib.Fields(
    arguments=(
        *("qkv", "cos", "sin", "cache_keys", "cache_values", "table", "lengths"),
        *("mask", "past_keys", "past_values"),
    ),
    results=("heads", "keys", "values"),
    numbers=(
        *("batch", "tokens", "past", "num_kv", "group", "head_dim", "page_size"),
        *("max_pages", "layer_offset", "scale_bits"),
    ),
)


def module(fused: bool) -> code_lib.Module:
    """Write the kernel; `fused`: the CPU multiplies and adds in one rounding."""
    made = job_lib.module(fused)
    _write_tile(made)
    _write_unit(made)
    job_lib.write_handler(made, HANDLER, "attention_unit", _FIELDS, _numbers)
    return made


@dataclasses.dataclass(frozen=True)
class _Tile:
    """A stretch of keys and values, columns `stride` apart, and who sees which.

    Attributes:
      keys, values: of the first slot.
      stride: floats from an element of a head to the next.
      vectors: of 16 slots.
      mask: bytes of the first query's slots, 0 where it sees nothing.
      mask_stride: bytes from a token's slots to the next token's.
    """

    keys: ir.Value
    values: ir.Value
    stride: ir.Value
    vectors: ir.Value
    mask: ir.Value
    mask_stride: ir.Value


@dataclasses.dataclass(frozen=True)
class _Queries:
    """A unit's queries and what they have come to.

    Attributes:
      query: `[padded, head_dim]`, rotated and scaled.
      total: `[padded, head_dim]`, sums of weighted values.
      maximum, normaliser: `[padded]`.
      scores: `[padded, width]`, of a tile.
      width: slots that the scores have room for.
      count, padded: queries; rounded up.
      tokens: of them one after the other, group by group.
      head_dim: elements of a head.
    """

    query: ir.Value
    total: ir.Value
    maximum: ir.Value
    normaliser: ir.Value
    scores: ir.Value
    width: ir.Value
    count: ir.Value
    padded: ir.Value
    tokens: ir.Value
    head_dim: ir.Value


def _kinds(record: type) -> list[ir.Type]:
    pointers = ("query", "total", "maximum", "normaliser", "scores", "keys", "values")
    names = [field.name for field in dataclasses.fields(record)]
    return [POINTER if name in (*pointers, "mask") else I64 for name in names]


def _values(record) -> list[ir.Value]:
    return [getattr(record, field.name) for field in dataclasses.fields(record)]


def _write_tile(made: code_lib.Module) -> None:
    """Add a tile to the online softmax of all queries."""
    kinds = _kinds(_Queries) + _kinds(_Tile)
    code, arguments = made.function("attend_tile", VOID, *kinds)
    size = len(_kinds(_Queries))
    of, tile = _Queries(*arguments[:size]), _Tile(*arguments[size:])
    with code.loop(of.padded, _QUERIES) as first, code.loop(tile.vectors) as vector:
        _write_scores(code, of, tile, first, code.times(vector, LANES))
    with code.loop(of.count) as query:
        _write_softmax(code, of, tile, query)
    code.ret_void()


def _write_scores(code, of: _Queries, tile: _Tile, first, slot) -> None:
    """Compute the scores of four queries at 16 slots."""
    zero = code.splat(0.0)
    sums = [[code.variable(F32V, zero) for _ in range(2)] for _ in range(_QUERIES)]
    queries = [
        code.at(of.query, code.times(code.plus(first, i), of.head_dim))
        for i in range(_QUERIES)
    ]
    # Even and odd elements apart: twice as many chains of additions in flight.
    with code.loop(of.head_dim, 2) as h:
        for odd in range(2):
            element = code.plus(h, odd)
            keys = code.get_vector(tile.keys, slot, code.times(element, tile.stride))
            for query, its in zip(queries, sums, strict=True):
                factor = code.splat(code.get(query, element))
                its[odd].value = code.multiply_add(factor, keys, its[odd].value)
    for i, (even, odd) in enumerate(sums):
        total = code.fadd(even.value, odd.value)
        row = code.times(code.plus(first, i), of.width)
        code.put_vector(total, of.scores, row, slot)


def _write_softmax(code, of: _Queries, tile: _Tile, query) -> None:
    """Turn a query's scores into weights, and add the values that they weigh."""
    hidden, zero = code.splat(_HIDDEN), code.splat(0.0)
    scores = code.at(of.scores, code.times(query, of.width))
    token = code.urem(query, of.tokens)
    mask = code.at(tile.mask, code.times(token, tile.mask_stride), kind=I8)

    highest = code.variable(F32V, hidden)
    with code.loop(tile.vectors) as vector:
        slot = code.times(vector, LANES)
        visible = code.flags(mask, slot)
        masked = code.select(visible, code.get_vector(scores, slot), hidden)
        code.put_vector(masked, scores, slot)
        highest.value = code.largest(highest.value, masked)
    before = code.splat(code.get(of.maximum, query))
    maximum = code.reduced(highest.value, code.largest)
    maximum = code.largest(maximum, before)
    fade = code.exponential(code.fsub(before, maximum))

    weight_sum = code.variable(F32V, zero)
    with code.loop(tile.vectors) as vector:
        slot = code.times(vector, LANES)
        visible = code.flags(mask, slot)
        weights = code.exponential(code.fsub(code.get_vector(scores, slot), maximum))
        weights = code.select(visible, weights, zero)
        code.put_vector(weights, scores, slot)
        weight_sum.value = code.fadd(weight_sum.value, weights)
    total = code.reduced(weight_sum.value, code.fadd)
    normaliser = code.splat(code.get(of.normaliser, query))
    normaliser = code.multiply_add(normaliser, fade, total)
    lane = ir.Constant(I32, 0)
    code.put(code.extract_element(normaliser, lane), of.normaliser, query)
    code.put(code.extract_element(maximum, lane), of.maximum, query)

    totals = code.at(of.total, code.times(query, of.head_dim))
    with code.loop(of.head_dim, LANES) as h:
        sums = [code.variable(F32V, zero) for _ in range(LANES)]
        with code.loop(tile.vectors) as vector:
            slot = code.times(vector, LANES)
            visible = code.flags(mask, slot)
            weights = code.get_vector(scores, slot)
            for i, its in enumerate(sums):
                row = code.times(code.plus(h, i), tile.stride)
                # What is not visible may be no number.
                values = code.get_vector(tile.values, slot, row)
                values = code.select(visible, values, zero)
                its.value = code.multiply_add(weights, values, its.value)
        added = code.sums([its.value for its in sums])
        old = code.get_vector(totals, h)
        code.put_vector(code.multiply_add(old, fade, added), totals, h)


def _write_unit(made: code_lib.Module) -> None:
    """Attend for one row and kv head: a chunk of a job."""
    code, (job, chunk) = made.function("attention_unit", *job_lib.UNIT)
    its = _FIELDS.load(code, job)
    tokens, head_dim, group = its["tokens"], its["head_dim"], its["group"]
    page_size = its["page_size"]
    row, head = code.udiv(chunk, its["num_kv"]), code.urem(chunk, its["num_kv"])
    columns = code.times(its["batch"], tokens)
    first_column = code.times(row, tokens)
    count = code.times(group, tokens)
    past = its["past"]
    own_slots = code.plus(past, tokens)
    padded, wide = code.up(count, _QUERIES), code.up(own_slots, LANES)
    width = code.select(code.icmp_signed("<", page_size, wide), wide, page_size)

    # Queries, sums, scores, and keys and values that are in no page; then the masks.
    per_query = code.plus(head_dim, head_dim, width, 2)
    floats = code.plus(
        code.times(padded, per_query), code.times(2, head_dim, wide), 2 * LANES
    )
    num_bytes = code.plus(
        code.times(floats, 4), code.times(tokens, wide), page_size, page_size
    )
    scratch = code.invoke("malloc", num_bytes)
    cut = _Cutter(code, scratch)
    queries = _Queries(
        query=cut.floats(code.times(padded, head_dim)),
        total=cut.floats(code.times(padded, head_dim)),
        maximum=cut.floats(padded),
        normaliser=cut.floats(padded),
        scores=cut.floats(code.times(padded, width)),
        width=width,
        count=count,
        padded=padded,
        tokens=tokens,
        head_dim=head_dim,
    )
    fresh_keys = cut.floats(code.times(head_dim, wide))
    fresh_values = cut.floats(code.times(head_dim, wide))
    fresh_mask = cut.rest
    seen = code.at(fresh_mask, code.times(tokens, wide), kind=I8)
    seen_last = code.at(seen, page_size, kind=I8)

    zero, hidden = ir.Constant(F32, 0.0), ir.Constant(F32, _HIDDEN)
    with code.loop(code.times(padded, head_dim)) as i:
        code.put(zero, queries.query, i)
        code.put(zero, queries.total, i)
    with code.loop(padded) as i:
        code.put(hidden, queries.maximum, i)
        code.put(zero, queries.normaliser, i)
    with code.loop(code.times(head_dim, wide)) as i:
        code.put(zero, fresh_keys, i)
        code.put(zero, fresh_values, i)

    # qkv: [K, G + 2, H, B, T]; of its heads queries come first.
    heads = code.plus(group, 2)
    head_size = code.times(head_dim, columns)
    own = code.at(its["qkv"], code.times(head, heads, head_size), first_column)
    half = code.udiv(head_dim, code.number(2))
    cos, sin = (code.at(its[name], first_column) for name in ("cos", "sin"))
    scale = code.bitcast(code.trunc(its["scale_bits"], I32), F32)
    results = {
        name: code.at(its[name], code.times(head, head_size), first_column)
        for name in ("keys", "values")
    }

    def rotated(source, i, token):
        low, high = code.times(i, columns), code.times(code.plus(i, half), columns)
        first, second = code.get(source, low, token), code.get(source, high, token)
        of_cos, of_sin = code.get(cos, low, token), code.get(sin, low, token)
        turned = code.fsub(code.fmul(first, of_cos), code.fmul(second, of_sin))
        other = code.fadd(code.fmul(second, of_cos), code.fmul(first, of_sin))
        return (i, turned), (code.plus(i, half), other)

    with code.loop(group) as g:
        source = code.at(own, code.times(g, head_size))
        with code.loop(half) as i, code.loop(tokens) as token:
            query = code.plus(code.times(g, tokens), token)
            for element, value in rotated(source, i, token):
                place = code.plus(code.times(query, head_dim), element)
                code.put(code.fmul(value, scale), queries.query, place)
    # What is in no page: keys of earlier calls first, [K, H, B, past], then the fresh.
    earlier = code.times(code.times(head, head_dim, its["batch"]), past)
    for name, target in (("past_keys", fresh_keys), ("past_values", fresh_values)):
        source = code.at(its[name], earlier, code.times(row, past))
        with code.loop(head_dim) as i, code.loop(past) as slot:
            place = code.times(i, its["batch"], past)
            code.put(code.get(source, place, slot), target, code.times(i, wide), slot)
    source = code.at(own, code.times(group, head_size))
    with code.loop(half) as i, code.loop(tokens) as token:
        for element, value in rotated(source, i, token):
            code.put(value, fresh_keys, code.times(element, wide), past, token)
            code.put(value, results["keys"], code.times(element, columns), token)
    source = code.at(own, code.times(code.plus(group, 1), head_size))
    with code.loop(head_dim) as i, code.loop(tokens) as token:
        value = code.get(source, code.times(i, columns), token)
        code.put(value, fresh_values, code.times(i, wide), past, token)
        code.put(value, results["values"], code.times(i, columns), token)

    # The cached past, page by page; of the last page some slots are nobody's.
    length = code.get(its["lengths"], row, kind=I32)
    last = code.urem(length, page_size)
    one, none = ir.Constant(I8, 1), ir.Constant(I8, 0)
    with code.loop(page_size) as slot:
        code.put(one, seen, slot)
        is_held = code.icmp_signed("<", slot, last)
        code.put(code.select(is_held, one, none), seen_last, slot)
    num_pages = code.over(length, page_size)
    page_floats = code.times(its["num_kv"], head_dim, page_size)
    head_offset = code.times(head, head_dim, page_size)
    with code.loop(num_pages) as number:
        entry = code.plus(code.times(row, its["max_pages"]), number)
        page = code.get(its["table"], entry, kind=I32)
        offset = code.plus(
            its["layer_offset"], code.times(page, page_floats), head_offset
        )
        held = code.least(code.sub(length, code.times(number, page_size)), page_size)
        is_full = code.icmp_signed("==", held, page_size)
        tile = _Tile(
            keys=code.at(its["cache_keys"], offset),
            values=code.at(its["cache_values"], offset),
            stride=page_size,
            vectors=code.over(held, LANES),
            mask=code.select(is_full, seen, seen_last),
            mask_stride=code.number(0),
        )
        code.invoke("attend_tile", *_values(queries), *_values(tile))

    # These keys are a tile of their own.
    own_mask = code.at(its["mask"], code.times(row, tokens, own_slots), kind=I8)
    with code.loop(tokens) as token, code.loop(wide) as slot:
        is_there = code.icmp_signed("<", slot, own_slots)
        inside = code.select(is_there, slot, code.number(0))
        seen_here = code.get(own_mask, code.times(token, own_slots), inside, kind=I8)
        seen_here = code.select(is_there, seen_here, none)
        code.put(seen_here, fresh_mask, code.times(token, wide), slot)
    tile = _Tile(
        keys=fresh_keys,
        values=fresh_values,
        stride=wide,
        vectors=code.udiv(wide, code.number(LANES)),
        mask=fresh_mask,
        mask_stride=wide,
    )
    code.invoke("attend_tile", *_values(queries), *_values(tile))

    # heads: [K, G, H, B, T]
    target = code.at(its["heads"], code.times(head, group, head_size), first_column)
    with code.loop(group) as g, code.loop(tokens) as token:
        query = code.plus(code.times(g, tokens), token)
        normaliser = code.get(queries.normaliser, query)
        is_some = code.fcmp_ordered(">", normaliser, zero)
        unit = ir.Constant(F32, 1.0)
        factor = code.fdiv(unit, code.select(is_some, normaliser, unit))
        with code.loop(head_dim) as i:
            total = code.get(queries.total, code.times(query, head_dim), i)
            row_of = code.plus(code.times(g, head_dim), i)
            place = code.times(row_of, columns)
            code.put(code.fmul(total, factor), target, place, token)
    code.invoke("free", scratch)
    code.ret_void()


class _Cutter:
    """Cuts scratch memory into pieces."""

    def __init__(self, code: code_lib.Code, start: ir.Value):
        self._code, self.rest = code, start

    def floats(self, count: ir.Value) -> ir.Value:
        piece, self.rest = self.rest, self._code.at(self.rest, count)
        return piece


def _numbers(code: code_lib.Code, call: job_lib.Call):
    """Read a call's shapes, layer and scale; a unit is a row's queries of a kv head."""
    num_kv, heads, head_dim, batch, tokens = call.dims(0, 5)
    _, num_pages, *_, page_size = call.dims(3, 5)
    _, max_pages = call.dims(5, 2)
    *_, past = call.dims(8, 4)
    num_pointers = len(_FIELDS.arguments)
    layer = code.get(call.argument(num_pointers), 0, kind=I32)
    numbers = dict(
        batch=batch,
        tokens=tokens,
        past=past,
        num_kv=num_kv,
        group=code.plus(heads, -2),
        head_dim=head_dim,
        page_size=page_size,
        max_pages=max_pages,
        layer_offset=code.times(layer, num_pages, num_kv, head_dim, page_size),
        scale_bits=code.get(call.argument(num_pointers + 1), 0, kind=I32),
    )
    return numbers, code.times(batch, num_kv)
