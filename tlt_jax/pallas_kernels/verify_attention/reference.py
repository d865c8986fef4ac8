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


def _visible_fresh(args: arguments.Arguments) -> Array:
    """Say which fresh keys each fresh query sees, `[B or 1, T, T] bool`."""
    positions, words = args.positions, args.words
    index = jnp.arange(positions.shape[1])
    if words is None:
        mask_BTS = (index[None, :] <= index[:, None])[None]
    else:
        # The word of each key, and its bit in it: [B, T, S] with S = T.
        bits_BTS = words[..., index // 32] >> (index % 32).astype(jnp.uint32)
        mask_BTS = (bits_BTS & 1).astype(bool)
    if args.window is not None:
        distance_BTS = positions[:, :, None] - positions[:, None, :]
        mask_BTS = mask_BTS & (distance_BTS < args.window)
    return mask_BTS


def verify_attention(args: arguments.Arguments) -> tuple[Array, Array | None]:
    """Compute attention by the formula; as `api.verify_attention`, in float32."""
    positions, lengths, window = args.positions, args.lengths, args.window
    page_size = args.cache_keys.shape[-1]
    num_slots = args.page_table.shape[1] * page_size
    slots_S = jnp.arange(num_slots)
    readable_BS = slots_S < lengths[:, None]
    # Entries behind a row's last page name anything: page 0 is read in their place.
    used = jnp.arange(0, num_slots, page_size) < lengths[:, None]
    pages_used = jnp.where(used, args.page_table, 0)

    def past(pages):
        columns = jnp.moveaxis(jnp.asarray(pages)[args.layer, pages_used], 1, 3)
        # Now [B, K, H, pages, slots].
        columns = columns.reshape(*columns.shape[:3], num_slots).astype(jnp.float32)
        # What must not be read may be NaN, which no weight of zero removes.
        return jnp.where(readable_BS[:, None, None], columns, 0.0)

    # Cached and fresh columns side by side, [B, K, H, num_slots + T].
    fresh_keys, fresh_values = (x.astype(jnp.float32) for x in (args.keys, args.values))
    keys_BKHS = jnp.concatenate([past(args.cache_keys), fresh_keys], axis=-1)
    values_BKHS = jnp.concatenate([past(args.cache_values), fresh_values], axis=-1)

    # Who sees whom of both, the same for all heads: [B, 1, 1, T, num_slots + T].
    batch, num_tokens = positions.shape
    past_BTS = jnp.broadcast_to(readable_BS[:, None], (batch, num_tokens, num_slots))
    if window is not None:
        past_BTS = past_BTS & (positions[:, :, None] - slots_S < window)
    fresh_BTS = _visible_fresh(args)
    fresh_BTS = jnp.broadcast_to(fresh_BTS, (batch, num_tokens, num_tokens))
    visible_B11TS = jnp.concatenate([past_BTS, fresh_BTS], axis=-1)[:, None, None]

    with jax.default_matmul_precision("highest"):
        query_BKGTH = args.query.astype(jnp.float32)
        scores_BKGTS = jnp.einsum("bkgth,bkhs->bkgts", query_BKGTH, keys_BKHS)
        scores_BKGTS = cap(scores_BKGTS * args.scale, args.soft_cap)
        scores_BKGTS = jnp.where(visible_B11TS, scores_BKGTS, HIDDEN)
        maximum_BKGT1 = jnp.max(scores_BKGTS, axis=-1, keepdims=True)
        maximum_BKGT1 = lax.stop_gradient(maximum_BKGT1)
        weights_BKGTS = jnp.exp(scores_BKGTS - maximum_BKGT1)
        weights_BKGTS = jnp.where(visible_B11TS, weights_BKGTS, 0.0)
        normaliser_BKGT = jnp.sum(weights_BKGTS, axis=-1)
        total_BKGTH = jnp.einsum("bkgts,bkhs->bkgth", weights_BKGTS, values_BKHS)
    # A query that sees nothing: no division by zero, no log of it.
    seen_BKGT = normaliser_BKGT > 0
    safe_BKGT = jnp.where(seen_BKGT, normaliser_BKGT, 1.0)
    log_BKGT = maximum_BKGT1[..., 0] + jnp.log(safe_BKGT)
    log_BKGT = jnp.where(seen_BKGT, log_BKGT, HIDDEN)
    out_BKGTH = total_BKGTH / safe_BKGT[..., None]
    return out_BKGTH, log_BKGT if args.with_log_normaliser else None


def cap(scores: Array, soft_cap: float | None) -> Array:
    """Squash scores into (-soft_cap, soft_cap); None: leave them."""
    if soft_cap is None:
        return scores
    return jnp.tanh(scores / soft_cap) * soft_cap


def masked(
    products: list[Array], visible: list[Array], const: arguments.Constants
) -> list[Array]:
    """Make scores of parts of the keys from their products with the queries."""
    return [
        jnp.where(mask, cap(part * const.scale, const.soft_cap), HIDDEN)
        for part, mask in zip(products, visible, strict=True)
    ]


def dot(left: Array, right: Array, contract: tuple[int, int] = (1, 0)) -> Array:
    """Multiply two matrices of one dtype over an axis of each; float32, exactly."""
    exact = left.dtype == jnp.float32
    return lax.dot_general(
        left,
        right,
        (((contract[0],), (contract[1],)), ((), ())),
        precision=lax.Precision.HIGHEST if exact else None,
        preferred_element_type=jnp.float32,
    )
