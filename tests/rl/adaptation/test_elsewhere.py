"""Separate workers that wait train the drafter: as colocated ones, whoever dies."""

import contextlib
import dataclasses
import threading
import types

import jax
import numpy as np
import pytest

from tests.rl import engines
from tests.rl.adaptation import test_adaptation
from tests.rl.engine import test_engine_speculation
from tests.rl.workers import test_separate
from tlt_jax.rl.adaptation import adaptation, elsewhere, training
from tlt_jax.rl.workers import coordinator, distant, served
from tlt_jax.runtime import watch as watch_lib
from tlt_jax.settings import speculation
from tlt_jax.specdec import chain
from tlt_jax.specdec.texts import layout

CFG = test_adaptation.CFG
# Few texts of a rollout are long enough to be measured and to be learned from.
SETTINGS = test_adaptation.SETTINGS | {"num_rows": 1}
OFFERED = "drafter/version"


def training_of(directory, **settings):
    return training.Training(
        speculation.Adaptation(**SETTINGS | settings),
        CFG,
        is_trained=False,
        eos_ids=(engines.EOS,),
        sampling_cfg=test_adaptation.PLAIN,
        precision="float32",
        seed=3,
        directory=directory,
        rule=chain.KEYED,
        note=print,
    )


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """An engine and a training whose programs the others share; what it generates."""
    engine = engine_of()
    own = training_of(tmp_path_factory.mktemp("texts"))
    engine.warm_up()
    elsewhere.Trainee(own, engine).prepare()
    own.learner.pool.wait()

    def told(number):
        found, _ = engine.run(requests_of(number), engines.SEED)
        return test_separate.told(found)

    starts = [len(request.prompt) for request in engines.REQUESTS]
    lengths = [s + len(one[1]) for s, one in zip(starts, told(0), strict=True)]
    yield types.SimpleNamespace(
        num_texts=np.count_nonzero([*map(layout.num_bases, lengths, starts)]),
        pool=engine.pool,
        programs=own.learner.pool,
        told=told,
    )
    engine.pool.close()
    own.close()


def requests_of(number):
    """Requests of a rollout: no two of a run have the same id."""
    return [
        dataclasses.replace(one, request_id=one.request_id + 1000 * number)
        for one in engines.REQUESTS
    ]


def engine_of():
    changes = {"capture": True}
    return test_engine_speculation.engine_of("chain", CFG, changes, max_rows=2)


class World:
    """A learner's drafter, and workers that are threads here and processes elsewhere.

    Attributes:
      num_steps: that all workers have taken.
      free: until it is set worker 0 decodes nothing, so that the others wait.
    """

    def __init__(self, first, directory, num):
        self.first, self.directory = first, directory
        self.world = test_separate.World(first, num, heartbeat_timeout_s=60.0)
        self.team, self.trainees = self.world.team, {}
        self.free, self.stepped = threading.Event(), threading.Condition()
        self.num_steps, self.dying, self.num_rolled = 0, 0, 0
        self.links = {}
        for number in range(num):
            self.worker(number)
        self.adapted = adaptation.Adaptation(
            training_of(directory, max_steps=2, max_frac=1e6),
            self.team,
            [],
            initial=None,
            observer=watch_lib.Silent(),
        )
        self.team.set_params(test_separate.parts_of(engines.PARAMS), 1)
        self.adapted.start()

    def worker(self, number):
        engine = engine_of()
        engine.pool.close()
        engine.pool = self.first.pool
        own = training_of(self.directory / str(number))
        own.learner.pool.close()
        own.learner.pool = self.first.programs
        step, decode_call = own.learner.step, engine._decode_call

        def counting(batch):
            found = yield from step(batch)
            with self.stepped:
                self.num_steps += 1
                self.stepped.notify_all()
            if self.dying and self.num_steps >= self.dying:
                self.dying = 0
                self.links[number].hang_up()
                raise ConnectionError("killed")
            return found

        def waiting(*rest):
            if number == 0:
                assert self.free.wait(60)
            return decode_call(*rest)

        own.learner.step, engine._decode_call = counting, waiting
        trainee = self.trainees[number] = elsewhere.Trainee(own, engine)
        train = trainee.train

        def noting(its, *rest):
            self.links[number] = its
            train(its, *rest)

        trainee.train = noting
        self.world.worker(number, made=served.Made(engine, trainee=trainee))

    def roll(self, num_steps=0):
        """Make a rollout, at whose end workers have taken so many steps."""

        def open_gate():
            with self.stepped:
                self.stepped.wait_for(lambda: self.num_steps >= num_steps, 60)
            self.free.set()

        self.free.clear()
        threading.Thread(target=open_gate, daemon=True).start()
        self.adapted.begin_rollout()
        completions, _ = self.team.run(requests_of(self.num_rolled), engines.SEED)
        assert test_separate.told(completions) == self.first.told(self.num_rolled)
        self.num_rolled += 1
        watch = watch_lib.Watch()
        watch.spent["rollout"] = 1.0
        # What it would have to beat.
        self.adapted.end_rollout(99.0, watch)
        spent = coordinator.sums(self.team.take_intervals())
        return self.adapted.row() | spent

    def drafters(self):
        """Versions that workers were given, and the newest that one has used.

        Who had no request in the last rollout has not taken it up.
        """
        given = {one.has[distant.DRAFTER] for one in self.team._there()}
        used = [t._engine.drafter_version for t in self.trainees.values()]
        return given, max(used)


