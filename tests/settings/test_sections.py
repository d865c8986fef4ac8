"""Every setting of a training run: its name, default and range; choices; overrides."""

import pytest

from tests.settings import tables
from tlt_jax.settings import schema, sections

# By section and key: the default, and the range as a mathematician writes it.
SETTINGS = {
    sections.Model: {
        "spec": ("", ""),
        "remat": ("full", ""),
    },
    sections.Pretrain: {
        "num_layers": (2, "[1, 10000]"),
        "d_model": (64, "[1, 131072]"),
        "d_ff": (192, "[1, 1048576]"),
        "num_heads": (4, "[1, 4096]"),
        "num_kv_heads": (2, "[1, 4096]"),
        "head_dim": (16, "[2, 4096]"),
        "num_experts": (0, "[0, 32768]"),
        "experts_per_token": (2, "[1, 32768]"),
        "steps": (300, "[0, 1000000000]"),
        "num_rows": (64, "[1, 1000000]"),
        "learning_rate": (0.003, "(0, 1000]"),
        "noise_frac": (0.7, "[0, 1]"),
    },
    sections.Task: {
        "name": ("", ""),
        "options": ((), ""),
        "size": (1000, "[1, 100000000]"),
        "seed": (0, "[0, 1000000000000000000]"),
        "system_prompt": ("", ""),
        "template_options": ((), ""),
        "max_prompt_tokens": (512, "[1, 10000000]"),
        "long_prompts": ("refuse", ""),
    },
    sections.Sampling: {
        "temperature": (1.0, "[0, 1000]"),
        "top_p": (1.0, "[1e-09, 1]"),
        "top_k": (0, "[0, 10000000]"),
        "min_p": (0.0, "[0, 0.999]"),
    },
    sections.Rollout: {
        "prompts_per_step": (8, "[1, 1000000]"),
        "group_size": (8, "[1, 100000]"),
        "max_new_tokens": (512, "[1, 10000000]"),
        "stop": ((), ""),
        "max_batch": (64, "[1, 65536]"),
        "steps_per_call": (32, "[1, 1000000]"),
        "prefill_chunk": (128, "[1, 10000000]"),
        "cpu_kernels": ("auto", ""),
        "attention": ("auto", ""),
        "check_kernels": (False, ""),
        "tensor": (0, "[0, 1048576]"),
        "lag": (0, "[0, 64]"),
    },
    sections.Cache: {
        "page_size": (64, "[1, 65536]"),
        "num_pages": (0, "[0, 1000000000]"),
    },
    sections.Algorithm: {
        "name": ("grpo", ""),
        "advantage": (None, ""),
        "aggregation": (None, ""),
        "dynamic_sampling": (None, ""),
        "overlong_shaping": (None, ""),
        "overlong_buffer_frac": (None, "[0, 1]"),
        "overlong_penalty": (None, "[0, 1000000]"),
        "surrogate": (None, ""),
        "clip_low": (None, "[0, 1]"),
        "clip_high": (None, "[0, 1000000]"),
        "dual_clip": (None, "(1, 1000000]"),
        "ratio_level": (None, ""),
        "kl_coef": (None, "[0, 1000000]"),
        "kl_estimator": (None, ""),
        "kl_placement": (None, ""),
        "importance_cap": (None, "[0.001, 1000000]"),
        "entropy_coef": (None, "[0, 1000000]"),
    },
    sections.Optimizer: {
        "learning_rate": (1e-06, "[0, 1000]"),
        "schedule": ("constant", ""),
        "warmup_steps": (0, "[0, 1000000000]"),
        "beta1": (0.9, "[0, 0.999999]"),
        "beta2": (0.999, "[0, 0.999999]"),
        "eps": (1e-08, "[1e-30, 1]"),
        "weight_decay": (0.0, "[0, 100]"),
        "clip_norm": (1.0, "[0, 1000000000]"),
    },
    sections.Learner: {
        "epochs": (1, "[1, 10000]"),
        "minibatches": (1, "[1, 1000000]"),
        "row_tokens": (2048, "[2, 100000000]"),
        "rows_per_micro_batch": (1, "[1, 1000000]"),
        "old_logprobs": ("recompute", ""),
        "attention": ("auto", ""),
        "routes": ("own", ""),
        "load_balancing_coef": (0.0, "[0, 1000]"),
        "router_z_coef": (0.0, "[0, 1000]"),
    },
    sections.Mesh: {
        "data": (1, "[-1, 1048576]"),
        "fsdp": (-1, "[-1, 1048576]"),
        "tensor": (1, "[-1, 1048576]"),
        "expert": (1, "[-1, 1048576]"),
    },
    sections.Reward: {
        "functions": ((), ""),
        "weights": ((), ""),
        "workers": (2, "[0, 1024]"),
        "placement": ("colocated", ""),
        "timeout_s": (10.0, "[0.001, 86400]"),
        "memory_mb": (8192, "[0, 1000000]"),
        "failure_reward": (0.0, "[-1000000, 1000000]"),
        "unfinished_thoughts": (False, ""),
    },
    sections.Eval: {
        "every": (0, "[0, 1000000000]"),
        "num_prompts": (64, "[1, 1000000]"),
        "samples": (1, "[1, 100000]"),
        "k": ((1,), ""),
        "temperature": (None, "[0, 1000]"),
    },
    sections.Checkpoint: {
        "every": (10, "[0, 1000000000]"),
        "keep": (2, "[1, 1000000]"),
        "drafter": ("selective", ""),
        "on_damage": ("refuse", ""),
        "grace_s": (15.0, "[0, 86400]"),
    },
    sections.Log: {
        "tensorboard": (True, ""),
        "wandb": ("off", ""),
        "trackio": (False, ""),
        "project": ("tlt_jax", ""),
        "plots_every": (10, "[0, 1000000000]"),
        "rollouts_every": (1, "[0, 1000000000]"),
        "progress": ("auto", ""),
    },
}


