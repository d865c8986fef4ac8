"""Speculative decoding as one device program of many steps.

A step proposes a tree behind each row's pending token, has the target read it in one
pass, walks it by the target's own draws and appends the accepted path to the cache.
Nothing is rolled back, and the tokens are those of `decode`, whatever was proposed: a
bad proposer costs speed only. The chain rules, offered for comparison, keep its law and
not its tokens (`chain`).
"""

import dataclasses

import jax.numpy as jnp
from flax import struct
from jax import lax

from tlt_jax.models import attention, kv_cache, transformer
from tlt_jax.models import config as model_config
from tlt_jax.models import kernels as kernels_lib
from tlt_jax.models import params as model_params
from tlt_jax.models.drafters import drafter
from tlt_jax.specdec import candidates as candidates_lib
from tlt_jax.specdec import chain, decode, noise, sampling, verify
from tlt_jax.specdec import strategy as strategy_lib
from tlt_jax.specdec import tree as tree_lib
from tlt_jax.specdec.proposers import learned, ngram
from tlt_jax.types import Array


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a program is compiled for, beside the shapes of its arguments.

    Attributes:
      cfg: the target.
      strategy: the tree.
      sampling_cfg: the law.
      eos_ids: tokens that end a text; they are kept.
      max_tokens: width of the result.
      drafter_cfg: the learned drafter, or None: suffix matches alone.
      ranking: `coupled` or `deterministic`; at temperature 0 there is no noise, and
        both are the same. Chain rules have sampled drafts, whatever stands here.
      rule: of acceptance, one of `chain.RULES`; what a chain rule asks of strategy and
        law, `chain.check` says.
      keep_hidden: see `decode.decode`.
      dtype: of activations.
      kernels: see `transformer.forward`.
    """

    cfg: model_config.ModelConfig
    strategy: strategy_lib.Strategy
    sampling_cfg: sampling.SamplingConfig
    eos_ids: tuple[int, ...]
    max_tokens: int
    drafter_cfg: drafter.DrafterConfig | None = None
    ranking: str = "coupled"
    rule: str = chain.KEYED
    keep_hidden: bool = False
    dtype: str = "float32"
    kernels: kernels_lib.Kernels = kernels_lib.PORTABLE

    @property
    def coupled(self) -> bool:
        """Whether candidates are ranked by the noise of their positions."""
        return self.ranking == "coupled" and self.sampling_cfg.temperature > 0

    @property
    def keyed(self) -> bool:
        """Whether the target draws with the noise of positions."""
        return self.rule == chain.KEYED


@struct.dataclass
class Caches:
    """The pages of target and drafter, under one page table.

    Attributes:
      target: keys and values, and features where there is a drafter.
      drafter: the one layer's keys and values, or None.
    """

    target: kv_cache.PagedCache
    drafter: kv_cache.PagedCache | None


@struct.dataclass
class Draft:
    """The learned drafter, and how far it is with each row.

    Attributes:
      weights: what it computes with.
      tau, sharpness: float32 scalars, see `learned.draft`.
      lengths: `[B] int32`, positions in its cache, 1 to A fewer than in the target's.
      tokens: `[B, A] int32`, of positions `lengths + 1` on: the rest of the text.
    """

    weights: learned.DrafterWeights
    tau: Array
    sharpness: Array
    lengths: Array
    tokens: Array


@struct.dataclass
class Matching:
    """Texts to be searched for the rows' ends.

    Attributes:
      corpus: the texts; row b's own is text b.
      sources: `[B, M] int32`, texts that each row may search.
      outcomes: `[n + 1, 2] float32`, see `ngram.update_acceptance`.
    """

    corpus: ngram.Corpus
    sources: Array
    outcomes: Array


@struct.dataclass
class Speculated:
    """What a call of speculative decoding did.

    Attributes:
      emitted: tokens, as of plain decoding.
      num_accepted: `[A] int32`: how often, over live rows and steps, at least d drafted
        tokens were accepted; entry 0 counts the row-steps.
      was_drafted: `[B, max_tokens] bool`: the token had been drafted, and accepted.
      draft_lengths: `[B] int32`, positions in the drafter's cache now, or None.
      outcomes: what became of suffix matches, added to what was given; or None.
    """

    emitted: decode.Emitted
    num_accepted: Array
    was_drafted: Array
    draft_lengths: Array | None
    outcomes: Array | None


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
    caches: Caches
    lengths: Array
    pending: Array
    alive: Array
    accepted: learned.Accepted | None
    matching: Matching | None
    emitted: decode.Emitted
    num_accepted: Array
    was_drafted: Array


def run(
    params: model_params.Params,
    caches: Caches,
    rows: decode.Rows,
    draft: Draft | None,
    matching: Matching | None,
    token_limit: Array,
    finish_quota: Array,
    *,
    settings: Settings,
) -> tuple[Caches, Speculated]:
    """Decode until a row has drawn `token_limit` tokens, or enough rows finished.

    Args:
      params: the target.
      caches: donate them.
      rows: the batch.
      draft: the learned drafter, if the strategy asks it.
      matching: texts to search, if the strategy does.
      token_limit: int32 scalar, at most `settings.max_tokens`; no row draws more.
      finish_quota: int32 scalar; return once this many rows finished in the call.
      settings: what is compiled in.

    Returns:
      The caches, and what was drawn.
    """
    num_alive = jnp.sum(rows.remaining > 0)

    def keep_on(state):
        still = jnp.sum(state.alive)
        going = (still > 0) & (num_alive - still < finish_quota)
        return going & (jnp.max(state.emitted.counts) < token_limit)

    def step(state):
        return _step(params, state, rows, draft, token_limit, settings)[0]

    start = _begin(caches, rows, draft, matching, settings)
    state = lax.while_loop(keep_on, step, start)
    return state.caches, _result(state)


def run_step(
    params: model_params.Params,
    caches: Caches,
    rows: decode.Rows,
    draft: Draft | None,
    matching: Matching | None,
    *,
    settings: Settings,
) -> tuple[Caches, Step]:
    """Take one step of `run`, keyed and at a temperature above 0, and show it."""
    assert settings.keyed and settings.sampling_cfg.temperature > 0, settings
    start, limit = _begin(caches, rows, draft, matching, settings), settings.max_tokens
    state, chance, read = _step(params, start, rows, draft, limit, settings)
    laws = read.law.logprobs()
    return state.caches, Step(read.tree, laws, chance, read.walk, _result(state))


def _begin(caches, rows, draft, matching, settings) -> _State:
    batch, most = rows.lengths.shape[0], settings.strategy.max_accept_length
    return _State(
        caches=caches,
        lengths=rows.lengths,
        pending=rows.pending,
        alive=rows.remaining > 0,
        accepted=_behind(caches, rows, draft, settings.drafter_cfg)
        if settings.strategy.drafts
        else None,
        matching=matching if settings.strategy.matches else None,
        emitted=decode.nothing(batch, settings.max_tokens),
        num_accepted=jnp.zeros((most,), jnp.int32),
        was_drafted=jnp.zeros((batch, settings.max_tokens), bool),
    )


def _step(params, state, rows, draft, token_limit, settings):
    """Propose, verify, keep; second and third the noise and what was read."""
    chance = _chance(rows.keys, state.lengths, settings)
    candidates, proposed = _propose(state, rows, draft, chance, settings)
    read = _verify(params, state, rows, candidates, proposed, chance, settings)
    state = _advance(state, rows, candidates, proposed, read, token_limit, settings)
    return state, chance, read


def _result(state: _State) -> Speculated:
    return Speculated(
        emitted=state.emitted,
        num_accepted=state.num_accepted,
        was_drafted=state.was_drafted,
        draft_lengths=None if state.accepted is None else state.accepted.start,
        outcomes=None if state.matching is None else state.matching.outcomes,
    )


def _behind(
    caches: Caches,
    rows: decode.Rows,
    draft: Draft,
    drafter_cfg: drafter.DrafterConfig,
) -> learned.Accepted:
    """What the drafter has still to take in when a call begins."""
    behind = rows.lengths - draft.lengths
    most = draft.tokens.shape[1]
    features = kv_cache.read_features(
        caches.target, rows.page_table, draft.lengths, most
    )[: drafter_cfg.num_read]
    return learned.Accepted(
        tokens=draft.tokens,
        # Slots that were never written may hold anything.
        features=jnp.where(jnp.arange(most) < behind[:, None], features, 0),
        start=draft.lengths,
        # A text of one token has no cached position to draft from: a zero feature.
        counts=jnp.maximum(behind, 1),
    )


def _chance(keys, lengths, settings) -> Array | chain.Chance:
    """A step's noise: of the next A positions, `[B, A, V]`; none if greedy.

    For chain rules: what they need.
    """
    batch, num = lengths.shape[0], settings.strategy.max_accept_length
    if not settings.keyed:
        return chain.chance(keys, lengths, num - 1, settings.cfg.vocab_size)
    if settings.sampling_cfg.temperature == 0:
        return jnp.zeros((batch, num, 1), jnp.float32)
    positions = lengths[:, None] + 1 + jnp.arange(num)
    keys, vocab_size = jnp.repeat(keys, num, axis=0), settings.cfg.vocab_size
    drawn = noise.gumbel(keys, positions.reshape(-1), vocab_size, settings.kernels)
    return drawn.reshape(batch, num, vocab_size)


@struct.dataclass
class _Proposed:
    """What a step's proposers leave behind.

    Attributes:
      keys, values: `[K, H, B, A]` for the drafter's cache, or None.
      matched: candidates of suffix matches alone, or None.
      match_lengths: `[B, C'] int32` of those.
      draft_probs: `[B, A - 1, V]`, laws that a chain was sampled from, or None.
    """

    keys: Array | None = None
    values: Array | None = None
    matched: candidates_lib.Candidates | None = None
    match_lengths: Array | None = None
    draft_probs: Array | None = None


def _propose(
    state, rows, draft, chance, settings
) -> tuple[candidates_lib.Candidates, _Proposed]:
    strategy = settings.strategy
    drafted = matched = keys = values = match_lengths = draft_probs = None
    if strategy.drafts:
        if settings.keyed:
            gumbel = chance if settings.coupled else None
            tau, sharpness = draft.tau, draft.sharpness
        else:
            gumbel, tau, sharpness = chance.draft, 1.0, 1.0
        made = learned.draft(
            draft.weights,
            state.caches.drafter,
            rows.page_table,
            state.accepted,
            gumbel,
            tau,
            sharpness,
            cfg=settings.drafter_cfg,
            strategy=strategy,
            temperature=settings.sampling_cfg.temperature,
            keep_laws=not settings.keyed,
            dtype=jnp.dtype(settings.dtype),
            kernels=settings.kernels,
        )
        drafted, keys, values = made.candidates, made.keys, made.values
        if not settings.keyed:
            draft_probs = chain.whole_laws(
                made.probs, draft.weights.params.draft_ids, settings.cfg.vocab_size
            )
    if strategy.matches:
        matched, match_lengths = ngram.propose(
            state.matching.corpus,
            state.matching.sources,
            ngram.acceptance_of(state.matching.outcomes),
            draft_depth=strategy.draft_depth,
            num_chains=strategy.topk,
        )
    if drafted is None or matched is None:
        candidates = matched if drafted is None else drafted
    else:
        candidates = candidates_lib.combine(drafted, matched)
    proposed = _Proposed(keys, values, matched, match_lengths, draft_probs)
    return candidates, proposed


@struct.dataclass
class _Read:
    """What the target made of the trees: its pass, its laws, and the walk."""

    tree: tree_lib.DraftTree
    law: sampling.Law
    out: transformer.Output
    walk: verify.Walk
    logprobs: Array  # [B, A], of the tokens walked


def _verify(params, state, rows, candidates, proposed, chance, settings) -> _Read:
    strategy = settings.strategy
    tree = tree_lib.select(candidates, state.pending, strategy.tokens_to_verify)
    words = tree_lib.ancestor_words(tree, strategy.draft_depth)
    mask = tree_lib.unpack_words(words, strategy.tokens_to_verify)
    keeps = settings.drafter_cfg is not None
    out = transformer.forward(
        params,
        settings.cfg,
        tree.tokens,
        state.lengths[:, None] + tree.depths,
        attention.Visibility(ancestors=mask, words=words),
        transformer.CacheView(state.caches.target, rows.page_table, state.lengths),
        dtype=jnp.dtype(settings.dtype),
        kernels=settings.kernels,
        features=settings.drafter_cfg.feature_layers if keeps else (),
    )
    logits = transformer.logits(params, out.hidden, settings.kernels)
    law = sampling.law(logits, settings.sampling_cfg)
    if settings.keyed:
        drawn = verify.draw(law, chance, tree, settings.kernels)
        walk = verify.walk(tree, drawn, strategy.max_accept_length)
    else:
        walk = chain.judge(settings.rule, law, tree, proposed.draft_probs, chance)
        # In a chain depth and node are one.
        drawn = walk.tokens
    logprobs = jnp.take_along_axis(law.logprob_of(drawn), walk.path, axis=1)
    return _Read(tree, law, out, walk, logprobs)


def _advance(state, rows, candidates, proposed, read, token_limit, settings) -> _State:
    """Keep what was accepted: tokens, cache columns, the proposers' state."""
    walk, emitted, alive = read.walk, state.emitted, state.alive
    batch, most = walk.tokens.shape
    steps = jnp.arange(most)
    room = jnp.minimum(rows.remaining, token_limit) - emitted.counts
    count = jnp.minimum(walk.num_accepted + 1, room)
    is_eos = decode.is_any(walk.tokens, settings.eos_ids) & (steps < count[:, None])
    first_eos = jnp.min(jnp.where(is_eos, steps, most), axis=1)
    count = jnp.where(alive, jnp.minimum(count, first_eos + 1), 0)
    ended = alive & (first_eos < most)

    layers = settings.drafter_cfg.feature_layers if settings.drafter_cfg else None
    features = decode.kept_features(read.out, layers, settings.keep_hidden)
    target = kv_cache.append(
        state.caches.target,
        read.out.keys,
        read.out.values,
        rows.page_table,
        decode.after(walk.tokens, state.lengths),
        count,
        features=features,
        sources=walk.path,
    )
    caches, accepted = state.caches.replace(target=target), None
    if state.accepted is not None:
        caches = caches.replace(drafter=_taken_in(state, rows, proposed, walk))
        # In a row that rides along nothing changes.
        accepted = learned.Accepted(
            tokens=jnp.where(alive[:, None], walk.tokens, state.accepted.tokens),
            features=jnp.where(
                alive[:, None],
                jnp.take_along_axis(
                    features[: settings.drafter_cfg.num_read], walk.path[None], axis=2
                ),
                state.accepted.features,
            ),
            start=jnp.where(alive, state.lengths, state.accepted.start),
            counts=jnp.where(alive, jnp.maximum(count, 1), state.accepted.counts),
        )
    matching = state.matching
    if matching is not None:
        matching = _learned(matching, proposed, walk, count)

    columns = emitted.counts[:, None] + steps
    columns = jnp.where(steps < count[:, None], columns, settings.max_tokens)
    row = jnp.arange(batch)[:, None]
    emitted = decode.Emitted(
        tokens=emitted.tokens.at[row, columns].set(walk.tokens, mode="drop"),
        logprobs=emitted.logprobs.at[row, columns].set(read.logprobs, mode="drop"),
        counts=emitted.counts + count,
        ended=emitted.ended | ended,
        num_steps=emitted.num_steps + 1,
    )
    last = jnp.maximum(count - 1, 0)[:, None]
    drawn_last = jnp.take_along_axis(walk.tokens, last, axis=1)[:, 0]
    reached = (walk.num_accepted[:, None] >= steps) & alive[:, None]
    was_drafted = steps < walk.num_accepted[:, None]
    return _State(
        caches=caches,
        lengths=state.lengths + count,
        pending=jnp.where(alive, drawn_last, state.pending),
        alive=alive & ~ended & (emitted.counts < rows.remaining),
        accepted=accepted,
        matching=matching,
        emitted=emitted,
        num_accepted=state.num_accepted + jnp.sum(reached, axis=0),
        was_drafted=state.was_drafted.at[row, columns].set(was_drafted, mode="drop"),
    )


def _taken_in(state, rows, proposed, walk) -> kv_cache.PagedCache:
    """The drafter's cache with what it took in at the beginning of the step."""
    return kv_cache.append(
        state.caches.drafter,
        (proposed.keys,),
        (proposed.values,),
        rows.page_table,
        decode.after(walk.tokens, state.accepted.start),
        jnp.where(state.alive, state.accepted.counts, 0),
    )


def _learned(matching, proposed, walk, count) -> Matching:
    """The texts with what was drawn, and what became of the matches."""
    accepted, tried = candidates_lib.judge(proposed.matched, walk.tokens, count)
    return matching.replace(
        corpus=ngram.extend(matching.corpus, walk.tokens, count),
        outcomes=ngram.update_acceptance(
            matching.outcomes, proposed.match_lengths, accepted, tried
        ),
    )
