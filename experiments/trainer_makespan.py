r"""What training the drafter on idle workers costs those that still generate.

    python -m experiments.trainer_makespan --scale=cpu \
        --drafter=workdirs/counting_drafter

The rollouts of a recipe's first RL steps, by turns without training and with training
at a learning rate so small that no weight moves (1e-30): the same tokens by the same
drafts, so that rollouts differ by what training does to them alone. A rollout lasts
until its last answer and until the trainer gave its devices back; the piece of a
drafter step that is under way then leaves its device by itself. Turns follow one
another in one program (`experiments.rollout_turns`), each kind first in every other
pair, and a round compares sums over the RL steps: the machine's own speed moves by more
in the minutes between two runs than what is to be measured.

With `--processes=2` each worker is a process with cores of its own (`tlt_jax.launch`),
as on a cluster; with 1 the workers are threads of a process on simulated devices, which
share XLA's pool of threads.

What rollouts last longer is told apart: waiting for the trainer behind the last answer;
decode steps that take longer; further decode steps; and the rest, such as prefilling
and reading the texts' features. Beside it stands what the machine itself imposes: a
decode step of one row on one core, while another core does nothing, computes, or
streams memory (`experiments.decode_beside`).

The recipe's drafter is that of `configs/smollm2_drafter.py:counting`, trained by

    python -m tlt_jax.train_drafter --config=configs/smollm2_drafter.py:counting \
        --workdir=workdirs/counting_drafter

Target: rollouts last at most 2 % longer with the trainer than without.
"""

import argparse
import json
import pathlib
import statistics
import sys
import tempfile

from experiments import rollout_turns
from experiments.lab import (
    claims,
    experiment,
    paired,
    plotting,
    provenance,
    recipes,
    tables,
)
from tlt_jax.models.drafters import shipped
from tlt_jax.viz import timeline

WITHOUT, WITH = "without trainer", "with trainer"
# What is drafted shall not hang on measured times. Only with training would a drafter
# be used for longer texts than it was made for.
FIXED = {
    "specdec.mode": "tlt",
    "specdec.tuner": "static",
    "adaptation.learning_rate": "1e-30",
    "checkpoint.every": "0",
    "drafter.max_length": "1000000",
}
# Columns that are sums over a round's rollouts.
_SUMS = ("rollout_s", "waited_s", "decode_s", "decode_steps", "idle_s", "trained_s")
_SUMS += ("drafter_steps", "tokens")


def check(options: argparse.Namespace) -> None:
    """Refuses workers that cannot be divided, and a drafter that is not there."""
    found = options.drafter in shipped.names()
    if not (found or pathlib.Path(options.drafter).is_dir()):
        raise ValueError(
            f"--drafter={options.drafter} is no directory here: train one, for the "
            f"recipe by {recipes.TRAIN_COUNTING}"
        )
    options.processes = experiment.numbers(options.processes, "processes")
    settings = settings_of(options)
    for processes in options.processes:
        recipes.check_processes(processes, options.config, settings, "--processes")
    recipes.print_other_task_of(options.config, settings)


def settings_of(options: argparse.Namespace) -> dict[str, str]:
    """Returns the settings of both kinds of turns by dotted key."""
    return {
        "drafter.directory": options.drafter,
        "num_steps": str(options.steps),
        **experiment.parse_pairs(options.set, "set"),
        **FIXED,
    }


