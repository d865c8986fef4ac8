import random

import pytest

from tests import mutation
from tests.rl import coordinated
from tlt_jax.rl.workers import coordinator, records

CFG = records.Config(min_idle=1, heartbeat_timeout_s=50, stop_timeout_s=10)


def play(cfg, *events):
    """Hand over (time, event) pairs; return the state and all commands."""
    state, commands = records.State(), []
    for at_s, event in events:
        state, new = coordinator.handle(state, event, at_s, cfg)
        coordinated.check_state(state)
        commands += new
    return state, commands


def begin(num_workers, at_s=0.0, generation=1):
    return at_s, records.RolloutAsked(generation, tuple(range(num_workers)))


def done(at_s, worker, round_=0, generation=1):
    return at_s, records.WorkerDone(generation, worker, round_)


def test_an_undisturbed_rollout_from_begin_to_end():
    state, commands = play(
        CFG,
        begin(3),
        done(10, 1),
        (11, records.TrainingRuns(1, 0)),
        done(14, 2),
        (15, records.TrainingRuns(1, 1)),
        done(20, 0),
        (21, records.TrainingStopped(1)),
    )
    assert commands == [
        *(records.Generate(1, w, 0) for w in range(3)),
        records.Train(1, 0, (1,)),
        records.Train(1, 1, (1, 2)),
        records.Stop(1),
        records.EndRollout(1),
    ]
    assert (state.began_s, state.ended_s) == (0, 21)
    assert not state.which(records.Activity.LOST)
    assert coordinator.sums(coordinator.timeline(state)) == {
        # Worker 0 waits from 20 to 21, worker 1 from 10 on, worker 2 from 14 on.
        "workers/idle_s": 1 + 11 + 7,
        "workers/trained_s": 10 + 6,
        "workers/idle_frac": pytest.approx(19 / 63),
    }
    busy, idle, training = "busy", "idle", "training"
    spans = {
        (i.worker, str(i.activity), i.start_s, i.stop_s)
        for i in coordinator.timeline(state)
    }
    assert spans == {
        *((0, busy, 0, 20), (0, idle, 20, 21)),
        *((1, busy, 0, 10), (1, idle, 10, 11), (1, training, 11, 21)),
        *((2, busy, 0, 14), (2, idle, 14, 15), (2, training, 15, 21)),
    }


def test_training_waits_for_enough_idle_workers():
    cfg = records.Config(min_idle=2)
    state, commands = play(cfg, begin(4), done(1, 3))
    assert state.training is None
    state, commands = play(cfg, begin(4), done(1, 3), done(2, 0))
    assert commands[-1] == records.Train(1, 0, (0, 3))


def test_no_training_where_all_end_together_or_there_is_one_worker():
    _, commands = play(records.Config(min_idle=2), begin(2), done(5, 0), done(6, 1))
    assert commands[2:] == [records.EndRollout(1)]
    _, commands = play(CFG, begin(1), done(5, 0))
    assert commands == [records.Generate(1, 0, 0), records.EndRollout(1)]


def test_a_rollout_waits_for_the_training_of_one_given_up():
    events = begin(2), done(1, 0), (2, records.TrainingRuns(1, 0)), begin(2, 3, 2)
    state, commands = play(CFG, *events)
    assert commands[-1] == records.Stop(1)
    assert state.generation == 1 and not coordinator.may_train(state, 1)
    state, commands = play(CFG, *events, (4, records.TrainingStopped(1)))
    assert commands[-2:] == [records.Generate(2, 0, 0), records.Generate(2, 1, 0)]


def test_what_came_back_in_an_earlier_rollout_says_nothing_of_this_one():
    """Else the rollout would end without the requests of the worker that died."""
    events = (
        *(begin(2), done(1, 0), done(2, 1), begin(2, 3, 2)),
        (4, records.WorkerFailed(2, 1, "out of memory")),
        (5, records.RequestsReturned(1, 1)),
        done(6, 0, generation=2),
    )
    cfg = records.Config(min_idle=2)
    state, commands = play(cfg, *events)
    assert state.unreturned == {1} and state.rolling
    state, commands = play(
        cfg, *events, (7, records.RequestsReturned(2, 1)), done(8, 0, 1, 2)
    )
    assert commands[-2:] == [records.Generate(2, 0, 1), records.EndRollout(2)]


