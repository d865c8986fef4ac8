"""Paired, interleaved runs of several systems, written with where they came from.

A system is a runner script (`experiments/peers/`) under its own interpreter: loaded
once, then asked in turn, A B C, B C A, ..., so that what else the machine does hits
all alike. One system computes at a time: the others are stopped by a signal. A
comparison is the median over rounds of the ratio within a round.
"""

import argparse
import collections.abc
import contextlib
import csv
import dataclasses
import datetime
import functools
import hashlib
import json
import os
import pathlib
import platform
import re
import shlex
import signal
import statistics
import subprocess
import sys
import threading
import time

from experiments.lab import freshness, machine, visitor

PEERS_DIR = pathlib.Path(__file__).parents[1] / "peers"
RESULTS_DIR = pathlib.Path(__file__).parents[1] / "results"

DEFAULT_MODEL = "smollm2-135m-instruct"  # as tlt_jax.models.formats.source names it
# `cpu` runs on two cores, `one_gpu` needs one accelerator, `paper` what the paper used.
SCALES = ("cpu", "one_gpu", "paper")

Row = dict[str, object]


@dataclasses.dataclass(frozen=True)
class System:
    """Something to measure.

    Attributes:
      name: as it stands in the tables.
      python: interpreter that has the system installed.
      script: runner, a file name in `experiments/peers/`.
    """

    name: str
    python: str
    script: str


class RunnerError(RuntimeError):
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


@contextlib.contextmanager
def loaded(
    systems: collections.abc.Sequence[System],
    log_dir: pathlib.Path,
    request: Row,
    timeout_s: float,
    *,
    one_at_a_time: bool = False,
) -> collections.abc.Iterator[tuple[dict[str, visitor.Runner], dict[str, dict]]]:
    """Starts and loads the systems one after the other; ends them all on leaving.

    Args:
      systems: to be measured.
      log_dir: of their logs.
      request: for `load`.
      timeout_s: for that.
      one_at_a_time: load each for its own requests only, see `visitor`.

    Yields:
      The runners by name, and the versions that each reports, once it has.
    """
    runners: dict[str, visitor.Runner] = {}
    versions: dict[str, dict] = {system.name: {} for system in systems}
    try:
        for system in systems:
            name = system.name
            if one_at_a_time:
                start = functools.partial(Runner, system, log_dir)
                runners[name] = visitor.Visitor(
                    start, request, timeout_s, versions[name]
                )
                continue
            print(f"Loading {name} ...", flush=True)
            runners[name] = Runner(system, log_dir)
            versions[name].update(
                runners[name].ask("load", timeout_s=timeout_s, **request)
            )
        yield runners, versions
    finally:
        for runner in runners.values():
            runner.close()


def our_system(name: str, script: str) -> System:
    """Returns this package under this interpreter, measured like any peer."""
    return System(name, sys.executable, script)


def run_paired(
    names: collections.abc.Sequence[str],
    cases: collections.abc.Sequence[Row],
    measure: collections.abc.Callable[[str, Row, int], Row | None],
    *,
    rounds: int,
    warmups: int,
    report: collections.abc.Callable[[str], None] = print,
) -> list[Row]:
    """Measures every system on every case, in turn, `rounds` times.

    Args:
      names: the systems; who goes first moves on by one each round.
      cases: what is measured; a case's items become columns.
      measure: `(name, case, round) -> columns`, or None where the system does not
        take the case. Rounds below zero are warm-up and are not kept.
      rounds: kept rounds per case.
      warmups: rounds before them, in which programs compile.
      report: takes a line of progress.

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
                row = {
                    **case,
                    "system": name,
                    "round": number,
                    "order": order,
                    "load_average": round(load_average, 2),
                    **measured,
                }
                rows.append(row)
                report(" ".join(f"{k}={_short(v)}" for k, v in row.items()))
    return rows


def summarise(
    rows: collections.abc.Sequence[Row],
    *,
    case_keys: collections.abc.Sequence[str],
    metrics: dict[str, str],
    reference: str,
) -> list[Row]:
    """Reduces rows to one per case and system: medians, ranges, paired ratios.

    Args:
      rows: of `run_paired`.
      case_keys: the columns that make a case.
      metrics: column -> `higher` or `lower`, whichever is better.
      reference: the system whose advantage the ratios state.

    Returns:
      For each metric `<metric>/median`, `/min`, `/max`, and for systems other than
      the reference `<metric>/times`: the median, over the rounds both have, of how
      many times better the reference is (2.0: twice as fast), with `/times_min`.
    """
    groups: dict[tuple, dict[int, Row]] = {}
    for row in rows:
        key = (*(row[k] for k in case_keys), row["system"])
        groups.setdefault(key, {})[row["round"]] = row
    summary = []
    for key, by_round in groups.items():
        ours = groups.get((*key[:-1], reference), {})
        out: Row = dict(zip((*case_keys, "system"), key, strict=True))
        out["rounds"] = len(by_round)
        for metric, better in metrics.items():
            values = [r[metric] for r in by_round.values() if r[metric] is not None]
            if not values:
                continue
            out[f"{metric}/median"] = statistics.median(values)
            out[f"{metric}/min"] = min(values)
            out[f"{metric}/max"] = max(values)
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


def format_table(rows: collections.abc.Sequence[Row]) -> str:
    """Lays rows out in aligned columns, missing entries as a dash."""
    names = _columns(rows)
    cells = [names] + [[_short(row.get(n)) for n in names] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    return "\n".join(
        "  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True))
        for line in cells
    )


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds what all experiments understand."""
    parser.add_argument("--scale", choices=SCALES, default=SCALES[0])
    parser.add_argument(
        "--out", type=pathlib.Path, help="folder of the tables; default results/<scale>"
    )


