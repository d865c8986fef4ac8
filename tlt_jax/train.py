"""The RL run: rollout, reward, update, weight sync, step after step, resumable.

Everything a step does is a function of the configuration, the step number and what the
checkpoint holds, so a run that was killed goes on bit for bit (by a chain rule where no
clock has a say in its tokens, `speculation.by_the_clock`).
"""

import contextlib
import functools
import pathlib
import time
from typing import Any

import jax

from tlt_jax import assembly, config
from tlt_jax.rl import rolled, rollouts
from tlt_jax.rl.tasks import build as tasks
from tlt_jax.runtime import distributed, failures, stopping
from tlt_jax.runtime import watch as watch_lib
from tlt_jax.viz import plots
from tlt_jax.workdir import directory as workdir
from tlt_jax.workdir import (
    drafter_checkpoint,
    ending,
    files,
    identity,
    progress,
    sinks,
    state,
    step_record,
)


def train(
    run: config.RunConfig,
    directory: str | pathlib.Path,
    stop: stopping.Stop | None = None,
) -> dict[str, Any]:
    """Train until `run.num_steps`, from the newest checkpoint of the directory if any.

    Everything that the run writes is in there. Returns the last step's record.

    Raises:
      schema.ConfigError: the directory holds another run, or a longer one.
      files.WorkdirError: it cannot be written, or another process works there.
      failures.TrainingError: updates are not finite any more.
      failures.Stopped: `stop` was asked for; what is done is saved.
      channel.ProcessError: another process of the run has ended.
    """
    directory, stop = pathlib.Path(directory), stop or stopping.Stop()
    with distributed.join() as group, contextlib.ExitStack() as closing:
        if group.is_first:
            closing.enter_context(workdir.claimed(directory, run))
        group.check_same("settings", config.digest(run))
        rollouts.check(run.rollout.lag, group.num)
        assembly.check_launched(run)
        mode = run.log.progress if group.is_first else "off"
        display = closing.enter_context(progress.Progress(run.num_steps, mode=mode))
        where = functools.partial(ending.stopped, directory, run.num_steps)
        stop.last_words = lambda: display.close() or where()
        row = group.first("finished", lambda: ending.last_row(directory, run))
        if row is not None:
            if group.is_first:
                with files.writing(directory / "plots"):
                    plots.complete(directory)
                display.note(ending.finished(directory, run))
            return row
        try:
            trainer = closing.enter_context(Trainer(run, directory, display, group))
            trainer.begin()
            with stop.finishing(display.tell, run.checkpoint.grace_s, trainer.abandon):
                row = trainer.take_steps(stop)
                trainer.finish()
        except failures.NotFiniteError as error:
            done, newest = trainer.state.step, trainer.state.latest_step()
            raise ending.not_finite(error, done, newest) from error
        except jax.errors.JaxRuntimeError as error:
            group.explain(error)
            raise
    if row["step"] < run.num_steps:
        distributed.leave()
        raise failures.Stopped(where(), stop.status)
    return row


