"""A rollout's end waits for no piece of a drafter step, and none is begun after it."""

import types

import numpy as np
import pytest

from tlt_jax.rl.adaptation import spot_trainer
from tlt_jax.rl.workers import mailboxes, records

PIECES = 4


class Piece:
    """Work that is done once it was looked at so often; -1: never."""

    def __init__(self, num_looks):
        self.num_looks = num_looks

    def is_ready(self):
        self.num_looks -= 1
        return self.num_looks == -1


class Learner:
    """Counts pieces, calls `looked` after each, and writes down what happens."""

    def __init__(self, events):
        self.events, self.num_done, self.num_updates = events, 0, 0
        self.looked = lambda: None
        self.failing = None
        self.endless = None

    def piece(self):
        self.num_done += 1
        self.looked()
        return Piece(-1 if self.num_done == self.endless else 2)

    def devices_of(self, meshes):
        return tuple(meshes)

    def prepare(self, devices, target): ...

    def begin(self, devices, target): ...

    def is_ready(self, devices, target, patience_s):
        return True

    def step(self, batch):
        for _ in range(PIECES):
            yield self.piece()
        if self.failing == "step":
            raise FloatingPointError("no number")
        self.num_updates += 1
        return dict.fromkeys(("loss", "skipped"), np.float32(0))

    def measure(self, batch):
        for _ in range(PIECES):
            yield self.piece()
        return {"coupled/accept_length": 2.0, "sharpness": 1.0, "tau": 0.5}

    def end(self, keep=True):
        self.events.append(("end", keep))
        if self.failing == "end" and keep:
            raise OSError("no memory")


class Sampler:
    """Batches that are numbers; `state` is the next one."""

    def __init__(self):
        self.next = 0

    def next_batch(self, wait_s=0.0):
        self.next += 1
        return self.next - 1

    def state(self):
        return self.next

    def restore(self, state):
        self.next = state


class Setting:
    """A rollout of two workers, of which the first is through and trains."""

    def __init__(self, measures=False):
        self.events = []
        self.learner, self.sampler = Learner(self.events), Sampler()
        self.coordination = mailboxes.Coordination(records.Config())
        engine = types.SimpleNamespace(mesh="mesh", params="target")
        workers = types.SimpleNamespace(
            first=0, engines=[engine, engine], coordination=self.coordination
        )
        self.trainer = spot_trainer.SpotTrainer(
            self.learner,
            self.sampler,
            workers,
            prepare=lambda: True,
            publish=self.publish,
            publish_steps=0,
            measures=measures,
        )
        send = self.coordination.send

        def noted(event):
            self.events.append(event)
            send(event)

        self.coordination.send = noted
        self.generation = self.coordination.begin([0, 1])
        self.coordination.send(records.WorkerDone(self.generation, 0, 0))

    def publish(self):
        self.events.append("publish")
        if self.learner.failing == "publish":
            raise OSError("no device")

    def stop_at(self, num_pieces):
        """Let the last worker end while this piece is being computed."""

        def looked():
            if self.learner.num_done == num_pieces:
                self.coordination.send(records.WorkerDone(self.generation, 1, 0))

        self.learner.looked = looked

    def follow(self):
        """Run the trainer's thread until it has nothing to do any more."""
        self.trainer.start()
        commands = [self.coordination.next_command(5.0)]
        while commands[-1] is not None and not isinstance(
            commands[-1], records.EndRollout
        ):
            commands.append(self.coordination.next_command(5.0))
        assert commands[-1] == records.EndRollout(self.generation)
        num_done = self.learner.num_done
        self.trainer.settle()
        self.coordination.close()
        self.trainer.close()
        return num_done


@pytest.mark.parametrize("num_pieces", [1, 3, PIECES + 2, 2 * PIECES])
def test_no_piece_is_begun_after_the_last_worker_is_through(num_pieces):
    setting = Setting()
    setting.stop_at(num_pieces)
    assert setting.follow() == num_pieces
    # The whole steps count; the texts of the others have their turn again.
    whole = (num_pieces - 1) // PIECES
    assert setting.learner.num_updates == setting.sampler.next == whole
    assert setting.trainer.take_report().num_steps == whole
    # Taken over and published behind the rollout's end, if there is anything.
    stopped = setting.events.index(records.TrainingStopped(1))
    after = setting.events[stopped + 1 :]
    assert after == [("end", True)] + ["publish"] * (whole > 0)


def test_nobody_waits_for_the_piece_that_is_under_way():
    setting = Setting()
    setting.learner.endless = PIECES + 3
    setting.stop_at(PIECES + 3)
    assert setting.follow() == PIECES + 3
    # The step before it was ended, and is kept.
    assert setting.learner.num_updates == setting.sampler.next == 1
    assert setting.events[-2:] == [("end", True), "publish"]


def test_a_measurement_is_given_up_as_well():
    setting = Setting(measures=True)
    setting.stop_at(2)
    assert setting.follow() == 2
    assert setting.trainer.take_report().measured is None
    assert setting.sampler.next == 0
    setting = Setting(measures=True)
    setting.stop_at(2 * PIECES + 1)
    assert setting.follow() == 2 * PIECES + 1
    assert setting.trainer.take_report().measured["coupled/accept_length"] == 2
    assert setting.learner.num_updates == 1 and setting.sampler.next == 2


@pytest.mark.parametrize("failing", ["end", "publish"])
def test_what_fails_behind_the_end_is_undone_and_noted(failing):
    setting = Setting()
    setting.learner.failing = failing
    setting.stop_at(PIECES + 1)
    setting.follow()
    assert setting.events[-1] == ("end", False)
    (failure,) = setting.trainer.take_report().failures
    assert failure.startswith("OSError: no ")


@pytest.mark.parametrize("beside_a_rollout", [True, False])
def test_a_step_that_fails_leaves_nothing(beside_a_rollout):
    """Weights that a step spoilt are dropped, and no engine gets them."""
    setting = Setting()
    setting.learner.failing = "step"
    end = setting.learner.end

    def ended(keep=True):
        """The rollout ends once the drafter is what it was."""
        end(keep)
        if beside_a_rollout:
            setting.coordination.send(records.WorkerDone(setting.generation, 1, 0))

    setting.learner.end = ended
    if beside_a_rollout:
        setting.follow()
        failed = records.TrainingFailed(1, "FloatingPointError: no number")
        assert failed in setting.events
    else:
        setting.trainer.train_for(0.0)
    assert ("end", False) in setting.events
    assert ("end", True) not in setting.events and "publish" not in setting.events
    report = setting.trainer.take_report()
    assert (report.num_steps, report.outcome) == (0, None)
    assert report.failures == ["FloatingPointError: no number"]


def test_by_itself_every_step_that_was_begun_is_ended():
    setting = Setting(measures=True)
    setting.trainer.train_for(0.0)
    assert setting.learner.num_updates == 1
    # One batch to measure on, before and behind the step, and one to learn from.
    assert setting.learner.num_done == 3 * PIECES and setting.sampler.next == 2
    assert setting.trainer.take_report().measured_after is not None
    setting.trainer.settle()
