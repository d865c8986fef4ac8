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
from tlt_jax.models import params as model_params
from tlt_jax.models.formats import source as model_source
from tlt_jax.rl import collector, evaluator
from tlt_jax.rl.adaptation import adaptation
from tlt_jax.rl.engine import engine as engine_lib
from tlt_jax.rl.engine import stats as rollout_stats
from tlt_jax.rl.tasks import build as tasks
from tlt_jax.rl.tasks import prompts, reward_pool, scratch_model
from tlt_jax.rl.update import experience, updater
from tlt_jax.rl.workers import coordinator, weight_sync, workers
from tlt_jax.runtime import clock, distributed, failures, programs, train_state
from tlt_jax.viz import plots
from tlt_jax.workdir import (
    checkpoint,
    drafter_checkpoint,
    metrics,
    progress,
    step_record,
    wandb_log,
)
from tlt_jax.workdir import directory as workdir

SCRATCH = "scratch"


def train(run: config.RunConfig, directory: str | pathlib.Path) -> dict[str, Any]:
    """Train until `run.num_steps`, from the newest checkpoint of the directory if any.

    Args:
      run: what to do.
      directory: the workdir; holds everything the run writes.

    Returns:
      The last step's record.

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
            return trainer.run_to_end()
        except jax.errors.JaxRuntimeError as error:
            group.explain(error)
            raise


class Trainer:
    """The parts of a run, and the state that its steps change."""

    def __init__(
        self,
        run: config.RunConfig,
        directory: pathlib.Path,
        display: progress.Progress,
        group: distributed.Group | None = None,
    ):
        """Load model, task and the newest checkpoint.

        Args:
          run: what to do.
          directory: the workdir; exists.
          display: shows what happens.
          group: the processes that do this together; the first of them writes. None:
            this one is alone.
        """
        self.run, self.directory, self.display = run, directory, display
        self.group = group or distributed.alone()
        with contextlib.ExitStack() as closing:
            self._start(closing)
            self._closing = closing.pop_all()

    def _start(self, closing: contextlib.ExitStack) -> None:
        """Make the parts; what holds processes or files is closed by `closing`."""
        run, directory = self.run, self.directory
        self.display.stage("loading")
        self.task = tasks.build(
            run.task, reward=run.reward.function, eval_size=run.eval.num_prompts
        )
        source = self._source()
        self.model = source.config
        self.tokenizer = source.tokenizer()
        if self.group.is_first:
            with workdir.writing(directory / "tokenizer"):
                self.tokenizer.save(directory / "tokenizer")
        self.updater = updater.Updater(
            run, self.model, self.display.stage, self._note_in_step
        )
        closing.callback(self.updater.pool.close)
        mesh = self.updater.learner.mesh
        meshes = weight_sync.engine_meshes(mesh, run.workers.num, run.rollout.tensor)
        self.speculation = assembly.make_speculation(run, self.model)
        self.workers = self._make_workers(meshes)
        self.display.watch(self._seen)
        self.adaptation = self._make_adaptation()
        if self.adaptation is not None:
            closing.callback(self.adaptation.close)
        closing.callback(self.workers.close)
        self.sync = weight_sync.WeightSync(
            self.model,
            source=mesh,
            targets=meshes,
            dtype=run.precision,
            pool=self.updater.pool,
        )
        self.rewards = closing.enter_context(
            reward_pool.RewardPool(
                self.task.score,
                run.reward.workers,
                run.reward.timeout_s,
                failure_reward=run.reward.failure_reward,
            )
        )
        self.collector = collector.Collector(
            run,
            self._prompts("train"),
            self.workers,
            self.rewards,
            self.tokenizer.decode,
            dynamic_sampling=self.updater.algorithm.dynamic_sampling,
            show=self._show,
            between=self.adaptation and self.adaptation.hand_over,
            group=self.group,
        )
        self.evaluator: evaluator.Evaluator | None = None
        self.checkpointer = closing.enter_context(
            checkpoint.Checkpointer(directory, run.checkpoint.keep)
        )
        self.drafter_store: drafter_checkpoint.DrafterStore | None = None
        if self.adaptation is not None:
            self.drafter_store = closing.enter_context(
                drafter_checkpoint.DrafterStore(
                    self.adaptation,
                    directory,
                    run.checkpoint.drafter,
                    run.checkpoint.keep + 1,
                    self.group,
                    self.display.note,
                )
            )
        self.step = 0
        self.num_lost = 0
        self._stage = (-1, "")
        self._restore(source)
        if self.updater.needs_reference:
            self.updater.reference = self._load(source)
        self.writer: metrics.MetricsWriter | None = None
        if self.group.is_first:
            first = self.step + 1 if self.step else 0
            opened = wandb_log.open_writer(directory, first, run)
            self.writer = closing.enter_context(opened)

    def __enter__(self) -> "Trainer":
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    def run_to_end(self) -> dict[str, Any]:
        """Take every step that is left; return the last record."""
        self.begin()
        if self.run.eval.every and self.step == 0:
            self._write({"step": 0, **self.evaluate()})
        row: dict[str, Any] = {"step": self.step}
        while self.step < self.run.num_steps:
            row = self.take_step()
        self.display.stage("writing")
        if self.checkpointer.latest_step() != self.step:
            self._save()
        self.checkpointer.wait()
        if self.drafter_store is not None:
            self.drafter_store.wait()
        self._draw()
        return row

    def begin(self) -> None:
        """Give the workers their weights, and compile what the steps need."""
        self._sync_weights()
        if self.adaptation is not None:
            self.adaptation.start()
        if self.step < self.run.num_steps:
            # Beside a training drafter compilers would take several times as long.
            self.display.stage("compiling")
            self.warm_up(wait=self.adaptation is not None)
            # No rollout's time shall hold what another process compiles.
            self.group.exchange("ready", None)

    def warm_up(self, *, wait: bool = True) -> None:
        """Compile every program of the steps to come, in the background."""
        self.workers.warm_up(wait=wait)
        self.updater.warm_up(wait=wait)
        if self.adaptation is not None:
            self.adaptation.warm_up(wait=wait)

    @property
    def _pools(self) -> list[programs.ProgramPool]:
        """Of programs that a step may wait for."""
        return [self.updater.pool, *(e.pool for e in self.workers.engines)]

    def take_step(self) -> dict[str, Any]:
        """Collect, update, sync; write the record and what else is due."""
        run = self.run
        timer = clock.Clock(self._pools)
        started = time.perf_counter()
        if self.adaptation is not None:
            self.adaptation.begin_rollout()
        everything, batch, row = self.collector.collect(self.step, timer)
        if self.adaptation is not None:
            accepted = row.get("specdec/num_accepted", ())
            timer.time(
                "drafter",
                self.adaptation.end_rollout,
                rollout_stats.accept_length(accepted),
                timer.spent["rollout"],
            )
            row |= self.adaptation.row()
        row |= self._about_workers()
        if row["reward/num_failed"]:
            self.display.note(
                f"  step {self.step + 1}: {row['reward/num_failed']} rewards failed, "
                f"the first: {row['reward/first_failure']}"
            )
        if self.updater.learner.mesh.devices.flat[0].platform != "cpu":
            # The update needs the memory, and a new cache costs nothing there.
            self.workers.release_caches()
        if batch is not None:
            row |= self._update(batch, timer)
            self.display.stage("sync")
            timer.time("sync", self._sync_weights)
        self.step += 1
        if run.eval.every and self.step % run.eval.every == 0:
            row |= timer.time("eval", self.evaluate)
        elapsed_s = time.perf_counter() - started
        row = step_record.complete(row, self.step, timer.row(), elapsed_s)
        self._write(row, everything)
        self.display.step(row)
        if run.checkpoint.every and self.step % run.checkpoint.every == 0:
            self._save()
        if run.log.plots_every and self.step % run.log.plots_every == 0:
            self._draw()
        return row

    def evaluate(self) -> dict[str, float]:
        """Judge completions of held-out prompts: `eval/avg@n` and `eval/pass@k`."""
        self.display.stage("evaluation")
        if self.evaluator is None:
            temperature = self.run.eval.temperature
            if temperature is None:
                temperature = self.run.sampling.temperature
            # The same law has the same programs.
            same = temperature == self.run.sampling.temperature
            engines = self.workers.engines
            self.evaluator = evaluator.Evaluator(
                self.run,
                self._prompts("eval"),
                engines if same else self._evaluation_engines(temperature),
                self.rewards,
                self.tokenizer.decode,
                self.group,
            )
        used = self.workers
        # Only the first process knows of all that are lost.
        lost = self.group.first("lost workers", lambda: frozenset(used.lost))
        params = [
            None if number in lost else engine.params
            for number, engine in enumerate(used.engines, used.first)
        ]
        return self.evaluator.evaluate(params, used.version)

    def _update(
        self, batch: experience.Experience, timer: clock.Clock
    ) -> dict[str, Any]:
        """Train on the groups of a step; return its record."""
        try:
            return self.updater.update(batch, timer)
        except failures.TrainingError as error:
            self.checkpointer.wait()
            newest = self.checkpointer.latest_step()
            raise failures.TrainingError(
                f"{error} (step {self.step + 1}): lower optimizer.learning_rate or "
                "check the rewards and the weights, and begin again in another "
                "--workdir. "
                + (
                    "There is no checkpoint yet."
                    if newest is None
                    else f"The newest checkpoint is that of step {newest}; exported "
                    "(tlt_jax.export) it is a model to begin from."
                )
            ) from error

    def _write(
        self, row: dict[str, Any], everything: experience.Experience | None = None
    ) -> None:
        """Write a record, and the completions if they are due."""
        if self.writer is None:
            return
        self.writer.write(row)
        every = self.run.log.rollouts_every
        if everything is not None and every and self.step % every == 0:
            workdir.write_rollouts(
                self.directory, self.step, everything, self.tokenizer.decode
            )

    def _about_workers(self) -> dict[str, Any]:
        """What the workers did in this step's rollouts; the timeline is written."""
        if not self.group.is_first:
            return {}
        intervals = self.workers.take_intervals()
        workdir.write_timeline(self.directory, self.step + 1, intervals)
        row = coordinator.sums(intervals)
        row["workers/num_lost"] = len(self.workers.lost)
        lost = [f"{worker} ({why})" for worker, why in self.workers.lost.items()]
        if len(lost) > self.num_lost:
            self.num_lost = len(lost)
            self._note_in_step(f"lost workers: {', '.join(lost)}; the others go on.")
        return row | ({"workers/lost": ", ".join(lost)} if lost else {})

    def _note_in_step(self, text: str) -> None:
        self.display.note(f"  step {self.step + 1}: {text}")

    def _sync_weights(self) -> None:
        self.workers.set_params(*self.sync.sync(self.updater.state.params))

    def _show(self, stage: str, done: int, total: int, detail: str) -> None:
        if self._stage != (self.step, stage):
            self._stage = (self.step, stage)
            self.display.stage(stage)
        self.display.within(done, total, detail)

    def _seen(self) -> progress.Workers | None:
        """What the workers do at this moment; None between rollouts."""
        state = self.workers.coordination.state
        if not state.rolling:
            return None
        activities = tuple(str(worker.activity) for worker in state.workers)
        return progress.Workers(activities, self.workers.drafter_version)

    def _draw(self) -> None:
        if not self.group.is_first:
            return
        with workdir.writing(self.directory / "plots"):
            plots.draw_all(self.directory)

    def _make_workers(self, meshes: list[jax.sharding.Mesh]) -> workers.Workers:
        made = self.speculation
        return assembly.make_workers(
            self.run, self.model, self.tokenizer, meshes, made, self.group
        )

    def _make_adaptation(self) -> adaptation.Adaptation | None:
        run, made = self.run, self.speculation
        if run.specdec.mode != "tlt":
            return None
        directory = self.directory
        if not self.group.is_first:
            directory /= f"processes/{self.group.index}"
        return adaptation.Adaptation(
            run.adaptation,
            made.drafting_cfg.drafter_cfg,
            self.workers,
            made.tuners,
            initial=made.initial,
            eos_ids=sorted({*self.model.eos_ids, *self.tokenizer.eos_ids}),
            sampling_cfg=assembly.law_of(run, run.sampling.temperature),
            precision=run.precision,
            seed=run.seed,
            directory=directory,
            note=self.display.note,
        )

    def _evaluation_engines(self, temperature: float) -> list[engine_lib.Engine]:
        """Engines of another law, one beside each worker's."""
        return [
            assembly.make_engine(
                self.run,
                self.model,
                self.tokenizer,
                worker.mesh,
                temperature,
                assembly.Speculation(),
            )
            for worker in self.workers.engines
        ]

    def _prompts(self, split: str) -> prompts.PromptSet:
        made = prompts.PromptSet(
            self.task.examples(split),
            lambda example: self.tokenizer.encode_prompt(example.prompt),
            max_tokens=self.run.task.max_prompt_tokens,
            long_prompts=self.run.task.long_prompts,
        )
        if made.num_skipped:
            self.display.note(
                f"{made.num_skipped} prompts ({split}) are longer than "
                f"task.max_prompt_tokens={self.run.task.max_prompt_tokens}: left out, "
                f"{len(made.prompts)} remain."
            )
        return made

    def _source(self) -> model_source.ModelSource:
        if self.run.model.spec != SCRATCH:
            return model_source.resolve(self.run.model.spec)
        directory = self.directory / "initial_model"
        self.display.stage("making the model")

        def show(done, total, loss):
            self.display.within(done, total, f"loss {loss:.3f}")

        run = self.run
        settings = scratch_model.Settings(
            run.seed, run.pretrain, run.task, run.rollout.max_new_tokens
        )
        self.group.first(
            "model", lambda: scratch_model.make(settings, self.task, directory, show)
        )
        return model_source.resolve(str(directory))

    def _load(self, source: model_source.ModelSource) -> model_params.Params:
        shardings = jax.tree.map(
            lambda leaf: leaf.sharding, self.updater.learner.abstract_state().params
        )
        return source.load("float32", shardings)

    def _restore(self, source: model_source.ModelSource) -> None:
        """Take up the newest checkpoint, or start from the source's weights."""
        target = self.updater.learner.abstract_state()
        restored = self.checkpointer.restore_latest(
            target.params, (target.opt_state, target.num_updates)
        )
        if restored is None:
            self.updater.state = self.updater.learner.init_state(self._load(source))
            return
        opt_state, num_updates = restored.opt_state
        self.updater.state = train_state.TrainState(
            restored.params, opt_state, num_updates
        )
        self.step, meta = restored.step, restored.meta
        self.sync.restore_version(self.step)
        self.updater.skips.in_a_row = meta["num_skipped"]
        self.collector.position = meta["position"]
        self.collector.expected_lengths = {
            int(key): value for key, value in meta["expected_lengths"].items()
        }
        for tuner, state in zip(self.speculation.tuners, meta["tuners"], strict=True):
            tuner.restore(state)
        if self.drafter_store is not None:
            self.drafter_store.restore(self.step)
        self.display.resume(self.step)

    def _save(self) -> None:
        state = self.updater.state
        if self.drafter_store is not None:
            # Before the policy's: every one of those finds a drafter's of its step.
            self.drafter_store.save(self.step)
        self.checkpointer.save(
            self.step,
            state.params,
            (state.opt_state, state.num_updates),
            self.model,
            {
                "config": config.digest(self.run),
                "num_skipped": self.updater.skips.in_a_row,
                "position": self.collector.position,
                "expected_lengths": self.collector.expected_lengths,
                "tuners": [tuner.state() for tuner in self.speculation.tuners],
            },
        )
