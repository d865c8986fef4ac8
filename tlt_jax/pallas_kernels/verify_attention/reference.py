"""What verification attention means: dense, in float32, one formula.

It gathers every page of a row and so costs what the kernels save. It has a derivative,
which they have not.
"""

import jax
import jax.numpy as jnp
from jax import lax

from tlt_jax.pallas_kernels.verify_attention import arguments
from tlt_jax.types import Array

# Scores of invisible keys, and the log normaliser of a query that sees nothing.
HIDDEN = -1e30


def visible_fresh(
    num_tokens: int,
    words: Array | None,
    positions: Array,
    window: Array | int | None,
) -> Array:
    """Say which fresh keys each fresh query sees.

    Args:
      num_tokens: T.
      words: `[B, T, ceil(T / 32)] uint32`, bit s % 32 of word s // 32 of query t: it
        sees key s; None: causal.
      positions: `[B, T] int32`.
      window: see only keys at distance below this, or None.

    Returns:
      `[B or 1, T, T] bool`.
    """
    index = jnp.arange(num_tokens)
    if words is None:
        mask = (index[None, :] <= index[:, None])[None]
    else:
        bits = words[..., index // 32] >> (index % 32).astype(jnp.uint32)
        mask = (bits & 1).astype(bool)
    if window is not None:
        mask = mask & (positions[:, :, None] - positions[:, None, :] < window)
    return mask


def verify_attention(args: arguments.Arguments) -> tuple[Array, Array | None]:
    """Compute attention by the formula.

    Returns:
      As `api.verify_attention`, the output in float32.
    """
    positions, lengths, window = args.positions, args.lengths, args.window
    page_size = args.cache_keys.shape[-1]
    num_slots = args.page_table.shape[1] * page_size
    slots = jnp.arange(num_slots)
    readable = slots < lengths[:, None]
    used = jnp.arange(0, num_slots, page_size) < lengths[:, None]
    pages_used = jnp.where(used, args.page_table, 0)

    def past(pages):
        columns = jnp.moveaxis(jnp.asarray(pages)[args.layer, pages_used], 1, 3)
        # Now [B, K, H, pages, slots].
        columns = columns.reshape(*columns.shape[:3], num_slots).astype(jnp.float32)
        # What must not be read may be NaN, which no weight of zero removes.
        return jnp.where(readable[:, None, None], columns, 0.0)

    fresh_keys, fresh_values = (x.astype(jnp.float32) for x in (args.keys, args.values))
    all_keys = jnp.concatenate([past(args.cache_keys), fresh_keys], axis=-1)
    all_values = jnp.concatenate([past(args.cache_values), fresh_values], axis=-1)

    batch, num_tokens = positions.shape
    visible = jnp.broadcast_to(readable[:, None], (batch, num_tokens, num_slots))
    if window is not None:
        visible = visible & (positions[:, :, None] - slots < window)
    fresh = visible_fresh(num_tokens, args.words, positions, window)
    fresh = jnp.broadcast_to(fresh, (batch, num_tokens, num_tokens))
    visible = jnp.concatenate([visible, fresh], axis=-1)[:, None, None]

    with jax.default_matmul_precision("highest"):
        scores = jnp.einsum(
            "bkgth,bkhs->bkgts", args.query.astype(jnp.float32), all_keys
        )
        scores = cap(scores * args.scale, args.soft_cap)
        scores = jnp.where(visible, scores, HIDDEN)
        maximum = lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
        weights = jnp.where(visible, jnp.exp(scores - maximum), 0.0)
        normaliser = jnp.sum(weights, axis=-1)
        total = jnp.einsum("bkgts,bkhs->bkgth", weights, all_values)
    seen = normaliser > 0
    safe = jnp.where(seen, normaliser, 1.0)
    log_normaliser = jnp.where(seen, maximum[..., 0] + jnp.log(safe), HIDDEN)
    out = total / safe[..., None]
    return out, log_normaliser if args.with_log_normaliser else None


def cap(scores: Array, soft_cap: float | None) -> Array:
    """Squash scores into (-soft_cap, soft_cap); None: leave them."""
    if soft_cap is None:
        return scores
    return jnp.tanh(scores / soft_cap) * soft_cap
