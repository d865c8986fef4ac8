"""The command line: overrides reach the settings, mistakes are one line."""

import concurrent.futures
import json
import logging
import os
import pathlib
import subprocess
import sys
from typing import NamedTuple

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
    if arg == "import":
        import nothing_of_that_name
    return config
"""
_FILES = {
    "recipe.py": _RECIPE,
    "mine.yaml": "model: {spec: other/model}\n"
    "task:\n  name: count\n  options: {a: off}\n"
    "specdec: {mode: off}\noptimizer: {learning_rate: 2e-6}\n",
    "wrong.yaml": "sed: 1\n",
    "broken.yaml": "seed: 1\n  x: [\n",
    "list.json": "[1]",
    "type.yaml": "seed: a\n",
    "syntax.py": "def get_config(:\n",
    "empty.py": "",
    "notes.txt": "",
}

_PROGRAM = """
'Train: a command line of a test.'
from absl import flags
from tlt_jax import config
from tlt_jax.runtime import command_line
flags.DEFINE_string("workdir", None, "Directory.")
flag = command_line.define_config_flag()
command_line.run(lambda run: print(config.to_json(run)), flag)
"""


# Imports once, then runs the program in a child for every line of arguments.
_SERVER = """
import json, os, sys, tempfile, traceback
from tlt_jax.runtime import command_line
for line in sys.stdin:
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = os.fork()
        if not child:
            os.dup2(out.fileno(), 1), os.dup2(err.fileno(), 2)
            sys.argv, status = ["program", *json.loads(line)], 0
            try:
                exec(os.environ["PROGRAM"])
            except SystemExit as end:
                status = end.code or 0
            except BaseException:
                traceback.print_exc()
                status = 1
            sys.stdout.flush(), sys.stderr.flush(), os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        out.seek(0), err.seek(0)
        print(json.dumps([status, out.read(), err.read()]), flush=True)
"""


class Ran(NamedTuple):
    """What came of the program."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the program runs, with recipes good and bad."""
    made = tmp_path_factory.mktemp("recipes")
    for name, content in _FILES.items():
        (made / name).write_text(content)
    return made


