"""Tables of results: measured cell by cell and taken up again; read, grouped, shown.

A cell is a set of settings and a seed. Its rows are written, with the provenance, as
soon as they are there. Another run with the same settings and the same code skips the
cells that the table has; rows of other settings or of other code are refused, so that
no table mixes them.
"""

import csv
import dataclasses
import pathlib
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence

from experiments.lab import provenance

Row = dict[str, object]
CELL = "cell"
# The table `<slug>.csv`; one of another name is `<slug>_<name>.csv`.
ROWS = ""


@dataclasses.dataclass(frozen=True)
class Cell:
    """What is measured at once: settings by dotted name, and a seed if it has one."""

    overrides: Mapping[str, object]
    seed: int | None = 0

    @property
    def name(self) -> str:
        """How it is called in the table."""
        told = dict(self.overrides)
        if self.seed is not None:
            told["seed"] = self.seed
        return " ".join(f"{key}={value}" for key, value in told.items())

    def __getitem__(self, key: str) -> object:
        """Returns one of the settings."""
        return self.overrides[key]


def path_of(folder: pathlib.Path, slug: str, name: str = ROWS) -> pathlib.Path:
    """Returns where a table lies."""
    return folder / (f"{slug}_{name}.csv" if name else f"{slug}.csv")


def measure(
    folder: pathlib.Path,
    slug: str,
    record: provenance.Provenance,
    cells: Iterable[Cell],
    measure_cell: Callable[[Cell], Sequence[Row] | Mapping[str, Sequence[Row]]],
    *,
    others: Sequence[str] = (),
    again: bool = False,
) -> dict[str, list[Row]]:
    """Measures the cells that the tables lack; returns all rows that these then have.

    Those of the wanted cells stand first, in their order; others of the same settings
    and code are kept. A record that is there stays: what is added to its table is noted
    in it, and where nothing is, `record` becomes the one that is there.

    The hashes of `record` decide what may be continued; cells' names are distinct.
    `measure_cell` returns rows, or rows by the table's name (`ROWS` and `others`). With
    `again` every cell is measured, and the tables that are there are dropped.

    Raises:
      ValueError: the table that is there has rows of other settings or code.
    """
    cells, names = list(cells), (ROWS, *others)
    found: dict[str, dict[str, list[Row]]] = {}
    path = path_of(folder, slug)
    stored = None
    if path.exists() and not again:
        stored = _stored(path, record.record)
        for name in names:
            there = path_of(folder, slug, name)
            for row in read(there) if there.exists() else ():
                rows = found.setdefault(str(row[CELL]), {})
                rows.setdefault(name, []).append(row)
    missing = [cell for cell in cells if cell.name not in found]
    if stored:
        record.resume(stored, [cell.name for cell in missing])
    for cell in cells:
        if cell not in missing:
            print(f"{cell.name}: there already", flush=True)
            continue
        print(f"{cell.name} ...", flush=True)
        made = measure_cell(cell)
        made = made if isinstance(made, Mapping) else {ROWS: made}
        found[cell.name] = {
            name: [{CELL: cell.name, **row} for row in rows]
            for name, rows in made.items()
        }
        for name in names:
            write(path_of(folder, slug, name), _in_order(cells, found, name))
        wanted = {other.name for other in cells} | found.keys()
        record.record["cells"] = {"wanted": len(wanted), "done": len(found)}
        record.write(path.with_suffix(".json"))
    return {name: _in_order(cells, found, name) for name in names}


def _in_order(
    cells: Sequence[Cell], found: Mapping[str, Mapping[str, list[Row]]], table: str
) -> list[Row]:
    names = dict.fromkeys([*(cell.name for cell in cells), *found])
    return [row for name in names for row in found.get(name, {}).get(table, ())]


def _stored(path: pathlib.Path, now: Mapping[str, object]) -> dict[str, object]:
    """Returns the record of a table that may be continued."""
    old = provenance.read(path.parent, path.stem)
    for name, what in (("config_hash", "settings"), ("source_hash", "code")):
        carried = name == "source_hash" and provenance.is_current(old, str(now[name]))
        if old.get(name) != now[name] and not carried:
            raise ValueError(
                f"{path.name} has rows of other {what} ({name} {old.get(name)}, now "
                f"{now[name]}): measure all of it with --again, or elsewhere with "
                "--out=DIR."
            )
    return old


def write(path: pathlib.Path, rows: Sequence[Row]) -> None:
    """Writes rows under the union of their columns, in order of appearance."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, _columns(rows), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read(path: pathlib.Path) -> list[Row]:
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


def where(rows: Iterable[Row], **wanted: object) -> list[Row]:
    """Returns the rows with these entries."""
    return [
        row
        for row in rows
        if all(row.get(name) == value for name, value in wanted.items())
    ]


def groups(rows: Iterable[Row], *columns: str) -> dict[tuple, list[Row]]:
    """Collects rows by some entries, in order of appearance."""
    found: dict[tuple, list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in columns), []).append(row)
    return found


def values(rows: Iterable[Row], column: str) -> list:
    """Lists the different entries of a column, in order of appearance."""
    return list(dict.fromkeys(row[column] for row in rows))


def column(rows: Iterable[Row], name: str) -> list:
    """Returns a column."""
    return [row[name] for row in rows]


def spread(
    name: str, found: Sequence[float], middle: Callable = statistics.mean
) -> Row:
    """Returns what values have in the middle, and beside it the least and the most."""
    return {name: middle(found), f"{name}/min": min(found), f"{name}/max": max(found)}


def differing(
    rows: Iterable[Row],
    others: Iterable[Row],
    by: Sequence[str],
    entries: Sequence[str] = ("tokens_digest",),
) -> int:
    """Counts the rows whose entries are others than in the row of the same `by`."""
    told = {tuple(row[k] for k in by): [row[k] for k in entries] for row in others}
    return sum(
        told[tuple(row[k] for k in by)] != [row[k] for k in entries] for row in rows
    )


def shown(rows: Sequence[Row]) -> str:
    """Lays rows out in aligned columns, missing entries as a dash."""
    names = [name for name in _columns(rows) if name != CELL]
    lines = [names] + [[short(row.get(n)) for n in names] for row in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(names))]
    return "\n".join(
        "  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True))
        for line in lines
    )


def short(value: object) -> str:
    """Returns an entry as people are shown it."""
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _columns(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))
