"""Ours beside its peers in one picture: decoding, and a whole GRPO step.

    python -m experiments.peers_side_by_side --scale=cpu
    python -m experiments.peers_side_by_side --scale=cpu --model-dir=DIR \
        --peers=transformers,vllm,trl,tunix --peer-python=transformers=PATH,...

With `--peers` all of them are measured in this one run, in interleaved rounds with
ours: first a GRPO step by `experiments.grpo_step_speed`, a system at a time in memory,
then decoding by `experiments.decode_speed`; both write their tables anew. Without
`--peers` the tables that are there are read.

A figure is how many times as fast ours is: tokens per second of greedy decoding with
prefill, by batch, against transformers, llama.cpp and vLLM; seconds of a GRPO step,
compilation apart, against TRL and Tunix. The range is that of the rounds' worst.
"""

import argparse
import json
import pathlib
from collections.abc import Sequence

from experiments import decode_speed, grpo_step_speed
from experiments.lab import cells, harness, plotting

SLUG = "peers_side_by_side"
OURS = "tlt_jax"
DECODE, STEP = decode_speed.SLUG, grpo_step_speed.SLUG
# Steps first: of theirs nobody knows beforehand whether memory will do.
MEASURED = {STEP: grpo_step_speed, DECODE: decode_speed}


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    known = {**decode_speed.PEERS, **grpo_step_speed.PEERS}
    parser = harness.argument_parser(__doc__, known)
    parser.add_argument("--rounds", type=int, default=3, help="of decoding")
    parser.add_argument("--step-rounds", type=int, default=2, help="of GRPO steps")
    parser.add_argument("--batches", default="1,8,32", help="of decoding")
    parser.add_argument("--lengths", default="fixed,natural", help="of GRPO steps")
    options = parser.parse_args(arguments)
    if options.peers:
        # Refuses names that neither experiment knows.
        harness.choose_peers(known, options.peers, options.peer_python)
    return options


def commands_of(options: argparse.Namespace) -> dict[str, list[str]]:
    """Returns what the experiments that measure are told, by name."""
    asked = options.peers.split(",")
    pythons = harness.parse_pairs(options.peer_python, "peer-python")
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
            *(f"--scale={options.scale}", f"--out={harness.folder_of(options)}"),
            f"--model-dir={options.model_dir}",
            *(f"--peers={','.join(peers)}", f"--peer-python={chosen}"),
            *own[name],
        ]
    return commands


def rows_of(
    experiment: str,
    rows: Sequence[harness.Row],
    metric: str,
    case: str,
) -> list[harness.Row]:
    """Reduces a summary to how many times as fast ours is.

    Args:
      experiment: whose summary.
      rows: its rows, ours among them.
      metric: the column before `/median` and `/times`.
      case: the column that tells cases apart.
    """
    ours = {row[case]: row[f"{metric}/median"] for row in rows if row["system"] == OURS}
    return [
        {
            "experiment": experiment,
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


def plot(rows: list[harness.Row], path: pathlib.Path, stamp: str) -> None:
    """Draws a panel for each experiment, a row for each peer and case."""
    titles = {
        DECODE: "greedy decoding, by tokens per second",
        STEP: "a GRPO step, by its seconds",
    }
    present = [name for name in titles if any(r["experiment"] == name for r in rows)]
    fig, panels = plotting.panels(
        "How many times as fast ours is", len(present), stamp, width=5.4
    )
    peers = list(dict.fromkeys(row["peer"] for row in rows))
    colors = dict(zip(peers, plotting.COLORS, strict=False))
    for axes, name in zip(panels, present, strict=True):
        its = [row for row in rows if row["experiment"] == name]
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
        axes.set_title(titles[name], loc="left", fontsize=10)
        axes.set_xlabel("times the peer's speed (black: down to the worst round)")
    plotting.save(fig, path)


def main(arguments: list[str] | None = None) -> list[harness.Row]:
    """Measures if asked to, and reads both summaries; returns the table that it writes.

    Raises:
      ValueError: one of them is not there.
    """
    options = parse_arguments(arguments)
    source, measured = harness.RESULTS_DIR / options.scale, {}
    if options.peers:
        source = harness.folder_of(options)
        for name, command in commands_of(options).items():
            MEASURED[name].main(command)
        measured = {
            name: getattr(options, name)
            for name in ("rounds", "step_rounds", "batches", "lengths")
        }
    tables, records = {}, {}
    for name in (DECODE, STEP):
        path = source / f"{name}_summary.csv"
        if not path.exists():
            raise ValueError(
                f"{path.name} is not in {source.name}: make it with python "
                f"-m experiments.{name} --scale={options.scale} --peers=..."
            )
        tables[name] = cells.read(path)
        record = json.loads((source / f"{name}.json").read_text("utf-8"))
        records[name] = {key: record[key] for key in ("commit", "config_hash")}
    greedy = [row for row in tables[DECODE] if row["temperature"] == 0]
    rows = rows_of(DECODE, greedy, "tokens_per_s", "batch")
    rows += rows_of(STEP, tables[STEP], "steady_step_s", "lengths")
    provenance = harness.Provenance(SLUG, {"tables": records, **measured}, {})
    out = harness.folder_of(options)
    harness.write_csv(out / f"{SLUG}.csv", rows)
    provenance.write(out / f"{SLUG}.json")
    print(harness.format_table(rows))
    plot(rows, out / f"{SLUG}.png", plotting.stamp(provenance.record))
    return rows


if __name__ == "__main__":
    main()
