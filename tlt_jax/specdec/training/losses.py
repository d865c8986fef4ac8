"""What a drafter's law and feature are compared by: losses of single positions.

Laws are logits over the draft vocabulary; the target's are constants. The overlap
sum_v min(p_v, q_v) = 1 - TV(p, q) is the probability that one drafted sample is
accepted by rejection sampling.
"""

import jax
import jax.numpy as jnp
from jax import lax

from tlt_jax.runtime import external
from tlt_jax.types import Array

# How soon the hybrid loss turns from KL to TV; the value its authors found best.
_LK_RATE = 3.0


def soft_cross_entropy(target_logits: Array, draft_logits: Array) -> Array:
    """Compute -sum p log q in nats, `[..., V] float32` to `[...]`."""
    target_probs = jax.nn.softmax(target_logits)
    return -jnp.sum(target_probs * jax.nn.log_softmax(draft_logits), axis=-1)


def kl(target_logits: Array, draft_logits: Array) -> Array:
    """Compute KL(p || q) = sum p log(p / q) in nats; arguments as above."""
    target_logprobs = jax.nn.log_softmax(target_logits)
    difference = target_logprobs - jax.nn.log_softmax(draft_logits)
    return jnp.sum(jnp.exp(target_logprobs) * difference, axis=-1)


def total_variation(target_logits: Array, draft_logits: Array) -> Array:
    """Compute sum |p - q| / 2, in [0, 1]; arguments as above."""
    difference = jax.nn.softmax(target_logits) - jax.nn.softmax(draft_logits)
    return 0.5 * jnp.sum(jnp.abs(difference), axis=-1)


def lk_hybrid(
    target_logits: Array, draft_logits: Array, rate: float = _LK_RATE
) -> Array:
    """Compute w KL + (1 - w) TV with w = exp(-rate x overlap), w held constant.

    Where the laws hardly overlap the gradient of TV vanishes and KL leads; where they
    do, TV counts what acceptance counts.

    Reference: Samarin et al., LK Losses: Direct Acceptance Rate Optimization for
    Speculative Decoding, 2026 (the loss with adaptive weight; here the weight is each
    position's own).

    A rate of 0 is KL alone; towards infinity it is TV alone. Arguments as above.
    """
    distance = total_variation(target_logits, draft_logits)
    weight = lax.stop_gradient(jnp.exp(-rate * (1.0 - distance)))
    return weight * kl(target_logits, draft_logits) + (1.0 - weight) * distance


def token_loss(name: str, target_logits: Array, draft_logits: Array) -> Array:
    """Compute the loss called `name`, `[..., V]` to `[...]`.

    `package.module:name` is a function of one's own.

    Raises:
      ValueError: there is no such loss.
    """
    match name:
        case "soft_ce":
            return soft_cross_entropy(target_logits, draft_logits)
        case "kl":
            return kl(target_logits, draft_logits)
        case "tv":
            return total_variation(target_logits, draft_logits)
        case "lk_hybrid":
            return lk_hybrid(target_logits, draft_logits)
    if external.is_external(name):
        return external.load("token_loss", name)(target_logits, draft_logits)
    raise ValueError(f"token_loss={name!r}: use soft_ce, kl, tv or lk_hybrid.")


def smooth_l1(target_features: Array, features: Array) -> Array:
    """Compute the mean over features of d^2 / 2 where |d| < 1, else |d| - 1 / 2.

    `[D, ...]` to `[...] float32`. Reference: Girshick, Fast R-CNN, 2015, eq. 3.
    """
    distance = jnp.abs((features - target_features).astype(jnp.float32))
    near = 0.5 * distance * distance
    return jnp.mean(jnp.where(distance < 1.0, near, distance - 0.5), axis=0)
