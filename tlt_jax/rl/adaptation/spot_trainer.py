"""Drafter training on workers that wait: a thread that follows the coordinator.

It begins when the coordinator gives it workers, takes one step after another, and gives
the devices back with never more than one piece of a step in their queues: each piece is
waited for before the next is begun, and programs are compiled in the background
meanwhile. Nobody waits for the piece that is under way then: it leaves the device by
itself, and its result is dropped. A step that is given up changes nothing, and its
texts have their turn again.
What was learned is taken over and published after the devices were given back, so the
rollout's end does not wait for it. A training that fails leaves the drafter as it was
before.
"""

import dataclasses
import functools
import threading
import time
from collections.abc import Callable
from typing import Any

import jax

from tlt_jax.rl.adaptation import learner as drafter_learner
from tlt_jax.rl.workers import mailboxes, records
from tlt_jax.rl.workers import workers as workers_lib
from tlt_jax.runtime import train_state
from tlt_jax.specdec.texts import sampling as text_sampling
from tlt_jax.specdec.training import unroll

# Waiting for texts and programs, the thread looks so often whether it shall stop.
_POLL_S = 0.02
# Waiting for the trainer, others look so often whether it was given up.
_LOOK_S = 0.1
_MAX_SKIPPED = 5
_PER_STEP = ("top1_acc", "top1_prob", "overlap", "token_loss")


@dataclasses.dataclass
class Report:
    """What trainings did since the last `take`.

    Attributes:
      num_steps: taken.
      num_skipped: of these, not finite and without effect.
      seconds: in steps, from the first to the last's end.
      measured: `acceptance.summarise` of texts that no training has seen, at
        its beginning; or None.
      measured_after: the same of the same texts at its end, where that was asked for.
      outcome: of the last step, on the host.
      failures: reasons of trainings that failed.
    """

    num_steps: int = 0
    num_skipped: int = 0
    seconds: float = 0.0
    measured: dict[str, Any] | None = None
    measured_after: dict[str, Any] | None = None
    outcome: dict[str, Any] | None = None
    failures: list[str] = dataclasses.field(default_factory=list)

    def row(self) -> dict[str, Any]:
        """Values by metric name; those of depth 1 where a step has several."""
        row: dict[str, Any] = {
            "drafter/num_steps": self.num_steps,
            "drafter/num_skipped": self.num_skipped,
            "drafter/train_s": self.seconds,
        }
        if self.outcome is not None:
            row["drafter/loss"] = float(self.outcome["loss"])
            for name in _PER_STEP:
                row[f"drafter/{name}"] = float(self.outcome[name][0])
        if self.measured is not None:
            for ranking in ("coupled", "deterministic"):
                length = self.measured[f"{ranking}/accept_length"]
                row[f"drafter/fresh_accept_length_{ranking}"] = length
            row["drafter/sharpness"] = self.measured["sharpness"]
            row["drafter/tau"] = self.measured["tau"]
        if self.failures:
            row["drafter/failure"] = self.failures[-1]
        return row


