"""The loops of the native attention over a paged cache, as LLVM IR.

A unit of work is a row's queries of one kv head. It rotates them, walks the row's pages
of the cache and then the keys that are in no page in tiles, with an online softmax for
every query, and divides at the end. Slots are lanes: pages hold columns, so that scores
of 16 slots are products of a query's elements with vectors of the page, and of 16
elements of the result the sums over lanes are taken together.

A query's numbers are the same whatever other rows and queries there are.
"""

from typing import NamedTuple

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
        *("starts", "counts", "mask", "past_keys", "past_values"),
    ),
    results=("heads", "keys", "values"),
    numbers=(
        *("batch", "columns", "width", "past", "num_kv", "group", "head_dim"),
        *("page_size", "max_pages", "layer_offset", "scale_bits"),
    ),
)


def kernel(fused: bool) -> code_lib.Module:
    """Write the kernel; `fused`: the CPU multiplies and adds in one rounding."""
    module = job_lib.begin(fused)
    _write_tile(module)
    code, (address, unit) = module.begin("attention_unit", *job_lib.UNIT)
    _Unit(code, _FIELDS.load(code, address), unit).write()
    job_lib.write_handler(module, HANDLER, "attention_unit", _FIELDS, _numbers)
    return module


class _Tile(NamedTuple):
    """A stretch of keys and values, columns `stride` apart, and who sees which."""

    keys: ir.Value  # Of the first slot, as the values.
    values: ir.Value
    stride: ir.Value  # Floats from an element of a head to the next.
    vectors: ir.Value  # Of 16 slots.
    mask: ir.Value  # Bytes of the first query's slots, 0 where it sees nothing.
    mask_stride: ir.Value  # Bytes from a token's slots to the next token's.


class _Queries(NamedTuple):
    """A unit's queries and what they have come to."""

    query: ir.Value  # `[padded, head_dim]`, rotated and scaled.
    total: ir.Value  # `[padded, head_dim]`, sums of weighted values.
    maximum: ir.Value  # `[padded]`
    normaliser: ir.Value  # `[padded]`
    scores: ir.Value  # `[padded, width]`, of a tile.
    width: ir.Value  # Slots that the scores have room for.
    count: ir.Value  # Queries.
    padded: ir.Value  # Queries, rounded up.
    tokens: ir.Value  # Queries one after the other, group by group.
    head_dim: ir.Value


_POINTERS = (
    *("query", "total", "maximum", "normaliser", "scores"),
    *("keys", "values", "mask"),
)


def _write_tile(module: code_lib.Module) -> None:
    """Add a tile to the online softmax of all queries."""
    names = _Queries._fields + _Tile._fields
    kinds = [POINTER if name in _POINTERS else I64 for name in names]
    code, arguments = module.begin("attend_tile", VOID, *kinds)
    size = len(_Queries._fields)
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
            for query, totals in zip(queries, sums, strict=True):
                factor = code.splat(code.get(query, element))
                total = totals[odd]
                total.value = code.multiply_add(factor, keys, total.value)
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
            for i, total in enumerate(sums):
                row = code.times(code.plus(h, i), tile.stride)
                # What is not visible may be no number.
                values = code.get_vector(tile.values, slot, row)
                values = code.select(visible, values, zero)
                total.value = code.multiply_add(weights, values, total.value)
        added = code.sums([total.value for total in sums])
        old = code.get_vector(totals, h)
        code.put_vector(code.multiply_add(old, fade, added), totals, h)