def test_requests_of_a_dead_worker_wake_those_who_wait():
    """With nobody left who generates, the training ends for it, too."""
    events = (
        begin(2),
        done(5, 0),
        (6, records.TrainingRuns(1, 0)),
        (7, records.WorkerFailed(1, 1, "out of memory")),
        (8, records.TrainingStopped(1)),
        (9, records.RequestsReturned(1, 1)),
        done(12, 0, round_=1),
    )
    state, commands = play(CFG, *events)
    assert commands[3:] == [
        records.ReturnRequests(1, 1),
        records.Stop(1),
        records.Generate(1, 0, 1),
        records.EndRollout(1),
    ]
    assert len(state.which(records.Activity.LOST)) == 1


def test_those_who_train_go_on_while_others_see_to_returned_requests():
    events = begin(3), done(5, 0), (6, records.TrainingRuns(1, 0))
    events += (
        (7, records.WorkerFailed(1, 1, "bug")),
        (8, records.RequestsReturned(1, 1)),
    )
    state, _ = play(CFG, *events)
    assert coordinator.may_train(state, 1) and state.unclaimed
    # Worker 2 may have looked into the queue too early, so it looks again.
    _, commands = play(CFG, *events, done(9, 2))
    assert commands[-1] == records.Generate(1, 2, 1)


def test_a_silent_worker_is_lost_and_the_last_one_ends_the_run():
    state, commands = play(CFG, begin(1), (50, records.Tick()))
    assert state.rolling
    state, commands = play(CFG, begin(1), (51, records.Tick()))
    assert commands[-1] == records.Abort(
        1, "no worker is left: worker 0: it was silent for 51 s"
    )
    alive = 40, records.WorkerAlive(1, 0, 0)
    state, commands = play(CFG, begin(1), alive, (60, records.Tick()))
    assert state.rolling


def test_a_lost_worker_of_the_mesh_ends_the_training_and_the_others_train_anew():
    _, commands = play(
        CFG,
        begin(3),
        done(5, 0),
        done(6, 1),
        (7, records.TrainingRuns(1, 1)),
        (8, records.WorkerFailed(1, 0, "died")),
        (9, records.RequestsReturned(1, 0)),
        (10, records.TrainingStopped(1)),
        done(11, 1, round_=1),
    )
    assert commands[5:] == [
        *(records.Stop(1), records.ReturnRequests(1, 0)),
        *(records.Generate(1, 1, 1), records.Train(2, 0, (1,))),
    ]


@pytest.mark.parametrize("max_restarts", [0, 1])
def test_a_failed_training_is_begun_again_as_often_as_allowed(max_restarts):
    cfg = records.Config(max_restarts=max_restarts)
    events = begin(2), done(1, 0), (2, records.TrainingFailed(1, "loss is nan"))
    state, commands = play(cfg, *events, (3, records.TrainingFailed(2, "again")))
    trainings = [c.training for c in commands if isinstance(c, records.Train)]
    assert trainings == [1, 2][: 1 + max_restarts]
    # The next rollout may train again.
    events += (3, records.TrainingFailed(2, "again")), done(4, 1), begin(2, 5, 2)
    _, commands = play(cfg, *events, done(6, 1, generation=2))
    assert commands[-1] == records.Train(2 + max_restarts, 0, (1,))


