"""Advantages of responses from the rewards of their group, on the host.

Every estimator maps rewards `[P, R]` and a mask of the responses that exist to
advantages `[P, R] float32`. All of them give exactly zero to a dropped response and to
every response of a group whose rewards are all equal (a group of one included): such a
group says nothing about which response to prefer, and rounding must not invent it.
"""

from typing import Literal, get_args

import numpy as np

from tlt_jax.runtime import external

Estimator = Literal["grpo", "dr_grpo", "rloo", "reinforce_pp_baseline"]


def grpo(
    rewards: np.ndarray,
    mask: np.ndarray | None = None,
    *,
    ddof: Literal[0, 1] = 1,
    eps: float = 1e-6,
) -> np.ndarray:
    """Standardizes rewards within their group: `(r - mean) / (std + eps)`.

    DAPO and GSPO use this estimator too.

    Reference: Shao et al., "DeepSeekMath", section 4.1.2. The paper leaves open which
    standard deviation is meant; the default is the sample's (`ddof=1`), as in veRL.

    Args:
      rewards: `[P, R]` float, finite wherever `mask` holds.
      mask: `[P, R]` bool, False for a dropped response; None: all exist.
      ddof: 0 divides the sum of squares by the group's size n, 1 by n - 1.
      eps: added to the standard deviation; in units of reward, > 0.

    Returns:
      `[P, R] float32`.

    Raises:
      ValueError: shapes differ, a reward is not finite, or `ddof` or `eps` is out of
        range.
    """
    if ddof not in (0, 1):
        raise ValueError(
            f"ddof={ddof!r}: give 0 (population) or 1 (sample standard deviation)."
        )
    if not eps > 0:
        raise ValueError(f"eps={eps!r} must be positive: it keeps the quotient finite.")
    rewards, mask = _check(rewards, mask)
    centred = _centred(rewards, mask)
    num = mask.sum(axis=1, keepdims=True)
    variance = (centred**2).sum(axis=1, keepdims=True) / np.maximum(num - ddof, 1)
    return (centred / (np.sqrt(variance) + eps)).astype(np.float32)


