"""Errors of one line, each built into a copy of the tree, and the tests that see it.

A child is forked for each: what is imported from outside of this repository is imported
once. The tree itself is never touched.
"""

import ast
import importlib
import os
import pathlib
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parents[2]
LIMIT_S = 600
# What no test that is named here reads.
_LEFT_OUT = ("experiments/results/", "docs/", "notebooks/")
_OUTSIDE = (
    "jax numpy scipy.stats flax optax orbax.checkpoint hypothesis pytest "
    "safetensors.numpy tokenizers gguf ml_collections matplotlib.figure "
    "pyarrow.parquet chex llvmlite"
)


class Mutant(NamedTuple):
    """An error, and the tests of which one must fail.

    Attributes:
      file: below the package.
      old: stands in the file once.
      new: in its place.
      tests: what pytest is given: files, node ids, `-k WORDS`.
    """

    file: str
    old: str
    new: str
    tests: str

    @property
    def path(self) -> str:
        """The file from the root on."""
        return f"tlt_jax/{self.file}"

    def problem(self, root: pathlib.Path = ROOT) -> str | None:
        """Say why it cannot be made, if so."""
        path = root / self.path
        if not path.is_file():
            return f"{self.path} is no file"
        text = path.read_text()
        count = text.count(self.old)
        if count != 1 or self.old == self.new:
            return f"{self.path}: {self.old!r} stands there {count} times"
        try:
            ast.parse(text.replace(self.old, self.new))
        except SyntaxError as error:
            return f"{self.path}: {self.new!r} is no Python ({error})"
        for word in shlex.split(self.tests):
            file = word.partition("::")[0]
            if file.startswith("tests/") and not (root / file).exists():
                return f"{file} is no file"
        return None


def copy(to: pathlib.Path) -> None:
    """Copy the tracked and the new files of the tree."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    for name in listed.stdout.decode().split("\0"):
        source = ROOT / name
        if name and not name.startswith(_LEFT_OUT) and source.is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, to / name)


def import_outside(root: pathlib.Path) -> None:
    """Import what children share, with the environment of the tests."""
    runpy.run_path(str(root / "tests" / "conftest.py"))
    for name in _OUTSIDE.split():
        importlib.import_module(name)
    for name in list(sys.modules):
        if name.startswith("tlt_jax"):
            raise RuntimeError(f"{name} is imported: children could not change it")


def passes(root: pathlib.Path, tests: str, log: pathlib.Path) -> bool:
    """Run tests of the copy in a child; true: all pass.

    Raises:
      RuntimeError: they could not be run; the log says why.
    """
    pid = os.fork()
    if not pid:
        os._exit(_in_child(root, tests, log))
    deadline = time.monotonic() + LIMIT_S
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            break
        if time.monotonic() > deadline:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return False  # An error that hangs is seen.
        time.sleep(0.02)
    code = os.waitstatus_to_exitcode(status)
    if code in (0, 1):
        return code == 0
    if code < 0:
        return False  # It died of a signal.
    raise RuntimeError(f"{tests} could not be run ({code}):\n{log.read_text()[-2000:]}")


def _in_child(root: pathlib.Path, tests: str, log: pathlib.Path) -> int:
    os.setsid()
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.chdir(root)
    inside = str(ROOT)
    sys.path[:] = [str(root), *(p for p in sys.path if p not in ("", inside))]
    sys.dont_write_bytecode = True
    os.environ["PYTHONPATH"] = str(root)
    for name in [n for n in sys.modules if n.partition(".")[0] == "tests"]:
        del sys.modules[name]
    import pytest

    # Plugins that find themselves would be imported anew, or be refused as imported.
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    options = ["-q", "-x", "-p", "no:cacheprovider", "-p", "pytest_timeout", "-m", ""]
    ending = _Ending()
    try:
        return int(pytest.main([*options, *shlex.split(tests)], plugins=[ending]))
    except BaseException as error:
        # What a failed test has left may raise once more, behind the tests.
        print(error)
        return 1 if ending.code == 1 else 3
    finally:
        sys.stdout.flush()


class _Ending:
    """Remembers how the tests ended; a plugin of pytest."""

    code = 0

    def pytest_sessionfinish(self, exitstatus):
        self.code = int(exitstatus)


def is_seen(root: pathlib.Path, mutant: Mutant, log: pathlib.Path) -> bool:
    """Build an error into the copy, run its tests, take it out again."""
    path = root / mutant.path
    whole = path.read_text()
    path.write_text(whole.replace(mutant.old, mutant.new))
    try:
        return not passes(root, mutant.tests, log)
    finally:
        path.write_text(whole)
