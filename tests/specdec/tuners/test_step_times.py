"""Seconds of a step: literal numbers, a twin of the law, and what is kept."""

import itertools
import json
import math

import numpy as np
import pytest

from tlt_jax.specdec import strategy
from tlt_jax.specdec.tuners import step_times

CHAINS = {d: strategy.parse(f"D{d}K1V{d + 1}") for d in (1, 2, 3, 5, 7, 8, 11, 15)}
D3, D7, D11 = CHAINS[3], CHAINS[7], CHAINS[11]


def test_tried_steps_have_the_median_of_their_calls():
    made = step_times.StepTimes(window=5)
    for seconds in (0.9, 0.1, 0.11, 0.1, 0.12, 5.0):
        made.add(1, D3, seconds)
    assert made.estimate(1, D3)[0] == pytest.approx(0.11, rel=0.03)


def test_a_slow_first_call_condemns_nothing():
    made = step_times.StepTimes()
    for seconds in (0.02, 0.02, 0.02):
        made.add(1, None, seconds)
    made.add(1, D3, 0.5)
    assert made.estimate(1, D3)[0] < 0.1
    for _ in range(8):
        made.add(1, D3, 0.5)
    assert made.estimate(1, D3)[0] == pytest.approx(0.5, rel=0.15)


def test_untried_steps_are_predicted_from_tried_ones():
    def truth(bucket, chosen):
        return (
            0.02
            + 0.0006 * bucket * (chosen.tokens_to_verify if chosen else 1)
            + (0.0015 * (chosen.draft_depth if chosen else 0))
        )

    made = step_times.StepTimes()
    for bucket, chosen in ((1, None), (1, D3), (1, D11), (8, None), (8, D3)):
        for _ in range(4):
            made.add(bucket, chosen, truth(bucket, chosen))
    for bucket, chosen in ((1, D7), (4, D3), (8, D7), (4, None)):
        assert made.estimate(bucket, chosen)[0] == pytest.approx(
            truth(bucket, chosen), rel=0.1
        )


def test_predictions_never_fall_with_depth_or_rows():
    rng = np.random.default_rng(2)
    for _ in range(20):
        made = step_times.StepTimes()
        for bucket in (1, 2, 8):
            for chosen in (None, D3, D7):
                if rng.random() < 0.5:
                    made.add(bucket, chosen, float(rng.uniform(0.01, 0.1)))
        by_depth = [made.estimate(4, CHAINS[d])[0] for d in (1, 3, 8, 15)]
        by_rows = [made.estimate(b, CHAINS[5])[0] for b in (1, 4, 16)]
        assert by_depth == sorted(by_depth) and by_rows == sorted(by_rows)


def test_doubt_falls_with_calls_and_is_larger_of_what_is_untried():
    made = step_times.StepTimes(spread=0.1, misfit=0.3)
    made.add(1, None, 0.02)
    doubts = [made.estimate(1, D3)[1]]
    for _ in range(4):
        made.add(1, D3, 0.03)
        doubts.append(made.estimate(1, D3)[1])
    assert doubts[0] > 0.3
    # The calls' own doubt, and a little less for what the others let expect.
    assert doubts[1:] == pytest.approx([0.1, 0.1 / 2**0.5, 0.1 / 3**0.5, 0.05], rel=0.1)
    assert all(b < a for a, b in itertools.pairwise(doubts))
    # What is like nothing tried is more in doubt than what is between.
    far, near = made.estimate(8, CHAINS[15])[1], made.estimate(1, CHAINS[2])[1]
    assert far > near > 0.3


def test_noise_is_measured():
    rng = np.random.default_rng(0)
    for spread in (0.02, 0.1, 0.4):
        made = step_times.StepTimes(window=50)
        assert made.spread() == 0.12
        for _ in range(50):
            for chosen in (None, D3):
                slow = 3.0 if rng.random() < 0.05 else 1.0
                made.add(1, chosen, 0.02 * slow * np.exp(spread * rng.normal()))
        assert made.spread() == pytest.approx(spread, rel=0.4)


