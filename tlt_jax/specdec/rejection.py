"""Recursive rejection: walk a tree that was sampled, by a test of each node on the way.

Behind a node the target's law p_1 and the drafter's q_1 are compared. Its children are
draws without replacement in their order, so that child j is a sample x of q_j, which is
q_1 without the j - 1 before it. It passes with probability min(1, p_j(x) / q_j(x)), and
the walk goes on from it. Else

    p_{j+1} = max(0, p_j - q_j) / |max(0, p_j - q_j)|,

the residual, and q_{j+1} is q_j without x, renormalised. The token that follows the
walk is a draw of the last p: of the target's own law behind a node without children.

Why what comes out is the target's. Behind one node, by induction from the last child:
whatever x was, if it fails the rest of the children, samples of q_{j+1}, and the last
draw yield a sample of p_{j+1}. So y comes out with min(p_j(y), q_j(y)) by passing, and
with |max(0, p_j - q_j)| x p_{j+1}(y) behind a failure; together p_j(y).

Behind a path, as the shape of the tree is no function of what was drawn, and as all
nodes of a depth may share the noise of their children. The walk comes to one node of
each depth. Which one is decided by the tokens above it and by tests, that is by noise
of lesser depths; and so is its law. Given these, the noise of its depth is as it was:
its children are samples of its law, though those of other nodes of the depth, which no
test ever looks at, are not independent of them. A failed child's own children are left
where they are. (`tests/specdec/test_rejection.py` enumerates it.)

With one child a node this is the standard rule for chains.

Reference: Leviathan, Kalman and Matias, Fast Inference from Transformers via
Speculative Decoding, 2023, Algorithm 1; Chen et al., Accelerating Large Language Model
Decoding with Speculative Sampling, 2023, Algorithm 2; Jeon et al., Recursive
Speculative Decoding, 2024, section 3 (without replacement).
"""

import dataclasses

import chex
import jax.numpy as jnp
from flax import struct
from jax import lax

from tlt_jax.specdec import decode, noise, protocols, sampling, verify
from tlt_jax.specdec import tree as tree_lib
from tlt_jax.types import Array


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
class Fresh:
    """A rule whose chance is new in each step; see `chain` for why."""

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


@struct.dataclass
class _Stand:
    """How far the walk of each row has come.

    Attributes:
      path: `[B, A] int32`, nodes so far; behind them 0.
      num_accepted: `[B] int32`, of them, without the root.
      num_failed: `[B] int32`, children of the last that failed.
      uniform: `[B]`, what its next child is tested by.
      target_probs: `[B, V]`, the law of what is to come out behind it.
      draft_probs: `[B, V]`, the law that its next child is a sample of.
      child: `[B] int32`, that child.
      goes_on: `[B] bool`, there is one.
    """

    path: Array
    num_accepted: Array
    num_failed: Array
    uniform: Array
    target_probs: Array
    draft_probs: Array
    child: Array
    goes_on: Array


@dataclasses.dataclass(frozen=True)
class Rejection(Fresh):
    """The rule for trees and chains that the drafter sampled."""

    def judge(
        self,
        law: sampling.Law,
        tree: tree_lib.DraftTree,
        proposal: protocols.Proposal,
        chance: Chance,
        settings: decode.Settings,
        rows: None = None,
    ) -> tuple[verify.Walk, Array]:
        """Test one child of every row a turn, until no row has one left.

        Rows share nothing: which nodes there are would depend on other rows' tokens.
        Behind the recovered or bonus token of the walk it stands again. See
        `protocols.Rule` for the arguments.
        """
        del settings
        assert rows is None, rows
        batch, width, vocab_size = law.scores.shape
        chex.assert_shape(tree.tokens, (batch, width))
        row_B, steps = jnp.arange(batch), jnp.arange(chance.uniforms.shape[1] + 1)

        def target_behind(node_B):
            scores_BV = law.scores[row_B, node_B]
            return jnp.exp(scores_BV - law.log_normaliser[row_B, node_B, None])

        def draft_behind(node_B):
            source_B = tree.sources[row_B, node_B]
            # The root's law is the first, as is a leaf's, which has no use for it.
            slot_B = jnp.where(source_B < 0, 0, proposal.laws.behind[row_B, source_B])
            probs_BV = proposal.laws.probs[row_B, slot_B]
            return proposal.laws.of_all_tokens(probs_BV, vocab_size)

        def test(stand: _Stand) -> _Stand:
            """Go on from the child if it passes, else to the one after it."""
            token_B = tree.tokens[row_B, stand.child]
            laws = stand.target_probs, stand.draft_probs
            # What is 1 or more always passes.
            ratio_B = ratios(*laws, token_B)
            passes_B = stand.goes_on & (stand.uniform < ratio_B)
            fails_B = stand.goes_on & ~passes_B
            num_accepted_B = stand.num_accepted + passes_B
            deeper_B = jnp.minimum(num_accepted_B, steps[-1] - 1)
            rest_B = after_failure(stand.uniform, ratio_B)

            def either(passed, failed, otherwise):
                at = (slice(None), *[None] * (otherwise.ndim - 1))
                failed = jnp.where(fails_B[at], failed, otherwise)
                return jnp.where(passes_B[at], passed, failed)

            targets, drafts = (
                either(behind(stand.child), rest, law)
                for behind, rest, law in zip(
                    (target_behind, draft_behind),
                    (residual(*laws), without(laws[1], token_B)),
                    laws,
                    strict=True,
                )
            )
            entered_BA = passes_B[:, None] & (steps == num_accepted_B[:, None])
            path_BA = jnp.where(entered_BA, stand.child[:, None], stand.path)
            node_B = path_BA[row_B, num_accepted_B]
            num_failed_B = either(0, stand.num_failed + 1, stand.num_failed)
            child_B, is_there_B = child_of(tree, node_B, num_failed_B)
            return _Stand(
                path=path_BA,
                num_accepted=num_accepted_B,
                num_failed=num_failed_B,
                uniform=either(chance.uniforms[row_B, deeper_B], rest_B, stand.uniform),
                target_probs=targets,
                draft_probs=drafts,
                child=child_B,
                goes_on=stand.goes_on & is_there_B,
            )

        root_B = jnp.full((batch,), tree_lib.ROOT, jnp.int32)
        none_B = jnp.zeros((batch,), jnp.int32)
        first_B, is_there_B = child_of(tree, root_B, none_B)
        stand = lax.while_loop(
            lambda stand: jnp.any(stand.goes_on),
            test,
            _Stand(
                path=jnp.zeros((batch, steps.shape[0]), jnp.int32),
                num_accepted=none_B,
                num_failed=none_B,
                uniform=chance.uniforms[:, 0],
                target_probs=target_behind(root_B),
                draft_probs=draft_behind(root_B),
                child=first_B,
                goes_on=is_there_B,
            ),
        )
        follow_B = sampling.argmax(jnp.log(stand.target_probs) + chance.follow)
        walk = ended(tree, stand.path, stand.num_accepted, follow_B)
        return walk, logprobs_along(law, walk)