def test_a_trainer_that_does_not_stop_is_given_up_until_it_answers():
    events = (
        begin(2),
        done(1, 0),
        (2, records.TrainingRuns(1, 0)),
        done(3, 1),
        (13, records.Tick()),
    )
    state, commands = play(CFG, *events)
    assert state.rolling and coordinator.may_publish(state, 1)
    events += (13.5, records.Tick()), begin(2, 14, 2), done(15, 0, generation=2)
    state, commands = play(CFG, *events)
    assert not coordinator.may_publish(state, 1)
    assert records.EndRollout(1) in commands and state.training is None
    state, commands = play(CFG, *events, (16, records.TrainingStopped(1)))
    assert commands[-1] == records.Train(2, 0, (0,))


def test_a_run_that_shall_end_gives_up_this_rollout_and_the_next():
    played = [
        begin(2),
        done(10, 1),
        (11, records.TrainingRuns(1, 0)),
        (12, records.RunAbandoned()),
    ]
    state, commands = play(CFG, *played)
    assert commands[3:] == [records.Stop(1), records.Abort(1)]
    assert (state.rolling, state.failure, state.ended_s) == (False, "", 12)
    # Who has not heard of it is told again, and what is asked for now does not begin.
    played += [begin(2, 13), (14, records.TrainingStopped(1)), begin(2, 15, 2)]
    state, commands = play(CFG, *played)
    assert commands[5] == records.Abort(1)
    assert commands[-1] == records.Abort(2) and not state.rolling
    # Between rollouts nothing is to be given up.
    state, commands = play(CFG, begin(1), done(5, 0), (6, records.RunAbandoned()))
    assert commands == [records.Generate(1, 0, 0), records.EndRollout(1)]


def test_waits_for_compilers_are_cut_out_of_busy_time_alone():
    busy, idle = records.Activity.BUSY, records.Activity.IDLE
    whole = [
        records.Interval(0, busy, 0.0, 10.0),
        records.Interval(0, idle, 10.0, 12.0),
        records.Interval(1, busy, 0.0, 12.0),
    ]
    # One of before the rollout, two side by side, one that ends when all is over.
    waits = {0: [(-9.0, -8.0), (3.0, 4.0), (-1.0, 2.0), (9.0, 11.0)], 2: [(0.0, 5.0)]}
    cut = coordinator.told_apart(whole, waits)
    assert [(i.worker, str(i.activity), i.start_s, i.stop_s) for i in cut] == [
        (0, "compiling", 0.0, 2.0),
        (0, "busy", 2.0, 3.0),
        (0, "compiling", 3.0, 4.0),
        (0, "busy", 4.0, 9.0),
        (0, "compiling", 9.0, 10.0),
        (0, "idle", 10.0, 12.0),
        (1, "busy", 0.0, 12.0),
    ]
    # The shares of a record stay what they were.
    assert coordinator.sums(cut) == coordinator.sums(whole)


def test_asking_for_what_is_over_tells_so_again():
    _, commands = play(CFG, begin(1), done(1, 0), begin(1, 2))
    assert commands[-2:] == [records.EndRollout(1)] * 2
    _, commands = play(CFG, begin(1), (99, records.Tick()), begin(1, 100))
    assert commands[-1] == commands[-2] and isinstance(commands[-1], records.Abort)


def test_a_training_has_workers_of_one_process():
    """That with the most who wait; the others of it join later, those of others not."""
    asked = 0, records.RolloutAsked(1, (0, 1, 2, 3, 4, 5), (0, 0, 0, 1, 1, 1))
    events = asked, done(1, 0), done(2, 3), done(3, 4), done(4, 5), done(5, 1)
    _, commands = play(records.Config(min_idle=2), *events)
    assert commands[6:] == [records.Train(1, 0, (3, 4)), records.Train(1, 1, (3, 4, 5))]
    # Should it fail, another process may have its turn.
    cfg = records.Config(min_idle=2, max_restarts=1)
    _, commands = play(
        cfg,
        *events,
        (6, records.WorkerFailed(1, 4, "")),
        (7, records.TrainingStopped(1)),
    )
    assert commands[-1] == records.Train(2, 0, (0, 1))


