"""At how many active rows speculation should begin, and the paper's timeline case.

    python -m experiments.active_batch --scale=cpu

Two parts, neither of which runs a model:

- `recorded`: rollouts of SmolLM2 and its drafter, replayed from the trace of
  `experiments.tuner_trace` with every threshold (0: never), with our tuner, which has
  none, and with the oracle. Seconds are those recorded.
- `timeline`: 128 requests on one worker of four H100 (Qwen2.5-32B), simulated as in
  `experiments.cluster_size`, thresholds 0 to 128; the paper tells 2.44 times with 32.

Reproduces: the paper's threshold of 32 rows and its timeline case, as a prediction.
"""

import argparse
import itertools
import statistics

import numpy as np

from experiments import cluster_size
from experiments.lab import claims, experiment, plotting, tables
from experiments.simulation import arm_replay, cluster, published, trace_file, workload
from tlt_jax.specdec import strategy as strategy_lib
from tlt_jax.specdec.tuners import build as tuners
from tlt_jax.specdec.tuners import tuner as tuner_lib

RECORDED, TIMELINE = "recorded", "timeline"
NUM_REQUESTS, MODEL = 128, "qwen2.5-32b"
THRESHOLDS = {RECORDED: (0, 1, 2, 4, 8), TIMELINE: (0, 1, 4, 8, 16, 32, 64, 128)}
# By rows; as the paper's best, and 16 nodes beyond.
TABLE = ("1:D12K8V64", "4:D12K8V48", "128:D8K8V16")
PUBLISHED = {(TIMELINE, "32"): 2.44}


def threshold_tuner(
    table: strategy_lib.Arms, start: int, max_rows: int
) -> tuner_lib.Tuner:
    """Returns the paper's rule; a threshold of 0 never speculates."""
    if not start:
        return tuner_lib.Static(strategy_lib.Arms(()))
    return tuners.build("threshold", table, max_rows=max_rows, seed=0, threshold=start)


def replayed(trace: trace_file.Trace, case: str, rollouts: int, seed: int) -> float:
    """Returns the seconds of rollouts of the trained drafter's texts."""
    drafted = [kind for kind in trace.step_s if kind[1] is not None]
    kinds = sorted(drafted, key=lambda kind: (kind[0], str(kind[1])))
    by_rows = itertools.groupby(kinds, key=lambda kind: kind[0])
    arms = strategy_lib.Arms(
        tuple(
            (rows, tuple(strategy for _, strategy in found)) for rows, found in by_rows
        )
    )
    max_rows = arms.entries[-1][0]
    machine = arm_replay.Machine(dict(trace.step_s), arms, max_rows)
    # For each number of rows the best of the recording: a table as made by hand.
    texts = [arm_replay.Text(t) for t in list(trace.lifetimes.values())[-1]]
    best = []
    for rows, found in arms.entries:
        means = {
            s: np.mean([t.accept_length(s.draft_depth, 0, len(t)) for t in texts])
            / machine.typical_s[rows, s]
            for s in found
        }
        best.append((rows, (max(means, key=means.get),)))
    table = strategy_lib.Arms(tuple(best))
    drawn = np.random.default_rng((seed, 3)).integers(len(texts), size=(rollouts, 24))
    work = [arm_replay.Rollout(tuple(texts[i] for i in row)) for row in drawn]
    if case == "oracle":
        tuner = None
    elif case == "tuner":
        tuner = tuners.build("cost_model", arms, max_rows=max_rows, seed=seed)
    else:
        tuner = threshold_tuner(table, int(case), max_rows)
    choices = arm_replay.replay(machine, work, tuner, seed)
    return sum(choice.seconds for choice in choices)


