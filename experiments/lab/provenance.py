"""What must be known to believe, or to repeat, a table: command, code, machine.

A table is stale where what its experiment measures is another by now. A reviewed change
that alters no measured value may be *carried*: the record then names both hashes, the
commit and the reason (`python -m experiments carry SLUG --why=TEXT`).
"""

import collections
import datetime
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.lab import freshness

# Of what computes; those that are not installed are left out.
_PACKAGES = (
    *("jax", "jaxlib", "numpy", "llvmlite", "optax", "orbax-checkpoint"),
    *("tensorstore", "libtpu"),
)
_CODE = ("--", ":(top)", ":(top,exclude)experiments/results")
# What a later run tells that adds to a table.
_OF_CODE = ("commit", "uncommitted_changes", "device", "cpu_model")
_OF_A_RUN = ("command", *_OF_CODE, "started_utc")

FRESH, STALE, PARTIAL, UNDATED, UNRUN = "fresh stale partial undated unrun".split()
CARRIED = "fresh (carried)"


class Provenance:
    """The record beside a table. Made before the runs."""

    def __init__(self, experiment: str, settings: Mapping[str, object]):
        self._start = time.monotonic()
        now = datetime.datetime.now(datetime.UTC)
        program = ["python", "-m", f"experiments.{started_module(experiment)}"]
        self.record = {
            "experiment": experiment,
            "command": shlex.join([*program, *map(without_paths, sys.argv[1:])]),
            "commit": git("rev-parse", "HEAD"),
            # Results are no code.
            "uncommitted_changes": bool(git("status", "--porcelain", "-uno", *_CODE)),
            "settings": dict(settings),
            "config_hash": config_hash(settings),
            "source_hash": freshness.source_hash(experiment),
            "repeats": settings.get("rounds", settings.get("seeds", 1)),
            "device": device_name(),
            "cpu_model": cpu_model(),
            "num_cpus": os.cpu_count(),
            "platform": platform.platform(),
            "versions": {"python": platform.python_version(), **_versions()},
            "started_utc": now.isoformat("T", "seconds"),
            "load_average_before": os.getloadavg(),
        }
        # What the seconds of this run are written into.
        self._timed = self.record

    def read_from(self, paths: Sequence[pathlib.Path]) -> None:
        """Notes of tables that were read whose they are."""
        sources = []
        for path in paths:
            if told := read(path.parent, path.stem):
                sources += [_named(told, run) for run in _runs(told)]
        if sources:
            self.record["sources"] = sources

    def resume(self, stored: Mapping[str, object], cells: Sequence[str]) -> None:
        """Goes on with a stored record; notes in it the cells that this run adds."""
        added = {name: self.record[name] for name in _OF_A_RUN} | {"cells": cells}
        before = stored.get("continued", [])
        self.record, self._timed = dict(stored), added
        if cells:
            self.record["continued"] = [*before, added]

    def write(self, path: pathlib.Path) -> None:
        """Writes the record beside the table it belongs to."""
        self._timed["wall_s"] = round(time.monotonic() - self._start, 1)
        self._timed["load_average_after"] = os.getloadavg()
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.record, indent=2) + "\n"
        path.write_text(text, encoding="utf-8")


def status(slug: str, folder: pathlib.Path, table: str = "") -> str:
    """Tells of a table: fresh (carried or not), stale, partial, undated or unrun.

    The table is `<slug>.csv` where no other file is named.
    """
    if not (folder / (table or f"{slug}.csv")).exists():
        return UNRUN
    record = read(folder, slug)
    if "source_hash" not in record:
        return UNDATED
    current = freshness.source_hash(slug)
    if not is_current(record, current):
        return STALE
    cells = record.get("cells", {"done": 0, "wanted": 0})
    if cells["done"] < cells["wanted"]:
        return PARTIAL
    return FRESH if record["source_hash"] == current else CARRIED


def read(folder: pathlib.Path, slug: str) -> dict[str, Any]:
    """Reads an experiment's record; empty: there is none."""
    path = folder / f"{slug}.json"
    return json.loads(path.read_text("utf-8")) if path.exists() else {}


def is_current(record: Mapping, current: str) -> bool:
    """Tells whether a record's table is of the current hash, or was carried to it."""
    reached = record.get("source_hash")
    for step in record.get("carried", ()):
        if reached == current or step["from"] != reached:
            break
        reached = step["to"]
    return reached == current