@pytest.fixture(scope="module")
def run_program(folder):
    """Calls the program with arguments."""
    with subprocess.Popen(
        [sys.executable, "-c", _SERVER],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PROGRAM": _PROGRAM},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as server:

        def run(*arguments):
            server.stdin.write(json.dumps(arguments) + "\n")
            server.stdin.flush()
            return Ran(*json.loads(server.stdout.readline()))

        yield run
        server.stdin.close()


def test_what_libraries_log_is_left_out_unless_it_is_asked_for(monkeypatch, capsys):
    hub, ours = logging.getLogger("huggingface_hub"), logging.getLogger("absl")
    monkeypatch.setattr(hub, "level", logging.WARNING)
    monkeypatch.setattr(ours, "filters", [])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    with command_line.told():
        pass
    assert not hub.isEnabledFor(logging.WARNING) and hub.isEnabledFor(logging.ERROR)
    made = ours.makeRecord("absl", logging.ERROR, "x.py", 1, "it failed", (), None)
    assert ours.filter(made)
    # The error itself is raised as well.
    made.exc_info = (ValueError, ValueError("so"), None)
    assert not ours.filter(made)
    # Of a full disk TensorStore's threads print a hundred lines.
    shown = ValueError, ValueError("so"), None
    with concurrent.futures.ThreadPoolExecutor() as other:
        other.submit(sys.excepthook, *shown).result()
    assert capsys.readouterr().err == ""
    sys.excepthook(*shown)
    assert capsys.readouterr().err == "ValueError: so\n"


def test_command_line_overrides(run_program):
    result = run_program(
        "--config=recipe.py",
        "--config.seed=7",
        "--config.rollout.stop=('a',)",
        "--config.algorithm.clip_high=0.3",
        "--noconfig.log.tensorboard",
        "--config.task.options.longest=5.5",
        "--config.task.options.names=('a',)",
        "--config.task.template_options.enable_thinking=false",
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
    assert values["task"]["options"] == {"longest": 5.5, "names": ["a"]}
    assert values["task"]["template_options"] == {"enable_thinking": False}
    assert values["optimizer"]["learning_rate"] == 1.0
    assert values["reward"]["functions"] == ["number", "mine:short"]
    assert values["reward"]["weights"] == [1.0, 0.5]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--config=recipe.py --config.sed=1", "did you mean 'seed'?"),
        ("--config=recipe.py --config.learning_rate=1", "'optimizer.learning_rate'?"),
        ("--config=recipe.py --noconfig.log.tensorbord", "'log.tensorboard'?"),
        ("--config=recipe.py --config.seed=1.5", "--config.seed=1.5: invalid"),
        ("--config=recipe.py --config.task.options.z.y=1", "task.options has no dot."),
        ("--config=recipe.py --config.task=1", "is a section of keys: give --config.t"),
        ("--config=recipe.py --config.seed", "give a value, --config.seed=VALUE."),
        ("--config=recipe.py --noconfig.seed", "give a value, --config.seed=VALUE."),
        ("--config=recipe.py --learning_rate=1", "--config.optimizer.learning_rate ?"),
        ("--config=recipe.py --workdir", "Missing value for flag --workdir"),
        ("--config=wrong.yaml", "wrong.yaml: unknown config key 'sed': did you mean"),
        ("--config=broken.yaml", "broken.yaml: line 2: this is no YAML: "),
        ("--config=list.json", "list.json: settings are keys with values"),
        ("--config=type.yaml", "type.yaml: seed='a' is of type str: give int."),
        ("--config=type.yaml:x", "type.yaml has no variants: leave the colon out."),
        ("--config=recipe.py:import", "recipe.py:22: import nothing_of_that_name: No"),
        ("--config=syntax.py", "syntax.py:1: "),
        ("--config=empty.py", "empty.py defines no get_config()"),
        ("--config=notes.txt", "recipes are .py files, or a run's config.yaml."),
        ("--config=recipe.py:attribute", "recipe.py:10: config.optimizer.learning_rat"),
        ("--config=recipe.py:attribute", "did you mean 'learning_rate'?"),
        ("--config=recipe.py:section", "did you mean 'optimizer'?"),
        ("--config=recipe.py:type", "Could not override field 'learning_rate'"),
        ("--config=recipe.py:variant", "unknown variant 'variant': use a or b."),
        ("--config=recipe.py:nothing", "returned a NoneType"),
        ("--config=recpe.py", "there is no such file; did you mean recipe.py?"),
        ("", "--config=FILE is missing"),
        ("--config=recipe.py --workdr=x", "Did you mean: workdir"),
        (
            "--config=recipe.py more",
            "unexpected argument 'more': every setting is a --flag.",
        ),
        ("recipe.py:two", "did you mean --config=recipe.py:two ?"),
        ("--config=recipe.py --config.num_steps=0", "at least 1, at most 1e+09."),
        ("--config=recipe.py --config.reward.function=a", "'reward.functions'?"),
    ],
)
def test_mistakes_are_one_line_and_status_2(run_program, arguments, message):
    result = run_program(*arguments.split())
    assert result.returncode == 2, result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and message in last


def test_a_bug_of_the_recipe_shows_its_traceback(run_program):
    result = run_program("--config=recipe.py:bug")
    assert result.returncode == 1
    assert "KeyError: 'a'" in result.stderr and "line 18" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("--workdir=a/b", "a/b"),
        ("-workdir b:x --config=c", "b:x"),
        # The last one counts, and what is behind `--` is no flag.
        ("--workdir=a --seed=1 --workdir=b -- --workdir=c", "b"),
        ("--workdir.seed=3 --workdirs=a", None),
    ],
)
def test_the_last_value_of_a_flag(arguments, expected):
    assert command_line.last_value(arguments.split(), "workdir") == expected


