"""Paired, interleaved measurements of several systems, runners of peers among them.

Systems are asked in turn, A B C, B C A, ..., so that what else the machine does hits
all alike; a comparison is the median over rounds of the ratio within a round. A peer is
a runner script (`experiments/peers/`) under its own interpreter. One system computes at
a time: the others are stopped by a signal. Where memory does not hold all of them, each
is loaded for its own requests only.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from experiments.lab import experiment, provenance, tables
from tlt_jax.runtime import failures

PEERS_DIR = pathlib.Path(__file__).parents[1] / "peers"
DEFAULT_MODEL = "smollm2-135m-instruct"  # as tlt_jax.models.formats.source names it
LOAD_TIMEOUT_S = 900.0

Row = tables.Row


@dataclasses.dataclass(frozen=True)
class System:
    """A script in `experiments/peers/`, and the interpreter that can run it."""

    name: str
    python: str
    script: str


class RunnerError(failures.UserError):
    """A runner answered with an error, took too long or ended."""


class Runner:
    """A runner's process, stopped except while it answers."""

    def __init__(self, system: System, log_dir: pathlib.Path):
        self.system = system
        self.log_path = log_dir / f"{system.name}.log"
        with self.log_path.open("wb") as log:
            self._process = subprocess.Popen(
                [system.python, str(PEERS_DIR / system.script)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,  # signals reach its workers too
            )

    def _signal(self, number: int) -> None:
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:
            pass  # it has ended; the next read says so

    def ask(self, command: str, *, timeout_s: float, **fields) -> dict:
        """Sends one request and returns its answer; the runner then stands still.

        Raises:
          RunnerError: with the runner's own traceback, or the end of its log.
        """
        if self._process.poll() is not None:
            raise RunnerError(self._ended("has ended"))
        self._signal(signal.SIGCONT)
        watchdog = threading.Timer(timeout_s, self._signal, [signal.SIGKILL])
        watchdog.start()
        try:
            self._process.stdin.write(json.dumps({"command": command, **fields}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            watchdog.cancel()
        if not line:
            raise RunnerError(
                self._ended(
                    f"ended without an answer to {command}, or was ended because it "
                    f"took more than {timeout_s} s"
                )
            )
        self._signal(signal.SIGSTOP)
        answer = json.loads(line)
        if "error" in answer:
            raise RunnerError(f"{self.system.name} failed:\n{answer['error']}")
        return answer

    def _ended(self, how: str) -> str:
        log = self.log_path.read_text(encoding="utf-8", errors="replace")
        try:
            status = self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            status = None  # it has closed its output and lives on
        if status == -signal.SIGKILL:
            how += " (killed: where nobody did it, the kernel for want of memory)"
        elif status is not None:
            how += f" (exit status {status})"
        return (
            f"{self.system.name} {how}. It ran {self.system.script} with the "
            f"interpreter {self.system.python}; experiments/peers/README.md says what "
            f"must be installed there. The end of its log:\n{log[-2000:]}"
        )

    def close(self) -> None:
        """Ends the process and its children."""
        self._signal(signal.SIGKILL)
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()


class Visitor:
    """Takes requests as a runner does, and has no process between them."""

    def __init__(
        self, system: System, log_dir: pathlib.Path, versions: dict[str, Any], **load
    ):
        """Starts nothing; `versions` takes up what a `load` by its request tells."""
        self._runner = system, log_dir
        self._versions, self._load = versions, load

    def ask(self, command: str, *, timeout_s: float, **fields) -> dict:
        """Loads, then asks twice as `Runner.ask`: the first time warms up."""
        with contextlib.closing(Runner(*self._runner)) as runner:
            self._versions.update(runner.ask("load", **self._load))
            runner.ask(command, timeout_s=timeout_s, **fields)
            return runner.ask(command, timeout_s=timeout_s, **fields)

    def close(self) -> None:
        """Does nothing: between requests there is no process."""


@contextlib.contextmanager
def loaded(
    systems: Sequence[System],
    request: Row,
    timeout_s: float,
    *,
    one_at_a_time: bool = False,
) -> Iterator[tuple[dict[str, Runner | Visitor], dict[str, dict]]]:
    """Starts and loads systems by a request in turn; ends them all on leaving.

    With `one_at_a_time` each is loaded for its own requests only, see `Visitor`.

    Yields:
      The runners by name, and the versions that each reports, once it has.
    """
    runners: dict[str, Runner | Visitor] = {}
    versions: dict[str, dict] = {system.name: {} for system in systems}
    load = {"timeout_s": timeout_s, **request}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as closing:
        for system in systems:
            name, told = system.name, versions[system.name]
            if one_at_a_time:
                runners[name] = Visitor(system, pathlib.Path(folder), told, **load)
                continue
            print(f"Loading {name} ...", flush=True)
            runner = runners[name] = Runner(system, pathlib.Path(folder))
            closing.callback(runner.close)
            told.update(runner.ask("load", **load))
        yield runners, versions


def load(
    options: argparse.Namespace,
    request: Row,
    closing: contextlib.ExitStack,
    record: provenance.Provenance,
    **how,
) -> dict[str, Runner | Visitor]:
    """Loads the systems until the run ends, and records their versions."""
    systems = loaded(options.systems, request, LOAD_TIMEOUT_S, **how)
    runners, versions = closing.enter_context(systems)
    record.record["versions"] |= versions
    return runners


def systems_of(
    ours: str, script: str, peers: dict[str, str], options: argparse.Namespace
) -> list[System]:
    """Returns this package under this interpreter, and the peers asked for."""
    chosen = choose_peers(peers, options.peers, options.peer_python)
    return [System(ours, sys.executable, script), *chosen]


def run_paired(
    names: Sequence[str],
    cases: Sequence[Row],
    measure: Callable[[str, Row, int], Row | None],
    *,
    rounds: int,
    warmups: int,
) -> list[Row]:
    """Measures every system on every case, in turn, `rounds` times.

    Who goes first moves on by one each round. `measure`, of system, case and round,
    returns columns, or None where the system does not take the case. Rounds below zero
    are `warmups`, in which programs compile; they are not kept.

    Returns:
      One row per measurement: the case, `system`, `round`, `order`, `load_average`
      (of the whole machine, just before), and the measured columns.
    """
    rows = []
    for case in cases:
        for number in range(-warmups, rounds):
            shift = number % len(names)
            turn = [*names[shift:], *names[:shift]]
            for order, name in enumerate(turn):
                load_average = os.getloadavg()[0]
                measured = measure(name, case, number)
                if measured is None or number < 0:
                    continue
                about = {"system": name, "round": number, "order": order}
                about["load_average"] = round(load_average, 2)
                rows.append(row := case | about | measured)
                print(" ".join(f"{k}={tables.short(v)}" for k, v in row.items()))
    return rows


def summarise(
    rows: Sequence[Row],
    *,
    case_keys: Sequence[str],
    metrics: dict[str, str],
    reference: str,
) -> list[Row]:
    """Reduces rows of `run_paired` to one per case and system: medians, paired ratios.

    `case_keys` are the columns that make a case; of metrics `higher` or `lower` is
    better; ratios state the advantage of the reference.

    Returns:
      For each metric `<metric>/median`, `/min`, `/max`, and for systems other than
      the reference `<metric>/times`: the median, over the rounds both have, of how
      many times better the reference is (2.0: twice as fast), with `/times_min`.
    """
    groups = {
        key: {row["round"]: row for row in its}
        for key, its in tables.groups(rows, *case_keys, "system").items()
    }
    summary = []
    for key, by_round in groups.items():
        ours = groups.get((*key[:-1], reference), {})
        out: Row = dict(zip((*case_keys, "system"), key, strict=True))
        out["rounds"] = len(by_round)
        for metric, better in metrics.items():
            values = [r[metric] for r in by_round.values() if r[metric] is not None]
            if not values:
                continue
            what = f"{metric}/median", f"{metric}/min", f"{metric}/max"
            found = statistics.median(values), min(values), max(values)
            out |= zip(what, found, strict=True)
            pairs = [
                (ours[n][metric], row[metric])
                for n, row in by_round.items()
                if n in ours and None not in (ours[n][metric], row[metric])
            ]
            if key[-1] != reference and pairs:
                ratios = [a / b if better == "higher" else b / a for a, b in pairs]
                out[f"{metric}/times"] = statistics.median(ratios)
                out[f"{metric}/times_min"] = min(ratios)
        summary.append(out)
    return summary


def options_of(peers: dict[str, str]) -> tuple[experiment.Option, ...]:
    """Returns the options that all comparisons with peers share."""
    told = (
        ("peers", f"of {', '.join(peers)}; separated by commas"),
        ("peer-python", "name=interpreter, separated by commas"),
        ("model-dir", "made by experiments.peers.prepare_smollm2; peers need it"),
    )
    return tuple(
        experiment.Option(name, help=text, recorded=False) for name, text in told
    )


def model_request(options: argparse.Namespace) -> Row:
    """Returns the model that `--model-dir` names, as runners are told it.

    Raises:
      ValueError: peers are asked for and no directory is given.
    """
    if not options.model_dir:
        if options.peers:
            raise ValueError(
                f"--peers={options.peers} needs --model-dir=DIR: make it with python "
                "-m experiments.peers.prepare_smollm2."
            )
        return {"model": DEFAULT_MODEL, "gguf": ""}
    folder = pathlib.Path(options.model_dir).expanduser().resolve()
    return {"model": str(folder / "hf"), "gguf": str(folder / "model.f32.gguf")}


def choose_peers(known: dict[str, str], chosen: str, interpreters: str) -> list[System]:
    """Returns the peers asked for by `--peers` and `--peer-python`; says which are not.

    Where `interpreters` names none, a peer runs under this one.

    Raises:
      ValueError: a name is not known.
    """
    names = list(filter(None, chosen.split(",")))
    pythons = experiment.parse_pairs(interpreters, "peer-python")
    for argument, given in (("peers", names), ("peer-python", pythons)):
        if unknown := [name for name in given if name not in known]:
            raise ValueError(
                f"--{argument} names {', '.join(unknown)}; known here are "
                f"{', '.join(known)}."
            )
    if left_out := [name for name in known if name not in names]:
        print(f"Not compared (see --peers): {', '.join(left_out)}.")
    return [System(n, pythons.get(n, sys.executable), known[n]) for n in names]
