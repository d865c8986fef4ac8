"""Attention over cached and fresh keys by a kernel: an accelerator's, or a CPU's.

The same result as the portable walk over pages in `attention`, which works everywhere
and is for training.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from tlt_jax.cpu_kernels import attention as cpu_attention
from tlt_jax.models import attention, kv_cache, layers, ragged
from tlt_jax.models import kernels as kernels_lib
from tlt_jax.pallas_kernels.verify_attention import api as verify_attention
from tlt_jax.types import Array


def attend(
    query: Array,
    keys: Array,
    values: Array,
    view: kv_cache.CacheView,
    layer: Array | int,
    positions: Array,
    visibility: attention.Visibility,
    *,
    scale: float,
    window: Array | int | None = None,
    with_log_normaliser: bool,
    kernel: verify_attention.Implementation,
) -> attention.Partial:
    """Attend over cached and fresh keys; the part is normalised already.

    Args:
      query, keys, values: see `attention.attend_fresh`; at most 128 tokens where the
        visibility names ancestors.
      view, layer: see `attention.attend_cached`.
      visibility: causal, or by ancestors.
      positions, scale, window: see `attention.attend_fresh`.
      with_log_normaliser: the part will be joined with others; else only
        `attention.finish` may take it.
      kernel: what computes.

    Raises:
      NotImplementedError: the kernel cannot do this.
    """
    if visibility.segment is not None:
        raise NotImplementedError(
            f"visibility by segments has no kernel ({kernel.name!r}): packed rows are "
            "for training; use attention='portable'."
        )
    cache = view.cache
    out, log = verify_attention.verify_attention(
        *(query, keys, values, cache.keys, cache.values, layer),
        *(view.page_table, view.lengths, positions, words_of(visibility)),
        scale=scale,
        window=window,
        packing=cache.packing,
        with_log_normaliser=with_log_normaliser,
        implementation=kernel,
    )
    if log is None:
        log = jnp.zeros(out.shape[:-1], jnp.float32)
    # `Partial` wants sums. What was normalised weighs as one key of that score, and a
    # query that saw nothing as none.
    weight = jnp.where(log > attention.HIDDEN, 1.0, 0.0)
    part = attention.Partial(out.astype(jnp.float32), log, weight)
    return attention.merge_queries(part)


def by_row(
    attend: Callable[[Array, Array, Array], attention.Partial],
    rows: ragged.Ragged | None,
) -> Callable[[Array, Array, Array], attention.Partial]:
    """Let a function that attends by row be asked for columns side by side.

    It takes queries `[B, K, G, W, H]`, keys and values `[B, K, H, W]`; what comes of it
    takes `[1, K, G, N, H]` and `[1, K, H, N]` as `rows` lay them, and returns a part
    over `[1, K, G x N]`. None: it stays as it is.
    """
    if rows is None:
        return attend

    def packed(query, keys, values):
        _, num_kv, group, num_columns, _ = query.shape
        # Columns last, as they are unpacked: [K, G, H, 1, N] becomes [K, G, H, B, W].
        query_KGHBW = rows.unpack(jnp.moveaxis(query, (0, 3), (-2, -1)))
        query_BKGWH = jnp.moveaxis(query_KGHBW, (-2, -1), (0, 3))
        keys, values = (
            jnp.moveaxis(rows.unpack(jnp.moveaxis(x, 0, 2)), 2, 0)
            for x in (keys, values)
        )
        part = attend(query_BKGWH, keys, values)

        def pack(x):
            # [B, K, G x W, ...] with the row and its tokens last, and back.
            x = x.reshape(x.shape[0], num_kv, group, rows.width, *x.shape[3:])
            x = rows.pack(jnp.moveaxis(x, (0, 3), (-2, -1)))
            x = jnp.moveaxis(x, (-2, -1), (0, 3))
            return x.reshape(1, num_kv, group * num_columns, *x.shape[4:])

        return jax.tree.map(pack, part)

    return packed


def words_of(visibility: attention.Visibility) -> Array | None:
    """Return ancestors as words `[B, T, ceil(T / 32)] uint32`; None: all are causal."""
    mask_BTS = visibility.ancestors
    if visibility.words is not None or mask_BTS is None:
        return visibility.words
    # Keys in groups of 32, [B, T, words, 32], the last one filled up with unseen ones.
    num_keys = mask_BTS.shape[-1]
    padded = jnp.pad(mask_BTS, [(0, 0), (0, 0), (0, -num_keys % 32)])
    bits = padded.reshape(*mask_BTS.shape[:2], -1, 32).astype(jnp.uint32)
    # Each bit stands alone in its place, so that their sum is the word.
    return jnp.sum(bits << jnp.arange(32, dtype=jnp.uint32), axis=-1, dtype=jnp.uint32)


def takes_native(
    kernels: kernels_lib.Kernels,
    x_DBT: Array,
    head_dim: int,
    view: kv_cache.CacheView | None,
    visibility: attention.Visibility,
    window: Array | int | None = None,
    rows: ragged.Ragged | None = None,
) -> bool:
    """Tell whether the native kernel for CPUs computes a layer's attention.

    Args:
      kernels: of the program.
      x_DBT, head_dim, window: the layer's input, and what it is.
      view: the cached past; None: there is none.
      visibility: which fresh keys a query sees.
      rows: which columns are whose, see `transformer.forward`.
    """
    width = x_DBT.shape[2] if rows is None else rows.width
    return (
        kernels.native_attention
        and view is not None
        and window is None
        and visibility.segment is None
        and layers.takes_native(kernels, x_DBT)
        and cpu_attention.takes(width, head_dim, view.cache.page_size)
    )


def attend_native(
    qkv: Array,
    cos: Array,
    sin: Array,
    *,
    view: kv_cache.CacheView,
    layer: Array | int,
    visibility: attention.Visibility,
    past: tuple[Array, Array, Array] | None = None,
    rows: ragged.Ragged | None = None,
) -> tuple[Array, Array, Array]:
    """Rotate and attend with the native kernel for CPUs, the same to rounding.

    See `attend_columns` of `transformer.decoder_layer`.

    Args:
      qkv: `[K, G + 2, H, B, T]`.
      cos, sin: `[H / 2, B, T]`.
      view, layer: see `attention.attend_cached`.
      visibility: causal, or by ancestors.
      past: keys and values `[K, H, B, S]` of earlier calls, and who sees them,
        `[B, T, S] bool`.
      rows: which columns are whose, see `transformer.forward`.

    Returns:
      Heads `[K, G, H, B, T]`; keys and values `[K, H, B, T]`.
    """
    head_dim, batch = qkv.shape[2], view.lengths.shape[0]
    if rows is None:
        num_tokens = qkv.shape[4]
        whole = jnp.full((batch,), num_tokens, jnp.int32)
        rows = ragged.of_counts(whole, num_tokens, batch * num_tokens)
    # The kernel reads a mask of each row: [B, T, T], a causal one as well.
    mask_BTS = visibility.block(0, rows.width)
    mask_BTS = jnp.broadcast_to(mask_BTS, (batch, rows.width, rows.width))
    keys = values = None
    if past is not None:
        keys, values, seen_BTS = past
        # Earlier keys stand before the fresh ones, [B, T, S + T].
        mask_BTS = jnp.concatenate([seen_BTS, mask_BTS], axis=2)
    return cpu_attention.attend(
        *(qkv, cos, sin, view.cache.keys, view.cache.values),
        *(view.page_table, view.lengths, rows.starts, rows.counts, mask_BTS, layer),
        scale=head_dim**-0.5,
        past_keys=keys,
        past_values=values,
    )
