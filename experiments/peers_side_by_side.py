r"""Ours beside its peers in one picture: decoding, and a whole GRPO step.

    python -m experiments.peers_side_by_side --scale=cpu
    python -m experiments.peers_side_by_side --scale=cpu --model-dir=DIR \
        --peers=transformers,vllm,trl,tunix --peer-python=transformers=PATH,...

With `--peers` all of them are measured in this one run, in interleaved rounds with
ours: first a GRPO step by `experiments.grpo_step_speed`, a system at a time in memory,
then decoding by `experiments.decode_speed`; both write their tables anew. Without
`--peers` nothing is measured: your own tables of both are read, where you have none
those of record, and the picture says whose they are.

A figure is how many times as fast ours is: tokens per second of greedy decoding with
prefill, by batch, against transformers, llama.cpp and vLLM; seconds of a GRPO step,
compilation apart, against TRL and Tunix. The range is that of the rounds' worst.
"""

import argparse
import pathlib

from experiments import decode_speed, grpo_step_speed
from experiments.lab import experiment, paired, plotting, provenance, tables

OURS = "tlt_jax"
DECODE, STEP = "decode_speed", "grpo_step_speed"
# Steps first: of theirs nobody knows beforehand whether memory will do.
MEASURED = {STEP: grpo_step_speed, DECODE: decode_speed}
KNOWN = {**decode_speed.PEERS, **grpo_step_speed.PEERS}
# The column before `/median` and `/times`, and the one that tells cases apart.
METRICS = {DECODE: ("tokens_per_s", "batch"), STEP: ("steady_step_s", "lengths")}
_SETTINGS = ("rounds", "step_rounds", "batches", "lengths")
_OF_THE_MACHINE = ("device", "cpu_model", "num_cpus", "platform")


def check(options: argparse.Namespace) -> None:
    """Refuses names that neither experiment knows."""
    if options.peers:
        paired.choose_peers(KNOWN, options.peers, options.peer_python)


def commands_of(
    options: argparse.Namespace, folder: pathlib.Path
) -> dict[str, list[str]]:
    """Returns what the experiments that measure are told, by name."""
    asked = options.peers.split(",")
    pythons = experiment.parse_pairs(options.peer_python, "peer-python")
    own = {
        DECODE: [f"--batches={options.batches}", f"--rounds={options.rounds}"],
        STEP: [
            f"--lengths={options.lengths}",
            f"--rounds={options.step_rounds}",
            "--one-at-a-time",
        ],
    }
    commands = {}
    for name, module in MEASURED.items():
        peers = [peer for peer in asked if peer in module.PEERS]
        chosen = ",".join(f"{p}={pythons[p]}" for p in peers if p in pythons)
        commands[name] = [
            *(f"--scale={options.scale}", f"--out={folder}", "--again"),
            f"--model-dir={options.model_dir}",
            *(f"--peers={','.join(peers)}", f"--peer-python={chosen}"),
            *own[name],
        ]
    return commands


def read(
    options: argparse.Namespace, folder: pathlib.Path
) -> dict[str, tuple[list[tables.Row], dict]]:
    """Measures if asked to; returns both summaries, and their records.

    Raises:
      ValueError: one of them is not there.
    """
    if options.peers:
        for name, command in commands_of(options, folder).items():
            MEASURED[name].main(command)
    found = {}
    for name in METRICS:
        path = summary_path(options, name)
        if not path.exists():
            raise ValueError(
                f"{path.name} is not in {path.parent.name}: make it with python "
                f"-m experiments.{name} --scale={options.scale} --peers=..."
            )
        found[name] = tables.read(path), provenance.read(path.parent, name)
    return found


def summary_path(options: argparse.Namespace, name: str) -> pathlib.Path:
    """Returns the summary of one of the two that is read."""
    return experiment.find(options, f"{name}_summary.csv")


def measure(
    context: dict, record: provenance.Provenance, cell: tables.Cell
) -> list[tables.Row]:
    """Reduces a summary to how many times as fast ours is."""
    name = cell["experiment"]
    rows, told = context[name]
    # Its figures are of the machine that they were measured on.
    record.record |= {key: told[key] for key in _OF_THE_MACHINE if key in told}
    if name == DECODE:
        rows = tables.where(rows, temperature=0)
    metric, case = METRICS[name]
    own = tables.where(rows, system=OURS)
    ours = {row[case]: row[f"{metric}/median"] for row in own}
    return [
        {
            "experiment": name,
            "case": f"{case} {row[case]}",
            "peer": row["system"],
            "metric": metric,
            "ours": ours[row[case]],
            "theirs": row[f"{metric}/median"],
            "times_faster": row[f"{metric}/times"],
            "times_faster/min": row[f"{metric}/times_min"],
            "rounds": row["rounds"],
        }
        for row in rows
        if row["system"] != OURS
    ]


def plot(rows: list[tables.Row], stamp: str) -> plotting.Figure:
    """Draws a panel for each experiment, a row for each peer and case."""
    titles = {
        DECODE: "greedy decoding, by tokens per second",
        STEP: "a GRPO step, by its seconds",
    }
    present = [name for name in titles if any(r["experiment"] == name for r in rows)]
    fig, panels = plotting.panels(
        "How many times as fast ours is (black: down to the worst round)",
        [titles[name] for name in present],
        stamp,
        xlabel="times the peer's speed",
    )
    peers = tables.values(rows, "peer")
    colors = dict(zip(peers, plotting.COLORS, strict=False))
    for axes, name in zip(panels, present, strict=True):
        its = tables.where(rows, experiment=name)
        its.sort(key=lambda row: peers.index(row["peer"]))
        for place, row in enumerate(reversed(its)):
            value = row["times_faster"]
            axes.barh(place, value, 0.6, color=colors[row["peer"]])
            axes.plot([row["times_faster/min"], value], [place] * 2, color="black")
            axes.annotate(
                f" {value:.2f}x", (value, place), va="center", ha="left", fontsize=8
            )
        told = [f"{row['peer']}, {row['case']}" for row in reversed(its)]
        axes.set_yticks(range(len(told)), told, fontsize=8)
        axes.axvline(1, color=plotting.GREY, linewidth=0.8)
        axes.grid(visible=False)
        axes.margins(x=0.15)
    return fig


EXPERIMENT = experiment.Experiment(
    slug="peers_side_by_side",
    text=__doc__,
    title="ours beside transformers, vLLM, TRL, Tunix in one run",
    needs="--model-dir=DIR --peers=transformers,llamacpp,vllm,trl,tunix",
    options=(
        *paired.options_of(KNOWN),
        experiment.Option("rounds", 3, "of decoding", recorded=False),
        experiment.Option("step-rounds", 2, "of GRPO steps", recorded=False),
        experiment.Option("batches", "1,8,32", "of decoding", recorded=False),
        experiment.Option("lengths", "fixed,natural", "of GRPO steps", recorded=False),
    ),
    check=check,
    settings=lambda options, context: {
        "tables": {
            name: {key: told[key] for key in ("commit", "config_hash")}
            for name, (_, told) in context.items()
        },
        **{name: getattr(options, name) for name in _SETTINGS if options.peers},
    },
    context=read,
    cells={"experiment": (DECODE, STEP)},
    measure=measure,
    sources=lambda options: [
        summary_path(options, name).with_name(f"{name}.csv") for name in METRICS
    ],
    is_derived=True,
    plot=plot,
)
main = EXPERIMENT.main


if __name__ == "__main__":
    main()
