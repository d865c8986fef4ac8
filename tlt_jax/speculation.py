"""How to speculate: drafter, strategies, tuner, from settings or from a command."""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from tlt_jax import config
from tlt_jax.models import config as model_config
from tlt_jax.models.drafters import block, drafter, shipped
from tlt_jax.models.drafters import io as drafter_io
from tlt_jax.rl.engine import speculator
from tlt_jax.settings import schema
from tlt_jax.settings import speculation as settings_lib
from tlt_jax.specdec import calibration as calibration_lib
from tlt_jax.specdec import chain, sampling
from tlt_jax.specdec import strategy as strategy_lib
from tlt_jax.specdec.training import objectives
from tlt_jax.specdec.tuners import build as tuners
from tlt_jax.specdec.tuners import shared as shared_tuner
from tlt_jax.specdec.tuners import tuner as tuner_lib

NGRAM = "ngram"
# Tuners whose choices are a function of the rows alive.
_TIMELESS = (tuner_lib.Static.NAME, tuner_lib.Threshold.NAME)
# Chains, shorter the more rows there are: on two CPU cores these were the fastest.
DEFAULT_TABLE = ("1:D7K1V8", "4:D5K1V6", "16:D3K1V4")


@dataclasses.dataclass(frozen=True)
class Speculation:
    """How to speculate, and with which weights; by default not at all.

    Attributes:
      speculator_cfg: for engines; None: not at all.
      params: the learned drafter's weights; None: there is none, or random ones.
      tuner: chooses among the strategies, for all engines; None: the table, unchanged.
      early_tuner: the same before the drafter is ready.
      calibration: of the drafter's scores, of all engines; None: each keeps its own.
    """

    speculator_cfg: speculator.SpeculatorConfig | None = None
    params: drafter.DrafterParams | None = None
    tuner: shared_tuner.SharedTuner | None = None
    early_tuner: shared_tuner.SharedTuner | None = None
    calibration: calibration_lib.Calibration | None = None

    @property
    def tuners(self) -> dict[str, shared_tuner.SharedTuner]:
        """Those there are, by the name of their field."""
        both = {"tuner": self.tuner, "early_tuner": self.early_tuner}
        return {name: tuner for name, tuner in both.items() if tuner is not None}

    @property
    def changing(self) -> dict[str, Any]:
        """What learns in a run and has a state, by the name of its field."""
        if self.calibration is None:
            return self.tuners
        return self.tuners | {"calibration": self.calibration}

    @property
    def max_length(self) -> int:
        """Positions that the drafter was trained for; 0: any."""
        cfg = self.speculator_cfg and self.speculator_cfg.drafter_cfg
        return cfg.max_length if cfg else 0


PLAIN = Speculation()


def of_run(run: config.RunConfig, model: model_config.ModelConfig) -> Speculation:
    """Read `specdec` and `drafter`; load the drafter if one is named.

    Raises:
      ValueError: the drafter is another target's, a strategy cannot be built, or the
        rule cannot judge what it drafts.
    """
    settings = run.specdec
    if settings.mode == "off":
        return PLAIN

    def tuner_of(arms, seed):
        chooser = tuners.build(
            settings.tuner,
            arms,
            max_rows=run.rollout.max_batch,
            seed=seed,
            threshold=settings.threshold,
            hysteresis=settings.hysteresis,
            epsilon=settings.epsilon,
            window=settings.window,
        )
        return shared_tuner.SharedTuner(chooser)

    early = strategy_lib.parse_arms(settings.ngram_strategies)
    early_tuner = tuner_of(early, run.seed) if early.entries else None
    if settings.mode == "ngram":
        return Speculation(speculator.SpeculatorConfig(early), tuner=early_tuner)
    arms = strategy_lib.parse_arms(settings.strategies)
    law = sampling.SamplingConfig(run.sampling.temperature)
    try:
        chain.check(settings.rule, arms.strategies(), law)
    except ValueError as error:
        raise schema.ConfigError(f"specdec.{error}") from error
    cfg, params = _drafter_of_run(run, model, arms.strategies())
    speculator_cfg = speculator.SpeculatorConfig(
        arms,
        cfg,
        ranking=settings.ranking,
        tau=settings.tau,
        rule=settings.rule,
        capture=run.adaptation.enabled,
        early=early,
    )
    return Speculation(
        *(speculator_cfg, params, tuner_of(arms, run.seed + 1), early_tuner),
        calibration_lib.Calibration(),
    )


