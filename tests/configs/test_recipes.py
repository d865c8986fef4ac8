"""What a recipe says of itself is so: variants, program, the drafter's own path."""

import importlib
import pathlib

import pytest

from tlt_jax import config
from tlt_jax.settings import drafter_run, recipe

FOLDER = pathlib.Path(__file__).resolve().parents[2] / "configs"
RECIPES = {one.path.stem: one for one in recipe.summaries(FOLDER)}
LOAD = {"tlt_jax.main": config.load, "tlt_jax.train_drafter": drafter_run.load}


def recipe_of(name):
    return importlib.import_module(f"configs.{name}").get_config


def test_all_recipes_are_listed_with_their_variants():
    assert {name: one.variants for name, one in RECIPES.items()} == {
        "grpo": (
            *("qwen2.5-7b", "qwen2.5-32b"),
            *("ds-r1-distill-qwen-7b", "llama-3.3-70b"),
            *("qwen3-30b-a3b", "qwen3-30b-a3b@64xh200"),
            *("qwen2.5-1.5b@h200", "qwen2.5-3b@h200"),
            *("qwen2.5-7b@8xh200", "qwen2.5-7b@8xh100"),
            *("qwen2.5-7b@v5p-8", "qwen2.5-1.5b@v5e-8"),
        ),
        "mine": (),
        "smollm2": (),
        "smollm2_drafter": ("counting", "random_numbers", "general"),
        "smollm2_tlt": ("off", "ngram", "products", "chain_sum"),
        "tiny": ("arithmetic", "count", "experts"),
        "tiny_drafter": (),
    }


@pytest.mark.parametrize("name", RECIPES)
def test_every_variant_is_a_run_of_the_program_that_the_docstring_starts(name):
    about = RECIPES[name]
    get_config = importlib.import_module(f"configs.{name}").get_config
    (load,) = (LOAD[program] for program in about.programs if program in LOAD)
    for variant in ("", *about.variants):
        load(get_config(variant).to_dict())
    if name != "mine":  # Its argument is a file.
        with pytest.raises(ValueError, match=f"{name}.py has no variant 'another'"):
            get_config("another")


def test_the_main_job_is_the_run_of_the_tables_of_record():
    """Each of these decides what tokens a run has, or how many."""
    settings = recipe_of("smollm2_tlt")("")
    assert (settings.task.name, settings.task.options.to_dict()) == (
        *("counting", {"pass_mark": 0.9}),
    )
    rollout, learner = settings.rollout, settings.learner
    sizes = rollout.prompts_per_step, rollout.group_size, rollout.max_new_tokens
    assert sizes == (2, 8, 512)
    assert (learner.row_tokens, learner.rows_per_micro_batch) == (1024, 1)
    assert (settings.num_steps, settings.eval.every) == (16, 0)
    assert settings.specdec.strategies == ("2:D7K1V8",)
    # Those that reason differ in one thing.
    main = recipe_of("smollm2_tlt")("products").to_dict()
    other = recipe_of("smollm2_tlt")("chain_sum").to_dict()
    assert main["task"].pop("name") == "products"
    assert other["task"].pop("name") == "chain_sum"
    assert main == other


def test_every_drafter_has_a_path_of_its_own():
    paths = []
    for name, about in RECIPES.items():
        if "tlt_jax.train_drafter" in about.programs:
            doc = importlib.import_module(f"configs.{name}").__doc__
            paths += [word for word in doc.split() if word.startswith("--workdir=")]
    assert paths == [
        "--workdir=workdirs/smollm2_drafter",
        "--workdir=workdirs/counting_drafter",
        "--workdir=workdirs/random_numbers_drafter",
        "--workdir=workdirs/general_drafter",
        "--workdir=workdirs/tiny_drafter",
    ]
