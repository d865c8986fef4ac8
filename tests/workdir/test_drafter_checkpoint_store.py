"""Who writes and who reads a run's drafter, with processes that are threads."""

import concurrent.futures
import types

import jax.numpy as jnp
import numpy as np
import pytest

from tests.runtime import linked_groups
from tlt_jax.rl.adaptation import adaptation
from tlt_jax.runtime import distributed, train_state
from tlt_jax.settings import sections
from tlt_jax.workdir import drafter_checkpoint

ARRAYS = {
    "buffer.tokens": np.arange(5),
    "sampler.random": np.arange(3),
    "draft_ids": np.array([0.5, 2.0]),
}
META = {"version": 7, "is_ready": True}


class Adapted:
    """What is saved and restored of a drafter's training."""

    trains = True

    def __init__(self):
        self.cfg, self.restored = "cfg", None

    def abstract_state(self):
        return "abstract"

    def state(self):
        return train_state.Snapshot("state", ARRAYS, META)

    for_others = adaptation.Adaptation.for_others

    def target(self):
        return "target"

    def restore(self, snapshot):
        self.restored = snapshot


class Checkpointer:
    """In place of the real one: keeps what it is given, and finds what a test says."""

    found = None
    made = []

    def __init__(self, *arguments):
        self.opened, self.saved, self.asked = arguments, [], []
        self.waits = self.closed = 0
        Checkpointer.made.append(self)

    def save(self, *arguments):
        self.saved.append(arguments)

    def restore(self, abstract, at_most):
        self.asked.append((abstract, at_most))
        return Checkpointer.found

    def wait(self):
        self.waits += 1

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.closed += 1


@pytest.fixture(autouse=True)
def checkpointers(monkeypatch):
    monkeypatch.setattr(drafter_checkpoint, "DrafterCheckpointer", Checkpointer)
    monkeypatch.setattr(Checkpointer, "made", [])
    monkeypatch.setattr(Checkpointer, "found", None)
    return Checkpointer.made


def open_store(group=None, notes=None, on_damage="refuse"):
    told = types.SimpleNamespace(note=(notes if notes is not None else []).append)
    group = group or distributed.alone()
    cfg = sections.Checkpoint(keep=3, drafter="async", on_damage=on_damage)
    return drafter_checkpoint.DrafterStore(Adapted(), "there", cfg, group, told)


def found_of(step):
    state = {"w": jnp.arange(3.0)}
    return step, train_state.Snapshot(state, dict(ARRAYS), META)


def test_everything_of_an_adaptation_is_saved(checkpointers):
    with open_store() as store:
        store.save(9)
        (checkpointer,) = checkpointers
        assert checkpointer.opened == ("there", "async", 4, None)
        assert checkpointer.saved == [
            (9, train_state.Snapshot("state", ARRAYS, META), "cfg", "target")
        ]
        store.wait()
        assert (checkpointer.waits, checkpointer.closed) == (1, 0)
    assert checkpointer.closed == 1


def test_a_damaged_one_is_passed_over_where_that_is_asked_for(checkpointers):
    notes = ["before"]
    with open_store(notes=notes, on_damage="previous"):
        checkpointers[0].opened[-1]("a line")
    assert notes == ["before", "a line"]


def test_it_is_opened_where_there_is_a_drafter(checkpointers):
    cfg = sections.Checkpoint(keep=6, drafter="blocking")
    group = distributed.alone()
    nothing = adaptation.NoAdaptation()
    with drafter_checkpoint.opened(nothing, "there", cfg, group, None) as stores:
        assert stores == () and not checkpointers
    with drafter_checkpoint.opened(Adapted(), "there", cfg, group, None) as (store,):
        # One more than the run keeps: each of its own finds the drafter's.
        assert checkpointers[0].opened == ("there", "blocking", 7, None)
        store.save(3)
    assert checkpointers[0].saved and checkpointers[0].closed == 1


@pytest.mark.parametrize(
    "found,notes",
    [
        (9, []),
        (6, ["there is no checkpoint of the drafter of step 9: an older one goes on."]),
        (None, ["there is no checkpoint of the drafter of step 9: it begins anew."]),
    ],
)
def test_alone_a_process_goes_on_with_all_it_kept(checkpointers, found, notes):
    Checkpointer.found = None if found is None else found_of(found)
    told = []
    store = open_store(notes=told)
    store.restore(9)
    assert checkpointers[0].asked == [("abstract", 9)]
    assert told == notes
    restored = store._trained.restored
    if found is None:
        assert restored is None
        return
    assert restored is Checkpointer.found[1]
    assert restored.arrays == ARRAYS and restored.meta == META


@pytest.mark.parametrize("found", [9, None])
def test_the_others_get_the_drafter_without_its_texts(checkpointers, found):
    Checkpointer.found = None if found is None else found_of(found)
    told = [[], []]
    with linked_groups.of(2) as groups:
        stores = [open_store(*pair) for pair in zip(groups, told, strict=True)]
        with concurrent.futures.ThreadPoolExecutor() as pool:
            list(pool.map(lambda store: store.restore(9), stores))
    # The first alone opens the directory, writes, and speaks.
    assert len(checkpointers) == 1
    stores[1].save(10)
    stores[1].wait()
    with stores[1]:
        pass
    assert checkpointers[0].saved == [] and checkpointers[0].closed == 0
    assert told[1] == []
    first, other = (store._trained.restored for store in stores)
    if found is None:
        assert first is other is None
        return
    assert first is Checkpointer.found[1] and first.arrays == ARRAYS
    state, arrays, meta = other.state, other.arrays, other.meta
    assert type(state["w"]) is np.ndarray and state["w"].tolist() == [0, 1, 2]
    assert arrays.keys() == {"draft_ids"} and arrays["draft_ids"].tolist() == [0.5, 2.0]
    assert meta == META
