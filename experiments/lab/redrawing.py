"""Plots made again from the tables that they show: `python -m experiments plots`.

An experiment's `plot` takes what it draws by name: `rows` is `<slug>.csv`, `summary`
`<slug>_summary.csv` where there is one, `stamp` tells of the provenance, and all else
is a setting of the run as the provenance has it. Nothing is measured, and no table
changes.
"""

import importlib
import inspect
import json
import pathlib

from experiments.lab import catalogue, cells, harness, plotting

_TABLES = {
    "rows": ["{slug}.csv"],
    "summary": ["{slug}_summary.csv", "{slug}.csv"],
    "curves": ["{slug}_curves.csv"],
    "lengths": ["{slug}_lengths.csv"],
}


def redraw(slug: str, folder: pathlib.Path) -> str:
    """Draws an experiment's plot; returns what became of it.

    Args:
      slug: of the experiment.
      folder: of tables and plots.
    """
    record_path = folder / f"{slug}.json"
    plot = getattr(importlib.import_module(f"experiments.{slug}"), "plot", None)
    if plot is None:
        return "has no plot"
    if not record_path.exists():
        return "has no results"
    record = json.loads(record_path.read_text("utf-8"))
    found = {
        **record["settings"],
        "path": folder / f"{slug}.png",
        "stamp": plotting.stamp(record),
    }
    for name, files in _TABLES.items():
        paths = [folder / file.format(slug=slug) for file in files]
        if there := [path for path in paths if path.exists()]:
            found[name] = cells.read(there[0])
    wanted = list(inspect.signature(plot).parameters)
    if missing := [name for name in wanted if name not in found]:
        return f"its tables do not hold {', '.join(missing)}: run it again"
    try:
        plot(**{name: found[name] for name in wanted})
    except KeyError as error:
        return f"its table is of other code and lacks {error}: run it again"
    return "drawn"


def redraw_all(scale: str, folder: pathlib.Path | None = None) -> list[harness.Row]:
    """Draws all plots that there are tables of; returns what became of each."""
    folder = folder or harness.RESULTS_DIR / scale
    return [
        {"experiment": item.slug, "plot": redraw(item.slug, folder)}
        for item in catalogue.ITEMS
        if item.exists
    ]
