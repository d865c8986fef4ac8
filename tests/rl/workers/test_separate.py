"""Separate workers: the tokens of one engine, whoever comes, dies, hangs or returns."""

import contextlib
import dataclasses
import threading
import weakref
from multiprocessing import connection

import jax
import numpy as np
import pytest

from tests.rl import engines
from tests.runtime import linked_groups
from tlt_jax.executors import member
from tlt_jax.rl.engine import engine as engine_lib
from tlt_jax.rl.workers import (
    distant,
    records,
    separate,
    served,
    transfers,
    weight_sync,
)
from tlt_jax.rl.workers import workers as workers_lib
from tlt_jax.runtime import distributed, failures
from tlt_jax.runtime.transport import ring, talk

ABOUT = {"code of tlt_jax": "0123", "settings": "4567"}
OTHER = engines.params_of(1)


def told(completions):
    return [(c.request_id, c.tokens.tolist(), c.finish_reason) for c in completions]


def parts_of(params):
    return lambda: iter(weight_sync.in_parts(jax.device_get(params)))


class World:
    """A learner's team, and workers that are threads here and processes elsewhere."""

    def __init__(self, first, num=1, group=None, **limits):
        address = member.Member().address("127.0.0.1").rpartition(":")
        self.first, self.num = first, num
        self.meeting = distributed.Meeting(
            (address[0], int(address[2])), b"secret", "127.0.0.1"
        )
        self.limits, self.threads, self.ended = limits, [], []
        self.team = self.team_of(group)

    def team_of(self, group=None):
        return separate.Team(
            *(self.num, records.Config(**self.limits)),
            *(group or distributed.alone(), self.meeting, ABOUT),
            vocab_size=engines.CFG.vocab_size,
            max_length=engines.BASE.max_length,
        )

    def worker(self, number, about=ABOUT, made=None, **changes):
        """Begin a worker, with what was `made` for it; return its engine."""
        engine = made.first if made else engines.engine_of(self.first.pool, max_rows=2)
        for name, value in changes.items():
            setattr(engine, name, value.__get__(engine))
        engine.params = None
        meeting = dataclasses.replace(self.meeting, worker=number)
        serving = served.Worker(meeting, about, lambda: made or served.Made(engine))

        def work():
            try:
                serving.work()
            except Exception as error:
                self.ended.append(error)

        self.threads.append(threading.Thread(target=work, daemon=True))
        self.threads[-1].start()
        return engine

    def wait_at_the_door(self):
        """Wait until a worker has come."""
        door = self.team._door
        with door._changed:
            assert door._changed.wait_for(lambda: door._come, 20)

    def run(self, seed=engines.SEED, **options):
        completions, stats = self.team.run(engines.REQUESTS, seed, **options)
        return told(completions)


@contextlib.contextmanager
def world_of(first, num=1, **limits):
    world = World(first, num, **limits)
    yield world
    world.team.close()
    # Who is dismissed ends by itself.
    for thread in world.threads:
        thread.join(20)
        assert not thread.is_alive()


def dying(num_calls):
    """A decode call after some of which the worker's connection is gone."""
    left = [num_calls]
    decode_call = engine_lib.Engine._decode_call

    def call(engine, *rest):
        left[0] -= 1
        if not left[0]:
            raise talk.TalkError("killed")
        return decode_call(engine, *rest)

    return call


@pytest.mark.parametrize("num", [1, 3])
def test_tokens_are_those_of_one_engine(first, expected, num):
    with world_of(first, num) as world:
        made = [world.worker(i) for i in range(num)]
        world.team.set_params(parts_of(engines.PARAMS), 1)
        seen, shown = [], []
        options = dict(
            on_completion=seen.append, on_call=lambda *counts: shown.append(counts)
        )
        assert world.run(**options) == expected
        assert sorted(c.request_id for c in seen) == sorted(e[0] for e in expected)
        assert shown[-1][0] <= len(expected) and not world.team.lost
        assert world.team.at_work() == list(range(num))
        spans = world.team.take_intervals()
        assert {i.worker for i in spans} == set(range(num))
        # The next weights, and an evaluation by them.
        world.team.set_params(parts_of(OTHER), 2)
        assert {engine.version for engine in made} == {2}
        first.set_params(OTHER, 2)
        wanted = told(first.run(engines.REQUESTS, 7)[0])
        first.set_params(engines.PARAMS, 0)
        assert world.run(7, law=distant.EVALUATION) == wanted != expected
        with pytest.raises(ValueError, match="requests is empty"):
            world.team.run([], 0)


