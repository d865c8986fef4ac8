"""Speedup of an RL step by cluster size: the paper's table beside our simulation.

    python -m experiments.cluster_size --scale=cpu

Nothing here is measured on accelerators. Simulated are RL steps of a fixed number of
responses on 8 to 1024 H100 (`experiments.simulation`: our queue, scheduler, coordinator
and tuners in simulated time) with everything off, with the paper's rule (speculation
from 32 rows a worker on downwards, one strategy for each number of rows) and with our
tuner. Step times follow from the data sheet and two numbers fitted to the published
speedups of single batches; lengths are assumed. `cluster_size_assumptions.csv` lists
all of it. What is fitted does not include the figures that are compared.

Reproduces: the paper's speedups 1.21 to 1.76 (7B, 1 to 8 nodes) and 1.83, 2.12 (32B, 4
and 8 nodes), as a prediction.
"""

import argparse
import dataclasses
import functools
import time
from collections.abc import Callable

import numpy as np

from experiments.lab import claims, experiment, plotting, tables
from experiments.simulation import cluster_records, costs, published, rl_step, workload
from tlt_jax.specdec import strategy as strategy_lib

DEVICE = "h100"
DEVICES_PER_NODE = 8
TENSOR = {"qwen2.5-7b": 2, "qwen2.5-32b": 4}
PROMPT_TOKENS, GROUP_SIZE = 512, 8
MAX_NEW_TOKENS, MEDIAN_TOKENS, SIGMA = 32768, 2000, 1.2
MAX_ROWS, PAGE_SIZE, STEPS_PER_CALL = 256, 256, 256
MEMORY_FRAC = 0.85
THRESHOLD = 32
# Forwards' worth of operations after a rollout: old and reference log-probabilities
# one each, the update three.
PASSES, EXCHANGE_S = 5.0, 5.0
# Of the learner: weights and gradients in float32, and Adam's two moments.
STATE_BYTES = 16
# What one connection of a ring carries: a fifth of a 100 Gb/s network.
WEIGHTS_BYTES_S = 2.5e9
# The paper's best by batch: 64 nodes at one row, 48 at 2 to 4, 16 from 8 up.
TABLE = ("1:D12K8V64", "4:D12K8V48", "32:D8K8V16")
ARMS = (
    "4:D12K8V64,D12K8V48,D8K8V32,D8K8V16,D4K8V16",
    "64:D12K8V16,D8K8V32,D8K8V16,D4K8V16",
)
# Tokens beyond the first of the 7B's adapted drafter against the table's of 32B.
SCALE_7B = (published.ADAPTED - 1) / (
    published.accept_length(strategy_lib.parse("D8K8V64")) - 1
)

ASSUMPTIONS = (
    ("responses of an RL step", "128 prompts x 8 = 1024", "assumed; 8 is published"),
    (
        "response lengths",
        f"log-normal, median {MEDIAN_TOKENS}, sigma {SIGMA}, cut at {MAX_NEW_TOKENS}",
        "assumed but for the limit, which is published",
    ),
    ("prompt tokens", PROMPT_TOKENS, "assumed"),
    ("devices of a worker", "7B: 2, 32B: 4", "32B published, 7B assumed"),
    ("memory bandwidth", "3.35 TB/s, 75 % of it reached", "data sheet; share assumed"),
    ("operations", "989 T/s bf16", "data sheet"),
    ("launches, collectives", "20 us a layer", "assumed"),
    (
        "share of operations in decoding, seconds of a drafted level",
        "fitted, see the last rows",
        "fitted to four published speedups of 32B at batch 1 and 32",
    ),
    ("cached tokens a row in those", published.CONTEXT, "assumed"),
    (
        "accept lengths",
        "published by depth and nodes for 32B; 7B in proportion to 6.53 at D8 V64",
        "published at batch 1; taken to hold for all rows and lengths",
    ),
    ("drafter", "adapted, and stays so", "assumed; steps that idle time allows shown"),
    (
        "after the rollout",
        f"{PASSES:g} forwards' operations at 35 % of the device, {EXCHANGE_S:g} s",
        "assumed",
    ),
    ("rewards, checkpoints, failures, stragglers", "none", "left out"),
    ("rows of a worker", f"at most {MAX_ROWS}, as memory allows", "assumed"),
)


def machine_of(model: str) -> costs.RooflineCosts:
    """Returns a worker's costs."""
    return published.machine(costs.DEVICES[DEVICE], costs.MODELS[model], TENSOR[model])


