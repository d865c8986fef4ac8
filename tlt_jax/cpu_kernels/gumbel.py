"""Position-keyed Gumbel noise on CPUs, and the draws that add it to scores.

`specdec.noise` says what the noise is; here the generator and both logarithms of an
entry stay in vector registers, and nothing but the noise itself goes through memory.
A draw adds a row of noise to a row of scores on the way to the largest entry, so that
neither the sums nor copies of the noise for every node of a tree are written; a chain's
drafter ranks by the same sums.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from llvmlite import ir

from tlt_jax.cpu_kernels import code as code_lib
from tlt_jax.cpu_kernels import ffi
from tlt_jax.cpu_kernels import job as job_lib
from tlt_jax.types import Array

NOISE, DRAW, RANK = "tlt_jax_gumbel", "tlt_jax_draw", "tlt_jax_rank"
_LANES = code_lib.LANES
_I32, _I64, _F32V, _I32V = code_lib.I32, code_lib.I64, code_lib.F32V, code_lib.I32V
# Counters of a unit of work; each gives two entries.
_BLOCK = 2048
# Counters whose noise is module together: several registers, so that the chains of
# dependent operations of one fill the waiting times of another's.
_WIDE = 8 * _LANES

# Threefry-2x32.
_ROTATIONS = (13, 15, 26, 6, 17, 29, 16, 24)
_PARITY = 0x1BD11BDA
_ROUNDS = 13

_NOISE_FIELDS = job_lib.Fields(
    arguments=("keys", "positions"),
    results=("noise",),
    numbers=("vocab_size", "half", "blocks"),
)
_DRAW_FIELDS = job_lib.Fields(
    arguments=("scores", "noise", "which"),
    results=("drawn",),
    numbers=("vocab_size",),
)
_RANK_FIELDS = job_lib.Fields(
    arguments=(*_DRAW_FIELDS.arguments, "sharpness", "tau"),
    results=("ids", "shares", "by_tau", "by_sharpness"),
    numbers=("vocab_size",),
)


@functools.cache
def register() -> None:
    """Compile the kernels and make them known to XLA, once in a process.

    See `product.register`.
    """
    module = kernel(ffi.has_fma(ffi.host_features()))
    ffi.register(module, {name: name for name in (NOISE, DRAW, RANK)})


def gumbel(keys: Array, positions: Array, vocab_size: int) -> Array:
    """Compute `specdec.noise.gumbel`, to rounding.

    For programs on one CPU device: it cannot be partitioned. An entry is the same bits
    whatever else is computed.

    Args:
      keys: `[N, 2] uint32`.
      positions: `[N] int32`.
      vocab_size: V.

    Returns:
      `[N, V] float32`.
    """
    _check("keys", keys, (positions.shape[0], 2), jnp.uint32)
    _check("positions", positions, positions.shape[:1], jnp.int32)
    register()
    result = jax.ShapeDtypeStruct((positions.shape[0], vocab_size), jnp.float32)
    return jax.ffi.ffi_call(NOISE, result)(keys, positions)


def draw(scores: Array, noise: Array, which: Array) -> Array:
    """Find the first largest entry of scores with noise added, a row at a time.

    For programs on one CPU device: it cannot be partitioned.

    Args:
      scores: `[N, V] float32`, V at least 1.
      noise: `[M, V] float32`.
      which: `[N] int32`, the row of noise that each row of scores gets, within [0, M).

    Returns:
      `[N] int32`; V - 1 where an entry is NaN.
    """
    _check_rows(scores, noise, which)
    register()
    result = jax.ShapeDtypeStruct(which.shape, jnp.int32)
    return jax.ffi.ffi_call(DRAW, result)(scores, noise, which)


def rank(
    scores: Array, noise: Array, which: Array, sharpness: Array, tau: Array
) -> tuple[Array, Array, Array, Array]:
    """Find the first largest entry of `scores x sharpness + noise`, and job share.

    For programs on one CPU device: it cannot be partitioned.

    Args:
      scores, noise, which: see `draw`; finite.
      sharpness, tau: float32 scalars, tau positive.

    Returns:
      Indices `[N] int32`; and `[N] float32`, log of softmax(sums / tau) at them, and
      its derivatives by the logarithms of tau and of sharpness.
    """
    _check_rows(scores, noise, which)
    register()
    kinds = jnp.int32, jnp.float32, jnp.float32, jnp.float32
    results = [jax.ShapeDtypeStruct(which.shape, kind) for kind in kinds]
    numbers = [jnp.asarray(number, jnp.float32) for number in (sharpness, tau)]
    return tuple(jax.ffi.ffi_call(RANK, results)(scores, noise, which, *numbers))


def _check_rows(scores: Array, noise: Array, which: Array) -> None:
    num_rows, vocab_size = scores.shape
    _check("scores", scores, (num_rows, vocab_size), jnp.float32)
    _check("noise", noise, (noise.shape[0], vocab_size), jnp.float32)
    _check("which", which, (num_rows,), jnp.int32)


def _check(name: str, array: Array, shape: tuple[int, ...], dtype) -> None:
    if array.shape != shape or array.dtype != dtype:
        raise ValueError(
            f"{name} is {array.dtype}{list(array.shape)}: the native kernel takes "
            f"{jnp.dtype(dtype)}{list(shape)}."
        )


def kernel(fused: bool) -> code_lib.Module:
    """Write the kernels; `fused`: the CPU multiplies and adds in one rounding."""
    module = job_lib.begin(fused)
    _write_block(module)
    _write_row(module)
    _write_ranking(module)
    job_lib.write_handler(module, NOISE, "noise_block", _NOISE_FIELDS, _noise_numbers)
    job_lib.write_handler(module, DRAW, "draw_row", _DRAW_FIELDS, _row_numbers)
    job_lib.write_handler(module, RANK, "rank_row", _RANK_FIELDS, _row_numbers)
    return module


def _noise_numbers(code: code_lib.Code, call: job_lib.Call):
    rows, vocab_size = call.dims(0, 2, "result")
    half = code.over(vocab_size, 2)
    blocks = code.over(half, _BLOCK)
    numbers = dict(vocab_size=vocab_size, half=half, blocks=blocks)
    return numbers, code.times(rows, blocks)


def _row_numbers(code: code_lib.Code, call: job_lib.Call):
    rows, vocab_size = call.dims(0, 2)
    return dict(vocab_size=vocab_size), rows


def _write_block(module: code_lib.Module) -> None:
    """Make the noise of a block of counters of one row: a chunk of a job."""
    code, (address, chunk) = module.begin("noise_block", *job_lib.UNIT)
    job = _NOISE_FIELDS.load(code, address)
    row, block = code.udiv(chunk, job["blocks"]), code.urem(chunk, job["blocks"])
    half, vocab_size = job["half"], job["vocab_size"]

    def word(name, *place):
        value = code.at(job[name], *place, kind=_I32)
        return code.splat_integer(code.load(value, typ=_I32, align=4), _WIDE)

    key = [word("keys", code.times(2, row), i) for i in range(2)]
    parity = code.splat_integer(_PARITY, _WIDE)
    schedule = (*key, code.xor(code.xor(*key), parity))
    first_word = code.add(word("positions", row), schedule[0])
    lanes = code_lib.integers(*range(_WIDE))
    target = code.at(job["noise"], code.times(row, vocab_size))
    second = code.at(target, half)
    start = code.times(block, _BLOCK)
    stop = code.least(code.plus(start, _BLOCK), half)
    with code.loop(code.sub(stop, start), _WIDE) as i:
        column = code.plus(start, i)
        first = code.splat_integer(code.trunc(column, _I32), _WIDE)
        words = _threefry(code, schedule, first_word, code.add(first, lanes))
        low, high = (_gumbel_of(code, bits) for bits in words)
        _put_first(code, low, target, column, half)
        _put_first(code, high, second, column, code.sub(vocab_size, half))
    code.ret_void()


def _threefry(code, schedule, x0, counter) -> tuple[ir.Value, ir.Value]:
    """Encrypt; the first word of the counter has job key already."""
    kind = counter.type
    x1 = code.add(counter, schedule[1])
    for i in range(_ROUNDS):
        x0 = code.add(x0, x1)
        turn = code.splat_integer(_ROTATIONS[i % 8], _WIDE)
        x1 = code.intrinsic(f"llvm.fshl.v{_WIDE}i32", kind, x1, x1, turn)
        x1 = code.xor(x1, x0)
        if i % 4 == 3:
            step = i // 4 + 1
            x0 = code.add(x0, schedule[step % 3])
            x1 = code.add(x1, schedule[(step + 1) % 3])
            x1 = code.add(x1, code.splat_integer(step, _WIDE))
    return x0, x1


def _gumbel_of(code, bits: ir.Value) -> ir.Value:
    """Turn uniform words into noise, as `specdec.noise.gumbel` does."""
    kind = ir.VectorType(code_lib.F32, _WIDE)
    kept = code.lshr(bits, code.splat_integer(1, _WIDE))
    u = code.fadd(code.sitofp(kept, kind), code.splat(0.5, _WIDE))
    u = code.fmul(u, code.splat(2.0**-31, _WIDE))
    most = code.splat(1.0 - 2.0**-24, _WIDE)
    u = code.select(code.fcmp_ordered("<", u, most), u, most)
    minus = code.logarithm(code.fsub(code.splat(1.0, _WIDE), u), less=u)
    sign = code.splat(-0.0, _WIDE)
    return code.fsub(sign, code.logarithm(code.fsub(sign, minus)))


def _put_first(code, value, base, column, stop) -> None:
    """Store the lanes of a vector at `column` that lie before `stop`."""
    room = code.sub(stop, column)
    is_whole = code.icmp_signed(">=", room, code.number(_WIDE))
    with code.if_else(is_whole) as (whole, part):
        with whole:
            code.put_vector(value, base, column)
        with part, code.loop(room) as lane:
            one = code.extract_element(value, lane)
            code.put(one, base, column, lane)


@dataclasses.dataclass(frozen=True)
class _Sums:
    """A row's scores with job noise: score x factor + noise."""

    code: code_lib.Code
    scores: ir.Value
    noise: ir.Value
    vocab_size: ir.Value
    factor: ir.Value | None = None

    @property
    def whole(self) -> ir.Value:
        """Entries that fill vectors."""
        return self.code.and_(self.vocab_size, self.code.number(-_LANES))

    def each(self, take: Callable[[ir.Value, ir.Value], None]) -> None:
        """Give `take` the sums that fill vectors, and scores, a vector at a time."""
        code, several = self.code, 8 * _LANES

        def vector(column):
            score = code.get_vector(self.scores, column)
            take(self._sum(score, code.get_vector(self.noise, column)), score)

        # Several in one pass of the loop, whose own instructions are felt else.
        most = code.and_(self.vocab_size, code.number(-several))
        with code.loop(most, several) as start:
            for i in range(0, several, _LANES):
                vector(code.plus(start, i))
        with code.loop(self.whole, _LANES, start=most) as column:
            vector(column)

    def rest(self) -> tuple[ir.Value, ir.Value]:
        """The sums behind the whole vectors, and -inf; their scores, and 0."""
        code = self.code
        rest = code.variable(_F32V, code.splat(float("-inf")))
        scores = code.variable(_F32V, code.splat(0.0))
        with code.loop(code.sub(self.vocab_size, self.whole)) as lane:
            added = code.get(self.noise, self.whole, lane)
            score = code.get(self.scores, self.whole, lane)
            one = self._sum(score, added)
            rest.value = code.insert_element(rest.value, one, lane)
            scores.value = code.insert_element(scores.value, score, lane)
        return rest.value, scores.value

    def _sum(self, score, added) -> ir.Value:
        if self.factor is None:
            return self.code.fadd(score, added)
        factor = self.factor
        if score.type == _F32V:
            factor = self.code.splat(factor)
        return self.code.multiply_add(score, factor, added)


