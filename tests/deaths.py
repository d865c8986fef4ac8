"""Death campaign: `kill -9` of a run's processes, which goes on by itself.

    python -m tests.deaths --kills=100 [--executor=local] [--seed=0] [--within=30]

Every `--within` seconds at the latest one of the processes of a launched run is killed,
at moments that the seed names: one of the learner's and workers', which the launcher
begins again, or the launcher itself (the head), after which the same command is given
again. On a busy machine, where a start alone takes so long, let it be more: the table
says how many died after their world had begun to write its record, and not while it
started. Run after run, until so many were killed; every record, digest and array must
be those of a run that nobody has touched. Ends with status 1 where one differs.
Linux only.
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

from tests import kills, run_facts
from tlt_jax.workdir import metrics

ROOT = pathlib.Path(__file__).resolve().parents[1]
# Nobody counts how often: what does not get through takes too long instead.
_OWN = ("--processes=2", "--restarts=1000")
_SETTINGS = {
    # So that one run, whose starts take longer than its steps, has room for many.
    "num_steps": 60,
    "mesh.data": -1,
    "checkpoint.every": 3,
    "eval.every": 20,
    "eval.num_prompts": 4,
    "log.plots_every": 0,
    "pretrain.steps": 150,
}
# Programs of this size take no time to compile, but there are many.
_VARIABLES = {"JAX_PLATFORMS": "cpu", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
_LONGEST_S = 3600.0
# Which worker takes what, and so how many steps the same tokens take, clocks decide.
_IGNORED = kills.KINDS["processes"].ignored


def command(directory: pathlib.Path, executor: str) -> list[str]:
    """Returns the command line of a launched run."""
    flags = [f"--config.{name}={value}" for name, value in _SETTINGS.items()]
    own = [sys.executable, "-m", "tlt_jax.launch", f"--executor={executor}", *_OWN]
    config = f"--config={ROOT / 'tests' / 'tiny_runs.py'}"
    return [*own, "--", config, f"--workdir={directory}", *flags]


def members(directory: pathlib.Path) -> dict[int, int]:
    """Returns the numbers of a run's processes by their place in it."""
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
                name, _, value = variable.partition(b"=")
                if name == b"TLT_JAX_PROCESS":
                    found[int(value)] = int(folder.name)
    return found


class Campaign:
    """Runs with deaths, and the one without.

    Attributes:
      count: deaths by who died.
      num_late: of them, after the world had begun to write its record.
      num_starts: of the command.
    """

    def __init__(self, executor: str, seed: int, within_s: float, folder: pathlib.Path):
        """Begin; `folder` is empty."""
        self._executor, self._rng = executor, random.Random(seed)
        self._folder, self._within_s = folder, within_s
        self.count: collections.Counter[str] = collections.Counter()
        self.num_late = self.num_starts = 0
        self._written_s = 0.0

    def alone(self) -> dict:
        """Returns the facts of a run that nobody touches."""
        directory = self._folder / "untouched"
        self._finish(self._start(directory))
        return run_facts.of(directory)

    def run(self, name: str, num_kills: int) -> dict:
        """Returns the facts of a run with so many deaths, or fewer: it ends."""
        directory, until = self._folder / name, time.monotonic() + _LONGEST_S
        started, begun = self._start(directory), self.count.total()
        self._written_s = time.time()
        while self.count.total() - begun < num_kills:
            due = time.monotonic() + self._rng.uniform(0.0, self._within_s)
            while time.monotonic() < due and started.poll() is None:
                time.sleep(0.02)
            if started.poll() is not None:
                break
            if time.monotonic() > until:
                os.killpg(started.pid, signal.SIGKILL)
                raise TimeoutError(f"{directory} is not through.")
            who = self._rng.choice(["process 0", "process 1", "head"])
            if who == "head":
                started.kill()
                started.wait()
                self._note(who, directory)
                started = self._start(directory)
            elif pid := members(directory).get(int(who[-1])):
                os.kill(pid, signal.SIGKILL)
                self._note(who, directory)
        self._finish(started)
        return run_facts.of(directory)

    def _note(self, who: str, directory: pathlib.Path) -> None:
        """Counts a death."""
        self.count[who] += 1
        record = directory / metrics.FILE
        written_s = record.stat().st_mtime if record.exists() else 0.0
        self.num_late += written_s > self._written_s
        self._written_s = time.time()

    def _start(self, directory: pathlib.Path) -> subprocess.Popen:
        self.num_starts += 1
        with open(f"{directory}.txt", "ab") as output:
            return subprocess.Popen(
                command(directory, self._executor),
                cwd=ROOT,
                env=os.environ | _VARIABLES,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )

    def _finish(self, started: subprocess.Popen) -> None:
        if started.wait(_LONGEST_S):
            raise RuntimeError(f"ended with status {started.returncode}.")


def main() -> int:
    """Runs the campaign; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.deaths")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--executor", default="local")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--within", type=float, default=30.0)
    options = parser.parse_args()
    folder = pathlib.Path(tempfile.mkdtemp(prefix="tlt_jax_deaths_"))
    campaign = Campaign(options.executor, options.seed, options.within, folder)
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