class SpotTrainer:
    """Trains the drafter; also, without the coordinator, when told to.

    Attributes:
      learner: the drafter.
      report: what was done since it was last replaced.
    """

    def __init__(
        self,
        learner: drafter_learner.DrafterLearner,
        sampler: text_sampling.Sampler,
        workers: workers_lib.Workers,
        *,
        prepare: Callable[[], bool],
        publish: Callable[[], None],
        publish_steps: int,
        measures: bool,
    ):
        """Take the parts; `start` makes the thread.

        `prepare` settles what the texts decide, such as the draft vocabulary; false:
        not yet. `publish` offers the learner's weights to the engines: at a training's
        end, and within it every `publish_steps` steps, 0: not. With `measures` fresh
        texts say what drafts would have had accepted.
        """
        self.learner, self.report = learner, Report()
        self._sampler, self._workers = sampler, workers
        self._prepare, self._publish = prepare, publish
        self._publish_steps, self._measures = publish_steps, measures
        self._thread: threading.Thread | None = None
        self._settled = threading.Event()
        self._settled.set()

    @property
    def _coordination(self) -> mailboxes.Coordination:
        return self._workers.coordination

    def start(self) -> None:
        """Begin to follow the coordinator."""
        self._thread = threading.Thread(
            target=self._follow, name="spot-trainer", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Wait for the thread; the coordinator must have been closed."""
        if self._thread is not None:
            self._thread.join()

    def settle(self) -> None:
        """Wait until what ended with the last rollout was taken over and published.

        Only a trainer that was given up is not waited for.
        """
        while not self._settled.wait(_LOOK_S):
            if self._coordination.closed or self._coordination.state.given_up:
                return

    def take_report(self) -> Report:
        """Return what was done since the last call."""
        report, self.report = self.report, Report()
        return report

    def train_for(self, seconds: float, max_steps: int = 0) -> None:
        """Train here and now on the first worker, for so long and at least a step.

        Of more than `max_steps` none is taken; 0: as many as the time allows.
        """
        until = time.perf_counter() + seconds

        def should_stop():
            # Before the first step there is nothing to be given up.
            num_steps = self.report.num_steps
            if max_steps and num_steps >= max_steps:
                return True
            return num_steps > 0 and time.perf_counter() >= until

        self._guarded((self._workers.first,), should_stop, None)

    def train(self, train: records.Train) -> None:
        """Train until the coordinator wants it to end, and tell it so."""
        should_stop = functools.partial(self._coordination.should_stop, train.training)
        self._guarded(train.workers, should_stop, train)

    def _follow(self) -> None:
        c = self._coordination
        while not c.closed:
            train = c.next_training(1.0)
            if train is None:
                continue
            self._settled.clear()
            self.train(train)
            self._settled.set()

    def _guarded(self, members, should_stop, train: records.Train | None) -> None:
        """Train, give the devices back, publish; undo what fails."""
        before, kept, reason = self.report.num_steps, False, ""
        try:
            self._train(members, should_stop, train)
            kept = train is None or self._coordination.may_publish(train.training)
        # All of them: the coordinator waits for this thread's answer, so an error that
        # left it would hold up the rollout's end, and the run can do without a drafter
        # that cannot be trained. The record names the error.
        except Exception as error:
            reason = self._failed(error)
        if train is not None and reason:
            self._coordination.send(records.TrainingFailed(train.training, reason))
        elif train is not None:
            self._coordination.send(records.TrainingStopped(train.training))
        try:
            self.learner.end(kept)
            if kept and self.report.num_steps > before:
                self._publish()
        # As above: the RL step waits for this thread in `settle`, and the run can do
        # with the drafter as it was.
        except Exception as error:
            self.learner.end(keep=False)
            self._failed(error)

    def _failed(self, error: Exception) -> str:
        self.report.failures.append(f"{type(error).__name__}: {error}")
        return self.report.failures[-1]

    def _train(self, members, should_stop, train: records.Train | None) -> None:
        unused = self._sampler.state()
        batch = self._first_batch(should_stop)
        if batch is None or not self._move(members, should_stop, wait=True):
            self._sampler.restore(unused)
            return
        if train is not None:
            self._tell_that_it_runs(train)
        unseen = None
        # By itself nobody asks for the devices in the midst of a step.
        interrupted = should_stop if train is not None else lambda: False
        if self._measures and self.report.measured is None:
            unseen = batch
            self.report.measured = drafter_learner.run_through(
                self.learner.measure([batch]), interrupted
            )
            if self.report.measured is not None:
                unused = self._sampler.state()
                batch = self._first_batch(should_stop)
        started = time.perf_counter()
        skips = train_state.Skips(_MAX_SKIPPED)
        joining: records.Train | None = None
        while batch is not None and not should_stop():
            outcome = drafter_learner.run_through(self.learner.step(batch), interrupted)
            if outcome is None:
                break
            unused = self._sampler.state()
            following = self._sampler.next_batch()
            outcome = jax.device_get(outcome)
            self.report.num_steps += 1
            self.report.num_skipped += int(outcome["skipped"])
            self.report.outcome = outcome
            skips.count(outcome["skipped"])
            skips.check("lower adaptation.learning_rate")
            every = self._publish_steps
            if every and self.report.num_steps % every == 0:
                self._publish()
            if train is not None:
                joining = self._coordination.next_training(0) or joining
            if joining and self._move(joining.workers, should_stop, wait=False):
                self._tell_that_it_runs(joining)
                joining = None
            batch = following
            if batch is None:
                batch = self._first_batch(should_stop)
        # A batch that made no step is drawn again.
        self._sampler.restore(unused)
        self.report.seconds += time.perf_counter() - started
        if train is None and unseen is not None:
            self.report.measured_after = drafter_learner.run_through(
                self.learner.measure([unseen]), interrupted
            )

    def _tell_that_it_runs(self, train: records.Train) -> None:
        self._coordination.send(records.TrainingRuns(train.training, train.revision))

    def _first_batch(self, should_stop) -> unroll.Batch | None:
        """Wait for texts."""
        while not should_stop():
            batch = self._sampler.next_batch(_POLL_S)
            if batch is not None and self._prepare():
                return batch
        return None

    def _move(self, members, should_stop, *, wait: bool) -> bool:
        """Go to the devices of `members`, once the programs for them are there."""
        first = self._workers.first
        engines = [self._workers.engines[i - first] for i in members]
        devices = self.learner.devices_of([engine.mesh for engine in engines])
        target = engines[0].params
        self.learner.prepare(devices, target)
        patience_s = _POLL_S if wait else 0.0
        while not self.learner.is_ready(devices, target, patience_s):
            if not wait or should_stop():
                return False
        self.learner.begin(devices, target)
        return True
