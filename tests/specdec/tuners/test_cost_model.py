"""Our tuner: estimates against brute force, what it explores, and when it stops."""

import itertools
import json
import time

import numpy as np
import pytest

from tlt_jax.specdec import strategy
from tlt_jax.specdec.tuners import cost_model, step_times, survival, tuner

CHAINS = {d: strategy.parse(f"D{d}K1V{d + 1}") for d in (1, 2, 3, 5, 7, 8, 11, 15)}
D3, D7, D11 = CHAINS[3], CHAINS[7], CHAINS[11]
ARMS = strategy.parse_arms(("2:D3K1V4,D7K1V8,D11K1V12", "8:D3K1V4,D7K1V8"))


def counts_of(lifetimes, depth):
    """`num_accepted` of row-steps that would accept `lifetimes` tokens, undrafted."""
    return tuple(int(np.sum(lifetimes >= d)) for d in range(depth + 1))


def accept_length_of(lifetimes, depth):
    return 1 + np.mean(np.minimum(lifetimes, depth))


# --- acceptance ---


def test_one_deep_call_scores_all_shallower_chains():
    lifetimes = np.random.default_rng(0).geometric(0.25, size=400) - 1
    made = survival.Survival(prior_weight=0)
    made.add(CHAINS[8], counts_of(lifetimes, 8), 4)
    for depth in (1, 2, 3, 5, 7, 8):
        expected = accept_length_of(lifetimes, depth)
        assert made.accept_length(CHAINS[depth]) == pytest.approx(expected)


def test_what_lies_deeper_has_the_last_hazard():
    made = survival.Survival(prior_weight=0)
    made.add(D3, (8, 6, 4, 3), 4)  # Hazards 6/8, 4/6, 3/4.
    expected = (8 + 6 + 4 + 3) / 8 + 3 / 8 * (0.75 + 0.75**2)
    assert made.accept_length(CHAINS[5]) == pytest.approx(expected)


def test_calls_of_different_depths_are_one_censored_sample():
    """The product of pooled hazards, against counting every row-step by hand."""
    rng = np.random.default_rng(1)
    made = survival.Survival(prior_weight=0, memory=1e15)
    at_risk, survived = np.zeros(7), np.zeros(7)
    for _ in range(30):
        depth = int(rng.choice([1, 3, 7]))
        lifetimes = rng.geometric(0.3, size=5) - 1
        made.add(CHAINS[depth], counts_of(lifetimes, depth), 4)
        for lifetime in lifetimes:
            for d in range(1, depth + 1):
                if lifetime >= d - 1:
                    at_risk[d - 1] += 1
                    survived[d - 1] += lifetime >= d
    expected = 1 + np.sum(np.cumprod(survived / at_risk))
    assert made.accept_length(D7) == pytest.approx(expected, rel=1e-9)


def test_a_prior_counts_for_a_few_row_steps():
    made = survival.Survival(prior_hazard=0.6, prior_weight=2)
    assert made.accept_length(CHAINS[2]) == pytest.approx(1 + 0.6 + 0.36)
    made.add(CHAINS[2], (10, 4, 0), 4)
    first = (4 + 2 * 0.6) / 12
    second = (0 + 2 * first) / 6
    expected = 1 + first + first * second
    assert made.accept_length(CHAINS[2]) == pytest.approx(expected)


def test_old_calls_fade_only_where_new_ones_tell():
    made = survival.Survival(prior_weight=0, memory=10)
    made.add(D3, (8, 8, 8, 8), 4)
    for _ in range(40):
        made.add(CHAINS[1], (8, 4), 4)
    # The first depth is what it is now, the deeper ones what they last were.
    assert made.accept_length(D3) == pytest.approx(1 + 0.5 * 3)


def test_a_bucket_starts_from_all_and_becomes_its_own():
    made = survival.Survival(prior_weight=0, shared_weight=20)
    made.add(D3, (100, 80, 64, 51), 8)
    shared = made.accept_length(D3)
    assert made.accept_length(D3, bucket=1) == shared
    made.add(D3, (20, 0, 0, 0), 1)
    # 80 of 120 in all; of the bucket none of 20, and 20 as in all.
    first = (0 + 20 * 80 / 120) / 40
    found = made.accept_length(CHAINS[1], bucket=1)
    assert found == pytest.approx(1 + first)
    assert made.accept_length(D3, bucket=8) > shared - 0.5


def test_a_discount_leaves_a_little():
    made = survival.Survival(prior_weight=0, kept=8)
    made.add(D3, (100, 50, 4, 1), 4)
    before = made.accept_length(D3)
    for _ in range(9):
        made.discount(0.1)
    # The shape stays, and yields to few new calls.
    assert made.accept_length(D3) == pytest.approx(before)
    assert [n for n, _ in made.state()[0][-1]] == pytest.approx([8, 8, 4])
    made.add(D3, (80, 72, 65, 58), 4)
    assert made.accept_length(CHAINS[1]) == pytest.approx(1 + 76 / 88)


