"""Turns checked settings into parts: the one place where engines are built.

Runs, drafter trainings, generation, traces and experiments all take theirs from here,
so that "how to speculate" and "which law" mean the same everywhere.
"""

import contextlib
import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import jax

from tlt_jax import config
from tlt_jax import speculation as speculation_lib
from tlt_jax.executors import member
from tlt_jax.models import config as model_config
from tlt_jax.models import params as model_params
from tlt_jax.models.formats import source as model_source
from tlt_jax.models.formats import tokenizer as model_tokenizer
from tlt_jax.rl import collector, evaluator
from tlt_jax.rl.adaptation import adaptation, elsewhere, training
from tlt_jax.rl.engine import engine as engine_lib
from tlt_jax.rl.engine import programs as engine_programs
from tlt_jax.rl.tasks import build as tasks
from tlt_jax.rl.tasks import prompts, reward_pool, reward_workers, scratch_model
from tlt_jax.rl.update import updater
from tlt_jax.rl.workers import records, separate, served, weight_sync, workers
from tlt_jax.runtime import distributed, sharding
from tlt_jax.runtime import watch as watch_lib
from tlt_jax.settings import schema, sections
from tlt_jax.specdec import chain, sampling

SCRATCH = "scratch"
# A model made on the spot, below the workdir.
_INITIAL = "initial_model"


@dataclasses.dataclass(frozen=True)
class Parts:
    """The parts of a run; `assemble` makes them.

    Attributes:
      speculation: how the workers' engines speculate.
      sync: brings the learner's weights to the workers.
      adaptation: what trains the drafter, or stands in for it.
      evaluator: None: the run is never evaluated.
    """

    model: model_config.ModelConfig
    tokenizer: model_tokenizer.Tokenizer
    rewards: reward_pool.Pool
    speculation: speculation_lib.Speculation
    updater: updater.Updater
    workers: workers.Workers
    sync: weight_sync.WeightSync
    adaptation: adaptation.Adaptation | adaptation.NoAdaptation
    collector: collector.Collector
    evaluator: evaluator.Evaluator | None


def assemble(
    run: config.RunConfig,
    source: model_source.ModelSource,
    task: tasks.Task,
    directory: pathlib.Path,
    group: distributed.Group,
    observer: watch_lib.Observer,
    closing: contextlib.ExitStack,
) -> Parts:
    """Make the parts of a run; none has weights yet.

    `directory` is the workdir and exists; `closing` will close what holds processes,
    threads or files.

    Raises:
      ValueError: settings that do not go together, with this model or these devices.
    """
    model, tokenizer = source.config, source.tokenizer()
    check_context(model, run.task.max_prompt_tokens, run.rollout.max_new_tokens)
    law = law_of(run.sampling)
    learning = updater.Updater(
        model,
        algorithm=run.algorithm,
        rollout=run.rollout,
        learner=run.learner,
        optimizer=run.optimizer,
        mesh=run.mesh,
        law=law,
        num_steps=run.num_steps,
        max_prompt_tokens=run.task.max_prompt_tokens,
        **dict(precision=run.precision, remat=run.model.remat),
    )
    closing.callback(learning.pool.close)
    speculation = speculation_lib.of_run(run, model)
    make_team = _separate if run.workers.placement == "separate" else _colocated
    team, sync = make_team(run, model, tokenizer, speculation, learning, group)
    if clocks := speculation_lib.by_the_clock(run, team.num):
        observer.note(clocks)
    adapting = adaptation.NoAdaptation()
    if run.specdec.mode == "tlt":
        where = directory / ("" if group.is_first else f"processes/{group.index}")
        adapting = adaptation.Adaptation(
            _training_of(run, model, tokenizer, speculation, where, observer.note),
            team,
            tuple(speculation.tuners.values()),
            initial=speculation.params,
            observer=observer,
        )
    closing.callback(adapting.close)
    closing.push(lambda kind, *_: team.close(failed=kind is not None))
    rewards = closing.enter_context(
        reward_workers.pool_of(run.reward, task.score, group.index, about_workers(run))
    )
    collecting = collector.Collector(
        run.rollout,
        run.seed,
        prompts_of(run.task, task, "train", tokenizer, observer),
        team,
        rewards,
        tokenizer.decode,
        dynamic_sampling=learning.algorithm.dynamic_sampling,
        between=adapting.hand_over,
    )
    judging = None
    if run.eval.every:
        judging = evaluator.Evaluator(
            run.eval,
            run.rollout.max_new_tokens,
            run.seed,
            prompts_of(run.task, task, "eval", tokenizer, observer),
            team,
            _judges_of(run, model, tokenizer, team, closing),
            rewards,
            tokenizer.decode,
        )
    return Parts(
        model=model,
        tokenizer=tokenizer,
        rewards=rewards,
        speculation=speculation,
        updater=learning,
        workers=team,
        sync=sync,
        adaptation=adapting,
        collector=collecting,
        evaluator=judging,
    )


