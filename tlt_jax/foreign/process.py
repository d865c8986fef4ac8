"""A process for foreign code, under limits of time and memory, replaced when it fails.

Foreign code may raise, hang (also where no Python signal is seen, as in a regular
expression), take all memory, fork, write where it should not, or kill its process. None
of it reaches us: an answer is read until a deadline, is bounded in size, belongs to the
number of its job, and is JSON. Processes are started with `subprocess`, not forked and
not through `multiprocessing`: a process that has started JAX must not be forked, and
`multiprocessing` imports the caller's main module again in every worker, which for a
training run means JAX and everything else. JAX in such a process runs on the CPU, so
that it does not take the accelerator from us.
"""

import contextlib
import dataclasses
import json
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import Any

from tlt_jax.foreign import serving
from tlt_jax.runtime import failures

# For importing what the function needs; afterwards it is told to close down.
_START_LIMIT_S = 120.0
# What closed its link has this long to end by itself, so that its exit code is known.
_END_LIMIT_S = 1.0
_MAIN = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from tlt_jax.foreign import serving; serving.serve(*map(int, sys.argv[2:]))"
)
_NEVER_CALLED = 0


class StartError(failures.UserError):
    """A foreign process did not come up."""


class TooLongError(Exception):
    """A call took more than its time limit; the process is gone."""


class EndedError(Exception):
    """A call ended its process; the message says how."""


class SpoiltError(EndedError):
    """A call wrote into the link to its process, which is gone."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a call may take.

    Attributes:
      call_s: time in seconds, above 0, finite.
      memory_bytes: address space beyond what the process has before its first call; 0:
        no limit. Kept by Linux alone.
      answer_bytes: longest answer, as JSON.
    """

    call_s: float
    memory_bytes: int = 0
    answer_bytes: int = 1 << 16


class Process:
    """One process, replaced after it was killed or died; calls come one by one."""

    def __init__(self, what: str, entry: str, payload: Any, limits: Limits):
        """Describes the process; `start` or the first `call` starts it.

        Args:
          what: it is, for messages: `a reward worker`.
          entry: `package.module:name` of a function that, called there with `payload`,
            returns the function of a job that gives the answer, fit for JSON.
          payload: can be pickled.
          limits: of each call.
        """
        self._what, self._limits = what, limits
        self._first = pickle.dumps((entry, payload, limits.call_s, limits.memory_bytes))
        self._lock = threading.Lock()
        self._process: subprocess.Popen | None = None
        self._link: socket.socket | None = None
        self._life: int | None = None
        self._number = _NEVER_CALLED
        self._closed = False

    def start(self) -> None:
        """Starts a process if there is none that is fit, and waits until it is ready.

        Raises:
          StartError: it does not come up, or was closed.
        """
        if self._is_fit():
            return
        self._stop()
        try:
            self._spawn()
        except StartError:
            self._stop()
            raise
        self._number = _NEVER_CALLED
        failure: str | None = "it does not answer"
        with contextlib.suppress(TooLongError):
            try:
                failure = self._exchange(self._first, _START_LIMIT_S)
            except EndedError as error:
                failure = f"it ended ({error})"
        if failure is not None:
            self._stop()
            raise StartError(f"{self._what} cannot start: {failure}")

    def call(self, job: Any) -> Any:
        """Returns the answer to a job, which can be pickled.

        Raises:
          TooLongError, EndedError: there is none.
          StartError: see `start`.
        """
        data = pickle.dumps(job)
        self.start()
        self._number += 1
        try:
            return self._exchange(data, self._limits.call_s)
        except (TooLongError, EndedError):
            self._stop()
            raise

    def kill(self) -> None:
        """Ends the process for good; may be called by another thread."""
        with self._lock:
            self._closed = True
            process = self._process
        if process is not None:
            _kill(process)

    def close(self) -> None:
        """Ends the process for good; called by the thread that calls it, or none."""
        self.kill()
        self._stop()

    def _is_fit(self) -> bool:
        """Tells whether there is a process that lives, and has said nothing unasked."""
        if self._process is None or self._process.poll() is not None:
            return False
        said = select.poll()
        said.register(self._link, select.POLLIN)
        return not said.poll(0)

    def _spawn(self) -> None:
        paths = json.dumps(list(map(str, sys.path)))
        ours, theirs = socket.socketpair()
        life, ours_alive = os.pipe()
        passed = (theirs.fileno(), life)
        with theirs, self._lock:
            self._link, self._life = ours, ours_alive
            try:
                if self._closed:
                    raise StartError(f"{self._what} is closed")
                self._process = subprocess.Popen(
                    [sys.executable, "-c", _MAIN, paths, *map(str, passed)],
                    env=os.environ | {"JAX_PLATFORMS": "cpu"},
                    pass_fds=passed,
                    stdin=subprocess.DEVNULL,
                    stdout=2,  # What it prints must not mix with a command's output.
                    # A group of its own, so that what the function starts ends with it,
                    # and Ctrl-C reaches the driver only.
                    start_new_session=True,
                )
            except OSError as error:
                raise StartError(f"{self._what} cannot start: {error}") from error
            finally:
                os.close(life)

    def _exchange(self, data: bytes, limit_s: float) -> Any:
        """Sends a message and returns the answer."""
        deadline_s = time.monotonic() + limit_s
        header = serving.HEADER.pack(self._number, len(data))
        try:
            self._link.settimeout(limit_s)
            self._link.sendall(header + data)
            header = self._receive(serving.HEADER.size, deadline_s)
            number, size = serving.HEADER.unpack(header)
            if number != self._number or size > self._limits.answer_bytes:
                raise SpoiltError("it wrote into the link")
            return json.loads(self._receive(size, deadline_s))
        except TimeoutError:
            raise TooLongError(f"more than {limit_s:g} s") from None
        except OSError:
            raise EndedError(self._fate()) from None
        except ValueError:  # No JSON.
            raise SpoiltError("it wrote into the link") from None

    def _receive(self, size: int, deadline_s: float) -> bytes:
        parts = []
        while size:
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                raise TimeoutError
            self._link.settimeout(left_s)
            part = self._link.recv(size)
            if not part:
                raise EndedError(self._fate())
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def _fate(self) -> str:
        try:
            code = self._process.wait(_END_LIMIT_S)
        except subprocess.TimeoutExpired:
            return "it closed the link to this process"
        if code >= 0:
            return f"exit code {code}"
        names = {one.value: one.name for one in signal.Signals}
        return f"signal {names.get(-code, -code)}"

    def _stop(self) -> None:
        if self._process is not None:
            _kill(self._process)
            self._process = None
        if self._link is not None:
            self._link.close()
            os.close(self._life)
            self._link = self._life = None


def _kill(process: subprocess.Popen) -> None:
    """Ends a process with whatever it has started, and buries what is ours."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        process.kill()
    process.wait()
    # As the first process of a container we inherit those that it leaves.
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-process.pid, 0):
            pass
