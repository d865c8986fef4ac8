"""pass@k against counting every subset, avg@k against the mean."""

import itertools

import numpy as np
import pytest

from tlt_jax.rl import evaluation


@pytest.mark.parametrize("num_right", range(6))
@pytest.mark.parametrize("k", range(1, 6))
def test_pass_at_k_counts_the_subsets(num_right, k):
    correct = np.arange(5) < num_right
    subsets = list(itertools.combinations(correct, k))
    assert evaluation.pass_at_k(correct[None], k) == pytest.approx(
        sum(map(any, subsets)) / len(subsets), abs=1e-12
    )


def test_pass_at_k_literals():
    # 1 - C(7, 5) / C(10, 5) = 1 - 21 / 252.
    correct = np.arange(10)[None] < 3
    assert evaluation.pass_at_k(correct, 5) == pytest.approx(11 / 12)
    # Problems count equally: (11/12 + 0) / 2.
    both = np.concatenate([correct, np.zeros((1, 10), bool)])
    assert evaluation.pass_at_k(both, 5) == pytest.approx(11 / 24)


def test_pass_at_k_stays_exact_with_many_samples():
    correct = np.zeros((1, 10_000), bool)
    correct[0, 0] = True
    assert evaluation.pass_at_k(correct, 100) == pytest.approx(0.01, rel=1e-9)


def test_avg_at_k_uses_the_first_k():
    scores = np.array([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    assert evaluation.avg_at_k(scores, 2) == 0.25
    assert evaluation.avg_at_k(scores, 3) == 0.5


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: evaluation.pass_at_k(np.ones((2, 3), bool), 4), r"k=4 .* \[1, 3\]"),
        (lambda: evaluation.pass_at_k(np.ones((2, 3), bool), 0), "k=0"),
        (lambda: evaluation.pass_at_k(np.ones((2, 3)), 1), "dtype float64"),
        (lambda: evaluation.pass_at_k(np.ones((0, 3), bool), 1), "shape"),
        (lambda: evaluation.avg_at_k(np.ones((2, 3)), 4), "k=4"),
        (lambda: evaluation.avg_at_k(np.full((1, 2), np.nan), 1), "not finite"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
