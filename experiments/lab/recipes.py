"""Runs of recipes: whole ones in this process, planned ones, and commands.

In a planned run the drafter learns after the rollouts that the plan names, a counted
number of updates each time, so that the run is a function of its settings and not of
the machine's load.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import numpy as np

from experiments.lab import tables
from tlt_jax import config, train
from tlt_jax.rl.adaptation import budget, offline_texts
from tlt_jax.runtime import compile_cache
from tlt_jax.workdir import metrics, progress

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
# Of configs/smollm2_drafter.py, by its variant: each has a workdir of its own.
COUNTING_DRAFTER = "workdirs/counting_drafter"
NUMBERS_DRAFTER = "workdirs/random_numbers_drafter"
_TRAIN = "python -m tlt_jax.train_drafter --config=configs/smollm2_drafter.py"
TRAIN_COUNTING = f"{_TRAIN}:counting --workdir={COUNTING_DRAFTER}"
TRAIN_NUMBERS = f"{_TRAIN}:random_numbers --workdir={NUMBERS_DRAFTER}"
# Columns of tables, by what a step's record calls them.
_COLUMNS = {
    "step": "step",
    "reward": "reward/mean",
    "loss": "policy/loss",
    "policy_loss": "policy/loss",
    "tokens": "rollout/tokens",
    "rollout_tokens": "rollout/tokens",
    "tokens_digest": "rollout/tokens_digest",
    "row_steps": "rollout/row_steps",
    "decode_steps": "rollout/decode_steps",
    "accept_length": "specdec/accept_length",
    "num_updates": "drafter/num_updates",
    "mismatch": "mismatch/logprob_max_abs",
    "policy_distance": "policy_distance",
}
# The drafter's time is no limit: `adaptation.max_steps` is.
_UNLIMITED_FRAC = 1e6
# Of all runs: large pages for large buffers, where glibc can; an update takes a tenth
# less with them.
ENVIRONMENT = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


def recipe_of(recipe: str):
    """Returns the settings of a recipe, `FILE.py` or `FILE.py:variant`.

    Raises:
      ValueError: there is none.
    """
    path, _, argument = recipe.partition(":")
    if not pathlib.Path(path).is_file():
        raise ValueError(
            f"the recipe {recipe} is no file here: recipes are in configs/, and "
            "commands are started in the repository's root."
        )
    return runpy.run_path(path)["get_config"](argument)


def settings_of(recipe: str, overrides: Mapping[str, object]) -> config.RunConfig:
    """Returns a recipe with overrides by dotted key, above `SETTINGS`."""
    values = recipe_of(recipe)
    values.update_from_flattened_dict({**SETTINGS, **overrides})
    return config.load(values)


def tasks_of(drafter: str) -> list[str]:
    """Names the tasks that a drafter's workdir was trained on; none: nothing tells.

    Without the styles that they were asked in.
    """
    path = pathlib.Path(drafter) / "config.json"
    if not path.is_file():
        return []
    settings = json.loads(path.read_text(encoding="utf-8"))
    named = map(offline_texts.task_of, settings.get("texts", {}).get("tasks", ()))
    return list(dict.fromkeys(named))


def print_other_tasks(drafter: str, tasks: Sequence[str], used_for: str) -> None:
    """Says of a drafter that was trained on none of the tasks that it was."""
    trained_on = tasks_of(drafter)
    if trained_on and not {*trained_on} & {*tasks}:
        print(
            f"note: the drafter {drafter} was trained on {', '.join(trained_on)}, and "
            f"{used_for} {', '.join(tasks)}: what it brings is not what one of these "
            "brings.",
            flush=True,
        )


def print_other_task_of(recipe: str, settings: Mapping[str, str]) -> None:
    """Says of settings whose drafter was trained on another task than the recipe's."""
    values = recipe_of(recipe)
    task = settings.get("task.name", values.task.name)
    if drafter := settings.get("drafter.directory", values.drafter.directory):
        print_other_tasks(drafter, [task], f"{recipe} runs")


def columns(row: tables.Row, *names: str) -> tables.Row:
    """Returns some columns of a step's record."""
    return {name: row[_COLUMNS[name]] for name in names}


def run(recipe: str, overrides: Mapping[str, object]) -> list[tables.Row]:
    """Runs a recipe to its end; returns the records of its steps."""
    compile_cache.enable()
    with tempfile.TemporaryDirectory() as folder:
        directory = pathlib.Path(folder)
        train.train(settings_of(recipe, overrides), directory)
        return [row for row in metrics.read(directory) if row["step"]]


