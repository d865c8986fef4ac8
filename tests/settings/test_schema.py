"""The machinery of settings on sections made up here: every error text, each once."""

import dataclasses
import json
import math
from typing import Literal

import pytest

from tlt_jax.settings import schema


@dataclasses.dataclass(frozen=True)
class Paint:
    color: Literal["red", "green"] = "red"
    gloss: float = schema.number(0.5, 0.0, 1.0)
    layers: int | None = schema.number(None, 2, 5)
    names: tuple[str, ...] = ("first",)


@dataclasses.dataclass(frozen=True)
class Wall:
    width: int = schema.number(3, 1)
    inside: Paint = Paint()


@dataclasses.dataclass(frozen=True)
class House:
    seed: int = schema.number(0, 0)
    rent: float = schema.number(1.5, above=0.0)
    lost: float = schema.number(-1.0, high=0.0)
    share: float = schema.number(0.25, 0.0, below=1.0)
    style: str = schema.choice("plain", "plain", "ornate")
    sold: bool = False
    title: str = "none"
    wall: Wall = Wall()
    paint: Paint = Paint()
    free: schema.Options = ()

    def __post_init__(self):
        schema.check_fields(self)


def test_names_of_all_keys_and_their_values():
    house = House(seed=4, free=(("a", 1),), wall=Wall(inside=Paint(gloss=0.25)))
    assert dict(schema.leaves(house)) == {
        "seed": 4,
        "rent": 1.5,
        "lost": -1.0,
        "share": 0.25,
        "style": "plain",
        "sold": False,
        "title": "none",
        "wall.width": 3,
        "wall.inside.color": "red",
        "wall.inside.gloss": 0.25,
        "wall.inside.layers": None,
        "wall.inside.names": ("first",),
        "paint.color": "red",
        "paint.gloss": 0.5,
        "paint.layers": None,
        "paint.names": ("first",),
        "free": (("a", 1),),
    }
    assert schema.keys(House)[6:11] == (
        "title",
        "wall",
        "wall.width",
        "wall.inside",
        "wall.inside.color",
    )
    assert dict(schema.leaves(House))["free"] == ()


def test_built_from_plain_values_and_back():
    values = {
        "seed": 7,
        "rent": 2,
        "wall": {"inside": {"layers": 5, "names": ["a", "b"]}},
        "free": {"z": [1, [2.5, None]], "b": True},
    }
    house = schema.build(House, values)
    assert house == House(
        seed=7,
        rent=2.0,
        wall=Wall(inside=Paint(layers=5, names=("a", "b"))),
        free=(("b", True), ("z", (1, (2.5, None)))),
    )
    assert type(house.rent) is float
    plain = json.loads(json.dumps(schema.to_dict(house)))
    assert plain["free"] == {"b": True, "z": [1, [2.5, None]]}
    assert plain["wall"]["inside"]["names"] == ["a", "b"]
    assert schema.build(House, plain) == house


def test_the_config_dict_knows_the_types():
    made = schema.to_config_dict(House)
    assert made.seed == 0 and made.wall.width == 3 and made.free.to_dict() == {}
    assert made.paint.layers is None
    made.paint.layers = 3
    with pytest.raises(TypeError):
        made.paint.layers = "three"
    with pytest.raises(TypeError):
        made.seed = 0.5
    assert schema.build(House, made.to_dict()) == House(paint=Paint(layers=3))


@dataclasses.dataclass(frozen=True)
class Flat:
    """Its wall is not what walls are by themselves."""

    wall: Wall = Wall(width=9, inside=Paint(gloss=0.75, layers=4))
    free: schema.Options = (("a", 1),)


def test_a_section_keeps_the_default_of_the_one_that_holds_it():
    made = schema.to_config_dict(Flat)
    assert (made.wall.width, made.wall.inside.gloss) == (9, 0.75)
    assert made.free.to_dict() == {"a": 1}
    assert schema.build(Flat, made.to_dict()) == Flat() == schema.build(Flat, {})
    changed = schema.build(Flat, {"wall": {"inside": {"color": "green"}}})
    assert changed.wall == Wall(9, Paint("green", 0.75, 4))
    assert dict(schema.leaves(Flat))["wall.inside.layers"] == 4


OF_TYPE = {
    "seed": (1.0, "seed=1.0 is of type float: give int."),
    "rent": (True, "rent=True is of type bool: give float."),
    "sold": (1, "sold=1 is of type int: give bool."),
    "title": (None, "title=None is of type NoneType: give str."),
    "wall": (3, "wall=3 is a value, but wall is a section of keys."),
    "free": ((), "free=() is a value, but free is a section of keys."),
    "paint": (
        {"layers": 2.0},
        "paint.layers=2.0 is of type float: give int or leave it unset.",
    ),
}