def test_a_worker_that_dies_is_replaced_and_comes_anew(first, expected):
    with world_of(first, 2) as world:
        world.worker(0)
        world.worker(1, _decode_call=dying(2))
        world.team.set_params(parts_of(engines.PARAMS), 1)
        assert world.run() == expected
        # It comes anew by itself, in this rollout or for the next.
        assert world.run() == expected
        assert world.team.at_work() == [0, 1] and not world.team.lost
        spans = world.team.take_intervals()
        assert records.Activity.LOST in {i.activity for i in spans if i.worker == 1}


def test_the_only_worker_that_dies_ends_no_run(first, expected):
    with world_of(first, 1) as world:
        world.worker(0, _decode_call=dying(3))
        world.team.set_params(parts_of(engines.PARAMS), 1)
        seen = []
        assert world.run(on_completion=seen.append) == expected
        # What was there before it died is not judged twice.
        assert sorted(c.request_id for c in seen) == sorted(e[0] for e in expected)
        assert world.team.lost == {}


def test_a_worker_that_hangs_is_given_up_and_may_come_anew(first, expected):
    woken, decode_call = threading.Event(), engine_lib.Engine._decode_call
    left = [2]

    def hanging(engine, *rest):
        left[0] -= 1
        if not left[0]:
            woken.wait(60)
        return decode_call(engine, *rest)

    with world_of(first, 2, heartbeat_timeout_s=3.0) as world:
        world.worker(0)
        world.worker(1, _decode_call=hanging)
        world.team.set_params(parts_of(engines.PARAMS), 1)
        assert world.run() == expected
        assert "silent for" in world.team.lost[1] and world.team.at_work() == [0]
        woken.set()
        world.wait_at_the_door()
        assert world.run() == expected
        assert world.team.at_work() == [0, 1] and not world.team.lost


def test_more_workers_come_than_there_were(first, expected):
    with world_of(first, 1) as world:
        world.worker(0)
        world.team.set_params(parts_of(engines.PARAMS), 1)
        assert world.run() == expected
        late = world.worker(6)
        world.wait_at_the_door()
        assert world.run() == expected
        assert world.team.at_work() == [0, 6] and late.version == 1


@pytest.mark.parametrize("number", [1, 6])
def test_who_comes_in_the_midst_of_a_rollout_takes_part(first, expected, number):
    """Number 1 dies and comes anew, 6 comes late; else this rollout would not end."""
    decode_call, helped = engine_lib.Engine._decode_call, threading.Event()
    calls = []

    def waiting(engine, *rest):
        if number == 6 and not calls:
            calls.append(world.worker(6, _decode_call=helping))
        assert helped.wait(60)
        return decode_call(engine, *rest)

    def helping(engine, *rest):
        if number == 1 and not calls:
            calls.append(engine)
            raise talk.TalkError("killed")
        helped.set()
        return decode_call(engine, *rest)

    with world_of(first, 1 + (number == 1)) as world:
        world.worker(0, _decode_call=waiting)
        if number == 1:
            world.worker(1, _decode_call=helping)
        world.team.set_params(parts_of(engines.PARAMS), 1)
        assert world.run() == expected
        assert world.team.at_work() == [0, number] and not world.team.lost
        spans = world.team.take_intervals()
        did = [str(i.activity) for i in spans if i.worker == number]
        assert did[-1] == "busy" or did[-2:] == ["busy", "idle"]
        assert ("lost" in did) == (number == 1)
        # It has got the weights once.
        assert calls[0].version == 1


def test_workers_outlive_a_learner_and_keep_their_programs(first, expected):
    with world_of(first, 2) as world:
        made = [world.worker(i) for i in range(2)]
        world.team.set_params(parts_of(engines.PARAMS), 1)
        assert world.run() == expected
        # As a kill does it, without a word.
        world.team._door._closed = True
        with contextlib.suppress(OSError):
            connection.Client(world.meeting.address).close()
        world.team._door._listener.close()
        for one in world.team._distant.values():
            one.talk.hang_up()
        known = first.pool.stats.num_compiled
        world.team = world.team_of()
        world.team.set_params(parts_of(OTHER), 5)
        assert {engine.version for engine in made} == {5}
        assert world.run() != expected
        assert first.pool.stats.num_compiled == known


