"""Which weights make which rollout, what waits, and what survives."""

import dataclasses
import json
import threading
import types as python_types

import jax
import numpy as np
import pytest

from tlt_jax import types
from tlt_jax.rl import rolled, rollouts
from tlt_jax.rl.tasks import prompts
from tlt_jax.rl.update import experience
from tlt_jax.rl.workers import records
from tlt_jax.runtime import failures
from tlt_jax.runtime import watch as watch_lib
from tlt_jax.settings import schema


def batch_of(step, routes=False):
    """Two groups of two; of request i the tokens i, i + 1, ..."""
    lengths = (2, 1, 0, 3)
    completions = [
        types.Completion(
            (step << 32) + i,
            np.arange(i, i + n, dtype=np.int32),
            np.full(n, -1.0 - i, np.float32),
            "length" if i == 3 else "eos",
            np.arange(n) % 2 == 1,
            np.full((n + 1, 2, 1), i, np.uint8) if routes else None,
        )
        for i, n in enumerate(lengths)
    ]
    asked = [prompts.Prompt(i, None, np.arange(3)) for i in (7, 5)]
    rewards = np.array([[0.1, 1e300], [-0.0, 2.0]])
    return experience.Experience(asked, completions, rewards)


class Made:
    """A run's parts: rollouts that say what they were made with.

    `gate` lets one begin; `log` has the rollouts (step, weights, drafter's version).
    """

    def __init__(self, lag, num_steps=6, gated=False):
        self.log, self.position, self.params = [], 0, None
        self.gate, self.gated, self.fails = threading.Semaphore(0), gated, {}
        self.num_abandoned, self.settled, self.version = 0, 0, 0
        self.learned = 0.0
        state = python_types.SimpleNamespace
        self.pools = [state(stats=state(waited_s=0.0))]
        self.engines = [state(mesh=np.zeros(1))]
        self.group, self.lost = state(num=1), {1: "silent"}
        self.learner = state(abstract_state=lambda: state(params={"w": LEAF}))
        self.parts = {"collector": self}
        self.made = rollouts.Rollouts(
            lag, num_steps, self, self, self, self, self, self.parts, Silent()
        )

    # The learner's and the sync's.
    @property
    def train_state(self):
        return python_types.SimpleNamespace(
            params={"w": jax.numpy.float32(self.learned)}
        )

    def sync(self, params):
        self.version += 1
        return self.place(params), self.version

    def place(self, params):
        return [float(params["w"])]

    def behaviour(self, policy, batch, watch):
        del watch
        value = float(policy["w"])
        own = [np.full(len(c.tokens), value, "f4") for c in batch.completions]
        return batch.with_logprobs(own), value

    # The workers'.
    def set_params(self, params, version):
        self.params = params[0], version

    def abandon(self):
        self.num_abandoned += 1
        self.gate.release(10)

    def take_intervals(self):
        return [records.Interval(0, records.Activity.BUSY, 0.5, 2.0)]

    # The adaptation's.
    def begin_rollout(self):
        self.log.append("begin")

    def end_rollout(self, accept_length, watch):
        assert accept_length == 1.5
        watch.add({"drafter": 0.25})

    def settle(self):
        self.settled += 1

    def row(self):
        return {"drafter/version": 3}

    # The collector's.
    def state(self):
        return {"position": self.position}

    def prompts_of(self, ids):
        return [prompts.Prompt(i, None, np.arange(3)) for i in ids]

    def collect(self, step, watch):
        if self.gated:
            self.gate.acquire()
        self.position += 1
        if step in self.fails:
            raise self.fails[step]
        watch.within(1, 2)
        watch.add({"rollout": 4.0})
        self.log[-1] = (step, *self.params)
        batch = batch_of(step)
        useful = batch.select([1]) if step != 3 else None
        scores = python_types.SimpleNamespace(
            items=[python_types.SimpleNamespace(parts={"exact": 0.5})] * 4, names=("e",)
        )
        return python_types.SimpleNamespace(
            everything=batch,
            useful=useful,
            stats=python_types.SimpleNamespace(accept_length=1.5),
            scores=scores,
            row=lambda: {"rollout/tokens": np.int64(6), "reward/mean": np.float32(0.5)},
        )

    def run(self, first, last):
        """Takes steps, the s-th of which makes the weights s."""
        taken = []
        for step in range(first, last):
            found = self.made.take(step, watch_lib.Watch())
            taken.append(found)
            self.learned = step + 1.0
            if found.useful is None:
                self.made.keep(step + 1)
            else:
                self.made.renew(step + 1)
        return taken

    def begin(self, step=0):
        self.learned = float(step)
        self.made.renew(step)
        self.made.rest(watch_lib.Watch())


