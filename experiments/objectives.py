"""Drafter objectives and losses at equal cost: EAGLE, HASS, EAGLE-3, and four losses.

    python -m experiments.objectives --scale=cpu

Drafters of one shape are trained from the same random weights on the same texts of a
small target (`configs/tiny_drafter.py`). An update of K unrolled steps costs about K
times one of a single step, so each objective gets as many updates as make the same
number of unrolled steps in all (counted, not timed). Then EAGLE-3's form with the four
token losses. Measured on held-out texts: accept length when drafting as deep as the
recipe says, for coupled and deterministic drafts.

Reproduces: the paper's table of objectives (6.53 / 6.67 / 6.83 at costs 1, 3 and 7),
in kind: there costs differ, here they are equal; the target counts and is no LLM.
"""

import argparse
import pathlib
import statistics
import tempfile

from experiments.lab import claims, experiment, plotting, recipes, tables
from tlt_jax import train_drafter
from tlt_jax.runtime import compile_cache
from tlt_jax.settings import drafter_run

RECIPE = "configs/tiny_drafter.py"
# Unrolled steps of an update, as `training.objectives.preset` has them.
UNROLLED = {"eagle": 1, "hass": 3, "eagle3": 7}
LOSSES = ("soft_ce", "kl", "tv", "lk_hybrid")
CASES = {
    **{name: {"objective.name": name} for name in UNROLLED},
    **{
        f"eagle3, {loss}": {"objective.name": "eagle3", "objective.token_loss": loss}
        for loss in LOSSES[1:]
    },
}


def measure(options: argparse.Namespace, cell: tables.Cell) -> list[tables.Row]:
    """Trains a drafter and measures it."""
    compile_cache.enable()
    recipe = recipes.recipe_of(options.config)
    case = CASES[cell["case"]]
    unrolled = UNROLLED[case["objective.name"]]
    recipe.update_from_flattened_dict(
        {
            "objective.num_steps": None,
            "objective.token_loss": None,
            **case,
            "num_steps": max(options.unrolled // unrolled, 1),
            "seed": cell.seed,
            "checkpoint.every": 0,
            "eval.every": 0,
            "log.progress": "off",
        }
    )
    run = drafter_run.load(recipe.to_dict())
    with tempfile.TemporaryDirectory() as folder:
        found = train_drafter.train(run, pathlib.Path(folder))
    return [
        {
            "case": cell["case"],
            "seed": cell.seed,
            "updates": run.num_steps,
            "unrolled": run.num_steps * unrolled,
            "depth": run.eval.depth,
            "accept_length/coupled": found["eval/coupled_accept_length"],
            "accept_length/deterministic": found["eval/deterministic_accept_length"],
        }
    ]


def summary_of(rows: list[tables.Row]) -> list[tables.Row]:
    """Takes medians over seeds."""
    summary = []
    for (case,), its in tables.groups(rows, "case").items():
        entry: tables.Row = {"case": case, "seeds": len(its)}
        entry |= {name: its[0][name] for name in ("updates", "unrolled")}
        for ranking in ("coupled", "deterministic"):
            name = f"accept_length/{ranking}"
            found = tables.column(its, name)
            entry |= tables.spread(name, found, statistics.median)
        summary.append(entry)
    return summary


def plot(summary: list[tables.Row], stamp: str) -> plotting.Figure:
    """Draws accept lengths by objective."""
    fig, axes = plotting.figure(
        "Drafter objectives at equal cost", "accept length", "", stamp
    )
    for place, row in enumerate(reversed(summary)):
        for shift, ranking, color in (
            (0.15, "coupled", plotting.COLORS[0]),
            (-0.15, "deterministic", plotting.COLORS[1]),
        ):
            name = f"accept_length/{ranking}"
            ends = [row[f"{name}/min"], row[f"{name}/max"]]
            axes.plot(ends, [place + shift] * 2, "-", color=color)
            label = None if place else ranking
            axes.plot([row[name]], [place + shift], "o", color=color, label=label)
    names = [f"{r['case']} ({r['updates']} updates)" for r in reversed(summary)]
    axes.set_yticks(range(len(names)), names)
    axes.set_xlim(left=1)
    return fig


EXPERIMENT = experiment.Experiment(
    slug="objectives",
    text=__doc__,
    title="objectives and losses at equal cost",
    published="EAGLE 6.53 / 1x, HASS 6.67 / 3x, EAGLE-3 6.83 / 7x",
    larger=experiment.both("--config=configs/smollm2_drafter.py --unrolled=8400"),
    options=(
        experiment.Option("config", RECIPE),
        experiment.Option("unrolled", 420, "unrolled steps that each may take"),
        experiment.seeds(2),
    ),
    constants={"cases": CASES},
    cells={"case": CASES},
    measure=measure,
    summary=summary_of,
    plot=plot,
    claims={
        "paper: EAGLE-3 ahead of HASS ahead of EAGLE (here at equal "
        "cost)": claims.in_order(
            "accept_length/coupled", "case", ("eagle", "hass", "eagle3")
        ),
    },
)
main = EXPERIMENT.main


if __name__ == "__main__":
    main()