@pytest.mark.parametrize(
    "most,trainings",
    [
        (1, [records.Train(1, 0, (0,))]),
        (3, [records.Train(1, 0, (0, 1)), records.Train(1, 1, (0, 1, 2))]),
    ],
)
def test_no_more_workers_train_together_than_may(most, trainings):
    cfg = records.Config(min_idle=2, max_members=most)
    events = [done(1 + worker, worker) for worker in range(4)]
    _, commands = play(cfg, begin(5), *events)
    assert [c for c in commands if isinstance(c, records.Train)] == trainings


def test_bad_input():
    with pytest.raises(ValueError, match=r"workers=\(1, 1\): give at least one"):
        play(CFG, (0, records.RolloutAsked(1, (1, 1))))
    with pytest.raises(ValueError, match=r"places=\(1,\) of workers=\(1, 2\)"):
        play(CFG, (0, records.RolloutAsked(1, (1, 2), (1,))))
    with pytest.raises(TypeError, match="is not an event"):
        play(CFG, (0, "stop"))
    with pytest.raises(ValueError, match="min_idle=0 is out of range"):
        records.Config(min_idle=0)
    with pytest.raises(ValueError, match="stop_timeout_s=0 is not above 0"):
        records.Config(stop_timeout_s=0)


def random_event(rng):
    generation, worker = rng.randint(1, 3), rng.randint(0, 3)
    number = rng.randint(1, 4)
    return rng.choice(
        (
            records.RolloutAsked(generation, tuple(range(rng.randint(1, 3)))),
            records.WorkerAlive(generation, worker, rng.randint(0, 2)),
            *[records.WorkerCame(generation, worker, rng.randint(0, 1))] * 2,
            *[records.WorkerDone(generation, worker, rng.randint(0, 1))] * 4,
            records.WorkerFailed(generation, worker, "died"),
            records.RequestsReturned(generation, worker),
            records.TrainingRuns(number, rng.randint(0, 2)),
            records.TrainingStopped(number),
            records.TrainingFailed(number, "nan"),
            records.Tick(),
        )
    )


def test_any_sequence_of_events_keeps_the_laws():
    """Also events that no sane sender gives: nothing is raised, the books balance."""
    for seed in range(1500):
        rng = random.Random(seed)
        state, at_s = records.State(), 0.0
        for _ in range(20):
            at_s += rng.choice((0, 1, 1, 8, 60))
            event = random_event(rng)
            again, _ = coordinator.handle(state, event, at_s, CFG)
            coordinated.check_state(again)
            repeated, commands = coordinator.handle(again, event, at_s, CFG)
            assert repeated == again, "an event counts twice"
            assert again.generation >= state.generation
            state = again
            if state.generation and not state.rolling:
                coordinated.check_accounts(coordinator, state, [])


@pytest.mark.parametrize("seeds", [range(i, i + 100) for i in (0, 100, 200)])
def test_worlds_with_faults(seeds):
    num_steps = 0
    for seed in seeds:
        world = coordinated.World(seed)
        world.run()
        num_steps += world.num_steps
    assert num_steps > 100


def test_worlds_in_which_workers_come_anew_and_late():
    """Death, return and late joining need no other events than there are."""
    taken, newcomers = 0, 0
    for seed in range(150):
        world = coordinated.World(seed)
        before = max(world.workers)
        taken += world.run_with_newcomers()
        newcomers += max(world.workers) > before
    # Some rollouts were made in several parts, some workers came late.
    assert taken > 3 * 150 and newcomers > 50


def test_waiting_workers_are_used_where_nothing_fails():
    for seed in range(50):
        world = coordinated.World(seed, faults=False)
        world.run()
        found = coordinator.sums(coordinator.timeline(world.state))
        # The rest are ticks until Train arrives, the trainer's step ends and its answer
        # comes; and those of the last worker until the training ends.
        rest = found["workers/idle_s"] - found["workers/trained_s"]
        assert rest <= 6 * len(world.state.workers)


