"""Plain decoding as one device program of many steps.

A row's last token is pending: drawn, but not yet in the cache. A step feeds it, draws
the next with the noise of its position, and appends the pending token's keys and
values. Rows that are full or have ended ride along and write nowhere.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from tlt_jax.models import config as model_config
from tlt_jax.models import kernels as kernels_lib
from tlt_jax.models import kv_cache, transformer
from tlt_jax.models import params as model_params
from tlt_jax.specdec import noise, sampling
from tlt_jax.types import Array


@struct.dataclass
class Rows:
    """The rows of a decode call, padded to the batch bucket; made on the host.

    Attributes:
      page_table: `[B, max_pages] int32`; covers every position that the call may write.
      lengths: `[B] int32`, cached positions; the pending token's position.
      pending: `[B] int32`, the last token of the row's text.
      keys: `[B, 2] uint32`, noise keys of the requests.
      remaining: `[B] int32`, tokens that may still be drawn; 0: the row rides along.
    """

    page_table: Array
    lengths: Array
    pending: Array
    keys: Array
    remaining: Array


@struct.dataclass
class Emitted:
    """What a decode call drew.

    Attributes:
      tokens: `[B, max_steps] int32`; columns from `counts` on are zeros.
      logprobs: `[B, max_steps] float32`, of those tokens under the sampling law.
      counts: `[B] int32`.
      ended: `[B] bool`: the last token drawn ends the text.
      num_steps: int32, target forwards that the call took.
    """

    tokens: Array
    logprobs: Array
    counts: Array
    ended: Array
    num_steps: Array


def nothing(batch: int, max_steps: int) -> Emitted:
    """Make what a call of `batch` rows has drawn when it begins."""
    return Emitted(
        tokens=jnp.zeros((batch, max_steps), jnp.int32),
        logprobs=jnp.zeros((batch, max_steps), jnp.float32),
        counts=jnp.zeros((batch,), jnp.int32),
        ended=jnp.zeros((batch,), bool),
        num_steps=jnp.int32(0),
    )


def decode(
    params: model_params.Params,
    cache: kv_cache.PagedCache,
    rows: Rows,
    step_limit: Array,
    finish_quota: Array,
    *,
    cfg: model_config.ModelConfig,
    sampling_cfg: sampling.SamplingConfig,
    eos_ids: tuple[int, ...],
    max_steps: int,
    feature_layers: tuple[int, ...] | None = None,
    keep_hidden: bool = False,
    dtype=jnp.float32,
    kernels: kernels_lib.Kernels = kernels_lib.PORTABLE,
) -> tuple[kv_cache.PagedCache, Emitted]:
    """Decode until `step_limit` steps, `finish_quota` finished rows, or none alive.

    Args:
      params: the target.
      cache: its pages; donate them.
      rows: the batch.
      step_limit: int32 scalar, at most `max_steps`.
      finish_quota: int32 scalar; return once this many rows finished in the call.
      cfg: the model.
      sampling_cfg: the law.
      eos_ids: tokens that end a text; they are kept.
      max_steps: width of the result.
      feature_layers: those that a drafter reads; empty: the last features; None: the
        cache holds none.
      keep_hidden: the cache keeps the last features behind those of the layers, too:
        training the drafter needs them.
      dtype: of activations.
      kernels: see `transformer.forward`.

    Returns:
      The cache, and what was drawn.
    """
    batch = rows.lengths.shape[0]
    start = (
        cache,
        rows.lengths,
        rows.pending,
        rows.remaining > 0,
        nothing(batch, max_steps),
    )
    num_alive = jnp.sum(rows.remaining > 0)

    def keep_on(state):
        *_, alive, emitted = state
        still = jnp.sum(alive)
        return (
            (emitted.num_steps < step_limit)
            & (still > 0)
            & (num_alive - still < finish_quota)
        )

    def step(state):
        cache, lengths, pending, alive, emitted = state
        view = transformer.CacheView(cache, rows.page_table, lengths)
        out = transformer.forward(
            params,
            cfg,
            pending[:, None],
            lengths[:, None],
            None,
            view,
            dtype=dtype,
            kernels=kernels,
            features=feature_layers or (),
        )
        law = sampling.law(
            transformer.logits(params, out.hidden[:, :, 0], kernels), sampling_cfg
        )
        if sampling_cfg.temperature == 0:
            drawn = law.draw(jnp.zeros((1,)))
        else:
            chance = noise.gumbel(rows.keys, lengths + 1, cfg.vocab_size, kernels)
            drawn = law.draw(chance, kernels=kernels)
        cache = kv_cache.append(
            cache,
            out.keys,
            out.values,
            rows.page_table,
            after(drawn, lengths),
            alive.astype(jnp.int32),
            features=kept_features(out, feature_layers, keep_hidden),
        )
        column = emitted.num_steps
        lengths = lengths + alive
        counts = lengths - rows.lengths
        ended = alive & is_any(drawn, eos_ids)
        logprob = jnp.where(alive, law.logprob_of(drawn), 0.0)
        emitted = Emitted(
            tokens=_put(emitted.tokens, column, jnp.where(alive, drawn, 0)),
            logprobs=_put(emitted.logprobs, column, logprob),
            counts=counts,
            ended=emitted.ended | ended,
            num_steps=column + 1,
        )
        pending = jnp.where(alive, drawn, pending)
        alive = alive & ~ended & (counts < rows.remaining)
        return cache, lengths, pending, alive, emitted

    cache, _, _, _, emitted = lax.while_loop(keep_on, step, start)
    return cache, emitted


def after(drawn: Array, lengths: Array) -> Array:
    """Make `lengths` depend on the tokens drawn, and so on every read of the cache.

    The compiler updates the pages in place only where it can order the update behind
    their last reader; that of the last layer has no other path to it, and without one
    the whole cache is copied at every step. Tokens are never negative.
    """
    return lengths + jnp.minimum(jnp.min(drawn), 0)


def is_any(tokens: Array, ids: tuple[int, ...]) -> Array:
    """Tell which of `tokens [...]` are among `ids`, `[...] bool`."""
    found = jnp.zeros(tokens.shape, bool)
    for token_id in ids:
        found = found | (tokens == token_id)
    return found


def prefill(
    params: model_params.Params,
    cache: kv_cache.PagedCache,
    tokens: Array,
    counts: Array,
    page_table: Array,
    lengths: Array,
    *,
    cfg: model_config.ModelConfig,
    feature_layers: tuple[int, ...] | None = None,
    keep_hidden: bool = False,
    dtype=jnp.float32,
    kernels: kernels_lib.Kernels = kernels_lib.PORTABLE,
) -> kv_cache.PagedCache:
    """Append a chunk of each row's prompt to the cache.

    Args:
      params: the target.
      cache: its pages; donate them.
      tokens: `[B, T] int32`, T a multiple of the page size; padding holds zeros.
      counts: `[B] int32`, valid tokens of each row's chunk.
      page_table: `[B, max_pages] int32`.
      lengths: `[B] int32`, cached positions, multiples of the page size.
      cfg: the model.
      feature_layers, keep_hidden: see `decode`.
      dtype: of activations.
      kernels: see `transformer.forward`.

    Returns:
      The cache.
    """
    positions = lengths[:, None] + jnp.arange(tokens.shape[1])
    view = transformer.CacheView(cache, page_table, lengths)
    out = transformer.forward(
        params,
        cfg,
        tokens,
        positions,
        None,
        view,
        dtype=dtype,
        kernels=kernels,
        features=feature_layers or (),
    )
    return kv_cache.append_pages(
        cache,
        out.keys,
        out.values,
        page_table,
        lengths,
        counts,
        features=kept_features(out, feature_layers, keep_hidden),
    )


def kept_features(
    out: transformer.Output,
    feature_layers: tuple[int, ...] | None,
    keep_hidden: bool = False,
) -> Array | None:
    """Return what the cache keeps of a forward's features, `[F, B, T]` or None.

    Those that a drafter reads come first.
    """
    if feature_layers is None:
        return None
    features = transformer.drafter_features(out)
    if keep_hidden and feature_layers:
        features = jnp.concatenate([features, out.hidden])
    return features


def _put(buffer: Array, column: Array, values: Array) -> Array:
    return lax.dynamic_update_slice_in_dim(
        buffer, values.astype(buffer.dtype)[:, None], column, axis=1
    )


def donated(
    fn: Callable, cache_sharding=None, result_sharding=None
) -> jax.stages.Wrapped:
    """Jit `decode` or `prefill` (bound to its settings), donating the cache.

    Args:
      fn: returns the cache, or the cache and a result.
      cache_sharding: of the cache returned.
      result_sharding: of the result; None where `fn` returns the cache alone.

    Returns:
      The jitted function.
    """
    out = cache_sharding
    if result_sharding is not None:
        out = (cache_sharding, result_sharding)
    return jax.jit(fn, donate_argnums=(1,), out_shardings=out)
