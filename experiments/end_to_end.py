"""A whole RL run with everything on against the same run with everything off.

    python -m experiments.end_to_end --scale=cpu

The recipe is run once with each mode of speculation, one after the other, each in a
process of its own as a user would run it. Digests of tokens, rewards and the policy's
losses must agree, step by step. The ratio is that of rollout, the drafter's training
between rollout and update (with one worker), update and sync; judging answers and
compiling stand apart. The tail says what was there to be won: lengths at 50 and 95
percent and the longest, and the share of time in which workers wait.

Target: at least 1.5 times on CPU, on a long-tailed workload.
"""

import argparse
import importlib.metadata
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from experiments import harness
from tlt_jax import metrics

SLUG = "end_to_end"
OFF = "off"
# Of all runs: large pages for large buffers, where glibc can; an update takes a tenth
# less with them.
ENVIRONMENT = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
SYSTEMS = ("tlt", "ngram", OFF)
# What a user waits for, less what the comparison is not about.
STAGES = ("rollout", "drafter", "inference", "update", "sync")
SAME = ("rollout/tokens_digest", "reward/mean", "policy/loss", "policy/grad_norm")
KEPT = (
    *("rollout/tokens", "length/p50", "length/p95", "length/max", "reward/mean"),
    *("specdec/accept_length", "workers/idle_s", "workers/trained_s"),
    *("workers/idle_frac", "drafter/num_steps", "drafter/version"),
    *("drafter/fresh_accept_length_coupled", "drafter/top1_acc"),
)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scale", choices=["cpu"], default="cpu")
    parser.add_argument("--config", default="configs/smollm2_tlt.py")
    parser.add_argument(
        "--set", default="", help="settings of all: KEY=VALUE, separated by commas"
    )
    parser.add_argument("--systems", default="tlt,off", help=f"of {','.join(SYSTEMS)}")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument(
        "--warm-steps",
        type=int,
        default=2,
        help="first steps, in which a drafter begins, that do not count",
    )
    parser.add_argument(
        "--workdirs",
        type=pathlib.Path,
        help="folder of the runs' workdirs, kept and resumed; default: a temporary one",
    )
    parser.add_argument(
        "--out", type=pathlib.Path, help="folder of the tables; default results/<scale>"
    )
    return parser.parse_args(arguments)


def command_of(options: argparse.Namespace, mode: str, workdir: pathlib.Path):
    """Returns the command of one run."""
    changes = {
        "specdec.mode": mode,
        "num_steps": str(options.steps),
        "checkpoint.every": "0",
        **harness.parse_pairs(options.set, "set"),
    }
    flags = [f"--config.{key}={value}" for key, value in changes.items()]
    command = [sys.executable, "-m", "tlt_jax.main", f"--config={options.config}"]
    return [*command, f"--workdir={workdir}", *flags]


def start(command: list[str]) -> None:
    """Runs a command to its end."""
    subprocess.run(command, check=True, env=ENVIRONMENT | os.environ)


def rows_of(system: str, workdir: pathlib.Path, steps: int) -> list[harness.Row]:
    """Reads what is compared of a run's first steps."""
    found = []
    rows = (row for row in metrics.read(workdir) if 0 < row["step"] <= steps)
    for number, row in enumerate(rows):
        found.append({"system": system, "round": number} | columns(row))
    return found


def columns(row: dict) -> harness.Row:
    """Reduces a step's record to what is compared."""
    seconds = {f"{name}_s": row.get(f"time/{name}_s", 0.0) for name in STAGES}
    same = {name.replace("/", "_"): row[name] for name in SAME}
    kept = {name.replace("/", "_"): row.get(name) for name in KEPT}
    return {
        "seconds": sum(seconds.values()),
        **seconds,
        "reward_s": row["time/reward_s"],
        "compile_s": row["time/compile_s"],
        **kept,
        **same,
    }


