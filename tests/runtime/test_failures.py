"""What ends a run is one line and status 2; whoever wants to see where may."""

import json
import os
import subprocess
import sys

import pytest

from tests import command_lines
from tlt_jax.runtime import failures

PROGRAM = """
import pathlib, sys
from tests import command_lines
from tlt_jax import train
from tlt_jax.runtime import channel, failures
from tlt_jax.workdir import checkpoint, files, metrics

ERRORS = [
    ValueError, channel.ProcessError, failures.TrainingError,
    checkpoint.CheckpointError, metrics.MetricsError, files.WorkdirError,
    RuntimeError, KeyboardInterrupt,
]

def fail(run, workdir, stop):
    errors = {error.__name__: error for error in ERRORS}
    errors["Stopped"] = lambda text: failures.Stopped(text, 143)
    raise errors[pathlib.Path(workdir).name]("it is so: do that.")

train.train = fail
command_lines.serve(sys.argv)
"""
TOLD = [
    "ValueError",
    "ProcessError",
    "TrainingError",
    "CheckpointError",
    "MetricsError",
    "WorkdirError",
]


def command(name, *more):
    recipe = "--config=configs/tiny.py"
    return ["tlt_jax.main", recipe, f"--workdir=nowhere/{name}", *more]


@pytest.fixture(scope="module")
def ended():
    others = ["RuntimeError", "KeyboardInterrupt", "Stopped"]
    commands = {name: command(name) for name in [*TOLD, *others]}
    commands["debug"] = command("TrainingError", "--verbosity=1")
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, "0", *map(json.dumps, commands.values())],
        cwd=command_lines.ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    lines = map(json.loads, result.stdout.splitlines())
    return dict(zip(commands, lines, strict=True))


@pytest.mark.parametrize("name", TOLD)
def test_it_is_one_line(ended, name):
    assert ended[name] == [
        2,
        "",
        "error: it is so: do that. (--verbosity=1 shows where)\n",
    ]


def test_what_was_stopped_is_one_line_and_its_own_status(ended):
    assert ended["Stopped"] == [143, "", "it is so: do that.\n"]
    assert ended["KeyboardInterrupt"] == [130, "", "interrupted.\n"]


def test_a_bug_is_a_traceback_and_so_is_all_that_is_asked_to_be(ended):
    for name, error in (("RuntimeError", "RuntimeError"), ("debug", "TrainingError")):
        status, _, told = ended[name]
        assert status == 1
        assert told.startswith("Traceback") and f"{error}: it is so" in told


def test_whoever_cleans_up_after_errors_cleans_up_after_this_one():
    assert issubclass(failures.TrainingError, RuntimeError)
