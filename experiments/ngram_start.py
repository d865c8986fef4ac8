"""The first RL steps, before a learned drafter is any good: what suffix matches bring.

    python -m experiments.ngram_start --scale=cpu

A small recipe (`configs/tiny.py:count`) with a drafter that begins with random weights,
four ways: plain decoding; suffix matches alone (the paper's model-free drafter,
"TLT-Base"); a drafter, and plain decoding until it is ready; a drafter, and suffix
matches until then. Tokens are the same in all; the drafters take the same number of
updates after every rollout. Counted, not timed: tokens for each row of each step. (Less
than 1 without speculation: rows that have ended stay in a call until it returns.)

Reproduces: the paper's TLT-Base and its start with the model-free drafter, in kind.
"""

import argparse

from experiments.lab import claims, experiment, plotting, recipes, tables

RECIPE = "configs/tiny.py:count"
MATCHES = ("32:D4K1V5-ngram",)
SYSTEMS = {
    "plain": {"specdec.mode": "off"},
    "matches alone": {
        "specdec.mode": "ngram",
        "specdec.tuner": "static",
        "specdec.ngram_strategies": MATCHES,
    },
    "drafter": recipes.DRAFTER,
    "matches, then drafter": {
        **recipes.DRAFTER,
        "specdec.ngram_strategies": MATCHES,
    },
}


def measure(options: argparse.Namespace, cell: tables.Cell) -> list[tables.Row]:
    """Runs the recipe one of the ways; a drafter learns after every rollout."""
    system = cell["system"]
    overrides = {"num_steps": options.steps, "seed": cell.seed, **SYSTEMS[system]}
    if overrides["specdec.mode"] == "tlt":
        settings = recipes.planned_settings(options.config, overrides, options.updates)
        found = recipes.run_planned(settings, lambda number: True)
    else:
        found = recipes.run(options.config, overrides)
    rows, ready = [], 0
    for row in found:
        names = ("step", "tokens", "tokens_digest", "row_steps", "accept_length")
        told = recipes.columns(row, *names)
        rows.append({"system": system, "seed": cell.seed, **told, "ready": ready})
        # Known at the end of a step, it holds for the next one's rollout.
        ready = row.get("drafter/ready", 0)
    return rows


def summary_of(rows: list[tables.Row]) -> list[tables.Row]:
    """Sums row-steps by system, in all and before any drafter was ready.

    `/min` and `/max` are those of single seeds.
    """
    ready = {(r["seed"], r["step"]) for r in rows if r["ready"]}
    early = [r for r in rows if (r["seed"], r["step"]) not in ready]
    plain = tables.where(rows, system="plain")
    summary = []
    for system in SYSTEMS:
        its = tables.where(rows, system=system)
        first = tables.where(early, system=system)
        summary.append(
            {
                "system": system,
                "seeds": len({r["seed"] for r in its}),
                "steps": len(its),
                "steps_differing": tables.differing(its, plain, ("seed", "step")),
                **_rates("tokens_per_row_step", its),
                "early_steps": len(first),
                **_rates("early_tokens_per_row_step", first),
            }
        )
    return summary


def _rates(name: str, rows: list[tables.Row]) -> tables.Row:
    """Of all rows, and of the seed with the least and with the most."""
    each = map(_rate, tables.groups(rows, "seed").values())
    found = [rate for rate in each if rate is not None]
    least, most = min(found, default=None), max(found, default=None)
    return {name: _rate(rows), f"{name}/min": least, f"{name}/max": most}


def _rate(rows: list[tables.Row]) -> float | None:
    steps = sum(r["row_steps"] for r in rows)
    return sum(r["tokens"] for r in rows) / steps if steps else None


def plot(rows: list[tables.Row], stamp: str) -> plotting.Figure:
    """Draws tokens per row-step over RL steps."""
    fig, axes = plotting.figure(
        "Before the drafter is ready", "RL step", "tokens per row and step", stamp
    )
    rated = [row | {"rate": row["tokens"] / row["row_steps"]} for row in rows]
    for system, color in zip(SYSTEMS, plotting.COLORS, strict=False):
        its = tables.where(rated, system=system)
        look = {"markersize": 3, "color": color, "label": system}
        plotting.line(axes, its, "step", "rate", "o-", has_range=True, **look)
    axes.set_ylim(bottom=0)
    return fig


EXPERIMENT = experiment.Experiment(
    slug="ngram_start",
    text=__doc__,
    title="suffix matches before the drafter is ready",
    published="TLT-Base",
    larger=experiment.recipes(),
    options=(
        *experiment.plain(config=RECIPE, steps=12),
        experiment.Option("updates", 12, "of the drafter, after a rollout"),
        experiment.seeds(3),
    ),
    constants={"systems": SYSTEMS},
    cells={"system": SYSTEMS},
    measure=measure,
    summary=summary_of,
    plot=plot,
    claims={
        "before the drafter is ready suffix matches give more tokens a step than "
        "none": claims.in_order(
            "early_tokens_per_row_step",
            "system",
            ("drafter", "matches, then drafter"),
        ),
    },
)
main = EXPERIMENT.main


if __name__ == "__main__":
    main()
