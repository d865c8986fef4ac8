"""The RL run: rollout, reward, update, weight sync, step after step, resumable.

Everything a step does is a function of the configuration, the step number and what the
checkpoint holds, so a run that was killed goes on bit for bit.
"""

import contextlib
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from tlt_jax import (
    checkpoint,
    config,
    metrics,
    plots,
    progress,
    sharding,
    workdir,
)
from tlt_jax.models import params as model_params
from tlt_jax.models import source as model_source
from tlt_jax.rl import (
    algorithms,
    clock,
    collector,
    drafting,
    engine_programs,
    evaluator,
    experience,
    learner,
    packing,
    pretrain,
    prompts,
    reward_pool,
    rollout,
    tasks,
    weight_sync,
)
from tlt_jax.specdec import programs, sampling, strategy

SCRATCH = "scratch"
_MAX_SKIPPED_UPDATES = 3


class TrainingError(RuntimeError):
    """The run cannot go on; the message names the cause and the remedy."""


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
      TrainingError: updates are not finite any more.
    """
    directory = pathlib.Path(directory)
    with (
        workdir.claimed(directory, run),
        progress.Progress(run.num_steps, mode=run.log.progress) as display,
        Trainer(run, directory, display) as trainer,
    ):
        return trainer.run_to_end()


class Trainer:
    """The parts of a run, and the state that its steps change."""

    def __init__(
        self,
        run: config.RunConfig,
        directory: pathlib.Path,
        display: progress.Progress,
    ):
        """Load model, task and the newest checkpoint.

        Args:
          run: what to do.
          directory: the workdir; exists.
          display: shows what happens.
        """
        self.run, self.directory, self.display = run, directory, display
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
        with workdir.writing(directory / "tokenizer"):
            self.tokenizer.save(directory / "tokenizer")
        self.algorithm = algorithms.build(
            algorithms.preset(run.algorithm.name) | run.algorithm.overrides()
        )
        self._make_learner()
        self.engine = self._engine(run.sampling.temperature)
        closing.callback(self.engine.pool.close)
        closing.callback(self.learner_pool.close)
        self.sync = weight_sync.WeightSync(
            self.model,
            source=self.learner.mesh,
            target=self.engine.mesh,
            dtype=run.precision,
            pool=self.learner_pool,
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
            self.engine,
            self.rewards,
            self.tokenizer.decode,
            dynamic_sampling=self.algorithm.dynamic_sampling,
            show=self._show,
        )
        self.evaluator: evaluator.Evaluator | None = None
        self.checkpointer = closing.enter_context(
            checkpoint.Checkpointer(directory, run.checkpoint.keep)
        )
        self.step = self.num_skipped = 0
        self._stage = (-1, "")
        self._restore(source)
        self.reference = self._load(source) if self.algorithm.loss.kl_coef > 0 else None
        first_row = self.step + 1 if self.step else 0
        self.writer = closing.enter_context(
            metrics.MetricsWriter(directory, first_row, run.log.tensorboard)
        )

    def __enter__(self) -> "Trainer":
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    def run_to_end(self) -> dict[str, Any]:
        """Take every step that is left; return the last record."""
        self._sync_weights()
        if self.step < self.run.num_steps:
            self.warm_up(wait=False)
        if self.run.eval.every and self.step == 0:
            self.writer.write({"step": 0, **self.evaluate()})
        row: dict[str, Any] = {"step": self.step}
        while self.step < self.run.num_steps:
            row = self.take_step()
        self.display.stage("writing")
        if self.checkpointer.latest_step() != self.step:
            self._save()
        self.checkpointer.wait()
        self._draw()
        return row

    def warm_up(self, *, wait: bool = True) -> None:
        """Compile every program of the steps to come, in the background."""
        self.engine.warm_up(wait=wait)
        run = self.run
        num_prompts = run.rollout.prompts_per_step // run.learner.minibatches
        for width in self.layout.widths:
            blank = experience.filling(width, num_prompts, run.rollout.group_size)
            given, with_reference = blank.logprobs, self.reference is not None
            has_old = run.learner.old_logprobs == "rollout" or self._recomputes
            _, (micro, *_) = experience.micro_batches(
                blank,
                self.layout,
                self.algorithm,
                np.zeros(len(given), np.float32),
                max_new_tokens=run.rollout.max_new_tokens,
                old_logprobs=given if has_old else None,
                ref_logprobs=given if with_reference else None,
            )
            passes = with_reference or self._recomputes
            self.learner.prepare(micro, self.algorithm.loss, with_logprobs=passes)
        if wait:
            self.learner_pool.wait()

    @property
    def _recomputes(self) -> bool:
        """Whether old log-probabilities take a pass: with one update none is due."""
        cfg = self.run.learner
        return cfg.old_logprobs == "recompute" and cfg.epochs * cfg.minibatches > 1

    def take_step(self) -> dict[str, Any]:
        """Collect, update, sync; write the record and what else is due."""
        run = self.run
        timer = clock.Clock((self.engine.pool, self.learner_pool))
        started = time.perf_counter()
        everything, batch, row = self.collector.collect(self.step, timer)
        if row["reward/num_failed"]:
            self.display.note(
                f"  step {self.step + 1}: {row['reward/num_failed']} rewards failed, "
                f"the first: {row['reward/first_failure']}"
            )
        if self.learner.mesh.devices.flat[0].platform != "cpu":
            # The update needs the memory, and a new cache costs nothing there.
            self.engine.release_cache()
        if batch is not None:
            row |= self._update(batch, timer)
            self.display.stage("sync")
            timer.time("sync", self._sync_weights)
        self.step += 1
        if run.eval.every and self.step % run.eval.every == 0:
            row |= timer.time("eval", self.evaluate)
        row = _absent() | {"step": self.step} | row | timer.row()
        if "specdec/num_accepted" in row:
            counts = row["specdec/num_accepted"]
            row["specdec/accept_length"] = rollout.accept_length(counts)
            row["specdec/accept_rate_by_depth"] = rollout.accept_rates(counts)
        row["time/step_s"] = time.perf_counter() - started
        seconds = max(row["time/rollout_s"], 1e-9)
        row["rollout/tokens_per_s"] = row["rollout/tokens"] / seconds
        self.writer.write(row)
        if run.log.rollouts_every and self.step % run.log.rollouts_every == 0:
            workdir.write_rollouts(
                self.directory, self.step, everything, self.tokenizer.decode
            )
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
            self.evaluator = evaluator.Evaluator(
                self.run,
                self._prompts("eval"),
                self.engine if same else self._engine(temperature),
                self.rewards,
                self.tokenizer.decode,
            )
        return self.evaluator.evaluate(self.engine.params, self.engine.version)

    def _update(
        self, batch: experience.Experience, timer: clock.Clock
    ) -> dict[str, Any]:
        """Train on the groups of a step; return `policy/` and `mismatch/` values."""
        run = self.run
        self.display.stage("inference")
        old_logprobs = reference = None
        if self.reference is not None:
            reference = timer.time("inference", self._logprobs, self.reference, batch)
        if self._recomputes:
            old_logprobs = timer.time(
                "inference", self._logprobs, self.state.params, batch
            )
        elif run.learner.old_logprobs == "rollout":
            old_logprobs = batch.logprobs
        advantages_n = experience.advantages_of(
            batch, self.algorithm, run.rollout.max_new_tokens, reference
        )
        self.display.stage("update")
        records, mismatch = [], None
        num_groups = len(batch.prompts)
        parts = np.array_split(
            np.arange(num_groups), min(run.learner.minibatches, num_groups)
        )
        for _ in range(run.learner.epochs):
            for chosen in parts:
                rows = _rows_of(chosen, batch.group_size)
                part = batch.select(chosen.tolist())
                packed, micro = experience.micro_batches(
                    part,
                    self.layout,
                    self.algorithm,
                    advantages_n[rows],
                    max_new_tokens=run.rollout.max_new_tokens,
                    old_logprobs=_take(old_logprobs, rows),
                    ref_logprobs=_take(reference, rows),
                )
                self.state, record, trained = timer.time(
                    "update",
                    self.learner.update,
                    self.state,
                    micro,
                    self.algorithm.loss,
                )
                if mismatch is None:
                    mismatch = experience.max_mismatch(part, packed, trained)
                records.append(record)
                self._check_skipped(record)
        row = {
            name: float(np.mean([record[name] for record in records]))
            for name in records[0]
        }
        return row | {"mismatch/logprob_max_abs": mismatch}

    def _logprobs(
        self, params: model_params.Params, batch: experience.Experience
    ) -> list[np.ndarray]:
        """Log-probabilities of a batch's completions by the trainer's own forward."""
        parts = self.layout.pack(batch)
        return packing.scatter(parts, self.learner.logprobs(params, parts))

    def _check_skipped(self, record: dict[str, float]) -> None:
        if not record["policy/update_skipped"]:
            self.num_skipped = 0
            return
        self.num_skipped += 1
        self.display.note(
            f"  step {self.step + 1}: loss or gradient is not finite; update skipped "
            f"({self.num_skipped} in a row)."
        )
        if self.num_skipped >= _MAX_SKIPPED_UPDATES:
            self.checkpointer.wait()
            newest = self.checkpointer.latest_step()
            raise TrainingError(
                f"{self.num_skipped} updates in a row were not finite (step "
                f"{self.step + 1}): lower optimizer.learning_rate or check the rewards "
                "and the weights, and begin again in another --workdir. "
                + (
                    "There is no checkpoint yet."
                    if newest is None
                    else f"The newest checkpoint is that of step {newest}; exported "
                    "(tlt_jax.export) it is a model to begin from."
                )
            )

    def _sync_weights(self) -> None:
        self.engine.set_params(*self.sync.sync(self.state.params))

    def _show(self, stage: str, done: int, total: int, detail: str) -> None:
        if self._stage != (self.step, stage):
            self._stage = (self.step, stage)
            self.display.stage(stage)
        self.display.within(done, total, detail)

    def _draw(self) -> None:
        with workdir.writing(self.directory / "plots"):
            plots.draw_all(self.directory)

    def _make_learner(self) -> None:
        run = self.run
        mesh = sharding.make_mesh(run.mesh.data, run.mesh.fsdp, run.mesh.tensor)
        self.learner_pool = programs.ProgramPool()
        self.learner = learner.Learner(
            self.model, run, mesh=mesh, pool=self.learner_pool
        )
        self.layout = experience.Layout(
            run.learner.row_tokens, self.learner.rows_per_micro_batch
        )

    def _engine(self, temperature: float) -> rollout.Engine:
        run = self.run
        law = sampling.SamplingConfig(
            temperature, run.sampling.top_k, run.sampling.top_p, run.sampling.min_p
        )
        engine_cfg = engine_programs.EngineConfig(
            max_rows=run.rollout.max_batch,
            max_length=run.task.max_prompt_tokens + run.rollout.max_new_tokens,
            page_size=run.cache.page_size,
            num_pages=run.cache.num_pages,
            steps_per_call=run.rollout.steps_per_call,
            prefill_chunk=run.rollout.prefill_chunk,
            sampling_cfg=law,
            eos_ids=tuple(sorted({*self.model.eos_ids, *self.tokenizer.eos_ids})),
            stop=run.rollout.stop,
            dtype=run.precision,
            cpu_kernels=run.rollout.cpu_kernels,
        )
        drafting_cfg = None
        if run.specdec.mode == "ngram":
            table = strategy.parse_table(run.specdec.strategies)
            drafting_cfg = drafting.DraftingConfig(table)
        return rollout.Engine(
            self.model,
            engine_cfg,
            drafting_cfg=drafting_cfg,
            decode_text=self.tokenizer.decode,
            mesh=weight_sync.engine_mesh(self.learner.mesh),
        )

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
        pretrain.make(
            self.run,
            self.task,
            directory,
            lambda done, total, loss: self.display.within(
                done, total, f"loss {loss:.3f}"
            ),
        )
        return model_source.resolve(str(directory))

    def _load(self, source: model_source.ModelSource) -> model_params.Params:
        shardings = jax.tree.map(
            lambda leaf: leaf.sharding, self.learner.abstract_state().params
        )
        return source.load("float32", shardings)

    def _restore(self, source: model_source.ModelSource) -> None:
        """Take up the newest checkpoint, or start from the source's weights."""
        target = self.learner.abstract_state()
        restored = self.checkpointer.restore_latest(
            target.params, (target.opt_state, target.num_updates)
        )
        if restored is None:
            self.state = self.learner.init_state(self._load(source))
            return
        opt_state, num_updates = restored.opt_state
        self.state = learner.TrainState(restored.params, opt_state, num_updates)
        self.step = restored.step
        self.sync.restore_version(self.step)
        self.num_skipped = restored.meta["num_skipped"]
        self.collector.position = restored.meta["position"]
        self.collector.expected_lengths = {
            int(key): value for key, value in restored.meta["expected_lengths"].items()
        }
        self.display.resume(self.step)

    def _save(self) -> None:
        self.checkpointer.save(
            self.step,
            self.state.params,
            (self.state.opt_state, self.state.num_updates),
            self.model,
            {
                "config": config.digest(self.run),
                "num_skipped": self.num_skipped,
                "position": self.collector.position,
                "expected_lengths": self.collector.expected_lengths,
            },
        )


def _absent() -> dict[str, Any]:
    """Return a record of all names, with what holds where nothing else is known.

    That is: no speculation, no idle workers, and no update (of a step in which no group
    carried signal).
    """
    return dict.fromkeys(sorted(metrics.NAMES)) | {
        "specdec/accept_length": 1.0,
        "specdec/accept_rate_by_depth": [],
        "specdec/strategy": "none",
        "workers/idle_s": 0.0,
        "workers/trained_s": 0.0,
        "workers/idle_frac": 0.0,
    }


def _rows_of(groups: np.ndarray, group_size: int) -> np.ndarray:
    """Indices of the completions of `groups`."""
    return (groups[:, None] * group_size + np.arange(group_size)).reshape(-1)


def _take(values: Sequence[np.ndarray] | None, indices: np.ndarray):
    return None if values is None else [values[i] for i in indices]