def folder_of(options: argparse.Namespace) -> pathlib.Path:
    """Returns where tables go."""
    return options.out or RESULTS_DIR / options.scale


def write_results(
    options: argparse.Namespace,
    slug: str,
    rows: collections.abc.Sequence[Row],
    summary: collections.abc.Sequence[Row],
    provenance: "Provenance",
) -> None:
    """Writes both tables with their provenance, and prints the summary."""
    write_csv(folder_of(options) / f"{slug}.csv", rows)
    provenance.write(folder_of(options) / f"{slug}.json")
    write_summary(options, slug, summary)


def write_summary(
    options: argparse.Namespace, slug: str, summary: collections.abc.Sequence[Row]
) -> None:
    """Writes the table that others are reduced to, and prints it."""
    write_csv(folder_of(options) / f"{slug}_summary.csv", summary)
    print(format_table(summary))


def write_csv(path: pathlib.Path, rows: collections.abc.Sequence[Row]) -> None:
    """Writes rows under the union of their columns, in order of appearance."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, _columns(rows), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


class Provenance:
    """What must be known to believe, or repeat, a table. Made before the runs."""

    def __init__(self, experiment: str, settings: Row, versions: dict[str, dict]):
        self._start = time.monotonic()
        self.record = {
            "experiment": experiment,
            "command": public_command(started_module(experiment), sys.argv[1:]),
            "commit": machine.git("rev-parse", "HEAD"),
            "uncommitted_changes": _is_changed(),
            "settings": settings,
            "config_hash": config_hash(settings),
            "source_hash": freshness.source_hash(experiment),
            "repeats": settings.get("rounds", settings.get("seeds", 1)),
            "device": machine.device_name(),
            "cpu_model": machine.cpu_model(),
            "num_cpus": os.cpu_count(),
            "platform": platform.platform(),
            "versions": {"python": platform.python_version(), **versions},
            "started_utc": datetime.datetime.now(datetime.UTC).isoformat(
                "T", "seconds"
            ),
            "load_average_before": os.getloadavg(),
        }

    def write(self, path: pathlib.Path) -> None:
        """Writes the record beside the table it belongs to."""
        wall_s = round(time.monotonic() - self._start, 1)
        self.record["wall_s"] = wall_s
        self.record["load_average_after"] = os.getloadavg()
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.record, indent=2) + "\n"
        path.write_text(text, encoding="utf-8")


def started_module(experiment: str) -> str:
    """Returns the experiment that was started: it may have started this one."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    folder, _, name = (spec.name if spec else "").rpartition(".")
    is_other = folder == __package__ and not name.startswith("__")
    return name if is_other else experiment


def public_command(experiment: str, arguments: collections.abc.Sequence[str]) -> str:
    """Returns the command line with every absolute path replaced by `PATH`."""
    told = [without_paths(argument) for argument in arguments]
    return shlex.join(["python", "-m", f"experiments.{experiment}", *told])


def without_paths(argument: str) -> str:
    """Replaces every absolute path of an argument by `PATH`."""
    return re.sub(r"(^|[=,])[/~][^,=]*", r"\1PATH", argument)


def config_hash(settings: Row) -> str:
    """Returns 12 hex digits that change with any setting."""
    text = json.dumps(settings, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def parse_pairs(text: str, argument: str) -> dict[str, str]:
    """Reads `name=value,name=value`.

    Raises:
      ValueError: an item has no `=`.
    """
    pairs = {}
    for item in filter(None, text.split(",")):
        name, sign, value = item.partition("=")
        if not sign or not value:
            raise ValueError(
                f"--{argument}={text}: {item!r} has no value; write name=value, "
                "items separated by commas."
            )
        pairs[name] = value
    return pairs


def argument_parser(text: str, peers: dict[str, str]) -> argparse.ArgumentParser:
    """Returns a parser with the options that all comparisons share.

    Args:
      text: the experiment's docstring.
      peers: peer -> runner script.
    """
    parser = argparse.ArgumentParser(
        description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser)
    parser.add_argument(
        "--peers", default="", help=f"of {', '.join(peers)}; separated by commas"
    )
    parser.add_argument(
        "--peer-python", default="", help="name=interpreter, separated by commas"
    )
    parser.add_argument(
        "--model-dir",
        default="",
        help="made by experiments.peers.prepare_smollm2; peers need it",
    )
    return parser


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
    """Returns the peers asked for; says which are not.

    Args:
      known: peer -> runner script.
      chosen: `--peers`, names separated by commas.
      interpreters: `--peer-python`, `name=path` items; the default is this one.

    Raises:
      ValueError: a name is not known.
    """
    names = list(filter(None, chosen.split(",")))
    pythons = parse_pairs(interpreters, "peer-python")
    for argument, given in (("peers", names), ("peer-python", pythons)):
        unknown = [name for name in given if name not in known]
        if unknown:
            raise ValueError(
                f"--{argument} names {', '.join(unknown)}; known here are "
                f"{', '.join(known)}."
            )
    left_out = [name for name in known if name not in names]
    if left_out:
        print(f"Not compared (see --peers): {', '.join(left_out)}.")
    return [System(n, pythons.get(n, sys.executable), known[n]) for n in names]


def _is_changed() -> bool:
    """Whether the code is another than the commit's; results are no code."""
    where = ("--", ":(top)", ":(top,exclude)experiments/results")
    return bool(machine.git("status", "--porcelain", "-uno", *where))


def _columns(rows: collections.abc.Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def _short(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
