"""Lists the experiments, checks claims, draws plots, writes the README's tables.

    python -m experiments
    python -m experiments check
    python -m experiments tables
    python -m experiments plots

The first lists every figure and table with its status: `fresh`, `stale` (its code is
another by now), `partial` (cells are lacking: the command goes on), `undated` (nothing
tells), `unrun` at this scale, or `missing` (no module yet). `check` reads the tables
and says of each claim whether it holds; with `--strict` it fails unless all that have
data hold. `tables` writes the tables of README.md from the CSVs, `plots` draws
every plot again from them.
"""

import argparse
import collections
import sys

from experiments.lab import catalogue, claims, harness, readme_tables, redrawing


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "what", nargs="?", choices=["list", "check", "tables", "plots"], default="list"
    )
    parser.add_argument("--scale", choices=harness.SCALES, default="cpu")
    parser.add_argument("--strict", action="store_true", help="of `check`")
    return parser.parse_args(arguments)


def show_list(scale: str) -> list[harness.Row]:
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


def show_claims(scale: str) -> list[harness.Row]:
    """Prints and returns the claims."""
    rows = claims.check(harness.RESULTS_DIR / scale)
    for row in rows:
        print(f"[{row['verdict']:>7}] {row['experiment']}: {row['claim']}")
        print(f"          {row['found']}")
    counts = collections.Counter(row["verdict"] for row in rows)
    print(", ".join(f"{num} {verdict}" for verdict, num in counts.items()) + ".")
    return rows


def show_plots(scale: str) -> list[harness.Row]:
    """Draws the plots; prints and returns what became of each."""
    rows = redrawing.redraw_all(scale)
    for row in rows:
        print(f"{row['experiment']}: {row['plot']}")
    return rows


def main(arguments: list[str] | None = None) -> list[harness.Row]:
    """Does what is asked; returns what it printed."""
    options = parse_arguments(arguments)
    if options.what == "tables":
        return readme_tables.write()
    if options.what == "plots":
        return show_plots(options.scale)
    if options.what == "list":
        return show_list(options.scale)
    rows = show_claims(options.scale)
    if options.strict and any(row["verdict"] == claims.FAILS for row in rows):
        sys.exit(1)
    return rows


if __name__ == "__main__":
    main()
