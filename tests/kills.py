"""Kill campaign: runs are killed, resumed, and compared with one that was not.

    python -m tests.kills --cycles=300 [--seed=0] [--kinds=off,tlt]

A cycle is a run that is killed once or more at moments which its seed names, and then
goes through by the same command. Every digest, record and file of it must be that of an
uninterrupted run; no process outlives it. Ends with status 1 where one differs, and
says which command repeats it. Linux only.
"""

import argparse
import collections
import dataclasses
import json
import os
import pathlib
import random
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

if __name__ == "__main__":
    # Before jax is imported: one device, and programs that need not be fast.
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
    os.environ["HF_HUB_OFFLINE"] = "1"
    _cache = pathlib.Path(tempfile.gettempdir()) / f"tlt_jax_tests_{os.getuid()}"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_cache))
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

from tests import killed_starts, run_facts  # noqa: E402 (they import jax)

NUM_STEPS = 6
ROOT = pathlib.Path(__file__).resolve().parents[1]
_COMMON = {
    "num_steps": NUM_STEPS,
    "log.plots_every": 0,
    "eval.every": 4,
    "eval.num_prompts": 4,
    # Some of what it then says is right.
    "pretrain.steps": 150,
    "specdec.tuner": "static",
}
_TLT = {
    "specdec.mode": "tlt",
    "drafter.features": "last",
    "adaptation.row_tokens": 32,
    "adaptation.row_bases": 16,
    "adaptation.num_rows": 2,
    "adaptation.head_chunk": 16,
    "specdec.strategies": "1:D2K1V3",
}
# With one worker the drafter, too, is then a function of the settings.
_COUNTED = {
    "workers.num": 1,
    "adaptation.max_steps": 2,
    "specdec.ngram_strategies": "",
}
_EXPERTS = {
    "pretrain.num_experts": 4,
    "pretrain.experts_per_token": 2,
    "pretrain.d_ff": 32,
    "learner.load_balancing_coef": 1e-2,
}
_SAVE = "tlt_jax.workdir.state:RunState.save"
_MOMENTS = {
    "startup": ("", 1),
    "anywhere": ("", 1),
    "model making": ("tlt_jax.rl.tasks.scratch_model:train", 1),
    "model writing": ("tlt_jax.models.formats.convert:save", 1),
    "assembly": ("tlt_jax.assembly:assemble", 1),
    "rollout": ("tlt_jax.rl.collector:Collector.collect", NUM_STEPS),
    "decoding": ("tlt_jax.rl.engine.engine:Engine._decode_call", 4 * NUM_STEPS),
    "reward": ("tlt_jax.rl.tasks.reward_pool:RewardPool.gather", NUM_STEPS),
    "update": ("tlt_jax.rl.update.updater:Updater.update", NUM_STEPS),
    "sync": ("tlt_jax.rl.workers.weight_sync:WeightSync.sync", NUM_STEPS + 1),
    "evaluation": ("tlt_jax.rl.evaluator:Evaluator.evaluate", 2),
    "record": ("tlt_jax.workdir.metrics:MetricsWriter.write", NUM_STEPS + 1),
    "rollouts file": ("tlt_jax.workdir.directory:write_rollouts", NUM_STEPS),
    "renaming": ("pathlib:Path.replace", 2 + NUM_STEPS),
    "checkpoint": (_SAVE, NUM_STEPS // 2),
    "checksums": ("tlt_jax.workdir.checksums:write", NUM_STEPS // 2),
    "folder renaming": ("os:rename", NUM_STEPS),
    "end": ("tlt_jax.train:Trainer.finish", 1),
}
_DRAFTER_MOMENTS = {
    "drafter training": ("tlt_jax.rl.adaptation.learner:DrafterLearner.step", 6),
    "drafter checkpoint": (
        "tlt_jax.workdir.drafter_checkpoint:DrafterCheckpointer.save",
        NUM_STEPS // 2,
    ),
}
# Of these moments nothing is known beforehand: the model must be made.
_FROM_NOTHING = ("startup", "model making", "model writing", "assembly")
# Delays after a moment, in seconds: at once, or within what comes next.
_DELAYS_S = (0.0, 0.003, 0.03, 0.1)


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of run.

    Attributes:
      settings: by dotted key.
      processes: that divide it.
      ignored: names of facts that clocks decide, as a regular expression.
    """

    settings: Mapping[str, Any]
    processes: int = 1
    ignored: str = ""

    @property
    def moments(self) -> dict[str, tuple[str, int]]:
        """Where it can be killed: what is entered, and how often."""
        learned = "adaptation.row_tokens" in self.settings
        return _MOMENTS | (_DRAFTER_MOMENTS if learned else {})


# Where workers train beside others, clocks decide how far the drafter gets, and with
# it in which and how many steps the same tokens are decoded: their log-probabilities
# are rounded differently (1e-7), of which the policy sees nothing.
_CLOCKS = (
    r"row \d+ mismatch/logprob_|"
    r"row \d+ (drafter|specdec|workers)/|row \d+ rollout/(decode_steps|row_steps|"
    r"prefill|preempted)|row \d+ eval/num_steps|rollouts \d+ drafted|"
    r"drafter_checkpoints/"
)
KINDS = {
    "off": Kind(_COMMON | {"reward.workers": 1}),
    "lag": Kind(_COMMON | {"reward.workers": 1, "rollout.lag": 1}),
    "lag-tlt": Kind(
        _COMMON | _TLT | _COUNTED | {"rollout.lag": 2},
        ignored=r"row \d+ drafter/(budget|gain)",
    ),
    "ngram": Kind(
        _COMMON
        | {
            "specdec.mode": "ngram",
            "specdec.ngram_strategies": "4:D2K1V3-ngram",
        }
    ),
    "tlt": Kind(
        _COMMON | _TLT | _COUNTED,
        ignored=r"row \d+ drafter/(budget|gain)",
    ),
    # Tokens hang on the drafter's weights, which are so used from the second step on:
    # under another law than the plain one nothing is measured before.
    "block": Kind(
        _COMMON
        | _TLT
        | _COUNTED
        | {
            "specdec.rule": "block",
            "specdec.strategies": "4:D2K1V3",
            "sampling.temperature": 0.9,
        },
    ),
    "experts": Kind(
        _COMMON | _TLT | _COUNTED | _EXPERTS,
        ignored=r"row \d+ drafter/(budget|gain)",
    ),
    "tlt-2": Kind(
        _COMMON | _TLT | {"workers.num": 2, "mesh.data": 2, "rollout.max_batch": 2},
        ignored=_CLOCKS,
    ),
    "processes": Kind(
        _COMMON | _TLT | {"mesh.data": -1, "rollout.max_batch": 2},
        processes=2,
        ignored=_CLOCKS,
    ),
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is done to one run, a function of its kind and seed.

    Attributes:
      kills: each with the name of its moment, in order.
      keeps_model: the model is there before the first start.
      grace_s: see `checkpoint.grace_s`.
    """

    kills: tuple[tuple[str, killed_starts.Kill], ...]
    keeps_model: bool
    grace_s: float


def plan(name: str, seed: int, whole_s: float) -> Plan:
    """Makes a plan; seeds that follow each other go through the moments.

    `whole_s` is what an uninterrupted run takes.
    """
    kind, rng = KINDS[name], random.Random(f"{name} {seed}")
    moments = list(kind.moments)
    names = [moments[seed % len(moments)]]
    while rng.random() < 0.25 and len(names) < 3:
        names.append(rng.choice(moments))
    kills = []
    for moment in names:
        where, most = kind.moments[moment]
        if where:
            delay_s = rng.random() * rng.choice(_DELAYS_S)
        else:
            delay_s = rng.random() * whole_s * (0.25 if moment == "startup" else 1.0)
        kill = killed_starts.Kill(
            rng.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM)),
            where,
            rng.randint(1, most),
            delay_s,
            rng.randrange(kind.processes),
        )
        kills.append((moment, kill))
    keeps_model = names[0] not in _FROM_NOTHING
    return Plan(tuple(kills), keeps_model, rng.choice((15.0, 15.0, 0.0)))


