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
import contextlib
import importlib.metadata
import pathlib
import tempfile

import jax

from experiments.lab import cells, harness, plotting, small_runs
from tlt_jax import train
from tlt_jax.workdir import progress

SLUG = "program_pool"
RECIPE = "configs/tiny.py:count"
FOUR = ("D8K1V9", "D6K2V16", "D3K2V8", "D4K1V5")
CASES = {
    "no speculation": {"specdec.mode": "off"},
    "one strategy": small_runs.DRAFTER,
    "four, at all batches": {
        **small_runs.DRAFTER,
        "specdec.tuner": "beg_mab",
        "specdec.strategies": (f"32:{','.join(FOUR)}",),
    },
    "four, bucketed": {
        **small_runs.DRAFTER,
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


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default=RECIPE)
    cells.add_options(parser)
    return parser.parse_args(arguments)


def measure(config: str, case: str) -> harness.Row:
    """Compiles an engine's programs; returns what they are."""
    run = small_runs.settings_of(
        config, {**CASES[case], "num_steps": 1, "pretrain.steps": 1}
    )
    with contextlib.ExitStack() as closing:
        folder = pathlib.Path(closing.enter_context(tempfile.TemporaryDirectory()))
        display = progress.Progress(1, mode="off")
        trainer = closing.enter_context(train.Trainer(run, folder, display))
        trainer.begin()
        (engine,) = trainer.parts.workers.engines
        engine.warm_up(wait=True)
        stats = engine.pool.stats
        return {
            "programs": stats.num_compiled,
            "code_bytes": stats.code_bytes,
            "scratch_bytes": stats.temp_bytes,
            "compile_s": stats.compile_s,
        }


def plot(rows: list[harness.Row], path: pathlib.Path, stamp: str) -> None:
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
        "Compiled programs of an engine", len(told), stamp, width=3.6
    )
    names = [row["case"].replace(", ", ",\n") for row in rows]
    for axes, (column, label, scale) in zip(panels, told, strict=True):
        values = [row[column] / scale for row in rows]
        axes.bar(names, values, 0.6, color=plotting.COLORS[0])
        axes.set_ylabel(label)
        axes.tick_params(axis="x", labelsize=7)
    plotting.save(fig, path)


def main(arguments: list[str] | None = None) -> list[harness.Row]:
    """Runs the experiment; returns the table that it also writes."""
    options = parse_arguments(arguments)
    jax.config.update("jax_enable_compilation_cache", False)
    settings = {"config": options.config, "cases": CASES}
    versions = {"jax": importlib.metadata.version("jax")}
    provenance = harness.Provenance(SLUG, settings, versions)
    wanted = [cells.Cell({"case": case}) for case in CASES]

    def measured(cell):
        case = cell.overrides["case"]
        found = measure(options.config, case)
        return [{"case": case, **found, "published_gb": PUBLISHED_GB.get(case)}]

    rows = cells.run(options, SLUG, provenance, wanted, measured)
    print(harness.format_table(rows))
    path = harness.folder_of(options) / f"{SLUG}.png"
    plot(rows, path, plotting.stamp(provenance.record))
    return rows


if __name__ == "__main__":
    main()
