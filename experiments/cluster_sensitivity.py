"""How far the prediction by cluster size hangs on what it assumes.

    python -m experiments.cluster_sensitivity --scale=cpu

Of `experiments.cluster_size` a few clusters are simulated again with one assumption
changed at a time: how long responses are and how long their tail is, how many there
are, what a layer and a drafted level cost beyond the roofline, how much of the memory's
bandwidth is reached, what comes after the rollout, and how many drafts are accepted.
The published figure beside a range says more than beside a single prediction.
"""

import argparse
import dataclasses

from experiments import cluster_size
from experiments.lab import experiment, plotting, tables
from experiments.simulation import published, rl_step, workload

CLUSTERS = (("qwen2.5-7b", 8), ("qwen2.5-7b", 64), ("qwen2.5-32b", 64))
AS_ASSUMED = "as assumed"
# What is changed, and to what.
CHANGES: dict[str, dict[str, float]] = {
    AS_ASSUMED: {},
    "median 1000": {"median": 1000},
    "median 4000": {"median": 4000},
    "sigma 0.8": {"sigma": 0.8},
    "sigma 1.5": {"sigma": 1.5},
    "512 responses": {"responses": 512},
    "2048 responses": {"responses": 2048},
    "10 us a layer": {"layer_s": 1e-5},
    "40 us a layer": {"layer_s": 4e-5},
    "a level half as much": {"level_factor": 0.5},
    "a level twice as much": {"level_factor": 2.0},
    "bandwidth 60 %": {"bandwidth_frac": 0.6},
    "bandwidth 90 %": {"bandwidth_frac": 0.9},
    "update twice as long": {"rest_factor": 2.0},
    "drafts 20 % fewer": {"accept_factor": 0.8},
}


def names_of(options: argparse.Namespace) -> list[str]:
    """Returns the changes asked for, none of them first."""
    names = experiment.known(options.changes, CHANGES, "changes", ";") or list(CHANGES)
    return [AS_ASSUMED, *(name for name in names if name != AS_ASSUMED)]


def changed(
    model: str, num_devices: int, num_prompts: int, seed: int, change: dict
) -> rl_step.Scenario:
    """Returns a cluster with an assumption changed."""
    scenario = cluster_size.scenario_of(model, num_devices, num_prompts, seed)
    machine = scenario.costs
    machine = dataclasses.replace(
        machine,
        layer_s=change.get("layer_s", machine.layer_s),
        level_s=machine.level_s * change.get("level_factor", 1.0),
        bandwidth_frac=change.get("bandwidth_frac", machine.bandwidth_frac),
    )
    size = cluster_size.GROUP_SIZE
    count = int(change.get("responses", 128 * size) / (128 * size) * num_prompts) * size

    def responses(step):
        law = {name: change[name] for name in ("median", "sigma") if name in change}
        lengths = cluster_size.lengths_of(step, count, seed, **law)
        return workload.grouped(lengths, size, cluster_size.PROMPT_TOKENS)

    def rest_s(tokens):
        return change.get("rest_factor", 1.0) * scenario.rest_s(tokens)

    scale = cluster_size.SCALE_7B if model == "qwen2.5-7b" else 1.0
    return dataclasses.replace(
        scenario,
        costs=machine,
        responses=responses,
        rest_s=rest_s,
        acceptance=published.acceptance(
            scenario.table.strategies(), scale * change.get("accept_factor", 1.0)
        ),
    )


def measure(options: argparse.Namespace, cell: tables.Cell) -> list[tables.Row]:
    """Simulates one change on one cluster."""
    model, num_devices = cell["model"], cell["devices"]
    what, change = (options.num_prompts, options.seed), CHANGES[cell["change"]]
    scenario = changed(model, num_devices, *what, change)
    off, on = (
        rl_step.run(scenario, system, 1, options.seed)
        for system in (rl_step.OFF, rl_step.PAPER)
    )
    nodes = num_devices // cluster_size.DEVICES_PER_NODE
    return [
        {
            "model": model,
            "devices": num_devices,
            "change": cell["change"],
            "times_faster": rl_step.totals(on, off)["times_faster"],
            "off_step_s": off[0]["step_s"],
            "off_rollout_frac": off[0]["rollout_frac"],
            "published": published.CLUSTER_SIZE.get((model, nodes)),
        }
    ]


def plot(rows: list[tables.Row], stamp: str) -> plotting.Figure:
    """Draws the speedup under every change."""
    clusters = tables.groups(rows, "model", "devices")
    fig, panels = plotting.panels(
        "Predicted speedup if one assumption were another",
        [f"{model}, {devices} H100" for model, devices in clusters],
        stamp,
        xlabel="times everything off",
    )
    names = tables.values(rows, "change")[::-1]
    for axes, found in zip(panels, clusters.values(), strict=True):
        its = {row["change"]: row for row in found}
        base = its[AS_ASSUMED]["times_faster"]
        values = [its[name]["times_faster"] - base for name in names]
        axes.barh(names, values, 0.6, base, color=plotting.COLORS[0])
        if told := its[AS_ASSUMED]["published"]:
            axes.axvline(told, color=plotting.COLORS[3], label="published")
        axes.axvline(base, color=plotting.GREY, linewidth=0.8)
        axes.tick_params(axis="y", labelsize=7)
    return fig


EXPERIMENT = experiment.Experiment(
    slug="cluster_sensitivity",
    text=__doc__,
    title="the same, one assumption changed at a time",
    options=(
        experiment.Option("changes", "", "names, separated by semicolons"),
        *experiment.plain(num_prompts=128, seed=0),
    ),
    settings=lambda options: {
        "changes": {name: CHANGES[name] for name in names_of(options)},
    },
    cells=lambda options, changes: [
        tables.Cell({"model": model, "devices": devices, "change": name}, options.seed)
        for model, devices in CLUSTERS
        for name in changes
    ],
    measure=measure,
    plot=plot,
)
main = EXPERIMENT.main


if __name__ == "__main__":
    main()
