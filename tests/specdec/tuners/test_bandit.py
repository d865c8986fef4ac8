"""BEG-MAB against the paper's pseudo-code, worked by hand."""

import collections
import json

import numpy as np
import pytest

from tlt_jax.specdec import strategy
from tlt_jax.specdec.tuners import bandit, tuner

A, B = strategy.parse("D4K4V16"), strategy.parse("D8K4V16")
C, D = strategy.parse("D3K2V8"), strategy.parse("D6K2V8")
# Grouped by the tokens verified: the most for the fewest rows.
ARMS = strategy.Arms(((3, (A, B)), (8, (C, D))))


def call(chosen, rows, elapsed_s, accepted):
    """One step; `accepted` drafted tokens of each row."""
    depths = range(chosen.draft_depth + 1)
    counts = tuple(sum(n >= depth for n in accepted) for depth in depths)
    return tuner.Call(
        rows, 1 << (rows - 1).bit_length(), chosen, elapsed_s, 1, 0, counts
    )


def test_a_bucket_lists_its_arms():
    made = bandit.BegMab(ARMS, seed=0)
    assert [made.strategies(n) for n in (1, 3, 4, 8, 9)] == [
        (A, B),
        (A, B),
        (C, D),
        (C, D),
        (None,),
    ]


def test_rewards_and_choices_by_hand():
    made = bandit.BegMab(ARMS, seed=0, epsilon=0.0)
    assert made.choose(2) == A  # Both count as infinity: the first.
    made.record(call(A, 2, 0.1, (3, 1)))  # a = 4/2 + 1 = 3, r = 3 * 2 / 0.1 = 60
    assert made.choose(3) == B  # Untried: infinity against 60.
    made.record(call(B, 2, 0.2, (5, 2)))  # a = 7/2 + 1 = 4.5, r = 4.5 * 2 / 0.2 = 45
    assert made.choose(1) == A  # 60 against 45.
    made.record(call(A, 2, 0.4, (1, 0)))  # a = 1.5, r = 7.5
    assert made.choose(2) == B  # median(60, 7.5) = 33.75 against 45.
    made.record(call(B, 3, 0.2, (0, 0, 1)))  # a = 4/3, r = 20
    assert made.choose(2) == A  # 33.75 against median(45, 20) = 32.5.
    made.record(call(A, 2, 0.128, (1, 1)))  # a = 2, r = 31.25
    assert made.choose(2) == B  # The median 31.25 is below 32.5, the mean is not.
    made.record(call(B, 2, 0.5, (1, 0)))  # a = 1.5, r = 6
    made.record(call(B, 2, 0.5, (1, 0)))
    assert made.choose(2) == A  # 31.25 against median(45, 20, 6, 6) = 13.
    # The other bucket has learned nothing of this.
    assert made.choose(4) == C
    rows = {name: (r, a) for _, name, r, a in made.state()["arms"]}
    assert rows["D4K4V16"] == (pytest.approx([60, 7.5, 31.25]), [3, 1.5, 2])
    assert rows["D8K4V16"][0] == pytest.approx([45, 20, 6, 6])
    assert rows["D8K4V16"][1] == pytest.approx([4.5, 4 / 3, 1.5, 1.5])
    assert rows["D3K2V8"] == ([], [])


def test_a_call_of_several_steps_is_its_mean_step():
    made = bandit.BegMab(ARMS, seed=0)
    # Two rows took four steps and one of them three: 7 row-steps, 9 accepted.
    made.record(tuner.Call(2, 2, A, 0.8, 4, 14, (7, 5, 3, 1, 0)))
    [(_, _, rewards, lengths), *_] = made.state()["arms"]
    assert rewards == [pytest.approx((9 + 7) / 0.8)]
    assert lengths == [pytest.approx(9 / 7 + 1)]


def test_old_rewards_leave_the_window():
    made = bandit.BegMab(ARMS, seed=0, epsilon=0.0, window=2)
    for elapsed_s in (0.1, 0.2, 0.4):
        made.record(call(A, 2, elapsed_s, (3, 1)))
    assert made.state()["arms"][0][2] == pytest.approx([30, 15])


def test_exploration_draws_as_written():
    made = bandit.BegMab(ARMS, seed=3, epsilon=0.4)
    made.record(call(A, 2, 1.0, (4, 4)))
    made.record(call(B, 2, 1.0, (0, 0)))
    twin = np.random.Generator(np.random.PCG64(3))
    expected = [
        (A, B)[twin.integers(2)] if twin.random() < 0.4 else A for _ in range(50)
    ]
    chosen = [made.choose(2) for _ in range(50)]
    assert chosen == expected
    assert collections.Counter(chosen)[B] > 3


def test_what_has_no_choice_draws_nothing():
    arms = strategy.Arms(((2, (A,)), (4, (B, C))))
    made = bandit.BegMab(arms, seed=1, epsilon=1.0)
    before = made.state()
    assert made.choose(1) == A and made.choose(5) is None
    assert made.state() == before
    made.choose(4)
    assert made.state() != before


def test_plain_calls_teach_nothing_and_foreign_ones_are_refused():
    made = bandit.BegMab(ARMS, seed=1)
    before = made.state()
    made.record(tuner.Call(9, 16, None, 0.1, 4, 36))
    made.changed("target")
    assert made.state() == before
    with pytest.raises(ValueError, match="D3K2V8 is no arm at num_rows=2"):
        made.record(call(C, 2, 0.1, (1, 1)))


def test_an_arm_in_two_buckets_has_rewards_in_each():
    made = bandit.BegMab(strategy.Arms(((1, (A, B)), (4, (A, B)))), seed=0, epsilon=0)
    made.record(call(A, 1, 1.0, (4,)))
    made.record(call(B, 1, 1.0, (0,)))
    made.record(call(A, 4, 1.0, (0, 0, 0, 0)))
    assert made.choose(1) == A and made.choose(4) == B


def test_restored_it_chooses_the_same():
    made = bandit.BegMab(ARMS, seed=5, epsilon=0.5)
    rng = np.random.default_rng(0)

    def play(player, steps):
        chosen = []
        for step in range(steps):
            rows = 1 + step % 8
            picked = player.choose(rows)
            chosen.append(picked)
            accepted = [step % (picked.draft_depth + 1)] * rows
            player.record(call(picked, rows, 0.1 + 0.01 * (step % 7), accepted))
        return chosen

    play(made, 20 + int(rng.integers(5)))
    state = json.loads(json.dumps(made.state()))
    other = bandit.BegMab(ARMS, seed=99, epsilon=0.5)
    other.restore(state)
    assert other.state() == made.state()
    assert play(other, 40) == play(made, 40)
    assert other.state() == made.state()


def test_restoring_forgets_arms_that_are_gone():
    made = bandit.BegMab(ARMS, seed=0)
    made.record(call(A, 2, 0.1, (3, 1)))
    made.record(call(B, 2, 0.1, (3, 1)))
    fewer = bandit.BegMab(strategy.Arms(((3, (B,)),)), seed=0)
    fewer.restore(made.state())
    assert [(limit, name, len(r)) for limit, name, r, _ in fewer.state()["arms"]] == [
        (3, "D8K4V16", 1)
    ]
