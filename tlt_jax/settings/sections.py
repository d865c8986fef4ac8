"""The sections of a training run's settings: meaning, unit, range, default.

Those of speculation and its workers stand in `speculation`. A field typed `... | None`
is unset by default; what that means stands beside it.
"""

import dataclasses
import math
from typing import Any, Literal

from tlt_jax.settings import schema


@dataclasses.dataclass(frozen=True)
class Model:
    """The policy.

    Attributes:
      spec: where the weights come from: a Hugging Face directory, a hub name,
        `gguf:FILE`, another source of `tlt_jax.models.formats.source`, or `scratch`: a
        small model made for the task (`pretrain`). Required.
      remat: what the backward pass recomputes: `none`, `dots` (all but the products),
        `full` (each layer from its input).
    """

    spec: str = ""
    remat: Literal["none", "dots", "full"] = "full"


@dataclasses.dataclass(frozen=True)
class Pretrain:
    """How a model is made where `model.spec` is `scratch`; elsewhere without effect.

    It learns the task's questions with answers that are in part another question's:
    what is left to reinforcement learning is to prefer the right ones.

    Attributes:
      num_layers: layers.
      d_model: model dimension.
      d_ff: feed-forward dimension, of each expert where there are some.
      num_heads: attention heads.
      num_kv_heads: key/value heads; divide num_heads.
      head_dim: dimension of a head; even.
      num_experts: experts of each layer's feed-forward block; 0: a dense block.
      experts_per_token: experts that a token passes; at most num_experts.
      steps: supervised steps.
      num_rows: rows per step, each as long as the longest question with the longest
        answer and holding as many as fit.
      learning_rate: AdamW's at the first step, falling to 0 by a cosine.
      noise_frac: part of the answers that are another question's; with enough steps the
        first rewards are about 1 - noise_frac.
    """

    num_layers: int = schema.number(2, 1, 10**4)
    d_model: int = schema.number(64, 1, 2**17)
    d_ff: int = schema.number(192, 1, 2**20)
    num_heads: int = schema.number(4, 1, 2**12)
    num_kv_heads: int = schema.number(2, 1, 2**12)
    head_dim: int = schema.number(16, 2, 2**12)
    num_experts: int = schema.number(0, 0, 2**15)
    experts_per_token: int = schema.number(2, 1, 2**15)
    steps: int = schema.number(300, 0, 10**9)
    num_rows: int = schema.number(64, 1, 10**6)
    learning_rate: float = schema.number(3e-3, above=0.0, high=1e3)
    noise_frac: float = schema.number(0.7, 0.0, 1.0)


@dataclasses.dataclass(frozen=True)
class Task:
    """Where prompts come from.

    Attributes:
      name: a task that `tlt_jax.rl.tasks.build` makes: one of its own, a reasoning-gym
        generator, or a data set (`tlt_jax.rl.tasks.files`). Required.
      options: the task's own settings (difficulty, field names, ...).
      size: number of distinct examples.
      seed: fixes the generated examples; held-out examples use another one.
      system_prompt: put before every prompt; empty: none.
      template_options: settings of the model's chat template, such as
        `enable_thinking`; names that it does not read are refused.
      max_prompt_tokens: longest prompt in tokens, template included.
      long_prompts: a longer one stops the run (`refuse`) or is left out and counted
        (`skip`).
    """

    name: str = ""
    options: schema.Options = ()
    size: int = schema.number(1000, 1, 10**8)
    seed: int = schema.number(0, 0, 10**18)
    system_prompt: str = ""
    template_options: schema.Options = ()
    max_prompt_tokens: int = schema.number(512, 1, 10**7)
    long_prompts: Literal["refuse", "skip"] = "refuse"