MUTATIONS = {
    "begins while somebody trains": (
        "if state.training is None:\n            state = _begin(state, commands)",
        "if True:\n            state = _begin(state, commands)",
    ),
    "counts the word of an earlier round": (
        "if worker.activity != records.Activity.BUSY or worker.round != event.round:",
        "if worker.activity != records.Activity.BUSY:",
    ),
    "hears those who are lost": (
        "if worker.activity != records.Activity.BUSY or worker.round != event.round:",
        "if worker.round != event.round:",
    ),
    "counts the word of an earlier rollout": (
        "if not state.rolling or event.generation != state.generation or worker is",
        "if not state.rolling or worker is",
    ),
    "forgets the requests of the lost": (
        "commands.append(records.ReturnRequests(state.generation, number, "
        "worker.round))\n    return "
        "dataclasses.replace(state, unreturned=state.unreturned | {number})",
        "return state",
    ),
    "ends before requests are returned": ("if not state.unreturned:", "if True:"),
    "does not look for returned requests": (
        "unreturned=left, unclaimed=True",
        "unreturned=left, unclaimed=False",
    ),
    "wakes those who train": (
        "found = [n for n in state.which(records.Activity.IDLE) if n not in members]",
        "found = list(state.which(records.Activity.IDLE))",
    ),
    "keeps the round when it wakes": (
        "number, turn = worker.number, worker.round + 1",
        "number, turn = worker.number, worker.round",
    ),
    "trains on with a lost member": (
        "# Its devices are part of the training's mesh.\n        state = _stop(state, "
        "commands)",
        "pass",
    ),
    "ends with a training that runs": (
        "        return _stop(state, commands)\n    if not state.unreturned:",
        "        state = _stop(state, commands)\n    if not state.unreturned:",
    ),
    "never stops": (
        "if state.training is not None:\n        return _stop(state, commands)\n    if",
        "if",
    ),
    "stops as soon as somebody joins": (
        "if training.stop_asked_s is not None or not late:",
        "if late:\n            return _stop(state, commands)\n        if not late:",
    ),
    "never gives a trainer up": (
        "if state.now_s - training.stop_asked_s > cfg.stop_timeout_s:",
        "if False:",
    ),
    "trains though a trainer was given up": (
        "usable = state.trains and not state.given_up",
        "usable = state.trains",
    ),
    "takes any training's end for this one's": (
        "    if not may_publish(state, number):\n        return state\n    if state",
        "    if state.training is None:\n        return state\n    if state",
    ),
    "restarts a failed training for ever": (
        "usable = usable and state.num_restarts <= cfg.max_restarts",
        "",
    ),
    "never loses the silent": (
        "if silent_s > cfg.heartbeat_timeout_s:",
        "if False:",
    ),
    "goes on without workers": (
        "if len(state.which(records.Activity.LOST)) == len(state.workers):",
        "if False:",
    ),
    "does not repeat commands": ("commands.extend(_unanswered(state))", "pass"),
    "promotes when all are done": (
        "if state.which(records.Activity.BUSY):\n        return _promote",
        "if state.training is None or state.which(records.Activity.BUSY):\n"
        "        return _promote",
    ),
    "lets the trainer work on after a stop": (
        "return may_publish(state, training) and state.training.stop_asked_s is None",
        "return may_publish(state, training)",
    ),
    "forgets an interval": (
        "state, intervals=(*state.intervals, done)",
        "state, intervals=state.intervals",
    ),
    "does not write down what was done last": (
        "intervals = state.intervals + last",
        "intervals = state.intervals",
    ),
    "trains on several processes": (
        "late = [w for w in idle.get(training.place, ()) if w not in training.members]",
        "late = [w for w in state.which(records.Activity.IDLE) if w not in "
        "training.members]",
    ),
    "counts members before the trainer knows them": (
        "joining = [w for w, since in training.joined if since <= revision]",
        "joining = training.members",
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_machine_without_a_guard_breaks_a_law(name):
    machine = mutation.mutate(coordinator, *MUTATIONS[name])
    with pytest.raises(AssertionError):
        for seed in range(300):
            coordinated.World(seed, machine).run()
