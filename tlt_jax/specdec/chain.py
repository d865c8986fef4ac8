"""The standard rules of chain drafts: the law of plain decoding, not its tokens.

A drafter draws a chain of tokens from its laws; the target's laws at those places, and
one beyond, decide how many are kept and what follows them. The tokens are then a sample
of the target's law again, but another one than plain decoding draws, and another one
for other weights of the drafter, another strategy or another cut of the calls, which
rows that are decoded together decide. Nothing but naming such a rule turns it on.

Chance of a step. Every draw has noise of its own, keyed by the request, by the length
of its text when the step begins, by what the draw is for, and by the position:

- By what it is for, as the rules ask that tests and replacement are independent of
  the drafts and of each other.
- By the step, as a step discards drafts and later ones decide their positions anew.
  Block verification looks at a whole chain before it cuts it, so what is emitted tells
  something of the noise of positions behind the cut: a token drawn there once more by
  the same noise would depend on the past otherwise than by the target's law. (The
  token rule never looks behind its first miss, and the position where it missed is
  settled; it would be right without. A call's token limit may cut an accepted run in
  either.) Each step emits a token at least, so no length comes twice and all chance
  is new: given the past, what a step emits is the target's, whatever the drafter's
  laws made of the past, and whatever cut the calls or switched strategies before.
- Of the request's key, under counters that no position of plain decoding has, so that
  a run is repeated by its seed, and may switch to plain decoding and back.

Keyed steps may come in between under a condition. They look at the noise of positions
ahead, too, and at what they drafted there; where a call's limit cuts their walk this is
not emitted yet. The next keyed step draws it by that same noise, a step by a chain rule
by its own: both draw it from the target's law, unless which of the two comes hangs on
what the noise was. So who chooses between them must not have seen how much of a keyed
walk was accepted: of a tuner's candidates all or none are judged by a chain rule
(`check`), and a run goes over from keyed suffix matches to chains when the drafter
comes, which nobody decides by the rows under way. Choices between chains and plain
decoding, which looks at nothing ahead, are free.

Reference: Leviathan, Kalman and Matias, Fast Inference from Transformers via
Speculative Decoding, 2023, Algorithm 1; Chen et al., Accelerating Large Language Model
Decoding with Speculative Sampling, 2023, Algorithm 2; Sun et al., Block Verification
Accelerates Speculative Decoding, 2024, Algorithm 2.
"""

import dataclasses
from collections.abc import Callable

import chex
import jax.numpy as jnp
from flax import struct

from tlt_jax.specdec import decode, noise, protocols, sampling, verify
from tlt_jax.specdec import strategy as strategy_lib
from tlt_jax.specdec import tree as tree_lib
from tlt_jax.types import Array


@struct.dataclass
class Decision:
    """What a rule makes of one chain, before any chance of its own.

    Attributes:
      thresholds: `[..., A - 1]`; the test of drafted token i passes with this
        probability.
      replacement: `[..., A, V]`, the law of the token that follows i kept ones.
      in_order: the first test that fails ends the chain; else the last that passes.
    """

    thresholds: Array
    replacement: Array
    in_order: bool = struct.field(pytree_node=False)


def token_rule(
    target_probs: Array, draft_probs: Array, draft_tokens: Array
) -> Decision:
    """Judge each drafted token by itself.

    Token x passes with probability min(1, target(x) / draft(x)). The first that fails
    is replaced by a draw of the residual, max(0, target - draft) normalised; if none
    fails the bonus is a draw of the target's last law. It is exact for tokens that were
    drawn from `draft_probs`; the law of a token chosen without chance (n-gram, argmax)
    is the point mass on it, whatever law the drafter looked at.

    Reference: Leviathan et al. 2023, Algorithm 1; Chen et al. 2023, Algorithm 2.

    Args:
      target_probs: `[..., A, V]`, the target's laws along the chain; place i follows
        the i first drafted tokens.
      draft_probs: `[..., A - 1, V]`, the laws that the tokens were drawn from.
      draft_tokens: `[..., A - 1] int32`.
    """
    ratios = _ratios(target_probs, draft_probs, draft_tokens)
    ones = jnp.ones(target_probs.shape[:-1], ratios.dtype)
    laws, _ = _residual(ones, target_probs, draft_probs)
    return Decision(jnp.minimum(ratios, 1.0), laws, in_order=True)


