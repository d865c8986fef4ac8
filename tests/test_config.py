"""Settings: every key documented and checked, mistakes named in one line."""

import dataclasses
import json
import math
import re

import ml_collections
import pytest

from tests import tiny_runs
from tlt_jax import config
from tlt_jax.settings import drafter_run, schema, sections


def recipe() -> ml_collections.ConfigDict:
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


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("num_steps", 0, "num_steps=0 is out of range: at least 1, at most 1e+09."),
        ("sampling__temperature", 0.0, "sampling.temperature=0 draws the same answer"),
        ("precision", "bf16", "precision='bf16' is not one of float32, bfloat16; did"),
        ("specdec__mode", "tlr", "specdec.mode='tlr' is not one of off, ngram, tlt"),
        ("drafter__features", "layers", "name layers with features='layers'"),
        ("model__spec", "", "model.spec is empty"),
        ("rollout__stop", ("a", ""), "rollout.stop=('a', '') holds an empty string"),
        ("reward__timeout_s", 1e308, "at least 0.001, at most 86400."),
        ("reward__failure_reward", 1e39, "at least -1e+06, at most 1e+06"),
        ("reward__memory_mb", -1, "reward.memory_mb=-1 is out of range"),
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
        ({"max_batch": 1}, "did you mean 'rollout.max_batch'?"),
        ({"eval": {"k": (1, "2")}}, "eval.k[1]='2' is of type str: give int."),
    ],
)
def test_wrong_plain_values_are_refused(values, message):
    with pytest.raises(schema.ConfigError, match=re.escape(message)):
        config.load(values)


@pytest.mark.parametrize(
    ("key", "value", "accepted"),
    [
        ("sampling.temperature", 1e-38, "0 or at least 0.001, at most 1000"),
        ("eval.temperature", 1e-38, "0 or at least 0.001, at most 1000"),
        ("sampling.min_p", 1.0, "at least 0, at most 0.999"),
        ("sampling.top_p", 1e-38, "at least 1e-09, at most 1"),
        ("workers.num", 100_000, "at least 1, at most 1024"),
        ("reward.workers", 100_000, "at least 0, at most 1024"),
        ("reward.timeout_s", 1e308, "at least 0.001, at most 86400"),
        ("seed", 10**27, "at least 0, at most 1e+18"),
        ("task.seed", 10**27, "at least 0, at most 1e+18"),
        ("num_steps", 10**10, "at least 1, at most 1e+09"),
        ("optimizer.beta2", 1 - 1e-9, "at least 0, at most 0.999999"),
        ("optimizer.eps", 1e-60, "at least 1e-30, at most 1"),
        ("optimizer.clip_norm", 1e-40, "0 or at least 1e-09, at most 1e+09"),
        ("optimizer.learning_rate", 1e9, "at least 0, at most 1000"),
        ("rollout.max_batch", 2**40, "at least 1, at most 65536"),
        ("specdec.tau", 1e-38, "at least 0.001, at most 1000"),
        ("mesh.data", 2**40, "at least -1, at most 1048576"),
    ],
)
def test_numbers_that_no_run_survives_are_refused_at_once(key, value, accepted):
    with pytest.raises(schema.ConfigError) as raised:
        tiny_runs.config_of(**{key: value})
    assert str(raised.value) == f"{key}={value} is out of range: {accepted}."


def test_every_number_has_bounds_on_both_sides():
    for root in (config.RunConfig, drafter_run.DrafterRun):
        for part in (root, *(f.type for f in dataclasses.fields(root))):
            for field in (
                dataclasses.fields(part) if dataclasses.is_dataclass(part) else ()
            ):
                if "low" in field.metadata:
                    ends = [field.metadata[end] for end in ("low", "above")]
                    assert max(x for x in ends if x is not None) > -math.inf, field.name
                    ends = [field.metadata[end] for end in ("high", "below")]
                    assert min(x for x in ends if x is not None) < math.inf, field.name


@pytest.mark.parametrize(
    "algorithm", ["grpo", "dr_grpo", "dapo", "rloo", "reinforce_pp_baseline", "gspo"]
)
def test_a_group_of_one_is_refused_where_it_teaches_nothing(algorithm):
    alone = {"rollout.group_size": 1, "algorithm.name": algorithm}
    with pytest.raises(schema.ConfigError) as raised:
        tiny_runs.config_of(**alone)
    assert str(raised.value) == (
        f"rollout.group_size=1 with the advantages of {algorithm}, which compare the "
        "completions of a group: one alone teaches nothing. Set it to 2 or more."
    )
    with pytest.raises(schema.ConfigError, match="the advantages of rloo, which"):
        tiny_runs.config_of(**alone | {"algorithm.advantage": "rloo"})
    own = tiny_runs.config_of(**alone | {"algorithm.advantage": "mine:advantage"})
    assert own.rollout.group_size == 1


def test_separate_workers_take_drafters_up_between_rollouts():
    given = {"specdec__mode": "tlt", "adaptation__publish_steps": 3}
    assert load(**given).workers.placement == "colocated"
    told = "publish_steps=3 with workers.placement='separate': such workers take a"
    with pytest.raises(schema.ConfigError, match=told):
        load(**given, workers__placement="separate")
    load(**given, adaptation__enabled=False, workers__placement="separate")
