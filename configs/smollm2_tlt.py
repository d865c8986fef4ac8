"""TLT on SmolLM2-135M-Instruct: two workers, a drafter trained by one that waits.

Counting in words with a pass mark, by DAPO: groups of eight are drawn until two carry
signal, so that rollouts are most of a step, as they are with reasoning models. Two
workers of one core each take two rows at a time; who has none left
trains the drafter until the other is through, on the texts of this step and the last.
The drafter begins with random weights and is used once its drafts would have more
accepted than plain decoding. To begin with a trained one, train it with
configs/smollm2_drafter.py:counting and name its workdir:
--config.drafter.directory=workdirs/smollm2_counting_drafter.

A process for each worker, with a core of its own, or both as threads of one:

    python -m tlt_jax.launch --processes=2 -- --config=configs/smollm2_tlt.py \
        --config.workers.num=1 --workdir=workdirs/tlt
    python -m tlt_jax.main --config=configs/smollm2_tlt.py --workdir=workdirs/tlt

Variants: `off`, the same run without speculation: same tokens, rewards and weights;
`ngram`, proposals from earlier text alone.

Expected outcome (seed 0, drafter.directory set, 20 steps, two processes): rollouts 3.0
times and whole steps 2.0 times as fast as `off`, accept length 5.80, 98 % of the idle
time trained (experiments/results/cpu/end_to_end*); with `adaptation.enabled=false` and
`drafter.max_length=704` 3.0 and 1.9 times, accept length 5.79: a drafter that knows its
task gains little in so few steps. Rewards rise from 0.03 to about 0.6. Cost: 6 to 40
seconds a step on two idle cores, after some minutes of compiling that the compilation
cache keeps; 14 GB of memory.
"""

import ml_collections

from tlt_jax import config as config_lib

VARIANTS = ("off", "ngram")


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Returns the recipe; variants `off` and `ngram` change `specdec.mode` alone."""
    if arg and arg not in VARIANTS:
        raise ValueError(f"smollm2_tlt.py has no variant {arg!r}: use off or ngram.")
    config = config_lib.default()
    config.model.spec = "smollm2-135m-instruct"
    config.model.remat = "none"
    config.num_steps = 16
    # Long-tailed by itself: most answers are short, some count on up to the limit.
    config.task.name = "counting"
    config.task.options = dict(pass_mark=0.9)
    config.task.size = 512
    config.task.max_prompt_tokens = 192

    config.workers.num = 2
    # Each worker keeps all weights: there are none to be gathered, for an update or for
    # the rollouts behind it. Processes, which do so through sockets, save 15 % of both.
    config.mesh.data = 2
    config.mesh.fsdp = 1
    config.rollout.prompts_per_step = 2
    config.rollout.group_size = 8
    config.rollout.prefill_chunk = 192
    config.rollout.max_new_tokens = 512
    # One core is bound by its memory up to about so many rows, as an accelerator is up
    # to a hundred: beyond it guesses cost as much as they bring.
    config.rollout.max_batch = 2
    config.specdec.mode = arg or "tlt"
    # Each candidate costs half a minute of compiling, per bucket and worker.
    config.specdec.strategies = ("2:D7K1V8",)
    # Before the drafter is ready decoding is plain.
    config.specdec.ngram_strategies = ("2:D6K1V7-ngram",) if arg == "ngram" else ()
    config.drafter.features = "low_mid_high"
    config.drafter.draft_vocab_size = 2048
    config.adaptation.num_steps = 4
    config.adaptation.token_loss = "lk_hybrid"

    # Groups that are all right or all wrong are drawn again, as DAPO does: rollouts are
    # most of the step, as they are with reasoning models.
    config.algorithm.name = "dapo"
    config.optimizer.learning_rate = 5e-6
    config.learner.row_tokens = 1024
    config.learner.rows_per_micro_batch = 1
    config.reward.workers = 0
    config.checkpoint.every = 8
    return config
