"""Whole runs small enough to be repeated: `configs/tiny.py` made tinier still.

It is a recipe as well: `--config=tests/tiny_runs.py`.
"""

import json
from typing import Any

import jax
import ml_collections
import numpy as np

from configs import tiny
from tlt_jax import config, train
from tlt_jax.workdir import checkpoint, metrics, record_keys

# A reward that tells the answers of a group apart.
ODD = "tests.judges:odd"
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


def initial_model(tmp_path_factory) -> str:
    """Let a run make a model for itself; return where it lies."""
    directory = tmp_path_factory.mktemp("model") / "run"
    train.train(config_of(num_steps=1), directory)
    return str(directory / "initial_model")


def settings(model, **overrides):
    """What a run has that begins with a model's weights and is judged by `ODD`."""
    return {"model.spec": model, "reward.functions": (ODD,)} | overrides


def start(model, directory, **overrides):
    """Run these settings; return the record, all of whose keys are in the table."""
    train.train(config_of(**settings(model, **overrides)), directory)
    rows = metrics.read(directory)
    assert unknown_keys(rows) == []
    return rows


def unknown_keys(rows, table=record_keys.TRAINING):
    """The keys of a record that the table does not explain."""
    return sorted({name for row in rows for name in row if not is_key(name, table)})


def is_key(name, table=record_keys.TRAINING):
    """Tell whether the table explains a key otherwise than as some reward's mean."""
    known = record_keys.find(name, table) is not None
    return known and not record_keys.is_function(name)


def decisive(rows):
    """Everything of a record but how long it took."""
    return [{k: v for k, v in row.items() if not k.endswith("_s")} for row in rows]


def values(rows, name):
    """One entry of every record."""
    return [row[name] for row in rows]


def policy(directory, step=None):
    """The bytes of all weights of a checkpoint."""
    params, _, _ = checkpoint.restore_policy(directory, step)
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(params)]


def rollouts(directory, step):
    """The completions that a step kept."""
    text = (directory / "rollouts" / f"step_{step:06d}.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]
