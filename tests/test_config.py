"""Settings: every key documented and checked, mistakes named in one line."""

import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

from tlt_jax import config
from tlt_jax.settings import schema, sections

ROOT = pathlib.Path(__file__).resolve().parents[1]

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


def recipe() -> config.ml_collections.ConfigDict:
    out = config.default()
    out.model.spec = "some/model"
    out.task.name = "count"
    return out


def load(**overrides) -> config.RunConfig:
    """Load the recipe with `section__key=value` overrides."""
    out = recipe()
    for name, value in overrides.items():
        section, _, key = name.rpartition("__")
        (out[section] if section else out)[key] = value
    return config.load(out)


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


def test_loaded_config_is_frozen_and_hashable():
    run = load()
    assert hash(run) == hash(load())
    assert run == load()
    assert run != load(seed=1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        run.seed = 1
    hash(load(rollout__stop=("a", "b"), task__options={"x": [1, 2]}))


def test_keys_that_stay():
    known = schema.keys(config.RunConfig)
    for key in (
        "seed num_steps specdec.mode workers.num cache.page_size rollout.max_batch "
        "sampling.temperature sampling.top_p task.name model.spec precision"
    ).split():
        assert key in known


def test_every_field_is_documented():
    def walk(section):
        for field in dataclasses.fields(section):
            if dataclasses.is_dataclass(field.type):
                walk(field.type)
            else:
                assert re.search(rf"\b{field.name}\b", section.__doc__), (
                    section,
                    field.name,
                )

    walk(config.RunConfig)


def test_json_round_trip():
    run = load(
        rollout__stop=("\n\n", "</s>"),
        eval__samples=4,
        eval__k=(1, 4),
        algorithm__clip_high=0.28,
        task__options={"b": (1, 2), "a": "x"},
    )
    assert run.task.options == (("a", "x"), ("b", (1, 2)))
    assert config.load(json.loads(config.to_json(run))) == run
    assert config.digest(config.load(json.loads(config.to_json(run)))) == (
        config.digest(run)
    )
    assert re.fullmatch("[0-9a-f]{16}", config.digest(run))
    assert config.digest(run) != config.digest(load())


def test_differences_name_the_keys():
    old, new = load(), load(seed=3, sampling__top_p=0.9)
    assert config.differences(old, new) == {"seed": (0, 3), "sampling.top_p": (1, 0.9)}


def test_unset_algorithm_fields_are_left_to_the_preset():
    run = load(algorithm__kl_coef=0.0, algorithm__dynamic_sampling=False)
    assert run.algorithm.overrides() == {"kl_coef": 0.0, "dynamic_sampling": False}


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("num_steps", 0, "num_steps=0 is out of range: at least 1."),
        ("sampling__temperature", 0.0, "sampling.temperature=0 draws the same answer"),
        ("sampling__top_p", 1.5, "sampling.top_p=1.5 is out of range: "),
        ("sampling__min_p", -0.1, "at least 0, below 1"),
        ("optimizer__beta2", 1.0, "optimizer.beta2=1.0 is out of range"),
        ("optimizer__learning_rate", float("nan"), "is not finite"),
        ("algorithm__clip_low", 1.1, "algorithm.clip_low=1.1"),
        ("precision", "bf16", "precision='bf16' is not one of float32, bfloat16; did"),
        ("algorithm__name", "grop", "did you mean 'grpo'"),
        ("specdec__mode", "tlr", "specdec.mode='tlr' is not one of off, ngram, tlt"),
        ("specdec__tuner", "ucb", "specdec.tuner='ucb' is not one of static"),
        ("workers__num", 0, "workers.num=0"),
        ("drafter__features", "layers", "name layers with features='layers'"),
        ("model__spec", "", "model.spec is empty"),
        ("learner__row_tokens", 1023, "give at least 1024"),
        ("learner__minibatches", 3, "does not divide rollout.prompts_per_step=8"),
        ("mesh__data", -1, "at most one is -1"),
        ("mesh__tensor", 0, "each axis has at least 1 device"),
        ("eval__k", (1, 2), "needs 1 <= k <= eval.samples=1"),
        ("cache__num_pages", 15, "give at least 16 pages"),
    ],
)
def test_values_out_of_range_are_refused(key, value, message):
    with pytest.raises(schema.ConfigError, match=re.escape(message)):
        load(**{key: value})


@pytest.mark.parametrize(
    ("mode", "name"), [("ngram", "ngram_strategies"), ("tlt", "strategies")]
)
def test_speculation_that_would_do_nothing_is_refused(mode, name):
    with pytest.raises(schema.ConfigError, match=rf"{mode}' with specdec\.{name}=\(\)"):
        load(**{"specdec__mode": mode, f"specdec__{name}": ()})


def test_direct_construction_is_checked_too():
    with pytest.raises(schema.ConfigError, match=r"rollout\.max_batch=0"):
        dataclasses.replace(load(), rollout=sections.Rollout(max_batch=0))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sed": 1}, "unknown config key 'sed': did you mean 'seed'?"),
        ({"rollout": {"max_bach": 1}}, "did you mean 'rollout.max_batch'?"),
        ({"max_batch": 1}, "did you mean 'rollout.max_batch'?"),
        ({"seed": 1.0}, "seed=1.0 is of type float: give int."),
        ({"seed": True}, "seed=True is of type bool: give int."),
        ({"eval": {"k": (1, "2")}}, "eval.k[1]='2' is of type str: give int."),
        ({"rollout": 3}, "rollout=3 is a value, but rollout is a section"),
        ({"algorithm": {"kl_coef": "x"}}, "give float or leave it unset."),
        ({"task": {"options": {"x": {"y": 1}}}}, "task.options.x={'y': 1} is of type"),
    ],
)
def test_wrong_plain_values_are_refused(values, message):
    with pytest.raises(schema.ConfigError, match=re.escape(message)):
        config.load(values)


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("optimzer.learning_rate", "did you mean 'optimizer.learning_rate'?"),
        ("optimizer.lr", "keys in 'optimizer' are beta1, beta2,"),
        ("seed.x", "'seed' is not a section."),
        ("qqq", "keys at the top are adaptation, algorithm,"),
    ],
)
def test_nearest_key(key, hint):
    assert hint in schema.unknown_key_message(config.RunConfig, key)


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
    )
    assert result.returncode == 0, result.stderr
    values = json.loads(result.stdout)
    assert values["seed"] == 7
    assert values["rollout"]["stop"] == ["a"]
    assert values["algorithm"]["clip_high"] == 0.3
    assert values["log"]["tensorboard"] is False
    assert values["task"]["options"] == {"longest": 5}
    assert values["optimizer"]["learning_rate"] == 1.0


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
