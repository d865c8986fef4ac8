"""Our tuner: what it explores, and when it stops."""

import json
import time

import numpy as np
import pytest

from tlt_jax.specdec import rooms, strategy
from tlt_jax.specdec.tuners import cost_model, step_times, survival, tuner

CHAINS = {d: strategy.parse(f"D{d}K1V{d + 1}") for d in (1, 2, 3, 5, 7, 8, 11, 15)}
D3, D7, D11 = CHAINS[3], CHAINS[7], CHAINS[11]
ARMS = strategy.parse_arms(("2:D3K1V4,D7K1V8,D11K1V12", "8:D3K1V4,D7K1V8"))


def counts_of(lifetimes, depth):
    """`num_accepted` of row-steps that would accept `lifetimes` tokens, undrafted."""
    return tuple(int(np.sum(lifetimes >= d)) for d in range(depth + 1))


def test_optimism_makes_steps_seem_faster_by_their_doubt():
    cfg = cost_model.CostModelConfig(time_optimism=2.0)
    made = cost_model.CostModel(ARMS, max_rows=8, cfg=cfg)
    for _ in range(4):
        made.record(tuner.Call(1, 1, None, 0.2, 10, 10))
    seconds, doubt = made.step_times.estimate(1, None)
    assert seconds == pytest.approx(0.02, rel=0.05) and doubt > 0.03
    assert made.speed(1, None) == pytest.approx(np.exp(2 * doubt) / seconds)


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
    before = made.state()["accepted"]
    made.changed("drafter")
    assert made.choose(1) is None
    assert made.state()["accepted"] == before


def test_seconds_are_not_discounted():
    made = cost_model.CostModel(ARMS, max_rows=8)
    Machine(0.8).play(made, 1, 20)
    before = made.state()
    made.changed("target")
    after = made.state()
    assert after["step_times"] == before["step_times"]
    assert after["accepted"] != before["accepted"]


def test_settings_reach_the_estimates():
    cfg = cost_model.CostModelConfig(
        memory=50.0,
        shared_weight=7.0,
        window=3,
        time_spread=0.3,
        time_misfit=0.4,
        target_discount=0.6,
        drafter_discount=0.2,
    )
    made = cost_model.CostModel(ARMS, max_rows=8, cfg=cfg)
    kept = survival.Survival(memory=50.0, shared_weight=7.0)
    times = step_times.StepTimes(3, 0.3, 0.4)
    ngram = strategy.parse("D3K1V4-ngram")
    for bucket, chosen, counts, elapsed_s in (
        (8, D3, (80, 60, 50, 10), 0.5),
        (2, ngram, (30, 20, 10, 5), 0.4),
        (2, D3, (9, 8, 7, 6), 0.3),
        (2, D3, (9, 8, 7, 6), 0.6),
        (2, D3, (9, 8, 7, 6), 0.8),
        (2, D3, (9, 8, 7, 6), 0.9),
    ):
        call = tuner.Call(2, bucket, chosen, elapsed_s, 2, 9, counts)
        made.record(call)
        kept.add(call)
        times.add(bucket, chosen, elapsed_s / 2)
    for factor, what in ((1.0, None), (0.2, "drafter"), (0.6, "target")):
        if what:
            made.changed(what)
            kept.discount(factor, drafted_only=what == "drafter")
        assert made.survival.state() == kept.state()
        for bucket, chosen in ((2, D3), (4, D7), (8, ngram), (8, None)):
            assert made.step_times.estimate(bucket, chosen) == (
                times.estimate(bucket, chosen)
            )
            if chosen is not None:
                assert made.survival.accept_length(chosen, 0.0, bucket) == (
                    kept.accept_length(chosen, 0.0, bucket)
                )


def test_restored_it_chooses_the_same():
    arms = strategy.parse_arms(("2:D3K1V4,D7K1V8", "8:D7K1V8N20,D7K1V8,D3K1V4N12"))
    machine, made = Machine(0.8), cost_model.CostModel(arms, max_rows=8)
    for rows in (8, 4, 2, 1):
        machine.play(made, rows, 3)
    # Of rooms that rows shared no other call tells the same.
    counts, sizes = (80, 61, 50, 42, 30, 26, 20, 17), len(rooms.ROOMS)
    by_room = [[n + 5 * d for n in range(sizes)] for d in range(8)]
    tight = strategy.parse("D7K1V8N20")
    made.record(tuner.Call(7, 8, tight, 0.4, 10, 200, counts, by_room))
    state = json.loads(json.dumps(made.state()))
    other = cost_model.CostModel(arms, max_rows=8)
    machine.play(other, 8, 5)
    other.changed("drafter")
    other.restore(state)
    assert other.state() == made.state() == state
    made.changed("target"), other.changed("target")
    for rows in (8, 7, 3, 2, 1) * 4:
        assert made.choose(rows) == other.choose(rows)
        for arm in made.strategies(rows):
            assert made.speed(rows, arm) == other.speed(rows, arm)
        call = machine.call(rows, made.choose(rows))
        made.record(call), other.record(call)
    assert other.state() == made.state()


def test_of_an_older_version_seconds_are_kept_and_acceptance_is_learned_anew():
    made = cost_model.CostModel(ARMS, max_rows=8)
    Machine(0.8).play(made, 1, 5)
    before = made.state()
    older = {name: kept for name, kept in before.items() if name != "accepted"}
    other = cost_model.CostModel(ARMS, max_rows=8)
    Machine(0.3).play(other, 2, 5)
    other.restore(older | {"survival": [["drafter", 1, 0, 0, None, [[9.0, 8.0]]]]})
    assert before["accepted"] and before["step_times"]
    assert other.state() == before | {"accepted": []}


def test_budgets_are_scored_by_what_calls_without_one_tell():
    """Eight rows of which a quarter guess well: two nodes each are as good as seven."""
    arms = strategy.parse_arms(("8:D7K1V8N24,D7K1V8",))
    tight, whole = arms.of(8)
    made = cost_model.CostModel(arms, max_rows=8)
    for _ in range(4):
        made.record(tuner.Call(8, 8, None, 0.2, 10, 80))
        made.record(tuner.Call(8, 8, tight, 0.25, 10, 80))
    counts = (80, 20, 20, 20, 20, 20, 20, 20)
    by_room = [[0] * len(rooms.ROOMS) for _ in range(8)]
    for depth in range(1, 8):
        for column, room in enumerate(rooms.ROOMS):
            by_room[depth][column] = 20 * min(depth, int(4 * room) if room < 2 else 7)
    # Nothing is known of what a budget accepts, but of all there was.
    made.record(tuner.Call(8, 8, whole, 0.5, 10, 220, counts, by_room))
    assert made.speed(8, tight) == pytest.approx(2.75 / 0.025, rel=0.1)
    assert made.survival.accept_length(whole, 0.0, 8) == pytest.approx(2.75, rel=0.05)
    assert made.choose(8) == tight


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