def bound_of(options: argparse.Namespace) -> tables.Row:
    """Measures a decode step of one worker beside what other cores may do.

    Returns milliseconds, as `step_ms_alone` and so on.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "found.json"
        command = [sys.executable, "-m", "experiments.decode_beside", f"--json={path}"]
        command += [f"--config={options.config}"]
        recipes.start([*command, *recipes.flags_of(settings_of(options))])
        found = json.loads(path.read_text("utf-8"))
    return {f"step_ms_{name}": value for name, value in found.items()}


def waited_s(record: timeline.Record) -> float:
    """Sums seconds from a rollout's last answer to its end, over a step's rollouts."""
    busy, others = [], []
    for worker in record["workers"]:
        for activity, start_s, stop_s in worker["intervals"]:
            decodes = activity in (timeline.BUSY, timeline.COMPILING)
            (busy if decodes else others).append((start_s, stop_s))
    total, last_s = 0.0, 0.0
    for start_s, stop_s in [*sorted(busy), (float("inf"), 0.0)]:
        if start_s > last_s:
            # Nobody decodes from the last answer until the next rollout.
            ends = [stop for _, stop in others if last_s < stop <= start_s]
            total += max(ends, default=last_s) - last_s
        last_s = max(last_s, stop_s)
    return total


def turns_of(workdir: pathlib.Path, processes: int) -> list[tables.Row]:
    """Reads what came of the turns."""
    lines = (workdir / rollout_turns.FILE).read_text("utf-8").splitlines()
    records = {record["step"]: record for record in timeline.read(workdir)}
    rows = []
    for turn in map(json.loads, lines):
        system = WITH if turn.pop("trains") else WITHOUT
        number = turn.pop("turn")
        waited = {"waited_s": waited_s(records[number])}
        rows.append({"processes": processes, "system": system} | turn | waited)
    return rows


def measure(
    options: argparse.Namespace, context: tables.Row, cell: tables.Cell
) -> list[tables.Row]:
    """Takes the turns in so many processes; beside them stands what bounds them."""
    processes = cell["processes"]
    with tempfile.TemporaryDirectory() as folder:
        workdir = pathlib.Path(folder)
        command = recipes.command_of(
            *(rollout_turns.__name__, processes, options.config),
            *(settings_of(options), workdir, [f"--rounds={options.rounds}"]),
        )
        recipes.start(command)
        return [row | context for row in turns_of(workdir, processes)]


def rounds_of(rows: list[tables.Row]) -> list[tables.Row]:
    """Sums the rollouts of each round.

    Raises:
      ValueError: turns of one RL step drew different tokens: they do not compare.
    """
    drawn: dict[object, object] = {}
    for row in rows:
        if drawn.setdefault(row["step"], row["digest"]) != row["digest"]:
            raise ValueError(
                "turns of one RL step drew different tokens, so their rollouts do not "
                "compare: is a setting among --set that makes tokens depend on time?"
            )
    names = ("processes", "round", "system")
    return [
        dict(zip(names, key, strict=True)) | _sums(its)
        for key, its in tables.groups(rows, *names).items()
    ]


def _sums(rows: list[tables.Row]) -> tables.Row:
    return {name: sum(row[name] for row in rows) for name in _SUMS}


def summary_of(rows: list[tables.Row]) -> list[tables.Row]:
    """Adds to each system's rollouts how much longer they last than without training.

    `times_as_long` is of the sums over all rounds, `times_as_long_error` the standard
    error of a mean of the rounds' own ratios.
    """
    rounds = rounds_of(rows)
    bound = {k: v for k, v in rows[0].items() if k.startswith("step_ms_")}
    summary = paired.summarise(
        rounds,
        case_keys=("processes",),
        metrics={"rollout_s": "lower"},
        reference=WITHOUT,
    )
    for entry in summary:
        own, other = (
            tables.where(rounds, processes=entry["processes"], system=system)
            for system in (entry["system"], WITHOUT)
        )
        entry |= _compared(own, other) | bound
    return summary


def _compared(own: list[tables.Row], other: list[tables.Row]) -> tables.Row:
    """Compares two systems of the same rounds."""
    ratios = [a["rollout_s"] / b["rollout_s"] for a, b in zip(own, other, strict=True)]
    row, reference = _sums(own), _sums(other)
    error = statistics.stdev(ratios) / len(ratios) ** 0.5 if len(ratios) > 1 else None
    idle_s = row["idle_s"]
    return {
        "times_as_long": row["rollout_s"] / reference["rollout_s"],
        "times_as_long_error": error,
        **_excess(row, reference),
        "trained_of_idle": row["trained_s"] / idle_s if idle_s else None,
        "drafter_steps": row["drafter_steps"],
    }


def _excess(row: tables.Row, other: tables.Row) -> tables.Row:
    """Tells apart why rollouts last longer, in parts of those without."""
    step_ms, other_ms = (1e3 * r["decode_s"] / r["decode_steps"] for r in (row, other))
    answering_s = other["rollout_s"] - other["waited_s"]
    waiting = (row["waited_s"] - other["waited_s"]) / other["rollout_s"]
    answering = answering_s / other["rollout_s"]
    slower = (step_ms / other_ms - 1) * answering
    further = (row["decode_steps"] / other["decode_steps"] - 1) * answering
    excess = row["rollout_s"] / other["rollout_s"] - 1
    return {
        "step_ms": step_ms,
        "excess_waiting": waiting,
        "excess_slower_steps": slower,
        "excess_further_steps": further,
        "excess_rest": excess - waiting - slower - further,
    }


def plot(summary: list[tables.Row], stamp: str) -> plotting.Figure:
    """Draws how long rollouts last."""
    fig, axes = plotting.figure(
        "Rollouts beside a drafter in training", "", "seconds of rollouts", stamp
    )
    names = [
        f"{row['system']},\n{row['processes']} process"
        + ("es" if row["processes"] > 1 else "")
        for row in summary
    ]
    plotting.bars(axes, names, summary, "rollout_s", "%.1f s")
    return fig


EXPERIMENT = experiment.Experiment(
    slug="trainer_makespan",
    text=__doc__,
    title="what the spot trainer costs a rollout",
    needs=f"--drafter={recipes.COUNTING_DRAFTER}",
    before={recipes.TRAIN_COUNTING: 15},
    options=(
        *experiment.plain(config="configs/smollm2_tlt.py", rounds=6),
        experiment.Option(
            "drafter",
            "",
            "what drafter.directory takes: a trained one, for the recipe by "
            f"{recipes.TRAIN_COUNTING}",
            required=True,
            recorded=False,
        ),
        experiment.Option("set", "", "settings of all: KEY=VALUE, separated by commas"),
        experiment.Option(
            "processes",
            "2,1",
            "among how many the workers are divided: numbers, separated by commas",
        ),
        experiment.Option("steps", 3, "RL steps of a round"),
    ),
    check=check,
    settings=lambda options: {
        "set": provenance.settings_without_paths(
            experiment.parse_pairs(options.set, "set")
        ),
    },
    constants={"environment": recipes.ENVIRONMENT},
    context=bound_of,
    cells=lambda processes: [tables.Cell({"processes": n}, None) for n in processes],
    measure=measure,
    summary=summary_of,
    plot=plot,
    claims={
        "rollouts last at most 2 % longer beside a drafter in training": claims.at_most(
            "times_as_long", 1.02, system=WITH, processes=2
        ),
    },
)
main = EXPERIMENT.main


if __name__ == "__main__":
    main()
