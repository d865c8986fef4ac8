"""Speculative decoding as one device program of many steps.

A step proposes a tree behind each row's pending token, has the target read it in one
pass, walks it by the rule's judgement and appends the accepted path to the cache.
Nothing is rolled back, and by the keyed rule the tokens are those of `decode`, whatever
was proposed: a bad proposer costs speed only. The rules for sampled drafts, offered for
comparison, keep its law and not its tokens (`chain`).
"""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from tlt_jax.models import attention, kv_cache, ragged, transformer
from tlt_jax.models import params as model_params
from tlt_jax.specdec import decode, protocols, rooms, sampling, verify
from tlt_jax.specdec import tree as tree_lib
from tlt_jax.types import Array


@struct.dataclass
class Speculated:
    """What a call of speculative decoding did.

    Attributes:
      emitted: tokens, as of plain decoding.
      num_accepted: `[A] int32`: how often, over live rows and steps, at least d drafted
        tokens were accepted; entry 0 counts the row-steps.
      was_drafted: `[B, max_tokens] bool`: the token had been drafted, and accepted.
      reliability: `[3, 10] float32`, see `verify.reliability`, over all steps.
      accepted_by_room: `[A, R] int32`, see `rooms.accepted_by_room`, the same.
      progress: what the proposer tells the host, see `protocols.Proposer.finish`.
    """

    emitted: decode.Emitted
    num_accepted: Array
    was_drafted: Array
    reliability: Array
    accepted_by_room: Array
    progress: Any


def plain(emitted: decode.Emitted) -> Speculated:
    """Describe a call of plain decoding as one that speculated in no step."""
    return Speculated(
        emitted=emitted,
        num_accepted=np.zeros((0,), np.int32),
        was_drafted=np.zeros(emitted.tokens.shape, bool),
        reliability=np.zeros((3, verify.NUM_TENTHS), np.float32),
        accepted_by_room=np.zeros((0, len(rooms.ROOMS)), np.int32),
        progress=(),
    )


@struct.dataclass
class Step:
    """One step with all that it saw.

    Attributes:
      tree: what the target read.
      logprobs: `[B, W, V] float32`, its law behind every node.
      noise: `[B, A, V] float32`, of the tokens behind depths 0 to A - 1.
      walk: the path that its draws took.
      result: as of a call.
    """

    tree: tree_lib.DraftTree
    logprobs: Array
    noise: Array
    walk: verify.Walk
    result: Speculated


@struct.dataclass
class _State:
    """What a step changes."""

    target: kv_cache.PagedCache
    proposer: Any
    lengths: Array  # [B]
    pending: Array  # [B]
    alive: Array  # [B]
    emitted: decode.Emitted
    num_accepted: Array  # [A]
    was_drafted: Array  # [B, max_tokens]
    reliability: Array  # [3, 10]
    accepted_by_room: Array  # [A, R]


def run(
    params: model_params.Params,
    caches: protocols.Caches,
    rows: decode.Rows,
    inputs: Any,
    token_limit: Array,
    finish_quota: Array,
    *,
    proposer: protocols.Proposer,
    rule: protocols.Rule,
    settings: decode.Settings,
) -> tuple[protocols.Caches, Speculated]:
    """Decode until a row has drawn `token_limit` tokens, or enough rows finished.

    Both limits are int32 scalars: `token_limit`, which no row exceeds, is at most
    `settings.max_tokens`; `finish_quota` is how many finished rows are enough.
    Donate the caches; `inputs` are the proposer's, of this call. What a chain rule asks
    of the others, `chain.check` says.
    """
    num_alive = jnp.sum(rows.remaining > 0)

    def keep_on(state):
        going = decode.goes_on(state.alive, num_alive, finish_quota)
        return going & (jnp.max(state.emitted.counts) < token_limit)

    step = functools.partial(
        *(_step, params, rows, inputs, token_limit, proposer, rule, settings)
    )
    start = _begin(caches, rows, inputs, proposer, settings)
    state = lax.while_loop(keep_on, lambda state: step(state)[0], start)
    return _end(state, caches, proposer)