def words(kind: Kind, directory: pathlib.Path, **more: Any) -> list[str]:
    """Returns the command line of a run."""
    given = {"--config": ROOT / "tests" / "tiny_runs.py", "--workdir": directory}
    settings = dict(kind.settings) | more
    given |= {f"--config.{key}": value for key, value in settings.items()}
    flags = [f"{key}={value}" for key, value in given.items()]
    if kind.processes == 1:
        return ["tlt_jax.main", *flags]
    # What is killed is to end, so that a start after it is one that is counted.
    own = [f"--processes={kind.processes}", "--restarts=0"]
    return ["tlt_jax.launch", *own, "--", *flags]


class Campaign:
    """The uninterrupted runs, and what is compared with them.

    Attributes:
      count: by kind and moment: kills, kills that were followed by a start which went
        on where the newest checkpoint says, and those whose run was equal at last.
      failures: what differed, in words.
    """

    def __init__(self, folder: pathlib.Path, without: str = ""):
        """Works below `folder`; resumed runs leave out the method `without`."""
        self._folder, self._without = folder, without
        self._wanted: dict[str, tuple[float, dict[str, Any]]] = {}
        self.count: dict[tuple[str, str], collections.Counter] = {}
        self.failures: list[str] = []

    def prepare(self, name: str) -> None:
        """Makes the run that others of its kind are compared with.

        Twice, unless a loss is shown: it is equal to itself.
        """
        made = []
        for number in range(1 if self._without else 2):
            folder = self._new(f"{name}-whole-{number}")
            directory = folder / "run"
            ended = killed_starts.start(words(KINDS[name], directory), folder)
            if ended.status or ended.survivors:
                output = (folder / "output.txt").read_text()
                raise RuntimeError(f"a run of kind {name} failed: {ended}\n{output}")
            made.append((ended.seconds, self._facts(folder)))
        problems = run_facts.differences(made[-1][1], made[0][1], KINDS[name].ignored)
        if problems:
            self._fail(f"{name}: two uninterrupted runs differ", problems)
        self._wanted[name] = made[-1]
        rewards = [v for k, v in made[-1][1].items() if k.endswith(" reward/mean")]
        print(
            f"{name}: a whole run takes {made[-1][0]:.1f} s; mean reward "
            f"{sum(rewards) / len(rewards):.2f}",
            flush=True,
        )

    def cycle(self, name: str, seed: int) -> None:
        """Kills and resumes one run."""
        kind, (whole_s, wanted) = KINDS[name], self._wanted[name]
        planned = plan(name, seed, whole_s)
        folder = self._new(f"{name}-{seed}")
        directory = folder / "run"
        if planned.keeps_model:
            source = self._folder / f"{name}-whole-0" / "run" / "initial_model"
            shutil.copytree(source, directory / "initial_model")
        command = words(kind, directory, **{"checkpoint.grace_s": planned.grace_s})
        problems, done = [], []
        for moment, kill in (*planned.kills, ("through", None)):
            before = first_rollout(*_newest(directory))
            without = self._without if done else ""
            ended = killed_starts.start(command, folder, kill, without)
            if ended.survivors:
                problems.append(f"outlived its run: {'; '.join(ended.survivors)}")
            if ended.began not in (None, before):
                problems.append(
                    f"began with the rollout of step {ended.began}, and {before} is "
                    "what the checkpoint lacks"
                )
            elif done and ended.began is not None:
                for one in done:
                    one["resumed"] = True
            if kill is not None and ended.status != 0:
                done.append({"moment": moment, "resumed": False})
                problems += _wrong_status(kind, kill, ended)
            elif ended.status != 0:
                problems.append(f"the last start ended with status {ended.status}")
        if not problems or "status" not in problems[-1]:
            problems += run_facts.differences(self._facts(folder), wanted, kind.ignored)
        for one in done:
            count = self.count.setdefault((name, one["moment"]), collections.Counter())
            count.update(kills=1, resumed=int(one["resumed"]), equal=int(not problems))
        if problems:
            told = ", ".join(str(kill) for _, kill in planned.kills)
            again = f"python -m tests.kills --cycles=1 --seed={seed} --kinds={name}"
            self._fail(f"{name}: {told} (see {folder}; {again})", problems)
        else:
            shutil.rmtree(folder)

    def _facts(self, folder: pathlib.Path) -> dict[str, Any]:
        output = folder / "facts.json"
        status = killed_starts.in_child(
            lambda: output.write_text(json.dumps(run_facts.of(folder / "run"))),
            folder / "output.txt",
        )
        if status:
            text = (folder / "output.txt").read_text()
            return {"left over": [f"no facts:\n{text[-2000:]}"]}
        return json.loads(output.read_text())

    def _new(self, name: str) -> pathlib.Path:
        folder = self._folder / name
        folder.mkdir()
        return folder

    def _fail(self, what: str, problems: Sequence[str]) -> None:
        lines = [what, *(f"  {line}" for line in problems[:20])]
        if len(problems) > 20:
            lines.append(f"  and {len(problems) - 20} more")
        self.failures.append("\n".join(lines))
        print(f"DIFFERENT {self.failures[-1]}", flush=True)

    def table(self) -> str:
        """Returns the count, a line for each kind and moment."""
        lines = [
            "| kind | moment | kills | resumed | equal |",
            "| --- | --- | --- | --- | --- |",
        ]
        total = collections.Counter()
        for (kind, moment), count in sorted(self.count.items()):
            total.update(count)
            lines.append(_line(kind, moment, count))
        return "\n".join([*lines, _line("all", "", total)])


