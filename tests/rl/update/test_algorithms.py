"""Presets as published, and how they are overridden."""

import pytest

from tlt_jax.rl.update import algorithms, losses

NAMES = ("grpo", "dr_grpo", "dapo", "rloo", "reinforce_pp_baseline", "gspo")


@pytest.mark.parametrize(
    "name, expected",
    [
        (
            "grpo",
            {
                "advantage": "grpo",
                "aggregation": "sequence_mean",
                "clip_low": 0.2,
                "clip_high": 0.2,
                "kl_coef": 0.001,
                "kl_estimator": "k3",
                "kl_placement": "loss",
            },
        ),
        (
            "dr_grpo",
            {"advantage": "dr_grpo", "aggregation": "constant", "kl_coef": 0.0},
        ),
        (
            "dapo",
            {
                "advantage": "grpo",
                "aggregation": "token_mean",
                "clip_low": 0.2,
                "clip_high": 0.28,
                "kl_coef": 0.0,
                "dynamic_sampling": True,
                "overlong_shaping": True,
                "overlong_buffer_frac": 0.2,
            },
        ),
        ("rloo", {"advantage": "rloo", "kl_estimator": "k1", "kl_placement": "reward"}),
        (
            "reinforce_pp_baseline",
            {"advantage": "reinforce_pp_baseline", "kl_estimator": "k2"},
        ),
        (
            "gspo",
            {
                "advantage": "grpo",
                "ratio_level": "sequence",
                "aggregation": "sequence_mean",
                "clip_low": 3e-4,
                "clip_high": 4e-4,
                "kl_coef": 0.0,
            },
        ),
    ],
)
def test_presets_are_those_of_the_papers(name, expected):
    settings = algorithms.preset(name)
    assert expected.items() <= settings.items()


def test_all_presets_have_the_same_settings():
    keys = [list(algorithms.preset(name)) for name in NAMES]
    assert all(k == keys[0] for k in keys)
    assert algorithms.preset("grpo") is not algorithms.preset("grpo")


@pytest.mark.parametrize("name", NAMES)
def test_any_setting_can_be_overridden(name):
    settings = algorithms.preset(name) | {"clip_high": 0.5, "aggregation": "constant"}
    algorithm = algorithms.build(settings)
    assert algorithm.loss.clip_high == 0.5
    assert algorithm.aggregation == "constant"
    assert hash(algorithm) == hash(algorithms.build(settings))


def test_defaults_of_the_loss_are_not_repeated_differently():
    assert (
        algorithms.build(algorithms.preset("grpo") | {"kl_coef": 0.0}).loss
        == losses.LossConfig()
    )


def test_no_setting_is_passed_over():
    settings = algorithms.preset("grpo")
    with pytest.raises(TypeError, match="'clip_hi'"):
        algorithms.build(settings | {"clip_hi": 1})
    for name in settings:
        with pytest.raises((KeyError, TypeError), match=name):
            algorithms.build({k: v for k, v in settings.items() if k != name})


@pytest.mark.parametrize(
    "call, words",
    [
        (
            lambda: algorithms.build(algorithms.preset("grpo") | {"advantage": "gae"}),
            "advantage='gae'",
        ),
        (
            lambda: algorithms.build(
                algorithms.preset("grpo") | {"aggregation": "sum"}
            ),
            "aggregation='sum'",
        ),
        (
            lambda: algorithms.build(
                algorithms.preset("grpo") | {"overlong_buffer_frac": 2.0}
            ),
            "overlong_buffer_frac=2.0",
        ),
        (
            lambda: algorithms.build(
                algorithms.preset("grpo") | {"overlong_penalty": -1.0}
            ),
            "overlong_penalty=-1.0",
        ),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