class _Unit:
    """A unit of a job, a row's queries of one kv head: where numbers lie, the steps."""

    def __init__(self, code: code_lib.Code, job: dict[str, ir.Value], unit: ir.Value):
        """Find places and sizes, and allocate what the unit needs."""
        self._code, self._job = code, job
        self._head_dim, self._columns = job["head_dim"], job["columns"]
        self._group, self._page_size = job["group"], job["page_size"]
        self._half = code.udiv(self._head_dim, code.number(2))
        self._row, self._head = (
            divide(unit, job["num_kv"]) for divide in (code.udiv, code.urem)
        )
        # All columns of a head, and the row's own: its first, and how many.
        self._head_size = code.times(self._head_dim, self._columns)
        self._first_column, self._tokens = (
            code.get(job[name], self._row, kind=I32) for name in ("starts", "counts")
        )
        # Keys that are in no page: those of earlier calls, then the fresh ones.
        self._own_slots = code.plus(job["past"], self._tokens)
        self._wide = code.up(self._own_slots, LANES)
        # qkv: [K, G + 2, H, columns]; of a kv head's heads queries come first.
        kv_head = code.times(self._head, code.plus(self._group, 2), self._head_size)
        self._qkv = code.at(job["qkv"], kv_head, self._first_column)
        self._allocate()

    def write(self) -> None:
        """Attend, and end the function."""
        self._load_queries()
        self._load_own()
        self._attend_to_pages()
        self._attend_to_own()
        self._store()
        self._code.invoke("free", self._scratch)
        self._code.ret_void()

    def _allocate(self) -> None:
        """Cut scratch memory into queries, keys and values, and masks; clear them."""
        code, head_dim, wide = self._code, self._head_dim, self._wide
        page_size = self._page_size
        count = code.times(self._group, self._tokens)
        padded = code.up(count, _QUERIES)
        width = code.most(wide, page_size)
        floats = dict(
            query=code.times(padded, head_dim),
            total=code.times(padded, head_dim),
            maximum=padded,
            normaliser=padded,
            scores=code.times(padded, width),
            keys=code.times(head_dim, wide),
            values=code.times(head_dim, wide),
        )
        num_bytes = code.plus(
            code.times(code.plus(*floats.values(), 2 * LANES), 4),
            code.times(self._tokens, wide),
            code.times(page_size, 2),
        )
        place = self._scratch = code.invoke("malloc", num_bytes)
        places = {}
        for name, size in floats.items():
            places[name], place = place, code.at(place, size)
            if name != "scores":
                start = _HIDDEN if name == "maximum" else 0.0
                with code.loop(size) as i:
                    code.put(ir.Constant(F32, start), places[name], i)
        self._own_keys, self._own_values = places.pop("keys"), places.pop("values")
        self._queries = _Queries(
            **places,
            width=width,
            count=count,
            padded=padded,
            tokens=self._tokens,
            head_dim=head_dim,
        )
        self._own_mask = place
        self._full_mask = code.at(place, code.times(self._tokens, wide), kind=I8)
        self._last_mask = code.at(self._full_mask, page_size, kind=I8)

    def _rotated(self, head, element, token):
        """Two rotated elements of a head of `qkv`, and which they are."""
        code, columns = self._code, self._columns
        source = code.at(self._qkv, code.times(head, self._head_size))
        beyond = code.plus(element, self._half)
        low, high = code.times(element, columns), code.times(beyond, columns)
        first, second = code.get(source, low, token), code.get(source, high, token)
        cos, sin = (
            code.get(self._job[name], self._first_column, low, token)
            for name in ("cos", "sin")
        )
        turned = code.fsub(code.fmul(first, cos), code.fmul(second, sin))
        other = code.fadd(code.fmul(second, cos), code.fmul(first, sin))
        return (element, turned), (beyond, other)

    def _load_queries(self) -> None:
        """Rotate and scale the queries."""
        code = self._code
        scale = code.bitcast(code.trunc(self._job["scale_bits"], I32), F32)
        with code.loop(self._group) as g, code.loop(self._half) as i:
            with code.loop(self._tokens) as token:
                query = code.plus(code.times(g, self._tokens), token)
                for element, value in self._rotated(g, i, token):
                    place = code.plus(code.times(query, self._head_dim), element)
                    code.put(code.fmul(value, scale), self._queries.query, place)

    def _load_own(self) -> None:
        """Gather keys and values that are in no page, and return the fresh ones."""
        code, job, tokens, wide = self._code, self._job, self._tokens, self._wide
        head_dim, past, columns = self._head_dim, job["past"], self._columns
        # Of earlier calls: [K, H, B, past].
        earlier = code.times(self._head, head_dim, job["batch"], past)
        targets = dict(past_keys=self._own_keys, past_values=self._own_values)
        for name, target in targets.items():
            source = code.at(job[name], earlier, code.times(self._row, past))
            with code.loop(head_dim) as i, code.loop(past) as slot:
                value = code.get(source, code.times(i, job["batch"], past), slot)
                code.put(value, target, code.times(i, wide), slot)
        keys, values = (
            code.at(
                job[name], code.times(self._head, self._head_size), self._first_column
            )
            for name in ("keys", "values")
        )
        with code.loop(self._half) as i, code.loop(tokens) as token:
            for element, value in self._rotated(self._group, i, token):
                place = code.times(element, wide)
                code.put(value, self._own_keys, place, past, token)
                code.put(value, keys, code.times(element, columns), token)
        last_head = code.times(code.plus(self._group, 1), self._head_size)
        source = code.at(self._qkv, last_head)
        with code.loop(head_dim) as i, code.loop(tokens) as token:
            value = code.get(source, code.times(i, columns), token)
            code.put(value, self._own_values, code.times(i, wide), past, token)
            code.put(value, values, code.times(i, columns), token)

    def _attend_to_pages(self) -> None:
        """Walk the cached past; of the last page some slots are nobody's."""
        code, job, page_size = self._code, self._job, self._page_size
        length = code.get(job["lengths"], self._row, kind=I32)
        last = code.urem(length, page_size)
        one, none = ir.Constant(I8, 1), ir.Constant(I8, 0)
        with code.loop(page_size) as slot:
            code.put(one, self._full_mask, slot)
            is_held = code.icmp_signed("<", slot, last)
            code.put(code.select(is_held, one, none), self._last_mask, slot)
        head_floats = code.times(self._head_dim, page_size)
        page_floats = code.times(job["num_kv"], head_floats)
        with code.loop(code.over(length, page_size)) as number:
            entry = code.plus(code.times(self._row, job["max_pages"]), number)
            page = code.get(job["table"], entry, kind=I32)
            offset = code.plus(
                job["layer_offset"],
                code.times(page, page_floats),
                code.times(self._head, head_floats),
            )
            left = code.sub(length, code.times(number, page_size))
            held = code.least(left, page_size)
            is_full = code.icmp_signed("==", held, page_size)
            self._attend(
                keys=code.at(job["cache_keys"], offset),
                values=code.at(job["cache_values"], offset),
                stride=page_size,
                vectors=code.over(held, LANES),
                mask=code.select(is_full, self._full_mask, self._last_mask),
                mask_stride=code.number(0),
            )

    def _attend_to_own(self) -> None:
        """Keys that are in no page are a tile of their own, with the call's mask."""
        code, slots, wide = self._code, self._own_slots, self._wide
        # Of each row the mask has as many slots as the widest can have.
        stride = code.plus(self._job["past"], self._job["width"])
        row_mask = code.times(self._row, self._job["width"], stride)
        mask, none = code.at(self._job["mask"], row_mask, kind=I8), ir.Constant(I8, 0)
        with code.loop(self._tokens) as token, code.loop(wide) as slot:
            is_there = code.icmp_signed("<", slot, slots)
            inside = code.select(is_there, slot, code.number(0))
            seen = code.get(mask, code.times(token, stride), inside, kind=I8)
            seen = code.select(is_there, seen, none)
            code.put(seen, self._own_mask, code.times(token, wide), slot)
        self._attend(
            keys=self._own_keys,
            values=self._own_values,
            stride=wide,
            vectors=code.udiv(wide, code.number(LANES)),
            mask=self._own_mask,
            mask_stride=wide,
        )

    def _attend(self, **tile: ir.Value) -> None:
        self._code.invoke("attend_tile", *self._queries, *_Tile(**tile))

    def _store(self) -> None:
        """Divide the sums, and write heads: [K, G, H, columns]."""
        code, columns, queries = self._code, self._columns, self._queries
        head_dim, unit = self._head_dim, ir.Constant(F32, 1.0)
        kv_head = code.times(self._head, self._group, self._head_size)
        target = code.at(self._job["heads"], kv_head, self._first_column)
        with code.loop(self._group) as g, code.loop(self._tokens) as token:
            query = code.plus(code.times(g, self._tokens), token)
            normaliser = code.get(queries.normaliser, query)
            is_some = code.fcmp_ordered(">", normaliser, ir.Constant(F32, 0.0))
            factor = code.fdiv(unit, code.select(is_some, normaliser, unit))
            with code.loop(head_dim) as i:
                total = code.get(queries.total, code.times(query, head_dim), i)
                element = code.plus(code.times(g, head_dim), i)
                place = code.times(element, columns)
                code.put(code.fmul(total, factor), target, place, token)


def _numbers(code: code_lib.Code, call: job_lib.Call):
    """Read a call's shapes, layer and scale; a unit is a row's queries of a kv head."""
    num_kv, heads, head_dim, *columns = call.dims(0, 5)
    _, num_pages, *_, page_size = call.dims(3, 5)
    batch, max_pages = call.dims(5, 2)
    _, width, _ = call.dims(9, 3)
    *_, past = call.dims(10, 4)
    num_pointers = len(_FIELDS.arguments)
    layer = code.get(call.argument(num_pointers), 0, kind=I32)
    numbers = dict(
        batch=batch,
        columns=code.times(*columns),
        width=width,
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