@dataclasses.dataclass(frozen=True)
class Sampling:
    """The law that tokens are drawn from; the same one gives every log-probability.

    Attributes:
      temperature: divides the logits; above 0 in training, 0 is greedy.
      top_p: keep the smallest set of tokens with this mass; 1: off.
      top_k: keep the k most likely tokens; 0: off.
      min_p: keep tokens at least this fraction as likely as the likeliest; 0: off.
    """

    temperature: float = schema.number(1.0, 0.0, 1e3, least=1e-3)
    top_p: float = schema.number(1.0, 1e-9, 1.0)
    top_k: int = schema.number(0, 0, 10**7)
    min_p: float = schema.number(0.0, 0.0, 0.999)


@dataclasses.dataclass(frozen=True)
class Rollout:
    """How completions are generated.

    Attributes:
      prompts_per_step: P, prompts per RL step.
      group_size: R, completions per prompt.
      max_new_tokens: longest completion in tokens, EOS included.
      stop: strings that end a completion, none of them empty; a special token is named
        by its text, such as <|im_end|>.
      max_batch: rows decoded at once; batches are powers of two up to it.
      steps_per_call: decode steps per jitted call.
      prefill_chunk: prompt tokens per prefill call.
      cpu_kernels: on CPUs, `native` computes products of few columns, and attention of
        few queries, by kernels of our own, `xla` leaves all to XLA; `auto`: native
        where it can be, which is on one CPU device in float32.
      attention: over the cache: `auto` takes the Pallas kernel on TPUs and GPUs, and on
        CPUs the native one where `cpu_kernels` are native, else the portable walk over
        pages; `portable`, `native_cpu`, `mosaic_tpu` and `triton_gpu` take one by name;
        `mosaic_tpu_interpreted` and `triton_gpu_interpreted` run a kernel's program on
        CPUs, slowly.
      check_kernels: look for errors: in every forward the host checks page tables,
        lengths, positions and ancestors before attention reads by them, and a wrong one
        ends the rollout by its name. The device waits for it each time.
      tensor: devices of one process over which an engine splits heads and vocabulary;
        0: as many as `mesh.tensor`. Divides the model's key/value heads.
      lag: RL steps by which the weights that roll out are older than those that learn:
        always so many, after the first ones. 0: rollout and update take turns; else
        rollouts go on while the learner updates, and it holds lag + 1 copies of the
        weights more, an engine lag. For one process and engines of one device.
    """

    prompts_per_step: int = schema.number(8, 1, 10**6)
    group_size: int = schema.number(8, 1, 10**5)
    max_new_tokens: int = schema.number(512, 1, 10**7)
    stop: tuple[str, ...] = ()
    max_batch: int = schema.number(64, 1, 2**16)
    steps_per_call: int = schema.number(32, 1, 10**6)
    prefill_chunk: int = schema.number(128, 1, 10**7)
    cpu_kernels: Literal["auto", "xla", "native"] = "auto"
    attention: Literal[
        "auto",
        "portable",
        "native_cpu",
        "mosaic_tpu",
        "triton_gpu",
        "mosaic_tpu_interpreted",
        "triton_gpu_interpreted",
    ] = "auto"
    check_kernels: bool = False
    tensor: int = schema.number(0, 0, 2**20)
    lag: int = schema.number(0, 0, 64)


@dataclasses.dataclass(frozen=True)
class Cache:
    """The paged key/value cache.

    Attributes:
      page_size: tokens per page.
      num_pages: pages in the pool; 0: enough for `rollout.max_batch` rows of full
        length.
    """

    page_size: int = schema.number(64, 1, 2**16)
    num_pages: int = schema.number(0, 0, 10**9)