@dataclasses.dataclass(frozen=True)
class Planned(budget.Budget):
    """Trains now or not, whether that pays or not."""

    now: bool = False

    def seconds(self, rollout_s: float, max_frac: float) -> float:
        """Returns the limit, or 0."""
        return max_frac * rollout_s if self.now else 0.0

    def trained(self, seconds: float, before: float, after: float) -> "Planned":
        """Learns nothing."""
        del seconds, before, after
        return self


def planned_settings(
    recipe: str, overrides: Mapping[str, object], num_updates: int
) -> config.RunConfig:
    """Returns a recipe with a drafter that learns `num_updates` times when it does."""
    return settings_of(
        recipe,
        {
            **DRAFTER,
            "adaptation.max_frac": _UNLIMITED_FRAC,
            "adaptation.max_steps": num_updates,
            **overrides,
        },
    )


def run_planned(
    settings: config.RunConfig, trains: Callable[[int], bool]
) -> list[tables.Row]:
    """Runs `planned_settings` to their end; returns the records of the steps.

    With `policy_distance`: how far the policy's weights have gone from where they
    began, as a part of their own length. `trains` says whether the drafter learns
    after the rollout of a step, counted from 0.
    """
    compile_cache.enable()
    rows = []
    with begun(settings) as trainer:
        first = weights(trainer)
        for number in range(settings.num_steps):
            trainer.parts.adaptation.budget = Planned(now=trains(number))
            row = trainer.take_step()
            moved = np.linalg.norm(weights(trainer) - first) / np.linalg.norm(first)
            rows.append({**row, "policy_distance": float(moved)})
    return rows


@contextlib.contextmanager
def begun(settings: config.RunConfig) -> Iterator[train.Trainer]:
    """Begins a run in a folder of its own; ends it on leaving."""
    with contextlib.ExitStack() as closing:
        folder = pathlib.Path(closing.enter_context(tempfile.TemporaryDirectory()))
        display = progress.Progress(settings.num_steps, mode="off")
        trainer = closing.enter_context(train.Trainer(settings, folder, display))
        trainer.begin()
        yield trainer


def weights(trainer: train.Trainer) -> np.ndarray:
    """Returns all weights of the policy, in a row."""
    leaves = jax.tree.leaves(jax.device_get(trainer.parts.updater.train_state.params))
    return np.concatenate([np.ravel(leaf) for leaf in leaves])


def check_processes(
    processes: int, recipe: str, settings: Mapping[str, str], option: str
) -> int:
    """Returns how many of a recipe's workers each process has; `option` asked for it.

    Raises:
      ValueError: the workers cannot be divided so.
    """
    workers = int(settings.get("workers.num", recipe_of(recipe).workers.num))
    if processes < 1 or workers % processes:
        raise ValueError(
            f"{option} asks for {processes} processes of {recipe}: they must divide "
            f"workers.num={workers}."
        )
    return workers // processes


def command_of(
    module: str,
    processes: int,
    recipe: str,
    settings: Mapping[str, str],
    workdir: pathlib.Path,
    more: Sequence[str] = (),
) -> list[str]:
    """Returns the command by which `tlt_jax.main`, or a module like it, runs a recipe.

    Settings are of all workers together, by dotted key; `check_processes` must let
    `processes` pass; `more` are flags of the module's own.
    """
    own = {}
    if processes > 1:
        each = check_processes(processes, recipe, settings, "the command")
        own = {"workers.num": str(each)}
    program = [f"--config={recipe}", f"--workdir={workdir}", *more]
    program += flags_of({**settings, **own})
    if processes == 1:
        return [sys.executable, "-m", module, *program]
    launch = [sys.executable, "-m", "tlt_jax.launch", f"--processes={processes}"]
    return [*launch, f"--module={module}", "--", *program]


def flags_of(settings: Mapping[str, str]) -> list[str]:
    """Returns overrides by dotted key as flags."""
    return [f"--config.{key}={value}" for key, value in settings.items()]


def start(command: Sequence[str]) -> None:
    """Runs a command to its end.

    Raises:
      subprocess.CalledProcessError: it failed.
    """
    subprocess.run(command, check=True, env=ENVIRONMENT | os.environ)
