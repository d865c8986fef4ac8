"""The adaptive drafter of a run: its texts, its training, its versions.

Finished texts go into a buffer with the features that the rollout made anyway. Workers
that wait train on them (`spot_trainer`, or `elsewhere` where they are processes); with
one worker, the time between rollout and update is used where it pays. A step's first
rollout begins with the newest version, its further ones take it up as it comes. Until a
learned drafter is better than matching earlier text, the engines propose from text.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax

from tlt_jax.models.drafters import drafter
from tlt_jax.models.drafters import head as drafter_head
from tlt_jax.rl.adaptation import budget, elsewhere, spot_trainer, training
from tlt_jax.rl.workers import separate
from tlt_jax.rl.workers import workers as workers_lib
from tlt_jax.runtime import distributed, train_state
from tlt_jax.runtime import watch as watch_lib
from tlt_jax.specdec.training import unroll
from tlt_jax.specdec.tuners import shared as shared_tuner

# Names of what a checkpoint holds.
_BUFFER, _SAMPLER, _DRAFT_IDS = "buffer.", "sampler.", "draft_ids"


class NoAdaptation:
    """Stands where a run has no learned drafter; see `Adaptation`.

    Attributes:
      trains: false.
    """

    trains = False

    def start(self) -> None:
        """See `Adaptation`."""

    def close(self) -> None:
        """See `Adaptation`."""

    def warm_up(self, *, wait: bool) -> None:
        """See `Adaptation`."""

    def begin_rollout(self) -> None:
        """See `Adaptation`."""

    def end_rollout(self, accept_length: float, watch: watch_lib.Watch) -> None:
        """See `Adaptation`."""

    def hand_over(self, watch: watch_lib.Watch) -> None:
        """See `Adaptation`."""

    def settle(self) -> None:
        """See `Adaptation`."""

    def row(self) -> dict[str, Any]:
        """Return nothing to be recorded."""
        return {}


class Adaptation:
    """The drafter of a run and everything that changes it.

    Attributes:
      cfg: the drafter.
      version: of the weights that engines were offered last; 0: none yet.
      is_ready: the engines may use the learned drafter.
      budget: what training between rollout and update was found to be worth.
      trains: true: its programs are to be compiled before a step.
    """

    trains = True

    def __init__(
        self,
        own: training.Training,
        workers: workers_lib.Workers,
        tuners: Sequence[shared_tuner.SharedTuner],
        *,
        initial: drafter.DrafterParams | None,
        observer: watch_lib.Observer,
    ):
        """Take the parts; `start` gives the drafter weights.

        Args:
          own: this process's training, of the drafter that the engines were made for.
          workers: those engines.
          tuners, observer: told of new versions, and what the user should know.
          initial: trained weights, or None: random ones.
        """
        settings = own.settings
        self.cfg, self._settings, self._own = own.cfg, settings, own
        self._workers, self._tuners = workers, tuners
        self._initial, self._observer = initial, observer
        self._ngram_accept_length: float | None = None
        self.budget = budget.Budget()
        self._sharing = Sharing(workers.group)
        self.version, self.is_ready = 0, initial is not None
        self.buffer, self.sampler, self.learner = own.buffer, own.sampler, own.learner
        self._is_separate = isinstance(workers, separate.Team)
        # Of separate workers the first process alone hears.
        self._drives = workers.group.is_first or not self._is_separate
        make = elsewhere.Trainer if self._is_separate else spot_trainer.SpotTrainer
        self.trainer = make(
            self.learner,
            self.sampler,
            workers,
            prepare=own.choose_vocabulary,
            publish=self._publish,
            publish_steps=settings.publish_steps,
            measures=own.measures,
        )

    def start(self) -> None:
        """Give the drafter its weights and the engines theirs; begin to follow.

        The engines have the target's weights by now. After `restore` the drafter's are
        kept.
        """
        if self.learner.state is None:
            norm = jax.device_get(self._workers.others().final_norm)
            self.learner.state = self.learner.init_state(
                self._initial, norm, self._own.seed
            )
            self._publish()
        elif self.version:
            self._workers.offer_drafter(
                self.learner.weights(self._own.precision), self.version
            )
        if self._settings.enabled:
            self._workers.on_text = self.buffer.append
            self._workers.capture_frac = self._settings.capture_frac
            if self._workers.num > 1 and self._drives:
                self.trainer.start()

    def close(self) -> None:
        """End the trainer's thread and the buffer's; the workers are closed."""
        self.trainer.close()
        self._own.close()

    def warm_up(self, *, wait: bool) -> None:
        """Compile the training's programs for each worker by itself."""
        if not self._settings.enabled:
            return
        for engine in self._workers.engines:
            devices = self.learner.devices_of([engine.mesh])
            self.learner.prepare(devices, engine.params)
        if wait:
            self.learner.pool.wait()

    def begin_rollout(self) -> None:
        """Note that the engines have the target's newest weights."""
        if self._workers.version > self.buffer.version:
            for tuner in self._tuners:
                tuner.changed("target")
        self.buffer.begin_step(self._workers.version)

    def end_rollout(self, accept_length: float, watch: watch_lib.Watch) -> None:
        """Train while nobody waits, if it pays; see whether the drafter is ready.

        Args:
          accept_length: of the rollout's own proposals.
          watch: has the rollout's seconds; gets the stage `drafter`.
        """
        with watch.stage("drafter"):
            self.trainer.settle()
            if self._settings.enabled and self._workers.num == 1 and self._drives:
                self._train_while_nobody_waits(watch.spent["rollout"])
            self._meet()
            if not self.is_ready:
                self._ngram_accept_length = accept_length
                self._judge()

    def _train_while_nobody_waits(self, rollout_s: float) -> None:
        seconds = self.budget.seconds(rollout_s, self._settings.max_frac)
        if self._own.is_counted:
            seconds = math.inf
        if not seconds or not self._texts()[0]:
            self.budget = self.budget.skipped()
            return
        self.trainer.train_for(seconds, self._settings.max_steps)
        report = self.trainer.report
        if report.measured_after is not None and report.seconds > 0:
            self.budget = self.budget.trained(
                report.seconds,
                report.measured["coupled/accept_length"],
                report.measured_after["coupled/accept_length"],
            )

    def hand_over(self, watch: watch_lib.Watch) -> None:
        """Between the rollouts of an RL step: let all processes have the same drafter.

        See `Sharing`; where one process has all workers nothing is waited for.
        """
        with watch.stage("drafter"):
            self._meet()

    def settle(self) -> None:
        """Wait until what a training beside the rollout has learned is taken over."""
        self.trainer.settle()

    def _meet(self) -> None:
        """Take over what another process has learned, if one has."""
        if not self._settings.enabled or self._workers.group.num == 1:
            return
        self.trainer.settle()
        self.trainer.report, self.version, found = self._sharing.meet(
            self.trainer.report, self.version, self.learner.learned
        )
        if found is not None:
            self.learner.take_over(found)
            self._publish()

    def row(self) -> dict[str, Any]:
        """Values of this step by metric name."""
        report = self.trainer.take_report()
        self._sharing.begin_step()
        num_texts, num_bytes, num_dropped = self._texts()
        for failure in report.failures:
            self._observer.note(
                f"  the drafter's training failed and was undone ({failure}); the run "
                "goes on."
            )
        return report.row() | {
            "drafter/version": self.version,
            "drafter/ready": int(self.is_ready),
            "drafter/num_updates": self.learner.num_updates,
            "drafter/texts": num_texts,
            "drafter/texts_bytes": num_bytes,
            "drafter/texts_dropped": num_dropped,
        }

    def _texts(self) -> tuple[int, int, int]:
        """Texts there are, their bytes, and how many were dropped."""
        if self._is_separate:
            return self._workers.texts()
        return len(self.buffer), self.buffer.num_bytes, self.buffer.num_dropped

    def target(self) -> unroll.Target:
        """What the drafter computes with and does not change; all processes call it."""
        params, ids = self._workers.others(), self.learner.draft_ids
        return unroll.Target(params.embed, drafter_head.head_rows(params, ids), ids)

    def abstract_state(self) -> train_state.TrainState:
        """Describe what is trained."""
        return self.learner.abstract_state()

    def state(self) -> train_state.Snapshot:
        """Return what a resumed run goes on from."""
        arrays = {}
        for prefix, part in ((_BUFFER, self.buffer), (_SAMPLER, self.sampler)):
            arrays |= {f"{prefix}{name}": x for name, x in part.state().items()}
        if self.learner.draft_ids is not None:
            arrays[_DRAFT_IDS] = self.learner.draft_ids
        meta = {
            "version": self.version,
            "is_ready": self.is_ready,
            "ngram_accept_length": self._ngram_accept_length,
            "sharpness": self.learner.sharpness,
            "tau": self.learner.tau,
            "budget": dataclasses.asdict(self.budget),
        }
        return train_state.Snapshot(self.learner.state, arrays, meta)

    def restore(self, snapshot: train_state.Snapshot) -> None:
        """Go on from a `state`; before `start`.

        Of its arrays the texts may be missing: then there are none yet.
        """
        arrays, meta = snapshot.arrays, snapshot.meta

        def part(prefix):
            names = sorted(name for name in arrays if name.startswith(prefix))
            return {name.removeprefix(prefix): arrays[name] for name in names}

        self.learner.state = jax.device_get(snapshot.state)
        self.learner.draft_ids = arrays.get(_DRAFT_IDS)
        if texts := part(_BUFFER):
            self.buffer.restore(texts)
            self.sampler.restore(part(_SAMPLER))
        self.version, self.is_ready = meta["version"], meta["is_ready"]
        self._ngram_accept_length = meta["ngram_accept_length"]
        self.learner.sharpness = meta["sharpness"]
        # Older checkpoints have none.
        self.learner.tau = meta.get("tau", drafter.TAU)
        self.budget = budget.Budget(**meta["budget"])

    def for_others(self, snapshot: train_state.Snapshot) -> train_state.Snapshot:
        """Leave the texts out, which are the larger part and the first process's."""
        given = snapshot.arrays.items()
        arrays = {n: x for n, x in given if not n.startswith((_BUFFER, _SAMPLER))}
        state = jax.device_get(snapshot.state)
        return train_state.Snapshot(state, arrays, snapshot.meta)

    def _judge(self) -> None:
        """Let the engines use the drafter once it beats what they do without it."""
        measured = self.trainer.report.measured
        if not self._own.measures:
            self.is_ready = self.learner.num_updates > 0
        elif measured is not None:
            here = measured["coupled/accept_length"]
            self.is_ready = bool(here > max(self._ngram_accept_length, 1.0))
        self._publish()

    def _publish(self) -> None:
        if self.is_ready:
            self._offer()

    def _offer(self) -> None:
        self.version += 1
        self._workers.offer_drafter(
            self.learner.weights(self._own.precision), self.version
        )
        for tuner in self._tuners:
            tuner.changed("drafter")


