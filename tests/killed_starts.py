"""Starts of a run in forked children, ended by a signal at a moment that is named.

The parent has imported what a run needs and has no backend, so that a start costs no
interpreter and no import. Product code is as it is: in the child, functions are wrapped
before the command line is read.
"""

import contextlib
import ctypes
import functools
import importlib
import os
import pathlib
import signal
import subprocess
import threading
import time
import types
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import llvmlite.binding  # noqa: F401 (imported once, for all forked starts)

from tests import command_lines
from tlt_jax import launch, train
from tlt_jax.executors import member
from tlt_jax.rl import collector
from tlt_jax.rl.adaptation import budget
from tlt_jax.rl.engine import engine
from tlt_jax.runtime import distributed

# A start that takes so long hangs.
_LONGEST_S = 240.0
# By then what a run has started must be gone.
_GONE_S = 20.0
_POLL_S = 0.005
_BEGAN = "began"
# What a worker takes longer for each call, so that another one waits.
_SLOW_S = 0.02
_PR_SET_CHILD_SUBREAPER = 36


class Kill(NamedTuple):
    """When and how a start ends before its time.

    Attributes:
      number: the signal.
      where: `module:Class.method` that is entered then; empty: the start itself.
      nth: at which of its calls, from 1.
      delay_s: seconds after that.
      process: which of several dies of SIGKILL; SIGTERM goes to their launcher.
    """

    number: int
    where: str
    nth: int
    delay_s: float
    process: int = 0

    def __str__(self) -> str:
        name = signal.Signals(self.number).name
        place = f"call {self.nth} of {self.where}" if self.where else "the start"
        return f"{name} {1e3 * self.delay_s:.1f} ms after {place}"


class Ended(NamedTuple):
    """How a start ended.

    Attributes:
      status: as `subprocess` has it: negative for a signal.
      seconds: that it took.
      began: RL steps done before its first rollout; None: it had none.
      survivors: processes that it has left behind, by their command lines.
    """

    status: int
    seconds: float
    began: int | None
    survivors: list[str]


def start(
    words: Sequence[str],
    folder: pathlib.Path,
    kill: Kill | None = None,
    without: str = "",
) -> Ended:
    """Runs a command line until its end.

    Args:
      words: a module followed by its arguments.
      folder: for what it prints, and its marks.
      kill: None: it runs through.
      without: `module:Class.method` that does nothing.
    """
    began = folder / _BEGAN
    began.unlink(missing_ok=True)
    child, started = os.fork(), time.monotonic()
    if not child:
        _run(words, folder, kill, without)
    try:
        status = _wait(child, started, kill)
    except BaseException:
        os.killpg(child, signal.SIGKILL)
        raise
    seconds = time.monotonic() - started
    step = int(began.read_text()) if began.exists() else None
    return Ended(status, seconds, step, _survivors())


def _wait(child: int, started: float, kill: Kill | None) -> int:
    """Waits for a start's end, which a kill at a time of its own brings about."""
    is_due = kill is not None and not kill.where
    while True:
        spent = time.monotonic() - started
        if is_due and spent >= kill.delay_s:
            os.kill(child, kill.number)
            is_due = False
        if spent > _LONGEST_S:
            os.killpg(child, signal.SIGKILL)
        found, code = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(code)
        time.sleep(_POLL_S)


def adopt() -> None:
    """Becomes the parent of whatever a start leaves behind, and so finds it."""
    if ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError("prctl(PR_SET_CHILD_SUBREAPER) failed: Linux is needed.")


def in_child(work: Callable[[], None], output: pathlib.Path) -> int:
    """Calls a function in a forked child; returns the child's exit status."""
    child = os.fork()
    if not child:
        status = 1
        try:
            _say_into(output)
            work()
            status = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _run(words, folder, kill, without) -> None:
    """Becomes the program, in the child."""
    try:
        os.setsid()
        _say_into(folder / "output.txt")
        _prepare(folder, kill, without)
    except BaseException:
        import traceback

        traceback.print_exc()
        os._exit(70)
    module, *arguments = words
    if module != "tlt_jax.launch":
        command_lines.become(module, arguments)
    status = 70
    try:
        # Its processes are forked as well.
        names = ("DEVNULL", "STDOUT", "TimeoutExpired")
        kept = {name: getattr(subprocess, name) for name in names}
        member.subprocess = types.SimpleNamespace(Popen=_Forked, **kept)
        status = launch.main(arguments)
    except SystemExit as end:
        status = end.code
    finally:
        os._exit(status)


