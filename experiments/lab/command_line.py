"""What is wrong with a command, in one line: what came, what is accepted, the remedy.

Status 2 where the user can mend it, 130 where the user stopped it; `--verbosity=1` adds
the traceback.
"""

import argparse
import contextlib
import difflib
import pathlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import NoReturn

from tlt_jax.runtime import failures

STOPPED = 130
_UNKNOWN = "unrecognized arguments: "
_MISSING = "the following arguments are required: "


class Parser(argparse.ArgumentParser):
    """A parser that takes whole flags only, and names the nearest of an unknown one."""

    def __init__(self, program: str, description: str):
        super().__init__(
            prog=f"python -m {program}",
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        """Tells it in a line and ends with status 2."""
        flags = self._option_string_actions
        if message.startswith(_UNKNOWN):
            came = message.removeprefix(_UNKNOWN).split()[0]
            name = came.partition("=")[0]
            message = f"{came} is unknown"
            if near := difflib.get_close_matches(name, flags, 1):
                message += f": did you mean {near[0]}?"
        elif message.startswith(_MISSING):
            name = message.removeprefix(_MISSING).split(", ")[0]
            told = flags[name].help if name in flags else ""
            message = f"{name}= is missing" + (f": {told}" if told else "")
        fail(f"{message} ({self.prog} --help lists all)")


def fail(message: object) -> NoReturn:
    """Prints one line and ends with status 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


@contextlib.contextmanager
def told(verbosity: int, kept: Callable[[], str]) -> Iterator[None]:
    """Makes a line and a status of what a user can mend, and of Ctrl-C.

    `kept` says what is not lost.
    """
    try:
        yield
    except KeyboardInterrupt:
        print(f"\nstopped: {kept()}", file=sys.stderr)
        raise SystemExit(STOPPED) from None
    except (ValueError, OSError, failures.UserError) as error:
        if verbosity:
            raise
        fail(f"{error} (--verbosity=1 shows where)")
    except subprocess.CalledProcessError as error:
        if verbosity:
            raise
        fail(
            f"a run that this experiment started ended with status {error.returncode}; "
            f"what it said stands above. {kept()}"
        )


def shown(path: pathlib.Path) -> str:
    """Returns a path as a user would type it here."""
    try:
        return str(path.resolve().relative_to(pathlib.Path.cwd()))
    except ValueError:
        return str(path)