def run_step(
    params: model_params.Params,
    caches: protocols.Caches,
    rows: decode.Rows,
    inputs: Any,
    *,
    proposer: protocols.Proposer,
    settings: decode.Settings,
) -> tuple[protocols.Caches, Step]:
    """Take one step of `run`, keyed and at a temperature above 0, and show it.

    Its rows do not share a budget.
    """
    assert settings.sampling_cfg.temperature > 0, settings
    start, rule = _begin(caches, rows, inputs, proposer, settings), verify.Keyed()
    limit = settings.max_tokens
    state, (chance, tree, law, walk) = _step(
        params, rows, inputs, limit, proposer, rule, settings, start
    )
    caches, result = _end(state, caches, proposer)
    assert not proposer.strategy.shares(rows.pending.shape[0]), proposer.strategy
    return caches, Step(tree, law.logprobs(), chance.draft, walk, result)


def _begin(caches, rows, inputs, proposer, settings) -> _State:
    batch, most = rows.lengths.shape[0], proposer.strategy.max_accept_length
    return _State(
        target=caches.target,
        proposer=proposer.init(inputs, caches, rows),
        lengths=rows.lengths,
        pending=rows.pending,
        alive=rows.remaining > 0,
        emitted=decode.nothing(batch, settings.max_tokens),
        num_accepted=jnp.zeros((most,), jnp.int32),
        was_drafted=jnp.zeros((batch, settings.max_tokens), bool),
        reliability=jnp.zeros((3, verify.NUM_TENTHS), jnp.float32),
        accepted_by_room=jnp.zeros((most, len(rooms.ROOMS)), jnp.int32),
    )


def _end(state: _State, caches, proposer) -> tuple[protocols.Caches, Speculated]:
    caches, progress = proposer.finish(
        state.proposer, caches.replace(target=state.target)
    )
    by_room, strategy = state.accepted_by_room, proposer.strategy
    if _is_one_chain(strategy, state.lengths.shape[0]):
        num_verified = strategy.num_columns(1) - 1
        by_room = rooms.of_chains(state.num_accepted, num_verified)
    return caches, Speculated(
        emitted=state.emitted,
        num_accepted=state.num_accepted,
        was_drafted=state.was_drafted,
        reliability=state.reliability,
        accepted_by_room=by_room,
        progress=progress,
    )


def _is_one_chain(strategy, num_rows) -> bool:
    """Whether what was accepted at each depth tells of every room already."""
    return num_rows == 1 and strategy.topk == 1 and strategy.proposer == "drafter"


def _step(
    params, rows, inputs, token_limit, proposer, rule, settings, state: _State
) -> tuple[_State, tuple]:
    """Propose, select, forward, judge, commit; second what it saw on its way."""
    rows = rows.replace(
        lengths=state.lengths,
        pending=state.pending,
        remaining=jnp.where(state.alive, rows.remaining, 0),
    )
    strategy = proposer.strategy
    most = strategy.max_accept_length
    chance = rule.chance(rows.keys, rows.lengths, most, settings)

    proposal = proposer.propose(inputs, state.proposer, rows, chance.draft)
    tree, ragged_rows = _select(proposal.candidates, rows, strategy)
    out = _forward(params, state.target, rows, tree, most, ragged_rows, settings)
    logits = transformer.logits(params, out.hidden, settings.kernels)
    law = sampling.law(logits, settings.sampling_cfg)
    walk, logprobs_BA = rule.judge(law, tree, proposal, chance, settings, ragged_rows)

    # Where the path's nodes stand among all columns that the target read.
    if ragged_rows is None:
        width = tree.tokens.shape[1]
        path_BA = walk.path + width * jnp.arange(walk.path.shape[0])[:, None]
    else:
        path_BA = ragged_rows.columns(walk.path)
    room_B = jnp.minimum(rows.remaining, token_limit) - state.emitted.counts
    counted = verify.reliability(tree, walk, state.alive)
    by_room = state.accepted_by_room
    if not _is_one_chain(strategy, rows.lengths.shape[0]):
        by_room = by_room + rooms.accepted_by_room(
            proposal.candidates, walk, state.alive, strategy
        )
    taken, ended_B = _take(walk, state.alive, room_B, out, path_BA, settings)
    state = _commit(state, rows, out, taken, ended_B, logprobs_BA, path_BA, settings)
    proposed = proposer.advance(inputs, state.proposer, rows, proposal, taken)
    counted = state.reliability + counted
    state = state.replace(
        proposer=proposed, reliability=counted, accepted_by_room=by_room
    )
    return state, (chance, tree, law, walk)


