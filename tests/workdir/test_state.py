"""All that changes in a run is saved and restored together; nothing is forgotten."""

import json
import types

import jax
import numpy as np
import pytest

from tests import tiny_runs
from tlt_jax import train
from tlt_jax.settings import sections
from tlt_jax.workdir import checkpoint, progress, state

TLT = {
    "specdec.mode": "tlt",
    "specdec.tuner": "beg_mab",
    "specdec.epsilon": 0.5,
    # Each is compiled for each size of batch.
    "rollout.max_batch": 1,
    "specdec.strategies": ("1:D2K1V3,D3K1V4",),
    "specdec.ngram_strategies": ("1:D2K1V3-ngram,D3K1V4-ngram",),
    "drafter.features": "last",
    "adaptation.row_tokens": 64,
    "adaptation.row_bases": 32,
    "adaptation.max_frac": 1e3,
    "adaptation.max_steps": 2,
    "checkpoint.every": 0,
}


def opened(directory, **more):
    """A run that has begun nothing yet."""
    run = tiny_runs.config_of(**TLT | {"num_steps": 3} | more)
    directory.mkdir(exist_ok=True)
    return train.Trainer(run, directory, progress.Progress(3, mode="off"))


def everything(trainer):
    """What every part says that it is, as a checkpoint would have it."""
    parts = trainer.parts
    snapshot = parts.adaptation.state()
    told = {
        "updater": parts.updater.state(),
        "collector": parts.collector.state(),
        "sync": parts.sync.state(),
        "drafter": snapshot.meta,
    }
    told |= {name: made.state() for name, made in parts.speculation.tuners.items()}
    trees = (parts.updater.train_state, snapshot.state, snapshot.arrays)
    return json.loads(json.dumps(told)), jax.device_get(trees)


def test_a_resumed_run_has_the_state_of_every_part(tmp_path):
    with opened(tmp_path) as trainer:
        trainer.begin()
        for _ in range(2):
            trainer.take_step()
        parts = trainer.parts
        # What two short steps leave at its default is set to something else.
        parts.updater.skips.in_a_row = 2
        parts.adaptation.learner.sharpness = 1.75
        parts.adaptation.learner.tau = 1.25
        parts.adaptation.version = 5
        trainer.state.save()
        trainer.state.wait()
        told, trees = everything(trainer)
    # Nothing that is compared is what a new run has.
    with opened(tmp_path / "new") as trainer:
        new, _ = everything(trainer)
    assert {name for name in told if told[name] == new[name]} == set()
    with opened(tmp_path) as trainer:
        assert trainer.state.step == 2
        # The first transfer gives the engines this version anew.
        trainer.parts.sync.sync(trainer.parts.updater.train_state.params)
        again, same = everything(trainer)
    for name in told:
        assert again[name] == told[name], name
    jax.tree.map(np.testing.assert_array_equal, same, trees)
    assert len(trees[2]) > 3, "texts, their order and the sampler's random state"


class Part:
    """Remembers what it was given."""

    def __init__(self, value):
        self.value = value

    def state(self):
        return {"value": self.value}

    def restore(self, told):
        self.value = told["value"]


class Store:
    """Says when it was asked."""

    def __init__(self, said):
        self.said = said

    def save(self, step):
        self.said.append(("save", step))

    def restore(self, step):
        self.said.append(("restore", step))

    def wait(self):
        self.said.append(("wait",))


class Rollouts:
    """What waits, what was before a rollout that was given up, what was restored."""

    def __init__(self, said, waiting=None, before=None):
        self.said, self.waiting, self.given = said, waiting or ({}, {}), before or {}
        self.restored = None

    def before(self):
        return self.given

    def state(self, step):
        self.said.append(("waiting", step))
        return self.waiting

    def restore(self, told, arrays):
        self.restored = told, arrays


class Checkpointer:
    """In place of Orbax: one checkpoint, in memory."""

    kept = None

    def __init__(self, *arguments, pass_over):
        self.opened = arguments, pass_over

    def __exit__(self, *_):
        pass

    def __enter__(self):
        return self

    def restore_latest(self, params, opt_state, item):
        assert item == "rollouts"
        return Checkpointer.kept

    def save(self, step, params, opt_state, model, meta, more):
        arrays = more.get("rollouts", {})
        Checkpointer.kept = checkpoint.Restored(step, params, opt_state, meta, arrays)

    def latest_step(self):
        return Checkpointer.kept and Checkpointer.kept.step

    def wait(self):
        pass


