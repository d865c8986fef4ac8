"""How often a drafter should learn while its target moves, at equal cost.

    python -m experiments.drafter_cadence --scale=cpu

Runs of one small recipe (`configs/tiny.py:count`) with drafters that begin with random
weights and take the same number of updates in all, each of the same size: some after
every rollout, after every fourth or every eighth, four or eight times as many then; all
of them in the first four RL steps (one good warm-up), and then no more; or half of them
then and half later. Texts are those of the last two rollouts. Tokens and policies are
the same in all, since speculation changes none, so that accept lengths compare; they
are the engine's own, of one fixed strategy. How far the target drifts is swept by its
learning rate and told by `policy_distance`, how far its weights have gone in the run,
as a part of their length.

Settles, at this size: whether updates along the way pay against one good warm-up.
"""

import argparse
import statistics
from collections.abc import Sequence

from experiments.lab import claims, experiment, plotting, recipes, tables

RECIPE = "configs/tiny.py:count"
WARM_UP = "one warm-up"
# RL steps of the warm-up.
WARM_STEPS = 4
# When a drafter learns: after so many first RL steps; then from one on, each so manyth.
SYSTEMS = {
    "every step": (0, 0, 1),
    "every 4th": (0, 0, 4),
    "every 8th": (0, 0, 8),
    "warm-up, then every 6th": (WARM_STEPS, 8, 6),
    WARM_UP: (WARM_STEPS, 0, 0),
}
COLUMNS = (
    *("step", "accept_length", "tokens", "row_steps", "num_updates", "reward"),
    *("policy_distance", "tokens_digest"),
)
# The target's learning rates; the recipe's is 5e-4.
DRIFTS = {"small": 5e-5, "the recipe's": 5e-4, "large": 2e-3}


def check(options: argparse.Namespace) -> None:
    """Refuses updates that cannot be shared evenly."""
    trainings = {name: num_trainings(name, options.steps) for name in SYSTEMS}
    if any(not num or options.updates % num for num in trainings.values()):
        raise ValueError(
            f"--updates={options.updates} in --steps={options.steps} cannot be shared "
            f"evenly among the trainings of each drafter ({trainings}): give a "
            "multiple of all."
        )


def trains(system: str, number: int) -> bool:
    """Tells whether a drafter learns after the rollout of a step, counted from 0."""
    warm, first, every = SYSTEMS[system]
    later = bool(every) and number >= first and (number - first) % every == 0
    return number < warm or later


def num_trainings(system: str, steps: int) -> int:
    """Counts the steps after which a drafter learns."""
    return sum(trains(system, number) for number in range(steps))


def measure(options: argparse.Namespace, cell: tables.Cell) -> list[tables.Row]:
    """Runs the recipe with one drafter."""
    system, drift = cell["system"], cell["drift"]
    overrides = {"num_steps": options.steps, "seed": cell.seed}
    overrides["optimizer.learning_rate"] = DRIFTS[drift]
    each = options.updates // num_trainings(system, options.steps)
    settings = recipes.planned_settings(options.config, overrides, each)
    rows = recipes.run_planned(settings, lambda number: trains(system, number))
    return [
        {"drift": drift, "system": system, "seed": cell.seed}
        | recipes.columns(row, *COLUMNS)
        for row in rows
    ]


def summary_of(rows: list[tables.Row]) -> list[tables.Row]:
    """Takes means over steps and seeds, and compares with the warm-up, seed by seed."""
    last = max(row["step"] for row in rows)
    parts = {
        "after_warm_up": lambda row: row["step"] > WARM_STEPS,
        "last_quarter": lambda row: row["step"] > last - last // 4,
    }
    found = {
        (*key, part): statistics.mean(r["accept_length"] for r in its if chosen(r))
        for key, its in tables.groups(rows, "drift", "system", "seed").items()
        for part, chosen in parts.items()
    }
    warm = tables.where(rows, system=WARM_UP)
    summary = []
    for (drift, system), its in tables.groups(rows, "drift", "system").items():
        ends = tables.where(its, step=last)
        seeds = tables.column(ends, "seed")
        entry: tables.Row = {
            "drift": drift,
            "system": system,
            "seeds": len(seeds),
            "updates": ends[0]["num_updates"],
            "policy_distance": statistics.mean(r["policy_distance"] for r in ends),
            "steps_differing": tables.differing(its, warm, ("drift", "seed", "step")),
        }
        for part in parts:
            values = [found[drift, system, seed, part] for seed in seeds]
            others = [found[drift, WARM_UP, seed, part] for seed in seeds]
            ratios = [a / b for a, b in zip(values, others, strict=True)]
            entry[f"accept_length/{part}"] = statistics.mean(values)
            entry[f"of_warm_up/{part}"] = statistics.mean(ratios)
            entry[f"of_warm_up/{part}/min"] = min(ratios)
        summary.append(entry)
    return summary


def plot(rows: list[tables.Row], stamp: str) -> plotting.Figure:
    """Draws accept lengths over RL steps, a panel for each size of drift."""
    last = max(row["step"] for row in rows)
    by_drift = tables.groups(rows, "drift")
    names = []
    for (drift,), its in by_drift.items():
        ends = tables.column(tables.where(its, step=last), "policy_distance")
        names.append(f"drift: {drift} (weights moved {statistics.mean(ends):.1%})")
    fig, panels = plotting.panels(
        "A drafter's updates, the same number at another cadence",
        names,
        stamp,
        xlabel="RL step",
        ylabel="accept length, mean of the seeds",
    )
    for axes, its in zip(panels, by_drift.values(), strict=True):
        for system, color in zip(SYSTEMS, plotting.COLORS, strict=False):
            drawn = tables.where(its, system=system)
            style = "--" if system == WARM_UP else "-"
            look = {"color": color, "label": system}
            plotting.line(axes, drawn, "step", "accept_length", style, **look)
        axes.axvline(WARM_STEPS + 0.5, color=plotting.GREY, linewidth=0.8)
        axes.set_ylim(bottom=1)
    return fig


def _of_warm_up(drifts: Sequence[str], least: float, most: float = float("inf")):
    """Decides whether updates after every rollout end where claimed."""

    def decide(rows):
        name = "of_warm_up/last_quarter"
        values = {
            drift: claims.only(rows, drift=drift, system="every step")[name]
            for drift in drifts
        }
        told = ", ".join(f"{drift} {value:.3f}" for drift, value in values.items())
        ok = all(least <= value <= most for value in values.values())
        return ok, f"of one warm-up's accept length in the last quarter: {told}"

    return decide


EXPERIMENT = experiment.Experiment(
    slug="drafter_cadence",
    text=__doc__,
    title="cadence of the drafter's updates, size of the drift",
    larger=experiment.recipes("--updates=3840"),
    options=(
        experiment.Option("config", RECIPE),
        experiment.Option("steps", 32, "RL steps of a run"),
        experiment.Option("updates", 384, "of a drafter, in a whole run"),
        experiment.seeds(2),
    ),
    constants={"systems": SYSTEMS, "drifts": DRIFTS},
    check=check,
    cells={"drift": DRIFTS, "system": SYSTEMS},
    measure=measure,
    summary=summary_of,
    plot=plot,
    claims={
        "where the target moves, updates along the way end ahead of one warm-up of "
        "equal cost (5 % or more)": _of_warm_up(("the recipe's", "large"), 1.05),
        "where it hardly moves, one warm-up does as well (within 2 %)": _of_warm_up(
            ("small",), 0.98, 1.02
        ),
    },
)
main = EXPERIMENT.main


if __name__ == "__main__":
    main()