@dataclasses.dataclass(frozen=True)
class Algorithm:
    """The policy-gradient rule. An unset field is what `name` prescribes.

    Attributes:
      name: a preset of `tlt_jax.rl.update.algorithms`.
      advantage: how a group's rewards become advantages: `grpo`, `dr_grpo`, `rloo`,
        `reinforce_pp_baseline`, or a function of one's own.
      aggregation: how token losses become one number: `token_mean` over the batch's
        tokens, `sequence_mean` over tokens then sequences, `constant` sum over tokens
        by the length limit.
      dynamic_sampling: replace groups whose rewards are all equal by new prompts.
      overlong_shaping: let the reward fall for completions close to the length limit.
      overlong_buffer_frac: part of the limit over which it falls.
      overlong_penalty: how far it falls.
      surrogate: what a token costs: `clipped` (PPO's), or a function of one's own.
      clip_low: the probability ratio is clipped below at 1 - clip_low.
      clip_high: the ratio is clipped above at 1 + clip_high.
      dual_clip: where the advantage is negative the ratio counts at most this much,
        above 1 + clip_high; unset: no bound.
      ratio_level: the ratio is that of a `token` or of the `sequence`.
      kl_coef: weight of the divergence from the initial policy.
      kl_estimator: what estimates it from log-probabilities: `k1`, `k2` or `k3`.
      kl_placement: `loss` (a term of the loss) or `reward` (subtracted from rewards).
      importance_cap: truncated importance sampling: the ratio trainer to sampler that
        weights a token counts at most this much; unset: no weights, or with
        `rollout.lag` 2.
      entropy_coef: weight of the entropy bonus.
    """

    name: Literal[
        "grpo", "dr_grpo", "dapo", "rloo", "reinforce_pp_baseline", "gspo"
    ] = "grpo"
    advantage: str | None = schema.choice(
        None, "grpo", "dr_grpo", "rloo", "reinforce_pp_baseline"
    )
    aggregation: Literal["token_mean", "sequence_mean", "constant"] | None = None
    dynamic_sampling: bool | None = None
    overlong_shaping: bool | None = None
    overlong_buffer_frac: float | None = schema.number(None, 0.0, 1.0)
    overlong_penalty: float | None = schema.number(None, 0.0, 1e6)
    surrogate: str | None = schema.choice(None, "clipped")
    clip_low: float | None = schema.number(None, 0.0, 1.0)
    clip_high: float | None = schema.number(None, 0.0, 1e6)
    dual_clip: float | None = schema.number(None, above=1.0, high=1e6)
    ratio_level: Literal["token", "sequence"] | None = None
    kl_coef: float | None = schema.number(None, 0.0, 1e6)
    kl_estimator: Literal["k1", "k2", "k3"] | None = None
    kl_placement: Literal["loss", "reward"] | None = None
    importance_cap: float | None = schema.number(None, 1e-3, 1e6)
    entropy_coef: float | None = schema.number(None, 0.0, 1e6)

    def overrides(self) -> dict[str, Any]:
        """Return the fields that are set, without `name`."""
        fields = dataclasses.asdict(self)
        del fields["name"]
        return {key: value for key, value in fields.items() if value is not None}


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """AdamW.

    Attributes:
      learning_rate: learning rate at its highest.
      schedule: after warm-up: `constant`, `linear` or `cosine` down to 0 at num_steps.
      warmup_steps: RL steps of linear increase from 0.
      beta1: decay of the first moment.
      beta2: decay of the second moment.
      eps: added to the root of the second moment.
      weight_decay: decoupled weight decay.
      clip_norm: largest global gradient norm; 0: no clipping.
    """

    learning_rate: float = schema.number(1e-6, 0.0, 1e3)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = schema.number(0, 0, 10**9)
    beta1: float = schema.number(0.9, 0.0, 0.999999)
    beta2: float = schema.number(0.999, 0.0, 0.999999)
    eps: float = schema.number(1e-8, 1e-30, 1.0)
    weight_decay: float = schema.number(0.0, 0.0, 100.0)
    clip_norm: float = schema.number(1.0, 0.0, 1e9, least=1e-9)