def _line(kind: str, moment: str, count: Mapping[str, int]) -> str:
    numbers = [str(count[name]) for name in ("kills", "resumed", "equal")]
    return f"| {' | '.join([kind, moment, *numbers])} |"


def _newest(directory: pathlib.Path) -> tuple[dict[str, Any], int]:
    """Returns the record and the step of what a start must go on from."""
    steps = [
        int(path.name)
        for path in directory.glob("checkpoints/[0-9]*")
        if path.name.isdecimal()
    ]
    if not steps:
        return {}, 0
    path = directory / "checkpoints" / str(max(steps)) / "meta" / "metadata"
    return json.loads(path.read_text())["driver"], max(steps)


def first_rollout(record: Mapping[str, Any], newest: int) -> int:
    """Returns which rollout a start must begin with, by the steps before it.

    The `record` of the newest checkpoint holds rollouts that wait for their updates,
    and names those that were given up and are to be made first.
    """
    waiting = record.get("rollouts", {}).get("entries", [])
    lacking = [one["step"] for one in waiting if "rolled" not in one]
    return lacking[0] if lacking else newest + len(waiting)


def _wrong_status(kind, kill, ended) -> list[str]:
    """A killed start says that it was; a stopped one that it was stopped."""
    right = (
        {-signal.SIGKILL}
        if kill.number == signal.SIGKILL
        else {128 + signal.SIGTERM, -signal.SIGTERM}
    )
    if kind.processes > 1:
        right |= {1, 128 + signal.SIGTERM}
    if ended.status in right:
        return []
    return [f"{kill}: ended with status {ended.status}"]


