"""A drafter for a model made on the spot, in seconds.

Shows every stage of `tlt_jax.train_drafter` on any machine, with nothing to download: a
tiny target learns to count, writes texts, and a drafter learns to guess them.

    python -m tlt_jax.train_drafter --config=configs/tiny_drafter.py \
        --workdir=workdirs/tiny_drafter
"""

import ml_collections

from tlt_jax.settings import drafter_run


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Returns the recipe; it has no variants."""
    if arg:
        raise ValueError(f"tiny_drafter.py has no variant {arg!r}: leave it out.")
    config = drafter_run.default()
    config.model.spec = "scratch"
    config.pretrain.steps = 200
    config.pretrain.num_rows = 8
    config.num_steps = 60

    config.texts.tasks = ("count",)
    config.texts.num = 64
    config.texts.num_held_out = 16
    config.texts.max_prompt_tokens = 8
    config.texts.max_new_tokens = 48
    config.texts.max_batch = 16
    config.texts.steps_per_call = 16
    config.texts.page_size = 16

    config.drafter.features = "layers"
    config.drafter.feature_layers = (0, 1)
    config.objective.num_steps = 3
    config.objective.token_loss = "lk_hybrid"
    config.optimizer.learning_rate = 3e-3
    config.optimizer.warmup_steps = 5
    config.optimizer.schedule = "cosine"
    config.batch.num_rows = 2
    config.batch.row_tokens = 128
    config.batch.row_bases = 112
    config.batch.head_chunk = 64
    config.eval.depth = 4
    config.checkpoint.every = 20
    return config