def block_rule(
    target_probs: Array, draft_probs: Array, draft_tokens: Array
) -> Decision:
    """Judge the drafted tokens together: no rule for chains keeps more on average.

    With w_0 = 1 and w_i = min(1, w_{i-1} target_i(x_i) / draft_i(x_i)) the residual
    after i tokens is R_i = max(0, w_i target_{i+1} - draft_{i+1}), of mass |R_i|. Test
    i passes with probability |R_i| / (|R_i| + 1 - w_i), the last with w_i. The longest
    prefix whose test passes is kept, whatever the tests before it say; R_i normalised
    gives the token that follows, the target's own law after the whole chain.

    Reference: Sun et al. 2024, Algorithm 2. See `token_rule` for the arguments.
    """
    ratios = _ratios(target_probs, draft_probs, draft_tokens)
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
    return Decision(jnp.where(is_last, weights, inner), laws, in_order=False)


def keep(decision: Decision, uniforms: Array, gumbel: Array) -> tuple[Array, Array]:
    """Let chance settle a decision.

    Args:
      decision: of a rule.
      uniforms: `[..., A - 1]` in [0, 1), independent of how the chain was drawn.
      gumbel: `[..., V]`, Gumbel noise, independent of both.

    Returns:
      num_accepted `[...] int32`, and the recovered or bonus token `[...] int32` that
      follows the accepted ones.
    """
    passed = uniforms < decision.thresholds
    if decision.in_order:
        num_accepted = jnp.sum(jnp.cumprod(passed.astype(jnp.int32), axis=-1), axis=-1)
    else:
        place = jnp.arange(1, passed.shape[-1] + 1, dtype=jnp.int32)
        num_accepted = jnp.max(jnp.where(passed, place, 0), axis=-1, initial=0)
    place = num_accepted[..., None, None]
    law = jnp.take_along_axis(decision.replacement, place, axis=-2)[..., 0, :]
    # Tokens without probability have log 0 and are never drawn.
    return num_accepted, sampling.argmax(jnp.log(law) + gumbel)


def _ratios(target_probs, draft_probs, draft_tokens) -> Array:
    """Target's over drafter's probability of each drafted token, `[..., A - 1]`."""
    *batch, depth = draft_tokens.shape
    vocab_size = target_probs.shape[-1]
    chex.assert_shape(target_probs, (*batch, depth + 1, vocab_size))
    chex.assert_shape(draft_probs, (*batch, depth, vocab_size))
    chosen = draft_tokens[..., None]
    ours = jnp.take_along_axis(target_probs[..., :-1, :], chosen, axis=-1)[..., 0]
    theirs = jnp.take_along_axis(draft_probs, chosen, axis=-1)[..., 0]
    # A token that the drafter cannot have drawn never passes.
    possible = (ours > 0) & (theirs > 0)
    return jnp.where(possible, ours / jnp.where(possible, theirs, 1.0), 0.0)


def _residual(weights, target_probs, draft_probs) -> tuple[Array, Array]:
    """Laws and masses of max(0, weight * target - draft), `[..., A, V]`, `[..., A]`.

    At the chain's end, and where nothing is left, the law is the target's.
    """
    rest = weights[..., :-1, None] * target_probs[..., :-1, :] - draft_probs
    rest = jnp.pad(
        jnp.maximum(rest, 0.0), [(0, 0)] * (rest.ndim - 2) + [(0, 1), (0, 0)]
    )
    mass = jnp.sum(rest, axis=-1)
    scale = jnp.where(mass > 0, mass, 1.0)[..., None]
    return jnp.where(mass[..., None] > 0, rest / scale, target_probs), mass


@struct.dataclass
class Chance(verify.Chance):
    """The randomness of a step, all of it independent; `draft` is the drafter's.

    Attributes:
      uniforms: `[B, A - 1]` in [0, 1), of the tests.
      follow: `[B, V]`, Gumbel noise of the recovered or bonus token.
    """

    uniforms: Array
    follow: Array