def main(argv: Sequence[str]) -> int:
    """Runs a campaign; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.kills",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--cycles", type=int, required=True, help="how many")
    parser.add_argument("--seed", type=int, default=0, help="of the first cycle")
    parser.add_argument(
        "--kinds", default=",".join(KINDS), help=f"of {', '.join(KINDS)} (default: all)"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=float("inf"),
        help="begin no cycle after so long",
    )
    parser.add_argument(
        "--without",
        default="",
        metavar="MODULE:CLASS.METHOD",
        help="resumed starts leave it out: shows that a loss would be noticed",
    )
    options = parser.parse_args(argv)
    names = options.kinds.split(",")
    if options.cycles < 1:
        parser.error(f"--cycles={options.cycles}: give at least 1.")
    if unknown := sorted({*names} - KINDS.keys()):
        parser.error(f"--kinds={unknown[0]}: there are {', '.join(KINDS)}.")
    warnings.filterwarnings("ignore", message=r"os\.fork\(\) was called")
    killed_starts.adopt()
    started = time.monotonic()
    folder = pathlib.Path(tempfile.mkdtemp(prefix="tlt_jax_kills_"))
    campaign = Campaign(folder, options.without)
    for name in names[: options.cycles]:
        campaign.prepare(name)
    num_done = 0
    for number in range(options.cycles):
        if time.monotonic() - started > 60 * options.minutes:
            break
        num_done += 1
        turn, which = divmod(number, len(names))
        campaign.cycle(names[which], options.seed + turn)
    print(campaign.table())
    kills = sum(count["kills"] for count in campaign.count.values())
    print(
        f"{num_done} cycles, {kills} kills, {len(campaign.failures)} different; "
        f"{(time.monotonic() - started) / 60:.1f} minutes"
    )
    if not campaign.failures:
        shutil.rmtree(folder)
    return int(bool(campaign.failures))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