class Sharing:
    """One drafter for all processes: what one of them learned, the others take over.

    Of several processes at most one trains beside a rollout, on its own workers and
    texts. After every rollout they meet, so that the next one begins with the same
    drafter everywhere, and another process's training with what the last one learned.
    """

    def __init__(self, group: distributed.Group):
        """Begin an RL step."""
        self._group = group
        self._num_known = 0

    def begin_step(self) -> None:
        """Begin the next RL step, with an empty report."""
        self._num_known = 0

    def meet(
        self, report: spot_trainer.Report, version: int, learned: Callable[[], Any]
    ) -> tuple[spot_trainer.Report, int, Any]:
        """Exchange what was learned since the last meeting; all processes call this.

        Args:
          report: of the RL step so far: the one of the last meeting, or an empty one,
            with what this process has trained since.
          version: of the drafter, as this process has it.
          learned: gives what this process has learned; asked only if it has trained.

        Returns:
          What all have now: the report of all trainings of the RL step, the drafter's
          newest version, and what the process that trained has learned, or None.
        """
        own = learned() if report.num_steps > self._num_known else None
        found = self._group.gather("drafter", (report, version, own))
        # Reports grow from a common one: the longest is the one that has trained.
        newest, _, learned_there = max(found, key=lambda one: one[0].num_steps)
        self._num_known = newest.num_steps
        failures = dict.fromkeys(text for one, _, _ in found for text in one.failures)
        newest_version = max(version for _, version, _ in found)
        newest = dataclasses.replace(newest, failures=list(failures))
        return newest, newest_version, learned_there
