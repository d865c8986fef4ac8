"""Stages are timed, compilers' time stands apart, and an observer is told."""

import types

import pytest

from tlt_jax.runtime import watch


def pool_that_waited(seconds):
    return types.SimpleNamespace(stats=types.SimpleNamespace(waited_s=seconds))


def test_waiting_for_compilers_is_counted_apart():
    pool, other = pool_that_waited(1.0), pool_that_waited(0.0)
    made = watch.Watch((pool, other))
    with made.stage("update"):
        pool.stats.waited_s += 100.0
        # Side by side with the other: the longest wait is what was lost.
        other.stats.waited_s += 60.0
    with made.stage("update"):
        pool.stats.waited_s += 20.0
    row = made.row()
    assert row["time/compile_s"] == 120.0
    assert row["time/update_s"] == 0.0 and row["time/rollout_s"] == 0.0
    assert "time/eval_s" not in row
    with made.stage("eval"):
        pass
    assert row.keys() | {"time/eval_s"} == made.row().keys()
    assert made.row()["time/eval_s"] == pytest.approx(0.0, abs=1.0)


def test_seconds_of_a_stage_add_up(monkeypatch):
    times = iter((10.0, 13.0, 20.0, 24.5))
    monkeypatch.setattr(watch.time, "perf_counter", lambda: next(times))
    made = watch.Watch()
    for _ in range(2):
        with made.stage("reward"):
            pass
    assert made.spent == {"reward": 7.5, "compile": 0.0}


def test_the_observer_hears_stages_and_notes_of_the_step():
    said = []

    class Listener(watch.Silent):
        def stage(self, name):
            said.append(name)

        def within(self, done, total, detail=""):
            said.append((done, total, detail))

        def note(self, text):
            said.append(text)

    made = watch.Watch((), Listener(), step=6)
    with made.stage("rollout"):
        made.within(2, 8, "31 tokens")
    made.note("two rewards failed.")
    assert said == ["rollout", (2, 8, "31 tokens"), "  step 7: two rewards failed."]