@dataclasses.dataclass(frozen=True)
class ChainRule:
    """A rule for chains that the drafter sampled, verified whole.

    Attributes:
      decide: `token_rule` or `block_rule`.
    """

    decide: Callable[[Array, Array, Array], Decision]

    def chance(
        self, keys: Array, lengths: Array, num: int, settings: decode.Settings
    ) -> Chance:
        """See `protocols.Rule`."""
        batch, num_drafted, vocab_size = len(lengths), num - 1, settings.cfg.vocab_size
        drafting, testing, following = noise.step_keys(keys, lengths, 3)
        places = lengths[:, None] + 1 + jnp.arange(num_drafted)

        def at_places(draw, keys, *args):
            keys = jnp.repeat(keys, num_drafted, axis=0)
            drawn = draw(keys, places.reshape(-1), *args)
            return drawn.reshape(batch, num_drafted, *drawn.shape[1:])

        return Chance(
            draft=at_places(noise.gumbel, drafting, vocab_size),
            uniforms=at_places(noise.uniform, testing),
            follow=noise.gumbel(following, lengths, vocab_size),
        )

    def judge(
        self,
        law: sampling.Law,
        tree: tree_lib.DraftTree,
        proposal: protocols.Proposal,
        chance: Chance,
        settings: decode.Settings,
        rows: None = None,
    ) -> tuple[verify.Walk, Array]:
        """Keep a part of each chain, and draw what follows it.

        Behind the recovered or bonus token it stands again. See `protocols.Rule` for
        the arguments; in a chain, node i has depth i. Chains are whole, so that rows
        share nothing: a chain that was cut where its tokens looked unlikely would be
        no sample of the drafter's laws.
        """
        del settings
        assert rows is None, rows
        batch, width, _ = law.scores.shape
        chex.assert_shape(tree.tokens, (batch, width))
        # A drafter that has broken has no laws: then nothing passes.
        broken = jnp.isnan(proposal.draft_probs)
        decision = self.decide(
            jnp.exp(law.logprobs()),
            jnp.where(broken, 0.0, proposal.draft_probs),
            tree.tokens[:, 1:],
        )
        num_accepted_B, follow_B = keep(decision, chance.uniforms, chance.follow)
        # A row's tokens: those that were kept, then what follows, up to the width.
        steps = jnp.arange(width, dtype=jnp.int32)
        drafted_BA = jnp.roll(tree.tokens, -1, axis=1)
        kept_BA = steps < num_accepted_B[:, None]
        walk = verify.Walk(
            path=jnp.minimum(steps, num_accepted_B[:, None]),
            tokens=jnp.where(kept_BA, drafted_BA, follow_B[:, None]),
            num_accepted=num_accepted_B,
        )
        logprobs_BA = jnp.take_along_axis(
            law.logprob_of(walk.tokens), walk.path, axis=1
        )
        return walk, logprobs_BA


KEYED = "keyed"
RULES: dict[str, protocols.Rule] = {
    KEYED: verify.Keyed(),
    "rejection": ChainRule(token_rule),
    "block": ChainRule(block_rule),
}


def check(
    rule: str,
    strategies: tuple[strategy_lib.Strategy, ...],
    sampling_cfg: sampling.SamplingConfig,
) -> None:
    """Refuse a rule that is none, or cannot judge what it would be given.

    Raises:
      ValueError: the rule is unknown; or it is a chain rule, and a strategy is no chain
        of the learned drafter verified whole, or the law is the point mass.
    """
    if rule not in RULES:
        raise ValueError(f"rule={rule!r}: use one of {', '.join(RULES)}.")
    if rule == KEYED:
        return
    for strategy in strategies:
        depth = strategy.draft_depth
        chain = strategy_lib.Strategy(depth, 1, depth + 1)
        if strategy != chain:
            raise ValueError(
                f"rule={rule!r} judges whole chains that the learned drafter sampled, "
                f"and strategy {strategy} is none: use {chain} (topk 1, "
                "tokens_to_verify = draft_depth + 1, proposer drafter), or "
                f"rule={KEYED!r}."
            )
    if sampling_cfg.temperature == 0:
        raise ValueError(
            f"rule={rule!r} compares laws of sampled chains, and temperature=0 samples "
            f"nothing: use rule={KEYED!r}, which is the same as any there, or a "
            "temperature above 0."
        )
