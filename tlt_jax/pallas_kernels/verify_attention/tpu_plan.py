"""How the TPU kernel cuts a call up, what it refuses, and what it costs."""

import dataclasses
import math

import jax.numpy as jnp
from jax.experimental import pallas as pl

from tlt_jax.pallas_kernels.verify_attention import arguments, page_layout
from tlt_jax.types import Array

# Bytes of pages that are on their way at once: about bandwidth times latency.
_BLOCK_BYTES = 2 * 2**20
# Slots whose scores are worked on at once.
_SLOTS = 512
# Rows of queries in a block, and what they may take of the vector memory.
_MAX_ROWS, _MAX_ROW_BYTES = 1024, 24 * 2**20
VMEM_BYTES = 64 * 2**20


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a call is cut up; follows from its shapes alone.

    Attributes:
      tokens, num_blocks: of a query block, and such blocks of a row.
      rows: R, of a query block, padded to whole tiles.
      tile, num_tiles: fresh keys that are worked on at once, and tiles of a row.
      pages, pages_at_once: in a block of pages, and those worked on together.
      turned: features are the lanes of a page, and not slots.
      packing: parts of the features, side by side in packed pages; else 1.
      cores: into how many parts the batch is cut for chips of two cores.
      vmem_bytes: that the kernel asks for.
    """

    tokens: int
    num_blocks: int
    rows: int
    tile: int
    num_tiles: int
    pages: int
    pages_at_once: int
    turned: bool
    packing: int
    cores: int
    vmem_bytes: int


def plan(query_shape: tuple[int, ...], dtype, page_size: int, max_pages: int) -> Plan:
    """Cut a call up; see `arguments.Sizes` for the arguments."""
    batch, num_kv, group, num_tokens, head_dim = query_shape
    itemsize = jnp.dtype(dtype).itemsize
    sublanes = 32 // itemsize
    packing = page_layout.packing("mosaic_tpu", page_size, head_dim)
    part_dim = page_layout.padded(head_dim, packing) // packing
    lanes = packing * round_up(part_dim, page_layout.LANES)
    # Query and output twice, for the pipeline; the sum; maximum and normaliser.
    row_bytes = num_kv * (4 * lanes * itemsize + 4 * lanes + 2 * 4 * page_layout.LANES)
    most = max(_MAX_ROW_BYTES // row_bytes, 1)
    tokens = max(min(most, _MAX_ROWS // packing) // group, 1)
    tokens = num_tokens if tokens >= num_tokens else max(tokens // 16, 1) * 16
    num_blocks = -(-num_tokens // tokens)
    rows = round_up(tokens * group, sublanes)
    tile = min(page_layout.LANES, round_up(num_tokens, sublanes))
    num_tiles = -(-num_blocks * tokens // tile)

    turned = page_size % page_layout.LANES > 0 and head_dim % page_layout.LANES == 0
    column_bytes = num_kv * itemsize
    if turned:
        page_bytes = 2 * column_bytes * round_up(page_size, sublanes) * head_dim
        at_once = min(_SLOTS // page_size, max_pages)
    else:
        page_bytes = 2 * column_bytes * round_up(part_dim, sublanes)
        page_bytes *= round_up(page_size, page_layout.LANES)
        at_once = min(max(4 // packing, 1), -(-max_pages // packing)) * packing
    at_once = max(at_once, 1)
    pages = max(_BLOCK_BYTES // page_bytes // at_once, 1) * at_once
    pages = min(pages, round_up(max_pages, at_once))
    fresh_bytes = 4 * num_kv * num_tiles * tile * lanes * itemsize
    scores_bytes = 6 * packing * rows * max(_SLOTS, tile) * 4
    vmem = rows * row_bytes + 2 * pages * page_bytes + fresh_bytes + scores_bytes
    return Plan(
        tokens=tokens,
        num_blocks=num_blocks,
        rows=rows,
        tile=tile,
        num_tiles=num_tiles,
        pages=pages,
        pages_at_once=at_once,
        turned=turned,
        packing=packing,
        cores=1 if batch % 2 else 2,
        vmem_bytes=vmem + 4 * 2**20,
    )


def obstacle(
    query_shape, dtype, page_size: int, max_pages: int, packing: int
) -> str | None:
    """Say what of these shapes the kernel cannot do, and the remedy; None: nothing."""
    cut = plan(query_shape, dtype, page_size, max_pages)
    if packing != cut.packing:
        return (
            f"pages of {page_size} slots of {query_shape[4]} features, "
            f"{packing} side by side, would be copied into another layout at every "
            f"call: give them with packing={cut.packing} (page_layout.pack)"
        )
    if query_shape[3] > 1 and cut.vmem_bytes > VMEM_BYTES:
        return (
            f"T={query_shape[3]} fresh tokens need {cut.vmem_bytes / 2**20:.0f} MiB"
            f" of vector memory, more than {VMEM_BYTES / 2**20:.0f}: give fewer at "
            "once (rollout.prefill_chunk)"
        )
    return None


def cost(sizes: arguments.Sizes, window: Array | int | None) -> pl.CostEstimate:
    """Estimate a call whose rows are as long as the page table allows.

    See `api.verify_attention` for `window`; a traced one may be as wide as the row.
    """
    batch, num_kv, group, num_tokens, head_dim = sizes.query_shape
    cut = plan(*sizes)
    itemsize = jnp.dtype(sizes.dtype).itemsize
    num_slots = sizes.max_pages * sizes.page_size
    if isinstance(window, int):
        num_slots = min(num_slots, window + sizes.page_size)
    scores = batch * num_kv * group * num_tokens * (num_slots + num_tokens)
    columns = batch * (cut.num_blocks * num_slots + num_tokens) * num_kv
    queries = batch * num_kv * cut.num_blocks * cut.rows
    return pl.CostEstimate(
        flops=4 * scores * head_dim,
        transcendentals=scores,
        bytes_accessed=2 * (columns + queries) * head_dim * itemsize,
    )


def round_up(n: int, multiple: int) -> int:
    """Round up to a multiple."""
    return math.ceil(n / multiple) * multiple
