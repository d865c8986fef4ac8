"""Guess a row's next tokens from texts that went on from the same words.

The end of the row's text is looked for in the row's own text, in its siblings' and in
finished answers to the same prompt; what followed there is proposed. All of it happens
on the device in fixed shapes, so that it runs inside a decode loop.

Reference: Saxena, Prompt Lookup Decoding, 2023; Fu et al., Break the Sequential
Dependency of LLM Inference Using Lookahead Decoding, 2024 (the n-gram pool).
"""

import dataclasses

import chex
import jax.numpy as jnp
from flax import struct
from jax import lax

from tlt_jax.specdec import candidates as candidates_lib
from tlt_jax.specdec import decode, protocols
from tlt_jax.specdec import strategy as strategy_lib
from tlt_jax.types import Array

_PADDING, _NOTHING = -1, -2
# Probabilities stay inside this, so that no candidate is absent for its score alone.
_LEAST_CHANCE = 1e-4
# Observations that the acceptance assumed beforehand weighs.
_PRIOR_WEIGHT = 8.0


@struct.dataclass
class Corpus:
    """The texts that may be searched.

    Attributes:
      texts: `[C, S] int32`; the first B are the live rows' texts, prompt included and
        the pending token last; the others do not change in a decode call. -1 from
        `lengths` on.
      lengths: `[C] int32`.
    """

    texts: Array
    lengths: Array


@struct.dataclass
class Matching:
    """What the host gives for a call, and what a step changes of it.

    Attributes:
      corpus: texts to be searched for the rows' ends; row b's own is text b.
      sources: `[B, M] int32`, texts that each row may search.
      outcomes: `[n + 1, 2] float32`, see `update_acceptance`.
    """

    corpus: Corpus
    sources: Array
    outcomes: Array


@dataclasses.dataclass(frozen=True)
class NGram(protocols.Proposer):
    """Proposes what followed similar places; needs no weights.

    A proposal's extra is the candidates' match lengths. What was drawn is added to the
    texts, and what became of the matches to the outcomes, which the host is told.

    Attributes:
      strategy: `topk` chains of `draft_depth` tokens.
    """

    strategy: strategy_lib.Strategy

    def init(
        self, inputs: Matching, caches: protocols.Caches, rows: decode.Rows
    ) -> Matching:
        return inputs

    def propose(
        self, inputs: Matching, state: Matching, rows: decode.Rows, noise: Array
    ) -> protocols.Proposal:
        found, match_lengths_BC = propose(
            state.corpus,
            state.sources,
            acceptance_of(state.outcomes),
            draft_depth=self.strategy.draft_depth,
            num_chains=self.strategy.topk,
        )
        return protocols.Proposal(found, extra=match_lengths_BC)

    def advance(
        self,
        inputs: Matching,
        state: Matching,
        rows: decode.Rows,
        proposal: protocols.Proposal,
        taken: protocols.Taken,
    ) -> Matching:
        tokens_BA, count_B = taken.walk.tokens, taken.counts
        accepted_BC, tried_BC = candidates_lib.judge(
            proposal.candidates, tokens_BA, count_B
        )
        return state.replace(
            corpus=extend(state.corpus, tokens_BA, count_B),
            outcomes=update_acceptance(
                state.outcomes, proposal.extra, accepted_BC, tried_BC
            ),
        )

    def finish(
        self, state: Matching, caches: protocols.Caches
    ) -> tuple[protocols.Caches, Array]:
        return caches, state.outcomes


def extend(corpus: Corpus, tokens: Array, counts: Array) -> Corpus:
    """Append the first `counts [B]` of `tokens [B, A]`, both int32, to the live rows.

    What has no room is dropped: such a row's guesses get worse, nothing else happens.
    """
    batch, num = tokens.shape
    width = corpus.texts.shape[1]
    place = corpus.lengths[:batch, None] + jnp.arange(num)
    place = jnp.where(jnp.arange(num) < counts[:, None], place, width)
    row = jnp.arange(batch)[:, None]
    lengths = jnp.minimum(corpus.lengths[:batch] + counts, width)
    return Corpus(
        texts=corpus.texts.at[row, place].set(tokens, mode="drop"),
        lengths=corpus.lengths.at[:batch].set(lengths),
    )