def summary_of(rows: list[harness.Row], first: int) -> list[harness.Row]:
    """Sums the steps that count, and says how many times as long `off` takes."""
    counted = [row for row in rows if row["round"] >= first]
    by_system: dict[str, list[harness.Row]] = {}
    for row in counted:
        by_system.setdefault(row["system"], []).append(row)
    summary = []
    for system, its in by_system.items():
        off = by_system.get(OFF, its)
        pairs = list(zip(off, its, strict=True))
        names = ("seconds", "rollout_s", "update_s", "drafter_s", "rollout_tokens")
        entry: harness.Row = {"system": system, "steps": len(its)}
        entry |= {name: sum(row[name] for row in its) for name in names}
        entry["times_faster"] = _ratio(off, its, "seconds")
        entry["rollout_times_faster"] = _ratio(off, its, "rollout_s")
        ratios = [a["seconds"] / b["seconds"] for a, b in pairs]
        entry["times_faster/median_step"] = statistics.median(ratios)
        entry["times_faster/worst_step"] = min(ratios)
        entry["steps_differing"] = sum(
            any(a[name] != b[name] for name in (s.replace("/", "_") for s in SAME))
            for a, b in zip(
                [r for r in rows if r["system"] == OFF] or its,
                [r for r in rows if r["system"] == system],
                strict=False,
            )
        )
        for name in ("length_p50", "length_p95"):
            entry[name] = statistics.median(row[name] for row in its)
        entry["length_max"] = max(row["length_max"] for row in its)
        entry["idle_frac"] = statistics.mean(row["workers_idle_frac"] for row in its)
        idle_s = sum(row["workers_idle_s"] for row in its)
        trained_s = sum(row["workers_trained_s"] for row in its)
        entry["trained_of_idle"] = trained_s / idle_s if idle_s else None
        lengths = [row["specdec_accept_length"] for row in its]
        entry["accept_length"] = statistics.mean(lengths)
        summary.append(entry)
    return summary


def _ratio(off: list[harness.Row], its: list[harness.Row], name: str) -> float:
    return sum(row[name] for row in off) / sum(row[name] for row in its)


def plot(rows: list[harness.Row], path: pathlib.Path) -> None:
    """Draws where each step's seconds went, system beside system."""
    systems = list(dict.fromkeys(row["system"] for row in rows))
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    width = 0.8 / len(systems)
    colors = dict(zip(STAGES, plt.get_cmap("tab10").colors, strict=False))
    for place, system in enumerate(systems):
        its = [row for row in rows if row["system"] == system]
        at = [
            row["round"] + 1 + (place - (len(systems) - 1) / 2) * width for row in its
        ]
        floor = [0.0] * len(its)
        for stage in STAGES:
            heights = [row[f"{stage}_s"] for row in its]
            axes.bar(
                at,
                heights,
                0.9 * width,
                floor,
                color=colors[stage],
                label=stage if not place else None,
                hatch="" if system == OFF else "//",
                edgecolor="white",
            )
            floor = [a + b for a, b in zip(floor, heights, strict=True)]
    names = " | ".join(f"{s}{'' if s == OFF else ' (hatched)'}" for s in systems)
    axes.set_xlabel(f"RL step; from left to right: {names}")
    axes.set_ylabel("seconds")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> list[harness.Row]:
    """Runs the experiment; returns the summary that it also writes."""
    options = parse_arguments(arguments)
    systems = options.systems.split(",")
    out = options.out or harness.RESULTS_DIR / options.scale
    settings = {
        "config": options.config,
        "set": harness.without_paths(options.set),
        "steps": options.steps,
        "systems": systems,
        "warm_steps": options.warm_steps,
        "environment": ENVIRONMENT,
    }
    versions = {name: importlib.metadata.version(name) for name in ("jax", "llvmlite")}
    provenance = harness.Provenance(SLUG, settings, versions)
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.workdirs or pathlib.Path(temporary)
        for system in systems:
            workdir = folder / system
            print(f"Running {system} ...", flush=True)
            start(command_of(options, system, workdir))
            rows += rows_of(system, workdir, options.steps)
            drawn = workdir / "plots" / "timeline.png"
            if drawn.exists():
                out.mkdir(parents=True, exist_ok=True)
                shutil.copy(drawn, out / f"{SLUG}_timeline_{system}.png")
    summary = summary_of(rows, options.warm_steps)
    harness.write_results(options, SLUG, rows, summary, provenance)
    plot(rows, out / f"{SLUG}.png")
    return summary


if __name__ == "__main__":
    main()
