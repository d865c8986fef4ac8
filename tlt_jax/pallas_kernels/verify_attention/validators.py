"""Checks of verification attention's arguments: when traced, and while it runs.

What shapes, types and the kernel's abilities tell is checked whenever a call is traced.
What values tell is checked by every eager call, and inside compiled programs by
`checked_lengths`, where it is asked for.
"""

import jax
import jax.numpy as jnp
import numpy as np

from tlt_jax.pallas_kernels.verify_attention import arguments, page_layout, tpu_plan
from tlt_jax.types import Array

MAX_NODES = 128
_HEAD_DIMS = range(16, 257, 16)
_PAGE_SIZES = (16, 32, 64, 128)
_DTYPES = ("float32", "bfloat16")


def check_shapes(args: arguments.Arguments) -> None:
    """Check what shapes and types tell.

    Raises:
      ValueError: an argument's shape or type is not what the others ask for.
    """
    query, cache_keys, words = args.query, args.cache_keys, args.words
    if query.ndim != 5 or cache_keys.ndim != 5:
        raise ValueError(
            f"query has shape {query.shape} and cache_keys {cache_keys.shape}: give "
            "[B, K, G, T, H] and [L, num_pages, K, H, page_size]."
        )
    batch, num_kv, _, num_tokens, head_dim = query.shape
    num_features = page_layout.padded(head_dim, args.packing)
    lanes = cache_keys.shape[4] // args.packing * args.packing
    pages = (*cache_keys.shape[:2], num_kv, num_features // args.packing, lanes)
    fresh = (batch, num_kv, head_dim, num_tokens)
    wanted = {
        "keys": (fresh, query.dtype),
        "values": (fresh, query.dtype),
        "cache_keys": (pages, None),
        "cache_values": (pages, cache_keys.dtype),
        "page_table": ((batch, args.page_table.shape[-1]), jnp.int32),
        "lengths": ((batch,), jnp.int32),
        "positions": ((batch, num_tokens), jnp.int32),
    }
    if words is not None:
        wanted["words"] = ((batch, num_tokens, -(-num_tokens // 32)), jnp.uint32)
    for name, (shape, dtype) in wanted.items():
        array = getattr(args, name)
        if array.shape != shape:
            raise ValueError(
                f"{name} has shape {array.shape}, but query {query.shape} and the pages"
                f" {cache_keys.shape} ask for {shape}."
            )
        if dtype is not None and array.dtype != dtype:
            raise ValueError(f"{name} is {array.dtype}: give {jnp.dtype(dtype)}.")
    for name, array in (("query", query), ("cache_keys", cache_keys)):
        if array.dtype not in _DTYPES:
            raise ValueError(f"{name} is {array.dtype}: use {' or '.join(_DTYPES)}.")
    if words is not None and num_tokens > MAX_NODES:
        raise ValueError(
            f"words masks T={num_tokens} fresh tokens, more than {MAX_NODES}: verify "
            "fewer nodes (tokens_to_verify), or leave it out for causal ones."
        )


def check_values(
    sizes: tuple[int, int, int],
    layer: Array | int,
    page_table: Array,
    lengths: Array,
    positions: Array,
    words: Array | None,
    *,
    first_page: int = 0,
) -> None:
    """Check what values tell, on the host; every eager call does.

    Args:
      sizes: of the cache, `(L, num_pages, page_size)`.
      layer, page_table, lengths, positions, words: see `api.verify_attention`.
      first_page: pages before it are nobody's, and no row may read them.

    Raises:
      ValueError: a length, page, position or bit is out of its range.
    """
    num_layers, num_pages, page_size = sizes
    table, lengths = np.asarray(page_table), np.asarray(lengths)
    most = table.shape[1] * page_size
    if not 0 <= int(layer) < num_layers:
        raise ValueError(f"layer={int(layer)} of {num_layers}: count from 0.")
    bad = np.flatnonzero((lengths < 0) | (lengths > most))
    if bad.size:
        raise ValueError(
            f"lengths[{bad[0]}]={lengths[bad[0]]} is outside 0 to {most}, which "
            f"{table.shape[1]} pages of {page_size} hold: give the table more columns."
        )
    used = np.arange(table.shape[1]) * page_size < lengths[:, None]
    bad = np.argwhere(used & ((table < first_page) | (table >= num_pages)))
    if bad.size:
        row, column = bad[0]
        raise ValueError(
            f"page_table[{row}, {column}]={table[row, column]} is no page that may be "
            f"read, {first_page} to {num_pages - 1}, and lengths[{row}]={lengths[row]} "
            f"needs {column + 1} or more: give the row pages."
        )
    bad = np.flatnonzero((np.asarray(positions) < lengths[:, None]).any(axis=1))
    if bad.size:
        raise ValueError(
            f"positions[{bad[0]}] holds one below lengths[{bad[0]}]="
            f"{lengths[bad[0]]}: fresh tokens stand behind the cached ones."
        )
    if words is None:
        return
    octets = np.ascontiguousarray(words).astype("<u4").view(np.uint8)
    bits = np.unpackbits(octets, axis=-1, bitorder="little")
    itself = np.arange(np.shape(positions)[1])
    for what, wrong in (
        ("does not name node {} itself", ~bits[:, itself, itself].astype(bool)),
        (
            "names a node behind node {}: parents stand before children",
            (bits * (np.arange(bits.shape[-1]) > itself[:, None])).any(axis=-1),
        ),
    ):
        bad = np.argwhere(wrong)
        if bad.size:
            row, node = bad[0]
            raise ValueError(f"words[{row}, {node}] {what.format(node)}.")


def checked_lengths(
    sizes: tuple[int, int, int],
    page_table: Array,
    lengths: Array,
    positions: Array,
    words: Array | None,
    *,
    first_page: int,
) -> Array:
    """Check values inside a compiled program, on the host and before they are used.

    Nothing that needs the lengths returned can begin before they were found right. The
    program waits for the host, so this is for looking for errors.

    Args:
      sizes, page_table, lengths, positions, words, first_page: see `check_values`.

    Returns:
      The lengths. Where values are wrong the program fails with the message of
      `check_values` (in a `JaxRuntimeError` or ValueError, as jax called it), at the
      latest for whoever waits for its results.
    """

    def check(*given):
        check_values(sizes, 0, *given, first_page=first_page)
        return np.asarray(given[1])

    described = jax.ShapeDtypeStruct(lengths.shape, lengths.dtype)
    return jax.pure_callback(check, described, page_table, lengths, positions, words)


def check_kernel(name: str, args: arguments.Arguments, *, compiled: bool) -> None:
    """Check that a kernel can compute this, whatever the values.

    Args:
      name: of the implementation, not `reference`.
      args: of the call.
      compiled: for a device, and not interpreted.

    Raises:
      NotImplementedError: it cannot; the message says what can.
    """
    head_dim, page_size = args.query.shape[4], args.sizes.page_size
    reasons = []
    if head_dim not in _HEAD_DIMS:
        reasons.append(f"has head dimensions 16, 32, 48, ... 256, not {head_dim}")
    if page_size not in _PAGE_SIZES:
        reasons.append(f"has page sizes {_PAGE_SIZES}, not {page_size}")
    if name == "mosaic_tpu" and not reasons and compiled:
        told = tpu_plan.obstacle(*args.sizes, args.packing)
        reasons += [f"cannot take this: {told}"] if told else []
    if reasons:
        raise NotImplementedError(
            f"the kernel {name!r} {' and '.join(reasons)}. The reference and the "
            "portable walk over pages (rollout.attention='portable') take any."
        )
