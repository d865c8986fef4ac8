"""Attention over cached and fresh keys by an accelerator's kernel.

The same result as the portable walk over pages in `attention`, which is for CPUs and
for training.
"""

import jax.numpy as jnp

from tlt_jax.models import attention, kv_cache
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
    """Attend over cached and fresh keys with an accelerator's kernel.

    Args:
      query, keys, values: see `attention.attend_fresh`; at most 128 tokens where the
        visibility names ancestors.
      view, layer: see `attention.attend_cached`.
      positions: `[B, T] int32`.
      visibility: causal, or by ancestors.
      scale, window: see `attention.attend_fresh`.
      with_log_normaliser: the part will be joined with others; else only
        `attention.finish` may take it.
      kernel: what computes.

    Returns:
      The part over M = G x T queries, G outermost, normalised already.

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
