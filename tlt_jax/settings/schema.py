"""Nested frozen dataclasses as settings: defaults, types, ranges, nearest names.

A field of a section is a number with a range (`number`), a choice (`Literal`), a name
that may be one's own (`choice`), text, a flag, a tuple of these, one of them or None
(unset), another section, or `Options`.
"""

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Literal

if typing.TYPE_CHECKING:
    import ml_collections

# A mapping of free keys, as sorted pairs so that it can be hashed.
Options = tuple[tuple[str, Any], ...]

# How alike two names must be in the same section, and in different ones, to be taken
# for one mistyped; and what the sections' names add.
_ALIKE, _ALIKE_ELSEWHERE, _OF_SECTION = 0.6, 0.75, 0.15


class ConfigError(ValueError):
    """A setting that cannot be used; the message names it and says what can."""


def number(
    default: Any,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    above: float | None = None,
    below: float | None = None,
    least: float | None = None,
) -> Any:
    """Declare a field: a number in [low, high], or open at `above` or `below`.

    With `least`, one that is not 0 is at least that: smaller ones are 0 to float32.
    """
    bounds = {"low": low, "high": high, "above": above, "below": below, "least": least}
    return dataclasses.field(default=default, metadata=bounds)


def choice(default: Any, *choices: str) -> Any:
    """Declare a field: one of the names, or one's own as `package.module:Name`."""
    return dataclasses.field(default=default, metadata={"choices": choices})


def names() -> Any:
    """Declare a field: names, none by default; without commas inside."""
    return dataclasses.field(default=(), metadata={"names": True})


def keys(section: type) -> tuple[str, ...]:
    """Return the dotted names of all keys, sections included."""
    names = []
    for name, _ in leaves(section):
        parts = name.split(".")
        names += [".".join(parts[:i]) for i in range(1, len(parts) + 1)]
    return tuple(dict.fromkeys(names))


def unknown_key_message(section: type, key: str) -> str:
    """Say that `key` (dotted) does not exist and name the nearest one that does."""
    known = keys(section)
    parts = key.split(".")
    depth = next(i for i in range(len(parts)) if ".".join(parts[: i + 1]) not in known)
    parent, wrong = ".".join(parts[:depth]), parts[depth]
    siblings = sorted(
        k.rpartition(".")[2] for k in known if k.rpartition(".")[0] == parent
    )
    near = difflib.get_close_matches(wrong, siblings, 1)
    nearest = nearest_key(section, key)
    if nearest:
        hint = f"did you mean '{nearest}'?"
    elif near:
        hint = f"did you mean '{'.'.join([*parts[:depth], near[0]])}'?"
    elif siblings:
        where = f"keys in '{parent}'" if parent else "keys at the top"
        more = "" if parent else "; --help lists those below as well"
        hint = f"{where} are {', '.join(siblings)}{more}."
    else:
        hint = f"'{parent}' is not a section."
    return f"unknown config key '{key}': {hint}"


def nearest_key(section: type, typed: str) -> str | None:
    """Return the key that `typed` (dotted) may stand for, or None if none is alike.

    Last names count most, wherever they stand; then how alike the sections are. Of
    keys that are alike so the one that stands further up in its section is meant, as
    what matters most stands first there.
    """
    known = keys(section)
    typed_section, _, typed_name = typed.rpartition(".")
    places: dict[str, int] = {}
    best, best_rank = None, (0.0, 0, 0)
    for key in known:
        parent, _, name = key.rpartition(".")
        places[parent] = places.get(parent, -1) + 1
        alike = difflib.SequenceMatcher(None, typed_name, name).ratio()
        if alike < (_ALIKE if parent == typed_section else _ALIKE_ELSEWHERE):
            continue
        sections = difflib.SequenceMatcher(None, typed_section, parent).ratio()
        rank = (alike + _OF_SECTION * sections, -places[parent], -key.count("."))
        if best is None or rank > best_rank:
            best, best_rank = key, rank
    return best