@pytest.mark.parametrize("section", SETTINGS, ids=lambda section: section.__name__)
def test_defaults_and_ranges(section):
    tables.check(section, SETTINGS[section])


CHOICES = {
    (sections.Model, "remat"): "none dots full",
    (sections.Task, "long_prompts"): "refuse skip",
    (sections.Rollout, "cpu_kernels"): "auto xla native",
    (sections.Rollout, "attention"): (
        "auto portable native_cpu mosaic_tpu triton_gpu mosaic_tpu_interpreted "
        "triton_gpu_interpreted"
    ),
    (sections.Algorithm, "name"): ("grpo dr_grpo dapo rloo reinforce_pp_baseline gspo"),
    (sections.Algorithm, "advantage"): (
        "grpo dr_grpo rloo reinforce_pp_baseline package.module:Name"
    ),
    (sections.Algorithm, "surrogate"): "clipped package.module:Name",
    (sections.Algorithm, "aggregation"): "token_mean sequence_mean constant",
    (sections.Algorithm, "ratio_level"): "token sequence",
    (sections.Algorithm, "kl_estimator"): "k1 k2 k3",
    (sections.Algorithm, "kl_placement"): "loss reward",
    (sections.Optimizer, "schedule"): "constant linear cosine",
    (sections.Reward, "placement"): "colocated separate",
    (sections.Learner, "old_logprobs"): "recompute rollout",
    (sections.Learner, "attention"): "auto portable splash cudnn",
    (sections.Learner, "routes"): "own replay",
    (sections.Checkpoint, "drafter"): "selective async blocking",
    (sections.Checkpoint, "on_damage"): "refuse previous",
    (sections.Log, "wandb"): "off online offline",
    (sections.Log, "progress"): "auto plain off",
}


@pytest.mark.parametrize("key", CHOICES, ids=tables.named)
def test_choices(key):
    tables.check_choices(*key, CHOICES[key])


def test_only_what_is_set_overrides_the_algorithms_preset():
    assert sections.Algorithm(name="dapo").overrides() == {}
    # Zero and false are settings, too.
    chosen = {"clip_low": 0.0, "dynamic_sampling": False, "kl_estimator": "k1"}
    assert sections.Algorithm(name="gspo", **chosen).overrides() == chosen


def test_rewards_that_nobody_would_judge_are_refused():
    told = "reward.placement='separate' with reward.workers=0: nobody would judge. Set "
    with pytest.raises(schema.ConfigError, match=told):
        sections.check_reward(sections.Reward(placement="separate", workers=0))
    sections.check_reward(sections.Reward(placement="separate", workers=1))
