"""The first RL steps, before a learned drafter is any good: what suffix matches bring.

    python -m experiments.ngram_start --scale=cpu

A small recipe (`configs/tiny.py:count`) with a drafter that begins with random weights,
four ways: plain decoding; suffix matches alone (the paper's model-free drafter,
"TLT-Base"); a drafter, and plain decoding until it is ready; a drafter, and suffix
matches until then. Tokens are the same in all; the drafters take the same number of
updates after every rollout. Counted, not timed: tokens for each row of each step. (Less
than 1 without speculation: rows that have ended stay in a call until it returns.)

Reproduces: the paper's TLT-Base and its start with the model-free drafter, in kind.
"""

import argparse
import importlib.metadata
import pathlib
import statistics

from experiments.lab import cells, drafter_runs, harness, plotting, small_runs

SLUG = "ngram_start"
RECIPE = "configs/tiny.py:count"
MATCHES = ("32:D4K1V5-ngram",)
SYSTEMS = {
    "plain": {"specdec.mode": "off"},
    "matches alone": {
        "specdec.mode": "ngram",
        "specdec.tuner": "static",
        "specdec.ngram_strategies": MATCHES,
    },
    "drafter": small_runs.DRAFTER,
    "matches, then drafter": {
        **small_runs.DRAFTER,
        "specdec.ngram_strategies": MATCHES,
    },
}


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default=RECIPE)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument(
        "--updates", type=int, default=12, help="of the drafter, after a rollout"
    )
    parser.add_argument("--seeds", type=int, default=3)
    cells.add_options(parser)
    return parser.parse_args(arguments)


def run(options: argparse.Namespace, overrides: dict[str, object]) -> list[harness.Row]:
    """Runs the recipe; a drafter learns after every rollout."""
    if overrides["specdec.mode"] != "tlt":
        return small_runs.run(options.config, overrides)
    settings = drafter_runs.settings_of(options.config, overrides, options.updates)
    return drafter_runs.run(settings, lambda number: True)


def summary_of(rows: list[harness.Row]) -> list[harness.Row]:
    """Sums row-steps by system, in all and before any drafter was ready.

    `/min` and `/max` are those of single seeds.
    """
    ready = {(r["seed"], r["step"]) for r in rows if r["ready"]}
    early = [r for r in rows if (r["seed"], r["step"]) not in ready]
    plain = {
        (r["seed"], r["step"]): r["tokens_digest"]
        for r in rows
        if r["system"] == "plain"
    }
    summary = []
    for system in SYSTEMS:
        its = [r for r in rows if r["system"] == system]
        first = [r for r in early if r["system"] == system]
        summary.append(
            {
                "system": system,
                "seeds": len({r["seed"] for r in its}),
                "steps": len(its),
                "steps_differing": sum(
                    r["tokens_digest"] != plain[r["seed"], r["step"]] for r in its
                ),
                **_rates("tokens_per_row_step", its),
                "early_steps": len(first),
                **_rates("early_tokens_per_row_step", first),
            }
        )
    return summary


def _rates(name: str, rows: list[harness.Row]) -> harness.Row:
    """Of all rows, and of the seed with the least and with the most."""
    seeds = dict.fromkeys(r["seed"] for r in rows)
    each = [_rate([r for r in rows if r["seed"] == seed]) for seed in seeds]
    found = [rate for rate in each if rate is not None]
    return {
        name: _rate(rows),
        f"{name}/min": min(found, default=None),
        f"{name}/max": max(found, default=None),
    }


def _rate(rows: list[harness.Row]) -> float | None:
    steps = sum(r["row_steps"] for r in rows)
    return sum(r["tokens"] for r in rows) / steps if steps else None


def plot(rows: list[harness.Row], path: pathlib.Path, stamp: str) -> None:
    """Draws tokens per row-step over RL steps."""
    fig, axes = plotting.figure(
        "Before the drafter is ready", "RL step", "tokens per row and step", stamp
    )
    for system, color in zip(SYSTEMS, plotting.COLORS, strict=False):
        by_step: dict[int, list[float]] = {}
        for r in rows:
            if r["system"] == system:
                rate = r["tokens"] / r["row_steps"]
                by_step.setdefault(r["step"], []).append(rate)
        steps, rates = list(by_step), list(by_step.values())
        means = [statistics.mean(values) for values in rates]
        axes.plot(steps, means, "o-", markersize=3, color=color, label=system)
        least, most = [min(values) for values in rates], [max(v) for v in rates]
        axes.fill_between(steps, least, most, color=color, alpha=0.15, linewidth=0)
    axes.set_ylim(bottom=0)
    plotting.save(fig, path)


def main(arguments: list[str] | None = None) -> list[harness.Row]:
    """Runs the experiment; returns the summary that it also writes."""
    options = parse_arguments(arguments)
    settings = {
        "config": options.config,
        "steps": options.steps,
        "updates": options.updates,
        "systems": SYSTEMS,
    }
    versions = {"jax": importlib.metadata.version("jax")}
    provenance = harness.Provenance(SLUG, settings, versions)

    def measure(cell):
        system = cell.overrides["system"]
        overrides = {"num_steps": options.steps, "seed": cell.seed, **SYSTEMS[system]}
        rows, ready = [], 0
        for row in run(options, overrides):
            rows.append(
                {
                    "system": system,
                    "seed": cell.seed,
                    "step": row["step"],
                    "tokens": row["rollout/tokens"],
                    "tokens_digest": row["rollout/tokens_digest"],
                    "row_steps": row["rollout/row_steps"],
                    "accept_length": row["specdec/accept_length"],
                    "ready": ready,
                }
            )
            # Known at the end of a step, it holds for the next one's rollout.
            ready = row.get("drafter/ready", 0)
        return rows

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