@dataclasses.dataclass(frozen=True)
class Learner:
    """How a batch of completions becomes optimizer steps.

    Attributes:
      epochs: passes over the batch.
      minibatches: optimizer steps per pass; divides rollout.prompts_per_step.
      row_tokens: length of a packed row in tokens; holds the longest prompt with its
        longest completion.
      rows_per_micro_batch: rows whose activations are held at once.
      old_logprobs: log-probabilities that ratios compare with: `recompute`d by the
        trainer where a batch takes several updates (with one they are the update's
        own), so that weights depend on the tokens alone; or recorded by the `rollout`,
        which saves that pass and differs in last bits with the batches of its rows.
        With `rollout.lag` ratios of recomputed ones are weighted by
        `algorithm.importance_cap` against the policy that rolled out, which takes a
        pass with its weights; recorded ones are that policy's already.
      attention: of the update: `auto` takes a library's flash kernel (`splash` on TPUs,
        `cudnn` on GPUs from Hopper on; bfloat16) where that costs less, answers then
        having a copy of their prompt each; else, and with `portable`, each prompt is
        computed once a row.
      routes: of a mixture of experts: the trainer's forward chooses experts itself
        (`own`), or takes those that the rollout chose (`replay`).
      load_balancing_coef: of a mixture of experts: weight of the loss that evens out
        how many tokens each expert gets; 0: off.
      router_z_coef: of a mixture of experts: weight of the mean squared log of the
        routers' normalisers, which keeps their logits small; 0: off.
    """

    epochs: int = schema.number(1, 1, 10**4)
    minibatches: int = schema.number(1, 1, 10**6)
    row_tokens: int = schema.number(2048, 2, 10**8)
    rows_per_micro_batch: int = schema.number(1, 1, 10**6)
    old_logprobs: Literal["recompute", "rollout"] = "recompute"
    attention: Literal["auto", "portable", "splash", "cudnn"] = "auto"
    routes: Literal["own", "replay"] = "own"
    load_balancing_coef: float = schema.number(0.0, 0.0, 1e3)
    router_z_coef: float = schema.number(0.0, 0.0, 1e3)


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Devices along each mesh axis; one axis may be -1: all that remain.

    Attributes:
      data: copies of the weights, each with its part of the batch.
      fsdp: weights and batch both split.
      tensor: heads, feed-forward and vocabulary split.
      expert: experts of a mixture and batch both split.
    """

    data: int = schema.number(1, -1, 2**20)
    fsdp: int = schema.number(-1, -1, 2**20)
    tensor: int = schema.number(1, -1, 2**20)
    expert: int = schema.number(1, -1, 2**20)


@dataclasses.dataclass(frozen=True)
class Reward:
    """How a completion is judged.

    Attributes:
      functions: names of rewards: `task` (the task's own verifier), `exact`, `number`,
        `math_verify`, or `module:function` of one's own; empty: `task`.
      weights: what each one's value counts in their sum, finite; empty: 1 each.
      workers: processes that judge; 0: none, in the run's own process and without a
        time limit.
      placement: `colocated`: so many beside each process of the run, on its host;
        `separate`: so many in all, which `tlt_jax.launch` starts on any host.
      timeout_s: time that judging one completion may take in seconds.
      memory_mb: memory (address space, in MiB) that judging may take in each of these
        processes, beyond what the process has when it starts; 0: no limit, as functions
        need that reserve much more than they use (on GPUs, for example).
      failure_reward: the reward, in the sum's place, where a function fails, hangs or
        is not finite.
      unfinished_thoughts: a completion that ends within its thoughts (`<think>`) is
        searched for an answer, too; else it has none.
    """

    functions: tuple[str, ...] = schema.names()
    weights: tuple[float, ...] = ()
    workers: int = schema.number(2, 0, 2**10)
    placement: Literal["colocated", "separate"] = "colocated"
    timeout_s: float = schema.number(10.0, 1e-3, 86400.0)
    memory_mb: int = schema.number(8192, 0, 1_000_000)
    failure_reward: float = schema.number(0.0, -1e6, 1e6)
    unfinished_thoughts: bool = False


def check_reward(cfg: Reward) -> None:
    """Check what no single field of the rewards can say.

    Raises:
      schema.ConfigError: a weight is not finite, there are not as many as functions, or
        nobody would judge.
    """
    names, weights = cfg.functions, cfg.weights
    if cfg.placement == "separate" and not cfg.workers:
        raise schema.ConfigError(
            "reward.placement='separate' with reward.workers=0: nobody would judge. "
            "Set reward.workers to 1 or more, or reward.placement=colocated."
        )
    if weights and len(weights) != len(names):
        raise schema.ConfigError(
            f"reward.weights={weights} of reward.functions={names}: give each function "
            "its weight, or leave the weights out, which is 1 each."
        )
    for i, weight in enumerate(weights):
        if not math.isfinite(weight):
            raise schema.ConfigError(f"reward.weights[{i}]={weight} is not finite.")


@dataclasses.dataclass(frozen=True)
class Eval:
    """Evaluation on held-out prompts: avg@k and pass@k.

    Attributes:
      every: RL steps between evaluations; 0: never.
      num_prompts: held-out prompts asked.
      samples: completions per prompt.
      k: the k of pass@k, each in [1, samples].
      temperature: as sampling.temperature but 0 (greedy) is allowed; unset: the
        training's.
    """

    every: int = schema.number(0, 0, 10**9)
    num_prompts: int = schema.number(64, 1, 10**6)
    samples: int = schema.number(1, 1, 10**5)
    k: tuple[int, ...] = (1,)
    temperature: float | None = schema.number(None, 0.0, 1e3, least=1e-3)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What survives a crash.

    All that decides what is computed does. The texts in which suffix matches are looked
    up do not: they are gathered anew, which costs some speed and changes no token (by a
    chain rule, `specdec.rule`, see docs/sampling.md).

    Attributes:
      every: RL steps between checkpoints; 0: only the last step.
      keep: newest checkpoints kept on disk.
      drafter: what is written of an adapted drafter: what training changes, in the
        background (`selective`); or all that it computes with, in the background
        (`async`) or with the run waiting (`blocking`).
      on_damage: what becomes of a run whose newest checkpoint is damaged: it is refused
        (`refuse`), or goes on from the one before and says so (`previous`).
      grace_s: seconds after Ctrl-C or SIGTERM in which a step may be finished; then its
        rollout or evaluation is given up, and the step before is saved.
    """

    every: int = schema.number(10, 0, 10**9)
    keep: int = schema.number(2, 1, 10**6)
    drafter: Literal["selective", "async", "blocking"] = "selective"
    on_damage: Literal["refuse", "previous"] = "refuse"
    grace_s: float = schema.number(15.0, 0.0, 86400.0)


@dataclasses.dataclass(frozen=True)
class Log:
    """What is shown and written besides metrics.jsonl.

    Attributes:
      tensorboard: write event files: numbers, settings, sampled completions.
      wandb: copy the record to Weights & Biases: `online`, or `offline` into files that
        `wandb sync` sends later. Needs the package wandb.
      trackio: copy the record to Trackio, which keeps it on this machine. Needs the
        package trackio.
      project: name of the project there, for both of them.
      plots_every: RL steps between redrawings of plots/; 0: only at the end.
      rollouts_every: RL steps between steps whose completions are written to
        rollouts/; 0: never.
      progress: `auto` (live on a terminal, else lines), `plain` or `off`.
    """

    tensorboard: bool = True
    wandb: Literal["off", "online", "offline"] = "off"
    trackio: bool = False
    project: str = "tlt_jax"
    plots_every: int = schema.number(10, 0, 10**9)
    rollouts_every: int = schema.number(1, 0, 10**9)
    progress: Literal["auto", "plain", "off"] = "auto"
