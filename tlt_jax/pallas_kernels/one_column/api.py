"""A weight times one column on GPUs, with what stands before and behind it.

Where one row is decoded, products are bound by reading weights, and most kernels of a
step are norms, gates and sums of some kilobytes between them. Here the product norms
its column first (every program for itself: a column is small), and gates, or adds bias
and residual, before it writes: a layer starts seven kernels instead of seventeen.
"""

import math

from tlt_jax.pallas_kernels.one_column import pallas_gpu
from tlt_jax.types import Array

IMPLEMENTATIONS = ("triton_gpu", "triton_gpu_interpreted")


def takes(weight: Array, x: Array) -> bool:
    """Tell whether `product` takes weights `[*out, D]` and an input `[D, B, T]`."""
    return (
        math.prod(x.shape[1:]) == 1
        and weight.shape[-1] % pallas_gpu.MIN_CHUNK == 0
        and math.prod(weight.shape[:-1]) % (2 * pallas_gpu.ROWS) == 0
    )


def product(
    weight: Array,
    x: Array,
    *,
    implementation: str,
    norm: tuple[Array, float] | None = None,
    bias: Array | None = None,
    residual: Array | None = None,
    gated: bool = False,
    dtype=None,
) -> Array:
    """Multiply one column by a weight; there is no derivative.

    Sums are float32 and rounded once, at the end.

    Args:
      weight: `[*out, D]`, see `takes`.
      x: `[D, 1, 1]`, of the weight's dtype.
      implementation: one of `IMPLEMENTATIONS`; interpreted on CPUs, for tests.
      norm: scale `[D]` and epsilon of the column's norm, see `layers.rms_norm`; None:
        it is taken as it is.
      bias: `[*out]`, or None.
      residual: `[*out, 1, 1]`, added, or None.
      gated: `*out` is `[2, F]`; the result is silu(first) x second, `[F, 1, 1]`.
      dtype: of the result; None: the input's.

    Returns:
      `[*out, 1, 1]`.

    Raises:
      ValueError: the implementation is not known.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation {implementation!r} is not known: use one of "
            f"{', '.join(IMPLEMENTATIONS)}."
        )
    out = weight.shape[1:-1] if gated else weight.shape[:-1]
    halves = 2 if gated else 1
    scale, eps = norm or (None, 0.0)
    operands = pallas_gpu.Operands(
        weight=weight.reshape(halves, -1, weight.shape[-1]),
        x=x.reshape(-1),
        scale=scale,
        bias=None if bias is None else bias.reshape(halves, -1),
        residual=None if residual is None else residual.reshape(-1),
    )
    interpret = implementation.endswith("_interpreted")
    made = pallas_gpu.product(operands, dtype or x.dtype, eps=eps, interpret=interpret)
    return made.reshape(*out, 1, 1)
