"""Acceptance by depth: against brute force, literal numbers, and what is kept."""

import itertools
import json

import numpy as np
import pytest

from tlt_jax.specdec import rooms, strategy
from tlt_jax.specdec.tuners import survival, tuner

CHAINS = {d: strategy.parse(f"D{d}K1V{d + 1}") for d in (1, 2, 3, 5, 7, 8)}
D3, D7 = CHAINS[3], CHAINS[7]


def add(made, chosen, counts, bucket, by_room=(), num_rows=None):
    call = tuner.Call(num_rows or bucket, bucket, chosen, 1.0, 1, 1, counts, by_room)
    made.add(call)


def counts_of(lifetimes, depth):
    """`num_accepted` of row-steps that would accept `lifetimes` tokens, undrafted."""
    return tuple(int(np.sum(lifetimes >= d)) for d in range(depth + 1))


def accept_length_of(lifetimes, depth):
    return 1 + np.mean(np.minimum(lifetimes, depth))


def test_one_deep_call_scores_all_shallower_chains():
    lifetimes = np.random.default_rng(0).geometric(0.25, size=400) - 1
    made = survival.Survival(prior_weight=0)
    add(made, CHAINS[8], counts_of(lifetimes, 8), 4)
    for depth in (1, 2, 3, 5, 7, 8):
        expected = accept_length_of(lifetimes, depth)
        assert made.accept_length(CHAINS[depth]) == pytest.approx(expected)


def test_what_lies_deeper_has_the_last_hazard():
    made = survival.Survival(prior_weight=0)
    add(made, D3, (8, 6, 4, 3), 4)  # Hazards 6/8, 4/6, 3/4.
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
        add(made, CHAINS[depth], counts_of(lifetimes, depth), 4)
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
    add(made, CHAINS[2], (10, 4, 0), 4)
    first = (4 + 2 * 0.6) / 12
    second = (0 + 2 * first) / 6
    expected = 1 + first + first * second
    assert made.accept_length(CHAINS[2]) == pytest.approx(expected)


def test_old_calls_fade_only_where_new_ones_tell():
    made = survival.Survival(prior_weight=0, memory=10)
    add(made, D3, (8, 8, 8, 8), 4)
    for _ in range(40):
        add(made, CHAINS[1], (8, 4), 4)
    # The first depth is what it is now, the deeper ones what they last were.
    assert made.accept_length(D3) == pytest.approx(1 + 0.5 * 3)


def test_a_bucket_starts_from_all_and_becomes_its_own():
    made = survival.Survival(prior_weight=0, shared_weight=20)
    add(made, D3, (100, 80, 64, 51), 8)
    shared = made.accept_length(D3)
    assert made.accept_length(D3, bucket=1) == shared
    add(made, D3, (20, 0, 0, 0), 1)
    # 80 of 120 in all; of the bucket none of 20, and 20 as in all.
    first = (0 + 20 * 80 / 120) / 40
    found = made.accept_length(CHAINS[1], bucket=1)
    assert found == pytest.approx(1 + first)
    assert made.accept_length(D3, bucket=8) > shared - 0.5


def test_a_discount_leaves_a_little():
    made = survival.Survival(prior_weight=0, kept=8)
    add(made, D3, (100, 50, 4, 1), 4)
    before = made.accept_length(D3)
    for _ in range(9):
        made.discount(0.1)
    # The shape stays, and yields to few new calls.
    assert made.accept_length(D3) == pytest.approx(before)
    assert all_rooms(made.state()[0])[0] == pytest.approx([8, 8, 4])
    add(made, D3, (80, 72, 65, 58), 4)
    assert made.accept_length(CHAINS[1]) == pytest.approx(1 + 76 / 88)


def test_trees_are_families_of_their_own_and_start_from_their_proposers_others():
    tree, other = strategy.parse("D3K2V8"), strategy.parse("D3K2V6")
    made = survival.Survival(prior_hazard=0.7, prior_weight=2)
    add(made, tree, (200, 180, 162, 146), 4)
    assert made.accept_length(tree) == pytest.approx(1 + 0.9 + 0.81 + 0.729, rel=1e-2)
    assert made.accept_length(other) == pytest.approx(
        made.accept_length(tree), rel=1e-2
    )
    add(made, other, (200, 100, 50, 25), 4)
    assert made.accept_length(other) == pytest.approx(1 + 0.875, rel=2e-2)
    # Suffix matches are another matter.
    ngram = strategy.parse("D3K2V6-ngram")
    assert made.accept_length(ngram) == pytest.approx(1 + 0.7 + 0.49 + 0.343)


