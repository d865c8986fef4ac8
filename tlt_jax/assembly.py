"""Makes a run's rollout workers, with whatever they need to speculate."""

import dataclasses

import jax
import jax.numpy as jnp

from tlt_jax import config, speculation
from tlt_jax.models import config as model_config
from tlt_jax.models.drafters import drafter
from tlt_jax.models.drafters import io as drafter_io
from tlt_jax.models.formats import tokenizer as model_tokenizer
from tlt_jax.rl.engine import engine as engine_lib
from tlt_jax.rl.engine import programs as engine_programs
from tlt_jax.rl.engine import speculator
from tlt_jax.rl.workers import records, workers
from tlt_jax.runtime import distributed
from tlt_jax.settings import schema
from tlt_jax.specdec import sampling, strategy
from tlt_jax.specdec.training import objectives
from tlt_jax.specdec.tuners import build as tuners
from tlt_jax.specdec.tuners import shared as shared_tuner


@dataclasses.dataclass(frozen=True)
class Speculation:
    """How a run speculates.

    Attributes:
      drafting_cfg: for the engines; None: not at all.
      initial: the learned drafter's weights; None: there is none, or random ones.
      tuner: chooses among the strategies; shared by all engines.
      early_tuner: the same before the drafter is ready.
    """

    drafting_cfg: speculator.DraftingConfig | None = None
    initial: drafter.DrafterParams | None = None
    tuner: shared_tuner.SharedTuner | None = None
    early_tuner: shared_tuner.SharedTuner | None = None

    @property
    def tuners(self) -> tuple[shared_tuner.SharedTuner, ...]:
        """Those there are."""
        return tuple(t for t in (self.tuner, self.early_tuner) if t is not None)


def longest_text(run: config.RunConfig) -> int:
    """Positions of the longest text of a run."""
    return run.task.max_prompt_tokens + run.rollout.max_new_tokens


def law_of(run: config.RunConfig, temperature: float) -> sampling.SamplingConfig:
    """Return the sampling law, at a temperature of one's own."""
    cfg = run.sampling
    return sampling.SamplingConfig(temperature, cfg.top_k, cfg.top_p, cfg.min_p)


def make_speculation(
    run: config.RunConfig, model: model_config.ModelConfig
) -> Speculation:
    """Read `specdec` and `drafter`; load the drafter if one is named.

    Raises:
      ValueError: the drafter is another target's, or a strategy cannot be built.
    """
    settings = run.specdec
    if settings.mode == "off":
        return Speculation()

    def tuner_of(arms, seed):
        made = tuners.build(
            settings.tuner,
            arms,
            max_rows=run.rollout.max_batch,
            seed=seed,
            threshold=settings.threshold,
            hysteresis=settings.hysteresis,
            epsilon=settings.epsilon,
            window=settings.window,
        )
        return shared_tuner.SharedTuner(made)

    early = strategy.parse_arms(settings.ngram_strategies)
    early_tuner = tuner_of(early, run.seed) if early.entries else None
    if settings.mode == "ngram":
        return Speculation(speculator.DraftingConfig(early), tuner=early_tuner)
    cfg, initial = _drafter_of(run, model)
    arms = strategy.parse_arms(settings.strategies)
    drafting_cfg = speculator.DraftingConfig(
        arms,
        cfg,
        ranking=settings.ranking,
        tau=settings.tau,
        capture=run.adaptation.enabled,
        early=early,
    )
    return Speculation(drafting_cfg, initial, tuner_of(arms, run.seed + 1), early_tuner)


def make_workers(
    run: config.RunConfig,
    model: model_config.ModelConfig,
    tokenizer: model_tokenizer.Tokenizer,
    meshes: list[jax.sharding.Mesh],
    made: Speculation,
    group: distributed.Group,
) -> workers.Workers:
    """Make an engine on each mesh, all of them devices of this process."""
    engines = [
        make_engine(run, model, tokenizer, mesh, run.sampling.temperature, made)
        for mesh in meshes
    ]
    limits = records.Config(
        min_idle=run.workers.min_idle, heartbeat_timeout_s=run.workers.timeout_s
    )
    return workers.Workers(engines, limits, group)


def make_engine(
    run: config.RunConfig,
    model: model_config.ModelConfig,
    tokenizer: model_tokenizer.Tokenizer,
    mesh: jax.sharding.Mesh,
    temperature: float,
    made: Speculation,
) -> engine_lib.Engine:
    """Make one engine that samples at a temperature."""
    engine_cfg = engine_programs.EngineConfig(
        max_rows=run.rollout.max_batch,
        max_length=longest_text(run),
        page_size=run.cache.page_size,
        num_pages=run.cache.num_pages,
        steps_per_call=run.rollout.steps_per_call,
        prefill_chunk=run.rollout.prefill_chunk,
        sampling_cfg=law_of(run, temperature),
        eos_ids=tuple(sorted({*model.eos_ids, *tokenizer.eos_ids})),
        stop=run.rollout.stop,
        dtype=run.precision,
        cpu_kernels=run.rollout.cpu_kernels,
        attention=run.rollout.attention,
        check_kernels=run.rollout.check_kernels,
    )
    return engine_lib.Engine(
        model,
        engine_cfg,
        drafting_cfg=made.drafting_cfg,
        tuner=made.tuner,
        early_tuner=made.early_tuner if run.specdec.mode == "tlt" else None,
        decode_text=tokenizer.decode,
        mesh=mesh,
    )


def _drafter_of(
    run: config.RunConfig, model: model_config.ModelConfig
) -> tuple[drafter.DrafterConfig, drafter.DrafterParams | None]:
    """The drafter that is named, or the description of a new one."""
    asked, longest = run.drafter, longest_text(run)
    if asked.directory:
        folder = speculation.folder(asked.directory)
        cfg, params = drafter_io.load(folder, model, jnp.dtype(run.precision))
        # Going on, it will be trained on texts of this length.
        wanted = longest if run.adaptation.enabled else asked.max_length
        if 0 < cfg.max_length < wanted:
            cfg = dataclasses.replace(cfg, max_length=wanted)
        return cfg, params
    layers = tuple(asked.feature_layers)
    if asked.features == "low_mid_high":
        try:
            published = asked.architecture == "eagle3"
            choose = drafter.published_layers if published else drafter.low_mid_high
            layers = choose(model.num_layers)
        except ValueError as error:
            raise schema.ConfigError(
                f"drafter.features={asked.features!r}: {error} Set drafter.features to "
                "'last' or 'layers'."
            ) from error
    preset = objectives.preset(run.adaptation.name)
    made = drafter.of_target(
        model,
        feature_layers=layers,
        output_norm=not preset.feature_weight,
        draft_vocab_size=asked.draft_vocab_size,
        max_length=longest,
        architecture=asked.architecture,
    )
    return made, None
