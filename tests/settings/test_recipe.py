"""Recipes: what is read of a file, what is set in it, and what it says of itself."""

import dataclasses

import ml_collections
import pytest

from tlt_jax.settings import recipe, schema


@dataclasses.dataclass(frozen=True)
class Kitchen:
    """A section made up here."""

    name: str = "soup"
    num: int = schema.number(1, 0, 9)


RECIPE = """\
\"\"\"A soup.

python -m tlt_jax.launch --config=a:hot
python -m tlt_jax.evaluate --workdir=b
python -m tlt_jax.main --config=a
\"\"\"
import ml_collections

VARIANTS = {"hot": 1, "cold": 2}


def get_config(variant="hot"):
    if variant not in VARIANTS:
        raise ValueError(f"a.py has no variant {variant!r}")
    return ml_collections.ConfigDict({"name": variant, "num": VARIANTS[variant]})
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "a.py").write_text(RECIPE)
    (tmp_path / "b.py").write_text('"""Others."""\nVARIANTS = ("x", "y")\n')
    (tmp_path / "silent.py").write_text("def get_config():\n    return 3\n")
    (tmp_path / "c.yaml").write_text("name: broth\nnum: 4\n")
    (tmp_path / "wrong.yaml").write_text("name: broth\nnun: 4\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("spec", "values"),
    [
        ("a.py", {"name": "hot", "num": 1}),
        ("a.py:cold", {"name": "cold", "num": 2}),
        ("a:cold", {"name": "cold", "num": 2}),
        ("c.yaml", {"name": "broth", "num": 4}),
    ],
)
def test_a_recipe_is_read(folder, spec, values):
    assert recipe.load(spec, Kitchen).to_dict() == values


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("aa.py", "--config=aa.py: there is no such file; did you mean a.py?"),
        ("zzzzz.py", "there is no such file; recipes are files in configs/."),
        ("c.yaml:hot", "--config=c.yaml:hot: c.yaml has no variants: leave the colon"),
        ("a.py:warm", "a.py has no variant 'warm'"),
        ("b.py", "b.py defines no get_config(): see configs/tiny.py."),
        ("silent.py", "get_config() of the recipe returned a int: return the ConfigD"),
        ("wrong.yaml", "wrong.yaml: unknown config key 'nun'"),
    ],
)
def test_mistakes_are_one_line(folder, spec, message):
    with pytest.raises(schema.ConfigError) as error:
        recipe.load(spec, Kitchen)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_what_recipes_say_of_themselves(folder):
    assert list(recipe.summaries(folder)) == [
        recipe.Summary(
            folder / "a.py",
            "A soup.",
            # Whatever is launched is the program itself.
            ("tlt_jax.launch", "tlt_jax.evaluate", "tlt_jax.main"),
            ("hot", "cold"),
        ),
        recipe.Summary(folder / "b.py", "Others.", (), ("x", "y")),
    ]


def values():
    task = {"name": "count", "options": {"max_digits": 3}}
    return ml_collections.ConfigDict({"task": task, "num": 1})


@pytest.mark.parametrize(
    ("changes", "task"),
    [
        ([("num", 2)], {"name": "count", "options": {"max_digits": 3}}),
        ([("task.name", "count")], {"name": "count", "options": {"max_digits": 3}}),
        # The options are those of another task.
        ([("task.name", "other")], {"name": "other", "options": {}}),
        (
            [("task.options.size", 5), ("task.name", "other")],
            {"name": "other", "options": {"size": 5}},
        ),
        (
            [("task.options", {"a": 1})],
            {"name": "count", "options": {"a": 1}},
        ),
        (
            [("task.options.a", 1), ("task.options.a", 2)],
            {"name": "count", "options": {"max_digits": 3, "a": 2}},
        ),
    ],
)
def test_keys_are_set(changes, task):
    changed = values()
    recipe.override(changed, changes)
    assert changed.task.to_dict() == task


def test_a_section_that_the_recipe_lacks_is_begun():
    changed = values()
    recipe.override(changed, [("log.every", 7)])
    assert changed.log.to_dict() == {"every": 7}
