"""A layer's attention by the native kernel for CPUs, where it can be had.

The same result as the portable walk over pages in `attention`, to rounding.
"""

import jax.numpy as jnp

from tlt_jax.cpu_kernels import attention as cpu_attention
from tlt_jax.models import attention, kv_cache, layers
from tlt_jax.models import kernels as kernels_lib
from tlt_jax.types import Array


def takes(
    kernels: kernels_lib.Kernels,
    x_DBT: Array,
    head_dim: int,
    view: kv_cache.CacheView | None,
    visibility: attention.Visibility,
    window: Array | int | None = None,
) -> bool:
    """Tell whether the kernel computes a layer's attention.

    Args:
      kernels: of the program.
      x_DBT, head_dim, window: the layer's input, and what it is.
      view: the cached past; None: there is none.
      visibility: which fresh keys a query sees.
    """
    return (
        kernels.native_attention
        and view is not None
        and window is None
        and visibility.segment is None
        and layers.takes_native(kernels, x_DBT)
        and cpu_attention.takes(x_DBT.shape[2], head_dim, view.cache.page_size)
    )


def attend(
    qkv: Array,
    cos: Array,
    sin: Array,
    *,
    view: kv_cache.CacheView,
    layer: Array | int,
    visibility: attention.Visibility,
    past: tuple[Array, Array, Array] | None = None,
) -> tuple[Array, Array, Array]:
    """Rotate and attend, as `transformer.decoder_layer` asks of `attend_columns`.

    Args:
      qkv: `[K, G + 2, H, B, T]`.
      cos, sin: `[H / 2, B, T]`.
      view, layer: see `attention.attend_cached`.
      visibility: causal, or by ancestors.
      past: keys and values `[K, H, B, S]` of earlier calls, and who sees them,
        `[B, T, S] bool`.

    Returns:
      Heads `[K, G, H, B, T]`; keys and values `[K, H, B, T]`.
    """
    _, _, head_dim, batch, num_tokens = qkv.shape
    # The kernel reads a mask of each row: [B, T, T], a causal one as well.
    mask_BTS = visibility.block(0, num_tokens)
    mask_BTS = jnp.broadcast_to(mask_BTS, (batch, num_tokens, num_tokens))
    keys = values = None
    if past is not None:
        keys, values, seen_BTS = past
        # Earlier keys stand before the fresh ones, [B, T, S + T].
        mask_BTS = jnp.concatenate([seen_BTS, mask_BTS], axis=2)
    return cpu_attention.attend(
        *(qkv, cos, sin, view.cache.keys, view.cache.values),
        *(view.page_table, view.lengths, mask_BTS, layer),
        scale=head_dim**-0.5,
        past_keys=keys,
        past_values=values,
    )
