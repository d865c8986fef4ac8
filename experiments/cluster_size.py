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
import functools
import importlib.metadata
import pathlib
import time

import numpy as np

from experiments.lab import harness, plotting
from experiments.simulation import cluster_records, costs, published, rl_step, workload
from tlt_jax.specdec import strategy as strategy_lib

SLUG = "cluster_size"
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


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    harness.add_options(parser)
    parser.add_argument(
        "--devices", default="8,16,32,64,128,256,512,1024", help="numbers of devices"
    )
    parser.add_argument("--models", default="qwen2.5-7b,qwen2.5-32b")
    parser.add_argument("--num-prompts", type=int, default=128)
    parser.add_argument("--steps", type=int, default=2, help="RL steps simulated")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def machine_of(model: str) -> costs.RooflineCosts:
    """Returns a worker's costs."""
    fit = published.fit()
    return costs.RooflineCosts(
        costs.DEVICES[DEVICE],
        costs.MODELS[model],
        TENSOR[model],
        level_s=fit.level_s,
        flops_frac=fit.flops_frac,
    )


def num_pages_of(machine: costs.RooflineCosts) -> int:
    """Returns how many pages a worker's memory holds beside the weights.

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
    return pages


@functools.cache
def lengths_of(step: int, count: int, seed: int) -> tuple[int, ...]:
    """Draws a step's lengths, the same for every cluster and system."""
    rng = np.random.default_rng((seed, step))
    return tuple(
        workload.log_normal(
            rng, count, median=MEDIAN_TOKENS, sigma=SIGMA, most=MAX_NEW_TOKENS
        ).tolist()
    )


def scenario_of(
    model: str, num_devices: int, num_prompts: int, seed: int
) -> rl_step.Scenario:
    """Describes a cluster."""
    machine = machine_of(model)
    arms, table = strategy_lib.parse_arms(ARMS), strategy_lib.parse_arms(TABLE)
    scale = SCALE_7B if model == "qwen2.5-7b" else 1.0
    every = strategy_lib.Arms(((1, tuple({*arms.strategies(), *table.strategies()})),))

    def responses(step):
        lengths = lengths_of(step, num_prompts * GROUP_SIZE, seed)
        return workload.grouped(lengths, GROUP_SIZE, PROMPT_TOKENS)

    def rest_s(tokens):
        return machine.update_s(
            tokens, num_devices, passes=PASSES, exchange_s=EXCHANGE_S
        )

    return rl_step.Scenario(
        cfg=cluster_records.ClusterConfig(
            num_workers=num_devices // machine.tensor,
            workers_per_place=max(DEVICES_PER_NODE // machine.tensor, 1),
            max_rows=MAX_ROWS,
            num_pages=num_pages_of(machine),
            page_size=PAGE_SIZE,
            steps_per_call=STEPS_PER_CALL,
            max_new_tokens=MAX_NEW_TOKENS,
        ),
        costs=machine,
        acceptance=published.acceptance(every, scale),
        arms=arms,
        table=table,
        threshold=THRESHOLD,
        responses=responses,
        rest_s=rest_s,
    )


def measure(options: argparse.Namespace) -> list[harness.Row]:
    """Simulates every cluster under every system."""
    summary = []
    for model in options.models.split(","):
        for num_devices in map(int, options.devices.split(",")):
            scenario = scenario_of(
                model, num_devices, options.num_prompts, options.seed
            )
            reference: list[dict] = []
            for system in (rl_step.OFF, rl_step.PAPER, rl_step.OURS):
                started = time.perf_counter()
                rows = rl_step.run(scenario, system, options.steps, options.seed)
                reference = reference or rows
                nodes = num_devices // DEVICES_PER_NODE
                entry: harness.Row = {
                    "model": model,
                    "devices": num_devices,
                    "system": system,
                    **rl_step.totals(rows, reference),
                    "published": published.CLUSTER_SIZE.get((model, nodes))
                    if system == rl_step.PAPER
                    else None,
                    "simulated_in_s": round(time.perf_counter() - started, 1),
                }
                summary.append(entry)
                print(
                    f"{model} {num_devices} devices, {system}: "
                    f"{entry['step_s']:.0f} s a step, {entry['times_faster']:.2f} "
                    f"times; published {entry['published'] or '-'}",
                    flush=True,
                )
    return summary


def assumptions() -> list[harness.Row]:
    """Lists what the prediction rests on."""
    rows = [
        {"what": what, "value": value, "from": source}
        for what, value, source in ASSUMPTIONS
    ]
    fit = published.fit()
    rows += [
        {
            "what": "fitted: operations reached in decoding",
            "value": round(fit.flops_frac, 3),
            "from": "fit",
        },
        {
            "what": "fitted: seconds of a drafted level",
            "value": round(fit.level_s, 6),
            "from": "fit",
        },
    ]
    for (verify, batch), predicted in zip(
        published.SPEEDUPS, fit.predicted, strict=True
    ):
        rows.append(
            {
                "what": f"fit: speedup at V{verify}, batch {batch}",
                "value": round(predicted, 2),
                "from": f"published {published.SPEEDUPS[verify, batch]}",
            }
        )
    return rows


def plot(summary: list[harness.Row], path: pathlib.Path, stamp: str) -> None:
    """Draws speedups by cluster size."""
    models = list(dict.fromkeys(row["model"] for row in summary))
    fig, panels = plotting.panels(
        "Predicted speedup of an RL step (simulation, not measured)", len(models), stamp
    )
    for axes, model in zip(panels, models, strict=True):
        its = [row for row in summary if row["model"] == model]
        for system, label, color in (
            (rl_step.PAPER, "paper's rule, simulated", plotting.COLORS[0]),
            (rl_step.OURS, "our tuner, simulated", plotting.COLORS[1]),
        ):
            rows = [row for row in its if row["system"] == system]
            axes.plot(
                [row["devices"] for row in rows],
                [row["times_faster"] for row in rows],
                "o-",
                color=color,
                label=label,
            )
        told = [row for row in its if row["published"]]
        axes.plot(
            [row["devices"] for row in told],
            [row["published"] for row in told],
            "s",
            color=plotting.COLORS[3],
            label="published",
        )
        axes.set_xscale("log", base=2)
        axes.set_xticks([row["devices"] for row in its], minor=False)
        axes.set_xticklabels([str(row["devices"]) for row in its])
        axes.set_ylim(bottom=1)
        axes.set_title(model, loc="left", fontsize=10)
        axes.set_xlabel("H100 devices, 1024 responses a step")
        axes.set_ylabel("times everything off")
    plotting.save(fig, path)


def main(arguments: list[str] | None = None) -> list[harness.Row]:
    """Runs the simulation; returns the summary that it also writes."""
    options = parse_arguments(arguments)
    settings = {
        "devices": options.devices,
        "models": options.models,
        "num_prompts": options.num_prompts,
        "steps": options.steps,
        "seed": options.seed,
        "arms": ARMS,
        "table": TABLE,
    }
    provenance = harness.Provenance(
        SLUG, settings, {"numpy": importlib.metadata.version("numpy")}
    )
    summary = measure(options)
    out = harness.folder_of(options)
    harness.write_csv(out / f"{SLUG}_assumptions.csv", assumptions())
    harness.write_csv(out / f"{SLUG}.csv", summary)
    provenance.write(out / f"{SLUG}.json")
    plot(summary, out / f"{SLUG}.png", plotting.stamp(provenance.record))
    return summary


if __name__ == "__main__":
    main()
