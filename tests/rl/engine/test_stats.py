"""What an engine counts, and what two engines count together."""

import dataclasses

import numpy as np
import pytest

from tlt_jax.rl.engine import stats as rollout_stats
from tlt_jax.specdec import rooms, strategy
from tlt_jax.specdec.tuners import tuner


def call_of(text, num_accepted=(), rows=3, elapsed_s=0.5, steps=10):
    chosen = text and strategy.parse(text)
    return tuner.Call(rows, 4, chosen, elapsed_s, steps, 20, num_accepted)


def counted(*calls):
    stats = rollout_stats.RolloutStats()
    for call in calls:
        stats.add(call)
    return stats


def test_rates_are_of_drafts_that_were_tried():
    """A call that drafted two levels says nothing of a third."""
    calls = [call_of("D2K1V3", (10, 8, 4)), call_of("D3K1V4", (10, 6, 3, 3))]
    stats = counted(*calls, call_of(None))
    assert stats.num_accepted == [20, 14, 7, 3]
    assert stats.num_tried == [20, 14, 3]
    assert stats.accept_rates() == [14 / 20, 7 / 14, 3 / 3]
    assert stats.accept_length == 44 / 20
    empty = rollout_stats.RolloutStats()
    assert (empty.accept_rates(), empty.accept_length) == ([], 1.0)
    # Workers that had nothing to do know of no rule.
    named = rollout_stats.RolloutStats(rule="block")
    assert empty.join(named).rule == named.join(empty).rule == "block"
    # What nobody tried has no chance rather than no number.
    assert rollout_stats.accept_rates([5, 0, 0], [5, 0]) == [0.0, 0.0]


def test_calls_are_counted():
    stats = counted(
        call_of("D2K1V3", (10, 8, 4), rows=3, elapsed_s=0.5, steps=10),
        call_of(None, rows=2, elapsed_s=0.25, steps=7),
        call_of(None, rows=1, elapsed_s=1.0, steps=1),
    )
    assert (stats.num_calls, stats.num_steps, stats.num_row_steps) == (3, 18, 72)
    assert (stats.decode_s, stats.call_s) == (1.75, [0.5, 0.25, 1.0])
    assert stats.active_rows == [3, 2, 1]
    assert stats.strategies == {"D2K1V3": 1, "none": 2}
    # Tokens are counted where rows end.
    assert stats.num_tokens == 0
    # Plain calls aside, though there are more of them.
    assert stats.most_used == "D2K1V3"


def test_drafts_are_counted_by_their_chance():
    stats, counted_once = counted(), np.arange(30.0).reshape(3, 10)
    for _ in range(2):
        stats.add(call_of("D2K1V3", (10, 8, 4)), counted_once)
    stats.add(call_of(None))
    np.testing.assert_array_equal(stats.reliability, 2 * counted_once)


def test_the_learned_drafters_drafts_are_counted_by_rank():
    """What a room holds and the smaller one does not, with all of the levels."""
    verified, shallow, whole = np.zeros((3, len(rooms.ROOMS)), int)
    verified[3:], verified[5:] = 10, 17
    shallow[3:], whole[3:], whole[4:] = 4, 6, 9
    tables = tuple(map(tuple, np.stack([verified, shallow, whole]).tolist()))
    call = call_of("D2K1V3N7", (10, 6, 3))
    stats = counted(*[dataclasses.replace(call, accepted_by_room=tables)] * 2)
    wanted = np.zeros((2, len(rooms.ROOMS)), int)
    wanted[:, 3], wanted[0, 5], wanted[1, 4] = (20, 12), 14, 6
    assert stats.by_rank == wanted.tolist()
    for other in ("D2K1V3-ngram", "D2K1V3-both"):
        call = call_of(other, (10, 6, 3))
        call = dataclasses.replace(call, accepted_by_room=tables)
        stats.add(call, np.ones((3, 10)))
    stats.add(call_of(None))
    assert stats.by_rank == wanted.tolist() and not np.any(stats.reliability)
    assert stats.join(counted()).join(stats).by_rank == (2 * wanted).tolist()


def test_engines_are_added_up():
    one = counted(call_of("D2K1V3", (10, 8, 4), rows=3))
    two = counted(call_of("D3K1V4", (4, 2, 1, 1), rows=2), call_of(None, rows=1))
    one.rule = two.rule = "block"
    for number, stats in enumerate((one, two), 1):
        stats.num_tokens, stats.num_preempted = 10 * number, number
        stats.num_prefill_tokens, stats.num_fill_tokens = 100 * number, 30 * number
        stats.prefill_s, stats.fill_s = 0.25 * number, 0.5 * number
        stats.compile_s, stats.capture_s = 2.0 * number, 0.125 * number
        stats.num_ahead, stats.num_thrown_away = 2 * number, 7 * number
        stats.taus, stats.sharpnesses = [0.5 * number], [0.75 * number]
    one.reliability[2][9], two.reliability[2][9] = 3, 4
    joined = vars(one.join(two))
    assert not np.any(joined.pop("by_rank"))
    tried, chance, true = joined.pop("reliability")
    assert true == [0] * 9 + [7] and tried == chance == [0] * 10
    assert joined == {
        "num_tokens": 30,
        "num_steps": 30,
        "num_row_steps": 120,
        "num_calls": 3,
        "num_ahead": 6,
        "taus": [0.5, 1.0],
        "sharpnesses": [0.75, 1.5],
        "num_thrown_away": 21,
        "num_prefill_tokens": 300,
        "num_fill_tokens": 90,
        "num_preempted": 3,
        "num_accepted": [14, 10, 5, 1],
        "num_tried": [14, 10, 1],
        "strategies": {"D2K1V3": 1, "D3K1V4": 1, "none": 1},
        "rule": "block",
        "prefill_s": 0.75,
        "fill_s": 1.5,
        "decode_s": 1.5,
        "compile_s": 6.0,
        "active_rows": [3, 2, 1],
        "call_s": [0.5, 0.5, 0.5],
        "capture_s": 0.375,
    }
    # Neither is changed.
    assert one.num_accepted == [10, 8, 4] and two.num_calls == 2
    same = one.join(one)
    assert same.accept_length == one.accept_length == 2.2
    assert same.accept_rates() == pytest.approx([0.8, 0.5])