def test_trees_are_families_of_their_own_and_start_from_their_proposers_others():
    tree, other = strategy.parse("D3K2V8"), strategy.parse("D3K2V6")
    made = survival.Survival(prior_hazard=0.7, prior_weight=2)
    made.add(tree, (200, 180, 162, 146), 4)
    assert made.accept_length(tree) == pytest.approx(1 + 0.9 + 0.81 + 0.729, rel=1e-2)
    assert made.accept_length(other) == pytest.approx(
        made.accept_length(tree), rel=1e-2
    )
    made.add(other, (200, 100, 50, 25), 4)
    assert made.accept_length(other) == pytest.approx(1 + 0.875, rel=2e-2)
    # Suffix matches are another matter.
    ngram = strategy.parse("D3K2V6-ngram")
    assert made.accept_length(ngram) == pytest.approx(1 + 0.7 + 0.49 + 0.343)


def test_optimism_falls_with_evidence_and_rises_with_discounts():
    made = survival.Survival()
    hopes = [made.accept_length(D7, 1.0)]
    for _ in range(5):
        made.add(D7, (50, 40, 32, 25, 20, 16, 13, 10), 4)
        hopes.append(made.accept_length(D7, 1.0))
    doubts = [hope - made.accept_length(D7) for hope in hopes]
    assert all(b < a for a, b in itertools.pairwise(doubts))
    before = made.accept_length(D7)
    made.discount(0.1)
    assert made.accept_length(D7, 1.0) > hopes[-1]
    assert made.accept_length(D7) == pytest.approx(before, rel=0.1)
    assert made.accept_length(D7, 100.0) == 8.0


# --- seconds ---


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


def test_optimism_makes_steps_seem_faster_by_their_doubt():
    cfg = cost_model.CostModelConfig(time_optimism=2.0)
    made = cost_model.CostModel(ARMS, max_rows=8, cfg=cfg)
    for _ in range(4):
        made.record(tuner.Call(1, 1, None, 0.2, 10, 10))
    seconds, doubt = made.step_times.estimate(1, None)
    assert seconds == pytest.approx(0.02, rel=0.05) and doubt > 0.03
    assert made.speed(1, None, optimistic=False) == pytest.approx(1 / seconds)
    assert made.speed(1, None) == pytest.approx(np.exp(2 * doubt) / seconds)


# --- choices ---


class Machine:
    """Decodes with geometric lifetimes and a law of costs."""

    def __init__(self, hazard, level_s=0.0015, token_s=0.0006, noise=0.05, seed=0):
        self.hazard, self.noise = hazard, noise
        self.level_s, self.token_s = level_s, token_s
        self.rng = np.random.default_rng(seed)

    def step_s(self, bucket, chosen):
        if chosen is None:
            return 0.02 + self.token_s * bucket
        verified = bucket * chosen.tokens_to_verify
        return 0.02 + self.token_s * verified + self.level_s * chosen.draft_depth

    def speed(self, bucket, chosen):
        depth = chosen.draft_depth if chosen else 0
        return sum(self.hazard**d for d in range(depth + 1)) / self.step_s(
            bucket, chosen
        )

    def call(self, rows, chosen):
        bucket = tuner.bucket_of(rows, 8)
        steps = 6
        took = steps * self.step_s(bucket, chosen)
        took *= float(np.exp(self.noise * self.rng.normal()))
        if chosen is None:
            return tuner.Call(rows, bucket, None, took, steps, steps * rows)
        lifetimes = self.rng.geometric(1 - self.hazard, size=steps * rows) - 1
        counts = counts_of(lifetimes, chosen.draft_depth)
        return tuner.Call(rows, bucket, chosen, took, steps, sum(counts), counts)

    def play(self, made, rows, count):
        chosen = []
        for _ in range(count):
            chosen.append(made.choose(rows))
            made.record(self.call(rows, chosen[-1]))
        return chosen


def test_listed_are_the_candidates_and_none():
    made = cost_model.CostModel(ARMS, max_rows=16)
    assert made.strategies(2) == (D3, D7, D11, None)
    assert made.strategies(8) == (D3, D7, None)
    assert made.strategies(9) == (None,) and made.choose(9) is None


@pytest.mark.parametrize("rows", [1, 2, 8])
@pytest.mark.parametrize("hazard", [0.3, 0.6, 0.8, 0.95])
@pytest.mark.parametrize("level_s", [0.0015, 0.008])
def test_the_best_arm_is_found_and_exploring_ends(hazard, rows, level_s):
    for seed in range(3):
        machine = Machine(hazard, level_s, seed=seed)
        made = cost_model.CostModel(ARMS, max_rows=8)
        chosen = machine.play(made, rows, 120)
        speeds = {
            arm: machine.speed(tuner.bucket_of(rows, 8), arm)
            for arm in made.strategies(rows)
        }
        best = max(speeds.values())
        worth = [speeds[arm] / best for arm in chosen]
        assert min(worth[60:]) > 0.85
        assert np.mean(worth) > 0.9


