"""Run several processes as one: `python -m tlt_jax.launch --processes=N -- ...`.

With `workers.placement=separate` rollout workers are processes besides these, and with
`reward.placement=separate` reward workers are, each a world of its own, which is
started again alone where it is killed.

What follows `--` is the command line of `tlt_jax.main`, or of what `--module` names.
`--executor=local` starts the processes on this machine, `--executor=ray` on the cluster
that RAY_ADDRESS names; they join through `jax.distributed` at a free port. Process 0
speaks here; the others write to `WORKDIR/processes/N.log`, with Ray all of them.

A world is one start of all processes. Where one of them is killed, or its machine is
gone, the world is ended and started again from the newest checkpoint, as long as
checkpoints come: at most what lies between two of them is computed twice, and what is
computed is the same. A process that ends with an error of its own ends the run. The
same command resumes, with any number of processes. Ctrl-C and SIGTERM stop the run
after saving; a second Ctrl-C ends it at once.

Where a cluster's own launcher starts all tasks, they run `tlt_jax.main --cluster`.
"""

import argparse
import contextlib
import dataclasses
import os
import pathlib
import secrets
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from typing import NoReturn

from absl import flags

from tlt_jax import config
from tlt_jax.executors import executor as executor_lib
from tlt_jax.executors import local, on_ray
from tlt_jax.runtime import command_line, distributed, failures, stopping
from tlt_jax.settings import schema

EXECUTORS = {"local": local.Local, "ray": on_ray.OnRay}
_MAIN = "tlt_jax.main"
_POLL_S = 0.1
# How long processes that were asked to end may take.
_GRACE_S = 10.0
# After one has stopped: the others save the same step.
_SAVING_S = 60.0
_TAIL_LINES = 12
# What `tlt_jax.main` returns for what a user can mend, with a line that says so.
_USER_ERROR = 2
# What members of other machines get of this process's environment.
_FORWARDED = "JAX_", "XLA_", "TLT_JAX_", "HF_", "LIBTPU_", "NCCL_", "PYTHONPATH"


def main(argv: Sequence[str]) -> int:
    """Start the processes and wait for them; return the exit status."""
    at = argv.index("--") if "--" in argv else len(argv)
    own, program = argv[:at], argv[at + 1 :]
    options = _parser().parse_args(own)
    if options.processes < 1:
        command_line.fail(f"--processes={options.processes}: give at least 1.")
    if options.devices_per_process < 1:
        told = f"--devices_per_process={options.devices_per_process}"
        command_line.fail(f"{told}: give at least 1.")
    if options.restarts < 0:
        command_line.fail(f"--restarts={options.restarts}: give 0 or more.")
    if options.cpus_per_process is not None and not options.cpus_per_process > 0:
        command_line.fail(
            f"--cpus_per_process={options.cpus_per_process:g}: give more than 0."
        )
    directory = command_line.last_value(program, "workdir")
    if not directory:
        command_line.fail("--workdir=DIR is missing behind --.")
    try:
        (pathlib.Path(directory) / "processes").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        command_line.fail(f"{directory} cannot be written ({error.strerror}).")
    try:
        return _Run(options, program, pathlib.Path(directory)).through()
    except failures.UserError as error:
        command_line.fail(error)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m tlt_jax.launch",
        description="Run tlt_jax.main in several processes.",
        usage="%(prog)s --processes=N [...] -- --config=FILE --workdir=DIR [...]",
    )
    parser.add_argument("--processes", type=int, required=True, help="how many")
    parser.add_argument(
        "--executor",
        choices=sorted(EXECUTORS),
        default="local",
        help="who starts them: this machine, or Ray (default: local)",
    )
    parser.add_argument(
        "--devices_per_process",
        type=int,
        default=1,
        help="accelerators of each; without meaning on CPUs (default: 1)",
    )
    parser.add_argument(
        "--cpus_per_process",
        type=float,
        help="cores of each, with Ray; here they are divided (default: 1)",
    )
    parser.add_argument(
        "--restarts",
        type=int,
        default=3,
        help="how often in a row, without a new checkpoint, processes are started "
        "again where one was killed (default: 3)",
    )
    parser.add_argument(
        "--module",
        default=_MAIN,
        help="a program that joins the processes as this one does (default: "
        "tlt_jax.main)",
    )
    return parser


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


