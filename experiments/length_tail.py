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
import importlib.metadata
import pathlib

import numpy as np

from experiments.lab import cells, harness, plotting
from experiments.simulation import workload
from tlt_jax.workdir import metrics

SLUG = "length_tail"
STAGES = ("rollout", "drafter", "reward", "inference", "update", "sync")


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--workdirs", required=True, help="NAME=DIR, separated by commas"
    )
    parser.add_argument(
        "--steps", type=int, default=0, help="read the first ones only; 0: all"
    )
    cells.add_options(parser)
    return parser.parse_args(arguments)


def columns_of(
    name: str, workdir: pathlib.Path, steps: int
) -> tuple[harness.Row, list[int]]:
    """Reads a run's first `steps` steps (0: all); returns its row and all lengths.

    Raises:
      ValueError: it has no rollouts, or no records.
    """
    by_step = workload.read_lengths(workdir)
    if steps:
        by_step = {step: found for step, found in by_step.items() if step <= steps}
    rows = [row for row in metrics.read(workdir) if row["step"] in by_step]
    if not rows:
        raise ValueError(f"{workdir} has no metrics.jsonl of the steps it has kept.")
    lengths = [n for found in by_step.values() for n in found]
    seconds = {s: sum(r.get(f"time/{s}_s", 0.0) for r in rows) for s in STAGES}
    total = sum(seconds.values())
    idle = [row["workers/idle_frac"] for row in rows if "workers/idle_frac" in row]
    row: harness.Row = {"run": name, "steps": len(rows), "responses": len(lengths)}
    row |= workload.tail(lengths)
    row |= {f"time/{stage}_s": value / len(rows) for stage, value in seconds.items()}
    row |= {f"frac/{stage}": value / total for stage, value in seconds.items()}
    row["workers/idle_frac"] = float(np.mean(idle)) if idle else None
    return row, lengths


def counted(lengths: dict[str, list[int]]) -> list[harness.Row]:
    """Counts the responses of each length, run by run."""
    return [
        {"run": name, "tokens": tokens, "responses": count}
        for name, found in lengths.items()
        for tokens, count in sorted(collections.Counter(found).items())
    ]


def plot(
    rows: list[harness.Row], lengths: list[harness.Row], path: pathlib.Path, stamp: str
) -> None:
    """Draws who is left after how many tokens, and the stages' shares."""
    fig, (left, right) = plotting.panels(
        "Long tails, and where a step's time goes", 2, stamp
    )
    names = list(dict.fromkeys(row["run"] for row in lengths))
    for name, color, dash in zip(
        names, plotting.COLORS, ("-", "--", ":", "-.") * 2, strict=False
    ):
        its = [row for row in lengths if row["run"] == name]
        ordered = np.repeat(
            *([row[key] for row in its] for key in ("tokens", "responses"))
        )
        alive = 1 - np.arange(len(ordered)) / len(ordered)
        left.step(ordered, alive, dash, where="post", color=color, label=name)
    left.set_xlabel("tokens")
    left.set_ylabel("responses that are longer, share")
    left.set_xscale("log")
    left.set_ylim(0, 1)
    floor = np.zeros(len(rows))
    names = [row["run"] for row in rows]
    for stage in STAGES:
        values = np.array([row[f"time/{stage}_s"] for row in rows])
        if values.sum() >= 0.005 * sum(
            sum(r[f"time/{s}_s"] for s in STAGES) for r in rows
        ):
            color = plotting.STAGE_COLORS[stage]
            right.bar(names, values, 0.6, floor, color=color, label=stage)
        floor += values
    right.set_ylabel("seconds of an RL step")
    plotting.save(fig, path)


def main(arguments: list[str] | None = None) -> list[harness.Row]:
    """Reads the runs; returns the table that it also writes."""
    options = parse_arguments(arguments)
    given = harness.parse_pairs(options.workdirs, "workdirs")
    settings = {"runs": sorted(given), "steps": options.steps}
    provenance = harness.Provenance(
        SLUG, settings, {"numpy": importlib.metadata.version("numpy")}
    )
    rows, lengths = [], {}
    for name, folder in given.items():
        row, lengths[name] = columns_of(name, pathlib.Path(folder), options.steps)
        rows.append(row)
    out = harness.folder_of(options)
    harness.write_csv(out / f"{SLUG}.csv", rows)
    provenance.write(out / f"{SLUG}.json")
    told = counted(lengths)
    harness.write_csv(out / f"{SLUG}_lengths.csv", told)
    plot(rows, told, out / f"{SLUG}.png", plotting.stamp(provenance.record))
    print(harness.format_table(rows))
    return rows


if __name__ == "__main__":
    main()
