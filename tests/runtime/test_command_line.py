"""The command line: overrides reach the settings, mistakes are one line."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from tlt_jax.runtime import command_line
from tlt_jax.settings import drafter_run, schema

ROOT = pathlib.Path(__file__).resolve().parents[2]

_RECIPE = """
from tlt_jax import config as config_lib

def get_config(arg=""):
    config = config_lib.default()
    config.model.spec = "some/model"
    config.task.name = "count"
    config.task.options.longest = 3
    if arg == "attribute":
        config.optimizer.learning_rat = 1.0
    if arg == "section":
        config.optimizr.learning_rate = 1.0
    if arg == "type":
        config.optimizer.learning_rate = "fast"
    if arg == "variant":
        raise ValueError("unknown variant 'variant': use a or b.")
    if arg == "bug":
        config.seed = {}["a"]
    if arg == "nothing":
        return None
    return config
"""

_PROGRAM = """
from absl import flags
from tlt_jax import config
from tlt_jax.runtime import command_line
flags.DEFINE_string("workdir", None, "Directory.")
flag = command_line.define_config_flag()
command_line.run(lambda run: print(config.to_json(run)), flag)
"""


def run_program(tmp_path, *arguments):
    (tmp_path / "recipe.py").write_text(_RECIPE)
    return subprocess.run(
        [sys.executable, "-c", _PROGRAM, *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=60,
    )


def test_command_line_overrides(tmp_path):
    result = run_program(
        tmp_path,
        "--config=recipe.py",
        "--config.seed=7",
        "--config.rollout.stop=('a',)",
        "--config.algorithm.clip_high=0.3",
        "--noconfig.log.tensorboard",
        "--config.task.options.longest=5",
        "--config.optimizer.learning_rate",
        "1",
        "--config.reward.functions=number,mine:short",
        "--config.reward.weights=1,0.5",
    )
    assert result.returncode == 0, result.stderr
    values = json.loads(result.stdout)
    assert values["seed"] == 7
    assert values["rollout"]["stop"] == ["a"]
    assert values["algorithm"]["clip_high"] == 0.3
    assert values["log"]["tensorboard"] is False
    assert values["task"]["options"] == {"longest": 5}
    assert values["optimizer"]["learning_rate"] == 1.0
    assert values["reward"]["functions"] == ["number", "mine:short"]
    assert values["reward"]["weights"] == [1.0, 0.5]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--config=recipe.py --config.sed=1", "did you mean 'seed'?"),
        ("--config=recipe.py --noconfig.log.tensorbord", "'log.tensorboard'?"),
        ("--config=recipe.py --config.seed=1.5", "--config.seed=1.5: invalid"),
        ("--config=recipe.py --config.task.options.z=1", "needs KEY in the recipe"),
        ("--config=recipe.py:attribute", "recipe.py:10: config.optimizer.learning_rat"),
        ("--config=recipe.py:attribute", "did you mean 'learning_rate'?"),
        ("--config=recipe.py:section", "did you mean 'optimizer'?"),
        ("--config=recipe.py:type", "Could not override field 'learning_rate'"),
        ("--config=recipe.py:variant", "unknown variant 'variant': use a or b."),
        ("--config=recipe.py:nothing", "returned a NoneType"),
        ("--config=recpe.py", "there is no such file; did you mean recipe.py?"),
        ("", "--config=FILE is missing"),
        ("--config=recipe.py --workdr=x", "Did you mean: workdir"),
        ("--config=recipe.py more", "unexpected argument 'more'"),
        ("--config=recipe.py --config.num_steps=0", "at least 1."),
        ("--config=recipe.py --config.reward.function=a", "'reward.functions'?"),
    ],
)
def test_mistakes_are_one_line_and_status_2(tmp_path, arguments, message):
    result = run_program(tmp_path, *arguments.split())
    assert result.returncode == 2, result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and message in last


def test_a_bug_of_the_recipe_shows_its_traceback(tmp_path):
    result = run_program(tmp_path, "--config=recipe.py:bug")
    assert result.returncode == 1
    assert "KeyError: 'a'" in result.stderr and "line 18" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("--config=a/b.py", "a/b.py"),
        ("--config=b.py:qwen3:8b", "b.py"),
        ("-config b.py:x --workdir=c.py", "b.py"),
        # The last one counts, and what is behind `--` is no flag.
        ("--config=a.py --seed=1 --config=b.py -- --config=c.py", "b.py"),
        ("--config.seed=3 --configs=a.py", None),
    ],
)
def test_the_recipe_of_a_command_line(arguments, expected):
    found = command_line.recipe_path(["program", *arguments.split()])
    assert found == (expected and pathlib.Path(expected))


def test_overrides_are_checked_against_the_programs_own_settings():
    def check(*arguments):
        command_line.check_overrides(["--config.x=1", *arguments])

    check("--config.rollout.max_batch=1", "config.x=1", "--seed=1", "--config.log")
    check("--config.task.options.whatever=1", "--noconfig.log.tensorboard")
    check("--", "--config.x=1")
    with pytest.raises(schema.ConfigError, match="'texts.num': did you mean 'work"):
        check("--config.texts.num=1")
    arguments = ["program", "--config.texts.num=1"]
    command_line.check_overrides(arguments, drafter_run.DrafterRun)
    with pytest.raises(schema.ConfigError) as raised:
        check("--seed=1", "-config.cache.num_page=1")
    assert str(raised.value) == (
        "unknown config key 'cache.num_page': did you mean 'cache.num_pages'?"
    )


def test_failing_is_one_line_and_status_2(capsys):
    with pytest.raises(SystemExit) as raised:
        command_line.fail(ValueError("so it is"))
    assert raised.value.code == 2
    assert capsys.readouterr() == ("", "error: so it is\n")
