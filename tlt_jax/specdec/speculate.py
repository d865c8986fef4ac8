"""Speculative decoding as one device program of many steps.

A step drafts a tree behind each row's pending token, has the target read it in one
pass, walks it by the target's own draws and appends the accepted path to the cache.
Nothing is rolled back, and the tokens are those of `decode`, whatever was drafted: a
bad drafter costs speed only.
"""

import jax.numpy as jnp
from flax import struct
from jax import lax

from tlt_jax.models import attention, drafter, kv_cache, transformer
from tlt_jax.models import config as model_config
from tlt_jax.models import params as model_params
from tlt_jax.specdec import decode, noise, propose, sampling, verify
from tlt_jax.specdec import strategy as strategy_lib
from tlt_jax.specdec import tree as tree_lib
from tlt_jax.types import Array


@struct.dataclass
class Caches:
    """The pages of target and drafter, under one page table.

    Attributes:
      target: keys, values and features.
      drafter: the one layer's keys and values.
    """

    target: kv_cache.PagedCache
    drafter: kv_cache.PagedCache


@struct.dataclass
class Draft:
    """How far the drafter is with each row.

    Attributes:
      lengths: `[B] int32`, positions in its cache, 1 to A fewer than in the target's.
      tokens: `[B, A] int32`, of positions `lengths + 1` on: the rest of the text.
    """

    lengths: Array
    tokens: Array


@struct.dataclass
class Speculated:
    """What a call of speculative decoding did.

    Attributes:
      emitted: tokens, as of plain decoding.
      draft_lengths: `[B] int32`, positions in the drafter's cache now.
      num_accepted: `[A] int32`: how often, over live rows and steps, at least d drafted
        tokens were accepted; entry 0 counts the row-steps.
    """

    emitted: decode.Emitted
    draft_lengths: Array
    num_accepted: Array


@struct.dataclass
class _State:
    caches: Caches
    lengths: Array
    pending: Array
    alive: Array
    accepted: propose.Accepted
    result: Speculated


