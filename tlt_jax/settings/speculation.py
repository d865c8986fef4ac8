"""Settings of speculation, of the drafter and of its training during a run."""

import dataclasses
from typing import Any, Literal

from tlt_jax.settings import schema


@dataclasses.dataclass(frozen=True)
class Specdec:
    """Speculative decoding.

    Attributes:
      mode: `off`, `ngram` (proposals from text seen before) or `tlt` (a learned
        drafter, adapted during the run; proposals from text until it is better).
      strategies: candidates for `tlt`: `4:D5K1V6,D3K1V4` names two (draft_depth, topk,
        tokens_to_verify) for up to 4 active rows; entries with few rows come first, and
        beyond the last one decoding is plain. `16:D7K1V8N48` limits what is verified of
        all rows together, which then share by score. Each costs a program per batch
        bucket.
      ngram_strategies: the same for `ngram`, and for `tlt` before the drafter is ready.
      tuner: who chooses: `static` and `threshold` (one candidate per entry),
        `beg_mab` (the paper's bandit), `cost_model` (ours), or one of one's own.
      threshold: of `threshold`: most rows at which speculation begins; 0: those of the
        last entry.
      hysteresis: of `threshold`: rows above it at which it still goes on.
      epsilon: of `beg_mab`: how often a candidate is chosen at random.
      window: of `beg_mab`: calls of a candidate that count.
      ranking: of the learned drafter's candidates: by the noise that the target draws
        with (`coupled`) or by probability alone (`deterministic`).
      tau: temperature of the coupled score's softmax, by which a score is the chance
        that a draft comes true; lower is surer. Unset: as it was measured with the
        drafter's weights, 0.5 where it was not, and from there on as drafts come true.
        One that is set stays, and with it the sharpness that was measured.
      rule: what accepts the learned drafter's drafts: `keyed` keeps the tokens of plain
        decoding; `rejection` and `block` keep their law alone. These judge what is
        sampled from the drafter, to which ranking and tau mean nothing: `rejection`
        chains and trees without a budget (strategies such as D5K1V6, D4K2V8), `block`
        chains. What tokens then depend on stands in docs/sampling.md. Suffix matches
        are always `keyed`.
    """

    mode: Literal["off", "ngram", "tlt"] = "off"
    strategies: tuple[str, ...] = ("1:D7K1V8,D3K1V4", "4:D5K1V6", "16:D3K1V4")
    ngram_strategies: tuple[str, ...] = ("2:D6K1V7-ngram", "8:D4K1V5-ngram")
    tuner: str = schema.choice(
        "cost_model", "static", "threshold", "beg_mab", "cost_model"
    )
    threshold: int = schema.number(0, 0, 2**16)
    hysteresis: int = schema.number(0, 0, 2**16)
    epsilon: float = schema.number(0.1, 0.0, 1.0)
    window: int = schema.number(300, 1, 10**6)
    ranking: Literal["coupled", "deterministic"] = "coupled"
    tau: float | None = schema.number(None, 1e-3, 1e3)
    rule: Literal["keyed", "rejection", "block"] = "keyed"


@dataclasses.dataclass(frozen=True)
class DrafterShape:
    """The drafter.

    Attributes:
      architecture: what is computed: `tlt`, ours, token by token; `block`, ours, all
        tokens of a draft in one pass; or what SGLang and vLLM load: `eagle` (with
        features `last`) and `eagle3` (three layers fused).
      features: `last` (the target's normed last feature), `low_mid_high` (three layers
        fused) or `layers` (those named in feature_layers).
      feature_layers: indices of the target's layers, for `layers`.
      draft_vocab_size: tokens that can be proposed, the likeliest on the texts; 0:
        all.
      block_size: of `block`: tokens that a pass guesses, so deep strategies are at
        most; 0: as deep as the deepest of them (trained before a run: as `eval.depth`).
    """

    architecture: Literal["tlt", "eagle", "eagle3", "block"] = "tlt"
    features: Literal["last", "low_mid_high", "layers"] = "low_mid_high"
    feature_layers: tuple[int, ...] = ()
    draft_vocab_size: int = schema.number(0, 0, 10**7)
    block_size: int = schema.number(0, 0, 32)


