"""The RL run: rollout, reward, update, weight sync, step after step, resumable.

Everything a step does is a function of the configuration, the step number and what the
checkpoint holds, so a run that was killed goes on bit for bit.
"""

import contextlib
import pathlib
import time
from typing import Any

import jax

from tlt_jax import assembly, config
from tlt_jax.rl import collector
from tlt_jax.rl.tasks import build as tasks
from tlt_jax.rl.workers import coordinator
from tlt_jax.runtime import distributed, failures
from tlt_jax.runtime import watch as watch_lib
from tlt_jax.viz import plots
from tlt_jax.workdir import directory as workdir
from tlt_jax.workdir import (
    drafter_checkpoint,
    metrics,
    progress,
    sinks,
    state,
    step_record,
)


def train(run: config.RunConfig, directory: str | pathlib.Path) -> dict[str, Any]:
    """Train until `run.num_steps`, from the newest checkpoint of the directory if any.

    Everything that the run writes is in there. Returns the last step's record.

    Raises:
      schema.ConfigError: the directory holds a run with other settings.
      workdir.WorkdirError: it cannot be written, or another process works there.
      failures.TrainingError: updates are not finite any more.
      channel.ProcessError: another process of the run has ended.
    """
    directory = pathlib.Path(directory)
    with distributed.join() as group, contextlib.ExitStack() as closing:
        if group.is_first:
            closing.enter_context(workdir.claimed(directory, run))
        group.check_same("settings", config.digest(run))
        mode = run.log.progress if group.is_first else "off"
        display = closing.enter_context(progress.Progress(run.num_steps, mode=mode))
        try:
            trainer = closing.enter_context(Trainer(run, directory, display, group))
            trainer.begin()
            row = {"step": trainer.state.step}
            while trainer.state.step < run.num_steps:
                row = trainer.take_step()
            trainer.finish()
            return row
        except failures.NotFiniteError as error:
            raise trainer.with_remedy(error) from error
        except jax.errors.JaxRuntimeError as error:
            group.explain(error)
            raise


