"""What `--help` says of a program's own flags, its recipes and its settings."""

import dataclasses
import pathlib
import sys

import pytest
from absl import flags

from tlt_jax.settings import schema, usage


@dataclasses.dataclass(frozen=True)
class Kitchen:
    """A section made up here.

    Attributes:
      num: of pots.
    """

    num: int = schema.number(1, 0, 9)


OWN_FLAGS = """\
Flags:
  --count=N  (default: 3)
          How many.
  --[no]quick  (default: false)
          Whether to hurry.
  --rate=X
          How fast.
  --taste=sweet|sour  (default: sour)
          What it is like.
  --workdir=DIR
          Directory.
  --verbosity=0
          1: with the traceback that an error's line stands for, and libraries' notes.
"""


@pytest.fixture
def program(monkeypatch, tmp_path):
    """A program of its own flags, started beside a folder of recipes."""
    values = flags.FlagValues()
    name = "a_program"
    monkeypatch.setattr(sys, "argv", [name])
    monkeypatch.setattr(flags, "FLAGS", values)
    options = {"flag_values": values}
    defined = [
        flags.DEFINE_integer("count", 3, "How many.", **options),
        flags.DEFINE_bool("quick", False, "Whether to hurry.", **options),
        flags.DEFINE_float("rate", None, "How fast.", **options),
        flags.DEFINE_enum(
            "taste", "sour", ["sweet", "sour"], "What it is like.", **options
        ),
        flags.DEFINE_string("workdir", None, "Directory.", **options),
    ]
    for one in defined:
        values.register_key_flag_for_module(name, values[one.name])
    (tmp_path / "one.py").write_text(
        '"""Ours.\n\npython -m tlt_jax.main --config=x"""\nVARIANTS = ("a", "b")'
    )
    (tmp_path / "two.py").write_text('"""Other.\n\npython -m tlt_jax.evaluate"""')
    monkeypatch.setattr(usage, "_FOLDERS", (pathlib.Path("nowhere"), tmp_path))
    return tmp_path


def test_a_program_without_settings(program):
    assert usage.of_program("\nDo it.\n") == f"Do it.\n\n{OWN_FLAGS}".rstrip()


def test_a_program_with_settings(program):
    said = usage.of_run("Do it.", "tlt_jax.main", Kitchen, with_settings=True)
    recipes = (
        "Recipes, for --config (a variant stands behind it):\n"
        f"  {program}/one.py\n      Ours.\n      :a, :b"
    )
    assert said.startswith(f"Do it.\n\n{recipes}\n\n{OWN_FLAGS}\nSettings, each with")
    assert said.rstrip().endswith(
        "  num = 1  (integer, at least 0, at most 9)\n      Of pots."
    )
    short = usage.of_run("Do it.", "tlt_jax.gone", Kitchen, with_settings=False)
    assert short == f"Do it.\n\n{OWN_FLAGS}\n--help lists the settings as well."
