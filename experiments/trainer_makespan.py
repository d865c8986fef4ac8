"""What training the drafter on idle workers costs those that still generate.

    python -m experiments.trainer_makespan --scale=cpu --drafter=DIR

The recipe is run with a drafter that learns nothing, once without training at all and
once with training at a learning rate so small that no weight moves (1e-30): the same
tokens by the same drafts, so that rollouts differ by what training does to them alone.
Runs take turns. A rollout lasts until its last answer and until the trainer gave its
devices back. The piece of a drafter step that is under way then leaves its device by
itself, into the update if need be: so whole RL steps, rewards apart, are compared, too.

What rollouts last longer is told apart: waiting for the trainer behind the last answer;
decode steps that take longer; further decode steps (a training measures the sharpness
of drafts, and may change it); and the rest, such as reading the texts' features. Beside
it stands what the machine itself imposes: a decode step of one row on one core, while
another core does nothing, computes, or streams memory (`experiments.decode_beside`).

Everything is compared at its median over the rounds.

Target: rollouts last at most 2 % longer with the trainer than without.
"""

import argparse
import importlib.metadata
import json
import pathlib
import statistics
import sys
import tempfile

from experiments import end_to_end, harness, plotting
from tlt_jax import metrics, timeline

SLUG = "trainer_makespan"
WITHOUT, WITH = "without trainer", "with trainer"
SETTINGS = {
    WITHOUT: {"adaptation.enabled": "false"},
    WITH: {"adaptation.learning_rate": "1e-30"},
}
# The same in both: what is drafted shall not hang on measured times. Only with training
# would a drafter be used for longer texts than it was made for.
SHARED = {
    "specdec.mode": "tlt",
    "specdec.tuner": "static",
    "checkpoint.every": "0",
    "drafter.max_length": "1000000",
}


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="configs/smollm2_tlt.py")
    parser.add_argument(
        "--drafter", required=True, help="what drafter.directory takes: a trained one"
    )
    parser.add_argument(
        "--set", default="", help="settings of all: KEY=VALUE, separated by commas"
    )
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    harness.add_options(parser)
    return parser.parse_args(arguments)


def flags_of(options: argparse.Namespace, system: str) -> list[str]:
    """Returns recipe and settings of a system."""
    settings = {
        "drafter.directory": options.drafter,
        "num_steps": str(options.steps),
        **harness.parse_pairs(options.set, "set"),
        **SHARED,
        **SETTINGS[system],
    }
    flags = [f"--config.{key}={value}" for key, value in settings.items()]
    return [f"--config={options.config}", *flags]


def command_of(
    options: argparse.Namespace, system: str, workdir: pathlib.Path
) -> list[str]:
    """Returns the command of one run."""
    command = [sys.executable, "-m", "tlt_jax.main", f"--workdir={workdir}"]
    return [*command, *flags_of(options, system)]


def bound_of(options: argparse.Namespace) -> harness.Row:
    """Measures a decode step of one worker beside what other cores may do.

    Returns:
      Milliseconds, as `step_ms_alone` and so on.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "found.json"
        command = [sys.executable, "-m", "experiments.decode_beside", f"--json={path}"]
        end_to_end.start([*command, *flags_of(options, WITHOUT)])
        found = json.loads(path.read_text("utf-8"))
    return {f"step_ms_{name}": value for name, value in found.items()}


def _stages(row: harness.Row) -> list[float]:
    """Seconds of a step's parts that the trainer can hold up."""
    return [row.get(f"time/{name}_s", 0.0) for name in end_to_end.STAGES]


def waited_s(record: timeline.Record) -> float:
    """Sums seconds from a rollout's last answer to its end, over a step's rollouts."""
    busy, others = [], []
    for worker in record["workers"]:
        for activity, start_s, stop_s in worker["intervals"]:
            (busy if activity == timeline.BUSY else others).append((start_s, stop_s))
    total, last_s = 0.0, 0.0
    for start_s, stop_s in [*sorted(busy), (float("inf"), 0.0)]:
        if start_s > last_s:
            # Nobody decodes from the last answer until the next rollout.
            ends = [stop for _, stop in others if last_s < stop <= start_s]
            total += max(ends, default=last_s) - last_s
        last_s = max(last_s, stop_s)
    return total