def test_optimism_falls_with_evidence_and_rises_with_discounts():
    made = survival.Survival()
    hopes = [made.accept_length(D7, 1.0)]
    for _ in range(5):
        add(made, D7, (50, 40, 32, 25, 20, 16, 13, 10), 4)
        hopes.append(made.accept_length(D7, 1.0))
    doubts = [hope - made.accept_length(D7) for hope in hopes]
    assert all(b < a for a, b in itertools.pairwise(doubts))
    before = made.accept_length(D7)
    made.discount(0.1)
    assert made.accept_length(D7, 1.0) > hopes[-1]
    assert made.accept_length(D7) == pytest.approx(before, rel=0.1)
    assert made.accept_length(D7, 100.0) == 8.0


@pytest.mark.parametrize(
    "name,kind,room",
    [
        ("D3K1V4", ("drafter", 1, 0), 3),
        ("D7K1V8", ("drafter", 1, 0), 7),
        ("D3K2V6", ("drafter", 2, 6), 5),
        ("D5K1V6-ngram", ("ngram", 1, 0), 5),
        ("D3K2V8-both", ("both", 2, 8), 7),
        # Three rows in a batch of four: N nodes, of which three are roots.
        ("D7K1V8N9", ("drafter", 1, 0), 2),
        ("D7K1V8N20", ("drafter", 1, 0), 17 / 3),
        ("D7K1V8N31", ("drafter", 1, 0), 7),
        ("D3K2V8N9", ("drafter", 2, 8), 2),
    ],
)
def test_kinds_and_rooms(name, kind, room):
    assert survival.kind_of(strategy.parse(name)) == kind
    assert survival.room_of(strategy.parse(name), 3, 4) == pytest.approx(room)


def within(*counts):
    """Counts from `(room, depth 0, depth 1, ..)`; between two rooms as at the first."""
    table = np.zeros((len(counts[0]) - 1, len(rooms.ROOMS)), int)
    for room, *of_depths in counts:
        table[:, rooms.ROOMS.index(room) :] = np.array(of_depths)[:, None]
    return tuple(map(tuple, table.tolist()))


# 100 row-steps of two rows: the room that they shared was of two nodes each. Down to
# depth 1 a row has no use for more than one.
SHARED = strategy.parse("D3K1V4N6")
BY_ROOM = within(
    (0.5, 50, 45, 48, 48),
    (1, 100, 70, 85, 88),
    (1.5, 150, 70, 100, 114),
    (2, 200, 70, 115, 140),
)


def test_one_call_scores_all_smaller_budgets():
    made = survival.Survival(prior_weight=0)
    add(made, SHARED, (100, 70, 45, 25), 2, BY_ROOM)
    # Depths 3, 2 and 1, at the rooms of the call: one node, two, and all that there is.
    found = {
        (depth, room): made.accept_length(
            strategy.parse(f"D{depth}K1V{depth + 1}N{2 + 2 * room}"), bucket=2
        )
        for depth in (1, 2, 3)
        for room in (1, 2)
    }
    assert found == pytest.approx(
        {
            (1, 1): 1.7,
            (2, 1): 1.85,
            (3, 1): 1.88,
            (1, 2): 1.7,
            (2, 2): 2.15,
            (3, 2): 2.4,
        }
    )
    # A node and a half, and three quarters of one, of all batches as of this one.
    tight = strategy.parse("D3K1V4N10")
    assert made.accept_length(tight, bucket=4) == pytest.approx(2.14)
    tight = strategy.parse("D3K1V4N14")
    assert made.accept_length(tight, bucket=8) == pytest.approx(1.48)
    tight = strategy.parse("D2K1V3N11")
    assert made.accept_length(tight, bucket=8) == pytest.approx((1 + 1.48) / 2)
    # One row of two alive has room for both.
    tight = strategy.parse("D2K1V3N3")
    assert made.accept_length(tight, bucket=2) == pytest.approx(1.48)
    assert made.accept_length(tight, bucket=2, num_rows=1) == pytest.approx(2.15)


