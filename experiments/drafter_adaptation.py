"""Accept length over RL steps: a drafter that goes on learning, and one that stopped.

    python -m experiments.drafter_adaptation --scale=cpu

Two runs of one small recipe (`configs/tiny.py:count`). In both the drafter learns from
random weights for `--warm-steps` RL steps, the same number of updates after each
rollout; then one of them learns no more. Tokens and policies are the same in both,
since speculation changes none, so what differs between the curves is the drafter alone:
how far the policy has moved away from the one that it knew. Accept lengths are the
engine's own, of one fixed strategy. `experiments.drafter_cadence` compares at equal
cost.

Reproduces: the paper's accept length 4.59 -> 6.53 by adaptation (Qwen2.5-7B, H100), in
kind and not in size.
"""

import argparse
import statistics

from experiments.lab import claims, experiment, plotting, recipes, tables

RECIPE = "configs/tiny.py:count"
ADAPTED, FROZEN = "adapted", "frozen"
SAME = ("tokens_digest", "policy_loss")
COLUMNS = ("step", "accept_length", "num_updates", "reward", "rollout_tokens", *SAME)


def measure(options: argparse.Namespace, cell: tables.Cell) -> list[tables.Row]:
    """Runs the recipe with one of the drafters."""
    system = cell["system"]
    overrides = {"num_steps": options.steps, "seed": cell.seed}
    settings = recipes.planned_settings(options.config, overrides, options.updates)

    def trains(number):
        return system == ADAPTED or number < options.warm_steps

    return [
        {"system": system, "seed": cell.seed} | recipes.columns(row, *COLUMNS)
        for row in recipes.run_planned(settings, trains)
    ]


def summary_of(rows: list[tables.Row], warm_steps: int) -> list[tables.Row]:
    """Takes means over the steps in which the drafters differ, and over seeds."""

    def mean(chosen, name):
        return statistics.mean(row[name] for row in chosen)

    last = max(row["step"] for row in rows)
    adapted = tables.where(rows, system=ADAPTED)
    summary = []
    for (system,), its in tables.groups(rows, "system").items():
        after = [row for row in its if row["step"] > warm_steps]
        tail = [row for row in after if row["step"] > last - (last - warm_steps) // 4]
        summary.append(
            {
                "system": system,
                "seeds": len({row["seed"] for row in its}),
                "steps": len(after),
                "accept_length": mean(after, "accept_length"),
                "accept_length/last_quarter": mean(tail, "accept_length"),
                "num_updates": max(row["num_updates"] for row in its),
                "reward_first": mean(tables.where(its, step=1), "reward"),
                "reward_last": mean(tables.where(its, step=last), "reward"),
                "steps_differing": sum(
                    tables.differing(its, adapted, ("seed", "step"), [name])
                    for name in SAME
                ),
            }
        )
    return summary


def plot(rows: list[tables.Row], warm_steps: int, stamp: str) -> plotting.Figure:
    """Draws both accept lengths, and the reward that moves the policy."""
    fig, (left, right) = plotting.panels(
        "A drafter that goes on learning, and one that stopped", ["", ""], stamp
    )
    seeds = tables.values(rows, "seed")
    for seed, color in zip(seeds, plotting.COLORS, strict=False):
        for system, style in ((ADAPTED, "-"), (FROZEN, "--")):
            its = tables.where(rows, system=system, seed=seed)
            look = {"color": color, "label": f"{system}, seed {seed}"}
            plotting.line(left, its, "step", "accept_length", style, **look)
        look["label"] = f"seed {seed}"
        plotting.line(right, its, "step", "reward", **look)
    left.axvline(warm_steps + 0.5, color=plotting.GREY, linewidth=0.8)
    left.set(
        xlabel="RL step (at the line the frozen one stops)", ylabel="accept length"
    )
    left.set_ylim(bottom=1)
    right.set(xlabel="RL step", ylabel="mean reward, the same with both", ylim=(0, 1))
    return fig


def _adapted_is_ahead(rows: claims.Rows) -> claims.Finding:
    adapted, frozen = (
        claims.only(rows, system=system)["accept_length/last_quarter"]
        for system in (ADAPTED, FROZEN)
    )
    return adapted > frozen, f"last quarter: {adapted:.2f} against {frozen:.2f}"


EXPERIMENT = experiment.Experiment(
    slug="drafter_adaptation",
    text=__doc__,
    title="drafter adaptation over RL steps",
    published="4.59 -> 6.53",
    larger=experiment.recipes("--updates=50"),
    options=(
        *experiment.plain(config=RECIPE, steps=40, warm_steps=12),
        experiment.Option("updates", 12, "of the drafter, after a rollout"),
        experiment.seeds(2),
    ),
    cells={"system": (ADAPTED, FROZEN)},
    measure=measure,
    summary=summary_of,
    plot=plot,
    claims={
        "paper: an adapted drafter has more accepted than a frozen "
        "one": _adapted_is_ahead,
    },
)
main = EXPERIMENT.main


if __name__ == "__main__":
    main()