def test_overrides_are_taken_out_and_read_by_the_programs_own_settings():
    def taken(*arguments, **section):
        return command_line.overrides(["--config.x=1", *arguments], **section)

    assert taken(
        "--config.rollout.max_batch=1",
        "config.x=1",
        "--seed=1",
        "-config.log.wandb",
        "off",
        "--config.task.options.a=2",
        "--noconfig.log.tensorboard",
        "--config.log.tensorboard",
        "--",
        "--config.x=1",
    ) == (
        ["--config.x=1", "config.x=1", "--seed=1", "--", "--config.x=1"],
        [
            ("rollout.max_batch", 1),
            ("log.wandb", "off"),
            ("task.options.a", 2),
            ("log.tensorboard", False),
            ("log.tensorboard", True),
        ],
    )
    with pytest.raises(schema.ConfigError, match="'texts.num': did you mean 'work"):
        taken("--config.texts.num=1")
    _, changes = taken("--config.texts.num=1", section=drafter_run.DrafterRun)
    assert changes == [("texts.num", 1)]
    with pytest.raises(schema.ConfigError) as raised:
        taken("--seed=1", "-config.cache.num_page=1")
    assert str(raised.value) == (
        "unknown config key 'cache.num_page': did you mean 'cache.num_pages'?"
    )


def test_another_task_leaves_the_recipes_options_behind(run_program):
    result = run_program(
        "--config=recipe.py",
        "--config.task.options.prompt_key=question",
        "--config.task.name=mine.jsonl",
    )
    assert result.returncode == 0, result.stderr
    task = json.loads(result.stdout)["task"]
    assert task["name"] == "mine.jsonl"
    assert task["options"] == {"prompt_key": "question"}
    # Its own name again is no other task.
    result = run_program(
        "--config=recipe.py", "--config.task.name=count", "--config.task.options.b=1"
    )
    assert json.loads(result.stdout)["task"]["options"] == {"longest": 3, "b": 1}


def test_settings_as_yaml_are_a_recipe(run_program, folder):
    result = run_program(
        "--config=mine.yaml", "--config.seed=3", "--config.task.options.b=1"
    )
    assert result.returncode == 0, result.stderr
    values = json.loads(result.stdout)
    assert (values["seed"], values["model"]["spec"]) == (3, "other/model")
    assert values["task"]["options"] == {"a": "off", "b": 1}
    assert values["specdec"]["mode"] == "off"
    assert values["optimizer"]["learning_rate"] == 2e-6
    # What a run has written is read back.
    (folder / "again.json").write_text(result.stdout)
    again = run_program("--config=again.json")
    assert (again.stdout, again.returncode) == (result.stdout, 0)


def test_a_recipe_may_be_named_as_a_module(run_program):
    by_name, by_path = run_program("--config=recipe"), run_program("--config=recipe.py")
    assert by_name.stdout == by_path.stdout and by_name.returncode == 0
    assert "--config=no.recipe: there is no such file" in (
        run_program("--config=no.recipe").stderr
    )


@pytest.mark.parametrize("word", ["--help", "-h", "--helpshort"])
def test_help_needs_nothing_and_ends_well(run_program, folder, word):
    (folder / "configs").mkdir(exist_ok=True)
    (folder / "configs" / "mine.py").write_text(
        '"""Ours.\n\npython -m tlt_jax.main --config=x"""\nVARIANTS = ("a", "b")'
    )
    result = run_program("--config=gone.py", "--config.sed=1", word)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("Train: a command line of a test.\n\nRecipes")
    assert "  configs/mine.py\n      Ours.\n      :a, :b\n" in result.stdout
    assert "  --workdir=DIR\n          Directory.\n" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 88
    described = (
        "  cache.page_size = 64  (integer, at least 1, at most 65536)\n"
        "      Tokens per page.\n"
    )
    assert (described in result.stdout) == (word != "--helpshort")


def test_failing_is_one_line_and_status_2(capsys):
    with pytest.raises(SystemExit) as raised:
        command_line.fail(ValueError("so it is"))
    assert raised.value.code == 2
    assert capsys.readouterr() == ("", "error: so it is\n")