class Silent(watch_lib.Silent):
    def __init__(self):
        self.said = []

    def within(self, done, total, detail=""):
        self.said.append((done, total))


LEAF = jax.ShapeDtypeStruct(
    (), np.float32, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0])
)


@pytest.fixture
def make():
    every = []

    def build(*given, **more):
        every.append(Made(*given, **more))
        return every[-1]

    yield build
    for one in every:
        one.made.close()


@pytest.mark.parametrize(
    "lag,weights",
    [
        (0, [0, 1, 2, 3, 3, 5]),
        (1, [0, 0, 1, 2, 3, 3]),
        (2, [0, 0, 0, 1, 2, 3]),
        (9, [0, 0, 0, 0, 0, 0]),
    ],
)
def test_each_rollout_is_made_with_weights_of_one_age(make, lag, weights):
    """Step 4 (the one behind 3 others) has no group with signal: weights stay."""
    one = make(lag)
    one.begin()
    taken = one.run(0, 6)
    one.made.rest(watch_lib.Watch())
    # None is begun for steps that never come.
    assert [entry[0] for entry in one.log] == [0, 1, 2, 3, 4, 5]
    assert [entry[1] for entry in one.log] == weights
    # Versions count transfers from 1.
    version = {0: 1, 1: 2, 2: 3, 3: 4, 5: 5}
    assert [entry[2] for entry in one.log] == [version[w] for w in weights]
    rows = [found.row for found in taken]
    if lag:
        assert [row["rollout/lag"] for row in rows] == [
            min(step, lag) for step in range(6)
        ]
        its = [row.get("mismatch/logprob_max_abs") for row in rows]
        assert its == [*weights[:3], None, *weights[4:]]
    else:
        assert "rollout/lag" not in rows[0]
    assert all(row["drafter/version"] == 3 for row in rows)
    for step, found in enumerate(taken):
        ids = [c.request_id - (step << 32) for c in found.everything.completions]
        assert ids == [0, 1, 2, 3]
        if found.useful is not None:
            # The trainer's own, by the weights that rolled out; without lag none.
            (of_two, of_three) = [c.logprobs for c in found.useful.completions]
            assert of_two.size == 0
            assert of_three.tolist() == [weights[step] if lag else -4.0] * 3
        seconds = {"drafter": 0.25, "rollout": 4.0} if lag else {}
        assert dict(found.seconds) == seconds and found.lost == {1: "silent"}


def test_what_goes_on_beside_a_step_is_its_watchs_once_it_is_taken(make):
    one = make(1)
    one.begin()
    watch = watch_lib.Watch()
    one.made.take(0, watch)
    spent = watch.row()
    assert spent["time/rollout_s"] == 4.0 and spent["time/drafter_s"] == 0.25
    assert "time/wait_s" in spent
    plain = make(0)
    plain.begin()
    watch = watch_lib.Watch()
    plain.made.take(0, watch)
    assert watch.row()["time/rollout_s"] == 4.0 and "wait" not in watch.spent


