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


def test_grpo_divides_by_the_chosen_deviation():
    # Rewards 0, 0, 0, 1: mean 1/4, sum of squares 3/4; std 1/2 (sample), sqrt(3)/4.
    rewards = np.array([[0.0, 0.0, 0.0, 1.0]])
    np.testing.assert_allclose(
        advantages.grpo(rewards), [[-0.5, -0.5, -0.5, 1.5]], atol=1e-5
    )
    np.testing.assert_allclose(
        advantages.grpo(rewards, ddof=0),
        [[-0.5773503, -0.5773503, -0.5773503, 1.7320508]],
        atol=1e-5,
    )
    # eps stands outside the root: -0.25 / (0.5 + 0.5).
    np.testing.assert_allclose(
        advantages.grpo(rewards, eps=0.5), [[-0.25, -0.25, -0.25, 0.75]]
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
    rewards = np.array([[0.1, 0.1, 0.1], [0.0, 1.0, 0.7], [0.3, 0.3, 9.0]])
    mask = np.array([[True] * 3, [True] * 3, [True, True, False]])
    result = advantages.estimate(estimator, rewards, mask)
    np.testing.assert_array_equal(result[[0, 2]], 0.0)
    assert np.all(result[1] != 0)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_dropped_responses_do_not_count(estimator):
    rng = np.random.default_rng(0)
    rewards = rng.normal(size=(4, 3))
    wide = np.full((4, 5), np.nan)
    wide[:, [0, 2, 3]] = rewards
    result = advantages.estimate(estimator, wide, np.isfinite(wide))
    np.testing.assert_allclose(
        result[:, [0, 2, 3]], advantages.estimate(estimator, rewards), rtol=1e-6
    )
    np.testing.assert_array_equal(result[:, [1, 4]], 0.0)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_groups_of_one_and_of_none_are_zero(estimator):
    rewards = np.array([[3.0, 1.0], [2.0, 5.0]])
    mask = np.array([[True, False], [False, False]])
    result = advantages.estimate(estimator, rewards, mask)
    np.testing.assert_array_equal(result, np.zeros((2, 2)))


@pytest.mark.parametrize("seed", range(5))
def test_against_a_loop_over_groups(seed):
    rng = np.random.default_rng(seed)
    rewards = rng.normal(size=(6, 7))
    mask = rng.random((6, 7)) < 0.7
    centred_all = []
    for p in range(6):
        group = rewards[p, mask[p]]
        n = len(group)
        if n < 2:
            continue
        centred_all += list(group - group.mean())
        np.testing.assert_allclose(
            advantages.grpo(rewards, mask)[p, mask[p]],
            (group - group.mean()) / (group.std(ddof=1) + 1e-6),
            rtol=1e-5,
        )
        others = [np.delete(group, i).mean() for i in range(n)]
        np.testing.assert_allclose(
            advantages.rloo(rewards, mask)[p, mask[p]], group - others, rtol=1e-5
        )
    # With two or more responses in each group every centred reward is in the list.
    if (mask.sum(1) >= 2).all():
        np.testing.assert_allclose(
            advantages.reinforce_pp_baseline(rewards, mask)[mask],
            centred_all / np.std(centred_all, ddof=1),
            rtol=1e-5,
        )


def test_signal_and_zero_std_frac():
    rewards = np.array([[0.0, 0.0], [0.0, 1.0], [1.0, 1.0], [1.0, 0.0]])
    np.testing.assert_array_equal(
        advantages.carries_signal(rewards), [False, True, False, True]
    )
    assert advantages.zero_std_frac(rewards) == 0.5
    mask = np.array([[True, True], [True, False], [False, False], [True, True]])
    np.testing.assert_array_equal(
        advantages.carries_signal(rewards, mask), [False, False, False, True]
    )
    assert advantages.zero_std_frac(rewards, mask) == pytest.approx(2 / 3)
    assert advantages.zero_std_frac(rewards, np.zeros((4, 2), bool)) == 0.0


def test_overlong_shaping_at_its_corners():
    lengths = np.array([0, 16384, 16385, 18432, 20480, 30000])
    np.testing.assert_allclose(
        advantages.overlong_shaping(lengths, max_length=20480, buffer=4096),
        [0, 0, -1 / 4096, -0.5, -1, -1],
    )
    np.testing.assert_allclose(
        advantages.overlong_shaping(lengths, max_length=20480, buffer=4096, penalty=2),
        [0, 0, -2 / 4096, -1, -2, -2],
    )
    # Without a buffer the penalty starts beyond the limit.
    np.testing.assert_array_equal(
        advantages.overlong_shaping(np.array([10, 11]), max_length=10, buffer=0),
        [0, -1],
    )


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: advantages.grpo(np.zeros(3)), "rewards has shape"),
        (lambda: advantages.grpo(np.zeros((2, 2)), np.ones((2, 3), bool)), "mask has"),
        (lambda: advantages.rloo(np.array([[0.0, np.nan]])), r"rewards\[0, 1\] is nan"),
        (lambda: advantages.grpo(np.zeros((1, 2)), ddof=2), "ddof=2"),
        (lambda: advantages.grpo(np.zeros((1, 2)), eps=0.0), "eps=0.0"),
        (lambda: advantages.estimate("ppo", np.zeros((1, 2))), "'ppo' is unknown"),
        (
            lambda: advantages.overlong_shaping(np.ones(1), max_length=3, buffer=4),
            "buffer=4",
        ),
        (
            lambda: advantages.overlong_shaping(
                np.ones(1), max_length=3, buffer=1, penalty=-1
            ),
            "penalty=-1",
        ),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
