"""A drafter's training by itself: names, defaults, ranges, what must be given."""

import pytest

from tests.settings import tables
from tlt_jax.settings import drafter_run, schema, sections, speculation

# By section and key: the default, and the range as a mathematician writes it.
SETTINGS = {
    drafter_run.Texts: {
        "tasks": ((), ""),
        "num": (1024, "[1, 100000000]"),
        "round_steps": (0, "[0, 1000000000]"),
        "kept_rounds": (1, "[1, 1000000]"),
        "num_held_out": (64, "[1, 1000000]"),
        "seed": (0, "[0, 1000000000000000000]"),
        "template_options": ((), ""),
        "max_prompt_tokens": (256, "[1, 10000000]"),
        "max_new_tokens": (256, "[1, 10000000]"),
        "max_batch": (32, "[1, 65536]"),
        "steps_per_call": (32, "[1, 1000000]"),
        "page_size": (64, "[1, 65536]"),
        "dtype": ("bfloat16", ""),
    },
    drafter_run.Batch: {
        "num_rows": (4, "[1, 1000000]"),
        "row_tokens": (512, "[3, 100000000]"),
        "row_bases": (384, "[1, 10000000]"),
        "head_chunk": (256, "[1, 10000000]"),
        "remat": (False, ""),
    },
    drafter_run.Eval: {
        "every": (0, "[0, 1000000000]"),
        "depth": (8, "[1, 256]"),
    },
    drafter_run.Log: {
        "every": (10, "[1, 1000000000]"),
        "progress": ("auto", ""),
    },
}


@pytest.mark.parametrize("section", SETTINGS, ids=lambda section: section.__name__)
def test_defaults_and_ranges(section):
    tables.check(section, SETTINGS[section])


CHOICES = {
    (drafter_run.Texts, "dtype"): "float32 bfloat16",
    (drafter_run.Log, "progress"): "auto plain off",
}


@pytest.mark.parametrize("key", CHOICES, ids=tables.named)
def test_choices(key):
    tables.check_choices(*key, CHOICES[key])


def values(**more):
    return {"model": {"spec": "some/model"}, "texts": {"tasks": ("chat",)}} | more


def test_defaults_of_the_whole():
    run = drafter_run.load(values())
    assert (run.seed, run.num_steps, run.precision) == (0, 1000, "float32")
    assert run == drafter_run.DrafterRun(
        model=sections.Model("some/model"), texts=drafter_run.Texts(("chat",))
    )
    made = drafter_run.default()
    with pytest.raises(AttributeError, match="num_step"):
        made.num_step = 3
    made.model.spec, made.texts.tasks = "some/model", ("chat",)
    assert drafter_run.load(made.to_dict()) == run
    made.texts.template_options.enable_thinking = False
    options = drafter_run.load(made.to_dict()).texts.template_options
    assert options == (("enable_thinking", False),)


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"model": {}}, "model.spec is empty: set it in the recipe."),
        (
            {"texts": {"num": 3}},
            "texts.tasks is empty: name at least one source of prompts.",
        ),
        ({"num_steps": 0}, "num_steps=0 is out of range: at least 1, at most 1e+09."),
        ({"batch": {"row_tokens": 2}}, "batch.row_tokens=2 is out of range: at least"),
        ({"drafter": {"architecture": "eagle"}}, "drafter.architecture='eagle' with"),
        ({"bath": {}}, "unknown config key 'bath': did you mean 'batch'?"),
    ],
)
def test_what_cannot_be_used_is_refused(changes, message):
    with pytest.raises(schema.ConfigError) as raised:
        drafter_run.load(values(**changes))
    assert str(raised.value).startswith(message)


def test_sections_that_a_run_has_too_are_its_own():
    run = drafter_run.load(values(objective={"decay": 0.25}))
    assert run.objective == speculation.Objective(decay=0.25)
    assert type(run.drafter) is speculation.DrafterShape
    assert type(run.optimizer) is sections.Optimizer
