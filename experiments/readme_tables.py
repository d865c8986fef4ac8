"""Tables of README.md, written from the CSVs: `python -m experiments tables`.

A table stands between `<!-- table: NAME -->` and `<!-- end of table -->`.
"""

import dataclasses
import pathlib
import re
from collections.abc import Callable, Mapping

from experiments import cells, harness

README = pathlib.Path(__file__).resolve().parents[1] / "README.md"
_BLOCK = re.compile(r"(<!-- table: ([\w]+) -->\n).*?(<!-- end of table -->)", re.S)


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of the README.

    Attributes:
      file: under results/cpu.
      columns: heading -> a column's name, or what makes an entry of a row.
      keep: which rows.
    """

    file: str
    columns: Mapping[str, str | Callable[[harness.Row], object]]
    keep: Callable[[harness.Row], bool] = lambda row: True


def _times(name: str) -> Callable[[harness.Row], str]:
    return lambda row: f"{row[name]:.2f}x" if row[name] else "-"


def _percent(name: str) -> Callable[[harness.Row], str]:
    return lambda row: f"{row[name]:.0%}" if row[name] is not None else "-"


_SYSTEMS = {
    "off": "everything off",
    "tlt": "everything on",
    "threshold": "paper's rule",
    "cost_model": "our tuner",
}


TABLES = {
    "cluster_size": Table(
        "cluster_size.csv",
        {
            "model": "model",
            "H100": "devices",
            "paper": _times("published"),
            "paper's rule, simulated": _times("times_faster"),
            "our tuner, simulated": _times("ours"),
            "rollout, of a step with everything off": _percent("off_rollout_frac"),
        },
        keep=lambda row: row["system"] == "threshold",
    ),
    "devices": Table(
        "devices.csv",
        {
            "device": "device",
            "predicted": _times("times_faster"),
            "paper": _times("published"),
        },
    ),
    "simulator_check": Table(
        "simulator_check_summary.csv",
        {
            "run": lambda row: _SYSTEMS[row["system"]],
            "acceptance": "acceptance",
            "recorded s": "rollout_s/run",
            "simulated s": "rollout_s",
            "ratio": "ratio",
            "worst RL step off by": _percent("worst_step_error"),
        },
    ),
}


def render(name: str) -> str:
    """Returns a table as Markdown.

    Raises:
      ValueError: the README asks for a table that is not made here.
    """
    if name not in TABLES:
        raise ValueError(
            f"README.md has a table {name!r}; made here are {', '.join(TABLES)}."
        )
    table = TABLES[name]
    rows = cells.read(harness.RESULTS_DIR / "cpu" / table.file)
    if name == "cluster_size":
        rows = _side_by_side(rows)
    lines = [list(table.columns), ["---"] * len(table.columns)]
    for row in filter(table.keep, rows):
        entries = [
            make(row) if callable(make) else row[make]
            for make in table.columns.values()
        ]
        lines.append([_text(entry) for entry in entries])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _side_by_side(rows: list[harness.Row]) -> list[harness.Row]:
    """Puts what other systems had into each row of a cluster."""
    found = {(r["model"], r["devices"], r["system"]): r for r in rows}
    return [
        row
        | {
            "ours": found[*key, "cost_model"]["times_faster"],
            "off_rollout_frac": found[*key, "off"]["rollout_frac"],
        }
        for row in rows
        for key in [(row["model"], row["devices"])]
    ]


def _text(entry: object) -> str:
    if entry is None:
        return "-"
    return f"{entry:.3g}" if isinstance(entry, float) else str(entry)


def rendered(text: str) -> str:
    """Returns the README with its tables as the CSVs are."""
    return _BLOCK.sub(lambda match: match[1] + render(match[2]) + match[3], text)


def write() -> list[harness.Row]:
    """Writes the tables; returns which there are."""
    text = README.read_text("utf-8")
    new = rendered(text)
    if new != text:
        README.write_text(new, "utf-8")
    names = [match[2] for match in _BLOCK.finditer(new)]
    print(f"Wrote {', '.join(names) or 'no tables'}.")
    return [{"table": name} for name in names]
