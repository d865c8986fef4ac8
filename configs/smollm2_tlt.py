"""TLT on SmolLM2-135M-Instruct: it reasons, and idle workers train its drafter.

Products of one digit with the steps written out, sampled at temperature 1, by DAPO:
many answers are short, some go on to the limit, and groups of eight are drawn until
four carry signal, so that rollouts are most of a step, as they are with reasoning
models. Two workers of one core each take two rows at a time; who has none left trains
the drafter until the other is through, on the texts of this step and the last.

A process for each worker, with a core of its own, or both as threads of one:

    python -m tlt_jax.launch --processes=2 -- --config=configs/smollm2_tlt.py \
        --config.workers.num=1 --workdir=workdirs/tlt
    python -m tlt_jax.main --config=configs/smollm2_tlt.py --workdir=workdirs/tlt

Variants: `off`, the same run without speculation: same tokens, rewards and weights;
`ngram`, proposals from earlier text alone; `chain_sum`, sums of two digits in the same
style; `counting`, in words with a pass mark: text that is nearly certain, for which a
drafter of its own task guesses nearly everything (configs/smollm2_drafter.py:counting,
then --config.drafter.directory=workdirs/counting_drafter).

Held-out prompts are asked before the first step and behind the last one.

Seen so far (seed 0, `off`, one worker of 16 rows, stopped after four steps on shared
cores): held-out answers right before the first step 0.08; entropy 3.3 nats a token in
step 1, 2.4 to 2.7 in steps 3 and 4; answers of 102, 57, 60 and 42 tokens at the median,
384 at 95 % in three of the four steps; 3,100 to 9,100 tokens drawn a step. Whether
rewards rise over the 20 steps, and what speculation brings, is not measured yet.
`counting`, from a drafter for its task: rollouts 3.0 times and whole steps 2.0 times as
fast as with specdec.mode=off over 20 steps (experiments/results/cpu/end_to_end*).
"""

import ml_collections

from tlt_jax import config as config_lib

VARIANTS = ("off", "ngram", "chain_sum", "counting")


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Returns the recipe; `off` and `ngram` change `specdec.mode` alone.

    The other two change what is asked, and how much of it.
    """
    if arg and arg not in VARIANTS:
        raise ValueError(
            f"smollm2_tlt.py has no variant {arg!r}: use {', '.join(VARIANTS)}, or "
            "leave it out."
        )
    config = config_lib.default()
    config.model.spec = "smollm2-135m-instruct"
    config.model.remat = "none"
    config.task.size = 512
    config.task.max_prompt_tokens = 192

    config.workers.num = 2
    # Each worker keeps all weights: there are none to be gathered, for an update or for
    # the rollouts behind it. Processes, which do so through sockets, save 15 % of both.
    config.mesh.data = 2
    config.mesh.fsdp = 1
    config.rollout.group_size = 8
    config.rollout.prefill_chunk = 192
    # One core is bound by its memory up to about so many rows, as an accelerator is up
    # to a hundred: beyond it guesses cost as much as they bring.
    config.rollout.max_batch = 2
    config.specdec.mode = arg if arg in ("off", "ngram") else "tlt"
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
    config.learner.rows_per_micro_batch = 1
    config.reward.workers = 0
    config.checkpoint.every = 8
    if arg == "counting":
        config.num_steps = 16
        # Long-tailed by itself: most answers are short, some count up to the limit.
        config.task.name = "counting"
        config.task.options = dict(pass_mark=0.9)
        config.rollout.prompts_per_step = 2
        config.rollout.max_new_tokens = 512
        # Each candidate costs half a minute of compiling, per bucket and worker.
        config.specdec.strategies = ("2:D7K1V8",)
        config.learner.row_tokens = 1024
        return config
    config.num_steps = 20
    config.task.name = "chain_sum" if arg == "chain_sum" else "products"
    config.task.options = dict(
        style="cot", min_terms=2, max_terms=2, min_digits=1, max_digits=1
    )
    config.rollout.prompts_per_step = 4
    config.rollout.max_new_tokens = 384
    # Of so uncertain a text few guesses in a row come true.
    config.specdec.strategies = ("2:D4K1V5",)
    config.learner.row_tokens = 640
    config.eval.every = 20
    config.eval.num_prompts = 16
    config.eval.samples = 2
    return config