def carry(slug: str, folder: pathlib.Path, commit: str | None, why: str) -> str:
    """Says of a stale table that what changed up to a commit alters nothing in it.

    Returns what became of it, in words.

    Raises:
      ValueError: there is no record with a hash, or no reason is given.
    """
    if not why.strip():
        raise ValueError(
            'carry needs --why="...": what shows that nothing measured changes.'
        )
    path, record = folder / f"{slug}.json", read(folder, slug)
    if "source_hash" not in record:
        raise ValueError(
            f"{path.name} tells no source_hash in {folder.name}: measure {slug} first."
        )
    current = freshness.source_hash(slug)
    if is_current(record, current):
        return "needs no carrying"
    steps = record.setdefault("carried", [])
    last = steps[-1]["to"] if steps else record["source_hash"]
    steps.append({"from": last, "to": current, "commit": commit, "why": why})
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return f"carried from {last} to {current}"


def _runs(record: Mapping) -> list[Mapping]:
    """Lists the run that began a table, and those that went on with it."""
    return [record, *record.get("continued", ())]


def _named(record: Mapping, run: Mapping) -> dict[str, object]:
    return {"experiment": record["experiment"]} | {name: run[name] for name in _OF_CODE}


def wall_minutes(record: Mapping) -> float:
    """Adds up the minutes of all runs that made a table."""
    return sum(run.get("wall_s", 0.0) for run in _runs(record)) / 60


def stamp(record: Mapping, *, is_read: bool = False) -> str:
    """Returns the line that says where rows come from: scale, machines, commits.

    Of all runs that added to them, and of the tables that they were computed from;
    `is_read`: of these alone, where there are any, since nothing else was measured.
    """
    scale = re.search(r"--scale=(\w+)", str(record.get("command")))
    return f"scale {scale[1] if scale else 'cpu'} · {_places(record, is_read)}"


def caption(record: Mapping) -> str:
    """Returns the line that says under a table where its rows come from."""
    return f"{_places(record, False)} · {str(record['started_utc'])[:10]}"


def _places(record: Mapping, is_read: bool) -> str:
    sources = record.get("sources", [])
    runs = [*sources] if is_read and sources else [*_runs(record), *sources]
    commits: dict[str, dict[str, None]] = {}
    for run in runs:
        commits.setdefault(machine(run), {})[_commit(run)] = None
    places = [f"{name} · {_short(list(found))}" for name, found in commits.items()]
    several = f"{len(places)} machines: " if len(places) > 1 else ""
    return several + "; ".join(places)


def machine(run: Mapping) -> str:
    """Names what a run computed on."""
    device = str(run["device"])
    return str(run.get("cpu_model") or device) if device == "cpu" else device


def _commit(run: Mapping) -> str:
    commit = str(run.get("commit") or "")[:8] or "no commit"
    return commit + ("+" if run.get("uncommitted_changes") else "")


def _short(commits: Sequence[str]) -> str:
    if len(commits) < 4:
        return ", ".join(commits)
    return f"{commits[0]} and {len(commits) - 1} others"


def started_module(experiment: str) -> str:
    """Returns the experiment that was started: it may have started this one."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    folder, _, name = (spec.name if spec else "").rpartition(".")
    is_other = folder == freshness.FOLDER.name and not name.startswith("__")
    return name if is_other else experiment


def without_paths(argument: str) -> str:
    """Replaces every absolute path of an argument by `PATH`."""
    return re.sub(r"(^|[=,])[/~][^,=]*", r"\1PATH", argument)


def settings_without_paths(settings: Mapping[str, str]) -> dict[str, str]:
    """Replaces every absolute path of settings by `PATH`."""
    return {key: without_paths(value) for key, value in settings.items()}


def config_hash(settings: Mapping[str, object]) -> str:
    """Returns 12 hex digits that change with any setting."""
    return digest(json.dumps(settings, sort_keys=True))


def digest(text: str) -> str:
    """Returns 12 hex digits of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def device_name() -> str:
    """Names what programs compute on here, without taking hold of it."""
    if os.environ.get("JAX_PLATFORMS", "") == "cpu":
        return "cpu"
    if shutil.which("nvidia-smi"):
        told = _told("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")
        names = collections.Counter((told or "").splitlines())
        if names:
            return ", ".join(f"{num} x {name}" for name, num in names.items())
    if chips := os.environ.get("TPU_ACCELERATOR_TYPE"):
        return f"TPU {chips}"
    return "cpu"


def cpu_model() -> str:
    """Returns the processor's own name, where the system tells it."""
    info = pathlib.Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def git(*arguments: str) -> str | None:
    """Returns what git says of this checkout; None: it is none."""
    return _told("git", *arguments)


def _told(*command: str) -> str | None:
    where = {"cwd": pathlib.Path(__file__).parent, "capture_output": True, "text": True}
    try:
        done = subprocess.run(command, check=True, **where)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _versions() -> dict[str, str]:
    found = {name: version_of(name) for name in _PACKAGES}
    return {name: version for name, version in found.items() if version}


def version_of(package: str) -> str | None:
    """Returns the version of an installed package; None: it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
