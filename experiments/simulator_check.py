"""The simulator against recorded runs: makespans predicted from other steps' costs.

    python -m experiments.simulator_check --scale=cpu
    python -m experiments.simulator_check --scale=cpu --workdirs=off=DIR,tlt=DIR

Two runs of `experiments.end_to_end` on two cores (SmolLM2-135M, two workers of one core
and two rows each; everything off, and everything on) are simulated RL step by RL step.
Given to the simulator, as the workload: how long each response is. Calibrated on the
other RL steps of the run: what a decode step takes at one and at two rows, a prompt's
token, a finished response, a drafter's step and its beginning; and how many drafts are
accepted in responses that end and in those cut at the limit. So no step helps to
predict itself. Rollouts are compared, compilation left out; update and sync are not.

`acceptance=recorded` also takes the step's own mean accept length as part of the
workload (its own seconds are still not used); `calibrated` does not.

With `--workdirs` the runs are read from there and written down beside the results.
"""

import argparse
import importlib.metadata
import pathlib
import statistics

from experiments import harness, plotting
from experiments.simulation import cluster, costs, recorded, workload
from tlt_jax.specdec import strategy as strategy_lib
from tlt_jax.specdec import tuners

SLUG = "simulator_check"
TOLERANCE = 0.10
SYSTEMS = ("off", "tlt")
# Of the recipe that was recorded.
GROUP_SIZE, PROMPT_TOKENS, MAX_NEW_TOKENS = 8, 160, 512
STRATEGY = strategy_lib.Strategy(7, 1, 8)
SIZES = {
    "num_workers": 2,
    "workers_per_place": 2,
    "max_rows": 2,
    "num_pages": 26,
    "page_size": 64,
    "steps_per_call": 32,
    "max_new_tokens": MAX_NEW_TOKENS,
}


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    harness.add_options(parser)
    parser.add_argument(
        "--workdirs",
        default="",
        help="off=DIR,tlt=DIR: runs to write down and to check against",
    )
    parser.add_argument("--seeds", type=int, default=5)
    return parser.parse_args(arguments)


def record_path(system: str) -> pathlib.Path:
    """Returns where a recorded run lies."""
    return harness.RESULTS_DIR / "cpu" / f"{SLUG}_{system}.jsonl"


def read_runs(workdirs: str) -> dict[str, list[recorded.Step]]:
    """Reads the recorded runs, or writes them down first.

    Raises:
      ValueError: `--workdirs` names something else than the two systems.
    """
    given = harness.parse_pairs(workdirs, "workdirs")
    unknown = [name for name in given if name not in SYSTEMS]
    if unknown or (given and len(given) < len(SYSTEMS)):
        raise ValueError(
            f"--workdirs={workdirs}: name off=DIR and tlt=DIR, both of "
            "experiments.end_to_end."
        )
    for system, folder in given.items():
        steps = recorded.from_workdir(pathlib.Path(folder))
        recorded.write(steps, record_path(system))
    return {system: recorded.read(record_path(system)) for system in SYSTEMS}


def simulate(
    step: recorded.Step,
    table: costs.TableCosts,
    lengths: recorded.AcceptLengths | None,
    hazards: tuple[float, ...],
    seed: int,
) -> harness.Row:
    """Simulates a step's rollouts; `lengths` None: everything off."""
    tuner = acceptance = None
    if lengths is not None:
        acceptance = workload.Acceptance({None: hazards})
        arms = strategy_lib.Arms(((SIZES["max_rows"], (STRATEGY,)),))
        tuner = tuners.build("static", arms, max_rows=SIZES["max_rows"], seed=seed)
    cfg = cluster.ClusterConfig(**SIZES, trains=lengths is not None)
    simulated = cluster.Cluster(cfg, table, acceptance, tuner, seed=seed)
    row = dict.fromkeys(
        ("rollout_s", "decode_steps", "idle_s", "trained_s", "drafter_steps"), 0.0
    )
    for found in step.rounds:
        own = lengths.of(found) if lengths is not None else ()
        report = simulated.roll_out(
            workload.grouped(found, GROUP_SIZE, PROMPT_TOKENS, own)
        )
        row["rollout_s"] += report.makespan_s
        row["decode_steps"] += report.num_steps
        row["idle_s"] += report.sums["workers/idle_s"]
        row["trained_s"] += report.sums["workers/trained_s"]
        row["drafter_steps"] += report.num_drafter_steps
    return row


