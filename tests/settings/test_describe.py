"""Every setting is described: what it takes, its default, what it means."""

import dataclasses
import pathlib
from typing import Literal

import pytest

from tlt_jax import config
from tlt_jax.settings import describe, drafter_run, schema

ROOT = pathlib.Path(__file__).resolve().parents[2]


@dataclasses.dataclass(frozen=True)
class Plant:
    """What grows.

    Slowly.

    Attributes:
      height, width: in meters,
        with the roots: all of it.
      kind: `tree`, or one of one's own. Required.
    """

    height: float = schema.number(0.5, 0.0, below=2.0)
    width: float | None = schema.number(None, above=0.0)
    kind: str = schema.choice("", "tree", "grass")


@dataclasses.dataclass(frozen=True)
class Tree(Plant):
    """A plant of wood.

    Attributes:
      height, width, kind: see `Plant`.
      rings: counted.
    """

    rings: tuple[int, ...] = (1, 2)


@dataclasses.dataclass(frozen=True)
class Garden:
    """A garden.

    Attributes:
      open: to all.
      season: when.
      names: of visitors.
      notes: others.
      other: a tree besides.
    """

    open: bool = True
    season: Literal["spring", "fall"] = "fall"
    names: tuple[str, ...] = schema.names()
    notes: schema.Options = ()
    tree: Tree = Tree(height=1.0)
    other: Tree = Tree()


def test_what_the_fields_and_their_docstrings_say():
    loose, tree, other = describe.sections(Garden)
    assert loose.settings == (
        describe.Setting("open", "true or false", "true", "To all."),
        describe.Setting("season", "one of spring, fall", "fall", "When."),
        describe.Setting("names", "names, as a,b", "empty", "Of visitors."),
        describe.Setting("notes", "free keys", "empty", "Others."),
    )
    assert (tree.name, tree.meaning) == ("tree", "A plant of wood.")
    assert (other.name, other.meaning) == ("other", "A tree besides.")
    whole = "In meters, with the roots: all of it."
    own = "one of tree, grass, or package.module:Name"
    assert tree.settings == (
        describe.Setting("tree.height", "number, at least 0, below 2", "1", whole),
        describe.Setting("tree.width", "number, above 0", "unset", whole),
        describe.Setting("tree.kind", own, "required", "`tree`, or one of one's own."),
        describe.Setting("tree.rings", "tuple, as (1, 2)", "(1, 2)", "Counted."),
    )
    assert other.settings[0].default == "0.5"


@pytest.mark.parametrize("root", [config.RunConfig, drafter_run.DrafterRun])
def test_every_setting_has_a_meaning(root):
    sections = list(describe.sections(root))
    found = [setting for section in sections for setting in section.settings]
    assert [s.key for s in found] == [key for key, _ in schema.leaves(root)]
    for section in sections:
        assert not section.name or section.meaning.endswith((".", ")")), section.name
    for setting in found:
        # A sentence, not a name said again.
        assert len(setting.meaning.split()) >= 1, setting.key
        assert setting.meaning[-1] in ".;", setting
        assert setting.accepts and setting.default, setting


def test_the_page_of_settings_is_up_to_date():
    """`python -m tlt_jax.config > docs/settings.md` writes it."""
    assert (ROOT / "docs" / "settings.md").read_text("utf-8") == config.page()
