"""Reward over RL steps with everything on against everything off.

    python -m experiments.reward_curves --scale=cpu

A small recipe (`configs/tiny.py:count`, a model made on the spot) is run both ways for
several seeds. In the paper the curves lie on each other but for noise; here the tokens
are the same, so rewards and losses must be, too, and the curves coincide exactly.

Reproduces: the paper's correctness figure (TLT and veRL), in kind.
"""

import argparse

from experiments.lab import claims, experiment, plotting, recipes, tables

RECIPE = "configs/tiny.py:count"
SAME = ("reward", "loss", "tokens_digest")
SYSTEMS = {"off": {"specdec.mode": "off"}, "on": recipes.DRAFTER}


def measure(options: argparse.Namespace, cell: tables.Cell) -> list[tables.Row]:
    """Runs the recipe one of the ways."""
    system = cell["system"]
    overrides = {"num_steps": options.steps, "seed": cell.seed, **SYSTEMS[system]}
    return [
        {"system": system, "seed": cell.seed}
        | recipes.columns(row, "step", *SAME, "accept_length")
        for row in recipes.run(options.config, overrides)
    ]


def summary_of(rows: list[tables.Row]) -> list[tables.Row]:
    """Compares both systems step by step, for each seed."""
    summary = []
    for seed in tables.values(rows, "seed"):
        off, on = (tables.where(rows, system=s, seed=seed) for s in SYSTEMS)
        pairs = list(zip(off, on, strict=True))
        summary.append(
            {
                "seed": seed,
                "steps": len(pairs),
                "steps_differing": tables.differing(on, off, ("step",), SAME),
                "reward_gap_max": max(abs(a["reward"] - b["reward"]) for a, b in pairs),
                "reward_first": pairs[0][0]["reward"],
                "reward_last": pairs[-1][0]["reward"],
                "accept_length_last": pairs[-1][1]["accept_length"],
            }
        )
    return summary


def plot(rows: list[tables.Row], stamp: str) -> plotting.Figure:
    """Draws the curves; one lies on the other."""
    fig, axes = plotting.figure(
        "Reward, everything on and everything off", "RL step", "mean reward", stamp
    )
    seeds = tables.values(rows, "seed")
    for seed, color in zip(seeds, plotting.COLORS, strict=False):
        off = {"color": color, "alpha": 0.5, "linewidth": 3.5}
        on = {"color": "black", "linewidth": 1.2}
        for system, style, look in (("off", "-", off), ("on", "--", on)):
            its = tables.where(rows, system=system, seed=seed)
            look["label"] = f"{system}, seed {seed}"
            plotting.line(axes, its, "step", "reward", style, **look)
    axes.set_ylim(0, 1)
    return fig


def _coincide(rows: claims.Rows) -> claims.Finding:
    gap = max(row["reward_gap_max"] for row in rows)
    differing, steps = (
        sum(row[name] for row in rows) for name in ("steps_differing", "steps")
    )
    return not differing, f"{differing} of {steps} steps differ; largest gap {gap:g}"


EXPERIMENT = experiment.Experiment(
    slug="reward_curves",
    text=__doc__,
    title="reward curves, on against off",
    published="they lie on each other",
    larger=experiment.recipes("--steps=100"),
    options=(*experiment.plain(config=RECIPE, steps=24), experiment.seeds(2)),
    constants={"systems": SYSTEMS},
    cells={"system": SYSTEMS},
    measure=measure,
    summary=summary_of,
    plot=plot,
    claims={
        "paper: reward curves lie on each other; ours coincide exactly": _coincide,
    },
)
main = EXPERIMENT.main


if __name__ == "__main__":
    main()