def propose(
    corpus: Corpus,
    sources: Array,
    acceptance: Array,
    *,
    draft_depth: int,
    num_chains: int,
) -> tuple[candidates_lib.Candidates, Array]:
    """Propose the continuations of the places that resemble a row's end most.

    A place resembles by the number of tokens before it that equal the row's last ones,
    at most n. Of equal places those in earlier sources go first, then those with more
    text behind them (up to `draft_depth`), then later ones. A place whose continuation
    is already part of the proposal is passed over. Continuations that begin alike
    share candidates.

    A candidate i levels below the root of a place with match length k has the match
    length min(k + i - 1, n) once its parent is accepted. `acceptance` of that is the
    probability that it is accepted unless a better child of its parent is; the score
    multiplies along the path, at each level with the chance that no better one is.

    Args:
      corpus: texts; row b of the batch is the text b.
      sources: `[B, M] int32`, texts that a row may search, the best first (its own,
        as a rule); -1: none.
      acceptance: `[n + 1] float32` by match length, see `acceptance_of`; the first
        entry is not used.
      draft_depth: longest continuation.
      num_chains: continuations, at most.

    Returns:
      Candidates with C = `num_chains * draft_depth`, and their match lengths
      `[B, C] int32`, 0 where absent. Rows that resemble nothing have none.

    Raises:
      ValueError: the places are too many to be ranked in 32 bits.
    """
    chex.assert_rank([corpus.texts, sources, acceptance], [2, 2, 1])
    (batch, num_sources), width = sources.shape, corpus.texts.shape[1]
    longest = acceptance.shape[0] - 1
    sizes = (longest + 1, num_sources, draft_depth + 1, width)
    if longest * num_sources * (draft_depth + 1) * width + width >= 2**31:
        raise ValueError(
            f"{num_sources} sources of {width} tokens, matches of up to {longest} and "
            f"draft_depth={draft_depth} give more places than 2**31: search fewer or "
            "shorter texts."
        )
    texts = _searched(corpus, sources, before=longest, after=draft_depth)
    lengths = jnp.where(sources >= 0, corpus.lengths[jnp.maximum(sources, 0)], 0)
    rank = _ranks(texts, lengths, _ends(corpus, batch, longest), sizes)
    chains, matches = [], []
    for chain in range(num_chains):
        best = jnp.max(rank, axis=(1, 2))
        match, source, _, place = _unrank(best, sizes)
        column = longest + place[:, None] + jnp.arange(draft_depth)
        row = jnp.arange(batch)[:, None]
        tokens = texts[row, source[:, None], column]
        chains.append(jnp.where(match[:, None] > 0, tokens, _PADDING))
        matches.append(match)
        if chain + 1 < num_chains:
            known = _begins(texts, tokens, longest, width)
            rank = lax.optimization_barrier(jnp.where(known, 0, rank))
    return _merge(jnp.stack(chains, 1), jnp.stack(matches, 1), acceptance)


def update_acceptance(
    outcomes: Array, match_lengths: Array, accepted: Array, tried: Array
) -> Array:
    """Add to `outcomes` what became of the candidates of a step.

    Args:
      outcomes: `[n + 1, 2] float32`, tried and accepted by match length; zeros first.
      match_lengths: `[B, C] int32`, from `propose`.
      accepted, tried: `[B, C] bool`, from `candidates.judge`.
    """
    lengths = jnp.arange(outcomes.shape[0])
    of_length = (match_lengths[..., None] == lengths) & tried[..., None]
    seen = jnp.stack([of_length, of_length & accepted[..., None]], axis=-1)
    return outcomes + jnp.sum(seen, axis=(0, 1), dtype=outcomes.dtype)


def acceptance_of(outcomes: Array) -> Array:
    """Estimate the acceptance by match length, `[n + 1]`, of `update_acceptance`'s.

    Before anything was observed it is k / (k + 4) after a match of k tokens: a fifth
    after one, two thirds after eight. That says little more than that longer matches
    are better; what is observed soon outweighs it.
    """
    lengths = jnp.arange(outcomes.shape[0], dtype=jnp.float32)
    assumed = _PRIOR_WEIGHT * (lengths / (lengths + 4.0))
    return (outcomes[:, 1] + assumed) / (outcomes[:, 0] + _PRIOR_WEIGHT)


def _searched(corpus: Corpus, sources: Array, before: int, after: int) -> Array:
    """Copy the sources side by side, `[B, M, before + S + after]`, -1 around them."""
    texts = jnp.pad(
        corpus.texts[jnp.maximum(sources, 0)],
        [(0, 0), (0, 0), (before, after)],
        constant_values=_PADDING,
    )
    # Materialised: each pass over the places would gather it again.
    return lax.optimization_barrier(texts)


