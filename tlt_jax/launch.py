"""Run several processes here: `python -m tlt_jax.launch --processes=N -- ...`.

What follows `--` is the command line of `tlt_jax.main`, or of what `--module` names.
The processes join through `jax.distributed` at a free port. On CPUs each gets its share
of the cores, and XLA's threads with it. Process 0
speaks here; the others write to `WORKDIR/processes/N.log`. If one fails, all are ended;
the same command resumes, with any number of processes. Ctrl-C and SIGTERM stop the run
after saving; a second Ctrl-C ends it at once.

On clusters start `tlt_jax.main --cluster` in every task of your launcher instead.
"""

import argparse
import ctypes
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import NoReturn

from tlt_jax.runtime import command_line, distributed, stopping

_POLL_S = 0.1
# How long processes that were asked to end may take.
_GRACE_S = 10.0
# After one has stopped: the others save the same step.
_SAVING_S = 60.0
_PR_SET_PDEATHSIG = 1
_TAIL_LINES = 12
# What `tlt_jax.main` returns for what a user can mend, with a line that says so.
_USER_ERROR = 2


def main(argv: Sequence[str]) -> int:
    """Start the processes and wait for them; return the exit status."""
    at = argv.index("--") if "--" in argv else len(argv)
    own, program = argv[:at], argv[at + 1 :]
    parser = _Parser(
        prog="python -m tlt_jax.launch",
        description="Run tlt_jax.main in several processes of this machine.",
        usage="%(prog)s --processes=N [...] -- --config=FILE --workdir=DIR [...]",
    )
    parser.add_argument("--processes", type=int, required=True, help="how many")
    parser.add_argument(
        "--devices_per_process",
        type=int,
        default=1,
        help="accelerators of each; without meaning on CPUs (default: 1)",
    )
    parser.add_argument(
        "--module",
        default="tlt_jax.main",
        help="a program that joins the processes as this one does (default: "
        "tlt_jax.main)",
    )
    options = parser.parse_args(own)
    if options.processes < 1:
        parser.error(f"--processes={options.processes}: give at least 1.")
    directory = command_line.last_value(program, "workdir")
    if not directory:
        parser.error("--workdir=DIR is missing behind --.")
    try:
        logs = pathlib.Path(directory) / "processes"
        children = _Children(options, program, logs)
    except OSError as error:
        parser.error(f"{directory} cannot be written ({error.strerror}).")
    return children.wait()


class _Parser(argparse.ArgumentParser):
    """Says what is wrong as the other commands do."""

    def error(self, message: str) -> NoReturn:
        before, _, unknown = message.partition("unrecognized arguments: ")
        if unknown and not before:
            message = (
                f"{unknown.split()[0]} is no option of launch: what the processes are "
                "to be given stands behind --."
            )
        command_line.fail(message)


class _Children:
    """The processes that were started."""

    def __init__(self, options, program: Sequence[str], logs: pathlib.Path):
        logs.mkdir(parents=True, exist_ok=True)
        self._logs = logs
        port = free_port()
        # Not every system can say which cores are ours.
        own = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ()
        cores = shares(sorted(own), options.processes)
        self._processes: list[subprocess.Popen] = []
        self._signal = 0
        self._handlers = [signal.signal(n, self._hear) for n in stopping.SIGNALS]
        for index in range(options.processes):
            num = options.devices_per_process
            devices = range(index * num, (index + 1) * num)
            environment = os.environ | {
                distributed.COORDINATOR: f"127.0.0.1:{port}",
                distributed.NUM_PROCESSES: str(options.processes),
                distributed.PROCESS: str(index),
                distributed.DEVICES: ",".join(map(str, devices)),
            }
            log = None if index == 0 else open(self._log(index), "ab")
            self._processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", options.module, *program],
                    env=environment,
                    stdin=None if index == 0 else subprocess.DEVNULL,
                    stdout=log,
                    stderr=log and subprocess.STDOUT,
                    process_group=0,
                    preexec_fn=_before_start(cores[index]),
                )
            )
            if log:
                log.close()

    def wait(self) -> int:
        """Wait for all to end, for one to fail, or for what a signal has stopped."""
        try:
            while True:
                codes = [process.poll() for process in self._processes]
                if all(code == 0 for code in codes):
                    return 0
                if any(codes):
                    return self._stopped() if self._signal else self._fail()
                time.sleep(_POLL_S)
        finally:
            self._end()
            for number, handler in zip(stopping.SIGNALS, self._handlers, strict=True):
                signal.signal(number, handler)

    def _hear(self, number: int, frame: object) -> None:
        """Ask the processes to stop, once; a second Ctrl-C ends them.

        They have process groups of their own, so that a terminal's Ctrl-C reaches them
        by this way alone.
        """
        if not self._signal:
            self._signal = number
            for process in self._processes:
                process.terminate()
        elif number == signal.SIGINT:
            for process in self._processes:
                process.kill()

    def _stopped(self) -> int:
        """Wait for the others where the first has stopped; it has said all."""
        self._end(within_s=_SAVING_S)
        codes = [process.poll() for process in self._processes]
        if codes[0] == -signal.SIGTERM:
            # It was not far enough to say a word.
            print(stopping.INTERRUPTED, file=sys.stderr)
        return _USER_ERROR if _USER_ERROR in codes else 128 + self._signal

    def _fail(self) -> int:
        """End the others and say which process was the first to fail."""
        # What one process finds wrong, others may find and say as well.
        time.sleep(_GRACE_S / 5)
        codes = [process.poll() for process in self._processes]
        self._end()
        failed = [i for i, code in enumerate(codes) if code]
        # One that was killed is the cause of what others report.
        index = min(failed, key=lambda i: (codes[i] > 0, i))
        code = codes[index]
        if index == 0 and code == _USER_ERROR:
            return code  # It has said all.
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"status {code}"
        print(
            f"error: process {index} of {len(codes)} ended with {how}, and the run "
            "with it. The same command resumes from the newest checkpoint.",
            file=sys.stderr,
        )
        if index:
            print(f"The end of {self._log(index)}:", file=sys.stderr)
            text = self._log(index).read_text(errors="replace")
            print("\n".join(text.splitlines()[-_TAIL_LINES:]), file=sys.stderr)
        return code if code > 0 else 1

    def _end(self, within_s: float = _GRACE_S) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.terminate()
        until = time.monotonic() + within_s
        for process in self._processes:
            try:
                process.wait(max(until - time.monotonic(), 0.0))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _log(self, index: int) -> pathlib.Path:
        return self._logs / f"{index}.log"


def shares(cores: Sequence[int], count: int) -> list[list[int]]:
    """Divide cores into `count` shares without overlap; too few: all for everybody."""
    if count > len(cores):
        return [list(cores)] * count
    bounds = [len(cores) * i // count for i in range(count + 1)]
    return [list(cores[a:b]) for a, b in zip(bounds, bounds[1:], strict=False)]


def free_port() -> int:
    """Find a port of this machine that nobody uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _before_start(cores: Sequence[int]):
    """Return what a child does first: keep to its cores, and end with its parent."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None

    def prepare() -> None:
        if cores:
            os.sched_setaffinity(0, cores)
        if libc:
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    return prepare


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
