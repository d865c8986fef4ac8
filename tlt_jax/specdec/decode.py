"""Plain decoding as one device program of many steps.

A row's last token is pending: drawn, but not yet in the cache. A step feeds it, draws
the next with the noise of its position, and appends the pending token's keys and
values. Rows that are full or have ended ride along and write nowhere.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from tlt_jax.models import attention, kv_cache, ragged, transformer
from tlt_jax.models import config as model_config
from tlt_jax.models import kernels as kernels_lib
from tlt_jax.models import params as model_params
from tlt_jax.specdec import noise, sampling
from tlt_jax.types import Array


@dataclasses.dataclass(frozen=True)
class Settings:
    """What programs of a target are compiled for, beside the shapes of their arguments.

    Attributes:
      cfg: the target.
      sampling_cfg: the law.
      eos_ids: tokens that end a text; they are kept.
      max_tokens: width of a call's result.
      feature_layers: those that a drafter reads; empty: the last features; None: the
        cache holds none.
      keep_hidden: the cache keeps the last features behind those of the layers, too:
        training the drafter needs them.
      keep_routes: of a mixture of experts: the cache keeps the routes.
      dtype: of activations.
      kernels: see `transformer.forward`.
    """

    cfg: model_config.ModelConfig
    sampling_cfg: sampling.SamplingConfig = sampling.SamplingConfig()
    eos_ids: tuple[int, ...] = ()
    max_tokens: int = 1
    feature_layers: tuple[int, ...] | None = None
    keep_hidden: bool = False
    keep_routes: bool = False
    dtype: str = "float32"
    kernels: kernels_lib.Kernels = kernels_lib.PORTABLE


@struct.dataclass
class Rows:
    """The rows of a decode call, padded to the batch bucket.

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
class Following:
    """What the next call of the same rows begins with; the host need not have read it.

    Attributes:
      lengths, pending, remaining: see `Rows`.
      step_limit: int32, the call's own; 0 if a row finished in it: then it is the
        host's turn, and a call that was enqueued all the same takes no step.
    """

    lengths: Array
    pending: Array
    remaining: Array
    step_limit: Array


@struct.dataclass
class Emitted:
    """What a decode call drew.

    Attributes:
      tokens: `[B, max_tokens] int32`; columns from `counts` on are zeros.
      logprobs: `[B, max_tokens] float32`, of those tokens under the sampling law.
      counts: `[B] int32`.
      ended: `[B] bool`: the last token drawn ends the text.
      num_steps: int32, target forwards that the call took.
      following: for the call behind it; None within a call, and of one that speculates.
    """

    tokens: Array
    logprobs: Array
    counts: Array
    ended: Array
    num_steps: Array
    following: Following | None = None


def nothing(batch: int, max_tokens: int) -> Emitted:
    """Make what a call of `batch` rows has drawn when it begins."""
    return Emitted(
        tokens=jnp.zeros((batch, max_tokens), jnp.int32),
        logprobs=jnp.zeros((batch, max_tokens), jnp.float32),
        counts=jnp.zeros((batch,), jnp.int32),
        ended=jnp.zeros((batch,), bool),
        num_steps=jnp.int32(0),
    )


def goes_on(alive: Array, num_alive: Array, finish_quota: Array) -> Array:
    """Tell whether a call may take another step, bool scalar.

    `alive [B] bool` are rows that may draw more, of `num_alive` when the call began;
    `finish_quota` of them finished in it are enough. Both are int32 scalars.
    """
    still = jnp.sum(alive)
    return (still > 0) & (num_alive - still < finish_quota)


@struct.dataclass
class _State:
    """What a step of plain decoding changes."""

    cache: kv_cache.PagedCache
    lengths: Array  # [B]
    pending: Array  # [B]
    alive: Array  # [B]
    emitted: Emitted


def decode(
    params: model_params.Params,
    cache: kv_cache.PagedCache,
    rows: Rows,
    step_limit: Array,
    finish_quota: Array,
    *,
    settings: Settings,
) -> tuple[kv_cache.PagedCache, Emitted]:
    """Decode until `step_limit` steps, `finish_quota` finished rows, or none alive.

    Both are int32 scalars, the first at most `settings.max_tokens`. Donate the cache.
    """
    start = _State(
        cache=cache,
        lengths=rows.lengths,
        pending=rows.pending,
        alive=rows.remaining > 0,
        emitted=nothing(rows.lengths.shape[0], settings.max_tokens),
    )
    num_alive = jnp.sum(start.alive)

    def keep_on(state):
        return (state.emitted.num_steps < step_limit) & goes_on(
            state.alive, num_alive, finish_quota
        )

    def step(state):
        return _step(params, rows, state, settings)

    end = lax.while_loop(keep_on, step, start)
    has_finished = jnp.any(start.alive & ~end.alive)
    following = Following(
        lengths=end.lengths,
        pending=end.pending,
        remaining=rows.remaining - end.emitted.counts,
        step_limit=jnp.where(has_finished, 0, step_limit),
    )
    return end.cache, end.emitted.replace(following=following)


