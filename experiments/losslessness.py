"""Tokens with speculation against tokens without, over strategies, rules and sizes.

    python -m experiments.losslessness --scale=cpu

A small recipe (`configs/tiny.py:count`) is run with everything off, and then with
suffix matches and with drafters of many shapes, rankings and batch sizes, some of them
at a second temperature, too. Compared is `rollout/tokens_digest` of every RL step, a
hash over all tokens of all responses; since each step's policy follows from the tokens
before, one other token would show in all later steps.

Reproduces: the paper's claim that speculation is lossless; here token by token.
"""

import argparse
import importlib.metadata

from experiments.lab import cells, harness, small_runs

SLUG = "losslessness"
RECIPE = "configs/tiny.py:count"
OFF = "off"


def _arm(strategy: str, **others: object) -> dict[str, object]:
    return {**small_runs.DRAFTER, "specdec.strategies": (strategy,), **others}


ARMS: dict[str, dict[str, object]] = {
    OFF: {"specdec.mode": "off"},
    "ngram": {"specdec.mode": "ngram"},
    "chain of 1": _arm("32:D1K1V2"),
    "chain of 4": _arm("32:D4K1V5"),
    "tree of 8": _arm("32:D3K2V8"),
    "tree of 24": _arm("32:D4K4V24"),
    "drafter and matches": _arm("32:D3K2V8-both"),
    "chain of 4, deterministic": _arm(
        "32:D4K1V5", **{"specdec.ranking": "deterministic"}
    ),
    "chain of 4, batch 8": _arm("8:D4K1V5", **{"rollout.max_batch": 8}),
    "chain of 4, from 8 rows on": _arm("8:D4K1V5"),
    "our tuner": _arm("32:D4K1V5,D2K1V3", **{"specdec.tuner": "cost_model"}),
}
# Arms by temperature; empty: all.
TEMPERATURES = {1.0: (), 0.6: (OFF, "ngram", "chain of 4", "tree of 8")}


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default=RECIPE)
    parser.add_argument("--arms", default="", help="names, separated by semicolons")
    parser.add_argument("--steps", type=int, default=10)
    cells.add_options(parser)
    return parser.parse_args(arguments)


def chosen_arms(text: str) -> list[str]:
    """Returns the arms asked for, `off` first.

    Raises:
      ValueError: one is not known.
    """
    names = list(filter(None, text.split(";"))) or list(ARMS)
    unknown = [name for name in names if name not in ARMS]
    if unknown:
        raise ValueError(f"--arms names {unknown}; known are {'; '.join(ARMS)}.")
    return [OFF, *(name for name in names if name != OFF)]


def summary_of(rows: list[harness.Row]) -> list[harness.Row]:
    """Counts steps whose tokens are others than without speculation."""
    off = {
        (r["temperature"], r["step"]): r["tokens_digest"]
        for r in rows
        if r["arm"] == OFF
    }
    groups: dict[tuple, list[harness.Row]] = {}
    for row in rows:
        groups.setdefault((row["temperature"], row["arm"]), []).append(row)
    return [
        {
            "temperature": temperature,
            "arm": arm,
            "steps": len(its),
            "tokens": sum(r["tokens"] for r in its),
            "steps_differing": sum(
                r["tokens_digest"] != off[temperature, r["step"]] for r in its
            ),
            "accept_length/last": its[-1]["accept_length"],
            "target_steps": sum(r["decode_steps"] for r in its),
            "mismatch_max": max(r["mismatch"] for r in its),
        }
        for (temperature, arm), its in groups.items()
    ]


def main(arguments: list[str] | None = None) -> list[harness.Row]:
    """Runs the experiment; returns the summary that it also writes."""
    options = parse_arguments(arguments)
    names = chosen_arms(options.arms)
    settings = {"config": options.config, "steps": options.steps, "arms": names}
    versions = {"jax": importlib.metadata.version("jax")}
    provenance = harness.Provenance(SLUG, settings, versions)

    def measure(cell):
        temperature, arm = cell.overrides["sampling.temperature"], cell.overrides["arm"]
        overrides = {
            "num_steps": options.steps,
            "seed": cell.seed,
            "sampling.temperature": temperature,
            **ARMS[arm],
        }
        return [
            {
                "temperature": temperature,
                "arm": arm,
                "step": row["step"],
                "tokens": row["rollout/tokens"],
                "tokens_digest": row["rollout/tokens_digest"],
                "accept_length": row["specdec/accept_length"],
                "decode_steps": row["rollout/decode_steps"],
                "mismatch": row["mismatch/logprob_max_abs"],
            }
            for row in small_runs.run(options.config, overrides)
        ]

    wanted = [
        cells.Cell({"sampling.temperature": temperature, "arm": arm})
        for temperature, few in TEMPERATURES.items()
        for arm in names
        if not few or arm in few
    ]
    rows = cells.run(options, SLUG, provenance, wanted, measure)
    summary = summary_of(rows)
    harness.write_summary(options, SLUG, summary)
    return summary


if __name__ == "__main__":
    main()
