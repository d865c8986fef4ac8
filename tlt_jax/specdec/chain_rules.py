"""The standard verification rules of chain drafts, to compare our own rule with.

A drafter draws a chain of tokens from its laws; the target's laws at those places, and
one beyond, decide how many are kept and what follows them. Unlike position-keyed draws
(`verify`) these rules give another sample for another drafter, though of the same law.

Both rules are exact for chains whose tokens were drawn from the `draft_probs` given. A
drafter that chose its token without chance (n-gram, argmax) has a point mass there,
whatever law it looked at: `point_mass`.

Reference: Leviathan, Kalman and Matias, Fast Inference from Transformers via
Speculative Decoding, 2023, Algorithm 1; Chen et al., Accelerating Large Language Model
Decoding with Speculative Sampling, 2023, Algorithm 2; Sun et al., Block Verification
Accelerates Speculative Decoding, 2024, Algorithm 2.
"""

import chex
import jax.numpy as jnp
from flax import struct

from tlt_jax.specdec import sampling
from tlt_jax.types import Array


@struct.dataclass
class Decision:
    """What a rule makes of one chain, before any chance of its own.

    Attributes:
      thresholds: `[..., A - 1]`; the test of drafted token i passes with this
        probability.
      replacement: `[..., A, V]`, the law of the token that follows i kept ones.
    """

    thresholds: Array
    replacement: Array


def token_rule(
    target_probs: Array,
    draft_probs: Array,
    draft_tokens: Array,
    num_drafted: Array | None = None,
) -> Decision:
    """Judge each drafted token by itself.

    Token x passes with probability min(1, target(x) / draft(x)). The first that fails
    is replaced by a draw of the residual, max(0, target - draft) normalised; if none
    fails the bonus is a draw of the target's last law.

    Reference: Leviathan et al. 2023, Algorithm 1; Chen et al. 2023, Algorithm 2.

    Args:
      target_probs: `[..., A, V]`, the target's laws along the chain; place i follows
        the i first drafted tokens.
      draft_probs: `[..., A - 1, V]`, the laws that the tokens were drawn from.
      draft_tokens: `[..., A - 1] int32`.
      num_drafted: `[...] int32`, how many of them count; None: all. It may depend on
        the tokens that count and on laws (`num_confident`), never on a token that was
        drawn and then left out.

    Returns:
      The decision. At most `num_drafted` thresholds are above 0; laws beyond mean
      nothing.
    """
    length = _check(target_probs, draft_probs, draft_tokens, num_drafted)
    ratios = _ratios(target_probs, draft_probs, draft_tokens)
    drafted = jnp.arange(draft_tokens.shape[-1]) < length
    ones = jnp.ones(target_probs.shape[:-1], ratios.dtype)
    laws, _ = _residual(ones, target_probs, draft_probs, length)
    return Decision(jnp.where(drafted, jnp.minimum(ratios, 1.0), 0.0), laws)


def block_rule(
    target_probs: Array,
    draft_probs: Array,
    draft_tokens: Array,
    num_drafted: Array | None = None,
) -> Decision:
    """Judge the drafted tokens together: no rule for chains keeps more on average.

    With w_0 = 1 and w_i = min(1, w_{i-1} target_i(x_i) / draft_i(x_i)) the residual
    after i tokens is R_i = max(0, w_i target_{i+1} - draft_{i+1}), of mass |R_i|. Test
    i passes with probability |R_i| / (|R_i| + 1 - w_i), the last with w_i. The longest
    prefix whose test passes is kept, whatever the tests before it say; R_i normalised
    gives the token that follows, the target's own law after the whole chain.

    Reference: Sun et al. 2024, Algorithm 2.

    Args:
      target_probs: as in `token_rule`.
      draft_probs: as in `token_rule`.
      draft_tokens: as in `token_rule`.
      num_drafted: as in `token_rule`.

    Returns:
      The decision.
    """
    length = _check(target_probs, draft_probs, draft_tokens, num_drafted)
    ratios = _ratios(target_probs, draft_probs, draft_tokens)
    weight = jnp.ones_like(ratios[..., 0])
    weights = [weight]
    for i in range(ratios.shape[-1]):
        weight = jnp.minimum(1.0, weight * ratios[..., i])
        weights.append(weight)
    weights = jnp.stack(weights, axis=-1)
    laws, mass = _residual(weights, target_probs, draft_probs, length)
    weights, mass = weights[..., 1:], mass[..., 1:]
    either = mass + 1.0 - weights
    # A residual without mass under a full weight: the laws agree, later tests pass too.
    inner = jnp.where(either > 0, mass / jnp.where(either > 0, either, 1.0), 1.0)
    place = jnp.arange(1, draft_tokens.shape[-1] + 1)
    tests = jnp.where(place == length, weights, inner)
    return Decision(jnp.where(place <= length, tests, 0.0), laws)


