"""Drafter training on separate workers: the learner's end of it, and theirs.

A worker keeps the texts that it has finished itself, with their features, and trains on
those when it waits: no feature travels. It gets the drafter with its optimizer when a
training begins and gives it back when it has ended; the learner's first process has it
between trainings. So a worker that dies costs the training that it was at, which is
undone, and its texts.
"""

import dataclasses
from collections.abc import Sequence

import jax

from tlt_jax.rl.adaptation import spot_trainer, training
from tlt_jax.rl.engine import engine as engine_lib
from tlt_jax.rl.workers import records, transfers
from tlt_jax.runtime.transport import messages, talk
from tlt_jax.specdec.texts import layout


class Trainer(spot_trainer.SpotTrainer):
    """Follows the coordinator in the learner's first process; a worker trains."""

    def train_for(self, seconds: float, max_steps: int = 0) -> None:
        """Let the first worker train for so long; see `SpotTrainer.train_for`."""
        members = self._workers.at_work()[:1]
        if members:
            self._there(members, lambda: False, None, seconds, max_steps)

    def _guarded(self, members, should_stop, train: records.Train | None) -> None:
        self._there(members, should_stop, train, 0.0, 0)

    def _there(self, members, should_stop, train, seconds, max_steps) -> None:
        """Let a worker train; take over what it has learned, and publish it."""
        c, has_ended = self._coordination, False

        def run():
            if train is not None:
                self._tell_that_it_runs(train)

        def end(reason):
            nonlocal has_ended
            has_ended = True
            if train is None:
                return not reason
            counts = not reason and c.may_publish(train.training)
            if reason:
                c.send(records.TrainingFailed(train.training, reason))
            else:
                c.send(records.TrainingStopped(train.training))
            return counts

        number = 0 if train is None else train.training
        state, *rest = self.learner.learned()
        # Leaf by leaf, so that a rollout's end waits for none but the one under way.
        given = [(self.report, rest, seconds, max_steps), *jax.tree.leaves(state)]
        try:
            told = self._workers.train(members[0], given, number, should_stop, run, end)
            if told is None:
                end("")
                return
            self.report, found = told
            if found is not None:
                self.learner.take_over(found)
                self._publish()
        # As of a training here: the coordinator waits for this thread's answer, and the
        # run can do with the drafter as it was. The record names the error.
        except Exception as error:
            reason = self._failed(error)
            if train is not None and not has_ended:
                c.send(records.TrainingFailed(train.training, reason))


class Trainee:
    """A worker's end: the texts that it keeps, and the drafter while it trains."""

    def __init__(self, own: training.Training, engine: engine_lib.Engine):
        """Train on the engine's device; `own` are of the same target and drafter."""
        self._own, self._engine = own, engine
        self.capture_frac = own.settings.capture_frac

    @property
    def texts(self) -> tuple[int, int, int]:
        """Texts that are there, their bytes, and how many were dropped."""
        buffer = self._own.buffer
        return len(buffer), buffer.num_bytes, buffer.num_dropped

    def on_text(self, text: layout.Record) -> None:
        """Take a finished text."""
        self._own.buffer.append(text)

    def forget(self) -> None:
        """Drop the texts: another learner may draw them anew."""
        self._own.forget()

    def begin_rollout(self, version: int) -> None:
        """Drop texts that are too old for the target's version."""
        self._own.buffer.begin_step(version)

    def prepare(self) -> None:
        """Compile the training's programs in the background; the engine has weights."""
        learner = self._own.learner
        devices = learner.devices_of([self._engine.mesh])
        learner.prepare(devices, self._engine.params)

    def wait(self) -> None:
        """Wait until they are compiled."""
        self._own.learner.pool.wait()

    def train(
        self, its: talk.Talk, taking: transfers.Taking, number: int, given: Sequence
    ) -> None:
        """Train what was given, as the learner's `Trainer` says, and give it back.

        Raises:
          talk.TalkError: the learner is gone.
        """
        own, kept = self._own, []
        (report, rest, seconds, max_steps), *leaves = given
        like = jax.tree.structure(own.learner.abstract_state())
        own.learner.take_over((jax.tree.unflatten(like, leaves), *rest))
        orders = _Orders(its)
        trainer = spot_trainer.SpotTrainer(
            own.learner,
            own.sampler,
            _Place(orders, (self._engine,)),
            prepare=own.choose_vocabulary,
            publish=lambda: kept.append(True),
            publish_steps=0,
            measures=own.measures,
        )
        trainer.report = report
        try:
            if number:
                trainer.train(records.Train(number, 0, (0,)))
            else:
                trainer.train_for(seconds, max_steps)
                orders.end("")
            pieces = messages.pack(own.learner.learned()) if kept else []
            its.say(trainer.report, messages.size(pieces))
            if pieces:
                taking.give(pieces)
        finally:
            # The learner has it now, or as it was.
            own.learner.end(keep=False)
            own.learner.state = None


@dataclasses.dataclass(frozen=True)
class _Place:
    """What a trainer sees of this process: one engine, and who gives orders."""

    coordination: "_Orders"
    engines: Sequence[engine_lib.Engine]
    first: int = 0


class _Orders:
    """Stands for the coordinator, of which a worker hears through the learner.

    Attributes:
      closed: false: who is gone is found out by talking.
    """

    closed = False

    def __init__(self, its: talk.Talk):
        self._talk = its

    def should_stop(self, training: int) -> bool:
        """Tell whether the learner has said so: it says nothing else."""
        return self._talk.waits()

    def next_training(self, timeout_s: float | None = None) -> None:
        """Nobody joins: it would need collectives between processes."""

    def may_publish(self, training: int) -> bool:
        """End the training; say whether it counts."""
        return self.end("")

    def send(self, event: object) -> None:
        """Tell the learner; of an end `may_publish` has."""
        match event:
            case records.TrainingRuns():
                self._talk.say("runs")
            case records.TrainingFailed(_, reason):
                self.end(reason)

    def end(self, reason: str) -> bool:
        """Say that the device is free; return whether what was learned counts."""
        self._talk.say("ended", reason)
        # That it shall stop, said before or after it has.
        self._talk.hear()
        (counts,) = self._talk.hear()
        return counts
