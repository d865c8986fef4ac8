"""Workers that come in the midst of a rollout, anew or late; see `test_coordinator`."""

import pytest

from tests import mutation
from tests.rl import coordinated
from tests.rl.workers import test_coordinator
from tlt_jax.rl.workers import coordinator, records


def come_and_go(machine=coordinator, seeds=range(150)):
    """Rollouts into which others come, anew or late; how many, and what was lost."""
    joined = lost = 0
    for seed in seeds:
        world = coordinated.World(seed, machine)
        world.comes = 0.2
        world.run()
        joined += world.num_joined
        found = [i.activity for i in coordinator.timeline(world.state)]
        lost += found.count(records.Activity.LOST)
    return joined, lost


def test_worlds_in_which_workers_come_in_the_midst_of_a_rollout():
    joined, lost = come_and_go()
    assert joined > 100 and lost > 20


def test_a_worker_that_comes_anew_generates_from_then_on():
    events = (
        test_coordinator.begin(2),
        (5, records.WorkerFailed(1, 1, "killed", 0)),
        # Its requests are not known to be in the queue: they would be taken from it.
        (6, records.WorkerCame(1, 1, 1)),
        (7, records.RequestsReturned(1, 1)),
        (8, records.WorkerCame(1, 1, 1)),
        # A late word of who was there before says nothing of who is there now.
        (9, records.WorkerFailed(1, 1, "its connection has ended", 0)),
        (10, records.WorkerCame(1, 7, 0)),
        *(
            test_coordinator.done(20, 0),
            test_coordinator.done(20, 1, round_=1),
            test_coordinator.done(20, 7),
        ),
    )
    cfg = records.Config(min_idle=3)
    state, commands = test_coordinator.play(cfg, *events)
    assert commands[2:] == [
        records.ReturnRequests(1, 1),
        records.Generate(1, 1, 1),
        records.Generate(1, 7, 0),
        records.EndRollout(1),
    ]
    spans = {
        (i.worker, str(i.activity), i.start_s, i.stop_s)
        for i in coordinator.timeline(state)
    }
    assert spans == {
        *((0, "busy", 0, 20), (1, "busy", 0, 5), (1, "lost", 5, 8)),
        *((1, "busy", 8, 20), (7, "busy", 10, 20)),
    }
    # Once it is over nobody joins.
    _, commands = test_coordinator.play(cfg, *events, (21, records.WorkerCame(1, 9, 0)))
    assert commands[-1] == records.EndRollout(1)


def test_whoever_waits_trains_nothing_where_the_rollout_says_so():
    asked = 0, records.RolloutAsked(1, (0, 1), (), False)
    _, commands = test_coordinator.play(
        test_coordinator.CFG,
        asked,
        test_coordinator.done(1, 0),
        test_coordinator.done(2, 1),
    )
    assert commands[2:] == [records.EndRollout(1)]


OF_LATE_ONES = {
    "lets in whose requests are not returned": (
        "if number in state.unreturned or turn !=",
        "if turn !=",
    ),
    "lets in who may be training": (
        "if state.training is not None and number in state.training.members:\n"
        "        # A step",
        "if False:\n        # A step",
    ),
    "lets in who is there": (
        "if known is not None and known.activity != records.Activity.LOST:",
        "if False:",
    ),
    "loses who came anew": (
        "turn is None or (known is not None and turn >= known.round)",
        "True",
    ),
    "does not write down how long it was lost": (
        "state, intervals=(*state.intervals, was_lost)",
        "state",
    ),
    "takes an earlier return for this one": (
        "if is_known and turn == state.worker(worker).round:",
        "if is_known:",
    ),
}


@pytest.mark.parametrize("name", OF_LATE_ONES)
def test_a_machine_that_lets_anybody_in_breaks_a_law(name):
    machine = mutation.mutate(coordinator, *OF_LATE_ONES[name])
    with pytest.raises(AssertionError):
        come_and_go(machine, range(600))
        raise LookupError("no law is broken")