def reduced(workdir: pathlib.Path, steps: int) -> harness.Row:
    """Sums what a run's records say of its rollouts."""
    rows = [row for row in metrics.read(workdir) if 0 < row["step"] <= steps]
    digests = "".join(row["rollout/tokens_digest"][:4] for row in rows)
    return {
        "rollout_s": sum(row["time/rollout_s"] for row in rows),
        "step_s": sum(sum(_stages(row)) for row in rows),
        "waited_s": sum(
            waited_s(r) for r in timeline.read(workdir) if r["step"] <= steps
        ),
        "decode_s": sum(row["rollout/decode_s"] for row in rows),
        "decode_steps": sum(row["rollout/decode_steps"] for row in rows),
        "idle_s": sum(row["workers/idle_s"] for row in rows),
        "trained_s": sum(row["workers/trained_s"] for row in rows),
        "drafter_steps": sum(row.get("drafter/num_steps", 0) for row in rows),
        "tokens": sum(row["rollout/tokens"] for row in rows),
        "accept_length": sum(row["specdec/accept_length"] for row in rows) / len(rows),
        "digests": digests,
    }


def summary_of(rows: list[harness.Row]) -> list[harness.Row]:
    """Adds to each system's rollouts how much longer they last than without training.

    Raises:
      ValueError: the runs drew different tokens, so that they do not compare.
    """
    if len({row["digests"] for row in rows}) > 1:
        raise ValueError(
            "the runs drew different tokens, so their rollouts do not compare: is a "
            "setting among --set that makes tokens depend on time?"
        )
    summary = harness.summarise(
        rows, case_keys=(), metrics={"rollout_s": "lower"}, reference=WITHOUT
    )
    other = _medians(rows, WITHOUT)
    for entry in summary:
        row = _medians(rows, entry["system"])
        entry["times_as_long"] = row["rollout_s"] / other["rollout_s"]
        entry["step_times_as_long"] = row["step_s"] / other["step_s"]
        entry |= _excess(row, other)
        idle_s, trained_s = row["idle_s"], row["trained_s"]
        entry["trained_of_idle"] = trained_s / idle_s if idle_s else None
        entry["drafter_steps"] = row["drafter_steps"]
    return summary


def _medians(rows: list[harness.Row], system: str) -> harness.Row:
    """A system's columns, each at its median over rounds: the machine has its moods."""
    own = [row for row in rows if row["system"] == system]
    numbers = [name for name in own[0] if isinstance(own[0][name], int | float)]
    return {name: statistics.median(row[name] for row in own) for name in numbers}


def _excess(row: harness.Row, other: harness.Row) -> harness.Row:
    """Tells apart why a run's rollouts last longer, in parts of those without."""
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


def plot(summary: list[harness.Row], path: pathlib.Path, stamp: str) -> None:
    """Draws how long rollouts last."""
    fig, axes = plotting.figure(
        "Rollouts beside a drafter in training", "", "seconds of rollouts", stamp
    )
    rows = {row["system"]: row for row in summary}
    plotting.bars(axes, list(rows), list(rows.values()), "rollout_s", "%.1f s")
    plotting.save(fig, path)


def main(arguments: list[str] | None = None) -> list[harness.Row]:
    """Runs the experiment; returns the summary that it also writes."""
    options = parse_arguments(arguments)
    changes = harness.parse_pairs(options.set, "set")
    provenance = harness.Provenance(
        SLUG,
        {
            "config": options.config,
            "set": {k: harness.without_paths(v) for k, v in changes.items()},
            "steps": options.steps,
            "rounds": options.rounds,
            "environment": end_to_end.ENVIRONMENT,
        },
        {name: importlib.metadata.version(name) for name in ("jax", "llvmlite")},
    )

    def measure(name: str, case: harness.Row, number: int) -> harness.Row:
        with tempfile.TemporaryDirectory() as folder:
            workdir = pathlib.Path(folder)
            end_to_end.start(command_of(options, name, workdir))
            return reduced(workdir, options.steps)

    bound = bound_of(options)
    rows = harness.run_paired(
        list(SETTINGS), [{}], measure, rounds=options.rounds, warmups=0
    )
    summary = [entry | bound for entry in summary_of(rows)]
    harness.write_results(options, SLUG, rows, summary, provenance)
    out = harness.folder_of(options)
    plot(summary, out / f"{SLUG}.png", plotting.stamp(provenance.record))
    return summary


if __name__ == "__main__":
    main()