def ratios(target_probs: Array, draft_probs: Array, tokens: Array) -> Array:
    """Return the target's over the drafter's probability of drafted tokens, `[...]`.

    Laws are `[..., V]`, `tokens [...] int32`.
    """
    ours, theirs = (
        jnp.take_along_axis(x, tokens[..., None], axis=-1)[..., 0]
        for x in (target_probs, draft_probs)
    )
    # A token that the drafter cannot have drawn never passes.
    possible = (ours > 0) & (theirs > 0)
    return jnp.where(possible, ours / jnp.where(possible, theirs, 1.0), 0.0)


def residual(target_probs: Array, draft_probs: Array) -> Array:
    """Return the law of what is left over, `[..., V]`, of laws of that shape.

    Where nothing is, the target's.
    """
    rest = jnp.maximum(target_probs - draft_probs, 0.0)
    return normalised(rest, target_probs)[0]


def without(draft_probs: Array, tokens: Array) -> Array:
    """Return laws `[..., V]` without `tokens [...] int32`; 0 if there is no other."""
    here = jnp.arange(draft_probs.shape[-1]) == tokens[..., None]
    rest = jnp.where(here, 0.0, draft_probs)
    return normalised(rest, rest)[0]


def normalised(weights: Array, otherwise: Array) -> tuple[Array, Array]:
    """Return laws `[..., V]` of weights, and the weights' sums `[...]`.

    Where all weights are 0 the law is `otherwise [..., V]`.
    """
    mass = jnp.sum(weights, axis=-1)
    scale = jnp.where(mass > 0, mass, 1.0)[..., None]
    return jnp.where(mass[..., None] > 0, weights / scale, otherwise), mass


def after_failure(uniform: Array, chance: Array) -> Array:
    """Return a number uniform in [0, 1) again, of one that was not below `chance`."""
    left = jnp.where(chance < 1, 1.0 - chance, 1.0)
    return (uniform - chance) / left


def child_of(
    tree: tree_lib.DraftTree, node: Array, num_before: Array
) -> tuple[Array, Array]:
    """Find a node's child behind so many others, `[B] int32`, if there is, `[B] bool`.

    `node` and `num_before` are `[B] int32`.
    """
    index = jnp.arange(tree.tokens.shape[1], dtype=jnp.int32)
    is_child = tree.valid & (index > tree_lib.ROOT)
    is_child = is_child & (tree.parents == node[:, None])
    is_it = is_child & (jnp.cumsum(is_child, axis=1) == num_before[:, None] + 1)
    child = jnp.max(jnp.where(is_it, index, tree_lib.ROOT), axis=1)
    return child, jnp.any(is_it, axis=1)


def ended(
    tree: tree_lib.DraftTree, path: Array, num_accepted: Array, follow: Array
) -> verify.Walk:
    """Describe a walk over the first `num_accepted [B]` nodes behind the root's.

    `path [B, A]`; `follow [B]` is the token behind them.
    """
    steps = jnp.arange(path.shape[1], dtype=jnp.int32)
    kept = steps < num_accepted[:, None]
    last = jnp.minimum(steps, num_accepted[:, None])
    path = jnp.take_along_axis(path, last, axis=1)
    # Each node's token stands where it was drawn: in the place of its parent.
    drafted = jnp.take_along_axis(tree.tokens, jnp.roll(path, -1, axis=1), axis=1)
    tokens = jnp.where(kept, drafted, follow[:, None])
    return verify.Walk(path=path, tokens=tokens, num_accepted=num_accepted)


def logprobs_along(law: sampling.Law, walk: verify.Walk) -> Array:
    """Return the law's log-probabilities of a walk's tokens, `[B, A] float32`."""
    row = jnp.arange(walk.path.shape[0])[:, None]
    scores = law.scores[row, walk.path, walk.tokens]
    return scores - law.log_normaliser[row, walk.path]
