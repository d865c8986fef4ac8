"""Commands that run a recipe, its workers divided among processes or not."""

import os
import pathlib
import runpy
import subprocess
import sys
from collections.abc import Mapping, Sequence

# Of all runs: large pages for large buffers, where glibc can; an update takes a tenth
# less with them.
ENVIRONMENT = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


def recipe_of(config: str):
    """Returns the settings of a recipe, `FILE.py` or `FILE.py:variant`."""
    path, _, argument = config.partition(":")
    return runpy.run_path(path)["get_config"](argument)


def check_processes(
    processes: int, config: str, settings: Mapping[str, str], option: str
) -> int:
    """Returns how many workers each of the processes has.

    Args:
      processes: among which the recipe's workers are divided.
      config: the recipe.
      settings: overrides by dotted key.
      option: which asked for it.

    Raises:
      ValueError: the workers cannot be divided so.
    """
    workers = int(settings.get("workers.num", recipe_of(config).workers.num))
    if processes < 1 or workers % processes:
        raise ValueError(
            f"{option} asks for {processes} processes of {config}: they must divide "
            f"workers.num={workers}."
        )
    return workers // processes


def command_of(
    module: str,
    processes: int,
    config: str,
    settings: Mapping[str, str],
    workdir: pathlib.Path,
    more: Sequence[str] = (),
) -> list[str]:
    """Returns the command that runs a recipe.

    Args:
      module: that is started, `tlt_jax.main` or one with its flags.
      processes: 1, or as many as `check_processes` lets pass; by `tlt_jax.launch`.
      config: the recipe.
      settings: overrides by dotted key, of all workers together.
      workdir: of the run.
      more: flags of the module's own.
    """
    own = {}
    if processes > 1:
        each = check_processes(processes, config, settings, "the command")
        own = {"workers.num": str(each)}
    program = [f"--config={config}", f"--workdir={workdir}", *more]
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
