"""Advantages of responses from the rewards of their group, on the host.

Every estimator maps finite rewards `[P, R]` float to advantages `[P, R] float32`. All
of them give exactly zero to every response of a group whose rewards are all equal (a
group of one included): such a group says nothing about which response to prefer, and
rounding must not invent it. What they refuse stands at `estimate`.
"""

import numpy as np

from tlt_jax.runtime import external

# Added to the standard deviation, in units of reward, and to the variance.
_GRPO_EPS, _REINFORCE_EPS = 1e-6, 1e-8


def grpo(rewards: np.ndarray) -> np.ndarray:
    """Standardizes rewards within their group: `(r - mean) / (std + eps)`.

    DAPO and GSPO use this estimator too.

    Reference: Shao et al., "DeepSeekMath", section 4.1.2. The paper leaves open which
    standard deviation is meant; it is the sample's here, as in veRL.
    """
    centred = _centred(rewards)
    num = max(centred.shape[1] - 1, 1)
    variance = (centred**2).sum(axis=1, keepdims=True) / num
    return (centred / (np.sqrt(variance) + _GRPO_EPS)).astype(np.float32)


def dr_grpo(rewards: np.ndarray) -> np.ndarray:
    """Subtracts the group's mean and leaves the scale: `r - mean`.

    Dividing by the standard deviation would weight very easy and very hard prompts
    above the others.

    Reference: Liu et al., "Understanding R1-Zero-Like Training: A Critical
    Perspective", section 3.
    """
    return _centred(rewards).astype(np.float32)


def rloo(rewards: np.ndarray) -> np.ndarray:
    """Subtracts the mean of the group's other responses.

    With n responses, `r_i - sum_{j != i} r_j / (n - 1)`, which equals
    `n / (n - 1) * (r_i - mean)`. The baseline does not depend on its own response, so
    the gradient is unbiased.

    Reference: Ahmadian et al., "Back to Basics: Revisiting REINFORCE-Style Optimization
    for Learning from Human Feedback in LLMs", section 3 (REINFORCE leave-one-out).
    """
    centred = _centred(rewards)
    num = centred.shape[1]
    return (centred * num / max(num - 1, 1)).astype(np.float32)


def reinforce_pp_baseline(rewards: np.ndarray) -> np.ndarray:
    """Subtracts the group's mean, then scales by the whole batch's deviation.

    The mean of the centred rewards over the batch is zero, so whitening is one division
    by `sqrt(sum of squares / (n - 1) + eps)`, n the number of responses. Responses
    count equally, whatever their length: counting tokens would shift the mean and give
    an advantage to groups whose rewards are all equal.

    Reference: Hu et al., "REINFORCE++: Stabilizing Critic-Free Policy Optimization with
    Global Advantage Normalization", the variant with baseline.
    """
    centred = _centred(rewards)
    variance = (centred**2).sum() / max(centred.size - 1, 1)
    return (centred / np.sqrt(variance + _REINFORCE_EPS)).astype(np.float32)


def estimate(estimator: str, rewards: np.ndarray) -> np.ndarray:
    """Computes advantages with the estimator called by name.

    Args:
      estimator: `grpo`, `dr_grpo`, `rloo` or `reinforce_pp_baseline`; or a function of
        one's own, `package.module:name`, `[P, R]` to `[P, R]`.
      rewards: `[P, R]` float, finite.

    Returns:
      `[P, R] float32`.

    Raises:
      ValueError: rewards of another shape, or one is not finite; or there is no such
        function.
    """
    if external.is_external(estimator):
        return external.load("advantage", estimator)(rewards)
    ours = (grpo, dr_grpo, rloo, reinforce_pp_baseline)
    return {function.__name__: function for function in ours}[estimator](rewards)


def carries_signal(rewards: np.ndarray) -> np.ndarray:
    """Says which groups of `[P, R]` rewards hold two different ones: `[P]` bool.

    DAPO's dynamic sampling keeps these groups and samples further prompts until enough
    of them are there. Give it rewards before overlong shaping: the rule asks whether
    some answers are right and some wrong.

    Reference: Yu et al., "DAPO: An Open-Source LLM Reinforcement Learning System at
    Scale", section 3.2.
    """
    return rewards.max(axis=1) > rewards.min(axis=1)


def overlong_shaping(
    lengths: np.ndarray, *, max_length: int, buffer: int, penalty: float
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
    """
    excess = np.asarray(lengths, np.float64) - (max_length - buffer)
    return (-penalty * np.clip(excess / max(buffer, 1), 0.0, 1.0)).astype(np.float32)


def _centred(rewards: np.ndarray) -> np.ndarray:
    """`[P, R] float64` less the group's mean; exactly 0 where nothing differs."""
    rewards = np.asarray(rewards, np.float64)
    if rewards.ndim != 2:
        raise ValueError(
            f"rewards has shape {rewards.shape}: give [prompts, responses per prompt]."
        )
    bad = np.argwhere(~np.isfinite(rewards))
    if len(bad):
        prompt, response = bad[0]
        raise ValueError(
            f"rewards[{prompt}, {response}] is {rewards[prompt, response]} ({len(bad)} "
            "not finite in all): give such responses a finite reward."
        )
    mean = rewards.sum(axis=1, keepdims=True) / rewards.shape[1]
    return np.where(carries_signal(rewards)[:, None], rewards - mean, 0.0)
