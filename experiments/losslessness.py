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

from experiments.lab import claims, experiment, recipes, tables

RECIPE = "configs/tiny.py:count"
OFF = "off"


def _arm(strategy: str, **others: object) -> dict[str, object]:
    return {**recipes.DRAFTER, "specdec.strategies": (strategy,), **others}


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


def chosen_arms(text: str) -> list[str]:
    """Returns the arms asked for, `off` first.

    Raises:
      ValueError: one is not known.
    """
    names = experiment.known(text, ARMS, "arms", ";") or list(ARMS)
    return [OFF, *(name for name in names if name != OFF)]


def measure(options: argparse.Namespace, cell: tables.Cell) -> list[tables.Row]:
    """Runs the recipe with one arm at one temperature."""
    temperature, arm = cell["sampling.temperature"], cell["arm"]
    overrides = {
        "num_steps": options.steps,
        "seed": cell.seed,
        "sampling.temperature": temperature,
        **ARMS[arm],
    }
    names = ("step", "tokens", "tokens_digest", "accept_length", "decode_steps")
    return [
        {"temperature": temperature, "arm": arm}
        | recipes.columns(row, *names, "mismatch")
        for row in recipes.run(options.config, overrides)
    ]


def summary_of(rows: list[tables.Row]) -> list[tables.Row]:
    """Counts steps whose tokens are others than without speculation."""
    off = tables.where(rows, arm=OFF)
    return [
        {
            "temperature": temperature,
            "arm": arm,
            "steps": len(its),
            "tokens": sum(r["tokens"] for r in its),
            "steps_differing": tables.differing(its, off, ("temperature", "step")),
            "accept_length/last": its[-1]["accept_length"],
            "target_steps": sum(r["decode_steps"] for r in its),
            "mismatch_max": max(r["mismatch"] for r in its),
        }
        for (temperature, arm), its in tables.groups(rows, "temperature", "arm").items()
    ]


def _equal(rows: claims.Rows) -> claims.Finding:
    differing = sum(row["steps_differing"] for row in rows)
    tokens = sum(row["tokens"] for row in rows)
    return not differing, (
        f"{len(rows)} arms, {tokens} tokens: {differing} steps differ"
    )


EXPERIMENT = experiment.Experiment(
    slug="losslessness",
    text=__doc__,
    title="tokens with speculation on and off, over arms",
    larger=experiment.recipes(),
    options=(
        *experiment.plain(config=RECIPE, steps=10),
        experiment.Option("arms", "", "names, separated by semicolons"),
    ),
    settings=lambda options: {"arms": chosen_arms(options.arms)},
    cells=lambda arms: [
        tables.Cell({"sampling.temperature": temperature, "arm": arm})
        for temperature, few in TEMPERATURES.items()
        for arm in arms
        if not few or arm in few
    ],
    measure=measure,
    summary=summary_of,
    claims={
        "every arm draws the tokens of plain decoding": _equal,
    },
)
main = EXPERIMENT.main


if __name__ == "__main__":
    main()