def config_of(
    machine: costs.RooflineCosts,
    num_devices: int,
    *,
    per_host: int = DEVICES_PER_NODE,
    max_rows: int = MAX_ROWS,
    max_new_tokens: int = MAX_NEW_TOKENS,
    steps_per_call: int = STEPS_PER_CALL,
) -> cluster_records.ClusterConfig:
    """Divides devices into workers, and a worker's memory into weights and cache.

    Raises:
      ValueError: the weights leave no room.
    """
    memory = machine.tensor * machine.device.memory_bytes * MEMORY_FRAC
    free = memory - 2 * (machine.model.num_params + machine.model.drafter_params)
    pages = int(free // (PAGE_SIZE * machine.model.kv_bytes))
    if pages < 2:
        raise ValueError(
            f"tensor={machine.tensor} devices of {machine.device.memory_bytes / 1e9:g} "
            "GB do not hold the model's weights and a cache: give a worker more."
        )
    return cluster_records.ClusterConfig(
        num_workers=num_devices // machine.tensor,
        workers_per_place=max(per_host // machine.tensor, 1),
        max_rows=max_rows,
        num_pages=pages,
        page_size=PAGE_SIZE,
        steps_per_call=steps_per_call,
        max_new_tokens=max_new_tokens,
    )


def rest_of(
    machine: costs.RooflineCosts, num_devices: int, exchange_s: float = EXCHANGE_S
) -> Callable[[int], float]:
    """Returns what tells the seconds after a rollout of so many tokens."""
    return functools.partial(
        machine.update_s, num_devices=num_devices, passes=PASSES, exchange_s=exchange_s
    )


def check_learner(machine: costs.RooflineCosts, num_devices: int) -> None:
    """Refuses devices that do not hold what a learner keeps.

    Raises:
      ValueError: so it is.
    """
    state = STATE_BYTES * machine.model.num_params
    memory = num_devices * machine.device.memory_bytes * MEMORY_FRAC
    if state > memory:
        raise ValueError(
            f"{num_devices} devices of {machine.device.memory_bytes / 1e9:g} GB do not "
            f"hold the learner's state, {state / 1e9:.0f} GB: give it more."
        )


def with_learner(
    scenario: rl_step.Scenario,
    cfg: cluster_records.ClusterConfig,
    num_devices: int,
    lag: int,
    weights_bytes_s: float = WEIGHTS_BYTES_S,
) -> rl_step.Scenario:
    """Gives a learner so many devices of its own, and the workers `cfg` the others.

    Nothing is exchanged then between learning and rolling out, no cache is released and
    taken again; weights go to the workers instead.

    Raises:
      ValueError: see `check_learner`.
    """
    machine = scenario.costs
    check_learner(machine, num_devices)
    return dataclasses.replace(
        scenario,
        cfg=cfg,
        rest_s=rest_of(machine, num_devices, exchange_s=0.0),
        send_s=machine.send_s(weights_bytes_s),
        is_separate=True,
        lag=lag,
    )


@functools.cache
def lengths_of(
    step: int,
    count: int,
    seed: int,
    median: float = MEDIAN_TOKENS,
    sigma: float = SIGMA,
    most: int = MAX_NEW_TOKENS,
) -> tuple[int, ...]:
    """Draws a step's lengths, the same for every cluster and system."""
    rng = np.random.default_rng((seed, step))
    lengths = workload.log_normal(rng, count, median=median, sigma=sigma, most=most)
    return tuple(lengths.tolist())


def scenario_of(
    model: str, num_devices: int, num_prompts: int, seed: int
) -> rl_step.Scenario:
    """Describes a cluster."""
    machine = machine_of(model)
    arms, table = strategy_lib.parse_arms(ARMS), strategy_lib.parse_arms(TABLE)
    scale = SCALE_7B if model == "qwen2.5-7b" else 1.0

    def responses(step):
        lengths = lengths_of(step, num_prompts * GROUP_SIZE, seed)
        return workload.grouped(lengths, GROUP_SIZE, PROMPT_TOKENS)

    return rl_step.Scenario(
        cfg=config_of(machine, num_devices),
        costs=machine,
        acceptance=published.acceptance(
            {*arms.strategies(), *table.strategies()}, scale
        ),
        arms=arms,
        table=table,
        threshold=THRESHOLD,
        responses=responses,
        rest_s=rest_of(machine, num_devices),
    )


def measure(options: argparse.Namespace, cell: tables.Cell) -> list[tables.Row]:
    """Simulates one cluster under every system."""
    model, num_devices = cell["model"], cell["devices"]
    scenario = scenario_of(model, num_devices, options.num_prompts, options.seed)
    told = published.CLUSTER_SIZE.get((model, num_devices // DEVICES_PER_NODE))
    summary, started = [], time.perf_counter()
    for system, totals in rl_step.compare(scenario, options.steps, options.seed):
        entry: tables.Row = {
            **cell.overrides,
            "system": system,
            **totals,
            "published": told if system == rl_step.PAPER else None,
            "simulated_in_s": round(time.perf_counter() - started, 1),
        }
        started = time.perf_counter()
        summary.append(entry)
        print(
            f"{model} {num_devices} devices, {system}: {entry['step_s']:.0f} s a step, "
            f"{entry['times_faster']:.2f} times; published {entry['published'] or '-'}",
            flush=True,
        )
    return summary


def assumptions() -> list[tables.Row]:
    """Lists what the prediction rests on."""
    fit = published.fit()
    told = [
        *ASSUMPTIONS,
        ("fitted: operations reached in decoding", round(fit.flops_frac, 3), "fit"),
        ("fitted: seconds of a drafted level", round(fit.level_s, 6), "fit"),
    ]
    pairs = zip(published.SPEEDUPS.items(), fit.predicted, strict=True)
    for ((verify, batch), speedup), predicted in pairs:
        what = f"fit: speedup at V{verify}, batch {batch}"
        told.append((what, round(predicted, 2), f"published {speedup}"))
    return [
        {"what": what, "value": value, "from": source} for what, value, source in told
    ]


def plot(rows: list[tables.Row], stamp: str) -> plotting.Figure:
    """Draws speedups by cluster size."""
    models = tables.values(rows, "model")
    fig, panels = plotting.panels(
        "Predicted speedup of an RL step (simulation, not measured)",
        models,
        stamp,
        xlabel="H100 devices, 1024 responses a step",
        ylabel="times everything off",
    )
    for axes, model in zip(panels, models, strict=True):
        its = tables.where(rows, model=model)
        paper, ours = (
            tables.where(its, system=system) for system in (rl_step.PAPER, rl_step.OURS)
        )
        told = [row for row in its if row["published"]]
        for drawn, column, style, color, label in (
            (paper, "times_faster", "o-", 0, "paper's rule, simulated"),
            (ours, "times_faster", "o-", 1, "our tuner, simulated"),
            (told, "published", "s", 3, "published"),
        ):
            places, values = (tables.column(drawn, n) for n in ("devices", column))
            axes.plot(places, values, style, color=plotting.COLORS[color], label=label)
        axes.set_xscale("log", base=2)
        devices = tables.column(its, "devices")
        axes.set_xticks(devices, list(map(str, devices)))
        axes.set_ylim(bottom=1)
    return fig


def _clusters_gain(rows: claims.Rows) -> claims.Finding:
    pairs = [row for row in rows if row["published"]]
    errors = [abs(row["times_faster"] / row["published"] - 1) for row in pairs]
    told = ", ".join(
        f"{r['model'].split('-')[-1]} x{r['devices']}: {r['times_faster']:.2f} "
        f"({r['published']:g})"
        for r in pairs
    )
    return max(errors) <= 0.10, f"simulated (published): {told}"


def _grows_with_devices(rows: claims.Rows) -> claims.Finding:
    ok, told = True, []
    for model in tables.values(rows, "model"):
        its = tables.where(rows, model=model, system=rl_step.PAPER)
        values = [r["times_faster"] for r in sorted(its, key=lambda r: r["devices"])]
        ok &= all(b >= 0.98 * a for a, b in zip(values, values[1:], strict=False))
        told.append(f"{model} {values[0]:.2f} to {values[-1]:.2f}")
    return ok, "; ".join(told)


EXPERIMENT = experiment.Experiment(
    slug="cluster_size",
    text=__doc__,
    title="end to end by cluster size",
    published="7B 1.21 to 1.76; 32B 1.83, 2.12",
    options=(
        experiment.Option(
            "devices", "8,16,32,64,128,256,512,1024", "numbers of devices"
        ),
        *experiment.plain(models="qwen2.5-7b,qwen2.5-32b", num_prompts=128, seed=0),
        experiment.Option("steps", 2, "RL steps simulated"),
    ),
    constants={"arms": ARMS, "table": TABLE},
    cells=lambda options: [
        tables.Cell({"model": model, "devices": devices}, None)
        for model in experiment.known(options.models, TENSOR, "models")
        for devices in experiment.numbers(options.devices, "devices")
    ],
    measure=measure,
    derived=lambda: {"assumptions": assumptions()},
    plot=plot,
    claims={
        "the simulation is within 10 % of the paper's table by cluster "
        "size": _clusters_gain,
        "paper: the gain does not fall with the number of devices": _grows_with_devices,
    },
)
main = EXPERIMENT.main


if __name__ == "__main__":
    main()
