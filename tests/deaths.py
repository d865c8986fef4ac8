"""Death campaign: `kill -9` of a run's processes, which goes on by itself.

    python -m tests.deaths --kills=100 [--executor=local|ray] [--placement=colocated]
        [--seed=0]

One launched run has a learner of two processes, and with `--placement=separate`, the
default, two rollout workers and a reward worker beside it. Again and again one of them
is killed, which the launcher begins again, or the launcher itself (the head), after
which the same command is given again; by the seed either within what the start of the
one before may take, or some records later. So no time is spent on waiting, and a busy
machine is waited for. Every record, digest and array must be those of a run that nobody
has touched. Ends with status 1 where one differs. Linux only.
"""

import argparse
import collections
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from typing import Any

from tests import kills, run_facts
from tlt_jax.runtime import distributed
from tlt_jax.workdir import metrics

ROOT = pathlib.Path(__file__).resolve().parents[1]
# Nobody counts how often: what does not get through takes too long instead.
_OWN = ("--processes=2", "--restarts=1000", "--cpus_per_process=0.2")
_SETTINGS = {
    "mesh.data": -1,
    "checkpoint.every": 3,
    "eval.every": 50,
    "eval.num_prompts": 4,
    "log.plots_every": 0,
    "pretrain.steps": 150,
}
_SEPARATE = {
    "workers.placement": "separate",
    "workers.num": 2,
    "reward.placement": "separate",
    "reward.workers": 1,
}
PLACEMENTS = {"colocated": {}, "separate": _SEPARATE}
# How a process is told who it is.
_NAMES = {
    distributed.PROCESS: "process",
    distributed.WORKER: "rollout worker",
    distributed.REWARD_WORKER: "reward worker",
}
HEAD = "head"
# So many records come between two deaths at most, and so many of the deaths, one of so
# many, come before there is another record.
_MOST_RECORDS, _ONE_OF = 3, 3
# Programs of this size take no time to compile, but there are many.
_VARIABLES = {"JAX_PLATFORMS": "cpu", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
# A run that writes nothing for so long does not go on.
_LONGEST_S = 1800.0
# Which worker takes what, and so how many steps the same tokens take, clocks decide.
_IGNORED = kills.KINDS["processes"].ignored


def command(
    directory: pathlib.Path, executor: str, settings: Mapping[str, Any]
) -> list[str]:
    """Returns the command line of a launched run."""
    flags = [f"--config.{name}={value}" for name, value in settings.items()]
    own = [sys.executable, "-m", "tlt_jax.launch", f"--executor={executor}", *_OWN]
    config = f"--config={ROOT / 'tests' / 'tiny_runs.py'}"
    return [*own, "--", config, f"--workdir={directory}", *flags]


def members(directory: pathlib.Path) -> dict[str, int]:
    """Returns the numbers of a run's processes by what they are: `process 0`, ..."""
    found = {}
    for folder in pathlib.Path("/proc").iterdir():
        if not folder.name.isdecimal():
            continue
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            variables = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if f"--workdir={directory}".encode() in words and b"tlt_jax.main" in words:
            for variable in variables:
                name, _, value = variable.decode(errors="replace").partition("=")
                if name in _NAMES:
                    found[f"{_NAMES[name]} {value}"] = int(folder.name)
    return found


class Campaign:
    """Runs with deaths, and the one without.

    Attributes:
      count: deaths by who died.
      num_late: of them, after the world had written to its record.
      num_starts: of the command.
    """

    def __init__(
        self, executor: str, placement: str, num_kills: int, seed: int, folder
    ):
        """Begin; `folder` is empty, and one run is long enough for all deaths."""
        self._executor, self._rng, self._folder = executor, random.Random(seed), folder
        # There are two steps for each death on average, and the evaluations.
        steps = {"num_steps": max(20, 2 * num_kills)}
        self._settings = _SETTINGS | PLACEMENTS[placement] | steps
        self._victims = [HEAD, "process 0", "process 1"]
        if placement == "separate":
            self._victims += ["rollout worker 0", "rollout worker 1", "reward worker 0"]
        self.count: collections.Counter[str] = collections.Counter()
        self.num_late = self.num_starts = 0
        # What the last start has taken, to its first record.
        self._start_s = 10.0

    def alone(self) -> dict:
        """Returns the facts of a run that nobody touches."""
        directory = self._folder / "untouched"
        self._finish(self._start(directory))
        return run_facts.of(directory)

    def run(self, name: str, num_kills: int) -> dict:
        """Returns the facts of a run with so many deaths, or fewer: it ends."""
        directory, began = self._folder / name, self.count.total()
        started = self._start(directory)
        while self.count.total() - began < num_kills:
            num_written = self._wait(directory, started)
            if started.poll() is not None:
                break
            who = self._rng.choice(self._victims)
            if who == HEAD:
                started.kill()
                started.wait()
                started = self._start(directory)
            elif pid := members(directory).get(who):
                os.kill(pid, signal.SIGKILL)
            else:
                # It is dead already.
                continue
            self.count[who] += 1
            self.num_late += num_written > 0
            if not self.count.total() % 10:
                print(f"{self.count.total()} deaths", flush=True)
        self._finish(started)
        return run_facts.of(directory)

    def _wait(self, directory: pathlib.Path, started: subprocess.Popen) -> int:
        """Waits until the next is to die; returns how often the record was written."""
        record, began_s = directory / metrics.FILE, time.monotonic()
        wanted = 1 + self._rng.randrange(_MOST_RECORDS)
        if not self._rng.randrange(_ONE_OF):
            wanted = 0
        # At any moment of a start, or of a step.
        part = self._rng.random()
        due_s = began_s + part * self._start_s if not wanted else None
        written, times = _written(record), []
        while started.poll() is None:
            now_s = time.monotonic()
            if now_s - began_s > _LONGEST_S:
                os.kill(started.pid, signal.SIGKILL)
                raise TimeoutError(f"{directory} does not go on.")
            if (found := _written(record)) != written:
                written = found
                times.append(now_s)
                if len(times) == 1:
                    self._start_s = now_s - began_s
                if len(times) == wanted:
                    step_s = times[-1] - times[-2] if wanted > 1 else 0.5
                    due_s = now_s + part * step_s
            if due_s is not None and now_s >= due_s:
                break
            time.sleep(0.01)
        return len(times)

    def _start(self, directory: pathlib.Path) -> subprocess.Popen:
        self.num_starts += 1
        with open(f"{directory}.txt", "ab") as output:
            return subprocess.Popen(
                command(directory, self._executor, self._settings),
                cwd=ROOT,
                env=os.environ | _VARIABLES,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )

    def _finish(self, started: subprocess.Popen) -> None:
        if started.wait(_LONGEST_S):
            raise RuntimeError(f"ended with status {started.returncode}.")


def _written(record: pathlib.Path) -> int:
    """Returns when a record was written last, in nanoseconds; 0: never."""
    try:
        return record.stat().st_mtime_ns
    except OSError:
        return 0


def main() -> int:
    """Runs the campaign; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.deaths")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--executor", default="local")
    parser.add_argument("--placement", choices=sorted(PLACEMENTS), default="separate")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    folder = pathlib.Path(tempfile.mkdtemp(prefix="tlt_jax_deaths_"))
    how = options.executor, options.placement, options.kills, options.seed
    campaign = Campaign(*how, folder)
    started, num_runs, problems = time.monotonic(), 0, []
    wanted = campaign.alone()
    while campaign.count.total() < options.kills and not problems:
        num_runs += 1
        left = options.kills - campaign.count.total()
        found = campaign.run(f"run {num_runs}", left)
        problems = run_facts.differences(found, wanted, _IGNORED)
        told = ", ".join(f"{who} {n}" for who, n in sorted(campaign.count.items()))
        print(f"after run {num_runs}: {told}; {len(problems)} differences", flush=True)
    names = " | ".join(sorted(campaign.count))
    print(f"| executor | {names} | not in a start | runs | minutes | equal |")
    counts = " | ".join(str(n) for _, n in sorted(campaign.count.items()))
    minutes = (time.monotonic() - started) / 60
    equal = "no" if problems else "yes"
    counts = f"{counts} | {campaign.num_late} | {num_runs} | {minutes:.0f}"
    print(f"| {options.executor} | {counts} | {equal} |")
    if problems:
        print("\n".join([f"DIFFERENT, see {folder}:", *problems[:20]]))
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
