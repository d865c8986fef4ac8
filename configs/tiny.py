"""Models made on the spot learn by GRPO to prefer right answers.

Shows the whole loop on any machine, with nothing to download: a transformer of 0.1
million weights is taught a task with 70 % of its answers exchanged, and reinforcement
learning on the task's verifier then makes it answer right. It reproduces no result of a
paper.

    python -m tlt_jax.main --config=configs/tiny.py --workdir=DIR
    python -m tlt_jax.main --config=configs/tiny.py:count --workdir=DIR
    python -m tlt_jax.main --config=configs/tiny.py:experts --workdir=DIR

Variants:
  arithmetic (the default): sums of two digits, `3+4=` -> `7`.
  count: `n=4:` -> `1 2 3 4`, n up to 32, most of them small: completions have 6 tokens
    at the median and 87 at the longest, as rollouts of reasoning have long tails.
  experts: the arithmetic, by a mixture of eight experts of which a token passes two.

Expected (seeds 0, 1, 2; the mean reward of the first two steps, and of the last ten):
  arithmetic, 60 steps: from 0.22, 0.40, 0.32 to 0.89, 0.98, 0.91.
  count, 40 steps: from 0.38, 0.33, 0.35 to 0.80, 0.84, 0.77; it swings with the share
    of long questions in a step, which are right less often.
  experts, 60 steps: from 0.26, 0.35, 0.30 to 0.85, 0.93, 0.93; no route flips
    (`moe/route_flips`).

Cost on two CPU cores: a step takes 0.06 s (count: 0.4 s). The whole run needs
45 to 60 seconds of processor time, nearly all of it for compiling, and 15 (count: 25)
when the programs are in the compilation cache.
"""

import ml_collections

from tlt_jax import config as config_lib

VARIANTS = ("arithmetic", "count", "experts")


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Returns the recipe; `arg` is one of `VARIANTS`, empty: `arithmetic`."""
    name = arg or VARIANTS[0]
    if name not in VARIANTS:
        raise ValueError(
            f"tiny.py has no variant {name!r}: use arithmetic (the default), count or "
            "experts."
        )
    config = config_lib.default()
    config.model.spec = "scratch"
    config.model.remat = "none"
    config.task.name = "count" if name == "count" else "arithmetic"
    config.precision = "float32"
    config.pretrain.noise_frac = 0.7

    config.rollout.prompts_per_step = 16
    config.rollout.group_size = 8
    config.rollout.max_batch = 32
    config.rollout.prefill_chunk = 16
    config.cache.page_size = 16
    config.task.max_prompt_tokens = 8
    if name == "experts":
        config.pretrain.num_experts = 8
        config.pretrain.experts_per_token = 2
        config.pretrain.d_ff = 64
        config.learner.load_balancing_coef = 1e-3
    if name != "count":
        config.num_steps = 60
        # The model learns sums by heart: a question held out could not be answered, so
        # evaluation asks those that training asks.
        config.task.options.holdout_frac = 0.0
        config.pretrain.steps = 600
        config.rollout.max_new_tokens = 4
        config.rollout.steps_per_call = 4
        config.optimizer.learning_rate = 1e-3
        # For specdec.mode=tlt: an answer is over, and who waits goes on, in no time.
        # Few strategies, since each is compiled for each size of batch.
        config.specdec.strategies = ("4:D2K1V3",)
        config.specdec.ngram_strategies = ("4:D2K1V3-ngram",)
        config.adaptation.name = "eagle"
        config.adaptation.row_tokens = 32
        config.adaptation.row_bases = 16
        config.adaptation.piece_bases = 0
    else:
        config.num_steps = 40
        config.task.options.max_n = 32
        config.pretrain.steps = 400
        config.pretrain.num_rows = 8
        config.rollout.max_new_tokens = 96
        config.rollout.steps_per_call = 16
        config.optimizer.learning_rate = 5e-4

    # For specdec.mode=tlt, too: of two layers there are no three to be fused.
    config.drafter.features = "last"
    config.learner.row_tokens = 256
    # Rewards of single updates are the policy's own: no clipping, no reference.
    config.algorithm.name = "grpo"
    config.algorithm.kl_coef = 0.0
    # Comparing short texts needs no processes.
    config.reward.workers = 0
    config.checkpoint.every = 5
    config.log.plots_every = 0
    return config