@dataclasses.dataclass(frozen=True)
class Drafter(DrafterShape):
    """The drafter of a run.

    Attributes:
      directory: where a trained one is read from (the workdir of
        `tlt_jax.train_drafter`, an export, or a published EAGLE, EAGLE-3 or speculators
        drafter), or the name of one that comes with the package
        (`smollm2-135m-instruct`); the shape is then its own. Empty: it begins with
        random weights.
      architecture, features, feature_layers, draft_vocab_size: see `DrafterShape`.
      block_size: see `DrafterShape`.
      max_length: positions of texts that a trained drafter is used for although it was
        trained for fewer, where it may be of less use; 0: what it was trained for, or,
        where it goes on learning, the longest text.
    """

    directory: str = ""
    max_length: int = schema.number(0, 0, 10**7)


@dataclasses.dataclass(frozen=True)
class Objective:
    """What a drafter learns. An unset field is what `name` prescribes.

    Attributes:
      name: a preset of `tlt_jax.specdec.training.objectives`; a drafter of
        architecture `block` has one of its own, whatever stands here.
      num_steps: unrolled steps; of architecture `block` they are its `block_size`.
      decay: step k counts decay ** k.
      token_loss: how laws are compared: `soft_ce`, `kl`, `tv`, `lk_hybrid`, or a
        function of one's own.
    """

    name: Literal["eagle", "hass", "eagle3"] = "eagle3"
    num_steps: int | None = schema.number(None, 1, 256)
    decay: float | None = schema.number(None, 1e-6, 1.0)
    token_loss: str | None = schema.choice(None, "soft_ce", "kl", "tv", "lk_hybrid")

    def overrides(self) -> dict[str, Any]:
        """Return the fields that are set, without `name`."""
        names = [field.name for field in dataclasses.fields(Objective)]
        values = {name: getattr(self, name) for name in names if name != "name"}
        return {key: value for key, value in values.items() if value is not None}


@dataclasses.dataclass(frozen=True)
class Adaptation(Objective):
    """Training of the drafter during a run, on workers that wait.

    Attributes:
      name, num_steps, decay, token_loss: see `Objective`.
      enabled: false: the drafter stays as it is.
      learning_rate: AdamW's, constant after `warmup_steps`; unset: 1e-3 for a drafter
        that began with random weights, 1e-4 for one trained before, which larger steps
        spoil.
      warmup_steps: training steps over which the rate rises to it: Adam's first steps
        are as large as the rate, whatever the gradient.
      num_rows: rows of a training step.
      row_tokens: columns of a row.
      row_bases: positions of a row that are drafted from.
      head_chunk: bases whose logits are held at once.
      piece_bases: positions of each row that are drafted from in one piece of a step;
        at a rollout's end no further piece is begun, and the step is given up. 0: all,
        as one piece.
      capture_frac: part of the texts that are kept for it.
      buffer_mb: host memory for texts in MiB.
      spill_mb: disk for texts beyond that in MiB, in the workdir; 0: none.
      max_age: updates of the policy that a text may be behind.
      previous_frac: share of positions from texts of the steps before.
      publish_steps: training steps after which the engines get the new weights during
        a rollout; 0: at its end alone.
      max_frac: with one worker nobody waits: time for training between rollout and
        update, as a part of the rollout's, spent while it pays; 0: none.
      max_steps: with one worker: most training steps between rollout and update; 0: as
        many as the time allows. With time to spare it makes the drafter, too, a
        function of the settings; under a chain rule (`specdec.rule`) the time has no
        say then, and so many are taken after every rollout.
    """

    enabled: bool = True
    learning_rate: float | None = schema.number(None, above=0.0, high=1e30)
    warmup_steps: int = schema.number(20, 0, 10**9)
    num_rows: int = schema.number(1, 1, 10**6)
    row_tokens: int = schema.number(512, 3, 10**8)
    row_bases: int = schema.number(320, 1, 10**7)
    head_chunk: int = schema.number(256, 1, 10**7)
    piece_bases: int = schema.number(64, 0, 10**7)
    capture_frac: float = schema.number(1.0, 0.0, 1.0)
    buffer_mb: int = schema.number(1024, 1, 2**24)
    spill_mb: int = schema.number(0, 0, 2**30)
    max_age: int = schema.number(1, 0, 10**9)
    previous_frac: float = schema.number(0.5, 0.0, 1.0)
    publish_steps: int = schema.number(0, 0, 10**9)
    max_frac: float = schema.number(0.2, 0.0, 1e6)
    max_steps: int = schema.number(0, 0, 10**9)

    @property
    def counts_steps(self) -> bool:
        """Whether a number says how long one worker's trainings are at most."""
        return self.max_steps > 0 and self.max_frac > 0


