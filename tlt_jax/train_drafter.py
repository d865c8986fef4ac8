"""Train a drafter: `python -m tlt_jax.train_drafter --config=FILE --workdir=DIR`.

The target answers prompts, its features are kept, the drafter learns from them, and is
written to `DIR/drafter`. The same command on the same directory resumes at any stage.
"""

import contextlib
import dataclasses
import functools
import pathlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from absl import flags

from tlt_jax import assembly, policy, speculation, types
from tlt_jax.models.drafters import drafter
from tlt_jax.models.drafters import io as drafter_io
from tlt_jax.rl.adaptation import learner as drafter_learner
from tlt_jax.rl.adaptation import offline, offline_texts
from tlt_jax.rl.engine import engine as engine_lib
from tlt_jax.rl.engine import speculator
from tlt_jax.rl.tasks import build as tasks
from tlt_jax.rl.tasks import files as data_files
from tlt_jax.rl.tasks import scratch_model
from tlt_jax.rl.update import learner as policy_learner
from tlt_jax.runtime import (
    command_line,
    compile_cache,
    failures,
    host_memory,
    stopping,
    train_state,
)
from tlt_jax.settings import drafter_run, schema, sections
from tlt_jax.specdec import strategy
from tlt_jax.specdec.texts import layout, shards
from tlt_jax.specdec.training import objectives
from tlt_jax.viz import plots
from tlt_jax.workdir import checkpoint, ending, files, identity, metrics, progress
from tlt_jax.workdir import directory as workdir

# Where in the workdir the result is.
EXPORT = "drafter"


def train(
    run: drafter_run.DrafterRun,
    directory: str | pathlib.Path,
    stop: stopping.Stop | None = None,
) -> dict:
    """Do what is left of a run, in the directory that holds everything it writes.

    Returns the last measurement's record.

    Raises:
      schema.ConfigError: the directory holds another run, or a longer one.
      files.WorkdirError: it cannot be written, or another process works there.
      failures.TrainingError: updates are not finite any more.
      failures.Stopped: `stop` was asked for; what is done is saved.
    """
    directory, stop = pathlib.Path(directory), stop or stopping.Stop()
    where = functools.partial(ending.stopped, directory, run.num_steps)
    with (
        workdir.claimed(directory, run, drafter_run.load),
        progress.Progress(run.num_steps, mode=run.log.progress) as display,
        contextlib.ExitStack() as closing,
    ):
        stop.last_words = lambda: display.close() or where()
        row = ending.last_row(directory, run)
        if row is None or not (directory / EXPORT).is_dir():
            trainer = _Trainer(run, directory, display, closing)
            with stop.finishing(display.tell):
                row = trainer.run_to_end(stop)
        if row["step"] == run.num_steps:
            display.note(ending.drafter_finished(directory, run.num_steps))
            return row
    raise failures.Stopped(where(), stop.status)