def test_more_room_and_depth_are_extrapolated():
    made = survival.Survival(prior_weight=0)
    add(made, SHARED, (100, 70, 45, 25), 2, BY_ROOM)
    # Two levels have no use for more than two nodes; what the third adds with room for
    # all is of the second as the second of the first: 0.45 x 45 / 70.
    deeper = 0.45 * 45 / 70
    assert made.accept_length(D3, bucket=2) == pytest.approx(1 + 0.7 + 0.45 + deeper)
    # At the room that there was a fourth adds of the third as that of the second.
    deep = strategy.parse("D4K1V5N6")
    fourth = 0.25 * 25 / 45
    assert made.accept_length(deep, bucket=2) == pytest.approx(2.4 + fourth)


def test_a_room_between_is_known_as_the_next():
    """Five nodes of four rows: 1.25 each, which counts for a room of 1.5."""
    made = survival.Survival(prior_weight=0)
    tight = strategy.parse("D2K1V3N9")
    by_room = within((1, 80, 50, 60), (1.5, 100, 50, 64))
    add(made, tight, (80, 50, 14), 4, by_room)
    assert made.accept_length(tight, bucket=4) == pytest.approx(1 + (60 + 64) / 2 / 80)
    # Beyond, the second level is as at that of the first.
    assert made.accept_length(CHAINS[2], bucket=4) == pytest.approx(
        1 + 50 / 80 + (50 / 80) ** 2
    )


def test_deeper_drafts_may_cost_shallow_ones():
    made = survival.Survival(prior_weight=0)
    tight = strategy.parse("D2K1V3N4")
    add(made, tight, (10, 6, 0), 2, within((1, 20, 6, 5)))
    assert made.accept_length(tight, bucket=2) == pytest.approx(1.6)
    # Rare gains and losses cancel out.
    add(made, tight, (10, 6, 0), 2, within((1, 20, 6, 9)))
    assert made.accept_length(tight, bucket=2) == pytest.approx(1.7)


def test_chains_alone_tell_of_equal_shares():
    tight = strategy.parse("D3K1V4N8")
    made = survival.Survival(prior_weight=0, shared_weight=20)
    add(made, D3, (100, 80, 40, 10), 2)
    assert made.accept_length(tight, bucket=4) == pytest.approx(1 + 0.8)
    assert made.accept_length(tight, bucket=2) == made.accept_length(D3, bucket=2)
    assert made.accept_length(D3, bucket=2) == pytest.approx(1 + 0.8 + 0.4 + 0.1)
    # Rows that guessed well had more: twenty row-steps count as expected.
    add(made, tight, (60, 50, 20, 0), 4, within((1, 240, 50, 60, 70)))
    first = (130 / 160 * 20 + 50) / 80
    second = (10 / 130 * 20 + 10) / 70
    third = (10 / 10 * 20 + 10) / 30
    wanted = 1 + first * (1 + second * (1 + third))
    assert made.accept_length(tight, bucket=4) == pytest.approx(wanted)


def test_depths_that_a_call_does_not_name_are_not_known():
    made = survival.Survival(prior_weight=0)
    add(made, D3, (100,), 2)
    assert made.state() == []
    add(made, D3, (100, 80), 2)
    assert made.accept_length(D3, bucket=2) == pytest.approx(1 + 0.8 + 0.64 + 0.512)


def test_of_a_tree_alone_no_smaller_one_is_known():
    made = survival.Survival(prior_weight=0, prior_hazard=0.5)
    add(made, TREE, (100, 80, 40, 10), 2)
    assert made.accept_length(TREE, bucket=2) == pytest.approx(2.3)
    tight = strategy.parse("D3K2V8N12")
    assert made.accept_length(tight, bucket=4) == pytest.approx(1 + 0.875)


TREE, NGRAM = strategy.parse("D3K2V8"), strategy.parse("D2K1V3-ngram")
BOTH = strategy.parse("D2K2V4-both")


def seen(**settings):
    made = survival.Survival(**settings)
    add(made, D3, (8, 6, 4, 3), 4)
    add(made, TREE, (5, 2, 1, 0), 2)
    add(made, CHAINS[1], (2, 1), 4)
    add(made, NGRAM, (40, 10, 0), 1)
    add(made, BOTH, (30, 20, 10), 1)
    return made


def all_rooms(kept):
    """At risk and survived by depth, where rows have room for all."""
    return np.array(kept[-1])[:, :, -1].tolist()


