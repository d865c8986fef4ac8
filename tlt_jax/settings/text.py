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
# No strategy is such a list: it begins with a number.
_NAMES = re.compile(r"[A-Za-z_][\w.]*(:\w+)?(,[A-Za-z_][\w.]*(:\w+)?)*")
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
    hint = _hint(section, key)
    if hint is None:
        return literal(text)
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
            return _tuple(text, typing.get_args(hint)[0])
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
    hint = _hint(section, key)
    return hint is not None and schema.value_type(hint)[0] is bool


def _hint(section: type, key: str) -> Any:
    """Return the declared type of a key; None: it stands among free ones.

    Raises:
      schema.ConfigError: there is no such setting, or it is a section.
    """
    hint: Any = section
    names = key.split(".")
    for i, name in enumerate(names):
        if hint is schema.Options:
            if i + 1 < len(names):
                raise schema.ConfigError(
                    f"--config.{key}: a key of {'.'.join(names[:i])} has no dot."
                )
            return None
        if not dataclasses.is_dataclass(hint) or name not in hint.__dataclass_fields__:
            raise schema.ConfigError(schema.unknown_key_message(section, key))
        hint = hint.__dataclass_fields__[name].type
    if dataclasses.is_dataclass(hint):
        raise schema.ConfigError(
            f"--config.{key} is a section of keys: give --config.{key}.KEY=VALUE."
        )
    return hint


def _tuple(text: str, item: type) -> tuple[Any, ...]:
    """Read `('a', 'b')`, `a`, nothing, or names parted by commas, `a,b.c:d`."""
    if item is str and _NAMES.fullmatch(text):
        return tuple(text.split(","))
    value = literal(text)
    if isinstance(value, tuple | list):
        return tuple(value)
    if item is str and not isinstance(value, str):
        value = text
    if value == text and ("," in text or " " in text):
        raise ValueError("write a tuple as Python does, \"('a','b')\"")
    return (value,) if value != "" else ()


def _invalid(key: str, text: str, expected: str) -> schema.ConfigError:
    return schema.ConfigError(f"--config.{key}={text}: invalid value, {expected}.")
