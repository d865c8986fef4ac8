"""Reward over RL steps with everything on against everything off.

    python -m experiments.reward_curves --scale=cpu

A small recipe (`configs/tiny.py:count`, a model made on the spot) is run both ways for
several seeds. In the paper the curves lie on each other but for noise; here the tokens
are the same, so rewards and losses must be, too, and the curves coincide exactly.

Reproduces: the paper's correctness figure (TLT and veRL), in kind.
"""

import argparse
import importlib.metadata
import pathlib

from experiments.lab import cells, harness, plotting, small_runs

SLUG = "reward_curves"
RECIPE = "configs/tiny.py:count"
SYSTEMS = {"off": {"specdec.mode": "off"}, "on": small_runs.DRAFTER}


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default=RECIPE)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--seeds", type=int, default=2)
    cells.add_options(parser)
    return parser.parse_args(arguments)


def summary_of(rows: list[harness.Row]) -> list[harness.Row]:
    """Compares both systems step by step, for each seed."""
    found = {(r["system"], r["seed"], r["step"]): r for r in rows}
    summary = []
    for seed in dict.fromkeys(row["seed"] for row in rows):
        off = [r for r in rows if (r["system"], r["seed"]) == ("off", seed)]
        pairs = [(r, found["on", seed, r["step"]]) for r in off]
        summary.append(
            {
                "seed": seed,
                "steps": len(pairs),
                "steps_differing": sum(
                    any(a[n] != b[n] for n in ("reward", "loss", "tokens_digest"))
                    for a, b in pairs
                ),
                "reward_gap_max": max(abs(a["reward"] - b["reward"]) for a, b in pairs),
                "reward_first": pairs[0][0]["reward"],
                "reward_last": pairs[-1][0]["reward"],
                "accept_length_last": pairs[-1][1]["accept_length"],
            }
        )
    return summary


def plot(rows: list[harness.Row], path: pathlib.Path, stamp: str) -> None:
    """Draws the curves; one lies on the other."""
    fig, axes = plotting.figure(
        "Reward, everything on and everything off", "RL step", "mean reward", stamp
    )
    seeds = list(dict.fromkeys(row["seed"] for row in rows))
    for seed, color in zip(seeds, plotting.COLORS, strict=False):
        for system, style, width in (("off", "-", 3.5), ("on", "--", 1.2)):
            its = [r for r in rows if (r["system"], r["seed"]) == (system, seed)]
            axes.plot(
                [r["step"] for r in its],
                [r["reward"] for r in its],
                style,
                color=color if system == "off" else "black",
                alpha=0.5 if system == "off" else 1.0,
                linewidth=width,
                label=f"{system}, seed {seed}",
            )
    axes.set_ylim(0, 1)
    plotting.save(fig, path)


def main(arguments: list[str] | None = None) -> list[harness.Row]:
    """Runs the experiment; returns the summary that it also writes."""
    options = parse_arguments(arguments)
    settings = {"config": options.config, "steps": options.steps, "systems": SYSTEMS}
    versions = {"jax": importlib.metadata.version("jax")}
    provenance = harness.Provenance(SLUG, settings, versions)

    def measure(cell):
        system = cell.overrides["system"]
        overrides = {"num_steps": options.steps, "seed": cell.seed, **SYSTEMS[system]}
        return [
            {
                "system": system,
                "seed": cell.seed,
                "step": row["step"],
                "reward": row["reward/mean"],
                "loss": row["policy/loss"],
                "tokens_digest": row["rollout/tokens_digest"],
                "accept_length": row["specdec/accept_length"],
            }
            for row in small_runs.run(options.config, overrides)
        ]

    wanted = [
        cells.Cell({"system": system}, seed)
        for seed in range(options.seeds)
        for system in SYSTEMS
    ]
    rows = cells.run(options, SLUG, provenance, wanted, measure)
    summary = summary_of(rows)
    out = harness.folder_of(options)
    harness.write_summary(options, SLUG, summary)
    plot(rows, out / f"{SLUG}.png", plotting.stamp(provenance.record))
    return summary


if __name__ == "__main__":
    main()
