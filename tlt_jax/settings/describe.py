"""Every setting with what it takes, its default and its meaning, for people to read.

All of it stands in the sections' dataclasses: in their fields and in their docstrings.
"""

import dataclasses
import inspect
import re
import textwrap
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from tlt_jax.settings import schema

_KINDS = {bool: "true or false", int: "integer", float: "number", str: "text"}
_WIDTH = 88


@dataclasses.dataclass(frozen=True)
class Setting:
    """One setting, in words.

    Attributes:
      key: dotted.
      accepts: type and range, or the choices.
      default: as a command line has it; `unset`, `empty`, `required`.
      meaning: with its unit; a sentence or more.
    """

    key: str
    accepts: str
    default: str
    meaning: str


@dataclasses.dataclass(frozen=True)
class Section:
    """The settings of one section.

    Attributes:
      name: empty for those that stand in none.
    """

    name: str
    meaning: str
    settings: tuple[Setting, ...]


def sections(root: type) -> Iterator[Section]:
    """Yield the sections of a program's settings; those in none come first."""
    parts = [f for f in dataclasses.fields(root) if dataclasses.is_dataclass(f.type)]
    loose = [f for f in dataclasses.fields(root) if f not in parts]
    yield Section("", "", tuple(_setting(root, f, f.name, f.default) for f in loose))
    for part in parts:
        meaning = meanings(root).get(part.name) or _about(part.type)
        found = []
        for field in dataclasses.fields(part.type):
            default = getattr(part.default, field.name)
            key = f"{part.name}.{field.name}"
            found.append(_setting(part.type, field, key, default))
        yield Section(part.name, _sentence(meaning), tuple(found))


def meanings(section: type) -> dict[str, str]:
    """Return what a dataclass's docstring says of its fields.

    What it only refers to (see ...) is taken from the classes it derives from.
    """
    found: dict[str, str] = {}
    for base in reversed(section.__mro__):
        doc = inspect.cleandoc(base.__dict__.get("__doc__") or "")
        listed = doc.partition("\nAttributes:\n")[2].partition("\n\n")[0]
        for names, text in re.findall(
            r"^  ([\w, ]+):\s((?:.*\n?)(?:    .*\n?)*)", listed, re.M
        ):
            if not text.startswith("see "):
                found |= dict.fromkeys(names.split(", "), " ".join(text.split()))
    return found


def in_terminal(root: type) -> str:
    """Describe all settings for a terminal of 88 columns."""
    lines = []
    for section in sections(root):
        if section.name:
            head = f"{section.name}: {section.meaning}"
            lines += ["", *textwrap.wrap(head, _WIDTH, subsequent_indent="  ")]
        for setting in section.settings:
            head = f"{setting.key} = {setting.default}  ({setting.accepts})"
            lines += _hanging(head, "  ", "        ")
            lines += _hanging(setting.meaning, "      ", "      ")
    return "\n".join(lines)


def page(programs: Mapping[str, type]) -> str:
    """Describe the settings of programs as Markdown; the keys are their headings."""
    lines = []
    for program, root in programs.items():
        lines += [f"## {program}"]
        for section in sections(root):
            if section.name:
                lines += [f"### {section.name}", section.meaning]
            rows = [
                "| setting | takes | default | meaning |",
                "| --- | --- | --- | --- |",
            ]
            for one in section.settings:
                cells = (f"`{one.key}`", one.accepts, one.default, one.meaning)
                escaped = (cell.replace("|", "\\|") for cell in cells)
                rows.append(f"| {' | '.join(escaped)} |")
            lines.append("\n".join(rows))
    return "\n\n".join(lines) + "\n"


def _setting(
    section: type, field: dataclasses.Field, key: str, default: Any
) -> Setting:
    meaning = meanings(section).get(field.name, "")
    required = meaning.endswith(" Required.")
    return Setting(
        key,
        _accepts(field),
        "required" if required else _shown(default),
        _sentence(meaning.removesuffix(" Required.")),
    )


def _accepts(field: dataclasses.Field) -> str:
    if field.type is schema.Options:
        return "free keys"
    kind, closed, _ = schema.value_type(field.type)
    if closed:
        return f"one of {', '.join(closed)}"
    if choices := field.metadata.get("choices"):
        return f"one of {', '.join(choices)}, or package.module:Name"
    if kind is tuple:
        if "names" in field.metadata:
            return "names, as a,b"
        item = typing.get_args(field.type)[0]
        return f"tuple, as {('a', 'b') if item is str else (1, 2)}"
    bounds = schema.range_text(**field.metadata) if "low" in field.metadata else ""
    return f"{_KINDS[kind]}, {bounds}" if bounds else _KINDS[kind]


def _shown(value: Any) -> str:
    if value is None:
        return "unset"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}" if value == float(f"{value:g}") else repr(value)
    return str(value) if value not in ("", ()) else "empty"


def _about(section: type) -> str:
    doc = inspect.cleandoc(section.__doc__ or "")
    return " ".join(doc.partition("\nAttributes:\n")[0].split())


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _hanging(text: str, first: str, others: str) -> list[str]:
    return textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=first,
        subsequent_indent=others,
        break_long_words=False,
        break_on_hyphens=False,
    )
