"""Where rollouts run, by cluster size: on the learner's devices, or on their own.

    python -m experiments.cluster_placement --scale=cpu

Nothing here is measured on accelerators. The clusters of `experiments.cluster_size`
under our tuner, simulated with rollout workers on the learner's devices, by turns
(`workers.placement=colocated`), and on devices of their own (`separate`), with
`rollout.lag` 0 and 1. Of a separate learner's devices an eighth, a quarter or half of
the cluster are tried, and the best is shown. It needs no exchange after a rollout (5 s
are assumed where all devices do both); instead weights go to the workers at 2.5 GB/s,
one connection of a ring, and its devices wait for rollouts, unless those go on beside
updates.

Reproduces: no figure of the paper, whose workers are colocated.
"""

import argparse
import time

from experiments import cluster_size
from experiments.lab import claims, experiment, plotting, tables
from experiments.simulation import rl_step

COLOCATED, SEPARATE = "colocated", "separate"
LAGS = (0, 1)
# Parts of the cluster that may be the learner's.
PARTS = (8, 4, 2)
# Of fewer a learner of its own takes what rollouts lack.
_MANY = 64


def splits(model: str, num_devices: int) -> list[int]:
    """Returns how many of a cluster's devices a learner of its own may have."""
    machine, found = cluster_size.machine_of(model), []
    for part in PARTS:
        learners = num_devices // part
        try:
            cluster_size.check_learner(machine, learners)
        except ValueError:
            continue
        if (num_devices - learners) % machine.tensor == 0 and learners < num_devices:
            found.append(learners)
    return found


def separate(
    scenario: rl_step.Scenario, num_devices: int, learners: int, lag: int
) -> rl_step.Scenario:
    """Gives a cluster's learner devices of its own."""
    cfg = cluster_size.config_of(scenario.costs, num_devices - learners)
    return cluster_size.with_learner(scenario, cfg, learners, lag)


def measure(options: argparse.Namespace, cell: tables.Cell) -> list[tables.Row]:
    """Simulates one cluster with every placement and lag."""
    model, num_devices = cell["model"], cell["devices"]
    scenario = cluster_size.scenario_of(
        model, num_devices, options.num_prompts, options.seed
    )
    started = time.perf_counter()

    def run(its: rl_step.Scenario, system: str = rl_step.OURS) -> list[dict]:
        # The same steps of all, behind those in which a lag still brings nothing.
        first = max(LAGS)
        steps = first + options.steps
        return rl_step.run(its, system, steps, options.seed)[first:]

    off = run(scenario, rl_step.OFF)
    found = [((COLOCATED, 0, 0), rl_step.totals(run(scenario), off))]
    for lag in LAGS:
        tried = [
            (
                (SEPARATE, lag, learners),
                rl_step.totals(
                    run(separate(scenario, num_devices, learners, lag)), off
                ),
            )
            for learners in splits(model, num_devices)
        ]
        found += [min(tried, key=lambda one: one[1]["step_s"])] if tried else []
    rows = [
        {
            **cell.overrides,
            "placement": placement,
            "lag": lag,
            "learner_devices": learners,
            **totals,
        }
        for (placement, lag, learners), totals in found
    ]
    colocated = rows[0]["step_s"]
    for row in rows:
        row["of_colocated"] = colocated / row["step_s"]
        print(
            f"{model} {num_devices} devices, {row['placement']} with lag {row['lag']}: "
            f"{row['step_s']:.0f} s a step, {row['of_colocated']:.2f} times colocated",
            flush=True,
        )
    print(f"simulated in {time.perf_counter() - started:.0f} s", flush=True)
    return rows


def plot(rows: list[tables.Row], stamp: str) -> plotting.Figure:
    """Draws steps' seconds by cluster size."""
    models = tables.values(rows, "model")
    fig, panels = plotting.panels(
        "Seconds of an RL step by placement (simulation, not measured)",
        models,
        stamp,
        xlabel="H100 devices, 1024 responses a step",
        ylabel="s a step",
    )
    for axes, model in zip(panels, models, strict=True):
        its = tables.where(rows, model=model)
        for color, (placement, lag) in enumerate(
            [(COLOCATED, 0), *((SEPARATE, lag) for lag in LAGS)]
        ):
            drawn = tables.where(its, placement=placement, lag=lag)
            axes.plot(
                *(tables.column(drawn, name) for name in ("devices", "step_s")),
                *("o-",),
                color=plotting.COLORS[color],
                label=f"{placement}, lag {lag}",
            )
        axes.set_xscale("log", base=2)
        devices = tables.values(its, "devices")
        axes.set_xticks(devices, list(map(str, devices)))
        axes.set_ylim(bottom=0)
    return fig


def _pays_with_lag(rows: claims.Rows) -> claims.Finding:
    its = tables.where(rows, placement=SEPARATE, lag=1)
    gains = [row["of_colocated"] for row in its if row["devices"] >= _MANY]
    if not gains:
        return False, f"no cluster of {_MANY} devices was simulated"
    told = f"{min(gains):.2f} to {max(gains):.2f} times colocated"
    return min(gains) > 1, f"separate with lag 1: {told}"


def _waits_without_lag(rows: claims.Rows) -> claims.Finding:
    its = tables.where(rows, placement=SEPARATE, lag=0)
    gains = [row["of_colocated"] for row in its]
    told = f"{min(gains):.2f} to {max(gains):.2f} times colocated"
    return max(gains) <= 1, f"separate without lag: {told}"


EXPERIMENT = experiment.Experiment(
    slug="cluster_placement",
    text=__doc__,
    title="placement and lag by cluster size",
    options=(
        experiment.Option("devices", "8,16,32,64", "numbers of devices"),
        *experiment.plain(models="qwen2.5-7b,qwen2.5-32b", num_prompts=128, seed=0),
        experiment.Option("steps", 1, "RL steps simulated"),
    ),
    constants={
        "arms": cluster_size.ARMS,
        "table": cluster_size.TABLE,
        "weights_bytes_s": cluster_size.WEIGHTS_BYTES_S,
        "state_bytes": cluster_size.STATE_BYTES,
    },
    cells=lambda options: [
        tables.Cell({"model": model, "devices": devices}, None)
        for model in experiment.known(options.models, cluster_size.TENSOR, "models")
        for devices in experiment.numbers(options.devices, "devices")
    ],
    measure=measure,
    plot=plot,
    claims={
        f"ours: from {_MANY} devices on a learner with devices of its own pays with "
        "lag 1": _pays_with_lag,
        "ours: without lag it never does": _waits_without_lag,
    },
)
main = EXPERIMENT.main


if __name__ == "__main__":
    main()