def dr_grpo(rewards: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    """Subtracts the group's mean and leaves the scale: `r - mean`.

    Dividing by the standard deviation would weight very easy and very hard prompts
    above the others.

    Reference: Liu et al., "Understanding R1-Zero-Like Training: A Critical
    Perspective", section 3.

    Args:
      rewards: `[P, R]` float, finite wherever `mask` holds.
      mask: `[P, R]` bool, False for a dropped response; None: all exist.

    Returns:
      `[P, R] float32`.

    Raises:
      ValueError: shapes differ or a reward is not finite.
    """
    return _centred(*_check(rewards, mask)).astype(np.float32)


def rloo(rewards: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    """Subtracts the mean of the group's other responses.

    With n responses, `r_i - sum_{j != i} r_j / (n - 1)`, which equals
    `n / (n - 1) * (r_i - mean)`. The baseline does not depend on its own response, so
    the gradient is unbiased.

    Reference: Ahmadian et al., "Back to Basics: Revisiting REINFORCE-Style Optimization
    for Learning from Human Feedback in LLMs", section 3 (REINFORCE leave-one-out).

    Args:
      rewards: `[P, R]` float, finite wherever `mask` holds.
      mask: `[P, R]` bool, False for a dropped response; None: all exist.

    Returns:
      `[P, R] float32`.

    Raises:
      ValueError: shapes differ or a reward is not finite.
    """
    rewards, mask = _check(rewards, mask)
    num = mask.sum(axis=1, keepdims=True)
    return (_centred(rewards, mask) * num / np.maximum(num - 1, 1)).astype(np.float32)


def reinforce_pp_baseline(
    rewards: np.ndarray, mask: np.ndarray | None = None, *, eps: float = 1e-8
) -> np.ndarray:
    """Subtracts the group's mean, then scales by the whole batch's deviation.

    The mean of the centred rewards over the batch is zero, so whitening is one division
    by `sqrt(sum of squares / (n - 1) + eps)`, n the number of responses. Responses
    count equally, whatever their length: counting tokens would shift the mean and give
    an advantage to groups whose rewards are all equal.

    Reference: Hu et al., "REINFORCE++: Stabilizing Critic-Free Policy Optimization with
    Global Advantage Normalization", the variant with baseline.

    Args:
      rewards: `[P, R]` float, finite wherever `mask` holds.
      mask: `[P, R]` bool, False for a dropped response; None: all exist.
      eps: added to the variance; in units of squared reward, > 0.

    Returns:
      `[P, R] float32`.

    Raises:
      ValueError: shapes differ, a reward is not finite or `eps` is not positive.
    """
    if not eps > 0:
        raise ValueError(f"eps={eps!r} must be positive: it keeps the quotient finite.")
    rewards, mask = _check(rewards, mask)
    centred = _centred(rewards, mask)
    variance = (centred**2).sum() / max(mask.sum() - 1, 1)
    return (centred / np.sqrt(variance + eps)).astype(np.float32)


def estimate(
    estimator: str, rewards: np.ndarray, mask: np.ndarray | None = None
) -> np.ndarray:
    """Computes advantages with the estimator called by name, at its defaults.

    Args:
      estimator: `grpo`, `dr_grpo`, `rloo` or `reinforce_pp_baseline`; or a function of
        one's own, `package.module:name`, `[P, R]` to `[P, R]`.
      rewards: `[P, R]` float, finite wherever `mask` holds.
      mask: `[P, R]` bool, False for a dropped response; None: all exist.

    Returns:
      `[P, R] float32`.

    Raises:
      ValueError: unknown name, shapes differ or a reward is not finite.
    """
    match estimator:
        case "grpo":
            return grpo(rewards, mask)
        case "dr_grpo":
            return dr_grpo(rewards, mask)
        case "rloo":
            return rloo(rewards, mask)
        case "reinforce_pp_baseline":
            return reinforce_pp_baseline(rewards, mask)
    if external.is_external(estimator):
        return external.load("advantage", estimator)(rewards)
    raise ValueError(
        f"advantage estimator {estimator!r} is unknown: choose from "
        f"{', '.join(get_args(Estimator))}."
    )


def carries_signal(rewards: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    """Says which groups hold two different rewards.

    DAPO's dynamic sampling keeps these groups and samples further prompts until enough
    of them are there. Give it rewards before overlong shaping: the rule asks whether
    some answers are right and some wrong.

    Reference: Yu et al., "DAPO: An Open-Source LLM Reinforcement Learning System at
    Scale", section 3.2.

    Args:
      rewards: `[P, R]` float, finite wherever `mask` holds.
      mask: `[P, R]` bool, False for a dropped response; None: all exist.

    Returns:
      `[P]` bool; False for an empty group.

    Raises:
      ValueError: shapes differ or a reward is not finite.
    """
    rewards, mask = _check(rewards, mask)
    return _differ(rewards, mask)[:, 0]


def zero_std_frac(rewards: np.ndarray, mask: np.ndarray | None = None) -> float:
    """Computes the fraction of groups whose rewards are all equal.

    Args:
      rewards: `[P, R]` float, finite wherever `mask` holds.
      mask: `[P, R]` bool, False for a dropped response; None: all exist.

    Returns:
      A number in [0, 1]; groups without any response are not counted, and without any
      group it is 0.

    Raises:
      ValueError: shapes differ or a reward is not finite.
    """
    rewards, mask = _check(rewards, mask)
    present = mask.any(axis=1)
    if not present.any():
        return 0.0
    return float(np.mean(~_differ(rewards, mask)[present, 0]))


def overlong_shaping(
    lengths: np.ndarray, *, max_length: int, buffer: int, penalty: float = 1.0
) -> np.ndarray:
    """Computes what is added to the reward of a response that grows too long.

    Zero up to `max_length - buffer` tokens, then falling linearly to `-penalty` at
    `max_length`, and `-penalty` beyond.

    Reference: Yu et al., "DAPO: An Open-Source LLM Reinforcement Learning System at
    Scale", section 3.4, equation 13.

    Args:
      lengths: `[...]` int, tokens in the response, EOS included.
      max_length: where the full penalty is reached, in tokens.
      buffer: width of the ramp in tokens, 0 <= buffer <= max_length.
      penalty: >= 0, in units of reward.

    Returns:
      `[...] float32`, between -penalty and 0.

    Raises:
      ValueError: `buffer` or `penalty` is out of range.
    """
    if not 0 <= buffer <= max_length:
        raise ValueError(
            f"buffer={buffer} is outside [0, max_length={max_length}]: it is the part "
            "of the length limit over which the penalty grows."
        )
    if not penalty >= 0:
        raise ValueError(
            f"penalty={penalty!r} is negative: give the amount to subtract, as a "
            "positive number."
        )
    excess = np.asarray(lengths, np.float64) - (max_length - buffer)
    return (-penalty * np.clip(excess / max(buffer, 1), 0.0, 1.0)).astype(np.float32)


def _check(
    rewards: np.ndarray, mask: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Returns `[P, R]` float64 rewards, zero where dropped, and the bool mask."""
    rewards = np.asarray(rewards, np.float64)
    if rewards.ndim != 2:
        raise ValueError(
            f"rewards has shape {rewards.shape}: give [prompts, responses per prompt]."
        )
    mask = np.ones(rewards.shape, bool) if mask is None else np.asarray(mask, bool)
    if mask.shape != rewards.shape:
        raise ValueError(
            f"mask has shape {mask.shape} for rewards of shape {rewards.shape}: give "
            "one entry per response."
        )
    bad = np.argwhere(mask & ~np.isfinite(rewards))
    if len(bad):
        prompt, response = bad[0]
        raise ValueError(
            f"rewards[{prompt}, {response}] is {rewards[prompt, response]} ({len(bad)} "
            "not finite in all): drop such responses by the mask or give them a finite "
            "reward."
        )
    return np.where(mask, rewards, 0.0), mask


def _differ(rewards: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """`[P, 1]` bool: the group holds two different rewards."""
    high = np.max(rewards, axis=1, keepdims=True, where=mask, initial=-np.inf)
    low = np.min(rewards, axis=1, keepdims=True, where=mask, initial=np.inf)
    return high > low


def _centred(rewards: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """`[P, R]` rewards less their group's mean; exactly 0 where nothing differs."""
    num = mask.sum(axis=1, keepdims=True)
    mean = rewards.sum(axis=1, keepdims=True) / np.maximum(num, 1)
    return np.where(mask & _differ(rewards, mask), rewards - mean, 0.0)
