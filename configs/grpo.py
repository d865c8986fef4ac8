"""The paper's runs: GRPO on a reasoning model of 7 to 70 billion weights.

Reproduces the setting of "Taming the Long-Tail: Efficient Reasoning RL Training with
Adaptive Drafter", evaluation setup: GRPO, 8 responses a prompt at temperature 0.9, 32K
tokens of prompt and response, learning rate 1e-6, clipping at 0.2, KL loss with weight
0.001 (low-variance form), rule-based rewards on mathematics. Computing is in bfloat16
over float32 masters. The paper does not say how many prompts a step takes, nor how many
optimizer steps: here 128 prompts and one.

Command: python -m tlt_jax.main --config=configs/grpo.py:qwen2.5-7b --workdir=DIR \
             --config.task.name=data/eurus2_rl.parquet

Variants, and the devices that their meshes are made for; devices other than the first
stand behind an @. The programs of each have been compiled for its devices, without one
of them, by `python -m experiments.ahead_of_time`; what they take of a device's memory
is in docs/recipes.md:

    qwen2.5-7b              Qwen/Qwen2.5-7B                          64 chips of v5p
    ds-r1-distill-qwen-7b   deepseek-ai/DeepSeek-R1-Distill-Qwen-7B  64 chips of v5p
    qwen2.5-32b             Qwen/Qwen2.5-32B                         256 chips of v5p
    llama-3.3-70b           meta-llama/Llama-3.3-70B-Instruct        256 chips of v5p
    qwen3-30b-a3b           Qwen/Qwen3-30B-A3B                       64 chips of v5p
    qwen3-30b-a3b@64xh200   Qwen/Qwen3-30B-A3B                       8 hosts of 8 H200
    qwen2.5-1.5b@h200       Qwen/Qwen2.5-1.5B                        one H200
    qwen2.5-3b@h200         Qwen/Qwen2.5-3B                          one H200
    qwen2.5-7b@8xh200       Qwen/Qwen2.5-7B                          a host of 8 H200
    qwen2.5-7b@8xh100       Qwen/Qwen2.5-7B                          a host of 8 H100
    qwen2.5-7b@v5p-8        Qwen/Qwen2.5-7B                          4 chips of v5p
    qwen2.5-1.5b@v5e-8      Qwen/Qwen2.5-1.5B                        8 chips of v5e

The 30B are a mixture of experts, which no row of the paper is: the mesh splits experts
as well (`mesh.expert`), and records say how many routes flipped between rollout and
trainer; `--config.learner.routes=replay` lets none. Few devices decode the responses of
a step in turns, and of one GPU, v5p-8 or v5e-8 a step has 32 prompts in place of 128.

Weights come from the Hugging Face hub under these names (Llama's after accepting its
licence), or from a directory: --config.model.spec=DIR. Where the number of devices is
another one, set `mesh.fsdp`; `mesh.tensor` divides the model's key/value heads. A
rollout engine's devices must belong to one process, and hosts of v5p have four chips:
learner and engines are split four ways. `rollout.tensor` splits the engines otherwise,
and `workers.num` is how many of them a process has.

The task is a file of the user's: nothing is fetched. The paper trains on a part of
Eurus-2-RL, data set PRIME-RL/Eurus-2-RL-Data on the Hugging Face hub. Its file
train.parquet has the prompt as messages and the answer under reward_model.ground_truth,
which is where this recipe looks; its mathematics alone (ability 'math') is what the
math-verify reward can judge, so filter it first. For any other .jsonl or .parquet file
name its columns: --config.task.options.prompt_key=question
--config.task.options.answer_key=answer.

Expected outcome: reward and lengths rise over the first tens of steps, as the paper
shows; no run of this size has been made with this code. Cost: the engines of a slice
together decode all 1024 responses of a step at once. Reading weights and cache once a
token, 8K tokens take 22 s at the least at 7B, and two minutes at 70B.
"""

import dataclasses
import difflib

import ml_collections

from tlt_jax import config as config_lib


@dataclasses.dataclass(frozen=True)
class Variant:
    """What differs between the models.

    Attributes:
      spec: name on the Hugging Face hub.
      fsdp, tensor: devices along these mesh axes; rows of a micro-batch: fsdp x expert.
      max_batch: rows that an engine decodes at once, of full length; the engines of
        a slice's hosts together hold a step's responses.
      expert: devices along the axis that splits experts.
      workers: engines of a host.
      prompts: of an RL step.
      pages: of an engine's cache; 0: enough for `max_batch` rows of full length. Fewer
        leave room for the training of a drafter; rows beyond them wait for their turn.
    """

    spec: str
    fsdp: int
    tensor: int
    max_batch: int
    expert: int = 1
    workers: int = 1
    prompts: int = 128
    pages: int = 0


