"""The standard chain rules in the decode loop, to compare the keyed rule with.

The drafter samples a chain from its own laws, and `chain_rules` decides from the laws
of both models how much of it is kept. The tokens are then a sample of the target's law
again, but another one than plain decoding draws, and another one for another drafter,
strategy, batch or cut of the calls. Nothing but naming such a rule turns it on.

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

Reference: see `chain_rules`.
"""

import abc
import dataclasses

import chex
import jax.numpy as jnp
from flax import struct

from tlt_jax.specdec import chain_rules, decode, noise, protocols, sampling, verify
from tlt_jax.specdec import strategy as strategy_lib
from tlt_jax.specdec import tree as tree_lib
from tlt_jax.types import Array


@struct.dataclass
class Chance:
    """The randomness of a step, all of it independent.

    Attributes:
      draft: `[B, A - 1, V]`, Gumbel noise of the drafter's draws.
      uniforms: `[B, A - 1]` in [0, 1), of the tests.
      follow: `[B, V]`, Gumbel noise of the recovered or bonus token.
    """

    draft: Array
    uniforms: Array
    follow: Array


def chance(keys: Array, lengths: Array, num_drafted: int, vocab_size: int) -> Chance:
    """Make the randomness of one step of every row.

    Args:
      keys: `[B, 2] uint32` of requests.
      lengths: `[B] int32`, cached positions when the step begins.
      num_drafted: A - 1.
      vocab_size: V.

    Returns:
      The noise.
    """
    batch = lengths.shape[0]
    drafting, testing, following = noise.step_keys(keys, lengths, 3)
    places = lengths[:, None] + 1 + jnp.arange(num_drafted)

    def at_places(draw, keys, *args):
        drawn = draw(jnp.repeat(keys, num_drafted, axis=0), places.reshape(-1), *args)
        return drawn.reshape(batch, num_drafted, *drawn.shape[1:])

    return Chance(
        draft=at_places(noise.gumbel, drafting, vocab_size),
        uniforms=at_places(noise.uniform, testing),
        follow=noise.gumbel(following, lengths, vocab_size),
    )


class _ChainRule(abc.ABC):
    """A rule for chains that the drafter sampled, verified whole."""

    @abc.abstractmethod
    def decide(self, *chain: Array) -> tuple[Array, Array]:
        """Decide as `chain_rules.rejection` describes it."""

    def chance(
        self, keys: Array, lengths: Array, num: int, settings: decode.Settings
    ) -> Chance:
        """See `protocols.Rule`."""
        return chance(keys, lengths, num - 1, settings.cfg.vocab_size)

    def judge(
        self,
        law: sampling.Law,
        tree: tree_lib.DraftTree,
        proposal: protocols.Proposal,
        chance: Chance,
        settings: decode.Settings,
    ) -> tuple[verify.Walk, Array]:
        """Keep a part of each chain, and draw what follows it.

        Behind the recovered or bonus token it stands again. See `protocols.Rule` for
        the arguments; in a chain, node i has depth i.
        """
        del settings
        batch, width, vocab_size = law.scores.shape
        chex.assert_shape(tree.tokens, (batch, width))
        chex.assert_shape(proposal.draft_probs, (batch, width - 1, vocab_size))
        # A drafter that has broken has no laws: then nothing passes.
        broken = jnp.isnan(proposal.draft_probs)
        num_accepted_B, follow_B = self.decide(
            jnp.exp(law.logprobs()),
            jnp.where(broken, 0.0, proposal.draft_probs),
            tree.tokens[:, 1:],
            chance.uniforms,
            chance.follow,
        )
        # A row's tokens: those that were kept, then what follows, up to the width.
        steps = jnp.arange(width, dtype=jnp.int32)
        drafted_BA = jnp.roll(tree.tokens, -1, axis=1)
        kept_BA = steps < num_accepted_B[:, None]
        walk = verify.Walk(
            path=jnp.minimum(steps, num_accepted_B[:, None]),
            tokens=jnp.where(kept_BA, drafted_BA, follow_B[:, None]),
            num_accepted=num_accepted_B,
        )
        return walk, verify.logprobs_of(law, walk.tokens, walk)


@dataclasses.dataclass(frozen=True)
class Rejection(_ChainRule):
    """Each drafted token by itself, see `chain_rules.token_rule`."""

    def decide(self, *chain: Array) -> tuple[Array, Array]:
        """See `chain_rules.rejection`."""
        return chain_rules.rejection(*chain)


@dataclasses.dataclass(frozen=True)
class Block(_ChainRule):
    """The drafted tokens together, see `chain_rules.block_rule`."""

    def decide(self, *chain: Array) -> tuple[Array, Array]:
        """See `chain_rules.block_verification`."""
        return chain_rules.block_verification(*chain)


KEYED = "keyed"
RULES: dict[str, protocols.Rule] = {
    KEYED: verify.Keyed(),
    "rejection": Rejection(),
    "block": Block(),
}


def check(
    rule: str,
    strategies: tuple[strategy_lib.Strategy, ...],
    sampling_cfg: sampling.SamplingConfig,
) -> None:
    """Refuse a rule that is none, or cannot judge what it would be given.

    Args:
      rule: one of `RULES`.
      strategies: that may be chosen.
      sampling_cfg: the law.

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
