"""Checks a section's keys against tables of defaults, ranges and choices."""

import dataclasses
import math
import re
from typing import Any

import pytest

from tlt_jax.settings import schema


def check(section: type, table: dict[str, tuple[Any, str]]) -> None:
    """Assert names, defaults and, where `table` names a range, what it refuses.

    Args:
      section: a section's dataclass.
      table: by key the default and the range, `[0, 1)`, or nothing.
    """
    assert [field.name for field in dataclasses.fields(section)] == list(table)
    for name, (default, interval) in table.items():
        found = getattr(section(), name)
        assert (type(found), found) == (type(default), default), name
        if not interval:
            continue
        whole = "float" not in str(section.__dataclass_fields__[name].type)
        inside, outside = _around(interval, int if whole else float)
        for value in inside:
            schema.check_fields(section(**{name: value}))
        for value in outside:
            with pytest.raises(
                schema.ConfigError, match=f"^{name}={re.escape(str(value))} is out"
            ):
                schema.check_fields(section(**{name: value}))


def check_choices(section: type, name: str, choices: str) -> None:
    """Assert that a key takes these words, and lists them where it refuses another.

    The word `package.module:Name` stands for all names of that form.
    """
    for choice in choices.split():
        schema.check_fields(section(**{name: choice}))
    with pytest.raises(schema.ConfigError) as raised:
        schema.check_fields(section(**{name: "?"}))
    listed = ", ".join(choices.split())
    listed = listed.replace(", package", ", or of your own, package")
    assert str(raised.value) == f"{name}='?' is not one of {listed}."


def named(key: tuple[type, str]) -> str:
    """Name a section's key among a test's parameters."""
    return f"{key[0].__name__}.{key[1]}"


def _around(interval: str, kind: type) -> tuple[list[float], list[float]]:
    """Return numbers next to the ends, within and beyond."""
    inside, outside = [], []
    for text, sign, closed in zip(
        interval[1:-1].split(", "),
        (-1, +1),
        (interval[0] == "[", interval[-1] == "]"),
        strict=True,
    ):
        if text.endswith("inf"):
            inside.append(kind(sign * 10**6))
        elif closed:
            inside.append(kind(text))
            outside.append(_next(kind(text), sign))
        else:
            inside.append(_next(kind(text), -sign))
            outside.append(kind(text))
    return inside, outside


def _next(number: float, sign: int) -> float:
    """Return the next one: whole numbers lie one apart, floats as near as they can."""
    if isinstance(number, int):
        return number + sign
    return math.nextafter(number, sign * math.inf)
