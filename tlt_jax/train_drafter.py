"""Train a drafter: `python -m tlt_jax.train_drafter --config=FILE --workdir=DIR`.

The target answers prompts, its features are kept, the drafter learns from them, and is
written to `DIR/drafter`. The same command on the same directory resumes at any stage.
"""

import contextlib
import dataclasses
import functools
import itertools
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags, logging

from tlt_jax import config, policy
from tlt_jax.models.drafters import drafter
from tlt_jax.models.drafters import head as drafter_head
from tlt_jax.models.drafters import io as drafter_io
from tlt_jax.rl.adaptation import offline_texts
from tlt_jax.rl.tasks import build as tasks
from tlt_jax.rl.tasks import scratch_model
from tlt_jax.rl.update import learner
from tlt_jax.runtime import command_line, compile_cache, failures, host_memory
from tlt_jax.settings import drafter_run, sections
from tlt_jax.specdec.texts import shards
from tlt_jax.specdec.training import acceptance, unroll
from tlt_jax.specdec.training import step as drafter_training
from tlt_jax.viz import drafter_plots
from tlt_jax.workdir import checkpoint, metrics, progress
from tlt_jax.workdir import directory as workdir

SCRATCH = "scratch"
_MAX_SKIPPED = 10


def train(run: drafter_run.DrafterRun, directory: str | pathlib.Path) -> dict:
    """Do what is left of a run.

    Args:
      run: what to do.
      directory: the workdir; holds everything the run writes.

    Returns:
      The last measurement's record.

    Raises:
      schema.ConfigError: the directory holds a run with other settings.
      workdir.WorkdirError: it cannot be written, or another process works there.
      failures.TrainingError: updates are not finite any more.
    """
    directory = pathlib.Path(directory)
    with (
        workdir.claimed(directory, run, drafter_run.load),
        progress.Progress(run.num_steps, mode=run.log.progress) as display,
        contextlib.ExitStack() as closing,
    ):
        return _Trainer(run, directory, display, closing).run_to_end()


