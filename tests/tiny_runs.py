"""Whole runs small enough to be repeated: `configs/tiny.py` made tinier still."""

from typing import Any

from configs import tiny
from tlt_jax import config

# By dotted key, as a command line gives them.
SETTINGS = {
    "num_steps": 8,
    "model.spec": "scratch",
    "pretrain.steps": 30,
    "pretrain.num_rows": 16,
    "pretrain.num_layers": 1,
    "pretrain.d_model": 32,
    "pretrain.d_ff": 64,
    "pretrain.head_dim": 8,
    "task.size": 64,
    "rollout.prompts_per_step": 4,
    "rollout.group_size": 4,
    "rollout.max_new_tokens": 6,
    "rollout.max_batch": 4,
    "rollout.steps_per_call": 2,
    "rollout.prefill_chunk": 8,
    "cache.page_size": 4,
    "learner.row_tokens": 64,
    "mesh.fsdp": 1,
    "checkpoint.every": 2,
    "log.tensorboard": False,
    "log.progress": "off",
}


def config_of(**overrides: Any) -> config.RunConfig:
    """Returns the settings with `overrides` by dotted key."""
    values = tiny.get_config()
    for key, value in (SETTINGS | overrides).items():
        section, _, name = key.rpartition(".")
        (values[section] if section else values)[name] = value
    return config.load(values)


def flags_of(**overrides: Any) -> list[str]:
    """Returns the same settings as arguments of `tlt_jax.main`."""
    settings = (SETTINGS | overrides).items()
    return [f"--config.{key}={value}" for key, value in settings]
