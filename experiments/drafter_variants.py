r"""Short trainings of a drafter before the long one, each at the same cost.

    python -m experiments.drafter_variants --scale=cpu \
        --texts=workdirs/general_drafter/texts

Trains the drafter of `configs/smollm2_drafter.py:general` with one thing changed, from
the same random weights on the texts of its first round, and measures it on those held
out. Cost is counted, not timed: multiplications and additions of the products of all
updates, so many as `--updates` of the recipe's have. Texts are not written anew: they
are those of a training that has begun. Some ten minutes of two cores a case.
"""

import argparse
import pathlib
import shutil
import tempfile

from experiments import drafter_limits
from experiments import drafter_students as students
from experiments.lab import claims, experiment, plotting, recipes, tables
from tlt_jax import speculation, train_drafter
from tlt_jax.models.formats import source as model_source
from tlt_jax.runtime import compile_cache
from tlt_jax.settings import drafter_run
from tlt_jax.specdec.training import objectives

RECIPE = "configs/smollm2_drafter.py:general"
BASE, BLOCK = "the recipe", "a block drafter"
CASES = {
    BASE: {},
    "one unrolled step": {"objective.num_steps": 1},
    "seven unrolled steps": {"objective.num_steps": 7},
    "cross entropy": {"objective.token_loss": "soft_ce"},
    "total variation": {"objective.token_loss": "tv"},
    "HASS": {"objective.name": "hass", "objective.token_loss": None},
    "a third of the rate": {"optimizer.learning_rate": 3e-4},
    "three times the rate": {"optimizer.learning_rate": 3e-3},
    "half the rows": {"batch.num_rows": 2},
    "8192 tokens": {"drafter.draft_vocab_size": 8192},
    "all tokens": {"drafter.draft_vocab_size": 0},
    BLOCK: {"drafter.architecture": "block"},
}
# Of the first round alone; averages over a few hundred updates would lag far behind.
_SHORT = {
    "texts.round_steps": 0,
    "average": 0.95,
    "checkpoint.every": 0,
    "eval.every": 0,
    "log.progress": "off",
}


def run_of(recipe: str, case: str) -> drafter_run.DrafterRun:
    """Returns a case's settings, but for the number of its updates."""
    values = recipes.recipe_of(recipe)
    values.update_from_flattened_dict({**_SHORT, **CASES[case]})
    return drafter_run.load(values.to_dict())


def cost_of(run: drafter_run.DrafterRun) -> int:
    """Counts an update, see `drafter_students.operations`."""
    named = run.objective.name, run.objective.overrides()
    cfg = speculation.drafter_of(
        run.drafter,
        objectives.choose(*named),
        model_source.resolve(run.model.spec).config,
        run.batch.row_tokens,
        depth=run.eval.depth,
    )
    sizes = ("num_rows", "row_tokens", "row_bases")
    rows = {name: getattr(run.batch, name) for name in sizes}
    return students.operations(cfg, objectives.choose(*named, cfg.block_size), rows)


def measure(options: argparse.Namespace, cell: tables.Cell) -> list[tables.Row]:
    """Trains a drafter and measures it."""
    compile_cache.enable()
    run, base = (run_of(options.config, case) for case in (cell["case"], BASE))
    cost = cost_of(run)
    updates = max(round(options.updates * cost_of(base) / cost), 1)
    recipe = recipes.recipe_of(options.config)
    recipe.update_from_flattened_dict(
        {**_SHORT, **CASES[cell["case"]], "num_steps": updates}
    )
    run = drafter_run.load(recipe.to_dict())
    with tempfile.TemporaryDirectory() as folder:
        directory = pathlib.Path(folder)
        # Its own, as a training may write what lacks.
        shutil.copytree(options.texts, directory / "texts")
        found = train_drafter.train(run, directory)
    row = {**cell.overrides, "updates": updates, "gflop": updates * cost / 1e9}
    for name in ("coupled", "deterministic"):
        row[f"accept_length/{name}"] = found[f"eval/{name}_accept_length"]
        row[f"first/{name}"] = found[f"eval/{name}_rate_by_depth"][0]
    return [row | {name: found[f"eval/{name}"] for name in ("sharpness", "tau")}]


def plot(rows: list[tables.Row], stamp: str) -> plotting.Figure:
    """Draws accept lengths of coupled and deterministic drafts by case."""
    fig, axes = plotting.figure(
        "Drafters on uncertain text, short trainings at equal cost",
        "accept length on held-out texts",
        "",
        stamp,
    )
    for place, row in enumerate(reversed(rows)):
        for name, color in zip(
            ("coupled", "deterministic"), plotting.COLORS, strict=False
        ):
            label = None if place else name
            value = row[f"accept_length/{name}"]
            axes.plot([value], [place], "o", color=color, label=label)
    names = [f"{row['case']} ({row['updates']} updates)" for row in reversed(rows)]
    axes.set_yticks(range(len(rows)), names)
    axes.set_xlim(left=1)
    return fig


def _length(rows: claims.Rows, case: str) -> float:
    return claims.only(rows, case=case)["accept_length/coupled"]


def _is_best(rows: claims.Rows) -> claims.Finding:
    cases = [case for case in CASES if case != BLOCK]
    best = max(cases, key=lambda case: _length(rows, case))
    ours, theirs = _length(rows, BASE), _length(rows, best)
    return ours >= 0.98 * theirs, f"recipe {ours:.3f}, best {best} {theirs:.3f}"


def _block_keeps_up(rows: claims.Rows) -> claims.Finding:
    ours, theirs = _length(rows, BLOCK), _length(rows, BASE)
    return ours >= 0.95 * theirs, f"block {ours:.3f}, token by token {theirs:.3f}"


EXPERIMENT = experiment.Experiment(
    slug="drafter_variants",
    text=__doc__,
    title="objective, loss, rate, vocabulary and architecture on uncertain text",
    needs="--texts=workdirs/general_drafter/texts",
    options=(
        experiment.Option("config", RECIPE),
        experiment.Option("texts", "", "of a drafter's training", recorded=False),
        experiment.Option("updates", 64, "of the recipe; others have what costs it"),
    ),
    check=drafter_limits.check,
    constants={"cases": CASES},
    cells=lambda: [tables.Cell({"case": case}, None) for case in CASES],
    measure=measure,
    plot=plot,
    claims={
        "no change of the recipe has 2 % more accepted at equal cost": _is_best,
        "the block drafter has 95 % of the accept length at equal cost of training": (
            _block_keeps_up
        ),
    },
)
main = EXPERIMENT.main


if __name__ == "__main__":
    main()
