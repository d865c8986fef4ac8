"""The command line of a run: `--config=FILE[:ARGUMENT]` and `--config.key=value`.

Whatever is wrong with what the user typed, or with the recipe, is one line and exit
status 2, never a traceback.
"""

import contextlib
import logging as python_logging
import os
import pathlib
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

from absl import app, flags, logging

from tlt_jax import config
from tlt_jax.runtime import failures, stopping
from tlt_jax.settings import recipe, schema, text, usage

_HELP = ("help", "h", "helpshort", "helpfull", "?")
_PREFIX = "config."


def define_config_flag() -> flags.FlagHolder:
    """Define the required flag `--config`; call it where the program's flags stand."""
    return flags.DEFINE_string(
        "config",
        None,
        "The recipe: a Python file (or package.module) whose get_config() returns the "
        "settings, after a colon its variant; or the config.yaml of another run.",
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
    made: list[Any] = []

    def read(argv: Sequence[str]) -> list[str]:
        words, changes = parse(argv, section)
        if len(words) > 1:
            hint = "every setting is a --flag."
            if pathlib.PurePath(words[1].partition(":")[0]).suffix in (".py", ".yaml"):
                hint = f"did you mean --config={words[1]} ?"
            fail(f"unexpected argument {words[1]!r}: {hint}")
        try:
            made.append(settings_of(flag.value, changes, section))
        except schema.ConfigError as error:
            fail(error)
        return words

    def checked(argv: Sequence[str]) -> None:
        del argv
        try:
            main(made[0])
        except schema.ConfigError as error:
            fail(error)

    app.run(checked, flags_parser=read)


def settings_of(
    spec: str | None, changes: Sequence[tuple[str, Any]], section: type
) -> Any:
    """Read a recipe, set what is given besides, and freeze it.

    Raises:
      schema.ConfigError: there is no such recipe, or it cannot be used.
    """
    if spec is None:
        raise schema.ConfigError(
            "--config=FILE is missing: name a recipe, such as configs/tiny.py."
        )
    values = recipe.load(spec, section)
    recipe.override(values, changes)
    return schema.build(section, values.to_dict())


@contextlib.contextmanager
def told(*more: type[Exception]) -> Iterator[None]:
    """Make one line and status 2 of what a user can mend, of `more` errors as well.

    A run that was stopped, or Ctrl-C, is one line too, with status 128 and the signal.
    Libraries that report every file they write, and backends that they are not there,
    are silent unless the user has asked for it: programs have their own display.
    """
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
        logging.get_absl_logger().addFilter(_has_no_traceback)
        # It tells of every attempt where there is no network.
        python_logging.getLogger("huggingface_hub").setLevel(python_logging.ERROR)
        sys.excepthook = _print_of_main_thread
    try:
        yield
    except (ValueError, failures.UserError, *more) as error:
        if logging.level_debug():
            raise
        fail(f"{error} (--verbosity=1 shows where)")
    except failures.Stopped as stop:
        leave(stop, stop.status)
    except KeyboardInterrupt:
        leave(stopping.INTERRUPTED, 128 + signal.SIGINT)


def _has_no_traceback(record: Any) -> bool:
    """Leave out what libraries log of errors that they raise later as well."""
    return not record.exc_info


def _print_of_main_thread(
    kind: type[BaseException], error: BaseException, trace: Any
) -> None:
    """Leave out what libraries print of threads of their own; Python's go elsewhere.

    TensorStore prints so where the event loop of a write that failed is gone.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if is_main and str(error) != "Event loop is closed":
        sys.__excepthook__(kind, error, trace)


def leave(message: object, status: int) -> NoReturn:
    """Print one line and end, with whatever threads are still at work."""
    print(message, file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(status)


def parse_flags(argv: Sequence[str]) -> list[str]:
    """Parse the flags of a program that has no settings; return the other words.

    Prints help where it is asked for; exits with status 2 and one line where flags
    cannot be used.
    """
    if _asked_for_help(argv):
        _show(usage.of_program(_main_doc()))
    try:
        return flags.FLAGS(list(argv))
    except (flags.Error, ValueError) as error:
        fail(_explain(error))


def parse(
    argv: Sequence[str], section: type = config.RunConfig
) -> tuple[list[str], list[tuple[str, Any]]]:
    """Parse the flags of a run; return the other words, and what `--config.key`s set.

    Otherwise as `parse_flags`.
    """
    if asked := _asked_for_help(argv):
        program = getattr(sys.modules["__main__"].__spec__, "name", "tlt_jax.main")
        complete = asked != "helpshort"
        _show(usage.of_run(_main_doc(), program, section, with_settings=complete))
    try:
        words, changes = overrides(argv, section)
        return flags.FLAGS(words), changes
    except (flags.Error, ValueError) as error:
        fail(_explain(error, section))


def overrides(
    argv: Sequence[str], section: type = config.RunConfig
) -> tuple[list[str], list[tuple[str, Any]]]:
    """Take `--config.key` flags out; return the words left, and keys with values.

    A flag that is true or false may stand without value, or as `--noconfig.key`.

    Raises:
      schema.ConfigError: a key is unknown (the nearest is named), or takes no such
        value.
    """
    words, changes = [argv[0]], []
    rest = iter(flags.FLAGS.read_flags_from_files(list(argv[1:]), force_gnu=False))
    for word in rest:
        name, equals, value = word.lstrip("-").partition("=")
        if word == "--":
            return [*words, word, *rest], changes
        no = name.startswith(f"no{_PREFIX}")
        key = name.removeprefix("no" if no else "").removeprefix(_PREFIX)
        if not word.startswith("-") or name == key:
            words.append(word)
            continue
        if not equals:
            value = _value_without_equals(section, key, no, rest)
        changes.append((key, text.parse(section, key, value)))
    return words, changes


def _value_without_equals(
    section: type, key: str, no: bool, rest: Iterator[str]
) -> str:
    if text.is_flag(section, key):
        return str(not no)
    value = next(rest, None)
    if value is None or no:
        raise schema.ConfigError(f"--config.{key}: give a value, --config.{key}=VALUE.")
    return value


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


def _asked_for_help(argv: Sequence[str]) -> str | None:
    end = argv.index("--") if "--" in argv else len(argv)
    words = (word.lstrip("-") for word in argv[1:end] if word.startswith("-"))
    return next((word for word in words if word in _HELP), None)


def _explain(error: Exception, section: type | None = None) -> str:
    """Say what is wrong with a flag, in our words where absl's mislead."""
    message = str(error)
    if missing := re.search(r"Flag --(\w+) must have a value other than None", message):
        return f"--{missing[1]} is missing: {flags.FLAGS[missing[1]].help}"
    if isinstance(error, flags.UnrecognizedFlagError) and "?" not in message:
        near = section and schema.nearest_key(section, error.flagname)
        return f"{message}. Did you mean: --config.{near} ?" if near else message
    return message


def _main_doc() -> str:
    return sys.modules["__main__"].__doc__ or ""


def _show(page: str) -> NoReturn:
    try:
        print(page, flush=True)
    except BrokenPipeError:
        # Who reads page by page may leave early; no more shall be tried at our end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    raise SystemExit(0)


def fail(message: object) -> NoReturn:
    """Print one line and exit with status 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)