def _say_into(path: pathlib.Path) -> None:
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(file, 1)
    os.dup2(file, 2)


class _Forked:
    """What a member needs of `subprocess.Popen`, without a new interpreter."""

    def __init__(self, arguments, *, env, stdout, preexec_fn, **_: Any):
        self._code: int | None = None
        self.pid = os.fork()
        if self.pid:
            return
        try:
            os.setpgid(0, 0)
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_DFL)
            if stdout is not None:
                os.dup2(stdout.fileno(), 1)
                os.dup2(stdout.fileno(), 2)
            preexec_fn()
            os.environ.clear()
            os.environ.update(env)
            # Interpreter, -m, module.
            command_lines.become(arguments[2], arguments[3:])
        finally:
            os._exit(70)

    def poll(self) -> int | None:
        if self._code is None:
            found, code = os.waitpid(self.pid, os.WNOHANG)
            if found:
                self._code = os.waitstatus_to_exitcode(code)
        return self._code

    def wait(self, timeout: float) -> int:
        until = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > until:
                raise subprocess.TimeoutExpired("", timeout)
            time.sleep(_POLL_S)
        return self._code

    def terminate(self) -> None:
        self._send(signal.SIGTERM)

    def kill(self) -> None:
        self._send(signal.SIGKILL)

    def _send(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


def _prepare(folder: pathlib.Path, kill: Kill | None, without: str) -> None:
    """Wraps what is to be wrapped, in the child."""
    # Takes longer than all the rest, and is the same every time.
    train.plots.draw_all = lambda directory: None
    # How much is trained depends on clocks: here `adaptation.max_steps` says it.
    budget.Budget.seconds = lambda self, rollout_s, max_frac: 1e6
    # The second worker lets the first one wait long enough to train.
    _wrap(engine.Engine, "_decode_call", _let_wait)
    marked = []

    def mark(_: collector.Collector, step: int, *rest: object) -> None:
        if not marked and _index() == 0:
            marked.append(step)
            (folder / _BEGAN).write_text(str(step))

    _wrap(collector.Collector, "collect", mark)
    if without:
        setattr(*find(without), lambda *arguments, **options: None)
    if kill is not None and kill.where:
        num_calls = []

        def count(*_: object, **__: object) -> None:
            num_calls.append(None)
            if len(num_calls) == kill.nth and _index() == kill.process:
                _die(kill)

        _wrap(*find(kill.where), count)


def _let_wait(worker: engine.Engine, *_: object, **__: object) -> None:
    if jax.device_count() > 1 and worker.mesh.devices.flat[0].id:
        time.sleep(_SLOW_S)


def _die(kill: Kill) -> None:
    launched = distributed.PROCESS in os.environ
    to_launcher = launched and kill.number == signal.SIGTERM
    pid = os.getppid() if to_launcher else os.getpid()
    if kill.delay_s:
        timer = threading.Timer(kill.delay_s, os.kill, (pid, kill.number))
        timer.daemon = True
        timer.start()
    else:
        os.kill(pid, kill.number)


def _index() -> int:
    return int(os.environ.get(distributed.PROCESS, 0))


def find(where: str) -> tuple[Any, str]:
    """Returns what has the method, and its name."""
    module, _, path = where.partition(":")
    owner = importlib.import_module(module)
    *outer, name = path.split(".")
    for one in outer:
        owner = getattr(owner, one)
    if not callable(getattr(owner, name)):
        raise ValueError(f"{where} cannot be called.")
    return owner, name


def _wrap(owner: Any, name: str, before: Callable[..., None]) -> None:
    whole = getattr(owner, name)

    @functools.wraps(whole)
    def wrapped(*arguments, **options):
        before(*arguments, **options)
        return whole(*arguments, **options)

    setattr(owner, name, wrapped)


def _survivors() -> list[str]:
    """Waits until no child is left; returns those that stay, and ends them."""
    until, lines = time.monotonic() + _GONE_S, []
    while True:
        try:
            found, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return lines
        if not found and time.monotonic() > until:
            own = pathlib.Path("/proc/self/task")
            children = "".join(
                (task / "children").read_text() for task in own.iterdir()
            )
            for pid in map(int, children.split()):
                with contextlib.suppress(OSError):
                    line = pathlib.Path(f"/proc/{pid}/cmdline").read_bytes()
                    lines.append(line.replace(b"\0", b" ").decode(errors="replace"))
                    os.kill(pid, signal.SIGKILL)
        if not found:
            time.sleep(_POLL_S)