def _write_row(module: code_lib.Module) -> None:
    """Draw for one row: a chunk of a job."""
    code, (address, row) = module.begin("draw_row", *job_lib.UNIT)
    job = _DRAW_FIELDS.load(code, address)
    drawn, _ = _write_search(code, _sums_of(code, job, row))
    code.put(drawn, job["drawn"], row)
    code.ret_void()


def _write_ranking(module: code_lib.Module) -> None:
    """Find one row's best child, job share and its slopes: a chunk of a job."""
    code, (address, row) = module.begin("rank_row", *job_lib.UNIT)
    job = _RANK_FIELDS.load(code, address)
    sharpness, tau = (code.get(job[name], 0) for name in ("sharpness", "tau"))
    sums = _sums_of(code, job, row, sharpness)
    best, highest = _write_search(code, sums)
    code.put(best, job["ids"], row)
    each = code.splat(code.fdiv(ir.Constant(code_lib.F32, 1.0), tau))

    # Of weights, and of what lies below the best and of scores, by weight.
    totals = [code.variable(_F32V, code.splat(0.0)) for _ in range(3)]

    def add(vector, score):
        below = code.fmul(code.fsub(vector, highest), each)
        # What is far below weighs nothing, and nothing times infinity is no number.
        is_far = code.fcmp_ordered("<", below, code.splat(-1e3))
        below = code.select(is_far, code.splat(-1e3), below)
        weight = code.exponential(below)
        totals[0].value = code.fadd(totals[0].value, weight)
        for total, value in zip(totals[1:], (below, score), strict=True):
            total.value = code.multiply_add(weight, value, total.value)

    sums.each(add)
    add(*sums.rest())
    total, below, score = (code.reduced(x.value, code.fadd) for x in totals)
    own = code.splat(code.get(sums.scores, code.zext(best, _I64)))
    factor = code.fmul(code.splat(sharpness), each)
    found = {
        "shares": code.fsub(code.splat(-0.0), code.logarithm(total)),
        "by_tau": code.fdiv(below, total),
        "by_sharpness": code.fmul(factor, code.fsub(own, code.fdiv(score, total))),
    }
    for name, value in found.items():
        code.put(code.extract_element(value, ir.Constant(_I32, 0)), job[name], row)
    code.ret_void()


