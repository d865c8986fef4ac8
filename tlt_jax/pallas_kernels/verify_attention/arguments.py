"""The arguments of a call as one record, which every implementation takes."""

import dataclasses
import typing

import jax.numpy as jnp
from flax import struct

from tlt_jax.types import Array


class Sizes(typing.NamedTuple):
    """The sizes that a call is cut up by.

    Attributes:
      query_shape, dtype: `(B, K, G, T, H)` of the query, and its type.
      page_size, max_pages: slots of a page, and pages of the longest row.
    """

    query_shape: tuple[int, ...]
    dtype: typing.Any
    page_size: int
    max_pages: int


@dataclasses.dataclass(frozen=True)
class Constants:
    """What a kernel's program is made for, beside how it is cut.

    Attributes:
      sizes: of the call.
      scale, soft_cap: see `api.verify_attention`.
      windowed: there is a window.
      causal: fresh keys are seen in order, and not by words.
    """

    sizes: Sizes
    scale: float
    soft_cap: float | None
    windowed: bool
    causal: bool


@struct.dataclass
class Arguments:
    """A checked call; for the fields see `api.verify_attention`."""

    query: Array
    keys: Array
    values: Array
    cache_keys: Array
    cache_values: Array
    layer: Array | int
    page_table: Array
    lengths: Array
    positions: Array
    words: Array | None
    window: Array | int | None
    scale: float = struct.field(pytree_node=False)
    soft_cap: float | None = struct.field(pytree_node=False)
    packing: int = struct.field(pytree_node=False)
    with_log_normaliser: bool = struct.field(pytree_node=False)

    @property
    def sizes(self) -> Sizes:
        """Give the sizes that the call is cut up by."""
        page_size = self.cache_keys.shape[-1] // self.packing
        max_pages = self.page_table.shape[1]
        return Sizes(self.query.shape, self.query.dtype, page_size, max_pages)

    @property
    def constants(self) -> Constants:
        """Give what a kernel's program is made for."""
        return Constants(
            sizes=self.sizes,
            scale=self.scale,
            soft_cap=self.soft_cap,
            windowed=self.window is not None,
            causal=self.words is None,
        )


def pad(x: Array, axis: int, size: int, **options) -> Array:
    """Fill an axis up to a size; see `jnp.pad` for the options."""
    axis %= x.ndim
    if x.shape[axis] == size:
        return x
    widths = [(0, size - n if i == axis else 0) for i, n in enumerate(x.shape)]
    return jnp.pad(x, widths, **options)
