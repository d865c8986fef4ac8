"""Attention of few queries a row over a paged cache and their own keys, on CPUs.

One call rotates queries and keys, attends, and returns the fresh columns for the cache:
what XLA does in some twenty operations a layer, gathering every page. Rows and heads
are dealt out to the program's threads. See `attention_code` for the loops.
"""

import functools

import jax
import jax.numpy as jnp

from tlt_jax.cpu_kernels import attention_code, ffi
from tlt_jax.types import Array

# Tokens of a row beyond which XLA's large products win.
MOST_TOKENS = 32


def takes(num_tokens: int, head_dim: int, page_size: int) -> bool:
    """Tell whether the kernel computes these shapes, and is worth it.

    They are the fresh tokens of a row, elements of a head, and slots of a page.
    """
    lanes = attention_code.LANES
    whole = head_dim % lanes == 0 and page_size % lanes == 0
    return whole and num_tokens <= MOST_TOKENS


@functools.cache
def register() -> None:
    """Compile the kernel and make it known to XLA, once in a process.

    See `product.register`.
    """
    name = attention_code.HANDLER
    module = attention_code.kernel(ffi.has_fma(ffi.host_features()))
    ffi.register(module, {name: name})


def attend(
    qkv: Array,
    cos: Array,
    sin: Array,
    cache_keys: Array,
    cache_values: Array,
    page_table: Array,
    lengths: Array,
    starts: Array,
    counts: Array,
    mask: Array,
    layer: Array | int,
    scale: float,
    past_keys: Array | None = None,
    past_values: Array | None = None,
) -> tuple[Array, Array, Array]:
    """Rotate queries and keys, and attend over cached, earlier and fresh ones.

    For programs on one CPU device: it cannot be partitioned or differentiated. A
    query's result does not depend on other rows, nor on how many there are.

    Args:
      qkv: `[K, G + 2, H, *columns] float32`, queries, key and value of each kv head;
        two axes of N columns in all.
      cos, sin: `[H / 2, *columns] float32`, see `layers.rope_tables`.
      cache_keys, cache_values: `[L, P, K, H, S] float32`.
      page_table: `[B, max_pages] int32`.
      lengths: `[B] int32`, cached positions; others are not read into the result.
      starts, counts: `[B] int32`, a row's first column, and its columns, at most W.
      mask: `[B, W, S' + W] bool`, which earlier and which fresh keys a query sees.
      layer: which layer's pages.
      scale: multiplies the scores.
      past_keys, past_values: `[K, H, B, S'] float32`, of earlier calls and in no page
        yet, keys rotated; finite; None: there are none.

    Returns:
      Heads `[K, G, H, *columns]`; rotated keys and values `[K, H, *columns]`. Columns
      of no row may hold anything.

    Raises:
      ValueError: a shape or dtype is not of those.
    """
    num_kv, heads, head_dim, *columns = qkv.shape
    batch, width = page_table.shape[0], mask.shape[1]
    page_size = cache_keys.shape[-1]
    if past_keys is None:
        past_keys = past_values = jnp.zeros((num_kv, head_dim, batch, 0), jnp.float32)
    num_past = past_keys.shape[-1]
    past_shape = (num_kv, head_dim, batch, num_past)
    cache_shape = (*cache_keys.shape[:2], num_kv, head_dim, page_size)
    expected = {
        "past_keys": (past_keys, past_shape, jnp.float32),
        "past_values": (past_values, past_shape, jnp.float32),
        "cos": (cos, (head_dim // 2, *columns), jnp.float32),
        "sin": (sin, (head_dim // 2, *columns), jnp.float32),
        "cache_values": (cache_values, cache_keys.shape, jnp.float32),
        "cache_keys": (cache_keys, cache_shape, jnp.float32),
        "page_table": (page_table, (batch, page_table.shape[-1]), jnp.int32),
        "lengths": (lengths, (batch,), jnp.int32),
        "starts": (starts, (batch,), jnp.int32),
        "counts": (counts, (batch,), jnp.int32),
        "mask": (mask, (batch, width, num_past + width), jnp.bool_),
        "qkv": (qkv, qkv.shape, jnp.float32),
    }
    for name, (array, shape, dtype) in expected.items():
        if array.shape != shape or array.dtype != dtype:
            raise ValueError(
                f"{name} is {array.dtype}{list(array.shape)}, but the native attention "
                f"takes {jnp.dtype(dtype)}{list(shape)} beside qkv {list(qkv.shape)}."
            )
    lanes = attention_code.LANES
    if head_dim % lanes or page_size % lanes:
        raise ValueError(
            f"head_dim={head_dim} and page_size={page_size}: the native attention "
            f"takes multiples of {lanes}; use the portable one."
        )
    register()
    fresh = (num_kv, head_dim, *columns)
    results = [
        jax.ShapeDtypeStruct(shape, jnp.float32)
        for shape in ((num_kv, heads - 2, head_dim, *columns), fresh, fresh)
    ]
    return jax.ffi.ffi_call(attention_code.HANDLER, results)(
        *(qkv, cos, sin, cache_keys, cache_values, page_table, lengths, starts, counts),
        *(mask, past_keys, past_values),
        *(jnp.asarray(layer, jnp.int32), jnp.float32(scale)),
    )