def leaves(section: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted names and values (defaults, for a class) of all settings."""
    for field in dataclasses.fields(section):
        value = (
            field.default if isinstance(section, type) else getattr(section, field.name)
        )
        name = prefix + field.name
        if dataclasses.is_dataclass(field.type):
            yield from leaves(value, name + ".")
        else:
            yield name, value


def to_dict(section: Any) -> dict[str, Any]:
    """Return nested plain dicts, fit for JSON and for `build`."""
    out = {}
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            value = to_dict(value)
        out[field.name] = dict(value) if field.type is Options else value
    return out


def to_config_dict(section: Any) -> "ml_collections.ConfigDict":
    """Return an unlocked ConfigDict of a section's values (defaults, for a class)."""
    # Only recipes are written in them: settings load where the package is not.
    import ml_collections
    from ml_collections import config_dict

    out = ml_collections.ConfigDict()
    for field in dataclasses.fields(section):
        value = (
            field.default if isinstance(section, type) else getattr(section, field.name)
        )
        if dataclasses.is_dataclass(field.type):
            out[field.name] = to_config_dict(value)
        elif field.type is Options:
            out[field.name] = ml_collections.ConfigDict(dict(value))
        elif value is None:
            out[field.name] = config_dict.placeholder(value_type(field.type)[0])
        else:
            out[field.name] = value
    return out


def value_type(hint: Any) -> tuple[type, tuple[str, ...], bool]:
    """Return a field's Python type, its choices, and whether it may be unset."""
    optional = False
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        hint = next(t for t in typing.get_args(hint) if t is not types.NoneType)
        optional = True
    if typing.get_origin(hint) is Literal:
        return str, typing.get_args(hint), optional
    return typing.get_origin(hint) or hint, (), optional


def build(section: type, values: Mapping[str, Any]) -> Any:
    """Build a section from nested plain values; absent keys keep their defaults.

    Raises:
      ConfigError: a key is unknown, or a value has the wrong type.
    """
    return section(**_build(section, section, values, ""))


def check_keys(section: type, values: Mapping[str, Any]) -> None:
    """Check nested plain values by themselves: that keys are known, types right.

    Raises:
      ConfigError: one is not.
    """
    _build(section, section, values, "")


def _build(
    root: type, section: Any, values: Mapping[str, Any], prefix: str
) -> dict[str, Any]:
    """Return the arguments that make `section`, a class or a default, another one."""
    fields = {field.name: field for field in dataclasses.fields(section)}
    out = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if key not in fields:
            raise ConfigError(unknown_key_message(root, name))
        hint = fields[key].type
        if dataclasses.is_dataclass(hint) or hint is Options:
            if not isinstance(value, Mapping):
                raise ConfigError(
                    f"{name}={value!r} is a value, but {name} is a section of keys."
                )
            if hint is Options:
                out[key] = _options(name, value)
            else:
                default = getattr(section, key)
                changes = _build(root, default, value, name + ".")
                out[key] = dataclasses.replace(default, **changes)
        else:
            out[key] = _convert(name, value, hint)
    return out


def _options(name: str, values: Mapping[str, Any]) -> Options:
    def freeze(key: str, value: Any) -> Any:
        if isinstance(value, list | tuple):
            return tuple(freeze(key, item) for item in value)
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise ConfigError(
            f"{name}.{key}={value!r} is of type {type(value).__name__}: give a number, "
            "a string, a bool, or a tuple of these."
        )

    return tuple(sorted((key, freeze(key, value)) for key, value in values.items()))


def _convert(name: str, value: Any, hint: Any) -> Any:
    """Return `value` in the field's type; only lossless conversions are made."""
    kind, _, optional = value_type(hint)
    if value is None and optional:
        return None
    if kind is tuple and isinstance(value, list | tuple):
        item = typing.get_args(hint)[0]
        return tuple(_convert(f"{name}[{i}]", v, item) for i, v in enumerate(value))
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise ConfigError(
            f"{name}={value!r} is of type {type(value).__name__}: give "
            f"{kind.__name__}{' or leave it unset' if optional else ''}."
        )
    return value


def check_fields(section: Any, prefix: str = "") -> None:
    """Check every choice and range."""
    for field in dataclasses.fields(section):
        value, name = getattr(section, field.name), prefix + field.name
        if dataclasses.is_dataclass(value):
            check_fields(value, name + ".")
        elif value is not None:
            _check_value(name, value, field)


def check_like(section: type, record: Any) -> None:
    """Check a record's fields by what a section says of those of the same names.

    Raises:
      ConfigError: a choice or a range is not kept.
    """
    known = {field.name: field for field in dataclasses.fields(section)}
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        if field.name in known and value is not None:
            _check_value(field.name, value, known[field.name])


def _check_value(name: str, value: Any, field: dataclasses.Field) -> None:
    _, closed, _ = value_type(field.type)
    choices = field.metadata.get("choices", closed)
    if choices:
        _check_choice(name, value, choices, is_open=not closed)
    elif "low" in field.metadata:
        _check_range(name, value, **field.metadata)


def _check_choice(
    name: str, value: str, choices: tuple[str, ...], *, is_open: bool
) -> None:
    if value in choices or (is_open and re.fullmatch(r"[\w.]+:\w+", value)):
        return
    near = difflib.get_close_matches(str(value), choices, 1)
    own = ", or of your own, package.module:Name" if is_open else ""
    hint = f"; did you mean {near[0]!r}?" if near else "."
    raise ConfigError(f"{name}={value!r} is not one of {', '.join(choices)}{own}{hint}")


def _check_range(
    name: str,
    value: float,
    low: float,
    high: float,
    above: float | None,
    below: float | None,
    least: float | None,
) -> None:
    if not math.isfinite(value):
        raise ConfigError(f"{name}={value} is not finite.")
    inside = low <= value <= high
    inside &= above is None or value > above
    inside &= below is None or value < below
    inside &= least is None or value == 0 or value >= least
    if inside:
        return
    accepted = range_text(low, high, above, below, least)
    raise ConfigError(f"{name}={value} is out of range: {accepted}.")


def _shown(bound: float) -> str:
    """Write a bound with all of its digits: one more is refused."""
    return f"{bound:g}" if float(f"{bound:g}") == bound else str(bound)


def range_text(
    low: float,
    high: float,
    above: float | None,
    below: float | None,
    least: float | None,
) -> str:
    """Say in words what `number` declares; empty: any number."""
    parts = [f"at least {low:g}"] if low > -math.inf else []
    parts = parts if least is None else [f"0 or at least {least:g}"]
    parts += [f"above {above:g}"] if above is not None else []
    parts += [f"at most {_shown(high)}"] if high < math.inf else []
    parts += [f"below {below:g}"] if below is not None else []
    return ", ".join(parts)