@pytest.fixture
def world_of(first, tmp_path):
    with contextlib.ExitStack() as closing:

        def make(num):
            world = World(first, tmp_path, num)
            closing.callback(world.adapted.close)
            closing.callback(world.team.close)
            closing.callback(world.free.set)
            return world

        yield make


def test_who_waits_trains_until_the_rollout_ends(world_of):
    world = world_of(2)
    weights = sum(x.nbytes for x in jax.tree.leaves(engines.PARAMS))
    state = sum(x.nbytes for x in jax.tree.leaves(world.adapted.learner.state))
    row = world.roll(num_steps=3)
    assert (
        row["drafter/num_steps"] == row["drafter/num_updates"] == world.num_steps >= 3
    )
    assert row["workers/trained_s"] > 0 and "drafter/failure" not in row
    # The target, once for both, and the drafter there and back: no texts, which are
    # where they were made, and are told.
    assert row["drafter/texts"] == world.first.num_texts
    assert row["drafter/texts_bytes"] > 0 and len(world.adapted.buffer) == 0
    most = weights + 2 * state + 30_000
    assert weights + 2 * state < world.team.traffic.num_bytes < most
    for trainee in world.trainees.values():
        # Between trainings the learner has it.
        assert trainee._own.learner.newest is None
    # The next rollout begins with what was learned, once it is good enough.
    assert row["drafter/ready"] == row[OFFERED] == 0
    world.adapted.is_ready = True
    world.adapted._publish()
    row = world.roll(num_steps=world.num_steps + 1)
    # That one, and what was learned beside this rollout, which the next one has.
    assert row[OFFERED] == 2 and row["drafter/num_updates"] == world.num_steps
    assert world.drafters() == ({1}, 1)
    world.roll()
    assert world.drafters() == ({2}, 2)


def test_who_dies_while_it_trains_costs_that_training_alone(world_of):
    world = world_of(2)
    before = world.adapted.learner.state
    world.dying = 2
    row = world.roll(num_steps=2)
    assert "its connection has ended" in row["drafter/failure"]
    assert row["drafter/num_updates"] == 0
    jax.tree.map(np.testing.assert_array_equal, world.adapted.learner.state, before)
    # It comes anew, and trains anew.
    row = world.roll(num_steps=world.num_steps + 1)
    assert row["drafter/num_updates"] == row["drafter/num_steps"] > 0
    assert "drafter/failure" not in row
    assert world.team.at_work() == [0, 1], world.team.lost


def test_a_training_that_fails_is_undone_and_recorded(world_of):
    world = world_of(2)

    def failing(batch):
        world.num_steps += 1
        world.free.set()
        raise FloatingPointError("no number")
        yield

    for trainee in world.trainees.values():
        trainee._own.learner.step = failing
    row = world.roll(num_steps=1)
    assert row["drafter/failure"] == "FloatingPointError: no number"
    assert row["drafter/num_updates"] == 0 and not world.team.lost


def test_one_worker_trains_between_rollout_and_update(world_of):
    world = world_of(1)
    world.free.set()
    row = world.roll()
    assert row["drafter/num_steps"] == row["drafter/num_updates"] == 2
    assert row["drafter/texts"] == world.first.num_texts
    assert world.adapted.budget.gain_per_s is not None


def test_nobody_trains_beside_an_evaluation(world_of):
    world = world_of(2)
    threading.Timer(0.3, world.free.set).start()
    assert world.world.run(law=distant.EVALUATION) == world.first.told(0)
    assert world.num_steps == 0 and world.team.texts() == (0, 0, 0)
    assert not world.team.coordination.state.num_trainings
