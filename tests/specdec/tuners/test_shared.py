"""A tuner of several threads: every call reaches it, and one at a time."""

import concurrent.futures
import threading
import time

import pytest

from tlt_jax.specdec import strategy
from tlt_jax.specdec.tuners import shared, tuner

D3 = strategy.parse("D3K1V4")
CALL = tuner.Call(2, 4, D3, 0.1, 1, 5, (2, 2, 1, 0))


class Told:
    """Writes down what it is asked; fails, or is slow, if told to."""

    def __init__(self, takes_s=0.0):
        self.calls, self.inside, self._takes_s = [], 0, takes_s
        self.most_inside = 0

    def __getattr__(self, name):
        def method(*arguments):
            self.inside += 1
            self.most_inside = max(self.most_inside, self.inside)
            time.sleep(self._takes_s)
            self.calls.append((name, *arguments))
            self.inside -= 1
            if arguments == ("fail",):
                raise ValueError("no such thing")
            return f"answer of {name}"

        return method


def test_engines_share_it_unless_each_has_its_own():
    static = shared.SharedTuner(tuner.Static(strategy.parse_arms(("4:D3K1V4",))))
    assert static.for_engine() is static
    made = tuner.Threshold(strategy.parse_arms(("4:D3K1V4",)), 2, 3)
    threshold = shared.SharedTuner(made)
    one, two = threshold.for_engine(), threshold.for_engine()
    assert one is not two and one.choose(1) == D3 and two.choose(3) is None
    assert [own["speculating"] for own in threshold.state()["engines"]] == [True, False]


def ask(made):
    return [
        made.strategies(3),
        made.choose(4),
        made.record(CALL),
        made.changed("drafter"),
        made.state(),
        made.restore({"tuner": "other"}),
    ]


def test_every_call_reaches_the_tuner():
    told = Told()
    answers = ask(shared.SharedTuner(told))
    assert told.calls == [
        ("strategies", 3),
        ("choose", 4),
        ("record", CALL),
        ("changed", "drafter"),
        ("state",),
        ("restore", {"tuner": "other"}),
    ]
    assert answers == [f"answer of {name}" for name, *_ in told.calls]


def test_calls_come_one_at_a_time():
    told = Told(takes_s=0.001)
    made = shared.SharedTuner(told)
    together = threading.Barrier(4)

    def work(_):
        together.wait(10)
        ask(made)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert told.most_inside == 1 and len(told.calls) == 24


def test_after_a_failure_others_go_on():
    made = shared.SharedTuner(Told())
    with pytest.raises(ValueError, match="no such thing"):
        made.changed("fail")
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        assert pool.submit(made.choose, 1).result(10) == "answer of choose"
