"""GRPO on a real pretrained model: SmolLM2-135M-Instruct learns one-digit sums.

Command: python -m tlt_jax.main --config=configs/smollm2.py --workdir=DIR
"""

import ml_collections

from tlt_jax import config as base


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Return the recipe."""
    del arg
    config = base.default()
    config.model.spec = "smollm2-135m-instruct"
    config.model.remat = "none"
    config.task.name = "chain_sum"
    config.task.options = dict(
        style="two_shot", min_terms=2, max_terms=2, min_digits=1, max_digits=1
    )
    config.task.size = 512
    config.task.max_prompt_tokens = 192
    config.rollout.prompts_per_step = 8
    config.rollout.group_size = 8
    config.rollout.max_new_tokens = 64
    config.rollout.max_batch = 64
    config.learner.row_tokens = 512
    config.learner.rows_per_micro_batch = 1
    config.optimizer.learning_rate = 1e-5
    config.algorithm.kl_coef = 0.0
    config.num_steps = 20
    config.checkpoint.every = 8
    config.reward.workers = 0
    return config