@dataclasses.dataclass(frozen=True)
class Workers:
    """Rollout workers: engines on devices of their own, fed from one queue.

    Attributes:
      num: how many share the rollout. On CPUs several are simulated devices that share
        its cores.
      placement: `colocated`: on the learner's devices, in every process so many;
        `separate`: so many processes of their own in all, with devices of their own,
        which `tlt_jax.launch` starts beside the learner's.
      min_idle: workers that must wait before the drafter's training begins.
      timeout_s: one that completes no decode call for so many seconds is given up, and
        its requests are generated by the others.
    """

    num: int = schema.number(1, 1, 2**10)
    placement: Literal["colocated", "separate"] = "colocated"
    min_idle: int = schema.number(1, 1, 2**10)
    timeout_s: float = schema.number(900.0, 1e-3, 604800.0)


def check_rule(cfg: Specdec) -> None:
    """Refuse a chain rule where no learned drafter is there to be judged.

    Raises:
      schema.ConfigError: it is so.
    """
    if cfg.rule != "keyed" and cfg.mode != "tlt":
        raise schema.ConfigError(
            f"specdec.rule={cfg.rule!r} with specdec.mode={cfg.mode!r}: it judges what "
            "a learned drafter has sampled, and there is none. Set specdec.mode=tlt, "
            "or specdec.rule=keyed."
        )


def check_placement(cfg: Workers, specdec: Specdec, adaptation: Adaptation) -> None:
    """Refuse what workers in processes of their own cannot do.

    Raises:
      schema.ConfigError: a drafter is to be published in the midst of its training.
    """
    trains = specdec.mode == "tlt" and adaptation.enabled
    if cfg.placement == "separate" and trains and adaptation.publish_steps:
        raise schema.ConfigError(
            f"adaptation.publish_steps={adaptation.publish_steps} with "
            "workers.placement='separate': such workers take a drafter up between "
            "rollouts, once its training has ended. Set adaptation.publish_steps=0, or "
            "workers.placement=colocated."
        )


def check_shape(shape: DrafterShape) -> None:
    """Refuse a drafter's shape that contradicts itself.

    Raises:
      schema.ConfigError: layers are named and not used, or the other way round, or a
        size is of another architecture.
    """
    if shape.block_size and shape.architecture != "block":
        raise schema.ConfigError(
            f"drafter.block_size={shape.block_size} with drafter.architecture="
            f"{shape.architecture!r}: it is of architecture block; leave it out, or "
            "set drafter.architecture=block."
        )
    if (shape.features == "layers") != bool(shape.feature_layers):
        raise schema.ConfigError(
            f"drafter.features={shape.features!r} with drafter."
            f"feature_layers={shape.feature_layers}: name layers with "
            "features='layers', and only then."
        )
    num = {"last": 0, "low_mid_high": 3}.get(shape.features, len(shape.feature_layers))
    if {"eagle": num != 0, "eagle3": num != 3}.get(shape.architecture, False):
        raise schema.ConfigError(
            f"drafter.architecture={shape.architecture!r} with drafter.features="
            f"{shape.features!r}, feature_layers={shape.feature_layers}: eagle reads "
            "the last feature (features='last'), eagle3 three layers ('low_mid_high')."
        )
