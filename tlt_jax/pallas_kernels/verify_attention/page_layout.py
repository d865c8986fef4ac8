"""How pages lie in memory: as columns, or packed.

A page of one head holds `[H, page_size]`. TPUs lay 128 numbers side by side, as lanes:
smaller pages are padded to that, or, where the compiler can choose, laid out as no
kernel can read them. Where H fills the lanes pages are read as `[page_size, H]`; where
it does not (64, 80), `packing` = 128 / page_size features lie side by side: the same
numbers in the same order, as `[H / packing, 128]`. Rows stand in eights, to which
features are padded: 80 to 96 for pages of 32, to 128 for pages of 16.
"""

from tlt_jax.types import Array

LANES, SUBLANES = 128, 8


def packing(name: str | None, page_size: int, head_dim: int) -> int:
    """Say how many features lie side by side in pages that a kernel reads.

    That is 1 where pages hold columns. A `name` of None is no kernel's.
    """
    if name != "mosaic_tpu" or head_dim % LANES == 0 or LANES % page_size:
        return 1
    return LANES // page_size


def padded(head_dim: int, packing: int) -> int:
    """Return how many features a page has room for."""
    if packing == 1:
        return head_dim
    whole = packing * SUBLANES
    return -(-head_dim // whole) * whole


def pack(pages: Array, packing: int) -> Array:
    """Lay pages `[..., H, page_size]` out as `[..., H / packing, packing x page_size]`.

    Feature h stands in row h // packing, behind those of the features before it.
    """
    *lead, head_dim, page_size = pages.shape
    return pages.reshape(*lead, head_dim // packing, packing * page_size)


def unpack(pages: Array, packing: int) -> Array:
    """Undo `pack`."""
    *lead, rows, lanes = pages.shape
    return pages.reshape(*lead, rows * packing, lanes // packing)
