"""Settings as text: what a command line and a YAML file may say, and what not."""

import dataclasses
from typing import Literal

import pytest

from tlt_jax.settings import schema, text


@dataclasses.dataclass(frozen=True)
class Dish:
    """A section made up here."""

    name: str = "soup"
    hot: bool = True
    salt: float | None = None
    spices: tuple[str, ...] = schema.names()
    lines: tuple[str, ...] = ()
    ovens: tuple[int, ...] = (1,)


@dataclasses.dataclass(frozen=True)
class Menu:
    """Another one."""

    num: int = schema.number(2, 1)
    kind: Literal["off", "on"] = "off"
    price: float = schema.number(1e-6)
    dish: Dish = Dish()
    free: schema.Options = ()


@pytest.mark.parametrize(
    ("key", "typed", "value"),
    [
        ("num", "7", 7),
        ("kind", "on", "on"),
        ("price", "1", 1.0),
        ("price", "1e-6", 1e-6),
        ("dish.name", "('a',)", "('a',)"),
        ("dish.hot", "False", False),
        ("dish.hot", "1", True),
        ("dish.salt", "None", None),
        ("dish.salt", "0.5", 0.5),
        ("dish.spices", "a,b:c", ("a", "b:c")),
        ("dish.spices", "('a,b',)", ("a,b",)),
        ("dish.spices", "", ()),
        ("dish.lines", "a", ("a",)),
        ("dish.lines", "7", ("7",)),
        ("dish.lines", "['a', 'b']", ("a", "b")),
        ("dish.lines", "'a,b'", ("a,b",)),
        ("dish.lines", "()", ()),
        ("dish.ovens", "3", (3,)),
        ("dish.ovens", "1,2", (1, 2)),
        ("free.x", "1", 1),
        ("free.x", "a/b.c", "a/b.c"),
        ("free.x", "'1'", "1"),
        ("free.x", "true", True),
        ("free.x", "False", False),
        ("free.x", "(1, 'a')", (1, "a")),
        ("free", "{'x': 1}", {"x": 1}),
    ],
)
def test_values_typed(key, typed, value):
    found = text.parse(Menu, key, typed)
    assert (type(found), found) == (type(value), value)


@pytest.mark.parametrize(
    ("key", "typed", "message"),
    [
        ("num", "1.5", "--config.num=1.5: invalid value, give a whole number."),
        ("price", "much", "--config.price=much: invalid value, give a number."),
        ("dish.hot", "ja", "--config.dish.hot=ja: invalid value, give true or false."),
        (
            "dish.lines",
            "a,b",
            "--config.dish.lines=a,b: invalid value, write a tuple as Python does, "
            "\"('a','b')\".",
        ),
        ("free", "1", "--config.free=1: invalid value, give --config.free.KEY=VALUE,"),
        ("free.a.b", "1", "--config.free.a.b: a key of free has no dot."),
        ("dish", "1", "--config.dish is a section of keys: give --config.dish.KEY="),
        ("dish.nme", "1", "unknown config key 'dish.nme': did you mean 'dish.name'?"),
    ],
)
def test_what_cannot_be_meant_is_refused(key, typed, message):
    with pytest.raises(schema.ConfigError) as raised:
        text.parse(Menu, key, typed)
    assert str(raised.value).startswith(message)


def test_which_settings_are_true_or_false():
    assert text.is_flag(Menu, "dish.hot")
    assert not any(text.is_flag(Menu, key) for key in ("num", "free", "free.x"))


def test_yaml_there_and_back():
    # Text that looks like something else stays text.
    dish = Dish("off", spices=("1e-6", "true"), lines=("\n\n", "ä: b", "null"))
    menu = Menu(kind="off", dish=dish, free=(("a", "~"), ("b", (1, 2.5)), ("c", None)))
    written = text.to_yaml(menu)
    assert schema.build(Menu, text.from_yaml(written)) == menu
    assert [line.partition(":")[0] for line in written.splitlines()] == (
        "num kind price dish".split()
        + [f"  {field.name}" for field in dataclasses.fields(Dish)]
        + ["free", "  a", "  b", "  c"]
    )
    assert "  ovens: [1]\n" in written
    assert "  lines: [\"\\n\\n\", 'ä: b', 'null']\n" in written


def test_yaml_by_hand_means_what_it_says():
    read = text.from_yaml("kind: off\nprice: 1e-6\nfree: {a: yes, b: 1e3, c: 08}")
    assert read == {
        "kind": "off",
        "price": 1e-6,
        "free": {"a": "yes", "b": 1e3, "c": 8},
    }
    assert text.from_yaml('{"num": 3, "dish": {"hot": true}}') == {
        "num": 3,
        "dish": {"hot": True},
    }


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("a: [", "line 1: this is no YAML: "),
        ("a: 1\nb: c: d", "line 2: this is no YAML: mapping values are not allowed"),
        ("3", "settings are keys with values, `KEY: VALUE`."),
        ("", "settings are keys with values, `KEY: VALUE`."),
        ("1: 2", "settings are keys with values, `KEY: VALUE`."),
        ("a: !!python/name:os.system", "line 1: this is no YAML: could not determine"),
    ],
)
def test_what_is_no_yaml_of_settings_is_refused(written, message):
    with pytest.raises(schema.ConfigError) as raised:
        text.from_yaml(written)
    assert str(raised.value).startswith(message)
