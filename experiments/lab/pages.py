"""Tables of RESULTS.md and README.md, from the CSVs: `python -m experiments tables`.

A table stands between `<!-- table: NAME -->` and `<!-- end of table -->`, and below it
the machine and commit of its rows.
"""

import re

from experiments.lab import (
    experiment,
    freshness,
    provenance,
    result_tables,
    tables,
)

PAGES = (freshness.FOLDER / "RESULTS.md", freshness.ROOT / "README.md")
PAGES += (freshness.ROOT / "docs" / "recipes.md",)
_BLOCK = re.compile(r"(<!-- table: ([\w]+) -->\n).*?(<!-- end of table -->)", re.S)


def render(name: str) -> str:
    """Returns a table as Markdown, and where its rows come from.

    Raises:
      ValueError: a page asks for a table that is not made here.
    """
    if name not in result_tables.TABLES:
        raise ValueError(
            f"a page has a table {name!r}; made here are "
            f"{', '.join(result_tables.TABLES)}."
        )
    table = result_tables.TABLES[name]
    path = experiment.record_folder("cpu") / table.file
    rows = table.prepare(tables.read(path))
    lines = [list(table.columns), ["---"] * len(table.columns)]
    lines += [
        [
            _text(make(row) if callable(make) else row[make])
            for make in table.columns.values()
        ]
        for row in filter(table.keep, rows)
    ]
    record = provenance.read(path.parent, path.stem.removesuffix("_summary"))
    told = f"\n_{provenance.caption(record)}_\n" if record else ""
    return "".join(f"| {' | '.join(line)} |\n" for line in lines) + told


def _text(entry: object) -> str:
    if entry is None:
        return "-"
    return f"{entry:.3g}" if isinstance(entry, float) else str(entry)


def rendered(text: str) -> str:
    """Returns a page with its tables as the CSVs are."""
    return _BLOCK.sub(lambda match: match[1] + render(match[2]) + match[3], text)


def write() -> list[tables.Row]:
    """Writes the tables into the pages; returns which there are."""
    rows = []
    for page in PAGES:
        text = page.read_text("utf-8")
        new = rendered(text)
        if new != text:
            page.write_text(new, "utf-8")
        names = [match[2] for match in _BLOCK.finditer(new)]
        print(f"Wrote into {page.name}: {', '.join(names) or 'no tables'}.")
        rows += [{"page": page.name, "table": name} for name in names]
    return rows