class _Trainer:
    """The parts of a run, and what is shown and written of its steps."""

    def __init__(self, run, directory, display, closing):
        self.run, self.directory, self.display = run, directory, display
        self.seconds: dict[str, float] = {}
        with self._stage("load"):
            self.policy = self._target()
        named = run.objective.name, run.objective.overrides()
        max_length = min(run.batch.row_tokens, self._longest)
        self.cfg = speculation.drafter_of(
            run.drafter,
            objectives.choose(*named),
            self.policy.config,
            max_length,
            depth=run.eval.depth,
        )
        self.objective = objectives.choose(*named, self.cfg.block_size)
        inputs = {"model": self.policy.files, "data": self._data()}
        self.about = identity.claim(directory, run, inputs, display.note)
        self.rounds = offline_texts.Rounds(
            run.texts.num, run.texts.round_steps, run.texts.kept_rounds
        )
        self.engine: engine_lib.Engine | None = None
        closing.callback(self._leave_engine)
        self.texts = self._open_texts()
        with self._stage("texts"):
            done = min(checkpoint.newest(directory) or 0, run.num_steps - 1)
            self._write_texts(self.rounds.place(done)[0])
        learner = self._learner()
        closing.callback(learner.pool.close)
        self.training = offline.OfflineTraining(
            learner,
            self.texts,
            seed=run.seed,
            eos_ids=self.policy.eos_ids,
            rounds=self.rounds,
            prepare=self._next_texts,
            **self._sizes,
        )
        pass_over = display.note if run.checkpoint.on_damage == "previous" else None
        keep = run.checkpoint.keep
        self.checkpointer = closing.enter_context(
            checkpoint.Checkpointer(directory, keep, pass_over=pass_over)
        )
        self._restore()
        self.training.begin(tuple(jax.devices()[:1]), self.policy.params)
        first_row = self.step + 1 if self.step else 0
        self.writer = closing.enter_context(metrics.MetricsWriter(directory, first_row))

    @property
    def step(self) -> int:
        """Steps taken."""
        return self.training.num_steps

    def run_to_end(self, stop: stopping.Stop) -> dict[str, Any]:
        """Take every step that is left, or until it shall stop; measure, export, draw.

        Returns the last record, or the step that was saved.
        """
        run = self.run
        row: dict[str, Any] = {"step": self.step}
        if self.step == 0:
            row |= self.training.about_texts()
            row |= {f"time/{name}_s": s for name, s in self.seconds.items()}
            row |= self._measure()
            self.writer.write(row)
        self.display.stage("training")
        started = time.perf_counter()
        for outcome in self.training.steps(run.num_steps):
            due = run.eval.every and self.step % run.eval.every == 0
            last = self.step == run.num_steps
            if due or last or self.step % run.log.every == 0:
                row = {"step": self.step} | self._row(outcome)
                taken = self.step % run.log.every or run.log.every
                row["time/step_s"] = (time.perf_counter() - started) / taken
                if due or last:
                    row |= self._measure()
                self.writer.write(row)
                if due or last:
                    # Whatever becomes of the run, what it has found can be used.
                    self._export()
                self._show(row)
                started = time.perf_counter()
            if run.checkpoint.every and self.step % run.checkpoint.every == 0:
                self._save()
            if stop.signal:
                break
        self.display.stage("writing")
        if self.checkpointer.latest_step() != self.step:
            self._save()
        self.checkpointer.wait()
        if self.step < run.num_steps:
            return {"step": self.step}
        if not (self.directory / EXPORT).is_dir():
            self._measure()
            self._export()
        with files.writing(self.directory / "plots"):
            plots.draw_training(self.directory)
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
        if spec == assembly.SCRATCH:
            spec = str(self.directory / "target")
            task = sections.Task(
                name=run.texts.tasks[0],
                size=run.texts.num,
                seed=run.texts.seed,
                max_prompt_tokens=run.texts.max_prompt_tokens,
            )
            settings = scratch_model.Settings(
                run.seed, run.pretrain, task, run.texts.max_new_tokens
            )
            scratch_model.make(settings, tasks.build(task), spec)
        return policy.load(spec, run.precision)

    def _data(self) -> list[pathlib.Path]:
        """Files that prompts are read from."""
        named = [name for name in self.run.texts.tasks if data_files.is_data(name)]
        return [path for name in named for path in data_files.find(name)]

    @property
    def _sizes(self) -> dict[str, int]:
        """B, T and M."""
        names = "num_rows", "row_tokens", "row_bases"
        return {name: getattr(self.run.batch, name) for name in names}

    @property
    def _longest(self) -> int:
        """Tokens of the longest text."""
        return self.run.texts.max_prompt_tokens + self.run.texts.max_new_tokens

    def _open_texts(self) -> shards.Shards:
        run, target, directory = self.run, self.policy, self.directory / "texts"
        assembly.check_context(
            target.config, run.texts.max_prompt_tokens, run.texts.max_new_tokens
        )
        about_texts = schema.to_dict(run.texts)
        options = about_texts.pop("template_options")
        # They say how long texts are kept, and nothing of a text.
        del about_texts["round_steps"], about_texts["kept_rounds"]
        made_with = {
            "target": drafter.identify(target.config),
            "model": run.model.spec,
            "seed": run.seed,
            "precision": run.precision,
            "texts": about_texts,
            "template_options": options or None,
            "feature_layers": self.cfg.feature_layers,
            "inputs": identity.summary(self.about["inputs"]),
        }
        with files.writing(directory):
            offline_texts.claim(directory, made_with)
        return shards.Shards(directory, run.texts.dtype)

    def _next_texts(self, number: int) -> None:
        self.display.stage("texts")
        self._write_texts(number)
        self.display.stage("training")

    def _write_texts(self, number: int) -> None:
        """Let the target write what is missing of a round's texts; delete others."""
        run, texts, target = self.run, self.texts, self.policy
        options = dict(run.texts.template_options)
        wanted = self.rounds.numbers(number)
        with files.writing(self.directory / "texts"):
            texts.drop(range(wanted.start * run.texts.num))
        for each in wanted:
            first, held_out = each * run.texts.num, offline_texts.HELD_OUT
            needed = {*range(first, first + run.texts.num)}
            needed |= {*range(held_out, held_out + run.texts.num_held_out)}
            if needed.issubset(texts.text_ids):
                # To find out what is asked would take some seconds.
                continue
            asked = offline_texts.ask(
                run.texts,
                lambda example: target.tokenizer.encode_prompt(
                    example.prompt, **options
                ),
                each,
            )
            self._answer(asked)

    def _leave_engine(self) -> None:
        if self.engine is not None:
            self.engine.pool.close()

    def _capturing_engine(self) -> engine_lib.Engine:
        """The target's engine, whose pages keep what the drafter reads."""
        run = self.run
        # Texts are written whole, whatever part of them rows will hold.
        written_for = dataclasses.replace(self.cfg, max_length=0)
        capturing = speculator.SpeculatorConfig(
            strategy.Arms(()), written_for, capture=True
        )
        return self.policy.engine(
            max_rows=run.texts.max_batch,
            max_length=self._longest,
            page_size=run.texts.page_size,
            steps_per_call=run.texts.steps_per_call,
            speculation=speculation.Speculation(capturing, params=None),
        )

    def _answer(self, asked: Sequence[types.Request]) -> None:
        self.engine = self.engine or self._capturing_engine()
        started = time.perf_counter()

        def show(done, total, num_tokens):
            speed = num_tokens / (time.perf_counter() - started)
            self.display.within(done, total, f"{speed:.0f} tokens/s")

        with files.writing(self.directory / "texts"):
            offline_texts.write(
                self.engine, asked, self.texts, seed=self.run.seed, on_progress=show
            )
        if not self.rounds.num_steps:
            # There will be no other texts, and its cache is large.
            self.engine.pool.close()
            self.engine = None

    def _learner(self) -> drafter_learner.DrafterLearner:
        run, cfg = self.run, self.cfg
        optimizer = policy_learner.make_optimizer(
            run.optimizer, num_steps=run.num_steps, updates_per_step=1
        )
        if run.average:
            optimizer = train_state.averaged(optimizer, run.average)
        return drafter_learner.DrafterLearner(
            cfg,
            self.objective,
            optimizer,
            batch=layout.described(
                **self._sizes,
                d_model=cfg.layer.d_model,
                num_features=len(cfg.feature_layers),
                dtype=run.texts.dtype,
            ),
            head_chunk=run.batch.head_chunk,
            # Nobody waits for the devices, so that a step is one piece.
            piece_bases=0,
            depth=min(run.eval.depth, cfg.block_size or run.eval.depth),
            dtype=run.precision,
            remat=run.batch.remat,
        )

    def _measure(self) -> dict[str, Any]:
        self.display.stage("measuring")
        found = self.training.measure()
        self.display.stage("training")
        return {f"eval/{name.replace('/', '_')}": x for name, x in found.items()}

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
        like = self.training.learner.abstract_state()
        restored = self.checkpointer.restore_latest(
            like.params, (like.opt_state, like.num_updates)
        )
        if restored is not None:
            state = train_state.TrainState(restored.params, *restored.opt_state)
            snapshot = train_state.Snapshot(state, meta=restored.meta["training"])
            self.training.restore(snapshot, restored.step)
            self.display.resume(self.step)

    def _save(self) -> None:
        snapshot = self.training.state()
        state = snapshot.state
        learned = state.params, (state.opt_state, state.num_updates)
        meta = self.about | {"training": snapshot.meta}
        self.checkpointer.save(self.step, *learned, self.cfg, meta)

    def _export(self) -> None:
        learner = self.training.learner
        folder, weights = self.directory / EXPORT, learner.weights("float32")
        about = {
            "target": self.policy.identity,
            "num_steps": self.step,
            "objective": dataclasses.asdict(self.objective),
        }
        with files.writing(folder):
            drafter_io.save(folder, weights, self.cfg, about)


def main(run: drafter_run.DrafterRun) -> None:
    """Run one configuration; what a user can mend is one line, not a traceback."""
    host_memory.keep_freed()
    compile_cache.enable()
    with command_line.told(), stopping.heard() as stop:
        train(run, flags.FLAGS.workdir, stop)


if __name__ == "__main__":
    # Here, because the other program defines flags of these names too.
    flags.DEFINE_string(
        "workdir",
        None,
        "Directory of the run: config, texts, metrics, checkpoints, plot, drafter.",
        required=True,
    )
    command_line.run(main, command_line.define_config_flag(), drafter_run.DrafterRun)
