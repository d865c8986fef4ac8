"""What many strategies cost in compiled programs: count, bytes, seconds to compile.

    python -m experiments.program_pool --scale=cpu

An analogue of the paper's graph memory, no more: there CUDA graphs hold activations in
device memory (7.81 GB for one strategy, 30.39 for many, 10.69 when batch sizes are
bucketed); here programs of XLA hold code, and the scratch memory of those that run is
shared. Counted for a small model (`configs/tiny.py:count`) and 32 rows: no speculation,
one strategy, four strategies at every batch bucket, and four with each at few buckets.
Nothing is taken from the compilation cache.
"""

import argparse
import textwrap

import jax

from experiments.lab import claims, experiment, plotting, recipes, tables

RECIPE = "configs/tiny.py:count"
FOUR = ("D8K1V9", "D6K2V16", "D3K2V8", "D4K1V5")
CASES = {
    "no speculation": {"specdec.mode": "off"},
    "one strategy": recipes.DRAFTER,
    "four, at all batches": {
        **recipes.DRAFTER,
        "specdec.tuner": "beg_mab",
        "specdec.strategies": (f"32:{','.join(FOUR)}",),
    },
    "four, bucketed": {
        **recipes.DRAFTER,
        "specdec.strategies": tuple(
            f"{rows}:{name}" for rows, name in zip((2, 4, 8, 32), FOUR, strict=True)
        ),
    },
}
PUBLISHED_GB = {
    "one strategy": 7.81,
    "four, at all batches": 30.39,
    "four, bucketed": 10.69,
}


def compiled(config: str, case: str) -> tables.Row:
    """Compiles an engine's programs; returns what they are."""
    run = recipes.settings_of(
        config, {**CASES[case], "num_steps": 1, "pretrain.steps": 1}
    )
    jax.config.update("jax_enable_compilation_cache", False)
    with recipes.begun(run) as trainer:
        (engine,) = trainer.parts.workers.engines
        engine.warm_up(wait=True)
        stats = engine.pool.stats
        return {
            "programs": stats.num_compiled,
            "code_bytes": stats.code_bytes,
            "scratch_bytes": stats.temp_bytes,
            "compile_s": stats.compile_s,
        }


def measure(options: argparse.Namespace, cell: tables.Cell) -> list[tables.Row]:
    """Compiles the programs of one case."""
    case = cell["case"]
    found = compiled(options.config, case)
    return [{"case": case, **found, "published_gb": PUBLISHED_GB.get(case)}]


def plot(rows: list[tables.Row], stamp: str) -> plotting.Figure:
    """Draws the three beside each other."""
    told = [
        ("programs", "programs", 1),
        ("code_bytes", "code, MB", 1e6),
        ("scratch_bytes", "scratch memory, MB", 1e6),
        ("compile_s", "compiling, s (busy machine)", 1),
    ]
    # Compilers for CPUs do not tell the size of their code.
    told = [entry for entry in told if any(row[entry[0]] for row in rows)]
    fig, panels = plotting.panels(
        "Compiled programs of an engine", [""] * len(told), stamp, columns=3
    )
    names = [_label(row["case"]) for row in rows]
    for axes, (column, label, scale) in zip(panels, told, strict=True):
        values = [row[column] / scale for row in rows]
        axes.bar(names, values, 0.6, color=plotting.COLORS[0])
        axes.set_ylabel(label)
        axes.tick_params(axis="x", labelsize=7)
    return fig


def _label(case: str) -> str:
    return textwrap.fill(case.replace("no speculation", "plain"), 9)


EXPERIMENT = experiment.Experiment(
    slug="program_pool",
    text=__doc__,
    title="graph memory",
    published="7.81 GB one, 30.39 naive, 10.69 bucketed",
    larger=experiment.recipes(),
    options=(experiment.Option("config", RECIPE),),
    constants={"cases": CASES},
    cells=lambda: [tables.Cell({"case": case}) for case in CASES],
    measure=measure,
    plot=plot,
    claims={
        "paper: bucketed strategies cost less than all at all batches (in "
        "programs: a compiler for CPUs does not tell the size of its "
        "code)": claims.in_order(
            "programs",
            "case",
            ("one strategy", "four, bucketed", "four, at all batches"),
        ),
    },
)
main = EXPERIMENT.main


if __name__ == "__main__":
    main()
