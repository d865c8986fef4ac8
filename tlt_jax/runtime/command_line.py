"""The command line of a run: `--config=FILE[:ARGUMENT]` and `--config.key=value`.

Whatever is wrong with what the user typed, or with the recipe, is one line and exit
status 2, never a traceback.
"""

import contextlib
import difflib
import functools
import pathlib
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import ml_collections
from absl import app, flags, logging
from ml_collections import config_flags

from tlt_jax import config
from tlt_jax.runtime import failures
from tlt_jax.settings import schema

_FREE_SECTION = "task.options"
# Lists of names: on the command line they stand plainly, parted by commas.
_NAMES = ("reward.functions", "texts.tasks")


def define_config_flag() -> flags.FlagHolder:
    """Define the required flag `--config`; call it where the program's flags stand."""
    return config_flags.DEFINE_config_file(
        "config",
        None,
        "The recipe: a Python file whose get_config() returns the configuration, and "
        "after a colon the argument of get_config. Then --config.KEY=VALUE overrides.",
        lock_config=False,
    )


def run(
    main: Callable[[Any], Any],
    flag: flags.FlagHolder,
    section: type = config.RunConfig,
) -> None:
    """Parse the command line and call `main` with the checked configuration.

    Further flags are read from `absl.flags.FLAGS`. A `schema.ConfigError` that `main`
    raises is reported as the command line's are; `section` is the dataclass.
    """

    def checked(argv: Sequence[str]) -> None:
        if len(argv) > 1:
            fail(f"unexpected argument {argv[1]!r}: every setting is a --flag.")
        try:
            main(_frozen(flag.value, section))
        except schema.ConfigError as error:
            fail(error)

    app.run(checked, flags_parser=functools.partial(parse, section=section))


@contextlib.contextmanager
def told(*more: type[Exception]) -> Iterator[None]:
    """Make one line and status 2 of what a user can mend, of `more` errors as well.

    Libraries that report every file they write, and backends that they are not there,
    are silent unless the user has asked for it: programs have their own display.
    """
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
    try:
        yield
    except (ValueError, failures.UserError, *more) as error:
        if logging.level_debug():
            raise
        fail(f"{error} (--verbosity=1 shows where)")


def parse(argv: Sequence[str], section: type = config.RunConfig) -> list[str]:
    """Parse flags; exit with status 2 and one line if they cannot be used."""
    recipe = recipe_path(argv)
    try:
        check_overrides(argv, section)
        _check_exists(recipe)
        return flags.FLAGS(list(map(_quoted, argv)))
    except schema.ConfigError as error:
        fail(error)
    except (flags.Error, AttributeError, KeyError) as error:
        # The last two come from a ConfigDict that a recipe filled wrongly, or from a
        # mistake of the recipe's own, whose traceback its author wants to see.
        message = _explain(error, recipe)
        if message is None:
            raise
        fail(message)


def recipe_path(argv: Sequence[str]) -> pathlib.Path | None:
    """Return the file that the last `--config` names, or None."""
    found = last_value(argv[1:], "config")
    return None if found is None else pathlib.Path(found.partition(":")[0])


def last_value(arguments: Sequence[str], flag: str) -> str | None:
    """Return what is given last by `--flag=VALUE` or `--flag VALUE`, or None."""
    found = None
    for argument, after in zip(arguments, [*arguments[1:], ""], strict=False):
        name, equals, value = argument.partition("=")
        if argument == "--":
            break
        if name in (f"--{flag}", f"-{flag}"):
            found = value if equals else after
    return found


def check_overrides(argv: Sequence[str], section: type = config.RunConfig) -> None:
    """Refuse `--config.key` flags whose key does not exist, naming the nearest one.

    Raises:
      schema.ConfigError: a key is unknown.
    """
    known = set(schema.keys(section))
    for argument in argv[1:]:
        if argument == "--":
            return
        name = argument.lstrip("-").partition("=")[0]
        name = name.removeprefix("no") if name.startswith("noconfig.") else name
        if not argument.startswith("-") or not name.startswith("config."):
            continue
        key = name.removeprefix("config.")
        if key not in known and not key.startswith(_FREE_SECTION + "."):
            raise schema.ConfigError(schema.unknown_key_message(section, key))


def _quoted(argument: str) -> str:
    """Write a list of plain names as a tuple, which is what flags of tuples take."""
    name, equals, value = argument.partition("=")
    is_list = name.lstrip("-").removeprefix("config.") in _NAMES and equals
    if not is_list or value[:1] in ("(", "[", "'", '"'):
        return argument
    names = tuple(one.strip() for one in value.split(",") if one.strip())
    return f"{name}={names!r}"


def _check_exists(recipe: pathlib.Path | None) -> None:
    if recipe is None or recipe.is_file():
        return
    beside = sorted(str(path) for path in recipe.parent.glob("*.py"))
    near = difflib.get_close_matches(str(recipe), beside, 1)
    hint = f"did you mean {near[0]}?" if near else "recipes are files in configs/."
    raise schema.ConfigError(f"--config={recipe}: there is no such file; {hint}")


def _frozen(value: Any, section: type) -> Any:
    if value is None and not flags.FLAGS["config"].present:
        raise schema.ConfigError(
            "--config=FILE is missing: name a recipe, such as configs/tiny.py."
        )
    if not isinstance(value, ml_collections.ConfigDict):
        raise schema.ConfigError(
            f"get_config() of the recipe returned a {type(value).__name__}: return the "
            "ConfigDict of tlt_jax.config.default()."
        )
    return schema.build(section, value.to_dict())


def _explain(error: BaseException, recipe: pathlib.Path | None) -> str | None:
    """Say in one line what went wrong; None if only a traceback can."""
    inner, line = _in_recipe(error, recipe)
    place = f"{recipe}:{line.lineno}: {line.line}: " if line else ""
    if not isinstance(inner, AttributeError | KeyError):
        return place + str(inner).splitlines()[0]
    source = traceback.extract_tb(inner.__traceback__)[-1].filename
    if "ml_collections" not in source:
        return None
    if not place:
        return (
            f"a --config.{_FREE_SECTION}.KEY override needs KEY in the recipe, which "
            "gives it its type: set it there."
        )
    named = re.search(r"Key \"(\w+)\"|'(\w+)'", str(inner).replace("\\'", "'"))
    near = re.search(r'Did you mean "(\w+)"', str(inner))
    key = (named[1] or named[2]) if named else "?"
    hint = f": did you mean {near[1]!r}?" if near else "."
    return f"{place}unknown config key {key!r}{hint}"


def _in_recipe(
    error: BaseException, recipe: pathlib.Path | None
) -> tuple[BaseException, traceback.FrameSummary | None]:
    """Return the first exception of the chain that passed the recipe, and where."""
    link: BaseException | None = error
    while link is not None:
        for frame in reversed(traceback.extract_tb(link.__traceback__)):
            if recipe is not None and pathlib.Path(frame.filename) == recipe:
                return link, frame
        link = link.__context__
    return error, None


def fail(message: object) -> NoReturn:
    """Print one line and exit with status 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)
