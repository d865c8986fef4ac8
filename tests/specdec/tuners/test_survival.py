"""Acceptance by depth: against brute force, literal numbers, and what is kept."""

import itertools
import json

import numpy as np
import pytest

from tlt_jax.specdec import strategy
from tlt_jax.specdec.tuners import survival

CHAINS = {d: strategy.parse(f"D{d}K1V{d + 1}") for d in (1, 2, 3, 5, 7, 8)}
D3, D7 = CHAINS[3], CHAINS[7]


def counts_of(lifetimes, depth):
    """`num_accepted` of row-steps that would accept `lifetimes` tokens, undrafted."""
    return tuple(int(np.sum(lifetimes >= d)) for d in range(depth + 1))


def accept_length_of(lifetimes, depth):
    return 1 + np.mean(np.minimum(lifetimes, depth))


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


@pytest.mark.parametrize(
    "name,family",
    [
        ("D3K1V4", ("drafter", 1, 0, 0)),
        ("D7K1V8", ("drafter", 1, 0, 0)),
        ("D3K2V6", ("drafter", 2, 6, 0)),
        ("D5K1V6-ngram", ("ngram", 1, 0, 0)),
        ("D3K2V8-both", ("both", 2, 8, 0)),
        # Of a batch of four: not all of 32 nodes, and all of them.
        ("D7K1V8N31", ("drafter", 1, 0, 31)),
        ("D7K1V8N32", ("drafter", 1, 0, 0)),
    ],
)
def test_families(name, family):
    assert survival.family_of(strategy.parse(name), 4) == family


def test_a_budget_is_expected_to_reach_as_deep_as_an_equal_share():
    tight = strategy.parse("D3K1V4N10")
    made = survival.Survival(prior_weight=0, shared_weight=20)
    made.add(D3, (100, 80, 40, 10), 2)
    # A row and a half of drafts each at four rows, and at two rows all there are.
    assert made.accept_length(tight, bucket=4) == pytest.approx(1 + 0.8 + 0.8 * 0.25)
    assert made.accept_length(tight, bucket=2) == made.accept_length(D3, bucket=2)
    made.add(tight, (60, 60, 30, 30), 4)
    # Rows that guessed well had more: twenty row-steps count as expected.
    first = (60 + 20 * 0.8) / 80
    second = (30 + 20 * 0.25) / 80
    third = 30 / 50
    wanted = 1 + first * (1 + second * (1 + third))
    assert made.accept_length(tight, bucket=4) == pytest.approx(wanted)
    # Nothing of it is held true of chains without a budget, or of other batches.
    assert made.accept_length(D3) == pytest.approx(1 + 0.8 + 0.4 + 0.1)
    assert made.accept_length(tight, bucket=8) == pytest.approx(1 + 0.8 * 0.25)


TREE, NGRAM = strategy.parse("D3K2V8"), strategy.parse("D2K1V3-ngram")
BOTH = strategy.parse("D2K2V4-both")


def seen(**settings):
    made = survival.Survival(**settings)
    made.add(D3, (8, 6, 4, 3), 4)
    made.add(TREE, (5, 2, 1, 0), 2)
    made.add(CHAINS[1], (2, 1), 4)
    made.add(NGRAM, (40, 10, 0), 1)
    made.add(BOTH, (30, 20, 10), 1)
    return made


STATE = [
    ["drafter", 1, 0, 0, None, [[10, 7], [6, 4], [4, 3]]],
    ["drafter", 1, 0, 0, 4, [[10, 7], [6, 4], [4, 3]]],
    ["drafter", 2, 8, 0, None, [[5, 2], [2, 1], [1, 0]]],
    ["drafter", 2, 8, 0, 2, [[5, 2], [2, 1], [1, 0]]],
    ["ngram", 1, 0, 0, None, [[40, 10], [10, 0]]],
    ["ngram", 1, 0, 0, 1, [[40, 10], [10, 0]]],
    ["both", 2, 4, 0, None, [[30, 20], [20, 10]]],
    ["both", 2, 4, 0, 1, [[30, 20], [20, 10]]],
]