class Trainer:
    """A run: its parts, its state, and the loop over its steps.

    Attributes:
      parts: see `assembly.Parts`.
      state: what a checkpoint holds; `state.step` counts RL steps done.
      rollouts: what steps learn from.
      group: the processes that do this together.
    """

    def __init__(
        self,
        run: config.RunConfig,
        directory: pathlib.Path,
        display: progress.Progress,
        group: distributed.Group | None = None,
    ):
        """Load model, task and the newest checkpoint; `directory` exists.

        Of the group's processes the first one writes; None: this one is alone.
        """
        self.run, self._directory, self._display = run, directory, display
        self.group = group or distributed.alone()
        self._num_lost, self._overdue = 0, False
        with contextlib.ExitStack() as closing:
            self._start(closing)
            self._closing = closing.pop_all()

    def _start(self, closing: contextlib.ExitStack) -> None:
        run, directory = self.run, self._directory
        display, group = self._display, self.group
        display.stage("loading")
        task = tasks.build(run.task, reward=run.reward, eval_size=run.eval.num_prompts)
        source = assembly.source_of(run, task, directory, group, display)
        inputs = assembly.inputs_of(run, source, task)
        about = identity.claim(directory, run, inputs, display.note, group)
        self.parts = parts = assembly.assemble(
            run, source, task, directory, group, display, closing
        )
        if group.is_first:
            with files.filling(directory / "tokenizer") as folder:
                parts.tokenizer.save(folder)
        display.watch(lambda: progress.seen(parts.workers))
        stores = closing.enter_context(
            drafter_checkpoint.opened(
                parts.adaptation, directory, run.checkpoint, group, display
            )
        )
        learning, sync = parts.updater, parts.sync
        changing = {"collector": parts.collector, **parts.speculation.changing}
        self.rollouts = rollouts.Rollouts(
            *(run.rollout.lag, run.num_steps, parts.collector, parts.adaptation),
            *(parts.workers, learning, sync, changing, display),
        )
        closing.callback(self.rollouts.close)
        kept = changing | {"sync": sync}, stores, self.rollouts
        given = run.checkpoint, parts.model, learning, *kept, about, display.note
        self.state = closing.enter_context(state.RunState(directory, *given))
        if self.state.restore():
            display.resume(self.state.step)
        else:
            weights = assembly.load_weights(source, learning)
            learning.train_state = learning.learner.init_state(weights)
        if learning.needs_reference:
            learning.reference = assembly.load_weights(source, learning)
        self._closing, self._writer = closing, None
        self._open_writer(self.state.step + 1 if self.state.step else 0)

    def __enter__(self) -> "Trainer":
        return self

    def __exit__(self, *error: Any) -> None:
        self._closing.__exit__(*error)

    def begin(self) -> None:
        """Give the workers their weights, and compile what the steps need."""
        self.rollouts.renew(self.state.step)
        self.rollouts.rest(self.watch())
        self.parts.adaptation.start()
        if self.state.step < self.run.num_steps:
            # Beside a training drafter compilers would take several times as long.
            self._display.stage("compiling")
            self.warm_up(wait=self.parts.adaptation.trains)
            self.parts.rewards.wait_until_ready()
            # No rollout's time shall hold what another process compiles.
            self.group.exchange("ready", None)
        step, every = self.state.step, self.run.eval.every
        left_out = functools.partial(step_record.left_out, self._directory, step)
        if every and step % every == 0 and (row := self.group.first("row", left_out)):
            row |= self._evaluate(self.watch())
            if step:
                # The record without it is replaced.
                self._open_writer(step)
            self._write(row)

    def take_steps(self, stop: stopping.Stop) -> dict[str, Any]:
        """Take the steps that are left, or until it shall stop; return the last record.

        A step that was given up is left out: what is saved is the one before.
        """
        row = {"step": self.state.step}
        while self.state.step < self.run.num_steps and not stop.agreed(self.group):
            try:
                row = self.take_step()
            except failures.Abandoned:
                self.state.complete()
                break
        return row

    def abandon(self) -> None:
        """Give up the rollout or evaluation under way; called by another thread."""
        self._overdue = True
        self.parts.workers.abandon()

    def finish(self) -> None:
        """Save the last step; of a complete run draw it, and say where it is."""
        self._display.stage("writing")
        self.state.complete()
        if self.state.step == self.run.num_steps and self.group.is_first:
            self._draw()
            self._display.note(ending.finished(self._directory, self.run))

    def warm_up(self, *, wait: bool = True) -> None:
        """Compile every program of the steps to come, in the background."""
        self.parts.workers.warm_up(wait=wait)
        self.parts.updater.warm_up(wait=wait)
        self.parts.adaptation.warm_up(wait=wait)

    def watch(self) -> watch_lib.Watch:
        """Make the watch of the next step."""
        pools = [self.parts.updater.pool]
        if not self.rollouts.lag:
            pools += self.parts.workers.pools
        return watch_lib.Watch(pools, self._display, self.state.step)

    def take_step(self) -> dict[str, Any]:
        """Collect, update, sync; write the record and what else is due."""
        run, parts, watch = self.run, self.parts, self.watch()
        started = time.perf_counter()
        found = self.rollouts.take(self.state.step, watch)
        row = found.row | self._about_workers(found, watch)
        if not self.rollouts.lag:
            parts.workers.release_caches()
        step = self.state.step + 1
        if found.useful is None:
            self.rollouts.keep(step)
        else:
            row |= parts.updater.update(found.useful, watch)
            with watch.stage("sync"):
                self.rollouts.renew(step)
        self.state.step = step
        if run.eval.every and step % run.eval.every == 0:
            row |= self._evaluate(watch)
        row = step_record.complete(row, step, watch.row(), started)
        self._write(row, found)
        self._display.record(row)
        if run.checkpoint.every and step % run.checkpoint.every == 0:
            self.state.save()
        if run.log.plots_every and step % run.log.plots_every == 0:
            self._draw()
        return row

    def _evaluate(self, watch: watch_lib.Watch) -> dict[str, float]:
        """Judge completions of held-out prompts: `eval/avg@n` and `eval/pass@k`.

        One that is given up says nothing: who resumes makes up for it.
        """
        # One process would wait for another; the last evaluation is the result.
        may_leave = self.group.num == 1 and self.state.step < self.run.num_steps

        def look(*_: int) -> None:
            if self._overdue and may_leave:
                raise failures.Abandoned

        self.rollouts.rest(watch)
        with watch.stage("eval"), contextlib.suppress(failures.Abandoned):
            return self.parts.evaluator.evaluate(look)
        return {}

    def _open_writer(self, first_step: int) -> None:
        if self._writer is not None:
            self._writer.close()
        if self.group.is_first:
            opened = sinks.open_writer(self._directory, first_step, self.run)
            self._writer = self._closing.enter_context(opened)

    def _about_workers(
        self, found: rolled.Rolled, watch: watch_lib.Watch
    ) -> dict[str, Any]:
        """What the workers did in a step's rollouts; the timeline is written."""
        if not self.group.is_first:
            return {}
        workdir.write_timeline(self._directory, self.state.step + 1, found.intervals)
        row = step_record.of_workers(found.intervals, found.lost)
        num_before, self._num_lost = self._num_lost, len(found.lost)
        if self._num_lost > num_before:
            watch.note(f"lost workers: {row['workers/lost']}; the others go on.")
        return row

    def _write(self, row: dict[str, Any], found: rolled.Rolled | None = None) -> None:
        """Write a record, and the completions if they are due; sinks get both."""
        if self._writer is None:
            return
        self._writer.write(row)
        every = self.run.log.rollouts_every
        if found is not None and every and row["step"] % every == 0:
            told = found.everything, self.parts.tokenizer.decode, found.parts
            records = workdir.write_rollouts(self._directory, row["step"], *told)
            self._writer.samples(row["step"], records)

    def _draw(self) -> None:
        if self.group.is_first:
            with files.writing(self._directory / "plots"):
                plots.draw_all(self._directory)
