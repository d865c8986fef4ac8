"""The planner takes model, devices and rows from a recipe, and tells its memory."""

import pytest

from configs import grpo
from experiments import planner
from experiments.simulation import costs

SAID = ("device", "devices", "tensor", "per_host", "model", "num_prompts", "max_rows")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("qwen2.5-1.5b@h200", ("h200", 1, 1, 1, "qwen2.5-1.5b", 32, 64)),
        ("qwen2.5-7b@8xh100", ("h100", 8, 2, 8, "qwen2.5-7b", 128, 32)),
        ("qwen3-30b-a3b", ("v5p", 64, 4, 4, "qwen3-30b-a3b", 128, 64)),
    ],
)
def test_a_recipe_says_what_is_simulated_and_what_memory_it_takes(name, said):
    options = planner.EXPERIMENT.parse([f"--recipe={name}"])
    memory = planner.follow_recipe(options)
    assert said == tuple(getattr(options, key) for key in SAID)
    programs = {row["program"]: row["GiB of a device"] for row in memory}
    assert {"accumulate", f"tlt_decode_{options.max_rows}"} <= programs.keys()
    assert 5 < max(programs.values()) < memory[0]["it has"]
    # It describes a whole cluster.
    assert planner.scenario_of(options).cfg.num_workers > 0


def test_every_recipe_is_of_a_device_and_a_model_that_are_known():
    for name in grpo.VARIANTS:
        options = planner.EXPERIMENT.parse([f"--recipe={name}"])
        planner.follow_recipe(options)
        assert options.device in costs.DEVICES and options.model in costs.MODELS


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--recipe=gone"], "--recipe=gone is no variant of configs/grpo.py: use one"),
        (
            ["--recipe=qwen2.5-7b@8xh200", "--devices=16"],
            "--recipe=qwen2.5-7b@8xh200 says --devices=8: leave --devices out",
        ),
    ],
)
def test_what_a_recipe_does_not_allow_is_refused_in_a_line(flags, message):
    with pytest.raises(ValueError, match=message):
        planner.main(flags)