def rejection(
    target_probs: Array,
    draft_probs: Array,
    draft_tokens: Array,
    uniforms: Array,
    gumbel: Array,
    num_drafted: Array | None = None,
) -> tuple[Array, Array]:
    """Verify a chain by `token_rule`.

    Args:
      target_probs: `[..., A, V]`.
      draft_probs: `[..., A - 1, V]`.
      draft_tokens: `[..., A - 1] int32`.
      uniforms: `[..., A - 1]` in [0, 1), independent of how the chain was drawn.
      gumbel: `[..., V]`, Gumbel noise, independent of both.
      num_drafted: `[...] int32` or None, see `token_rule`.

    Returns:
      num_accepted `[...] int32`, and the recovered or bonus token `[...] int32` that
      follows the accepted ones.
    """
    decision = token_rule(target_probs, draft_probs, draft_tokens, num_drafted)
    passed = uniforms < decision.thresholds
    num_accepted = jnp.sum(jnp.cumprod(passed.astype(jnp.int32), axis=-1), axis=-1)
    return num_accepted, _follow(decision, num_accepted, gumbel)


def block_verification(
    target_probs: Array,
    draft_probs: Array,
    draft_tokens: Array,
    uniforms: Array,
    gumbel: Array,
    num_drafted: Array | None = None,
) -> tuple[Array, Array]:
    """Verify a chain by `block_rule`.

    Args:
      target_probs: `[..., A, V]`.
      draft_probs: `[..., A - 1, V]`.
      draft_tokens: `[..., A - 1] int32`.
      uniforms: `[..., A - 1]`, see `rejection`.
      gumbel: `[..., V]`, see `rejection`.
      num_drafted: `[...] int32` or None, see `token_rule`.

    Returns:
      num_accepted and token, as of `rejection`.
    """
    decision = block_rule(target_probs, draft_probs, draft_tokens, num_drafted)
    passed = uniforms < decision.thresholds
    place = jnp.arange(1, passed.shape[-1] + 1, dtype=jnp.int32)
    num_accepted = jnp.max(jnp.where(passed, place, 0), axis=-1, initial=0)
    return num_accepted, _follow(decision, num_accepted, gumbel)


def point_mass(tokens: Array, vocab_size: int, dtype=jnp.float32) -> Array:
    """Give the laws of tokens chosen without chance.

    Args:
      tokens: `[...] int32`.
      vocab_size: V.
      dtype: of the result.

    Returns:
      `[..., V]`: 1 at the token, 0 elsewhere.
    """
    return (tokens[..., None] == jnp.arange(vocab_size)).astype(dtype)


def num_confident(draft_probs: Array, least: float) -> Array:
    """Count the levels to draft: those before the first law that is too flat.

    A law is too flat if its largest probability is below `least`. The token drawn at
    the level is not looked at: leaving a token out because it is an unlikely one
    changes the law of the output.

    Args:
      draft_probs: `[..., A - 1, V]`, the drafter's laws along the chain.
      least: probability.

    Returns:
      `[...] int32`, a `num_drafted` that keeps the rules exact.
    """
    confident = jnp.max(draft_probs, axis=-1) >= least
    return jnp.sum(jnp.cumprod(confident.astype(jnp.int32), axis=-1), axis=-1)


def _check(target_probs, draft_probs, draft_tokens, num_drafted) -> Array:
    """Check shapes; give the chain's length `[..., 1]`."""
    *batch, depth = draft_tokens.shape
    vocab_size = target_probs.shape[-1]
    chex.assert_shape(target_probs, (*batch, depth + 1, vocab_size))
    chex.assert_shape(draft_probs, (*batch, depth, vocab_size))
    if num_drafted is None:
        num_drafted = jnp.full(batch, depth, jnp.int32)
    chex.assert_shape(num_drafted, tuple(batch))
    return num_drafted[..., None]


def _ratios(target_probs, draft_probs, draft_tokens) -> Array:
    """Target's over drafter's probability of each drafted token, `[..., A - 1]`."""
    chosen = draft_tokens[..., None]
    ours = jnp.take_along_axis(target_probs[..., :-1, :], chosen, axis=-1)[..., 0]
    theirs = jnp.take_along_axis(draft_probs, chosen, axis=-1)[..., 0]
    # A token that the drafter cannot have drawn never passes.
    possible = (ours > 0) & (theirs > 0)
    return jnp.where(possible, ours / jnp.where(possible, theirs, 1.0), 0.0)


def _residual(weights, target_probs, draft_probs, length) -> tuple[Array, Array]:
    """Laws and masses of max(0, weight * target - draft), `[..., A, V]`, `[..., A]`.

    At the chain's end, and where nothing is left, the law is the target's.
    """
    rest = weights[..., :-1, None] * target_probs[..., :-1, :] - draft_probs
    rest = jnp.pad(
        jnp.maximum(rest, 0.0), [(0, 0)] * (rest.ndim - 2) + [(0, 1), (0, 0)]
    )
    mass = jnp.sum(rest, axis=-1)
    left = (mass > 0) & (jnp.arange(mass.shape[-1]) < length)
    scale = jnp.where(left, mass, 1.0)[..., None]
    return jnp.where(left[..., None], rest / scale, target_probs), mass


def _follow(decision: Decision, num_accepted: Array, gumbel: Array) -> Array:
    """Draw the token after the accepted ones."""
    place = num_accepted[..., None, None]
    law = jnp.take_along_axis(decision.replacement, place, axis=-2)[..., 0, :]
    # Tokens without probability have log 0 and are never drawn.
    return sampling.argmax(jnp.log(law) + gumbel)