def run_state(parts, said, notes=None, rollouts=None, **checkpoints):
    tree = types.SimpleNamespace(params="p", opt_state="o", num_updates=7)
    updater = Part(3)
    updater.train_state = tree
    updater.learner = types.SimpleNamespace(abstract_state=lambda: tree)
    cfg = sections.Checkpoint(keep=4, **checkpoints)
    waits = rollouts or Rollouts(said)
    given = "model", updater, parts, (Store(said),), waits, {"settings": {"seed": 5}}
    made = state.RunState("d", cfg, *given, (notes or []).append)
    return made, updater


@pytest.fixture(autouse=True)
def in_memory(request, monkeypatch):
    if "resumed" not in request.node.name:
        monkeypatch.setattr(checkpoint, "Checkpointer", Checkpointer)
        monkeypatch.setattr(Checkpointer, "kept", None)


def test_parts_get_back_what_they_said_each_its_own():
    said = []
    made, _ = run_state({"a": Part(1), "b": Part(2)}, said)
    assert made._checkpointer.opened == (("d", 4), None)
    # Nothing is there: what a killed start has left in the stores is not, either.
    assert not made.restore() and made.step == 0 and said == [("restore", 0)]
    said.clear()
    made.step = 6
    made.save()
    assert Checkpointer.kept.meta == {
        "settings": {"seed": 5},
        "parts": {"a": {"value": 1}, "b": {"value": 2}, "updater": {"value": 3}},
    }
    assert made.latest_step() == 6
    a, b = Part(0), Part(0)
    other, updater = run_state({"a": a, "b": b}, said)
    updater.value, updater.train_state = 0, None
    assert other.restore() and other.step == 6
    assert (a.value, b.value, updater.value) == (1, 2, 3)
    trained = updater.train_state
    assert (trained.params, trained.opt_state, trained.num_updates) == ("p", "o", 7)
    other.wait()
    assert said == [("waiting", 6), ("save", 6), ("restore", 6), ("wait",)]


def test_rollouts_that_wait_are_kept_with_their_arrays():
    said, tokens = [], np.arange(3, dtype=np.int32)
    arrays = {"7.tokens": tokens, "7.routes": np.zeros((0, 2), np.uint8)}
    rollouts = Rollouts(said, ({"entries": [{"step": 7}]}, arrays))
    made, _ = run_state({}, said, rollouts=rollouts)
    made.step = 7
    made.save()
    kept = Checkpointer.kept
    assert kept.meta["rollouts"] == {"entries": [{"step": 7}]}
    assert kept.meta["arrays"] == {
        "7.tokens": [[3], "int32"],
        "7.routes": [[0, 2], "uint8"],
    }
    # Orbax takes no empty ones.
    assert list(kept.arrays) == ["7.tokens"]
    again = Rollouts(said)
    other, _ = run_state({}, said, rollouts=again)
    assert other.restore()
    assert again.restored == ({"entries": [{"step": 7}]}, {"7.tokens": tokens})
    # What trains beside the rollout is saved after it has ended.
    assert said[:2] == [("waiting", 7), ("save", 7)]


def test_a_run_is_completed_once_with_what_its_parts_said_at_the_steps_end():
    said = []
    rollouts = Rollouts(said)
    made, _ = run_state({"a": Part(1), "b": Part(2)}, said, rollouts=rollouts)
    made.complete()
    # No step was taken.
    assert Checkpointer.kept is None and said == [("wait",)]
    made.step = 2
    for told in (5, 6):
        # Before a rollout that was given up.
        rollouts.given = {"a": {"value": told}}
        made.complete()
    parts = {"a": {"value": 5}, "b": {"value": 2}, "updater": {"value": 3}}
    assert Checkpointer.kept.meta["parts"] == parts
    assert said == [("wait",), ("waiting", 2), ("save", 2), ("wait",), ("wait",)]


def test_a_damaged_checkpoint_is_passed_over_where_that_is_asked_for():
    notes = ["before"]
    made, _ = run_state({}, [], notes, on_damage="previous")
    _, pass_over = made._checkpointer.opened
    pass_over("a line")
    assert notes == ["before", "a line"]


@pytest.mark.parametrize("meta", [{"position": 5}, {"parts": {"a": {}}}])
def test_a_checkpoint_of_another_version_is_refused_in_one_line(meta):
    part = Part(1)
    made, updater = run_state({"a": part}, [])
    Checkpointer.kept = checkpoint.Restored(8, "p", ("o", 7), meta)
    with pytest.raises(checkpoint.CheckpointError) as error:
        made.restore()
    assert "step 8 was written by another version" in str(error.value)
    assert "\n" not in str(error.value)
    # Nothing was taken of it.
    assert part.value == 1 and updater.value == 3 and made.step == 0