def by_the_clock(run: config.RunConfig, num_workers: int) -> str:
    """Say in a line that clocks have a say in a run's tokens; empty: they have none.

    By a chain rule tokens depend on the drafter's weights, on the strategy of each
    call, and on which rows are decoded together, as a call's end may cut an accepted
    run. By the keyed rule they depend on none of these. `num_workers` are those of all
    processes.
    """
    settings, training = run.specdec, run.adaptation
    if settings.rule == chain.KEYED:
        return ""
    reasons = []
    if run.workers.placement == "separate":
        reasons.append(
            "separate workers may die, and keep texts that no checkpoint has"
        )
    if num_workers > 1:
        reasons.append(f"{num_workers} workers take requests as they come to them")
    if settings.tuner not in _TIMELESS:
        names = " and ".join(_TIMELESS)
        reasons.append(
            f"specdec.tuner={settings.tuner!r} is told seconds ({names} look at rows)"
        )
    by_time = training.enabled and training.max_frac > 0 and not training.counts_steps
    if num_workers == 1 and by_time:
        reasons.append("the drafter trains by the clock (adaptation.max_steps=0)")
    if settings.ngram_strategies and not run.drafter.directory:
        reasons.append(
            "when the drafter takes over from specdec.ngram_strategies depends on "
            "texts that no checkpoint keeps"
        )
    if not reasons:
        return ""
    return (
        f"specdec.rule={settings.rule!r} keeps the law of tokens and not the tokens: "
        f"repeated or resumed, this run draws others, as {'; '.join(reasons)} (see "
        "docs/sampling.md)."
    )


def load(
    spec: str,
    target: model_config.ModelConfig,
    table: Sequence[str] = (),
    *,
    ranking: str = "coupled",
    tau: float | None = None,
    rule: str = chain.KEYED,
    dtype: Any = jnp.float32,
) -> Speculation:
    """Load the drafter that `spec` names, for a command that speculates.

    It is a directory, ours or in a published layout, the name of a drafter that comes
    with the package, or `ngram` for suffix matches alone. The table's entries are as of
    `strategy.parse_arms`; empty: the default, as deep as a drafter of blocks can go.
    For `rule` see `speculator.SpeculatorConfig`, for `ranking` and `tau` see
    `proposers.learned`; `dtype` is that of the drafter's weights.

    Raises:
      ValueError: the directory holds no drafter of this target, or an entry cannot be
        built.
    """
    entries = tuple(table) or DEFAULT_TABLE
    cfg = params = None
    if spec != NGRAM:
        cfg, params = drafter_io.load(folder(spec), target, dtype)
    elif not table:
        entries = tuple(f"{entry}-{NGRAM}" for entry in entries)
    arms = strategy_lib.parse_arms(entries)
    if not table and cfg is not None and cfg.block_size:
        arms = arms.cut(cfg.block_size)
    speculator_cfg = speculator.SpeculatorConfig(
        arms, cfg, ranking=ranking, tau=tau, rule=rule
    )
    return Speculation(speculator_cfg, params)


def folder(spec: str) -> str:
    """Return the drafter's own directory; the workdir of a training holds it.

    `spec` is a path, or the name of a drafter that comes with the package.

    Raises:
      ValueError: it is a name that no drafter has.
    """
    named = shipped.folder(spec)
    if named is not None:
        return named
    directory = os.path.expanduser(spec)
    inside = os.path.join(directory, "drafter")
    return inside if os.path.isdir(inside) else directory


def drafter_of(
    shape: settings_lib.DrafterShape,
    objective: objectives.Objective,
    target: model_config.ModelConfig,
    max_length: int,
    depth: int,
) -> drafter.DrafterConfig:
    """Describe a new drafter of a target, for texts of at most `max_length` positions.

    `depth` is that of the deepest draft, unless the shape names the size of a block.

    Raises:
      schema.ConfigError: the target has too few layers for these features.
    """
    layers = tuple(shape.feature_layers)
    if shape.features == "low_mid_high":
        published = shape.architecture == "eagle3"
        choose = drafter.published_layers if published else drafter.low_mid_high
        try:
            layers = choose(target.num_layers)
        except ValueError as error:
            raise schema.ConfigError(
                f"drafter.features={shape.features!r}: {error} Set drafter.features to "
                "'last' or 'layers'."
            ) from error
    is_block = shape.architecture == "block"
    size = shape.block_size or depth
    if is_block and size > block.MOST:
        raise schema.ConfigError(
            f"drafter.architecture='block' for drafts of {size} tokens: a pass guesses "
            f"{block.MOST} at most; name strategies (or eval.depth) of up to that."
        )
    return drafter.of_target(
        target,
        feature_layers=layers,
        output_norm=is_block or not objective.feature_weight,
        draft_vocab_size=shape.draft_vocab_size,
        max_length=max_length,
        architecture=shape.architecture,
        block_size=size if is_block else 0,
    )


def _drafter_of_run(
    run: config.RunConfig,
    model: model_config.ModelConfig,
    strategies: Sequence[strategy_lib.Strategy],
) -> tuple[drafter.DrafterConfig, drafter.DrafterParams | None]:
    """The drafter that is named, or the description of a new one."""
    settings, longest = run.drafter, run.longest_text
    if not settings.directory:
        objective = objectives.preset(run.adaptation.name)
        depth = max((s.draft_depth for s in strategies), default=1)
        return drafter_of(settings, objective, model, longest, depth), None
    cfg, params = drafter_io.load(
        folder(settings.directory), model, jnp.dtype(run.precision)
    )
    # Going on, it will be trained on texts of this length.
    wanted = longest if run.adaptation.enabled else settings.max_length
    if 0 < cfg.max_length < wanted:
        cfg = dataclasses.replace(cfg, max_length=wanted)
    return cfg, params