class _Trainer:
    """The parts of a run, and the state that its steps change."""

    def __init__(self, run, directory, display, closing):
        self.run, self.directory, self.display = run, directory, display
        self.seconds: dict[str, float] = {}
        with self._stage("load"):
            self.policy = self._target()
        with self._stage("texts"):
            self.buffer = self._texts()
        ids = np.array(self.buffer.text_ids)
        self.train_texts = np.flatnonzero(ids < offline_texts.HELD_OUT)
        self.held_out = np.flatnonzero(ids >= offline_texts.HELD_OUT)
        if not self._plan(0):
            raise ValueError(
                "no text has a position to draft from: raise texts.max_new_tokens or "
                "batch.row_tokens."
            )
        self._make_programs()
        self.checkpointer = closing.enter_context(
            checkpoint.Checkpointer(directory, run.checkpoint.keep)
        )
        self.step = self.num_skipped = 0
        self.sharpness: float | None = None
        self._restore()
        first_row = self.step + 1 if self.step else 0
        self.writer = closing.enter_context(
            metrics.MetricsWriter(directory, first_row, tensorboard=False)
        )

    def run_to_end(self) -> dict[str, Any]:
        """Take every step that is left, measure, export; return the last record."""
        run = self.run
        row: dict[str, Any] = {"step": self.step}
        if self.step == 0:
            row |= self._about_texts() | self._measure()
            self.writer.write(row)
        self.display.stage("training")
        pending = None
        started = time.perf_counter()
        for batch in itertools.islice(
            self._batches(self.step), run.num_steps - self.step
        ):
            self.state, outcome = self._step(self.state, batch, self.target)
            self.step += 1
            # The row of the step before: fetching this one would wait for the device.
            self._check_skipped(pending)
            pending = outcome
            due = run.eval.every and self.step % run.eval.every == 0
            last = self.step == run.num_steps
            if due or last or self.step % run.log.every == 0:
                row = {"step": self.step} | self._row(outcome)
                taken = self.step % run.log.every or run.log.every
                row["time/step_s"] = (time.perf_counter() - started) / taken
                if due or last:
                    row |= self._measure()
                self.writer.write(row)
                self._show(row)
                started = time.perf_counter()
            if run.checkpoint.every and self.step % run.checkpoint.every == 0:
                self._save()
        self.display.stage("writing")
        if self.checkpointer.latest_step() != self.step:
            self._save()
        self.checkpointer.wait()
        self._export()
        with workdir.writing(self.directory / "plots"):
            drafter_plots.draw(self.directory)
        return row

    @contextlib.contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        self.display.stage(name)
        started = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - started
        self.display.note(f"{name}: {self.seconds[name]:.1f} s")

    def _target(self) -> policy.Policy:
        run, spec = self.run, self.run.model.spec
        if spec == SCRATCH:
            spec = str(self.directory / "target")
            name = run.texts.tasks[0]
            settings = config.RunConfig(
                seed=run.seed,
                model=run.model,
                pretrain=run.pretrain,
                task=sections.Task(
                    name=name,
                    size=run.texts.num,
                    seed=run.texts.seed,
                    max_prompt_tokens=run.texts.max_prompt_tokens,
                ),
                rollout=sections.Rollout(max_new_tokens=run.texts.max_new_tokens),
            )
            scratch_model.make(settings, tasks.build(settings.task), spec)
        return policy.load(spec, run.precision)

    def _texts(self) -> shards.HiddenBuffer:
        run, target = self.run, self.policy
        self.feature_layers = run.drafter.feature_layers
        if run.drafter.features == "low_mid_high":
            published = run.drafter.architecture == "eagle3"
            choose = drafter.published_layers if published else drafter.low_mid_high
            self.feature_layers = choose(target.config.num_layers)
        with workdir.writing(self.directory / "texts"):
            offline_texts.claim(
                self.directory / "texts",
                {
                    "target": drafter.identify(target.config),
                    "model": run.model.spec,
                    "seed": run.seed,
                    "precision": run.precision,
                    "texts": dataclasses.asdict(run.texts),
                    "feature_layers": self.feature_layers,
                },
            )
        buffer = shards.HiddenBuffer(self.directory / "texts", run.texts.dtype)
        asked = offline_texts.ask(
            run.texts, lambda example: target.tokenizer.encode_prompt(example.prompt)
        )
        started = time.perf_counter()

        def show(done, total, num_tokens):
            speed = num_tokens / (time.perf_counter() - started)
            self.display.within(done, total, f"{speed:.0f} tokens/s")

        with workdir.writing(self.directory / "texts"):
            offline_texts.write(
                target,
                asked,
                buffer,
                settings=run.texts,
                feature_layers=self.feature_layers,
                seed=run.seed,
                on_progress=show,
            )
        return buffer

    def _make_programs(self) -> None:
        run = self.run
        preset = drafter_training.objective(run.objective.name)
        self.objective = dataclasses.replace(preset, **run.objective.overrides())
        self.cfg = drafter.of_target(
            self.policy.config,
            feature_layers=self.feature_layers,
            output_norm=not self.objective.feature_weight,
            draft_vocab_size=run.drafter.draft_vocab_size,
            max_length=min(
                run.batch.row_tokens,
                run.texts.max_prompt_tokens + run.texts.max_new_tokens,
            ),
            architecture=run.drafter.architecture,
        )
        self.draft_ids = None
        if run.drafter.draft_vocab_size:
            parts = [self.buffer.read(i) for i in self.train_texts]
            chosen = drafter_training.draft_vocabulary(
                np.concatenate([r.tokens[r.response_start :] for r in parts]),
                run.drafter.draft_vocab_size,
                self.policy.config.vocab_size,
                self.policy.eos_ids,
            )
            self.draft_ids = jnp.asarray(chosen)
        weights = self.policy.params
        self.target = unroll.Target(
            embed=weights.embed,
            head=drafter_head.head_rows(weights, self.draft_ids),
            draft_ids=self.draft_ids,
        )
        forward = unroll.ForwardConfig(
            self.cfg,
            dtype=jnp.dtype(run.precision),
            head_chunk=run.batch.head_chunk,
            remat=run.batch.remat,
        )
        self.optimizer = learner.make_optimizer(
            run.optimizer, num_steps=run.num_steps, updates_per_step=1
        )
        self._step = jax.jit(
            functools.partial(
                drafter_training.step,
                cfg=forward,
                objective=self.objective,
                optimizer=self.optimizer,
            ),
            donate_argnums=0,
        )
        self._sums = jax.jit(
            functools.partial(acceptance.measure, num_steps=run.eval.depth, cfg=forward)
        )

    def _init_state(self) -> drafter_training.TrainState:
        params = drafter.init(self.cfg, jax.random.key(self.run.seed))
        if params.norm is not None:
            # The head is made for features of this scale.
            params = params.replace(
                norm=self.policy.params.final_norm.astype("float32")
            )
        return drafter_training.TrainState(
            params, self.optimizer.init(params), jnp.int32(0)
        )

    def _plan(self, epoch: int | None) -> list[list[list[shards.Span]]]:
        """Batches of an epoch, or of the held-out texts."""
        batch = self.run.batch
        return shards.plan(
            self.buffer,
            self.held_out if epoch is None else self.train_texts,
            row_tokens=batch.row_tokens,
            row_bases=batch.row_bases,
            num_rows=batch.num_rows,
            seed=None if epoch is None else (self.run.seed, epoch),
        )

    def _lay_out(self, rows) -> unroll.Batch:
        batch = self.run.batch
        return shards.lay_out(
            self.buffer,
            rows,
            row_tokens=batch.row_tokens,
            row_bases=batch.row_bases,
        )

    def _batches(self, first: int) -> Iterator[unroll.Batch]:
        """Batches from the `first` on: a function of the seed and the texts alone."""
        for epoch in itertools.count():
            plan = self._plan(epoch)
            for rows in plan[first:]:
                yield self._lay_out(rows)
            first = max(first - len(plan), 0)

    def _measure(self) -> dict[str, Any]:
        self.display.stage("measuring")
        total = None
        for rows in self._plan(None):
            sums = self._sums(self.state.params, self._lay_out(rows), self.target)
            total = sums if total is None else jax.tree.map(jnp.add, total, sums)
        self.display.stage("training")
        found = acceptance.summarise(jax.device_get(total))
        self.sharpness = found["sharpness"]
        return {f"eval/{name.replace('/', '_')}": x for name, x in found.items()}

    def _about_texts(self) -> dict[str, Any]:
        lengths, starts = self.buffer.lengths, self.buffer.response_starts
        here = self.train_texts
        drawn = int((lengths - starts)[here].sum())
        row = {"texts/num": len(here), "texts/response_tokens": drawn}
        if self.draft_ids is not None:
            held = [self.buffer.read(i) for i in self.held_out]
            tokens = np.concatenate([r.tokens[r.response_start :] for r in held])
            row["texts/draft_vocab_coverage"] = float(
                np.isin(tokens, self.draft_ids).mean()
            )
        return row | {f"time/{name}_s": s for name, s in self.seconds.items()}

    def _row(self, outcome: dict[str, jax.Array]) -> dict[str, Any]:
        values = jax.device_get(outcome)
        row = {
            "drafter/loss": float(values["loss"]),
            "drafter/grad_norm": float(values["grad_norm"]),
            "drafter/update_skipped": int(values["skipped"]),
        }
        for name in ("token_loss", "feature_loss", "top1_acc", "top1_prob", "overlap"):
            row[f"drafter/{name}"] = values[name].tolist()
        row["drafter/num_predictions"] = int(values["count"].sum())
        return row

    def _check_skipped(self, outcome: dict[str, jax.Array] | None) -> None:
        if outcome is None:
            return
        self.num_skipped = self.num_skipped + 1 if int(outcome["skipped"]) else 0
        if self.num_skipped >= _MAX_SKIPPED:
            raise failures.TrainingError(
                f"{self.num_skipped} updates in a row were not finite (step "
                f"{self.step}): lower optimizer.learning_rate and begin again in "
                "another --workdir; the directory texts/ can be moved there."
            )

    def _show(self, row: dict[str, Any]) -> None:
        accuracy = " ".join(f"{x:.2f}" for x in row["drafter/top1_acc"])
        text = f"step {row['step']}: loss {row['drafter/loss']:.3f}, top-1 {accuracy}"
        if "eval/coupled_accept_length" in row:
            text += (
                f", held out: accept length {row['eval/coupled_accept_length']:.2f} "
                f"coupled, {row['eval/deterministic_accept_length']:.2f} deterministic"
            )
        self.display.note(f"{text}, {row['time/step_s']:.2f} s a step")

    def _restore(self) -> None:
        state = jax.jit(self._init_state)()
        restored = self.checkpointer.restore_latest(
            state.params, (state.opt_state, state.num_updates)
        )
        if restored is None:
            self.state = state
            return
        opt_state, num_updates = restored.opt_state
        self.state = drafter_training.TrainState(
            restored.params, opt_state, num_updates
        )
        self.step = restored.step
        self.num_skipped = restored.meta["num_skipped"]
        self.display.resume(self.step)

    def _save(self) -> None:
        self.checkpointer.save(
            self.step,
            self.state.params,
            (self.state.opt_state, self.state.num_updates),
            self.cfg,
            {"num_skipped": self.num_skipped},
        )

    def _export(self) -> None:
        if self.sharpness is None:
            self._measure()
        with workdir.writing(self.directory / "drafter"):
            drafter_io.save(
                self.directory / "drafter",
                self.state.params.replace(
                    draft_ids=self.draft_ids, sharpness=jnp.float32(self.sharpness)
                ),
                self.cfg,
                {
                    "target": self.policy.identity,
                    "num_steps": self.step,
                    "objective": dataclasses.asdict(self.objective),
                },
            )


def main(run: drafter_run.DrafterRun) -> None:
    """Run one configuration; what a user can mend is one line, not a traceback."""
    host_memory.keep_freed()
    compile_cache.enable()
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
    try:
        train(run, flags.FLAGS.workdir)
    except (
        ValueError,
        failures.TrainingError,
        checkpoint.CheckpointError,
        metrics.MetricsError,
        workdir.WorkdirError,
    ) as error:
        if logging.level_debug():
            raise
        command_line.fail(f"{error} (--verbosity=1 shows where)")


if __name__ == "__main__":
    # Here, because the other program defines flags of these names too.
    flags.DEFINE_string(
        "workdir",
        None,
        "Directory of the run: config, texts, metrics, checkpoints, plot, drafter.",
        required=True,
    )
    command_line.run(main, command_line.define_config_flag(), drafter_run.DrafterRun)
