"""jax's own paged attention for TPUs on the arguments of ours, to be compiled.

The compiler counts what a program does around such a kernel and nothing in it, since
they bring no estimate of their own. What theirs moves is counted here from their
source: all pages of a row in whole blocks, once, and queries and results. Neither takes
a tree: `ragged_paged_attention` gets a chain of as many tokens, whose keys have to be
in the pages before, and `paged_attention` one token.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from tlt_jax.pallas_kernels.verify_attention import arg_specs

# Those of which whole blocks fill the rows of `arg_specs.LARGE`.
_PAGES_PER_BLOCK = 4
_VMEM_BYTES = 64 * 2**20


@dataclasses.dataclass(frozen=True)
class Peer:
    """A call with its arguments' shapes, and the bytes that its kernel itself moves."""

    call: Callable[..., Any]
    shapes: tuple[jax.ShapeDtypeStruct, ...]
    kernel_bytes: int


def paged_attention(spec: arg_specs.ArgSpec) -> Peer | None:
    """Makes the call of one token a row; None: it cannot compute this."""
    from jax.experimental.pallas.ops.tpu import paged_attention as theirs

    batch, num_kv, group, num_tokens, head_dim = spec.query_shape
    if num_tokens > 1 or not _is_plain(spec):
        return None
    per_row = spec.lengths[0] // spec.page_size
    heads, dtype = num_kv * group, jnp.dtype(spec.dtype)
    pages = _shape((num_kv, batch * per_row, spec.page_size, head_dim), dtype)

    def call(query, keys, values, lengths, table):
        return theirs.paged_attention(
            *(query, keys, values, lengths, table),
            pages_per_compute_block=_PAGES_PER_BLOCK,
        )

    # Where groups are no multiples of 8, queries and output are float32 in the kernel;
    # maximum and normaliser come out as well.
    itemsize = 4 if group % 8 else dtype.itemsize
    moved = 2 * batch * heads * (head_dim * itemsize + 4)
    return Peer(
        call,
        (
            _shape((batch, heads, head_dim), dtype),
            *(pages, pages),
            _shape((batch,)),
            _shape((batch, per_row)),
        ),
        2 * _size(pages) + moved,
    )


def ragged_paged_attention(spec: arg_specs.ArgSpec) -> Peer | None:
    """Makes the call of a chain of tokens a row; None: it cannot compute this."""
    from jax.experimental.pallas.ops.tpu import ragged_paged_attention as theirs

    batch, num_kv, group, num_tokens, head_dim = spec.query_shape
    if num_tokens > 16 or not _is_plain(spec):
        return None
    # Fresh keys are in the pages, too.
    per_row = -(-(spec.lengths[0] + num_tokens) // spec.page_size)
    heads, dtype = num_kv * group, jnp.dtype(spec.dtype)
    query = _shape((batch * num_tokens, heads, head_dim), dtype)
    pages = (batch * per_row, spec.page_size, 2 * num_kv, head_dim)
    pages = _shape(pages, dtype)

    def call(query, pages, lengths, table, starts, count):
        return theirs.ragged_paged_attention(
            *(query, pages, lengths, table, starts, count),
            sm_scale=spec.scale,
            num_kv_pages_per_block=_PAGES_PER_BLOCK,
            num_queries_per_block=max(num_tokens, 8),
            vmem_limit_bytes=_VMEM_BYTES,
        )

    return Peer(
        call,
        (
            *(query, pages),
            _shape((batch,)),
            _shape((batch, per_row)),
            _shape((batch + 1,)),
            _shape((1,)),
        ),
        _size(pages) + 2 * _size(query),
    )


PEERS = {
    "paged_attention": paged_attention,
    "ragged_paged_attention": ragged_paged_attention,
}


def _is_plain(spec: arg_specs.ArgSpec) -> bool:
    """Whether pages are whole tiles of rows of one length, under no window or cap."""
    return (
        spec.page_size == spec.head_dim == 128
        and spec.window is None
        and spec.soft_cap is None
        and spec.dtype == "bfloat16"
        and len(set(spec.lengths)) == 1
    )


def _shape(shape: tuple[int, ...], dtype=jnp.int32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _size(described: jax.ShapeDtypeStruct) -> int:
    return described.size * described.dtype.itemsize
