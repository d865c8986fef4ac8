"""Rollouts beside updates: reward and seconds by the age of the weights that roll out.

    python -m experiments.lag --scale=cpu

A small recipe (`configs/tiny.py:count`, a model made on the spot) is run with
`rollout.lag` 0, 1 and 2 for several seeds: with 0 rollout and update take turns, with
more the next rollouts go on while the learner updates, by weights that are so many
steps old. On two cores both want the same cores: what can be won there is what one of
them leaves idle.

Reproduces: no figure of the paper, whose system takes turns.
"""

import argparse
import math
import statistics

from experiments.lab import claims, experiment, plotting, recipes, tables

RECIPE = "configs/tiny.py:count"
LAGS = (0, 1, 2)
# Steps whose rewards are averaged at a run's begin and end.
_FEW = 10
_SECONDS = ("step", "rollout", "inference", "update", "wait")


def measure(options: argparse.Namespace, cell: tables.Cell) -> list[tables.Row]:
    """Runs the recipe with one lag."""
    lag = cell["lag"]
    overrides = {"num_steps": options.steps, "seed": cell.seed, "rollout.lag": lag}
    return [
        {"lag": lag, "seed": cell.seed}
        | recipes.columns(row, "step", "reward", "tokens", "tokens_digest")
        | {"age": row.get("rollout/lag", 0)}
        | {"importance": row.get("policy/importance_mean", 1.0)}
        | {f"{name}_s": row.get(f"time/{name}_s", 0.0) for name in _SECONDS}
        for row in recipes.run(options.config, overrides)
    ]


def summary_of(options: argparse.Namespace, rows: list[tables.Row]) -> list[tables.Row]:
    """Compares the lags: of seconds the median step, of rewards the last ten steps."""
    warm = [row for row in rows if row["step"] > options.warm_steps]
    seeds, summary = tables.values(rows, "seed"), []

    def seconds(lag, seed):
        return sum(row["step_s"] for row in tables.where(warm, lag=lag, seed=seed))

    for lag in tables.values(rows, "lag"):
        its = tables.where(warm, lag=lag)
        ends = [
            [row["reward"] for row in tables.where(rows, lag=lag, seed=seed)][-_FEW:]
            for seed in seeds
        ]
        last = [statistics.fmean(rewards) for rewards in ends]
        ratios = [math.log(seconds(0, seed) / seconds(lag, seed)) for seed in seeds]
        summary.append(
            {
                "lag": lag,
                "seeds": len(seeds),
                "reward_last": statistics.fmean(last),
                "reward_last_min": min(last),
                "reward_last_max": max(last),
                "importance_mean": statistics.fmean(row["importance"] for row in its),
                **{
                    f"{name}_s": statistics.median(row[f"{name}_s"] for row in its)
                    for name in _SECONDS
                },
                "times_faster": math.exp(statistics.fmean(ratios)),
            }
        )
    return summary


def plot(rows: list[tables.Row], stamp: str) -> plotting.Figure:
    """Draws the mean reward over seeds, by lag."""
    fig, axes = plotting.figure(
        "Reward by the age of the weights that roll out", "RL step", "reward", stamp
    )
    looks = zip(plotting.COLORS, ("-", "--", ":"), strict=False)
    for lag, (color, style) in zip(tables.values(rows, "lag"), looks, strict=False):
        its = tables.where(rows, lag=lag)
        means = [
            {
                "step": step,
                "reward": statistics.fmean(
                    row["reward"] for row in tables.where(its, step=step)
                ),
            }
            for step in tables.values(its, "step")
        ]
        look = {"color": color, "label": f"lag {lag}, mean of seeds"}
        plotting.line(axes, means, "step", "reward", style, **look)
    axes.set_ylim(0, 1)
    return fig


def _learns(rows: claims.Rows) -> claims.Finding:
    by_lag = {row["lag"]: row for row in rows}
    lowest = by_lag[0]["reward_last_min"]
    found = by_lag[1]["reward_last"]
    told = f"{found:.3f} with lag 1; without lag {lowest:.3f} in the worst seed"
    return found >= lowest, told


def _is_faster(rows: claims.Rows) -> claims.Finding:
    found = next(row["times_faster"] for row in rows if row["lag"] == 1)
    return found >= 1.15, f"{found:.2f} times"


EXPERIMENT = experiment.Experiment(
    slug="lag",
    text=__doc__,
    title="rollouts beside updates, by the age of their weights",
    larger=experiment.recipes("--steps=100"),
    options=(
        *experiment.plain(config=RECIPE, steps=40, warm_steps=3),
        experiment.seeds(3),
    ),
    cells={"lag": LAGS},
    measure=measure,
    summary=summary_of,
    plot=plot,
    claims={
        "ours: with lag 1 the last rewards are as without": _learns,
        "asked: with lag 1 a step is 1.15 times as fast on two cores": _is_faster,
    },
)
main = EXPERIMENT.main


if __name__ == "__main__":
    main()
