"""Records of the coordinator: what they say, their order, and that they travel."""

import math
import pickle

import pytest

from tlt_jax.rl.workers import records

# The coordinator takes some of them apart by position.
FIELDS = {
    records.RolloutAsked: "generation workers places trains",
    records.WorkerCame: "generation worker round place",
    records.WorkerAlive: "generation worker round",
    records.WorkerDone: "generation worker round",
    records.WorkerFailed: "generation worker reason round",
    records.RequestsReturned: "generation worker round",
    records.TrainingRuns: "training revision",
    records.TrainingStopped: "training",
    records.TrainingFailed: "training reason",
    records.Tick: "",
    records.Generate: "generation worker round",
    records.ReturnRequests: "generation worker round",
    records.EndRollout: "generation",
    records.Abort: "generation reason",
    records.Train: "training revision workers",
    records.Stop: "training",
}


@pytest.mark.parametrize("kind", FIELDS, ids=lambda kind: kind.__name__)
def test_events_and_commands_reach_other_processes(kind):
    names = FIELDS[kind].split()
    assert list(kind.__match_args__) == names
    values = [f"value {i}" for i in range(len(names))]
    made = kind(*values)
    there = pickle.loads(pickle.dumps(made))
    assert there == made and type(there) is kind and hash(there) == hash(made)
    assert [getattr(there, name) for name in names] == values


def test_a_training_knows_its_members():
    made = records.Training(4, 1, 2, joined=((7, 0), (3, 2), (5, 2)))
    assert made.members == (7, 3, 5)
    # It has not answered, and nobody wants it to stop.
    assert made.running == -1 and made.stop_asked_s is None


def test_workers_by_number_and_by_what_they_do():
    busy, idle, lost = (
        records.Activity.BUSY,
        records.Activity.IDLE,
        records.Activity.LOST,
    )
    doing = ((8, idle), (2, busy), (5, idle), (4, lost))
    workers = tuple(
        records.Worker(number, number % 2, activity, since_s=10.0 + number)
        for number, activity in doing
    )
    state = records.State(workers=workers)
    assert state.which(idle) == (8, 5) and state.which(lost) == (4,)
    assert state.which(records.Activity.TRAINING) == ()
    assert state.worker(5) is workers[2] and state.worker(0) is None
    assert pickle.loads(pickle.dumps(state)) == state
    # As the record and the timeline write them.
    assert [str(activity) for activity in records.Activity] == (
        "busy compiling idle training lost".split()
    )


def test_time_outs():
    cfg = records.Config()
    assert (cfg.min_idle, cfg.heartbeat_timeout_s, cfg.stop_timeout_s) == (1, 900, 60)
    # A channel between threads or processes loses nothing, so nothing is repeated.
    assert cfg.resend_s == math.inf and cfg.max_restarts == 0
    for name in ("heartbeat_timeout_s", "resend_s"):
        for value in (0.0, -1.0, math.nan):
            with pytest.raises(ValueError, match=f"^{name}={value} is not above 0"):
                records.Config(**{name: value})