# Pages of a row of full length, and one more that its drafts may need.
_PAGES_OF_A_ROW = 32 * 1024 // 128 + 1
VARIANTS = {
    "qwen2.5-7b": Variant("Qwen/Qwen2.5-7B", 16, 4, 64),
    "qwen2.5-32b": Variant("Qwen/Qwen2.5-32B", 64, 4, 16),
    "ds-r1-distill-qwen-7b": Variant(
        "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", 16, 4, 64
    ),
    "llama-3.3-70b": Variant(
        "meta-llama/Llama-3.3-70B-Instruct", 64, 4, 16, pages=7 * _PAGES_OF_A_ROW + 1
    ),
    "qwen3-30b-a3b": Variant("Qwen/Qwen3-30B-A3B", 4, 4, 64, expert=4),
    "qwen3-30b-a3b@64xh200": Variant(
        "Qwen/Qwen3-30B-A3B", 4, 4, 64, expert=4, workers=2
    ),
    "qwen2.5-1.5b@h200": Variant("Qwen/Qwen2.5-1.5B", 1, 1, 64, prompts=32),
    "qwen2.5-3b@h200": Variant("Qwen/Qwen2.5-3B", 1, 1, 32, prompts=32),
    "qwen2.5-7b@8xh200": Variant("Qwen/Qwen2.5-7B", 8, 1, 32, workers=8),
    "qwen2.5-7b@8xh100": Variant(
        "Qwen/Qwen2.5-7B", 4, 2, 32, workers=4, pages=28 * _PAGES_OF_A_ROW + 1
    ),
    "qwen2.5-7b@v5p-8": Variant("Qwen/Qwen2.5-7B", 1, 4, 64, prompts=32),
    "qwen2.5-1.5b@v5e-8": Variant("Qwen/Qwen2.5-1.5B", 4, 2, 8, workers=4, prompts=32),
}
DEFAULT = "qwen2.5-7b"


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Returns the recipe; `arg` is one of `VARIANTS`, empty: qwen2.5-7b.

    Raises:
      ValueError: there is no such variant; the message names the nearest.
    """
    name = arg or DEFAULT
    if name not in VARIANTS:
        near = difflib.get_close_matches(name.lower(), VARIANTS, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"grpo.py has no variant {name!r}: did you mean {near!r}? Choose from "
            f"{', '.join(VARIANTS)}."
        )
    variant = VARIANTS[name]
    config = config_lib.default()
    config.model.spec = variant.spec
    config.model.remat = "full"
    config.precision = "bfloat16"
    config.num_steps = 200

    config.task.name = "data/eurus2_rl.parquet"
    config.task.options = dict(
        prompt_key="prompt",
        answer_key="reward_model.ground_truth",
        reward="math_verify",
        on_bad="skip",
    )
    config.task.max_prompt_tokens = 1024
    config.task.long_prompts = "skip"

    config.sampling.temperature = 0.9
    config.rollout.prompts_per_step = variant.prompts
    config.rollout.group_size = 8
    config.rollout.max_new_tokens = 31 * 1024
    config.rollout.max_batch = variant.max_batch
    config.rollout.steps_per_call = 64
    config.rollout.prefill_chunk = 1024
    # A TPU lays 128 numbers side by side: smaller pages would be padded to that.
    config.cache.page_size = 128
    config.cache.num_pages = variant.pages

    config.algorithm.name = "grpo"
    config.algorithm.clip_low = 0.2
    config.algorithm.clip_high = 0.2
    config.algorithm.kl_coef = 0.001
    config.algorithm.kl_estimator = "k3"
    config.algorithm.kl_placement = "loss"
    config.optimizer.learning_rate = 1e-6
    config.learner.row_tokens = 32 * 1024
    config.learner.rows_per_micro_batch = 1
    config.mesh.data = 1
    config.mesh.fsdp = variant.fsdp
    config.mesh.tensor = variant.tensor
    config.mesh.expert = variant.expert
    config.workers.num = variant.workers

    # Where drafters are in use (`specdec.mode=tlt`): all of the head is most of what a
    # drafted token reads.
    config.drafter.draft_vocab_size = 16 * 1024
    # It learns from whole texts, from a run of positions of each. One of 32K takes
    # 0.4 GiB with its features at 1.5B and 2 GiB at 70B, of memory for each host.
    config.adaptation.row_tokens = 32 * 1024
    config.adaptation.row_bases = 2048
    config.adaptation.buffer_mb = 16 * 1024

    config.reward.workers = 16
    config.eval.every = 10
    config.eval.num_prompts = 64
    config.checkpoint.every = 5
    return config