def test_a_rollout_goes_on_while_the_learner_works(make):
    one = make(1, gated=True)
    one.begin()
    one.gate.release(1)
    one.made.take(0, watch_lib.Watch())
    # That of the next step is under way, by the weights that there are.
    one.gate.release(1)
    one.made.rest(watch_lib.Watch())
    assert one.log == [(0, 0.0, 1), (1, 0.0, 1)]
    # An evaluation has the newest ones; the next rollout its own.
    one.learned = 1.0
    one.made.renew(1)
    one.made.rest(watch_lib.Watch())
    assert one.params == (1.0, 2)
    one.gate.release(1)
    one.made.take(1, watch_lib.Watch())
    one.made.rest(watch_lib.Watch())
    assert one.log[2] == (2, 1.0, 2)


def again(one, make, step, num_steps=6):
    """What goes on from a checkpoint of a step."""
    told, arrays = one.made.state(step)
    before = {"position": one.position} | one.made.before().get("collector", {})
    other = make(one.made.lag, num_steps)
    other.position, other.version = before["position"], one.version - 1
    other.made.restore(json.loads(json.dumps(told)), arrays)
    other.begin(step)
    return other, told, arrays


@pytest.mark.parametrize("lag", [1, 2])
def test_a_resumed_run_learns_from_the_same_rollouts(make, lag):
    one = make(lag)
    one.begin()
    one.run(0, 3)
    other, told, arrays = again(one, make, 3)
    # There is all that waits, and no weights.
    assert [entry["step"] for entry in told["entries"]] == [3, 4][:lag]
    assert not [name for name in arrays if name.startswith("weights")]
    taken, wanted = other.run(3, 6), one.run(3, 6)
    assert other.log == one.log[-len(other.log) :] and len(other.log) == 3 - lag
    assert other.position == one.position == 6
    for mine, theirs in zip(taken, wanted, strict=True):
        assert mine.row == theirs.row
        assert mine.intervals == theirs.intervals and mine.lost == theirs.lost
        assert (mine.useful is None) == (theirs.useful is None)
        for a, b in zip(
            (mine.useful or mine.everything).completions,
            (theirs.useful or theirs.everything).completions,
            strict=True,
        ):
            np.testing.assert_array_equal(a.tokens, b.tokens)
            np.testing.assert_array_equal(a.logprobs, b.logprobs)


def test_a_rollout_that_was_given_up_is_made_anew_with_the_weights_it_had(make):
    one = make(2)
    one.begin()
    one.fails[4] = failures.Abandoned()
    one.run(0, 3)
    # Those of steps 4 and 5 are there and not there, in this order.
    other, told, arrays = again(one, make, 3)
    assert [sorted(entry) for entry in told["entries"]] == [
        ["rolled", "step", "told"],
        ["step", "weights"],
    ]
    assert told["entries"][1] == {"step": 4, "weights": [2, 3]}
    assert arrays["weights_2.0"] == 2.0
    assert other.position == 4, "prompts are those from before it"
    other.run(3, 6)
    assert other.log == [(4, 2.0, 3), (5, 3.0, 4)]
    with pytest.raises(failures.Abandoned):
        one.run(3, 5)
    # Of those behind it none was begun, which would have changed the parts.
    one.made.rest(watch_lib.Watch())
    assert one.log[-1] == "begin" and len(one.log) == 5 and one.position == 5
    # What the step has begun beyond it is no part of a checkpoint.
    assert [entry["step"] for entry in one.made.state(4)[0]["entries"]] == [4, 5]


def test_a_finished_run_keeps_the_weights_of_rollouts_to_come(make):
    one = make(2, num_steps=2)
    one.begin()
    one.run(0, 2)
    assert [entry[0] for entry in one.log] == [0, 1]
    other, told, arrays = again(one, make, 2, num_steps=4)
    assert told == {
        "entries": [{"step": 2, "weights": [0, 1]}, {"step": 3, "weights": [1, 2]}]
    }
    assert {name: float(x) for name, x in arrays.items()} == {
        "weights_0.0": 0.0,
        "weights_1.0": 1.0,
    }
    other.run(2, 4)
    assert other.log == [(2, 0.0, 1), (3, 1.0, 2)]


