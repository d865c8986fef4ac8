"""Whole runs small enough to be repeated: `configs/tiny.py` made tinier still.

It is a recipe as well: `--config=tests/tiny_runs.py`.
"""

from typing import Any

import ml_collections

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
    # With both, the vocabulary divides over two devices.
    "task.options": {"operators": "+-"},
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


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Returns the recipe."""
    del arg
    return _with(tiny.get_config(), SETTINGS)


def config_of(**overrides: Any) -> config.RunConfig:
    """Returns the settings with `overrides` by dotted key."""
    return config.load(_with(get_config(), overrides))


def _with(values: ml_collections.ConfigDict, settings: dict[str, Any]):
    for key, value in settings.items():
        section, _, name = key.rpartition(".")
        (values[section] if section else values)[name] = value
    return values