def test_what_is_kept_comes_back():
    made = seen()
    assert made.state() == STATE
    other = survival.Survival()
    # What it had seen itself is forgotten.
    other.add(D7, (9, 9, 9, 9, 9, 9, 9, 9), 16)
    state = json.loads(json.dumps(made.state()))
    other.restore(state)
    assert other.state() == STATE
    for chosen in (D3, D7, TREE, NGRAM, BOTH, strategy.parse("D3K2V6")):
        for bucket in (None, 1, 2, 4):
            found = [x.accept_length(chosen, 0.5, bucket) for x in (made, other)]
            assert found[0] == found[1]
    # Neither shares its counts with what was given.
    other.add(D3, (8, 6, 4, 3), 4)
    assert state == STATE and made.state() == STATE


def test_old_calls_fade_by_so_much():
    made = survival.Survival(memory=10)
    made.add(CHAINS[2], (8, 4, 1), 4)
    made.add(CHAINS[2], (8, 2, 2), 4)
    # 6 of 16 count for 10, and what is deeper, of less than 10, for all it was.
    assert made.state()[0][-1] == [[10.0, 3.75], [6, 3]]


def test_discounts_by_proposer_and_size():
    made = seen(kept=5.0)
    made.discount(0.25, drafted_only=True)
    counts = {(p, k): c for p, k, _, _, bucket, c in made.state() if bucket is None}
    assert counts["drafter", 1] == [[5, 3.5], [5, pytest.approx(10 / 3)], [4, 3]]
    assert counts["drafter", 2] == [[5, 2], [2, 1], [1, 0]]
    assert counts["ngram", 1] == [[40, 10], [10, 0]]
    assert counts["both", 2] == [[7.5, 5], [5, 2.5]]
    made.discount(0.5)
    counts = {(p, k): c for p, k, _, _, bucket, c in made.state() if bucket is None}
    assert counts["ngram", 1] == [[20, 5], [5, 0]]
    assert counts["both", 2] == [[5, pytest.approx(10 / 3)], [5, 2.5]]


def test_optimism_in_numbers():
    made = survival.Survival(prior_hazard=0.5, prior_weight=2)
    # Of nothing: 0.5 / (0 + 2) is a variance of a quarter.
    assert made.accept_length(CHAINS[1], 0.5) == pytest.approx(1 + 0.5 + 0.5 * 0.5)
    made.add(CHAINS[2], (9, 6, 1), 4)
    first, second = (6 + 1) / 11, (1 + 2 * 7 / 11) / 8
    hopes = [
        hazard + 2 * np.sqrt((hazard * (1 - hazard) + 0.25 / (n + 1)) / (n + 2))
        for hazard, n in ((first, 9), (second, 6))
    ]
    assert all(hope < 1 for hope in hopes)
    expected = 1 + hopes[0] + hopes[0] * hopes[1]
    assert made.accept_length(CHAINS[2], 2.0) == pytest.approx(expected)


def test_a_bucket_of_its_own_in_numbers():
    made = survival.Survival(prior_weight=0, shared_weight=6)
    made.add(CHAINS[2], (20, 10, 8), 8)
    made.add(CHAINS[1], (4, 4), 2)
    # 14 of 24 in all; in the bucket 4 of 4 and six row-steps like all.
    first = (4 + 6 * 14 / 24) / (4 + 6)
    expected = 1 + first + first * 0.8
    assert made.accept_length(CHAINS[2], 0.0, 2) == pytest.approx(expected)
    # The evidence: the bucket's four row-steps and six shared ones.
    hope = first + np.sqrt((first * (1 - first) + 0.25 / 11) / 11)
    deeper = 0.8 + np.sqrt((0.8 * 0.2 + 0.25 / 11) / 11)
    expected = 1 + hope + hope * deeper
    assert made.accept_length(CHAINS[2], 1.0, 2) == pytest.approx(expected)
