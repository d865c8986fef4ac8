"""The standard rules for sampled drafts: the law of plain decoding, not its tokens.

A drafter draws chains or trees of tokens from its laws; the target's laws at those
places, and one beyond, decide how many are kept and what follows them: by a test of
each token on the way (`rejection`), or of a whole chain (`block_rule`). The tokens are
then a sample of the target's law again, but another one than plain decoding draws, and
another one for other weights of the drafter, another strategy or another cut of the
calls, which rows that are decoded together decide. Nothing but naming such a rule turns
it on.

Chance of a step. Every draw has noise of its own, keyed by the request, by the length
of its text when the step begins, by what the draw is for, and by the position:

- By what it is for, as the rules ask that tests and replacement are independent of
  the drafts and of each other. (Several tests of one position share a number: what
  is left of one that failed a test is new again, `rejection.after_failure`.)
- By the step, as a step discards drafts and later ones decide their positions anew.
  Block verification looks at a whole chain before it cuts it, so what is emitted tells
  something of the noise of positions behind the cut: a token drawn there once more by
  the same noise would depend on the past otherwise than by the target's law.
  (Rejection never looks behind its last miss, and the position where it missed is
  settled; it would be right without. A call's token limit may cut an accepted run in
  either.) Each step emits a token at least, so no length comes twice and all chance
  is new: given the past, what a step emits is the target's, whatever the drafter's
  laws made of the past, and whatever cut the calls or switched strategies before.
- Of the request's key, under counters that no position of plain decoding has, so that
  a run is repeated by its seed, and may switch to plain decoding and back.

Keyed steps may come in between under a condition. They look at the noise of positions
ahead, too, and at what they drafted there; where a call's limit cuts their walk this is
not emitted yet. The next keyed step draws it by that same noise, a step by these rules
by its own: both draw it from the target's law, unless which of the two comes hangs on
what the noise was. So who chooses between them must not have seen how much of a keyed
walk was accepted: of a tuner's candidates all or none are judged by a rule for
sampled drafts (`check`), and a run goes over to them from keyed suffix matches when the
drafter comes, which nobody decides by the rows under way. Choices between sampled
drafts and plain decoding, which looks at nothing ahead, are free.

Reference: of `rejection` see there; Sun et al., Block Verification Accelerates
Speculative Decoding, 2024, Algorithm 2.
"""

import dataclasses

import chex
import jax.numpy as jnp
from flax import struct

from tlt_jax.specdec import decode, protocols, rejection, sampling, verify
from tlt_jax.specdec import strategy as strategy_lib
from tlt_jax.specdec import tree as tree_lib
from tlt_jax.types import Array


@struct.dataclass
class Decision:
    """What becomes of a chain, before any chance of its own.

    Attributes:
      thresholds: `[..., A - 1]`; the test of drafted token i passes with this
        probability.
      replacement: `[..., A, V]`, the law of the token that follows i kept ones.
    """

    thresholds: Array
    replacement: Array


def block_rule(
    target_probs: Array, draft_probs: Array, draft_tokens: Array
) -> Decision:
    """Judge the drafted tokens together: no rule for chains keeps more on average.

    With w_0 = 1 and w_i = min(1, w_{i-1} target_i(x_i) / draft_i(x_i)) the residual
    after i tokens is R_i = max(0, w_i target_{i+1} - draft_{i+1}), of mass |R_i|. Test
    i passes with probability |R_i| / (|R_i| + 1 - w_i), the last with w_i. The longest
    prefix whose test passes is kept, whatever the tests before it say; R_i normalised
    gives the token that follows, the target's own law after the whole chain.

    It is exact for tokens that were drawn from `draft_probs`; the law of a token chosen
    without chance (n-gram, argmax) is the point mass on it, whatever law the drafter
    looked at.

    Reference: Sun et al. 2024, Algorithm 2.

    Args:
      target_probs: `[..., A, V]`, the target's laws along the chain; place i follows
        the i first drafted tokens.
      draft_probs: `[..., A - 1, V]`, the laws that the tokens were drawn from.
      draft_tokens: `[..., A - 1] int32`.
    """
    *batch, depth = draft_tokens.shape
    chex.assert_shape(target_probs, (*batch, depth + 1, None))
    chex.assert_shape(draft_probs, (*batch, depth, None))
    ratios = rejection.ratios(target_probs[..., :-1, :], draft_probs, draft_tokens)
    weight = jnp.ones_like(ratios[..., 0])
    weights = [weight]
    for i in range(ratios.shape[-1]):
        weight = jnp.minimum(1.0, weight * ratios[..., i])
        weights.append(weight)
    weights = jnp.stack(weights, axis=-1)
    laws, mass = _residual(weights, target_probs, draft_probs)
    weights, mass = weights[..., 1:], mass[..., 1:]
    either = mass + 1.0 - weights
    # A residual without mass under a full weight: the laws agree, later tests pass too.
    inner = jnp.where(either > 0, mass / jnp.where(either > 0, either, 1.0), 1.0)
    is_last = jnp.arange(1, ratios.shape[-1] + 1) == ratios.shape[-1]
    return Decision(jnp.where(is_last, weights, inner), laws)