def _ends(corpus: Corpus, batch: int, longest: int) -> Array:
    """Last tokens of the rows, `[B, n]`, the very last first; -2 before a text."""
    place = corpus.lengths[:batch, None] - 1 - jnp.arange(longest)
    found = jnp.take_along_axis(corpus.texts[:batch], jnp.maximum(place, 0), axis=1)
    return jnp.where(place >= 0, found, _NOTHING)


def _ranks(texts: Array, lengths: Array, ends: Array, sizes: tuple) -> Array:
    """Rank every place of the sources, `[B, M, S]`; 0: it is no match."""
    longest_plus, num_sources, depth_plus, width = sizes
    longest = longest_plus - 1
    equal = jnp.ones((*lengths.shape, width), bool)
    match = jnp.zeros((*lengths.shape, width), jnp.int32)
    for j in range(1, longest + 1):
        behind = texts[:, :, longest - j : longest - j + width]
        equal = equal & (behind == ends[:, None, j - 1, None])
        match = match + equal
    place = jnp.arange(width, dtype=jnp.int32)
    # The end of a text has nothing behind it.
    left = jnp.clip(lengths[:, :, None] - place, 0, depth_plus - 1)
    order = num_sources - 1 - jnp.arange(num_sources, dtype=jnp.int32)
    rank = match * num_sources + order[:, None]
    rank = (rank * depth_plus + left) * width + place
    return lax.optimization_barrier(jnp.where((match > 0) & (left > 0), rank, 0))


def _unrank(rank: Array, sizes: tuple) -> tuple[Array, Array, Array, Array]:
    """Split ranks into match length, index of the source, tokens left and place."""
    _, num_sources, depth_plus, width = sizes
    rest, place = rank // width, rank % width
    rest, left = rest // depth_plus, rest % depth_plus
    match, order = rest // num_sources, rest % num_sources
    return match, num_sources - 1 - order, left, place


def _begins(texts: Array, chain: Array, start: int, width: int) -> Array:
    """Say at which places the text behind begins `chain [B, depth]`, or is all of it.

    Both end with -1: a text that ends inside the chain adds nothing to it, one that
    goes on where the chain ends does.
    """
    known = jnp.ones((*texts.shape[:2], width), bool)
    for i in range(chain.shape[1]):
        behind = texts[:, :, start + i : start + i + width]
        known = known & ((behind == chain[:, None, i, None]) | (behind < 0))
    return known


def _merge(
    chains: Array, matches: Array, acceptance: Array
) -> tuple[candidates_lib.Candidates, Array]:
    """Make one forest of chains `[B, N, depth]` with match lengths `[B, N]`."""
    batch, num_chains, depth = chains.shape
    longest = acceptance.shape[0] - 1
    here = chains >= 0
    alike = (chains[:, :, None] == chains[:, None]) & here[:, :, None]
    shared = jnp.cumprod(alike.astype(jnp.int32), axis=3) > 0
    # Of the chains that agree down to a level the first has the candidate.
    chain = jnp.arange(num_chains, dtype=jnp.int32)
    owner = jnp.min(
        jnp.where(shared, chain[:, None], num_chains), axis=2, initial=num_chains
    )
    owned = owner == chain[:, None]
    above = jnp.pad(owner[:, :, :-1], [(0, 0), (0, 0), (1, 0)])
    level = jnp.arange(depth, dtype=jnp.int32)
    match = jnp.minimum(matches[:, :, None] + level, longest)
    chance = jnp.clip(acceptance[match], _LEAST_CHANCE, 1 - _LEAST_CHANCE)
    # A worse child has its chance only where the better ones were not the token.
    better = (
        (above[:, :, None] == above[:, None])
        & owned[:, None]
        & owned[:, :, None]
        & (chain < chain[:, None])[..., None]
    )
    miss = jnp.sum(jnp.where(better, jnp.log1p(-chance)[:, None], 0.0), axis=2)
    gain = jnp.take_along_axis(
        jnp.log(chance) + miss, jnp.minimum(owner, num_chains - 1), axis=1
    )
    # Level by level: sums in another order may round above the parent's.
    scores = [gain[:, :, 0]]
    for i in range(1, depth):
        scores.append(scores[-1] + gain[:, :, i])
    score = jnp.stack(scores, axis=2)

    def flat(values, absent):
        return jnp.where(owned, values, absent).reshape(batch, num_chains * depth)

    parents = jnp.where(level > 0, above * depth + level - 1, candidates_lib.NO_PARENT)
    proposal = candidates_lib.Candidates(
        tokens=flat(chains, 0),
        parents=flat(parents, candidates_lib.NO_PARENT),
        depths=flat(level + 1, 0),
        scores=flat(score, -jnp.inf),
    )
    return proposal, flat(match, 0)
