"""Starts many command lines in one process that has imported what they need.

Each runs in a child of its own (`os.fork`) as `python -m` would run it, so that a start
costs milliseconds.
"""

import contextlib
import io
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import types
from collections.abc import Sequence
from typing import NamedTuple, NoReturn

ROOT = pathlib.Path(__file__).resolve().parents[1]
_SERVER = (
    "import json, sys; from tests import command_lines; command_lines.serve(sys.argv)"
)


class Started(NamedTuple):
    """What came of a command line."""

    status: int
    output: str
    errors: str


def start(commands: Sequence[Sequence[str]], *, stop: bool) -> list[Started]:
    """Starts commands.

    Args:
      commands: each a module followed by its arguments.
      stop: end them where their command line is read, and their recipe.
    """
    server = subprocess.run(
        [sys.executable, "-c", _SERVER, str(int(stop)), *map(json.dumps, commands)],
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert server.returncode == 0, server.stderr
    return [Started(*json.loads(line)) for line in server.stdout.splitlines()]


def in_process(module: types.ModuleType, *arguments: str) -> Started:
    """Starts a program that has flags alone in this process, by its `main`."""
    from absl import flags
    from absl.testing import flagsaver

    from tlt_jax.runtime import command_line

    out, err, status = io.StringIO(), io.StringIO(), 0
    was_parsed = flags.FLAGS.is_parsed()
    with flagsaver.flagsaver():
        flags.FLAGS.unparse_flags()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                module.main(command_line.parse_flags([module.__name__, *arguments]))
            except SystemExit as stopped:
                status = stopped.code
    if was_parsed:
        flags.FLAGS.mark_as_parsed()
    else:
        flags.FLAGS.unparse_flags()
    return Started(status, out.getvalue(), err.getvalue())


def serve(argv: list[str]) -> None:
    """Runs in the process that forks: a line of JSON for each command."""
    import warnings

    # Imported once for all children; none of them has started a backend.
    from tlt_jax import train  # noqa: F401
    from tlt_jax.runtime import command_line, compile_cache  # noqa: F401

    warnings.filterwarnings("ignore", message=r"os\.fork\(\) was called")
    stop = bool(int(argv[1]))
    for line in argv[2:]:
        module, *arguments = json.loads(line)
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            child = os.fork()
            if not child:
                os.dup2(out.fileno(), 1)
                os.dup2(err.fileno(), 2)
                become(module, arguments, stop=stop)
            _, status = os.waitpid(child, 0)
            started = os.waitstatus_to_exitcode(status), _text(out), _text(err)
        print(json.dumps(started), flush=True)


def _text(file) -> str:
    file.seek(0)
    return file.read()


def become(module: str, arguments: Sequence[str], *, stop: bool = False) -> NoReturn:
    """Becomes `python -m module`, in a child; see `start`."""
    import runpy
    import traceback

    status = 0
    try:
        if stop:
            _stop_after_parsing(module)
        sys.argv = [module, *arguments]
        # What the parent imported must not define its flags a second time.
        sys.modules.pop(module, None)
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # As the interpreter reports it.
        traceback.print_exc()
        status = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _stop_after_parsing(module: str) -> None:
    """Lets a program end where it would begin its work."""
    import argparse

    from absl import app, flags

    from tlt_jax import train
    from tlt_jax.runtime import distributed

    def begin(run, directory, stop):
        print(f"would train {run.num_steps} steps in {directory}")

    def parse(main, argv=None, flags_parser=app.parse_flags_with_usage):
        del main
        flags_parser(argv or sys.argv)
        flags.FLAGS.validate_all_flags()
        sys.exit(0)

    parse_args = argparse.ArgumentParser.parse_args

    def parse_and_exit(*arguments, **options):
        parse_args(*arguments, **options)
        sys.exit(0)

    if module == "tlt_jax.main":
        train.train = begin
        # No cluster is there to be joined.
        distributed.initialize = lambda on_cluster=False: None
    else:
        app.run = parse
        argparse.ArgumentParser.parse_args = parse_and_exit