def _select(
    candidates, rows, strategy
) -> tuple[tree_lib.DraftTree, ragged.Ragged | None]:
    """Choose what the target reads; where rows share its columns, which are whose."""
    num_rows, width = rows.pending.shape[0], strategy.tokens_to_verify
    if not strategy.shares(num_rows):
        return tree_lib.select(candidates, rows.pending, width), None
    alive_B, budget = rows.remaining > 0, strategy.num_columns(num_rows)
    candidates = tree_lib.share(candidates, alive_B, width, budget)
    tree = tree_lib.select(candidates, rows.pending, width)
    counts_B = jnp.where(alive_B, jnp.sum(tree.valid, axis=1), 0)
    return tree, ragged.of_counts(counts_B, width, budget)


def _forward(params, target, rows, tree, most, ragged_rows, settings):
    """Have the target read every tree in one pass, `[..., B, W]` or `[..., 1, N]`."""
    # A node stands where it would if its path were the text, and sees that path alone.
    words = tree_lib.ancestor_words(tree, most - 1)
    mask_BWW = tree_lib.unpack_words(words, tree.tokens.shape[1])
    tokens, positions = tree.tokens, rows.lengths[:, None] + tree.depths
    if ragged_rows is not None:
        tokens, positions = map(ragged_rows.pack, (tokens, positions))
    return decode.forward(
        params,
        target,
        rows.page_table,
        rows.lengths,
        tokens,
        positions,
        attention.Visibility(ancestors=mask_BWW, words=words),
        ragged_rows,
        settings=settings,
    )


def _take(walk, alive, room, out, path, settings) -> tuple[protocols.Taken, Array]:
    """Cut each walk at its row's room and behind a token that ends the text.

    Second `[B] bool`, the rows whose text ended.
    """
    most = walk.tokens.shape[1]
    steps = jnp.arange(most)
    count_B = jnp.minimum(walk.num_accepted + 1, room)
    is_eos_BA = decode.is_any(walk.tokens, settings.eos_ids)
    is_eos_BA = is_eos_BA & (steps < count_B[:, None])
    first_eos_B = jnp.min(jnp.where(is_eos_BA, steps, most), axis=1)
    count_B = jnp.where(alive, jnp.minimum(count_B, first_eos_B + 1), 0)
    kept = decode.kept_features(out, settings)
    if kept is not None:
        kept = kept.reshape(kept.shape[0], -1)[:, path]
    taken = protocols.Taken(walk=walk, counts=count_B, alive=alive, features=kept)
    return taken, alive & (first_eos_B < most)


def _commit(state, rows, out, taken, ended, logprobs, path, settings) -> _State:
    """Keep what was taken: cache columns, tokens, counts."""
    walk, count_B, alive_B = taken.walk, taken.counts, taken.alive
    batch, most = walk.tokens.shape
    steps = jnp.arange(most)
    # Of the columns that the forward made, those along the path go into the pages.
    target = kv_cache.append(
        state.target,
        out.keys,
        out.values,
        rows.page_table,
        decode.after(walk.tokens, rows.lengths),
        count_B,
        features=decode.kept_features(out, settings),
        routes=decode.kept_routes(out, settings),
        sources=path,
    )
    # Rows draw differently many tokens: each writes behind what it had; the rest of
    # the walk goes beyond the result's width, where it is dropped.
    emitted = state.emitted
    columns_BA = emitted.counts[:, None] + steps
    columns_BA = jnp.where(steps < count_B[:, None], columns_BA, settings.max_tokens)
    row_B1 = jnp.arange(batch)[:, None]

    def put(result, values_BA):
        return result.at[row_B1, columns_BA].set(values_BA, mode="drop")

    was_drafted_BA = steps < walk.num_accepted[:, None]
    # Entry d counts the rows that accepted at least d tokens, whatever cut them after.
    reached_BA = (walk.num_accepted[:, None] >= steps) & alive_B[:, None]
    last_B1 = jnp.maximum(count_B - 1, 0)[:, None]
    drawn_last_B = jnp.take_along_axis(walk.tokens, last_B1, axis=1)[:, 0]
    counts_B = emitted.counts + count_B
    return state.replace(
        target=target,
        lengths=rows.lengths + count_B,
        pending=jnp.where(alive_B, drawn_last_B, rows.pending),
        alive=alive_B & ~ended & (counts_B < rows.remaining),
        emitted=decode.Emitted(
            tokens=put(emitted.tokens, walk.tokens),
            logprobs=put(emitted.logprobs, logprobs),
            counts=counts_B,
            ended=emitted.ended | ended,
            num_steps=emitted.num_steps + 1,
        ),
        num_accepted=state.num_accepted + jnp.sum(reached_BA, axis=0),
        was_drafted=put(state.was_drafted, was_drafted_BA),
    )