def run(
    params: model_params.Params,
    weights: propose.DrafterWeights,
    caches: Caches,
    rows: decode.Rows,
    draft: Draft,
    tau: Array,
    token_limit: Array,
    finish_quota: Array,
    *,
    cfg: model_config.ModelConfig,
    drafter_cfg: drafter.DrafterConfig,
    strategy: strategy_lib.Strategy,
    sampling_cfg: sampling.SamplingConfig,
    eos_ids: tuple[int, ...],
    max_tokens: int,
    ranking: str = "coupled",
    dtype=jnp.float32,
    kernels: str = "xla",
) -> tuple[Caches, Speculated]:
    """Decode until a row has drawn `token_limit` tokens, or enough rows finished.

    Args:
      params: the target.
      weights: the drafter.
      caches: donate them.
      rows: the batch.
      draft: the drafter's part of it.
      tau: float32 scalar, see `propose.draft`.
      token_limit: int32 scalar, at most `max_tokens`; no row draws more.
      finish_quota: int32 scalar; return once this many rows finished in the call.
      cfg: the target.
      drafter_cfg: the drafter.
      strategy: the tree.
      sampling_cfg: the law.
      eos_ids: tokens that end a text; they are kept.
      max_tokens: width of the result.
      ranking: `coupled` or `deterministic`; at temperature 0 there is no noise, and
        both are the same.
      dtype: of activations.
      kernels: see `transformer.forward`.

    Returns:
      The caches, and what was drawn.
    """
    batch = rows.lengths.shape[0]
    most = strategy.max_accept_length
    num_alive = jnp.sum(rows.remaining > 0)
    steps = jnp.arange(most)
    coupled = ranking == "coupled" and sampling_cfg.temperature > 0
    behind = rows.lengths - draft.lengths
    features = kv_cache.read_features(
        caches.target, rows.page_table, draft.lengths, most
    )
    # Slots that were never written may hold anything.
    features = jnp.where(steps < behind[:, None], features, 0)
    start = _State(
        caches=caches,
        lengths=rows.lengths,
        pending=rows.pending,
        alive=rows.remaining > 0,
        accepted=propose.Accepted(
            tokens=draft.tokens,
            features=features,
            start=draft.lengths,
            # A text of one token has no cached position to draft from: a zero feature.
            counts=jnp.maximum(behind, 1),
        ),
        result=Speculated(
            emitted=decode.Emitted(
                tokens=jnp.zeros((batch, max_tokens), jnp.int32),
                logprobs=jnp.zeros((batch, max_tokens), jnp.float32),
                counts=jnp.zeros((batch,), jnp.int32),
                ended=jnp.zeros((batch,), bool),
                num_steps=jnp.int32(0),
            ),
            draft_lengths=draft.lengths,
            num_accepted=jnp.zeros((most,), jnp.int32),
        ),
    )

    def keep_on(state):
        still = jnp.sum(state.alive)
        return (
            (jnp.max(state.result.emitted.counts) < token_limit)
            & (still > 0)
            & (num_alive - still < finish_quota)
        )

    def step(state):
        gumbel = _noise(rows.keys, state.lengths, most, cfg.vocab_size, sampling_cfg)
        candidates, draft_keys, draft_values = propose.draft(
            weights,
            state.caches.drafter,
            rows.page_table,
            state.accepted,
            gumbel if coupled else None,
            tau,
            cfg=drafter_cfg,
            strategy=strategy,
            temperature=sampling_cfg.temperature,
            dtype=dtype,
            kernels=kernels,
        )
        tree = tree_lib.select(candidates, state.pending, strategy.tokens_to_verify)
        words = tree_lib.ancestor_words(tree, strategy.draft_depth)
        out = transformer.forward(
            params,
            cfg,
            tree.tokens,
            state.lengths[:, None] + tree.depths,
            attention.Visibility(
                ancestors=tree_lib.unpack_words(words, strategy.tokens_to_verify)
            ),
            transformer.CacheView(state.caches.target, rows.page_table, state.lengths),
            dtype=dtype,
            kernels=kernels,
            features=drafter_cfg.feature_layers,
        )
        law = sampling.law(
            transformer.logits(params, out.hidden, kernels), sampling_cfg
        )
        drawn = verify.draw(law, gumbel, tree)
        walk = verify.walk(tree, drawn, most)
        logprobs = jnp.take_along_axis(law.logprob_of(drawn), walk.path, axis=1)

        emitted = state.result.emitted
        room = jnp.minimum(rows.remaining, token_limit) - emitted.counts
        count = jnp.minimum(walk.num_accepted + 1, room)
        is_eos = decode.is_any(walk.tokens, eos_ids) & (steps < count[:, None])
        first_eos = jnp.min(jnp.where(is_eos, steps, most), axis=1)
        count = jnp.where(state.alive, jnp.minimum(count, first_eos + 1), 0)
        ended = state.alive & (first_eos < most)

        features = transformer.drafter_features(out)
        caches = Caches(
            target=kv_cache.append(
                state.caches.target,
                out.keys,
                out.values,
                rows.page_table,
                decode.after(drawn, state.lengths),
                count,
                features=features,
                sources=walk.path,
            ),
            drafter=kv_cache.append(
                state.caches.drafter,
                (draft_keys,),
                (draft_values,),
                rows.page_table,
                decode.after(drawn, state.accepted.start),
                jnp.where(state.alive, state.accepted.counts, 0),
            ),
        )
        columns = jnp.where(
            steps < count[:, None], emitted.counts[:, None] + steps, max_tokens
        )
        row = jnp.arange(batch)[:, None]
        emitted = decode.Emitted(
            tokens=emitted.tokens.at[row, columns].set(walk.tokens, mode="drop"),
            logprobs=emitted.logprobs.at[row, columns].set(logprobs, mode="drop"),
            counts=emitted.counts + count,
            ended=emitted.ended | ended,
            num_steps=emitted.num_steps + 1,
        )
        last = jnp.maximum(count - 1, 0)[:, None]
        drawn_last = jnp.take_along_axis(walk.tokens, last, axis=1)[:, 0]
        # In a row that rides along nothing changes.
        went_on = state.alive
        accepted = propose.Accepted(
            tokens=jnp.where(went_on[:, None], walk.tokens, state.accepted.tokens),
            features=jnp.where(
                went_on[:, None],
                jnp.take_along_axis(features, walk.path[None], axis=2),
                state.accepted.features,
            ),
            start=jnp.where(went_on, state.lengths, state.accepted.start),
            counts=jnp.where(went_on, jnp.maximum(count, 1), state.accepted.counts),
        )
        reached = (walk.num_accepted[:, None] >= steps) & went_on[:, None]
        return _State(
            caches=caches,
            lengths=state.lengths + count,
            pending=jnp.where(went_on, drawn_last, state.pending),
            alive=went_on & ~ended & (emitted.counts < rows.remaining),
            accepted=accepted,
            result=Speculated(
                emitted=emitted,
                draft_lengths=accepted.start,
                num_accepted=state.result.num_accepted + jnp.sum(reached, axis=0),
            ),
        )

    state = lax.while_loop(keep_on, step, start)
    return state.caches, state.result


def _noise(keys, lengths, num, vocab_size, sampling_cfg) -> Array:
    """Noise of the next `num` positions of each row, `[B, num, V]`; greedily, none."""
    batch = lengths.shape[0]
    if sampling_cfg.temperature == 0:
        return jnp.zeros((batch, num, 1), jnp.float32)
    positions = lengths[:, None] + 1 + jnp.arange(num)
    drawn = noise.gumbel(
        jnp.repeat(keys, num, axis=0), positions.reshape(-1), vocab_size
    )
    return drawn.reshape(batch, num, vocab_size)
