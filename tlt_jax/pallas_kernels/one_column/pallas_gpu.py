"""The kernel for GPUs, in Pallas' Triton dialect; see there for why.

A program takes some rows of the weight and walks them in chunks of the column, as many
as fill its registers with partial sums.
"""

import functools
import math
import typing

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from tlt_jax.types import Array

# Rows of a program: a weight of some thousand gives every processor several.
ROWS = 8
# Array sizes in Triton are powers of two.
MIN_CHUNK, _MAX_CHUNK = 64, 512
_WARPS = 4


class Operands(typing.NamedTuple):
    """What the kernel reads: arrays outside of it, references inside, None: absent.

    Attributes:
      weight: `[halves, R, D]`; with two the first gates the second.
      x: `[D]`.
      scale: `[D]`, of the norm.
      bias: `[halves, R]`.
      residual: `[R]`.
    """

    weight: Array
    x: Array
    scale: Array | None
    bias: Array | None
    residual: Array | None


def product(given: Operands, dtype, *, eps: float, interpret: bool) -> Array:
    """Multiply, `[R]`; see `api.product`."""
    halves, num_rows, size = given.weight.shape
    chunk = math.gcd(size, _MAX_CHUNK)
    present = [name for name in Operands._fields if getattr(given, name) is not None]
    moved = sum(getattr(given, name).nbytes for name in present)
    return pl.pallas_call(
        functools.partial(_kernel, present=present, chunk=chunk, eps=eps),
        grid=(num_rows // ROWS,),
        out_shape=jax.ShapeDtypeStruct((num_rows,), dtype),
        compiler_params=plgpu.CompilerParams(num_warps=_WARPS),
        cost_estimate=pl.CostEstimate(
            flops=2 * given.weight.size,
            transcendentals=num_rows * (halves - 1),
            bytes_accessed=moved + num_rows * jnp.dtype(dtype).itemsize,
        ),
        name="one_column_product",
        interpret=interpret,
    )(*(getattr(given, name) for name in present))


def _kernel(*refs, present: list[str], chunk: int, eps: float) -> None:
    *inputs, out_ref = refs
    named = dict.fromkeys(Operands._fields) | dict(zip(present, inputs, strict=True))
    given = Operands(**named)
    halves, _, size = given.weight.shape
    here = pl.ds(pl.program_id(0) * ROWS, ROWS)

    def chunk_of(ref, k):
        return ref[pl.ds(k * chunk, chunk)].astype(jnp.float32)

    factor = None
    if given.scale is not None:

        def add_square(k, squares):
            part = chunk_of(given.x, k)
            return squares + part * part

        zeros = jnp.zeros((chunk,), jnp.float32)
        squares = lax.fori_loop(0, size // chunk, add_square, zeros)
        factor = lax.rsqrt(jnp.sum(squares) / size + eps)

    def add(k, sums):
        part = chunk_of(given.x, k)
        if factor is not None:
            part = part * factor * chunk_of(given.scale, k)
            # As where a norm is a kernel of its own.
            part = part.astype(given.x.dtype).astype(jnp.float32)
        at = pl.ds(k * chunk, chunk)
        return tuple(
            total + given.weight[half, here, at].astype(jnp.float32) * part[None]
            for half, total in enumerate(sums)
        )

    zeros = jnp.zeros((ROWS, chunk), jnp.float32)
    sums = lax.fori_loop(0, size // chunk, add, (zeros,) * halves)
    sums = [jnp.sum(total, axis=1) for total in sums]
    if given.bias is not None:
        sums = [
            total + given.bias[half, here].astype(jnp.float32)
            for half, total in enumerate(sums)
        ]
    made = sums[0]
    if halves == 2:
        made = sums[0] * jax.nn.sigmoid(sums[0]) * sums[1]
    if given.residual is not None:
        made += given.residual[here].astype(jnp.float32)
    out_ref[here] = made.astype(out_ref.dtype)
