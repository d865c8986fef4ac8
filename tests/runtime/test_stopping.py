"""Signals are heard at once; work is let end, for so long; a second Ctrl-C ends all."""

import os
import signal
import threading
import types

import pytest

from tlt_jax.runtime import stopping

TOLD = "stopping after this step: saving; Ctrl-C again ends at once"


@pytest.fixture
def ended(monkeypatch):
    """What the process would have ended with: status and last line."""
    found = []
    monkeypatch.setattr(stopping, "_end", lambda *given: found.append(given))
    return found


def test_where_nothing_is_to_be_finished_the_process_ends_at_once(ended):
    stop = stopping.Stop()
    stop.last_words = lambda: "it is there."
    stop.hear(signal.SIGTERM)
    assert ended == [(143, "it is there.")]
    stop = stopping.Stop()
    with stop.finishing(print):
        pass
    stop.hear(signal.SIGINT)
    assert ended[1:] == [(130, "interrupted.")]


def test_work_is_told_once_and_only_a_second_ctrl_c_ends_it(ended):
    stop, said = stopping.Stop(), []
    assert (stop.signal, stop.look()) == (0, None)
    with stop.finishing(said.append):
        stop.hear(signal.SIGTERM)
        # Slurm and others repeat it.
        stop.hear(signal.SIGTERM)
        assert (stop.signal, stop.status, said, ended) == (15, 143, [TOLD], [])
        stop.hear(signal.SIGINT)
    at_once = "ended at once: the same command resumes from the newest checkpoint."
    assert (said, ended) == ([TOLD], [(143, at_once)])


def test_what_takes_longer_than_the_grace_is_given_up_once(ended, monkeypatch):
    now = [100.0]
    clock = types.SimpleNamespace(monotonic=lambda: now[0])
    monkeypatch.setattr(stopping, "time", clock)
    stop, given_up = stopping.Stop(), []
    with stop.finishing(lambda text: None, 15.0, lambda: given_up.append(now[0])):
        assert stop.look() is None
        stop.hear(signal.SIGINT)
        now[0] = 112.0
        assert stop.look() == 3.0 and given_up == []
        now[0] = 115.0
        assert stop.look() is None and stop.look() is None
    assert given_up == [115.0] and ended == []
    # Without a limit there is nothing to be given up.
    with (stop := stopping.Stop()).finishing(lambda text: None):
        stop.hear(signal.SIGINT)
        assert stop.look() == 3600.0


def test_processes_agree():
    others = iter([[0, 0], [0, 15], [2, 15]])
    group = types.SimpleNamespace(num=2, exchange=lambda topic, own: next(others))
    stop = stopping.Stop()
    assert [stop.agreed(group) for _ in range(3)] == [False, True, True]
    assert stop.status == 143
    alone = types.SimpleNamespace(num=1)
    assert not stopping.Stop().agreed(alone) and stop.agreed(alone)


@pytest.mark.parametrize("number", stopping.SIGNALS)
def test_real_signals_are_heard_by_another_thread(ended, number):
    before = [signal.getsignal(n) for n in stopping.SIGNALS]
    heard, by = threading.Event(), []

    def say(text):
        by.append((text, threading.current_thread().name))

    with stopping.heard() as stop:
        with stop.finishing(say, 0.0, heard.set):
            os.kill(os.getpid(), number)
            assert heard.wait(20)
        assert (stop.signal, by) == (number, [(TOLD, "signals")])
    assert [signal.getsignal(n) for n in stopping.SIGNALS] == before
    assert not [t for t in threading.enumerate() if t.name == "signals"]
    assert ended == []