def _sums_of(code, job, row, factor=None) -> _Sums:
    vocab_size = job["vocab_size"]
    which = code.get(job["which"], row, kind=_I32)
    scores = code.at(job["scores"], code.times(row, vocab_size))
    noise = code.at(job["noise"], code.times(which, vocab_size))
    return _Sums(code, scores, noise, vocab_size, factor)


def _write_search(code, sums: _Sums) -> tuple[ir.Value, ir.Value]:
    """Find the first largest sum: job index, and in all lanes itself."""
    lanes = code_lib.integers(*range(_LANES))
    best = code.variable(_F32V, code.splat(float("-inf")))
    here, place = (code.variable(_I32V, lanes) for _ in range(2))
    mask_kind = ir.VectorType(code_lib.I1, _LANES)
    broken = code.variable(mask_kind, ir.Constant(mask_kind, None))

    def join(total, _):
        is_more = code.fcmp_ordered(">", total, best.value)
        best.value = code.select(is_more, total, best.value)
        place.value = code.select(is_more, here.value, place.value)
        here.value = code.add(here.value, code.splat_integer(_LANES))
        is_nan = code.fcmp_unordered("uno", total, total)
        broken.value = code.or_(broken.value, is_nan)

    sums.each(join)
    join(*sums.rest())
    highest = code.reduced(best.value, code.largest)
    is_best = code.fcmp_ordered("==", best.value, highest)
    beyond = code.splat_integer(2**31 - 1)
    first = code.reduced(code.select(is_best, place.value, beyond), code.smallest)
    drawn = code.extract_element(first, ir.Constant(_I32, 0))
    any_nan = code.bitcast(broken.value, ir.IntType(_LANES))
    is_fine = code.icmp_unsigned("==", any_nan, ir.Constant(ir.IntType(_LANES), 0))
    last = code.trunc(code.plus(sums.vocab_size, -1), _I32)
    return code.select(is_fine, drawn, last), highest