def test_without_lag_nothing_waits(make):
    one = make(0)
    one.begin()
    one.run(0, 2)
    assert one.made.state(2) == ({}, {})
    one.fails[2] = failures.Abandoned()
    with pytest.raises(failures.Abandoned):
        one.run(2, 3)
    assert one.position == 3
    assert one.made.before() == {"collector": {"position": 2}}
    assert one.made.state(2) == ({}, {})


def test_what_ends_a_rollout_ends_its_step(make):
    one = make(1)
    one.begin()
    one.fails[1] = failures.TrainingError("no worker is left")
    one.run(0, 1)
    with pytest.raises(failures.TrainingError, match="no worker is left"):
        one.run(1, 2)


def test_closing_gives_up_what_is_under_way(make):
    one = make(1, gated=True)
    one.begin()
    one.gate.release(1)
    one.made.take(0, watch_lib.Watch())
    one.made.close()
    assert one.num_abandoned == 1
    idle = make(1)
    idle.begin()
    idle.made.close()
    assert idle.num_abandoned == 0


def test_a_rollout_is_shown_to_who_waits_for_it():
    seen = Silent()
    beside = rollouts._Beside(seen)
    beside.within(1, 4)
    with beside.awaited():
        beside.within(2, 4)
    beside.within(3, 4)
    assert seen.said == [(2, 4)]


@pytest.mark.parametrize(
    "given,told",
    [
        ((1, 2), "rollout.lag=1 in 2 processes: a run of several has rollout.lag=0; "),
        ((2, 1, 4), "rollout.lag=2 with engines of 4 devices each: set rollout.tensor"),
    ],
)
def test_where_no_rollout_can_go_on_beside_an_update_lag_is_refused(given, told):
    with pytest.raises(schema.ConfigError) as raised:
        rollouts.check(*given)
    assert str(raised.value).startswith(told) and "\n" not in str(raised.value)
    rollouts.check(0, *given[1:])


@pytest.mark.parametrize("routes", [False, True])
def test_a_rollout_in_a_checkpoint_is_the_one_that_was_made(routes):
    batch = batch_of(3, routes)
    useful = batch.select([1]).with_logprobs([np.full(n, -7.5, "f4") for n in (0, 3)])
    row = {
        "reward/mean": np.float32(0.1),
        "specdec/num_accepted": [np.int64(3), 2],
        "specdec/chance_sum": np.array([0.5, float("inf")]),
        "specdec/strategy": "none",
        "reward/mine": None,
    }
    made = rolled.Rolled(
        row,
        batch,
        useful,
        [{"exact": 0.1}] * 4,
        [records.Interval(1, records.Activity.TRAINING, 0.1, 0.3)],
        {2: "dead"},
        {"rollout": 0.1},
    )
    told, arrays = made.state()
    told = json.loads(json.dumps(told))
    found = rolled.restored(
        told, arrays, lambda ids: [prompts.Prompt(i, None, np.arange(3)) for i in ids]
    )
    assert found.row == {
        "reward/mean": float(np.float32(0.1)),
        "specdec/num_accepted": [3, 2],
        "specdec/chance_sum": [0.5, float("inf")],
        "specdec/strategy": "none",
        "reward/mine": None,
    }
    assert [p.prompt_id for p in found.everything.prompts] == [7, 5]
    assert [p.prompt_id for p in found.useful.prompts] == [5]
    assert found.everything.rewards.tobytes() == batch.rewards.tobytes()
    expected = [*batch.completions[:2], *useful.completions]
    for mine, theirs in zip(found.everything.completions, expected, strict=True):
        for field in dataclasses.fields(types.Completion):
            got, wanted = getattr(mine, field.name), getattr(theirs, field.name)
            assert np.array_equal(got, wanted), field.name
            assert getattr(got, "dtype", None) == getattr(wanted, "dtype", None)
    assert found.parts == [{"exact": 0.1}] * 4
    assert found.intervals == made.intervals and found.lost == {2: "dead"}
    assert found.seconds == {"rollout": 0.1}
