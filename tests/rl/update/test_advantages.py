"""Advantages against the papers' formulas worked out by hand, and their laws."""

import numpy as np
import pytest

from tlt_jax.rl.update import advantages

ESTIMATORS = ("grpo", "dr_grpo", "rloo", "reinforce_pp_baseline")
ONE_TO_SIX = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])


def test_rloo_of_one_to_six():
    np.testing.assert_allclose(
        advantages.rloo(ONE_TO_SIX), [[-1.5, 0, 1.5], [-1.5, 0, 1.5]], rtol=1e-6
    )


def test_grpo_divides_by_the_samples_deviation():
    # Rewards 0, 0, 0, 1: mean 1/4, sum of squares 3/4, so that std is 1/2.
    rewards = np.array([[0.0, 0.0, 0.0, 1.0]])
    np.testing.assert_allclose(
        advantages.grpo(rewards), [[-0.5, -0.5, -0.5, 1.5]], atol=1e-5
    )
    # 1e-6 stands outside the root: -0.25e-6 / (0.5e-6 + 1e-6).
    np.testing.assert_allclose(
        advantages.grpo(1e-6 * rewards), [[-1 / 6, -1 / 6, -1 / 6, 0.5]], rtol=1e-6
    )


def test_dr_grpo_keeps_the_scale():
    np.testing.assert_array_equal(
        advantages.dr_grpo(np.array([[0.0, 1.0], [0.0, 10.0]])),
        [[-0.5, 0.5], [-5.0, 5.0]],
    )


def test_reinforce_pp_baseline_scales_by_the_whole_batch():
    # Centred -1 1 -3 3: sum of squares 20 over 4 - 1.
    scale = np.sqrt(20 / 3)
    np.testing.assert_allclose(
        advantages.reinforce_pp_baseline(np.array([[0.0, 2.0], [0.0, 6.0]])),
        np.array([[-1, 1], [-3, 3]]) / scale,
        rtol=1e-6,
    )


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_equal_rewards_have_exactly_zero_advantage(estimator):
    # The mean of three 0.1 is not 0.1 in floating point.
    rewards = np.array([[0.1, 0.1, 0.1], [0.0, 1.0, 0.7], [0.3, 0.3, 0.3]])
    result = advantages.estimate(estimator, rewards)
    np.testing.assert_array_equal(result[[0, 2]], 0.0)
    assert np.all(result[1] != 0)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_groups_of_one_are_zero(estimator):
    result = advantages.estimate(estimator, np.array([[3.0], [2.0]]))
    np.testing.assert_array_equal(result, np.zeros((2, 1)))


@pytest.mark.parametrize("seed", range(5))
def test_against_a_loop_over_groups(seed):
    rng = np.random.default_rng(seed)
    rewards = rng.normal(size=(6, 2 + seed))
    centred_all = []
    for p, group in enumerate(rewards):
        centred_all.append(group - group.mean())
        np.testing.assert_allclose(
            advantages.grpo(rewards)[p],
            (group - group.mean()) / (group.std(ddof=1) + 1e-6),
            rtol=1e-5,
        )
        others = [np.delete(group, i).mean() for i in range(len(group))]
        np.testing.assert_allclose(
            advantages.rloo(rewards)[p], group - others, rtol=1e-5
        )
    np.testing.assert_allclose(
        advantages.reinforce_pp_baseline(rewards),
        centred_all / np.std(centred_all, ddof=1),
        rtol=1e-5,
    )


def test_signal():
    rewards = np.array([[0.0, 0.0], [0.0, 1.0], [1.0, 1.0], [1.0, 0.0]])
    np.testing.assert_array_equal(
        advantages.carries_signal(rewards), [False, True, False, True]
    )
    assert not advantages.carries_signal(rewards[:, :1]).any()


def test_overlong_shaping_at_its_corners():
    lengths = np.array([0, 16384, 16385, 18432, 20480, 30000])
    np.testing.assert_allclose(
        advantages.overlong_shaping(lengths, max_length=20480, buffer=4096, penalty=1),
        [0, 0, -1 / 4096, -0.5, -1, -1],
    )
    np.testing.assert_allclose(
        advantages.overlong_shaping(lengths, max_length=20480, buffer=4096, penalty=2),
        [0, 0, -2 / 4096, -1, -2, -2],
    )
    # Without a buffer the penalty starts beyond the limit.
    np.testing.assert_array_equal(
        advantages.overlong_shaping(
            np.array([10, 11]), max_length=10, buffer=0, penalty=1
        ),
        [0, -1],
    )


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: advantages.grpo(np.zeros(3)), "rewards has shape"),
        (lambda: advantages.rloo(np.array([[0.0, np.nan]])), r"rewards\[0, 1\] is nan"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
