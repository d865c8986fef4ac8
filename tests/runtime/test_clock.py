"""Seconds by stage on a clock that is wound by hand."""

import types

import pytest

from tlt_jax.runtime import clock


class Time:
    """Stands where the module `time` does."""

    def __init__(self):
        self.now_s = 100.0

    def perf_counter(self):
        return self.now_s


def pool(waited_s):
    return types.SimpleNamespace(stats=types.SimpleNamespace(waited_s=waited_s))


@pytest.fixture
def time(monkeypatch):
    made = Time()
    monkeypatch.setattr(clock, "time", made)
    return made


def test_seconds_add_up_by_stage(time):
    timer = clock.Clock(())

    def work(seconds, result=None):
        time.now_s += seconds
        return result

    assert timer.time("rollout", work, 3.0, result="tokens") == "tokens"
    timer.time("update", work, 0.5)
    timer.time("rollout", work, 4.0)
    timer.time("eval", work, 8.0)
    assert timer.row() == {
        "time/rollout_s": 7.0,
        "time/reward_s": 0.0,
        "time/inference_s": 0.0,
        "time/update_s": 0.5,
        "time/sync_s": 0.0,
        "time/compile_s": 0.0,
        # No stage of every step: it is there where it happened.
        "time/eval_s": 8.0,
    }
    assert set(clock.Clock(()).row()) == timer.row().keys() - {"time/eval_s"}


def test_the_longest_wait_for_a_compiler_is_no_part_of_the_stage(time):
    pools = [pool(5.0), pool(1.0), pool(0.0)]
    timer = clock.Clock(pools)

    def work(seconds, *waits):
        for one, waited_s in zip(pools, waits, strict=True):
            one.stats.waited_s += waited_s
        time.now_s += seconds

    # Side by side they waited 2, 6 and 1 seconds of ten.
    timer.time("rollout", work, 10.0, 2.0, 6.0, 1.0)
    timer.time("update", work, 3.0, 0.0, 0.0, 0.5)
    row = timer.row()
    assert row["time/rollout_s"] == 4.0 and row["time/update_s"] == 2.5
    assert row["time/compile_s"] == 6.5
    # Threads that waited for longer than the stage took make it no shorter than 0.
    timer.time("rollout", work, 1.0, 0.0, 30.0, 0.0)
    assert timer.row()["time/rollout_s"] == 4.0
    assert timer.row()["time/compile_s"] == 36.5


def test_what_fails_is_not_counted(time):
    def fail():
        time.now_s += 1.0
        raise KeyError("no")

    timer = clock.Clock(())
    with pytest.raises(KeyError):
        timer.time("sync", fail)
    assert timer.row()["time/sync_s"] == 0.0
