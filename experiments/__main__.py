"""Lists the experiments, checks claims, draws plots, writes the README's tables.

    python -m experiments
    python -m experiments check
    python -m experiments tables
    python -m experiments plots
    python -m experiments carry active_batch --why="digests and counts are equal"

The first lists every figure and table with its status: `fresh`, `fresh (carried)` (the
code is another by now, and a review says that nothing measured is), `stale` (what it
measures is another by now), `partial` (cells are lacking: the command goes on),
`undated` (nothing tells) or `unrun` at this scale. `check` reads the tables and says of
each claim whether it holds; with `--strict` it fails unless all that have data hold.
`tables` writes the tables of README.md from the CSVs, `plots` draws every plot again
from them. `carry` says of the named tables (`all`: of
every stale one) that a reviewed change alters nothing that they hold.
"""

import argparse
import collections
import sys

from experiments.lab import (
    catalogue,
    claims,
    experiment,
    provenance,
    readme_tables,
    tables,
)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "what",
        nargs="?",
        choices=["list", "check", "tables", "plots", "carry"],
        default="list",
    )
    parser.add_argument("slugs", nargs="*", help="of `carry`: experiments, or all")
    parser.add_argument("--why", default="", help="of `carry`: the reason")
    parser.add_argument("--scale", choices=experiment.SCALES, default="cpu")
    parser.add_argument("--strict", action="store_true", help="of `check`")
    return parser.parse_args(arguments)


def show_list(scale: str) -> list[tables.Row]:
    """Prints and returns the experiments."""
    rows = catalogue.listing(scale)
    for row in rows:
        told = f" (paper: {row['published']})" if row["published"] else ""
        print(f"[{row['status']:>7}] {row['experiment']}: {row['what']}{told}")
        if row["command"]:
            print(f"          {row['command']}")
    counts = collections.Counter(row["status"] for row in rows)
    told = ", ".join(f"{num} {status}" for status, num in counts.items())
    print(f"At scale {scale}: {told}.")
    return rows


def show_claims(scale: str) -> list[tables.Row]:
    """Prints and returns the claims."""
    rows = catalogue.check(experiment.RESULTS_DIR / scale)
    for row in rows:
        print(f"[{row['verdict']:>7}] {row['experiment']}: {row['claim']}")
        print(f"          {row['found']}")
    counts = collections.Counter(row["verdict"] for row in rows)
    print(", ".join(f"{num} {verdict}" for verdict, num in counts.items()) + ".")
    return rows


def show_plots(scale: str) -> list[tables.Row]:
    """Draws the plots; prints and returns what became of each."""
    folder = experiment.RESULTS_DIR / scale
    rows = [
        {"experiment": item.slug, "plot": item.redraw(folder)}
        for item in catalogue.every()
    ]
    for row in rows:
        print(f"{row['experiment']}: {row['plot']}")
    return rows


def carry(slugs: list[str], scale: str, why: str) -> list[tables.Row]:
    """Carries tables over a change of code; prints and returns what became of each.

    Raises:
      ValueError: a slug is none, or none is given.
    """
    folder = experiment.RESULTS_DIR / scale
    known = {path.stem for path in folder.glob("*.json")}
    if slugs == ["all"]:
        slugs = sorted(known)
    unknown = [slug for slug in slugs if slug not in known]
    if unknown or not slugs:
        raise ValueError(
            f"carry was given {', '.join(unknown) or 'no experiment'}; with tables at "
            f"scale {scale} are {', '.join(sorted(known))}, and all of them is all."
        )
    commit = provenance.git("rev-parse", "HEAD")
    rows = [
        {"experiment": slug, "told": provenance.carry(slug, folder, commit, why)}
        for slug in slugs
    ]
    for row in rows:
        print(f"{row['experiment']}: {row['told']}")
    return rows


def main(arguments: list[str] | None = None) -> list[tables.Row]:
    """Does what is asked; returns what it printed."""
    options = parse_arguments(arguments)
    if options.what == "tables":
        return readme_tables.write()
    if options.what == "plots":
        return show_plots(options.scale)
    if options.what == "carry":
        return carry(options.slugs, options.scale, options.why)
    if options.what == "list":
        return show_list(options.scale)
    rows = show_claims(options.scale)
    if options.strict and any(row["verdict"] == claims.FAILS for row in rows):
        sys.exit(1)
    return rows


if __name__ == "__main__":
    main()