def _colocated(
    run: config.RunConfig,
    model: model_config.ModelConfig,
    tokenizer: model_tokenizer.Tokenizer,
    speculation: speculation_lib.Speculation,
    learning: updater.Updater,
    group: distributed.Group,
) -> tuple[workers.Workers, weight_sync.WeightSync]:
    """Make workers on the learner's devices, and what brings them its weights."""
    mesh, law = learning.learner.mesh, law_of(run.sampling)
    meshes = weight_sync.engine_meshes(mesh, run.workers.num, run.rollout.tensor)
    team = workers.Workers(
        [engine_of_run(run, model, tokenizer, law, speculation, m) for m in meshes],
        _thresholds(run),
        group,
    )
    return team, weight_sync.WeightSync(
        model, source=mesh, targets=meshes, dtype=run.precision, pool=learning.pool
    )


def _separate(
    run: config.RunConfig,
    model: model_config.ModelConfig,
    tokenizer: model_tokenizer.Tokenizer,
    speculation: speculation_lib.Speculation,
    learning: updater.Updater,
    group: distributed.Group,
) -> tuple[separate.Team, weight_sync.ToOthers]:
    """Make what speaks with workers in processes of their own; see `_colocated`."""
    del tokenizer, speculation
    team = separate.Team(
        run.workers.num,
        _thresholds(run),
        group,
        distributed.meeting(),
        about_workers(run),
        vocab_size=model.vocab_size,
        max_length=run.longest_text,
    )
    return team, weight_sync.ToOthers(
        model,
        source=learning.learner.mesh,
        dtype=run.precision,
        pool=learning.pool,
        # Rollouts beside updates begin with older ones.
        keeps=run.rollout.lag > 0,
    )


def check_launched(run: config.RunConfig) -> None:
    """Refuse a run whose workers nobody starts.

    Raises:
      schema.ConfigError: it is one.
    """
    if run.workers.placement == "separate" and distributed.meeting() is None:
        raise schema.ConfigError(
            "workers.placement='separate' without a launcher: tlt_jax.launch starts "
            "the workers, too, python -m tlt_jax.launch --processes=1 -- --config=..."
        )
    if run.reward.placement == "separate" and not distributed.reward_meetings():
        raise schema.ConfigError(
            "reward.placement='separate' without a launcher: tlt_jax.launch starts "
            "reward workers, too, python -m tlt_jax.launch --processes=1 -- "
            "--config=..., or set reward.placement=colocated."
        )


def about_workers(run: config.RunConfig) -> dict[str, str]:
    """Say what a worker elsewhere has in common with the learner."""
    return {**member.versions(), "settings": config.digest(run)}


def roll_out(
    run: config.RunConfig, directory: str | pathlib.Path, meeting: distributed.Meeting
) -> None:
    """Generate for a learner in another process until its run has ended.

    Raises:
      failures.UserError: it has other code, libraries or settings.
      ValueError: the engine's settings do not go together.
    """
    spec = run.model.spec
    if spec == SCRATCH:
        spec = str(pathlib.Path(directory) / _INITIAL)

    def made():
        source = model_source.resolve(spec)
        model, tokenizer, law = source.config, source.tokenizer(), law_of(run.sampling)
        speculation = speculation_lib.of_run(run, model)
        tensor = run.rollout.tensor or max(run.mesh.tensor, 1)
        mesh = sharding.make_mesh(1, 1, tensor, devices=jax.local_devices()[:tensor])
        engine = engine_of_run(run, model, tokenizer, law, speculation, mesh)
        its = _judge_of(run, model, tokenizer, engine)
        trainee = None
        if run.specdec.mode == "tlt" and run.adaptation.enabled:
            folder = pathlib.Path(directory, "processes", f"worker_{meeting.worker}")
            own = _training_of(run, model, tokenizer, speculation, folder, print)
            trainee = elsewhere.Trainee(own, engine)
        return served.Made(engine, its, tuple(speculation.tuners.values()), trainee)

    served.Worker(meeting, about_workers(run), made).work()


