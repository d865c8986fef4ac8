"""A member of a run: a place with a share of a machine, at which a program runs.

The program is a process of its own, so that its end, however it comes, is seen from
here. It ends with its member.
"""

import ctypes
import functools
import hashlib
import importlib.metadata
import os
import pathlib
import platform
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence

_PR_SET_PDEATHSIG = 1
_PACKAGE = pathlib.Path(__file__).resolve().parents[1]
# Of these the processes of a run must have the same version.
_LIBRARIES = "jax", "jaxlib", "numpy"
# How much of a log is given at once.
_MOST_BYTES = 1 << 16
# A process that was killed is gone by then.
_KILLED_S = 30.0


class Member:
    """A place and its program; arguments and values of methods are fit for JSON."""

    def __init__(self, cores: Sequence[int] = ()):
        """Keep programs to these cores; empty: to none in particular."""
        self._cores = tuple(cores)
        self._process: subprocess.Popen | None = None

    def facts(self) -> dict[str, str]:
        """Say what is here: versions, a digest of the code, and the host's name."""
        return versions() | {"host": socket.gethostname()}

    def address(self, host: str) -> str:
        """Choose `host:port` where nobody listens; the host is this machine's."""
        with socket.socket() as probe:
            probe.bind((host, 0))
            return f"{host}:{probe.getsockname()[1]}"

    def run(
        self,
        words: Sequence[str],
        variables: Mapping[str, str],
        log: str = "",
        folder: str = "",
    ) -> int:
        """Start `python WORDS` here; return the process's number.

        What it says is appended to the file `log`; empty: it has the terminal of this
        process. `variables` are added to the environment; it starts in `folder`.

        Raises:
          OSError: the log cannot be written, or there is no such folder.
        """
        output = open(log, "ab") if log else None
        try:
            self._process = subprocess.Popen(
                [sys.executable, *words],
                env=os.environ | dict(variables),
                cwd=folder or None,
                stdin=subprocess.DEVNULL if output else None,
                stdout=output,
                stderr=output and subprocess.STDOUT,
                process_group=0,
                preexec_fn=_before_start(self._cores),
            )
        finally:
            if output:
                output.close()
        return self._process.pid

    def poll(self) -> int | None:
        """Return the program's exit status, below 0 the signal's; None: it runs."""
        return None if self._process is None else self._process.poll()

    def read(self, log: str, start: int) -> str:
        """Return what a log has from a byte on, the next part of it."""
        with open(log, "rb") as file:
            file.seek(start)
            return file.read(_MOST_BYTES).decode("latin-1")

    def terminate(self) -> None:
        """Ask the program to end."""
        if self._process is not None:
            self._process.terminate()

    def kill(self) -> None:
        """End the program; when this returns it is gone."""
        if self._process is not None and self.poll() is None:
            self._process.kill()
            self._process.wait(_KILLED_S)


@functools.cache
def versions() -> dict[str, str]:
    """Return what the processes of a run must have in common, by name."""
    found = {"python": platform.python_version()}
    found |= {name: importlib.metadata.version(name) for name in _LIBRARIES}
    digest = hashlib.sha256()
    for path in sorted(_PACKAGE.rglob("*.py")):
        digest.update(path.relative_to(_PACKAGE).as_posix().encode() + b"\0")
        digest.update(path.read_bytes())
    return found | {"code of tlt_jax": digest.hexdigest()[:16]}


def _before_start(cores: Sequence[int]):
    """Return what a child does first: keep to its cores, and end with its parent."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None

    def prepare() -> None:
        if cores:
            os.sched_setaffinity(0, cores)
        if libc:
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    return prepare
