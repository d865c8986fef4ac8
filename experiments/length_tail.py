"""Lengths of responses and where an RL step's time goes, from runs' own records.

    python -m experiments.length_tail --scale=cpu --workdirs=NAME=DIR,NAME=DIR

Reads `rollouts/`, `metrics.jsonl` and `timeline.jsonl` of workdirs of `tlt_jax.main`;
nothing is run. For each run: percentiles of the responses' lengths, how much of the
workers' time had no requests, and the seconds of a step's stages, compilation apart.

Reproduces: the paper's motivation, that rollouts take about 85 % of a step and that few
long responses keep most devices waiting; here of whatever was run.
"""

import argparse
import collections
import pathlib

import numpy as np

from experiments.lab import experiment, plotting, tables
from experiments.simulation import workload
from tlt_jax.workdir import metrics

STAGES = tuple(plotting.STAGE_COLORS)


def measure(
    options: argparse.Namespace, cell: tables.Cell
) -> dict[str, list[tables.Row]]:
    """Reads a run, or its first steps; counts its responses of each length.

    Raises:
      ValueError: it has no rollouts, or no records.
    """
    name = cell["run"]
    workdir = experiment.parse_pairs(options.workdirs, "workdirs")[name]
    by_step = workload.read_lengths(pathlib.Path(workdir))
    if options.steps:
        by_step = {step: n for step, n in by_step.items() if step <= options.steps}
    rows = [r for r in metrics.read(pathlib.Path(workdir)) if r["step"] in by_step]
    if not rows:
        raise ValueError(f"{workdir} has no metrics.jsonl of the steps it has kept.")
    lengths = [n for found in by_step.values() for n in found]
    seconds = {s: sum(r.get(f"time/{s}_s", 0.0) for r in rows) for s in STAGES}
    total = sum(seconds.values())
    idle = [row["workers/idle_frac"] for row in rows if "workers/idle_frac" in row]
    row: tables.Row = {"run": name, "steps": len(rows), "responses": len(lengths)}
    row |= workload.tail(lengths)
    row |= {f"time/{stage}_s": value / len(rows) for stage, value in seconds.items()}
    row |= {f"frac/{stage}": value / total for stage, value in seconds.items()}
    row["workers/idle_frac"] = float(np.mean(idle)) if idle else None
    counted = [
        {"run": name, "tokens": tokens, "responses": count}
        for tokens, count in sorted(collections.Counter(lengths).items())
    ]
    return {tables.ROWS: [row], "lengths": counted}


def plot(
    rows: list[tables.Row], lengths: list[tables.Row], stamp: str
) -> plotting.Figure:
    """Draws who is left after how many tokens, and the stages' shares."""
    fig, (left, right) = plotting.panels(
        "Long tails, and where a step's time goes", ["", ""], stamp
    )
    names = tables.values(lengths, "run")
    for name, color, dash in zip(
        names, plotting.COLORS, ("-", "--", ":", "-.") * 2, strict=False
    ):
        its = tables.where(lengths, run=name)
        ordered = np.repeat(*(tables.column(its, k) for k in ("tokens", "responses")))
        alive = 1 - np.arange(len(ordered)) / len(ordered)
        left.step(ordered, alive, dash, where="post", color=color, label=name)
    left.set(xlabel="tokens", ylabel="responses that are longer, share")
    left.set(xscale="log", ylim=(0, 1))
    floor = np.zeros(len(rows))
    names = tables.column(rows, "run")
    spent_s = {s: np.array(tables.column(rows, f"time/{s}_s")) for s in STAGES}
    total_s = sum(values.sum() for values in spent_s.values())
    for stage, values in spent_s.items():
        if values.sum() >= 0.005 * total_s:
            color = plotting.STAGE_COLORS[stage]
            right.bar(names, values, 0.6, floor, color=color, label=stage)
        floor += values
    right.set_ylabel("seconds of an RL step")
    return fig


EXPERIMENT = experiment.Experiment(
    slug="length_tail",
    text=__doc__,
    title="response lengths and time split",
    published="rollout about 85 % of a step",
    needs="--workdirs=NAME=DIR",
    larger=experiment.both("--workdirs=NAME=DIR"),
    options=(
        experiment.Option(
            "workdirs",
            "",
            "NAME=DIR, separated by commas",
            required=True,
            recorded=False,
        ),
        experiment.Option("steps", 0, "read the first ones only; 0: all"),
    ),
    settings=lambda options: {
        "runs": sorted(experiment.parse_pairs(options.workdirs, "workdirs")),
    },
    cells=lambda options: [
        tables.Cell({"run": name}, None)
        for name in experiment.parse_pairs(options.workdirs, "workdirs")
    ],
    measure=measure,
    others=("lengths",),
    is_derived=True,
    plot=plot,
)
main = EXPERIMENT.main


if __name__ == "__main__":
    main()
