"""Settings as text: values typed on a command line, and YAML files."""

import ast
import contextlib
import dataclasses
import re
import typing
from collections.abc import Mapping
from typing import Any

import yaml

from tlt_jax.settings import schema

# Numbers and flags as YAML 1.2 and JSON have them: `off` is a word, 1e-6 a number.
_SCALARS = {
    "bool": (r"true|false", "tf"),
    "int": (r"[-+]?(0|[1-9][0-9]*)", "-+0123456789"),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan",
        "-+.0123456789",
    ),
    "null": (r"null|~|", ["n", "~", ""]),
}
_EXPECTED = {int: "a whole number", float: "a number", bool: "true or false"}
_LINE = 88


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict = {}


class _Dumper(yaml.SafeDumper):
    """Quotes what any reader of YAML could take for something else than text."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _name, (_pattern, _first) in _SCALARS.items():
    for _yaml in (_Loader, _Dumper):
        _yaml.add_implicit_resolver(
            f"tag:yaml.org,2002:{_name}", re.compile(rf"^(?:{_pattern})$"), _first
        )
_Dumper.add_representer(
    str,
    lambda dumper, value: dumper.represent_scalar(
        "tag:yaml.org,2002:str", value, style='"' if "\n" in value else None
    ),
)
_Dumper.add_representer(
    tuple,
    lambda dumper, value: dumper.represent_sequence(
        "tag:yaml.org,2002:seq", value, flow_style=True
    ),
)


def to_yaml(section: Any) -> str:
    """Write a section's values as YAML, in the order of its fields."""
    return yaml.dump(
        schema.to_dict(section),
        Dumper=_Dumper,
        sort_keys=False,
        allow_unicode=True,
        width=_LINE,
    )


def from_yaml(text: str) -> dict[str, Any]:
    """Read a mapping written as YAML or JSON.

    Raises:
      schema.ConfigError: it is neither, or no mapping.
    """
    try:
        values = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise schema.ConfigError(f"{where}this is no YAML: {problem}.") from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise schema.ConfigError("settings are keys with values, `KEY: VALUE`.")
    return values


def parse(section: type, key: str, text: str) -> Any:
    """Read the value of a setting (dotted) from a command line.

    What stands under a field of `schema.Options` has no declared type: see `literal`.

    Raises:
      schema.ConfigError: there is no such setting, or it takes no such value.
    """
    field = _field(section, key)
    if field is None:
        return literal(text)
    hint = field.type
    if hint is schema.Options:
        with contextlib.suppress(ValueError, SyntaxError):
            values = ast.literal_eval(text)
            if isinstance(values, Mapping):
                return values
        raise _invalid(key, text, "give --config." + key + ".KEY=VALUE, or a dict")
    kind, _, optional = schema.value_type(hint)
    if optional and text == "None":
        return None
    try:
        if kind is tuple:
            parted = "names" in field.metadata
            return _tuple(text, typing.get_args(hint)[0], parted)
        if kind is bool:
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        return kind(text)
    except KeyError:
        raise _invalid(key, text, f"give {_EXPECTED[bool]}") from None
    except ValueError as error:
        expected = f"give {_EXPECTED[kind]}" if kind in _EXPECTED else str(error)
        raise _invalid(key, text, expected) from None


def literal(text: str) -> Any:
    """Read a number, tuple, `true`, `None`, ... as Python has it; else it is text."""
    if text in ("true", "false"):
        return text == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def is_flag(section: type, key: str) -> bool:
    """Tell whether a setting (dotted) is true or false."""
    field = _field(section, key)
    if field is None or field.type is schema.Options:
        return False
    return schema.value_type(field.type)[0] is bool


def _field(section: type, key: str) -> dataclasses.Field | None:
    """Return the declaration of a key; None: it stands among free ones.

    Raises:
      schema.ConfigError: there is no such setting, or it is a section.
    """
    hint, field = section, None
    names = key.split(".")
    for i, name in enumerate(names):
        if hint is schema.Options:
            if i + 1 < len(names):
                raise schema.ConfigError(
                    f"--config.{key}: a key of {'.'.join(names[:i])} has no dot."
                )
            return None
        fields = getattr(hint, "__dataclass_fields__", {})
        if name not in fields:
            raise schema.ConfigError(schema.unknown_key_message(section, key))
        field = fields[name]
        hint = field.type
    if dataclasses.is_dataclass(hint):
        raise schema.ConfigError(
            f"--config.{key} is a section of keys: give --config.{key}.KEY=VALUE."
        )
    return field


def _tuple(text: str, item: type, parted: bool) -> tuple[Any, ...]:
    """Read `('a', 'b')`, `a`, nothing, or where names are `parted` `a,b`."""
    value = literal(text)
    if isinstance(value, tuple | list):
        return tuple(value)
    if item is str and not isinstance(value, str):
        value = text
    if value == text and parted:
        return tuple(name.strip() for name in text.split(",") if name.strip())
    if value == text and ("," in text or " " in text):
        raise ValueError("write a tuple as Python does, \"('a','b')\"")
    return (value,) if value != "" else ()


def _invalid(key: str, text: str, expected: str) -> schema.ConfigError:
    return schema.ConfigError(f"--config.{key}={text}: invalid value, {expected}.")
