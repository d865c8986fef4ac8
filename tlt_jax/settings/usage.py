"""What `--help` prints: usage, recipes, a program's own flags, its settings."""

import pathlib
import re
import sys
import textwrap

from absl import flags

from tlt_jax.settings import describe, recipe

_WIDTH = 88
# Recipes are looked for here, and where the package stands if there are none.
_FOLDERS = (
    pathlib.Path("configs"),
    pathlib.Path(__file__).resolve().parents[2] / "configs",
)
_NEXT = "          "
_PLACES = {"config": "FILE[:VARIANT]", "workdir": "DIR"}
_VERBOSITY = (
    "1: with the traceback that an error's line stands for, and libraries' notes."
)


def of_program(doc: str) -> str:
    """Describe a program that has flags alone; `doc` is its module's docstring."""
    return f"{doc.strip()}\n\nFlags:\n{_flags()}"


def of_run(doc: str, program: str, section: type, *, with_settings: bool) -> str:
    """Describe a program that has settings.

    Args:
      doc: its module's docstring.
      program: its name behind `python -m`.
      section: the dataclass of its settings.
      with_settings: list them.
    """
    parts = [doc.strip(), f"Flags:\n{_flags()}"]
    if recipes := _recipes(program):
        parts.insert(
            1, f"Recipes, for --config (a variant stands behind it):\n{recipes}"
        )
    if with_settings:
        parts.append(_HOW_TO_SET + describe.in_terminal(section))
    else:
        parts.append("--help lists the settings as well.")
    return "\n\n".join(parts)


_HOW_TO_SET = """\
Settings, each with its default and what it takes. --config.KEY=VALUE sets one; text is
written as it is, a tuple as Python has it ("('a', 'b')", or a alone), `None` unsets
what may be unset. Free keys: --config.task.options.KEY=VALUE, a number, tuple, true or
false where VALUE reads as one, else text. With another task.name than the recipe's,
the recipe's task.options go.

"""


def _recipes(program: str) -> str:
    folder = next((f for f in _FOLDERS if any(f.glob("*.py"))), None)
    lines = []
    for one in recipe.summaries(folder) if folder else ():
        if program not in one.programs:
            continue
        lines += [f"  {one.path}", *_wrapped(one.line, "      ")]
        if one.variants:
            variants = ", ".join(f":{name}" for name in one.variants)
            lines += _wrapped(variants, "      ")
    return "\n".join(lines)


def _flags() -> str:
    """Describe the flags that the program defines, and what all have."""
    values = flags.FLAGS
    own = {flag.name: flag for flag in values.get_key_flags_for_module(sys.argv[0])}
    if "config" in values:
        own = {"config": values["config"]} | own
    lines = []
    for name, flag in own.items():
        shown = f"--[no]{name}" if flag.boolean else f"--{name}"
        lines.append(f"  {shown}{_takes(flag)}")
        # absl puts the choices of an enumeration before its text.
        lines += _wrapped(re.sub(r"^<[^>]*>: ", "", flag.help or ""), _NEXT)
    lines += ["  --verbosity=0", *_wrapped(_VERBOSITY, _NEXT)]
    return "\n".join(lines)


def _takes(flag: flags.Flag) -> str:
    if flag.boolean:
        return f"  (default: {str(bool(flag.default)).lower()})"
    choices = getattr(flag.parser, "enum_values", None)
    kind = {"int": "N", "float": "X"}.get(flag.parser.flag_type(), "TEXT")
    kind = _PLACES.get(flag.name, kind)
    text = f"={'|'.join(choices) if choices else kind}"
    if flag.default not in (None, "", []):
        text += f"  (default: {flag.default})"
    return text


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent=indent, subsequent_indent=indent)