class Trainer:
    """A run: its parts, its state, and the loop over its steps.

    Attributes:
      parts: see `assembly.Parts`.
      state: what a checkpoint holds; `state.step` counts RL steps done.
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
        self._num_lost = 0
        with contextlib.ExitStack() as closing:
            self._start(closing)
            self._closing = closing.pop_all()

    def _start(self, closing: contextlib.ExitStack) -> None:
        run, directory = self.run, self._directory
        display, group = self._display, self.group
        display.stage("loading")
        task = tasks.build(run.task, reward=run.reward, eval_size=run.eval.num_prompts)
        source = assembly.source_of(run, task, directory, group, display)
        self.parts = parts = assembly.assemble(
            run, source, task, directory, group, display, closing
        )
        if group.is_first:
            with workdir.writing(directory / "tokenizer"):
                parts.tokenizer.save(directory / "tokenizer")
        display.watch(self._seen)
        stores = closing.enter_context(
            drafter_checkpoint.opened(
                parts.adaptation, directory, run.checkpoint, group, display
            )
        )
        self.state = closing.enter_context(
            state.RunState(
                directory,
                run.checkpoint,
                parts.model,
                parts.updater,
                {"collector": parts.collector, "sync": parts.sync}
                | parts.speculation.tuners,
                stores,
                config.digest(run),
            )
        )
        if self.state.restore():
            display.resume(self.state.step)
        else:
            weights = assembly.load_weights(source, parts.updater)
            parts.updater.train_state = parts.updater.learner.init_state(weights)
        if parts.updater.needs_reference:
            parts.updater.reference = assembly.load_weights(source, parts.updater)
        self._writer: metrics.MetricsWriter | None = None
        if group.is_first:
            first = self.state.step + 1 if self.state.step else 0
            opened = sinks.open_writer(directory, first, run)
            self._writer = closing.enter_context(opened)

    def __enter__(self) -> "Trainer":
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    def begin(self) -> None:
        """Give the workers their weights, and compile what the steps need."""
        self._push_weights()
        self.parts.adaptation.start()
        if self.state.step < self.run.num_steps:
            # Beside a training drafter compilers would take several times as long.
            self._display.stage("compiling")
            self.warm_up(wait=self.parts.adaptation.trains)
            # No rollout's time shall hold what another process compiles.
            self.group.exchange("ready", None)
        if self.run.eval.every and self.state.step == 0:
            self._write({"step": 0, **self._evaluate(self.watch())})

    def finish(self) -> None:
        """Save the last step, and draw it."""
        self._display.stage("writing")
        if self.state.latest_step() != self.state.step:
            self.state.save()
        self.state.wait()
        self._draw()

    def warm_up(self, *, wait: bool = True) -> None:
        """Compile every program of the steps to come, in the background."""
        self.parts.workers.warm_up(wait=wait)
        self.parts.updater.warm_up(wait=wait)
        self.parts.adaptation.warm_up(wait=wait)

    def watch(self) -> watch_lib.Watch:
        """Make the watch of the next step."""
        pools = [engine.pool for engine in self.parts.workers.engines]
        pools.append(self.parts.updater.pool)
        return watch_lib.Watch(pools, self._display, self.state.step)

    def take_step(self) -> dict[str, Any]:
        """Collect, update, sync; write the record and what else is due."""
        run, parts, watch = self.run, self.parts, self.watch()
        started = time.perf_counter()
        parts.adaptation.begin_rollout()
        collected = parts.collector.collect(self.state.step, watch)
        # One worker waits for nobody: it trains here, if it pays.
        parts.adaptation.end_rollout(collected.stats.accept_length, watch)
        row = collected.row() | parts.adaptation.row() | self._about_workers(watch)
        if collected.scores.num_failed:
            watch.note(
                f"{collected.scores.num_failed} rewards failed, the first: "
                f"{collected.scores.first_failure()}"
            )
        parts.workers.release_caches()
        if collected.useful is not None:
            row |= parts.updater.update(collected.useful, watch)
            with watch.stage("sync"):
                self._push_weights()
        self.state.step += 1
        step = self.state.step
        if run.eval.every and step % run.eval.every == 0:
            row |= self._evaluate(watch)
        row = step_record.complete(row, step, watch.row(), started)
        self._write(row, collected)
        self._display.record(row)
        if run.checkpoint.every and step % run.checkpoint.every == 0:
            self.state.save()
        if run.log.plots_every and step % run.log.plots_every == 0:
            self._draw()
        return row

    def with_remedy(self, error: failures.NotFiniteError) -> failures.TrainingError:
        """Say what may be done where updates are not finite any more."""
        newest, there = self.state.latest_step(), "There is no checkpoint yet."
        if newest is not None:
            there = (
                f"The newest checkpoint is that of step {newest}; exported "
                "(tlt_jax.export) it is a model to begin from."
            )
        return failures.TrainingError(
            f"{error} (step {self.state.step + 1}): lower optimizer.learning_rate or "
            "check the rewards and the weights, and begin again in another --workdir. "
            f"{there}"
        )

    def _evaluate(self, watch: watch_lib.Watch) -> dict[str, float]:
        """Judge completions of held-out prompts: `eval/avg@n` and `eval/pass@k`."""
        with watch.stage("eval"):
            return self.parts.evaluator.evaluate()

    def _push_weights(self) -> None:
        params = self.parts.updater.train_state.params
        self.parts.workers.set_params(*self.parts.sync.sync(params))

    def _about_workers(self, watch: watch_lib.Watch) -> dict[str, Any]:
        """What the workers did in this step's rollouts; the timeline is written."""
        if not self.group.is_first:
            return {}
        team = self.parts.workers
        intervals = team.take_intervals()
        workdir.write_timeline(self._directory, self.state.step + 1, intervals)
        row = coordinator.sums(intervals) | {"workers/num_lost": len(team.lost)}
        if not team.lost:
            return row
        lost = ", ".join(f"{worker} ({why})" for worker, why in team.lost.items())
        if len(team.lost) > self._num_lost:
            self._num_lost = len(team.lost)
            watch.note(f"lost workers: {lost}; the others go on.")
        return row | {"workers/lost": lost}

    def _seen(self) -> progress.Workers | None:
        """What the workers do at this moment; None between rollouts."""
        state = self.parts.workers.coordination.state
        if not state.rolling:
            return None
        activities = tuple(str(worker.activity) for worker in state.workers)
        return progress.Workers(activities, self.parts.workers.drafter_version)

    def _write(
        self, row: dict[str, Any], collected: collector.Collected | None = None
    ) -> None:
        """Write a record, and the completions if they are due; sinks get both."""
        if self._writer is None:
            return
        self._writer.write(row)
        every = self.run.log.rollouts_every
        if collected is not None and every and row["step"] % every == 0:
            scores = collected.scores
            records = workdir.write_rollouts(
                self._directory,
                row["step"],
                collected.everything,
                self.parts.tokenizer.decode,
                [one.parts for one in scores.items] if scores.names else (),
            )
            self._writer.samples(row["step"], records)

    def _draw(self) -> None:
        if not self.group.is_first:
            return
        with workdir.writing(self._directory / "plots"):
            plots.draw_all(self._directory)
