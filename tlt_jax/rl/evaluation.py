"""Statistics of repeated samples on the same problems: avg@k and pass@k."""

import numpy as np


def avg_at_k(scores: np.ndarray, k: int) -> float:
    """Averages the first k samples of every problem, problems counting equally.

    Args:
      scores: `[P, n]` float or bool, finite, n >= k samples of each of P problems.
      k: samples used, >= 1.

    Returns:
      The mean score.

    Raises:
      ValueError: no problem, k outside [1, n] or a score that is not finite.
    """
    scores = _matrix("scores", np.asarray(scores, np.float64))
    _check_k(k, scores.shape[1])
    if not np.isfinite(scores[:, :k]).all():
        raise ValueError(
            "scores holds a value that is not finite: give a failed sample a score."
        )
    return float(scores[:, :k].mean())


def pass_at_k(correct: np.ndarray, k: int) -> float:
    """Estimates the chance that at least one of k samples is right, without bias.

    With c of n samples right, `1 - C(n - c, k) / C(n, k)`: the chance that a subset of
    k of the samples at hand holds a right one, averaged over problems. Computed as a
    product of k factors below one, so it neither overflows nor cancels.

    Reference: Chen et al., "Evaluating Large Language Models Trained on Code",
    section 2.1.

    Args:
      correct: `[P, n]` bool, n >= k samples of each of P problems.
      k: subset size, >= 1.

    Returns:
      A number in [0, 1].

    Raises:
      ValueError: no problem, values that are not bool, or k outside [1, n].
    """
    correct = np.asarray(correct)
    if correct.dtype != bool:
        raise ValueError(
            f"correct has dtype {correct.dtype}: pass@k counts right and wrong, so "
            "compare the scores with a threshold first."
        )
    num_samples = _matrix("correct", correct).shape[1]
    _check_k(k, num_samples)
    num_wrong = num_samples - correct.sum(axis=1)
    drawn = np.arange(k)
    # The i-th of k draws without replacement is wrong with (n - c - i) / (n - i).
    all_wrong = np.maximum(num_wrong[:, None] - drawn, 0) / (num_samples - drawn)
    return float(np.mean(1.0 - all_wrong.prod(axis=1)))


def _matrix(name: str, values: np.ndarray) -> np.ndarray:
    if values.ndim != 2 or not values.shape[0]:
        raise ValueError(
            f"{name} has shape {values.shape}: give [problems, samples] with at least "
            "one problem."
        )
    return values


def _check_k(k: int, num_samples: int) -> None:
    if not 1 <= k <= num_samples:
        raise ValueError(
            f"k={k} is outside [1, {num_samples}], the samples drawn per problem: "
            "lower k or draw more."
        )