def keep(decision: Decision, uniforms: Array, gumbel: Array) -> tuple[Array, Array]:
    """Let chance settle a decision.

    Args:
      decision: of `block_rule`.
      uniforms: `[..., A - 1]` in [0, 1), independent of how the chain was drawn.
      gumbel: `[..., V]`, Gumbel noise, independent of both.

    Returns:
      num_accepted `[...] int32`, and the recovered or bonus token `[...] int32` that
      follows the accepted ones.
    """
    passed = uniforms < decision.thresholds
    # The last that passes counts, whatever those before it say.
    place = jnp.arange(1, passed.shape[-1] + 1, dtype=jnp.int32)
    num_accepted = jnp.max(jnp.where(passed, place, 0), axis=-1, initial=0)
    place = num_accepted[..., None, None]
    law = jnp.take_along_axis(decision.replacement, place, axis=-2)[..., 0, :]
    # Tokens without probability have log 0 and are never drawn.
    return num_accepted, sampling.argmax(jnp.log(law) + gumbel)


def _residual(weights, target_probs, draft_probs) -> tuple[Array, Array]:
    """Laws and masses of max(0, weight * target - draft), `[..., A, V]`, `[..., A]`.

    At the chain's end, and where nothing is left, the law is the target's.
    """
    rest = weights[..., :-1, None] * target_probs[..., :-1, :] - draft_probs
    rest = jnp.pad(
        jnp.maximum(rest, 0.0), [(0, 0)] * (rest.ndim - 2) + [(0, 1), (0, 0)]
    )
    return rejection.normalised(rest, target_probs)


@dataclasses.dataclass(frozen=True)
class BlockRule(rejection.Fresh):
    """The rule for chains that the drafter sampled and that are judged whole."""

    def judge(
        self,
        law: sampling.Law,
        tree: tree_lib.DraftTree,
        proposal: protocols.Proposal,
        chance: rejection.Chance,
        settings: decode.Settings,
        rows: None = None,
    ) -> tuple[verify.Walk, Array]:
        """Keep a part of each chain, and draw what follows it.

        Behind the recovered or bonus token it stands again. See `protocols.Rule` for
        the arguments; in a chain, node i has depth i, and its law is law i.
        """
        del settings
        assert rows is None, rows
        batch, width, vocab_size = law.scores.shape
        chex.assert_shape(tree.tokens, (batch, width))
        decision = block_rule(
            jnp.exp(law.logprobs()),
            proposal.laws.of_all_tokens(proposal.laws.probs, vocab_size),
            tree.tokens[:, 1:],
        )
        num_accepted_B, follow_B = keep(decision, chance.uniforms, chance.follow)
        path_BA = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32), (batch, width))
        walk = rejection.ended(tree, path_BA, num_accepted_B, follow_B)
        return walk, rejection.logprobs_along(law, walk)


KEYED = "keyed"
RULES: dict[str, protocols.Rule] = {
    KEYED: verify.Keyed(),
    "rejection": rejection.Rejection(),
    "block": BlockRule(),
}


def check(
    rule: str,
    strategies: tuple[strategy_lib.Strategy, ...],
    sampling_cfg: sampling.SamplingConfig,
) -> None:
    """Refuse a rule that is none, or cannot judge what it would be given.

    Raises:
      ValueError: the rule is unknown; or it is none but `keyed`, and a strategy is not
        the learned drafter's alone, or has a budget that rows share, or is no chain for
        `block`, or the law is the point mass.
    """
    if rule not in RULES:
        raise ValueError(f"rule={rule!r}: use one of {', '.join(RULES)}.")
    if rule == KEYED:
        return
    for strategy in strategies:
        fitting, kind, needs = _fitting(rule, strategy)
        if strategy != fitting:
            raise ValueError(
                f"rule={rule!r} judges {kind} that the learned drafter sampled, and "
                f"strategy {strategy} is none: use {fitting} ({needs}), or "
                f"rule={KEYED!r}."
            )
    if sampling_cfg.temperature == 0:
        raise ValueError(
            f"rule={rule!r} compares laws of sampled drafts, and temperature=0 samples "
            f"nothing: use rule={KEYED!r}, which is the same as any there, or a "
            "temperature above 0."
        )


def _fitting(
    rule: str, strategy: strategy_lib.Strategy
) -> tuple[strategy_lib.Strategy, str, str]:
    """Return the like of a strategy that a rule judges, and how that is told."""
    depth, topk = strategy.draft_depth, strategy.topk
    if rule == "block" or topk == 1:
        chain = strategy_lib.Strategy(depth, 1, depth + 1)
        needs = "topk 1, tokens_to_verify = draft_depth + 1, proposer drafter"
        return chain, "whole chains", needs
    most = min(strategy.tokens_to_verify, 1 + strategy.num_drafted)
    tree = strategy_lib.Strategy(depth, topk, most)
    return tree, "whole trees", "no budget of all rows, proposer drafter"
