"""A table that is measured cell by cell and continued where it stopped.

A cell is a set of dotted settings and a seed. Its rows are written, with the
provenance, as soon as they are there. Another run with the same settings and the same
code skips the cells that the table has; rows of other settings or of other code are
refused, so that no table mixes them.
"""

import argparse
import csv
import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence

from experiments.lab import freshness, harness

_CELL = "cell"


@dataclasses.dataclass(frozen=True)
class Cell:
    """What is measured at once.

    Attributes:
      overrides: settings that differ from the experiment's others, by dotted name.
      seed: of the run.
    """

    overrides: Mapping[str, object]
    seed: int = 0

    @property
    def name(self) -> str:
        """How it is called in the table."""
        parts = [f"{key}={value}" for key, value in self.overrides.items()]
        return " ".join([*parts, f"seed={self.seed}"])


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds what all such experiments understand."""
    harness.add_options(parser)
    parser.add_argument(
        "--again",
        action="store_true",
        help="measure every cell, and drop the table that is there",
    )


def run(
    options: argparse.Namespace,
    slug: str,
    provenance: harness.Provenance,
    cells: Sequence[Cell],
    measure: Callable[[Cell], Sequence[harness.Row]],
) -> list[harness.Row]:
    """Measures the cells that the table lacks; returns all rows that it then has.

    Those of the wanted cells stand first, in their order; others of the same settings
    and code are kept.

    Args:
      options: with `again`, `scale` and `out`.
      slug: of the experiment.
      provenance: of this run; its hashes decide what may be continued.
      cells: wanted; their names distinct.
      measure: returns a cell's rows.

    Raises:
      ValueError: the table that is there has rows of other settings or code.
    """
    path = harness.folder_of(options) / f"{slug}.csv"
    found: dict[str, list[harness.Row]] = {}
    if path.exists() and not options.again:
        _check(path, provenance)
        for row in read(path):
            found.setdefault(str(row[_CELL]), []).append(row)
    for cell in cells:
        if cell.name in found:
            print(f"{cell.name}: there already", flush=True)
            continue
        print(f"{cell.name} ...", flush=True)
        found[cell.name] = [{_CELL: cell.name, **row} for row in measure(cell)]
        harness.write_csv(path, _in_order(cells, found))
        wanted = {other.name for other in cells} | found.keys()
        provenance.record["cells"] = {"wanted": len(wanted), "done": len(found)}
        provenance.write(path.with_suffix(".json"))
    return _in_order(cells, found)


def _in_order(
    cells: Sequence[Cell], found: Mapping[str, list[harness.Row]]
) -> list[harness.Row]:
    names = dict.fromkeys([*(cell.name for cell in cells), *found])
    return [row for name in names for row in found.get(name, ())]


def _check(path: pathlib.Path, provenance: harness.Provenance) -> None:
    record = path.with_suffix(".json")
    old = json.loads(record.read_text("utf-8")) if record.exists() else {}
    for name, what in (("config_hash", "settings"), ("source_hash", "code")):
        now = provenance.record[name]
        carried = name == "source_hash" and freshness.is_current(old, now)
        if old.get(name) != now and not carried:
            raise ValueError(
                f"{path.name} has rows of other {what} ({name} {old.get(name)}, now "
                f"{now}): measure all of it with --again, or elsewhere with --out=DIR."
            )


def read(path: pathlib.Path) -> list[harness.Row]:
    """Reads a table; numbers become numbers, empty entries None."""
    with path.open(newline="", encoding="utf-8") as lines:
        return [
            {name: _value(text) for name, text in row.items()}
            for row in csv.DictReader(lines)
        ]


def _value(text: str) -> object:
    if text == "":
        return None
    if text in ("True", "False"):
        return text == "True"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