def test_a_rollout_is_given_up(first):
    with world_of(first, 1) as world:
        world.worker(0)
        world.team.set_params(parts_of(engines.PARAMS), 1)
        with pytest.raises(failures.Abandoned):
            world.run(on_call=lambda *_: world.team.abandon())


def test_processes_of_the_learner_have_the_same_completions(first, expected):
    with linked_groups.of(2) as groups:
        world = World(first, 1, groups[0])
        guest = world.team_of(groups[1])
        world.worker(0, _decode_call=dying(3))
        found, made = [], []

        def take_part():
            def parts():
                made.append(True)
                return parts_of(engines.PARAMS)()

            guest.set_params(parts, 1)
            found.append(told(guest.run(engines.REQUESTS, engines.SEED)[0]))

        other = threading.Thread(target=take_part, daemon=True)
        other.start()
        world.team.set_params(parts_of(engines.PARAMS), 1)
        assert world.run() == expected
        other.join(20)
        # Weights are made by all: at first, and for the worker that came anew.
        assert found == [expected] and made == [True, True]
        world.team.close()
        world.threads[0].join(20)


def test_weights_leave_the_learner_once_and_part_by_part(first):
    """However many workers there are; no part stays when the next one is made."""
    before = []

    def parts():
        for part in weight_sync.in_parts(engines.PARAMS):
            assert not before or not any(ref() for ref in before[-1])
            copies = jax.tree.map(np.array, part)
            before.append([weakref.ref(x) for x in jax.tree.leaves(copies)])
            yield copies
            del copies

    gather, sent = ring.Ring.gather, {}

    def counting(one, *rest):
        found = gather(one, *rest)
        sent[one._index] = one.traffic.sent_bytes, one.traffic.received_bytes
        return found

    with world_of(first, 3) as world, pytest.MonkeyPatch.context() as patched:
        patched.setattr(ring.Ring, "gather", counting)
        made = [world.worker(i) for i in range(3)]
        world.team.set_params(parts, 1)
        num_bytes = sum(x.nbytes for x in jax.tree.leaves(engines.PARAMS))
        most = num_bytes * 1.1 + 20_000
        assert num_bytes <= sent[0][0] < most and sent[0][1] == 0
        assert all(num_bytes <= sent[i][1] < most for i in (1, 2, 3))
        assert all(sum(both) < 2 * most for both in sent.values())
        for engine in made:
            for own, wanted in zip(
                *map(jax.tree.leaves, (engine.params, engines.PARAMS)), strict=True
            ):
                np.testing.assert_array_equal(own, wanted)


def test_who_breaks_the_ring_is_lost_and_others_get_their_weights(first, expected):
    take, left = transfers.Taking._take, [3]

    def dying_at_third(taking, size):
        left[0] -= 1
        if not left[0]:
            raise talk.TalkError("killed")
        return take(taking, size)

    with world_of(first, 2) as world, pytest.MonkeyPatch.context() as patched:
        patched.setattr(transfers.Taking, "_take", dying_at_third)
        made = [world.worker(i) for i in range(2)]
        world.team.set_params(parts_of(engines.PARAMS), 1)
        assert world.run() == expected
        assert max(engine.version for engine in made) == 1


@pytest.mark.parametrize("name", sorted(ABOUT))
def test_a_worker_of_another_kind_is_refused(first, name):
    with world_of(first) as world:
        world.worker(3, about=ABOUT | {name: "else"})
        world.threads[0].join(20)
        (error,) = world.ended
        assert str(error) == (
            f"rollout worker 3 has another {name} than the learner: start all "
            "processes with the same command, code and libraries."
        )
        assert isinstance(error, failures.UserError) and not world.team._door._come


def test_who_does_not_know_the_secret_is_hung_up_on(first):
    with world_of(first) as world:
        with connection.Client(world.meeting.address) as stranger:
            stranger.recv_bytes()
            stranger.send_bytes(b"sesame")
            with pytest.raises((EOFError, OSError)):
                while True:
                    stranger.recv_bytes()
        assert not world.team._door._come


def test_a_port_that_is_taken_and_nobody_who_comes(first):
    with world_of(first, heartbeat_timeout_s=0.2) as world:
        with pytest.raises(failures.UserError, match="another program listens at 127"):
            world.team_of()
        told = "no rollout worker has come within 0.2 s"
        with pytest.raises(workers_lib.NoWorkersError, match=told):
            world.team.set_params(parts_of(engines.PARAMS), 1)
