"""A model made on the spot learns, by GRPO, to prefer right answers.

Shows the whole loop on any machine, nothing downloaded: a transformer of 0.1 million
weights is taught a task with 70 % of its answers wrong, and reinforcement learning then
brings it to answer right.
"""

import ml_collections

from tlt_jax import config as config_lib


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Returns the recipe; `arg` is empty (`arithmetic`), `arithmetic` or `count`."""
    config = config_lib.default()
    config.model.spec = "scratch"
    config.model.remat = "none"
    config.task.name = arg or "arithmetic"
    config.precision = "float32"
    config.pretrain.noise_frac = 0.7

    config.rollout.prompts_per_step = 16
    config.rollout.group_size = 8
    config.rollout.max_batch = 32
    config.rollout.prefill_chunk = 16
    config.cache.page_size = 16
    config.task.max_prompt_tokens = 8
    match config.task.name:
        case "arithmetic":
            config.num_steps = 60
            config.pretrain.steps = 600
            config.rollout.max_new_tokens = 4
            config.rollout.steps_per_call = 4
            config.optimizer.learning_rate = 1e-3
        case "count":
            config.num_steps = 40
            config.task.options.max_n = 32
            config.pretrain.steps = 400
            config.pretrain.num_rows = 8
            config.rollout.max_new_tokens = 96
            config.rollout.steps_per_call = 16
            config.optimizer.learning_rate = 5e-4
        case other:
            raise ValueError(
                f"tiny.py has no variant {other!r}: use arithmetic (the default) or "
                "count."
            )

    config.learner.row_tokens = 256
    # Rewards of single updates are the policy's own: no clipping, no reference.
    config.algorithm.name = "grpo"
    config.algorithm.kl_coef = 0.0
    # Comparing short texts needs no processes.
    config.reward.workers = 0
    config.checkpoint.every = 5
    config.log.plots_every = 0
    return config
