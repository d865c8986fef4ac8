"""Whole runs of small recipes in this process, for experiments that compare runs."""

import pathlib
import runpy
import tempfile
from collections.abc import Mapping

from experiments.lab import harness
from tlt_jax import config, train
from tlt_jax.runtime import compile_cache
from tlt_jax.workdir import metrics

# What makes runs comparable and quick; nothing of it changes a token.
SETTINGS = {
    "checkpoint.every": 0,
    "log.progress": "off",
    "log.tensorboard": False,
    "log.plots_every": 0,
    "learner.old_logprobs": "recompute",
}
# A drafter of one layer that learns between rollouts of the tiny recipes.
DRAFTER = {
    "specdec.mode": "tlt",
    "specdec.tuner": "static",
    "specdec.strategies": ("32:D4K1V5",),
    "specdec.ngram_strategies": (),
    "drafter.features": "last",
    "adaptation.num_steps": 4,
    "adaptation.row_tokens": 128,
    "adaptation.row_bases": 96,
    "adaptation.num_rows": 4,
    "adaptation.max_frac": 1.0,
}


def settings_of(recipe: str, overrides: Mapping[str, object]) -> config.RunConfig:
    """Returns a recipe with settings by dotted key.

    Args:
      recipe: `FILE.py` or `FILE.py:variant`.
      overrides: stand above `SETTINGS`.
    """
    path, _, argument = recipe.partition(":")
    values = runpy.run_path(path)["get_config"](argument)
    values.update_from_flattened_dict({**SETTINGS, **overrides})
    return config.load(values)


def run(recipe: str, overrides: Mapping[str, object]) -> list[harness.Row]:
    """Runs a recipe to its end; returns the records of its steps."""
    compile_cache.enable()
    with tempfile.TemporaryDirectory() as folder:
        directory = pathlib.Path(folder)
        train.train(settings_of(recipe, overrides), directory)
        return [row for row in metrics.read(directory) if row["step"]]
