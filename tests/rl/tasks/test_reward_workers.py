"""Reward workers elsewhere: the rewards of a pool, whoever dies, hangs or comes."""

import contextlib
import dataclasses
import fractions
import threading
import time

import pytest

from tlt_jax import types
from tlt_jax.executors import member
from tlt_jax.rl.tasks import reward_pool, reward_workers
from tlt_jax.runtime import distributed, failures
from tlt_jax.runtime.transport import talk

ABOUT = {"code of tlt_jax": "0123", "settings": "4567"}
EXAMPLE = types.Example("7", "3+4=", "7", {"numbers": (3, 4)})
TEXTS = ["7", "8", "raise", "nan", "", "\ud83d"]


def judge(example, text):
    """Tell right from wrong, and fail in some ways."""
    if text == "raise":
        raise KeyError("lost")
    return float("nan") if text == "nan" else float(text == example.answer)


def here():
    """A pool without processes, as limits are not what is tested."""
    return reward_pool.RewardPool(judge, 0, failure_reward=-1.0)


def meeting_of(worker=None):
    host, _, port = member.Member().address("127.0.0.1").rpartition(":")
    return distributed.Meeting((host, int(port)), b"secret", host, worker)


class World:
    """A process of a run, and reward workers that are threads here."""

    def __init__(self, silent_s=20.0):
        self.meeting, self.ended, self.threads = meeting_of(), [], []
        self.pool = reward_workers.SeparatePool(judge, self.meeting, ABOUT, silent_s)

    def worker(self, number, pool=None, about=ABOUT, meetings=None):
        meetings = meetings or [self.meeting]
        its = [dataclasses.replace(one, worker=number) for one in meetings]
        made = reward_workers.Judge(its, about, pool or here())

        def work():
            try:
                made.work()
            except failures.UserError as error:
                self.ended.append(error)

        self.threads.append(threading.Thread(target=work, daemon=True))
        self.threads[-1].start()

    def score(self, texts=TEXTS):
        return told(self.pool.score((EXAMPLE, text) for text in texts))


def told(scores):
    return [dataclasses.replace(item, scoring_s=0.0) for item in scores.items]


@pytest.fixture
def world():
    with contextlib.ExitStack() as closing:
        made = World()
        closing.callback(made.pool.close)
        yield made


@pytest.fixture(scope="module")
def expected():
    found = told(here().score((EXAMPLE, text) for text in TEXTS))
    assert [item.reward for item in found] == [1.0, 0.0, -1.0, -1.0, 0.0, 0.0]
    return found


class Odd:
    """A pool whose first call does something else first."""

    def __init__(self, act):
        self.act, self.calls, self.pool = act, 0, here()

    def wait_until_ready(self):
        pass

    def score(self, pairs):
        self.calls += 1
        if self.calls == 1:
            self.act()
        return self.pool.score(pairs)


@pytest.mark.parametrize("num", [1, 3])
def test_rewards_are_those_of_a_pool(world, expected, num):
    for number in range(num):
        world.worker(number)
    world.pool.wait_until_ready()
    assert world.score() == expected
    assert world.score(TEXTS[::-1]) == expected[::-1]
    world.pool.close()
    # Who hears that this is the end, ends.
    for thread in world.threads:
        thread.join(20)
        assert not thread.is_alive()
    assert not world.ended


def cut(world, number):
    """End a worker's connection, as its death does."""
    until = time.monotonic() + 20
    while number not in world.pool._there and time.monotonic() < until:
        time.sleep(0.01)
    world.pool._there[number].hang_up()


def test_others_judge_what_one_that_dies_had(world, expected):
    """With no other, itself when it has come anew."""
    dying = Odd(lambda: cut(world, 0))
    world.worker(0, dying)
    assert world.score() == expected
    assert dying.calls > len(TEXTS)
    dying = Odd(lambda: cut(world, 1))
    world.worker(1, dying)
    assert world.score(10 * TEXTS) == 10 * expected


def test_one_that_is_silent_is_given_up(expected, monkeypatch):
    monkeypatch.setattr(reward_workers, "_BEAT_S", 60.0)
    world, goes_on = World(silent_s=0.2), threading.Event()
    world.worker(0, Odd(lambda: goes_on.wait(20)))
    world.pool.wait_until_ready()
    world.worker(1)
    assert world.score() == expected
    assert not goes_on.is_set()
    goes_on.set()
    world.pool.close()


def test_one_that_judges_for_long_is_not(expected, monkeypatch):
    monkeypatch.setattr(reward_workers, "_BEAT_S", 0.05)
    world = World(silent_s=0.3)
    slow = Odd(lambda: time.sleep(0.9))
    world.worker(0, slow)
    assert world.score() == expected
    assert slow.calls == len(TEXTS)
    world.pool.close()


def test_all_processes_of_a_run_are_served(world, expected):
    other = meeting_of()
    with reward_workers.SeparatePool(judge, other, ABOUT) as second:
        world.worker(0, meetings=[world.meeting, other])
        assert world.score() == expected
        assert told(second.score((EXAMPLE, text) for text in TEXTS)) == expected


def test_who_does_not_belong_here_is_told_why(world):
    world.worker(3, about=ABOUT | {"settings": "8"})
    world.threads[0].join(20)
    (error,) = world.ended
    assert str(error).startswith("reward worker 3 has another settings than the learne")


def test_what_cannot_travel_is_named(world):
    third = dataclasses.replace(EXAMPLE, metadata={"x": fractions.Fraction(1, 3)})
    # No thread that decodes is to end by it.
    world.pool.submit(third, "7")
    what = "example '7' cannot be sent to reward workers .it holds fractions.Fraction.:"
    with pytest.raises(failures.UserError, match=what):
        world.pool.gather()


def test_nobody_is_waited_for_without_end(world, monkeypatch):
    monkeypatch.setattr(reward_workers, "_COME_S", 0.2)
    monkeypatch.setattr(reward_workers, "_LOOK_S", 0.1)
    with pytest.raises(failures.UserError, match="no reward worker was there for 0.2"):
        world.score()


def test_what_is_no_outcome_is_not_believed(world, expected):
    """A process that says something else is left."""
    with pytest.raises(talk.TalkError, match="it says .'served',. where it judges"):
        world.pool._ask(Saying(("served", 1)), EXAMPLE, "7")
    world.worker(0)
    assert world.score() == expected


class Saying:
    def __init__(self, said):
        self.said = said

    def say(self, *values):
        pass

    def hear(self, within_s):
        return self.said