def test_plain_decoding_is_chosen_where_speculation_is_slower():
    machine = Machine(hazard=0.15, level_s=0.01)
    made = cost_model.CostModel(ARMS, max_rows=8)
    chosen = machine.play(made, 1, 80)
    assert all(machine.speed(1, s) < machine.speed(1, None) for s in (D3, D7, D11))
    assert set(chosen[20:]) == {None}
    # A new drafter may be better: it is asked again, once if all is as it was.
    for _ in range(3):
        made.changed("drafter")
        chosen = machine.play(made, 1, 20)
        assert chosen[0] is not None
        assert sum(arm is not None for arm in chosen) <= 4
    # A new target makes it no better, and seldom is it asked for that.
    made.changed("target")
    assert set(machine.play(made, 1, 20)) == {None}


def test_a_drafter_that_became_good_is_noticed():
    machine = Machine(hazard=0.1, level_s=0.004)
    made = cost_model.CostModel(ARMS, max_rows=8)
    assert set(machine.play(made, 1, 80)[40:]) == {None}
    machine.hazard = 0.9
    made.changed("drafter")
    chosen = machine.play(made, 1, 30)
    assert set(chosen[20:]) <= {D7, D11}


def test_whether_the_drafter_was_asked_is_kept():
    made = cost_model.CostModel(ARMS, max_rows=8)
    Machine(hazard=0.1, level_s=0.01).play(made, 1, 60)
    made.changed("drafter")
    other = cost_model.CostModel(ARMS, max_rows=8)
    other.restore(json.loads(json.dumps(made.state())))
    assert made.choose(1) is not None
    assert other.state() == made.state() and not other.state()["asked"]
    # What asks no drafter is not chosen for its sake.
    ngram = strategy.parse_arms(("8:D3K1V4-ngram",))
    made = cost_model.CostModel(ngram, max_rows=8)
    Machine(hazard=0.1, level_s=0.01).play(made, 1, 60)
    before = made.state()["survival"]
    made.changed("drafter")
    assert made.choose(1) is None
    assert made.state()["survival"] == before


def test_seconds_are_not_discounted():
    made = cost_model.CostModel(ARMS, max_rows=8)
    Machine(0.8).play(made, 1, 20)
    before = made.state()
    made.changed("target")
    after = made.state()
    assert after["step_times"] == before["step_times"]
    assert after["survival"] != before["survival"]


def test_restored_it_chooses_the_same():
    machine, made = Machine(0.8), cost_model.CostModel(ARMS, max_rows=8)
    for rows in (8, 4, 2, 1):
        machine.play(made, rows, 3)
    state = json.loads(json.dumps(made.state()))
    other = cost_model.CostModel(ARMS, max_rows=8)
    other.restore(state)
    assert other.state() == made.state()
    made.changed("target"), other.changed("target")
    for rows in (8, 7, 3, 2, 1) * 4:
        assert made.choose(rows) == other.choose(rows)
        for arm in made.strategies(rows):
            bucket = tuner.bucket_of(rows, 8)
            assert made.speed(bucket, arm) == other.speed(bucket, arm)
        call = machine.call(rows, made.choose(rows))
        made.record(call), other.record(call)
    assert other.state() == made.state()


def test_empty_calls_teach_nothing():
    made = cost_model.CostModel(ARMS, max_rows=8)
    before = made.state()
    made.record(tuner.Call(1, 1, D3, 0.0, 0, 0, (0, 0, 0, 0)))
    assert made.state() == before


def test_choosing_takes_no_time_to_speak_of():
    made = cost_model.CostModel(ARMS, max_rows=8)
    machine, took = Machine(0.8), []
    for rows in (8, 4, 2, 1) * 20:
        call = machine.call(rows, made.choose(rows))
        started = time.perf_counter()
        made.record(call)
        made.choose(rows)
        took.append(time.perf_counter() - started)
    assert sorted(took)[len(took) // 2] < 0.002  # 0.1 ms, and machines are busy.


@pytest.mark.parametrize(
    "setting,message",
    [
        ({"optimism": -1}, "optimism=-1"),
        ({"time_spread": 1.0}, "time_spread=1.0: give more than 0"),
        ({"target_discount": 2}, "target_discount=2"),
        ({"window": 0}, "window=0"),
    ],
)
def test_settings_out_of_range_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        cost_model.CostModelConfig(**setting)
    with pytest.raises(ValueError, match="max_rows=0"):
        cost_model.CostModel(ARMS, max_rows=0)