STATE = [
    ["drafter", 1, 0, None, [[10, 6, 4], [7, 4, 3]]],
    ["drafter", 1, 0, 4, [[10, 6, 4], [7, 4, 3]]],
    ["drafter", 2, 8, None, [[5, 2, 1], [2, 1, 0]]],
    ["drafter", 2, 8, 2, [[5, 2, 1], [2, 1, 0]]],
    ["ngram", 1, 0, None, [[40, 10], [10, 0]]],
    ["ngram", 1, 0, 1, [[40, 10], [10, 0]]],
    ["both", 2, 4, None, [[30, 20], [20, 10]]],
    ["both", 2, 4, 1, [[30, 20], [20, 10]]],
]
# Of the first chain at a room of two nodes, and of the tree at one, what equal shares
# leave of it, and nothing.
AT_ROOMS = {2.0: [[10, 6, 4], [7, 4, 0]], 1.0: [[0, 0, 0], [0, 0, 0]]}


def test_what_is_kept_comes_back():
    made = seen()
    assert [[*kind, all_rooms([counts])] for *kind, counts in made.state()] == STATE
    for number, room in ((0, 2.0), (2, 1.0)):
        column = np.array(made.state()[number][-1])[:, :, rooms.ROOMS.index(room)]
        assert column.tolist() == AT_ROOMS[room]
    other = survival.Survival()
    # What it had seen itself is forgotten.
    add(other, D7, (9, 9, 9, 9, 9, 9, 9, 9), 16)
    state = json.loads(json.dumps(made.state()))
    before = json.dumps(state)
    other.restore(state)
    assert json.dumps(other.state()) == before
    tight = strategy.parse("D7K1V8N5")
    for chosen in (D3, D7, TREE, NGRAM, BOTH, strategy.parse("D3K2V6"), tight):
        for bucket in (None, 1, 2, 4):
            found = [x.accept_length(chosen, 0.5, bucket) for x in (made, other)]
            assert found[0] == found[1]
    # Neither shares its counts with what was given.
    add(other, D3, (8, 6, 4, 3), 4)
    assert json.dumps(state) == json.dumps(made.state()) == before


def test_old_calls_fade_by_so_much():
    made = survival.Survival(memory=10)
    add(made, CHAINS[2], (8, 4, 1), 4)
    add(made, CHAINS[2], (8, 2, 2), 4)
    # 6 of 16 count for 10, and what is deeper, of less than 10, for all it was.
    assert all_rooms(made.state()[0]) == [[10, 6], [3.75, 3]]


def counts_of_all(made):
    """What is at risk and survived in all batches, by proposer and topk."""
    kept = [row for row in made.state() if row[3] is None]
    return {
        (proposer, topk): all_rooms(row) for row in kept for proposer, topk in [row[:2]]
    }


def test_discounts_by_proposer_and_size():
    made = seen(kept=5.0)
    made.discount(0.25, drafted_only=True)
    counts = counts_of_all(made)
    assert counts["drafter", 1] == [[5, 5, 4], [3.5, pytest.approx(10 / 3), 3]]
    assert counts["drafter", 2] == [[5, 2, 1], [2, 1, 0]]
    assert counts["ngram", 1] == [[40, 10], [10, 0]]
    assert counts["both", 2] == [[7.5, 5], [5, 2.5]]
    made.discount(0.5)
    counts = counts_of_all(made)
    assert counts["ngram", 1] == [[20, 5], [5, 0]]
    assert counts["both", 2] == [[5, 5], [pytest.approx(10 / 3), 2.5]]


def test_optimism_in_numbers():
    made = survival.Survival(prior_hazard=0.5, prior_weight=2)
    # Of nothing: 0.5 / (0 + 2) is a variance of a quarter.
    assert made.accept_length(CHAINS[1], 0.5) == pytest.approx(1 + 0.5 + 0.5 * 0.5)
    add(made, CHAINS[2], (9, 6, 1), 4)
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
    add(made, CHAINS[2], (20, 10, 8), 8)
    add(made, CHAINS[1], (4, 4), 2)
    # 14 of 24 in all; in the bucket 4 of 4 and six row-steps like all.
    first = (4 + 6 * 14 / 24) / (4 + 6)
    expected = 1 + first + first * 0.8
    assert made.accept_length(CHAINS[2], 0.0, 2) == pytest.approx(expected)
    # The evidence: the bucket's four row-steps and six shared ones.
    hope = first + np.sqrt((first * (1 - first) + 0.25 / 11) / 11)
    deeper = 0.8 + np.sqrt((0.8 * 0.2 + 0.25 / 11) / 11)
    expected = 1 + hope + hope * deeper
    assert made.accept_length(CHAINS[2], 1.0, 2) == pytest.approx(expected)