def observed(step: recorded.Step) -> harness.Row:
    """Returns what the run recorded of the same."""
    values = step.values
    return {
        "rollout_s": values["time/rollout_s"],
        "decode_steps": values["rollout/decode_steps"],
        "idle_s": values["workers/idle_s"],
        "trained_s": values["workers/trained_s"],
        "drafter_steps": values.get("drafter/num_steps", 0),
    }


def compare(system: str, steps: list[recorded.Step], seeds: int) -> list[harness.Row]:
    """Predicts each step from the others."""
    strategy = None if system == "off" else STRATEGY
    rows = []
    for step in steps:
        others = [other for other in steps if other is not step]
        table = recorded.calibrated(others, strategy)
        variants: dict[str, recorded.AcceptLengths | None] = {"none": None}
        hazards: tuple[float, ...] = (1.0,)
        if strategy is not None:
            known = recorded.accept_lengths(
                others, MAX_NEW_TOKENS, strategy.max_accept_length
            )
            hazards = recorded.hazards(others)
            variants = {"calibrated": known, "recorded": known.scaled_to(step)}
        for acceptance, lengths in variants.items():
            runs = [simulate(step, table, lengths, hazards, n) for n in range(seeds)]
            row: harness.Row = {
                "system": system,
                "acceptance": acceptance,
                "step": step.step,
                "responses": step.num_responses,
            }
            for name, value in observed(step).items():
                row[f"{name}/run"] = value
                row[name] = statistics.mean(run[name] for run in runs)
            row["ratio"] = row["rollout_s"] / row["rollout_s/run"]
            rows.append(row)
    return rows


def summary_of(rows: list[harness.Row]) -> list[harness.Row]:
    """Sums makespans over the steps; each was predicted from the others."""
    summary = []
    cases = dict.fromkeys((row["system"], row["acceptance"]) for row in rows)
    for system, acceptance in cases:
        its = [
            r for r in rows if (r["system"], r["acceptance"]) == (system, acceptance)
        ]
        entry: harness.Row = {
            "system": system,
            "acceptance": acceptance,
            "steps": len(its),
        }
        for name in ("rollout_s", "decode_steps", "idle_s", "trained_s"):
            entry[f"{name}/run"] = sum(r[f"{name}/run"] for r in its)
            entry[name] = sum(r[name] for r in its)
        entry["ratio"] = entry["rollout_s"] / entry["rollout_s/run"]
        entry["median_step_error"] = statistics.median(abs(r["ratio"] - 1) for r in its)
        entry["worst_step_error"] = max(abs(r["ratio"] - 1) for r in its)
        entry["within_tolerance"] = abs(entry["ratio"] - 1) <= TOLERANCE
        summary.append(entry)
    return summary


def plot(rows: list[harness.Row], path: pathlib.Path, stamp: str) -> None:
    """Draws predicted against recorded makespans."""
    figure, axes = plotting.figure(
        "Simulated against recorded rollouts",
        "recorded, seconds",
        "simulated, seconds",
        stamp,
    )
    shown = {
        ("off", "none"): "everything off",
        ("tlt", "recorded"): "everything on, mean acceptance given",
        ("tlt", "calibrated"): "everything on, acceptance calibrated, too",
    }
    most = 1.1 * max(row["rollout_s/run"] for row in rows)
    axes.fill_between(
        [0, most],
        [0, most * (1 - TOLERANCE)],
        [0, most * (1 + TOLERANCE)],
        color=plotting.PALE,
        label="within 10 %",
    )
    for (case, label), color, marker in zip(
        shown.items(), plotting.COLORS, "osx", strict=False
    ):
        its = [r for r in rows if (r["system"], r["acceptance"]) == case]
        axes.plot(
            [r["rollout_s/run"] for r in its],
            [r["rollout_s"] for r in its],
            marker,
            color=color,
            label=label,
        )
    axes.set_xlim(0, most)
    axes.set_ylim(0, most)
    plotting.save(figure, path)


def main(arguments: list[str] | None = None) -> list[harness.Row]:
    """Runs the check; returns the summary that it also writes."""
    options = parse_arguments(arguments)
    runs = read_runs(options.workdirs)
    settings = {"sizes": SIZES, "seeds": options.seeds, "strategy": str(STRATEGY)}
    provenance = harness.Provenance(
        SLUG, settings, {"numpy": importlib.metadata.version("numpy")}
    )
    rows = [
        row
        for system, steps in runs.items()
        for row in compare(system, steps, options.seeds)
    ]
    summary = summary_of(rows)
    harness.write_results(options, SLUG, rows, summary, provenance)
    out = harness.folder_of(options)
    plot(rows, out / f"{SLUG}.png", plotting.stamp(provenance.record))
    return summary


if __name__ == "__main__":
    main()