@dataclasses.dataclass(frozen=True)
class _Helper:
    """A member beside the world: what it is, and what others do where it is gone.

    Attributes:
      variable: by which it is told its number.
      computes: whether it has cores and accelerators of its own.
    """

    what: str
    others: str
    variable: str
    number: int
    computes: bool


class _Run:
    """Worlds, one after the other, until one has gone through."""

    def __init__(
        self,
        options: argparse.Namespace,
        program: Sequence[str],
        directory: pathlib.Path,
    ):
        self._options, self._num = options, options.processes
        self._words = ["-m", options.module, *program]
        self._directory = directory
        self._heard: list[int] = []
        self._num_told = 0
        # With an executor elsewhere: how much was shown of what process 0 says.
        self._shown = 0
        self._restarts, self._newest = 0, -1
        # Behind the world's members: workers, each a world of its own.
        self._helpers = _helpers_of(options.module, program)
        # Where helpers find the world, and on which hosts that is.
        self._meetings: dict[str, str] = {}
        self._hosts: list[str] = []
        self._waiting: set[int] = set()
        self._executor = EXECUTORS[options.executor]()

    def through(self) -> int:
        """Start the world, and again where it is broken; return the exit status."""
        one = self._executor
        handlers = [signal.signal(n, self._hear) for n in stopping.SIGNALS]
        try:
            shares = self._shares()
            one.start(shares)
            if not one.is_local:
                one.check_same(len(shares))
                self._shown = self._size_of_log()
            self._begin()
            while True:
                codes = one.watch(_POLL_S)
                self._show()
                self._pass_signals_on()
                if all(code == 0 for code in codes[: self._num]):
                    return 0
                if self._begin_helpers_again(codes):
                    continue
                if not any(codes):
                    # Those that run are waited for, with or without others' ends.
                    time.sleep(_POLL_S * (0 in codes))
                    continue
                if self._heard:
                    return self._stopped()
                if not self._begin_again(codes):
                    return self._fail()
        finally:
            self._end()
            one.stop()
            for number, handler in zip(stopping.SIGNALS, handlers, strict=True):
                signal.signal(number, handler)

    def _begin(self) -> None:
        """Let every member run its part of a world."""
        one = self._executor
        address = one.call(0, "address", one.host(0))
        is_new = self._helpers and self._meet(address)
        for index in range(self._num):
            self._run(
                index,
                {
                    distributed.COORDINATOR: address,
                    distributed.NUM_PROCESSES: str(self._num),
                    distributed.PROCESS: str(index),
                },
            )
        codes = one.watch()[self._num :] if self._helpers else ()
        for number, code in enumerate(codes):
            # One may have heard the end of a world of which another process was lost.
            if is_new or code == 0:
                self._begin_helper(number)

    def _meet(self, address: str) -> bool:
        """Choose where helpers find the world; false: it is where they look already.

        That is the same for all worlds on these hosts: who works goes on with the next
        one. The address is another one's.
        """
        one, taken = self._executor, {address}
        wanted = {helper.variable for helper in self._helpers}
        is_judged = distributed.REWARD_WORKER in wanted
        hosts = [one.host(i) for i in range(self._num if is_judged else 1)]
        if hosts == self._hosts:
            return False
        self._hosts = hosts

        def free(index: int) -> str:
            while (found := one.call(index, "address", hosts[index])) in taken:
                pass
            taken.add(found)
            return found

        self._meetings = {distributed.SECRET: secrets.token_hex(32)}
        if distributed.WORKER in wanted:
            self._meetings[distributed.MEETING] = free(0)
        if is_judged:
            found = ",".join(map(free, range(self._num)))
            self._meetings[distributed.REWARD_MEETINGS] = found
        return True

    def _shares(self) -> list[executor_lib.Share]:
        """Return what each member has."""
        options = self._options
        own = executor_lib.Share(options.cpus_per_process, options.devices_per_process)
        # It does one thing at a time.
        small = executor_lib.Share(min(1.0, options.cpus_per_process or 1.0), 0)
        beside = [own if helper.computes else small for helper in self._helpers]
        return [own] * self._num + beside

    def _begin_helper(self, number: int) -> None:
        """Let a helper wait for the world; another program of it is ended."""
        helper, index = self._helpers[number], self._num + number
        if index in self._waiting:
            self._executor.restart(index)
        self._waiting.add(index)
        told = {helper.variable: str(helper.number)}
        if not helper.computes:
            told["JAX_PLATFORMS"] = "cpu"
        self._run(index, told)

    def _run(self, index: int, variables: Mapping[str, str]) -> None:
        """Let a member run the program, which is told who it is."""
        one = self._executor
        forwarded: Mapping[str, str] = {}
        if not one.is_local:
            forwarded = {
                n: v for n, v in os.environ.items() if n.startswith(_FORWARDED)
            }
        told = {
            **forwarded,
            **self._meetings,
            **variables,
            # Where a member sees its own devices alone, they are not numbered.
            distributed.DEVICES: self._devices(index) if one.is_local else "",
            distributed.HOST: one.host(index),
        }
        shows = one.is_local and index == 0
        log = "" if shows else str(self._log(index))
        one.call(index, "run", self._words, told, log, os.getcwd())

    def _devices(self, index: int) -> str:
        count = self._options.devices_per_process
        return ",".join(map(str, range(index * count, (index + 1) * count)))

    def _begin_again(self, codes: Sequence[int | None]) -> bool:
        """Start the world again, if one was killed and this may help."""
        killed = [i for i, code in enumerate(codes) if code is not None and code < 0]
        if not killed:
            # Who lost another process may have been seen before it.
            time.sleep(_GRACE_S / 5)
            codes = self._executor.watch()
            killed = [i for i, c in enumerate(codes) if c is not None and c < 0]
        if not killed or not self._may_restart():
            return False
        newest = self._newest
        where = "the beginning" if newest < 0 else f"the checkpoint of step {newest}"
        print(
            f"process {killed[0]} of {self._num} was ended by "
            f"{_name(codes[killed[0]])}: all are started again and go on from {where} "
            f"({self._restarts} of {self._options.restarts} times without a new one).",
            file=sys.stderr,
            flush=True,
        )
        for index in range(self._num):
            self._executor.restart(index)
        self._begin()
        return True

    def _begin_helpers_again(self, codes: Sequence[int | None]) -> bool:
        """Start helpers again that were killed; the others go on meanwhile."""
        killed = [i for i in range(self._num, len(codes)) if (codes[i] or 0) < 0]
        if not killed or any(codes[: self._num]) or self._heard:
            return False
        if not self._may_restart():
            return False
        for index in killed:
            helper = self._helpers[index - self._num]
            print(
                f"{helper.what} {helper.number} was ended by {_name(codes[index])}: it "
                f"is started again, and others {helper.others}.",
                file=sys.stderr,
                flush=True,
            )
            self._begin_helper(index - self._num)
        return True

    def _may_restart(self) -> bool:
        """Count a start anew, of those in a row without a new checkpoint."""
        newest = _newest_checkpoint(self._directory)
        self._restarts = 0 if newest > self._newest else self._restarts
        self._newest = max(newest, self._newest)
        self._restarts += 1
        return self._restarts <= self._options.restarts

    def _hear(self, number: int, frame: object) -> None:
        """Note a signal; the processes have groups of their own and get it later."""
        self._heard.append(number)

    def _pass_signals_on(self) -> None:
        """Ask the processes to stop, once; a second Ctrl-C ends them."""
        for number in self._heard[self._num_told :]:
            self._num_told += 1
            if self._num_told == 1:
                # To helpers the learner says when it needs them no more.
                self._tell("terminate", self._num)
            elif number == signal.SIGINT:
                self._tell("kill")

    def _stopped(self) -> int:
        """Wait for the others where the first has stopped; it has said all."""
        self._end(within_s=_SAVING_S)
        codes = self._executor.watch()
        if codes[0] == -signal.SIGTERM:
            # It was not far enough to say a word.
            print(stopping.INTERRUPTED, file=sys.stderr)
        return _USER_ERROR if _USER_ERROR in codes else 128 + self._heard[0]

    def _fail(self) -> int:
        """End the others and say which process was the first to fail."""
        codes = self._executor.watch()
        self._end()
        failed = [i for i, code in enumerate(codes) if code]
        # One that was killed is the cause of what others report.
        index = min(failed, key=lambda i: (codes[i] > 0, i))
        code = codes[index]
        if index == 0 and code == _USER_ERROR:
            return code  # It has said all.
        how = _name(code) if code < 0 else f"status {code}"
        print(
            f"error: process {index} of {len(codes)} ended with {how}, and the run "
            "with it. The same command resumes from the newest checkpoint.",
            file=sys.stderr,
        )
        if index or not self._executor.is_local:
            print(f"The end of {self._log(index)}:", file=sys.stderr)
            text = self._log(index).read_text(errors="replace")
            print("\n".join(text.splitlines()[-_TAIL_LINES:]), file=sys.stderr)
        return code if code > 0 else 1

    def _end(self, within_s: float = _GRACE_S) -> None:
        """Ask all to end, and end those that have not in time."""
        until_s = time.monotonic() + within_s
        if not self._num_told:
            self._tell("terminate", self._num)
        while None in self._executor.watch()[: self._num]:
            if time.monotonic() > until_s:
                break
            time.sleep(_POLL_S)
        # Of nobody else do helpers hear of it.
        self._tell("terminate", None)
        while None in self._executor.watch() and time.monotonic() < until_s:
            time.sleep(_POLL_S)
        self._tell("kill")
        self._show()

    def _tell(self, method: str, most: int | None = None) -> None:
        """Call a method of all whose programs run, or of the first `most` members."""
        for index, code in enumerate(self._executor.watch()[:most]):
            # Between the two it may go.
            with contextlib.suppress(executor_lib.ExecutorError):
                if code is None:
                    self._executor.call(index, method)

    def _show(self) -> None:
        """Say here what process 0 has said elsewhere."""
        if self._executor.is_local:
            return
        # Who is gone says no more; the log stays.
        with contextlib.suppress(executor_lib.ExecutorError):
            log = str(self._log(0))
            while text := self._executor.call(0, "read", log, self._shown):
                self._shown += len(text)
                sys.stdout.buffer.write(text.encode("latin-1"))
                sys.stdout.flush()

    def _size_of_log(self) -> int:
        return self._log(0).stat().st_size if self._log(0).exists() else 0

    def _log(self, index: int) -> pathlib.Path:
        return (self._directory / "processes" / f"{index}.log").resolve()


def _helpers_of(module: str, program: Sequence[str]) -> list[_Helper]:
    """Return the workers that the settings want in processes of their own."""
    if module != _MAIN:
        return []
    try:
        _, changes = command_line.overrides(["", *program])
        spec = command_line.last_value(program, "config")
        run = command_line.settings_of(spec, changes, config.RunConfig)
    except (schema.ConfigError, flags.Error):
        # The processes say so.
        return []
    found = []
    if run.workers.placement == "separate":
        told = "rollout worker", "generate its requests", distributed.WORKER
        found += [_Helper(*told, number, True) for number in range(run.workers.num)]
    if run.reward.placement == "separate":
        told = "reward worker", "judge in its place", distributed.REWARD_WORKER
        found += [_Helper(*told, number, False) for number in range(run.reward.workers)]
    return found


def _name(code: int) -> str:
    return f"signal {signal.Signals(-code).name}"


def _newest_checkpoint(directory: pathlib.Path) -> int:
    """Return the step of the newest checkpoint; below 0: there is none."""
    folder = directory / "checkpoints"
    names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    return max((int(name) for name in names if name.isdecimal()), default=-1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