def _training_of(
    run: config.RunConfig,
    model: model_config.ModelConfig,
    tokenizer: model_tokenizer.Tokenizer,
    speculation: speculation_lib.Speculation,
    directory: pathlib.Path,
    note: Callable[[str], None],
) -> training.Training:
    """Make what a process needs to train a run's drafter."""
    return training.Training(
        run.adaptation,
        speculation.speculator_cfg.drafter_cfg,
        is_trained=speculation.params is not None,
        eos_ids=eos_ids_of(model, tokenizer),
        sampling_cfg=law_of(run.sampling),
        precision=run.precision,
        seed=run.seed,
        directory=directory,
        rule=run.specdec.rule,
        note=note,
    )


def _judges_of(
    run: config.RunConfig,
    model: model_config.ModelConfig,
    tokenizer: model_tokenizer.Tokenizer,
    team: workers.Workers,
    closing: contextlib.ExitStack,
) -> list[engine_lib.Engine]:
    """Return what evaluates: the team's engines, or one beside each."""
    beside = [_judge_of(run, model, tokenizer, engine) for engine in team.engines]
    for engine in filter(None, beside):
        closing.callback(engine.pool.close)
    return [own or its for own, its in zip(beside, team.engines, strict=True)]


def _judge_of(
    run: config.RunConfig,
    model: model_config.ModelConfig,
    tokenizer: model_tokenizer.Tokenizer,
    engine: engine_lib.Engine,
) -> engine_lib.Engine | None:
    """Make the engine that evaluates beside another; None: it does so itself.

    The same law has the same programs; of another one, an engine is beside each. So it
    is where rollouts keep the law alone: evaluations keep the noise.
    """
    its = law_of(run.sampling, run.eval.temperature)
    is_same = its == law_of(run.sampling) and run.specdec.rule == chain.KEYED
    if not run.eval.every or is_same:
        return None
    return engine_of_run(run, model, tokenizer, its, mesh=engine.mesh)


def _thresholds(run: config.RunConfig) -> records.Config:
    """Say when and on how many waiting workers the drafter is trained."""
    # Collectives would wait for those of an update; separate workers have none.
    alone = run.rollout.lag or run.workers.placement == "separate"
    return records.Config(
        min_idle=run.workers.min_idle,
        max_members=1 if alone else None,
        heartbeat_timeout_s=run.workers.timeout_s,
    )


def source_of(
    run: config.RunConfig,
    task: tasks.Task,
    directory: pathlib.Path,
    group: distributed.Group,
    observer: watch_lib.Observer,
) -> model_source.ModelSource:
    """Find the policy that is named, or make it for the task, in the workdir.

    Raises:
      ValueError: it cannot be had, or the task teaches nothing.
    """
    if run.model.spec != SCRATCH:
        return model_source.resolve(run.model.spec)
    folder = directory / _INITIAL
    observer.stage("making the model")

    def show(done, total, loss):
        observer.within(done, total, f"loss {loss:.3f}")

    settings = scratch_model.Settings(
        run.seed, run.pretrain, run.task, run.rollout.max_new_tokens
    )
    group.first("model", lambda: scratch_model.make(settings, task, folder, show))
    return model_source.resolve(str(folder))


def inputs_of(
    run: config.RunConfig, source: model_source.ModelSource, task: tasks.Task
) -> dict[str, tuple[pathlib.Path, ...]]:
    """List the files that a run reads, by what they are for."""
    drafter: tuple[pathlib.Path, ...] = ()
    if run.drafter.directory and run.specdec.mode == "tlt":
        folder = pathlib.Path(speculation_lib.folder(run.drafter.directory))
        # Of a card nothing is computed.
        read = (path for path in folder.glob("*") if path.suffix != ".md")
        drafter = tuple(sorted(path for path in read if path.is_file()))
    return {
        "data": tasks.files_of(task),
        "model": tuple(pathlib.Path(path) for path in source.files()),
        "drafter": drafter,
    }


def law_of(
    cfg: sections.Sampling, temperature: float | None = None
) -> sampling.SamplingConfig:
    """Return the sampling law, at a temperature of one's own if one is given."""
    if temperature is None:
        temperature = cfg.temperature
    return sampling.SamplingConfig(temperature, cfg.top_k, cfg.top_p, cfg.min_p)