def _step(params, rows: Rows, state: _State, settings: Settings) -> _State:
    """Feed every row's pending token, draw the next, append what was fed."""
    alive_B, lengths_B, emitted = state.alive, state.lengths, state.emitted
    out = forward(
        params,
        state.cache,
        rows.page_table,
        lengths_B,
        state.pending[:, None],
        lengths_B[:, None],
        settings=settings,
    )
    logits_BV = transformer.logits(params, out.hidden[:, :, 0], settings.kernels)
    law = sampling.law(logits_BV, settings.sampling_cfg)
    if settings.sampling_cfg.temperature == 0:
        drawn_B = law.draw(jnp.zeros((1,)))
    else:
        # The token drawn will stand behind the pending one.
        noise_BV = noise.gumbel(
            rows.keys, lengths_B + 1, settings.cfg.vocab_size, settings.kernels
        )
        drawn_B = law.draw(noise_BV, kernels=settings.kernels)
    # Rows that ride along append nothing: their count is 0.
    cache = kv_cache.append(
        state.cache,
        out.keys,
        out.values,
        rows.page_table,
        after(drawn_B, lengths_B),
        alive_B.astype(jnp.int32),
        features=kept_features(out, settings),
        routes=kept_routes(out, settings),
    )
    # All live rows have drawn equally many tokens: a column of the result is a step.
    column = emitted.num_steps
    lengths_B = lengths_B + alive_B
    counts_B = lengths_B - rows.lengths
    ended_B = alive_B & is_any(drawn_B, settings.eos_ids)
    logprobs_B = jnp.where(alive_B, law.logprob_of(drawn_B), 0.0)
    return _State(
        cache=cache,
        lengths=lengths_B,
        pending=jnp.where(alive_B, drawn_B, state.pending),
        alive=alive_B & ~ended_B & (counts_B < rows.remaining),
        emitted=Emitted(
            tokens=_put(emitted.tokens, column, jnp.where(alive_B, drawn_B, 0)),
            logprobs=_put(emitted.logprobs, column, logprobs_B),
            counts=counts_B,
            ended=emitted.ended | ended_B,
            num_steps=column + 1,
        ),
    )


def forward(
    params: model_params.Params,
    cache: kv_cache.PagedCache,
    page_table: Array,
    lengths: Array,
    tokens: Array,
    positions: Array,
    visible: attention.Visibility | None = None,
    ragged_rows: ragged.Ragged | None = None,
    *,
    settings: Settings,
) -> transformer.Output:
    """Read tokens behind what the cache holds of each row; the cache stays as it is.

    All in int32: `page_table [B, max_pages]`; `lengths [B]`, cached positions; `tokens`
    and `positions`, `[B, T]`, or `[1, N]` where `ragged_rows` say which are whose.
    `visible` says which of a row's tokens see each other; None: each those before it.
    `settings` name the features that are wanted.
    """
    return transformer.forward(
        params,
        settings.cfg,
        tokens,
        positions,
        visible,
        kv_cache.CacheView(cache, page_table, lengths),
        ragged_rows,
        dtype=jnp.dtype(settings.dtype),
        kernels=settings.kernels,
        features=settings.feature_layers or (),
    )


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
    settings: Settings,
) -> kv_cache.PagedCache:
    """Append a chunk of each row's prompt to the cache, which is returned: donate it.

    T and `lengths` are multiples of the page size, `counts [B] int32` the valid tokens
    of each row's chunk; padding holds zeros. See `forward` for the arguments.
    """
    positions_BT = lengths[:, None] + jnp.arange(tokens.shape[1])
    out = forward(
        params, cache, page_table, lengths, tokens, positions_BT, settings=settings
    )
    return kv_cache.append_pages(
        cache,
        out.keys,
        out.values,
        page_table,
        lengths,
        counts,
        features=kept_features(out, settings),
        routes=kept_routes(out, settings),
    )


def kept_features(out: transformer.Output, settings: Settings) -> Array | None:
    """Return what the cache keeps of a forward's features, `[F, B, T]` or None.

    Those that a drafter reads come first.
    """
    if settings.feature_layers is None:
        return None
    features_FBT = transformer.drafter_features(out)
    if settings.keep_hidden and settings.feature_layers:
        features_FBT = jnp.concatenate([features_FBT, out.hidden])
    # Lest the forward be split as their pages are.
    return settings.kernels.whole(features_FBT)


def kept_routes(out: transformer.Output, settings: Settings) -> Array | None:
    """Return what the cache keeps of a forward's routes, `[L, C, B, T]` or None."""
    return out.routing.routes if settings.keep_routes else None


def _put(buffer: Array, column: Array, values: Array) -> Array:
    return lax.dynamic_update_slice_in_dim(
        buffer, values.astype(buffer.dtype)[:, None], column, axis=1
    )


def donated(
    fn: Callable, cache_sharding=None, result_sharding=None
) -> jax.stages.Wrapped:
    """Jit `decode` or `prefill` (bound to its settings), donating the cache.

    The shardings are of the cache that `fn` returns, and of the result beside it, if
    any.
    """
    out = cache_sharding
    if result_sharding is not None:
        out = (cache_sharding, result_sharding)
    return jax.jit(fn, donate_argnums=(1,), out_shardings=out)