NGRAM, TREE = strategy.parse("D6K1V7-ngram"), strategy.parse("D3K2V8")


@pytest.mark.parametrize(
    "bucket,chosen,expected",
    [
        (4, None, (1, 4, 0)),
        (4, D3, (1, 16, 3)),
        (2, TREE, (1, 16, 3)),
        # Suffix matches ask no drafter, so they cost no levels.
        (2, NGRAM, (1, 14, 0)),
    ],
)
def test_what_costs_are_linear_in(bucket, chosen, expected):
    assert step_times.features(bucket, chosen) == expected


def test_before_any_call_only_proportions_are_known():
    made = step_times.StepTimes(misfit=0.3)
    seconds, doubt = made.estimate(4, D3)
    # 1 for the step, 0.02 for each of 16 tokens, 0.05 for each of 3 levels, each of
    # which may be twice as much.
    assert seconds == pytest.approx(1 + 0.32 + 0.15)
    assert doubt == pytest.approx(
        math.hypot(0.3, math.sqrt(1 + 0.32**2 + 0.15**2) / 1.47)
    )
    assert not made.tried(4, D3)


def test_one_kind_gives_the_scale_of_all():
    made = step_times.StepTimes()
    for seconds in (0.3, 0.1, 0.1, 0.2):
        made.add(1, None, seconds)
    # The lower middle of an even number of calls, a step of one row and one token.
    expected = 0.1 / 1.02
    assert made.estimate(4, D3)[0] == pytest.approx(1.47 * expected)
    assert made.estimate(1, D7)[0] == pytest.approx((1 + 0.16 + 0.35) * expected)
    assert made.tried(1, None) and not made.tried(1, D7)


def test_many_calls_speak_for_themselves():
    made = step_times.StepTimes()
    for i in range(11):
        made.add(2, D3, 0.1 + 0.01 * (7 * i % 11))
        made.add(1, None, 0.05)
    assert made.spread() == pytest.approx(
        # 22 errors, 11 of them none; the 17th of the others is the spread.
        sorted(abs(i - 5) / 15 for i in range(11))[16 - 11] / 1.15
    )
    seconds, doubt = made.estimate(2, D3)
    assert seconds == pytest.approx(0.15)
    assert doubt == pytest.approx(made.spread() / math.sqrt(11))
    # The 16th call takes the place of the first; 15 are kept.
    for seconds in (0.3, 0.3, 0.3, 0.3, 0.4):
        made.add(2, D3, seconds)
    assert made.state()[0][2][0] == pytest.approx(0.17)
    assert len(made.state()[0][2]) == 15
    assert made.estimate(2, D3)[0] == pytest.approx(0.18)