def simulated(case: str, seed: int) -> float:
    """Returns the makespan of the timeline case."""
    machine = cluster_size.machine_of(MODEL)
    table = strategy_lib.parse_arms(TABLE)
    arms = strategy_lib.parse_arms((*cluster_size.ARMS[:1], "128:D8K8V16,D4K8V16"))
    if case == "tuner":
        tuner = tuners.build("cost_model", arms, max_rows=NUM_REQUESTS, seed=seed)
    else:
        tuner = threshold_tuner(table, int(case), NUM_REQUESTS)
    cfg = cluster_size.config_of(
        machine, machine.tensor, max_rows=NUM_REQUESTS, steps_per_call=64
    )
    acceptance = published.acceptance({*arms.strategies(), *table.strategies()})
    lengths = cluster_size.lengths_of(0, NUM_REQUESTS, seed)
    made = cluster.Cluster(cfg, machine, acceptance, tuner, seed=seed)
    responses = workload.grouped(
        lengths, cluster_size.GROUP_SIZE, cluster_size.PROMPT_TOKENS
    )
    return made.roll_out(responses).makespan_s


def measure(options: argparse.Namespace, cell: tables.Cell) -> list[tables.Row]:
    """Replays, or simulates, one case."""
    world, case = cell["world"], cell["threshold"]
    if world == RECORDED:
        seconds = replayed(trace_file.given(options), case, options.rollouts, cell.seed)
    else:
        seconds = simulated(case, cell.seed)
    row = {"world": world, "threshold": case, "seed": cell.seed}
    return [{**row, "seconds": seconds}]


def summary_of(rows: list[tables.Row]) -> list[tables.Row]:
    """Puts each case beside no speculation at all, seed by seed."""
    rows = [{**row, "threshold": str(row["threshold"])} for row in rows]
    off = {(r["world"], r["seed"]): r["seconds"] for r in rows if r["threshold"] == "0"}
    for row in rows:
        row["times"] = off[row["world"], row["seed"]] / row["seconds"]
    return [
        {
            "world": world,
            "threshold": threshold,
            "seeds": len(its),
            **tables.spread(
                "times_faster", tables.column(its, "times"), statistics.median
            ),
            "published": PUBLISHED.get((world, threshold)),
        }
        for (world, threshold), its in tables.groups(rows, "world", "threshold").items()
    ]


def plot(summary: list[tables.Row], stamp: str) -> plotting.Figure:
    """Draws the gain by threshold."""
    titles = {
        RECORDED: "replayed: SmolLM2 on two cores",
        TIMELINE: "simulated: 128 requests, 32B on 4 H100",
    }
    fig, panels = plotting.panels(
        "Speculation from how many active rows on?",
        list(titles.values()),
        stamp,
        xlabel="speculates up to so many rows (0: never)",
        ylabel="times no speculation",
    )
    for axes, world in zip(panels, titles, strict=True):
        found = tables.where(summary, world=world)
        its = {str(row["threshold"]): row["times_faster"] for row in found}
        names = [str(n) for n in THRESHOLDS[world]]
        values = [its[n] for n in names]
        axes.plot(names, values, "o-", color=plotting.COLORS[0], label="threshold")
        for name, color in (("tuner", plotting.COLORS[1]), ("oracle", plotting.GREY)):
            if name in its:
                axes.axhline(its[name], color=color, linestyle="--", label=name)
        for (where, name), value in PUBLISHED.items():
            if where == world:
                axes.plot([name], [value], "s", color=plotting.COLORS[3], label="paper")
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False, fontsize=8, loc="lower right")
    return fig


def _timeline_case(rows: claims.Rows) -> claims.Finding:
    value = claims.only(rows, world=TIMELINE, threshold=32)["times_faster"]
    return abs(value / 2.44 - 1) <= 0.1, f"simulated {value:.2f}, published 2.44"


EXPERIMENT = experiment.Experiment(
    slug="active_batch",
    text=__doc__,
    title="active-batch threshold, timeline case",
    published="2.44 times",
    options=(trace_file.OPTION, *experiment.plain(rollouts=10, seeds=3)),
    constants={"thresholds": THRESHOLDS, "table": TABLE},
    cells=lambda options: [
        tables.Cell({"world": world, "threshold": case}, seed)
        for world, found in THRESHOLDS.items()
        for case in (*map(str, found), "tuner", *(["oracle"] * (world == RECORDED)))
        for seed in range(options.seeds)
    ],
    measure=measure,
    sources=lambda options: [trace_file.path_of(options)],
    summary=summary_of,
    plot=plot,
    claims={
        "the simulated timeline case is within 10 % of the paper's "
        "2.44": _timeline_case,
    },
)
main = EXPERIMENT.main


if __name__ == "__main__":
    main()
