"""The TPU kernel's products: plain ones, and those with packed pages."""

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from tlt_jax.pallas_kernels.verify_attention import (
    page_layout,
    reference,
    tpu_plan,
)
from tlt_jax.types import Array


def packed_scores(
    query: Array, keys: Array, cut: tpu_plan.Plan, page_size: int
) -> Array:
    """Multiply queries by the keys of `packing` packed pages.

    The product with a page has part i of the features right in rows of part i and the
    i-th stretch of lanes alone. The sums over the parts come together in the page's own
    stretch: at each step, pages of one half of the stretches hand over what they hold
    in the other half, and take what belongs to them.

    Args:
      query: `[packing x R, H / packing]`, parts one under the other.
      keys: `[packing, H / packing, 128]`, a page each.
      cut: of the call.
      page_size: lanes of a stretch.

    Returns:
      Products `[R, 128]`, the pages' slots side by side.
    """
    stretch = _stretches(cut.rows, page_size)
    pages = []
    for page in range(cut.packing):
        product = reference.dot(query, keys[page], (1, 0))
        right = product[: cut.rows]
        for part in range(1, cut.packing):
            rows = product[part * cut.rows : (part + 1) * cut.rows]
            right = jnp.where(stretch == part, rows, right)
        pages.append(right)
    while len(pages) > 1:
        half = len(pages) // 2
        upper = stretch & half > 0
        pages = [
            jnp.where(upper, high, low)
            + _exchange(jnp.where(upper, low, high), upper, half * page_size)
            for low, high in zip(pages[:half], pages[half:], strict=True)
        ]
    return pages[0]


def packed_sum(
    weights: Array, *, value: Array, cut: tpu_plan.Plan, page_size: int
) -> Array:
    """Weigh the values of `packing` packed pages: the way of the scores, backwards.

    Args:
      weights: `[R, 128] float32`, the pages' slots side by side.
      value, cut, page_size: see `packed_scores`, for its keys.

    Returns:
      Sums `[packing x R, H / packing] float32`, parts one under the other.
    """
    stretch = _stretches(cut.rows, page_size)
    pages, half = [weights], cut.packing // 2
    # Each page's weights come to stand in all stretches.
    while half:
        upper = stretch & half > 0
        others = [_exchange(page, upper, half * page_size) for page in pages]
        pairs = list(zip(pages, others, strict=True))
        pages = [
            jnp.where(upper, *pair)
            for low, high in pairs
            for pair in ((high, low), (low, high))
        ]
        half //= 2
    total = 0.0
    for page, of_page in enumerate(pages):
        parts = [
            jnp.where(stretch == part, of_page, 0.0) for part in range(cut.packing)
        ]
        total += weighted(jnp.concatenate(parts), value[page], (1, 1))
    return total


def _stretches(num_rows: int, page_size: int) -> Array:
    shape = (num_rows, page_layout.LANES)
    return lax.broadcasted_iota(jnp.int32, shape, 1) // page_size


def _exchange(x: Array, upper: Array, distance: int) -> Array:
    """Swap stretches of lanes that are `distance` apart; `upper` are the later ones."""
    from_below = pltpu.roll(x, distance, 1)
    if 2 * distance == page_layout.LANES:
        return from_below
    return jnp.where(upper, from_below, pltpu.roll(x, page_layout.LANES - distance, 1))


def weighted(weights: Array, value: Array, contract: tuple[int, int]) -> Array:
    """Multiply weights `[R, S] float32` by values, in the values' precision.

    See `reference.dot` for `contract`.
    """
    return reference.dot(weights.astype(value.dtype), value, contract)