def twin(calls, kind, spread, misfit):
    """The estimate of a kind with NumPy's solver, as long as nothing is negative."""
    prior = np.array([1.0, 0.02, 0.05])
    own = calls.get(kind, [])
    few = 0 < len(own) < 3 and len(calls) > 1
    others = {k: v for k, v in calls.items() if not (few and k == kind)}
    x = np.array([step_times.features(*k) for k in others])
    medians = np.array([sorted(v)[(len(v) - 1) // 2] for v in others.values()])
    scale = np.median(medians / (x @ prior))
    weights = np.array([min(len(v), 4) for v in others.values()])
    a = x * (scale * prior) / medians[:, None]
    # Least squares with one row for each call that counts, and the prior's own.
    rows = np.concatenate([np.repeat(a, weights, axis=0), spread * np.eye(3)])
    right = np.concatenate([np.ones(weights.sum()), spread * np.ones(3)])
    units, *_ = np.linalg.lstsq(rows, right, rcond=None)
    assert units.min() > 0.01
    y = np.array(step_times.features(*kind)) * scale * prior
    law_s = y @ units
    deviation = spread * np.sqrt(y @ np.linalg.inv(rows.T @ rows) @ y) / law_s
    doubt = math.hypot(misfit, deviation)
    if not own:
        return law_s, doubt
    among = sorted(own + [law_s] if few else own)
    own_s = among[(len(among) - 1) // 2]
    weight, own_weight = doubt**-2, len(own) * spread**-2
    log_s = own_weight * np.log(own_s) + weight * np.log(law_s)
    total = own_weight + weight
    return np.exp(log_s / total), total**-0.5


CALLS = {
    (1, None): [0.021, 0.020, 0.022, 0.020, 0.025, 0.021],
    (4, None): [0.024],
    (1, D3): [0.027, 0.026, 0.031],
    (4, D7): [0.055, 0.048],
    (8, D3): [0.045, 0.043, 0.047, 0.044],
    (2, NGRAM): [0.030],
}


def test_estimates_are_those_of_a_twin():
    made = step_times.StepTimes(spread=0.2, misfit=0.1)
    for kind, calls in CALLS.items():
        for seconds in calls:
            made.add(*kind, seconds)
    # Thirteen calls of kinds with three or more.
    spread = made.spread()
    assert spread != 0.2
    for kind in (*CALLS, (2, D7), (8, None), (8, D11), (16, D3)):
        expected = twin(CALLS, kind, spread, 0.1)
        assert made.estimate(*kind) == pytest.approx(expected, rel=1e-9), kind


def test_no_coefficient_is_negative():
    """Deeper steps that took less time: a level costs a hundredth of the prior."""
    made = step_times.StepTimes()
    for chosen, seconds in ((None, 0.10), (D3, 0.08), (D7, 0.06), (D11, 0.05)):
        for _ in range(3):
            made.add(1, chosen, seconds)
    apart = [made.estimate(16, CHAINS[d])[0] for d in (1, 15)]
    assert apart[0] < apart[1]
    prior = np.array([1.0, 0.02, 0.05])
    x = np.array([step_times.features(1, s) for s in (None, D3, D7, D11)])
    seconds = np.array([0.10, 0.08, 0.06, 0.05])
    scale = np.median(seconds / (x @ prior))
    a = x * (scale * prior) / seconds[:, None]
    spread = made.spread()
    gram = 3 * a.T @ a + spread**2 * np.eye(3)
    right = 3 * a.sum(0) + spread**2
    units = np.ones(3)
    for _ in range(20_000):
        units = np.maximum(0.01, units - (gram @ units - right) / np.trace(gram))
    assert units.min() == 0.01
    expected = np.array(step_times.features(16, CHAINS[15])) * scale * prior @ units
    assert made.estimate(16, CHAINS[15])[0] == pytest.approx(expected, rel=1e-3)


def test_what_is_kept_comes_back():
    made = step_times.StepTimes(window=5)
    for kind, calls in CALLS.items():
        for seconds in calls:
            made.add(*kind, seconds)
    state = json.loads(json.dumps(made.state()))
    assert state[0] == [1, None, [0.020, 0.022, 0.020, 0.025, 0.021]]
    assert state[2:4] == [
        [1, "D3K1V4", [0.027, 0.026, 0.031]],
        [4, "D7K1V8", [0.055, 0.048]],
    ]
    assert state[5] == [2, "D6K1V7-ngram", [0.030]]
    other = step_times.StepTimes(window=5)
    other.add(2, D11, 9.0)
    other.estimate(8, D11)
    other.restore(state)
    assert other.state() == made.state() == state
    assert other.spread() == made.spread() and not other.tried(2, D11)
    for kind in (*CALLS, (8, D11)):
        assert other.estimate(*kind) == made.estimate(*kind)
    other.add(1, None, 0.03)
    assert other.state()[0][2] == [0.022, 0.020, 0.025, 0.021, 0.03]
    # With a shorter memory the last calls are kept.
    other = step_times.StepTimes(window=2)
    other.restore(state)
    assert [calls for _, _, calls in other.state()][:3] == [
        [0.025, 0.021],
        [0.024],
        [0.026, 0.031],
    ]