@pytest.mark.parametrize("key", OF_TYPE)
def test_wrong_types_are_named(key):
    value, message = OF_TYPE[key]
    with pytest.raises(schema.ConfigError) as raised:
        schema.build(House, {key: value})
    assert str(raised.value) == message


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"wall": {"inside": {"names": ("a", 2)}}},
            "wall.inside.names[1]=2 is of type int: give str.",
        ),
        (
            {"wall": {"inside": {"names": "ab"}}},
            "wall.inside.names='ab' is of type str: give tuple.",
        ),
        (
            {"free": {"x": [1, {"y": 2}]}},
            "free.x={'y': 2} is of type dict: give a number, a string, a bool, or a "
            "tuple of these.",
        ),
    ],
)
def test_wrong_items_are_named(values, message):
    with pytest.raises(schema.ConfigError) as raised:
        schema.build(House, values)
    assert str(raised.value) == message


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        # A slip of the hand, at the top and below.
        ("sed", "did you mean 'seed'?"),
        ("wall.inside.glos", "did you mean 'wall.inside.gloss'?"),
        # In the section's name: with the key, if that one is there.
        ("pain.color", "did you mean 'paint.color'?"),
        ("pain.colour", "did you mean 'paint.color'?"),
        ("pain.zzz", "did you mean 'paint'?"),
        # The right name at the wrong place.
        ("wall.gloss", "did you mean 'wall.inside.gloss'?"),
        ("width", "did you mean 'wall.width'?"),
        ("wdith", "did you mean 'wall.width'?"),
        ("wal.widht", "did you mean 'wall.width'?"),
        ("seed.rent", "did you mean 'rent'?"),
        # Where several are alike: the one that stands first in its section, then the
        # one at the higher level.
        ("gloss", "did you mean 'paint.gloss'?"),
        # Nothing like it.
        ("wall.x", "keys in 'wall' are inside, width."),
        (
            "q",
            "keys at the top are free, lost, paint, rent, seed, share, sold, style, "
            "title, wall; --help lists those below as well.",
        ),
        ("seed.x", "'seed' is not a section."),
    ],
)
def test_the_nearest_key_is_named(key, hint):
    expected = f"unknown config key '{key}': {hint}"
    assert schema.unknown_key_message(House, key) == expected
    values = 1
    for part in reversed(key.split(".")):
        values = {part: values}
    if not key.startswith("seed."):
        with pytest.raises(schema.ConfigError) as raised:
            schema.build(House, values)
        # Building stops at the first part that is not there.
        section = key.partition(".")[0]
        first = section if section in ("pain", "wal") else key
        assert str(raised.value) == schema.unknown_key_message(House, first)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": -1}, "seed=-1 is out of range: at least 0."),
        ({"lost": 0.5}, "lost=0.5 is out of range: at most 0."),
        ({"rent": 0.0}, "rent=0.0 is out of range: above 0."),
        ({"share": 1.0}, "share=1.0 is out of range: at least 0, below 1."),
        ({"rent": math.inf}, "rent=inf is not finite."),
        ({"rent": math.nan}, "rent=nan is not finite."),
        (
            {"paint": Paint(gloss=1.25)},
            "paint.gloss=1.25 is out of range: at least 0, at most 1.",
        ),
        (
            {"wall": Wall(inside=Paint(layers=1))},
            "wall.inside.layers=1 is out of range: at least 2, at most 5.",
        ),
        (
            {"wall": Wall(inside=Paint(color="grin"))},
            "wall.inside.color='grin' is not one of red, green; did you mean 'green'?",
        ),
        (
            {"paint": Paint(color="blue!")},
            "paint.color='blue!' is not one of red, green.",
        ),
        (
            {"style": "ornat"},
            "style='ornat' is not one of plain, ornate, or of your own, "
            "package.module:Name; did you mean 'ornate'?",
        ),
        (
            {"style": "my module:Name"},
            "style='my module:Name' is not one of plain, ornate, or of your own, "
            "package.module:Name.",
        ),
    ],
)
def test_ranges_and_choices_are_named(changes, message):
    with pytest.raises(schema.ConfigError) as raised:
        House(**changes)
    assert str(raised.value) == message


def test_both_ends_of_a_range_belong_to_it():
    House(share=0.0, style="my.module:Name")
    for layers, gloss in ((2, 0.0), (5, 1.0), (None, 0.3)):
        House(paint=Paint(layers=layers, gloss=gloss), rent=1e-9, lost=0.0, seed=0)


@dataclasses.dataclass(frozen=True)
class Bucket:
    """Has a range of its own, and is no section."""

    gloss: float | None = 0.5
    color: str = "red"
    layers: int = 99
    size: int = -5


def test_a_record_is_checked_by_what_a_section_says_of_its_fields():
    schema.check_like(Paint, Bucket(layers=3))
    schema.check_like(Paint, Bucket(gloss=None, layers=5))
    for record, message in (
        (Bucket(), "layers=99 is out of range: at least 2, at most 5."),
        (Bucket(layers=0), "layers=0 is out of range: at least 2, at most 5."),
        (Bucket(gloss=2.0), "gloss=2.0 is out of range: at least 0, at most 1."),
        (Bucket(color="blue"), "color='blue' is not one of red, green."),
    ):
        with pytest.raises(schema.ConfigError) as raised:
            schema.check_like(Paint, record)
        assert str(raised.value) == message