def prompts_of(
    cfg: sections.Task,
    task: tasks.Task,
    split: str,
    tokenizer: model_tokenizer.Tokenizer,
    observer: watch_lib.Observer,
) -> prompts.PromptSet:
    """Encode the prompts of a split, and say how many are too long.

    Raises:
      ValueError: one is too long, and `cfg.long_prompts` refuses such; or the chat
        template does not know one of `cfg.template_options`.
    """
    options = dict(cfg.template_options)
    found = prompts.PromptSet(
        task.examples(split),
        lambda example: tokenizer.encode_prompt(example.prompt, **options),
        max_tokens=cfg.max_prompt_tokens,
        long_prompts=cfg.long_prompts,
        decode=lambda ids: tokenizer.decode(ids, skip_special=False),
    )
    if found.num_skipped:
        observer.note(
            f"{found.num_skipped} prompts ({split}) are longer than "
            f"task.max_prompt_tokens={cfg.max_prompt_tokens}: left out, "
            f"{len(found.prompts)} remain."
        )
    return found


def engine_of_run(
    run: config.RunConfig,
    model: model_config.ModelConfig,
    tokenizer: model_tokenizer.Tokenizer,
    law: sampling.SamplingConfig,
    speculation: speculation_lib.Speculation = speculation_lib.PLAIN,
    mesh: jax.sharding.Mesh | None = None,
) -> engine_lib.Engine:
    """Make an engine of a run's sizes that samples by a law; see `engine_of`."""
    return engine_of(
        model,
        tokenizer,
        speculation,
        mesh,
        max_rows=run.rollout.max_batch,
        max_length=run.longest_text,
        page_size=run.cache.page_size,
        num_pages=run.cache.num_pages,
        steps_per_call=run.rollout.steps_per_call,
        prefill_chunk=run.rollout.prefill_chunk,
        sampling_cfg=law,
        stop=run.rollout.stop,
        dtype=run.precision,
        cpu_kernels=run.rollout.cpu_kernels,
        attention=run.rollout.attention,
        check_kernels=run.rollout.check_kernels,
        keep_routes=model.experts is not None,
    )


def engine_of(
    model: model_config.ModelConfig,
    tokenizer: model_tokenizer.Tokenizer,
    speculation: speculation_lib.Speculation = speculation_lib.PLAIN,
    mesh: jax.sharding.Mesh | None = None,
    **sizes: Any,
) -> engine_lib.Engine:
    """Make an engine without weights: the only place where one is.

    A text ends where the model's or the tokenizer's own EOS comes. `sizes` and law are
    the other fields of `programs.EngineConfig`.

    Raises:
      ValueError: the drafter does not fit the target, the sizes or the law.
    """
    return engine_lib.Engine(
        model,
        engine_programs.EngineConfig(eos_ids=eos_ids_of(model, tokenizer), **sizes),
        speculator_cfg=speculation.speculator_cfg,
        tuner=speculation.tuner and speculation.tuner.for_engine(),
        early_tuner=speculation.early_tuner and speculation.early_tuner.for_engine(),
        calibration=speculation.calibration and speculation.calibration.for_engine(),
        decode_text=tokenizer.decoder_for(sizes.get("stop", ())),
        mesh=mesh,
    )


def eos_ids_of(
    model: model_config.ModelConfig, tokenizer: model_tokenizer.Tokenizer
) -> tuple[int, ...]:
    """Ids that end a completion: the model's and the tokenizer's.

    All that decodes, learns or writes a model has them from here.
    """
    ids = {*model.eos_ids, *tokenizer.eos_ids}
    # A token that the model does not have ends nothing.
    return tuple(sorted(token for token in ids if token < model.vocab_size))


def check_context(
    model: model_config.ModelConfig, max_prompt_tokens: int, max_new_tokens: int
) -> None:
    """Refuse texts that may become longer than the model's context.

    Raises:
      ValueError: so they may.
    """
    longest, limit = max_prompt_tokens + max_new_tokens, model.max_positions
    if longest > limit:
        raise ValueError(
            f"max_prompt_tokens={max_prompt_tokens} and max_new_tokens={max_new_tokens}"
            f" make texts of up to {longest} tokens, but the model's context "
            f"(max_position_embeddings) is {limit}: lower one of them, or take another "
            "model."
        )


def load_weights(
    source: model_source.ModelSource, learning: updater.Updater
) -> model_params.Params:
    """Load a source's weights in float32 where the learner wants them."""
    shardings = jax.tree.map(
        lambda leaf: leaf.sharding, learning.learner.abstract_state().params
    )
    return source.load("float32", shardings)
