"""Lists the experiments, checks claims, draws pictures, writes the tables of record.

    python -m experiments
    python -m experiments check
    python -m experiments plots
    python -m experiments tables
    python -m experiments compile --out=experiments/results/cpu
    python -m experiments carry active_batch --why="digests and counts are equal"

The first lists every figure and table: where it stands in the paper, what it takes, the
command that makes it, and the status of the table of record and of your own: `fresh`,
`fresh (carried)` (the code is another by now, and a review says that nothing measured
is), `stale` (what it measures is another by now), `partial` (cells are lacking: the
command goes on), `undated` (nothing tells) or `unrun`.

`check` reads the tables of record and says of each claim whether it holds; with
`--strict` it fails unless all that have data hold. `plots` draws the pictures of your
own tables again. Both take another folder by `--out=DIR`: that of record is
experiments/results/cpu. A picture names the machine and commit of its rows, whoever
draws it.

`compile` brings up to date every table of programs that are compiled for devices which
are not there, each in a process of its own; the compilers are libtpu and jax's CUDA
plug-in. What is there of today's code is kept, so that a stopped call goes on.

For who keeps the repository: `tables` writes the tables of record into
experiments/RESULTS.md and README.md; `carry` says of the named tables (`all`: of every
stale one) that a reviewed change alters nothing that they hold.
"""

import argparse
import collections
import pathlib
import shlex
import subprocess
import sys
import textwrap

from experiments.lab import (
    catalogue,
    claims,
    command_line,
    experiment,
    pages,
    provenance,
    tables,
)

WIDTH = 100
_LEGEND = (
    "Stale: the code that it measures has changed since. Carried: it has, and a review "
    "found\nthat no number can be another by it."
)
_NOTHING_LOST = "nothing was being measured."


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = command_line.Parser("experiments", __doc__)
    what = ["list", "check", "plots", "tables", "compile", "carry"]
    parser.add_argument("what", nargs="?", choices=what, default="list")
    parser.add_argument("slugs", nargs="*", help="of carry: experiments, or all")
    parser.add_argument("--why", default="", help="of carry: the reason")
    parser.add_argument("--scale", choices=experiment.SCALES, default="cpu")
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        help="of check, plots and compile: folder of the tables; default for check "
        "those of record, else your own",
    )
    parser.add_argument("--strict", action="store_true", help="of check")
    parser.add_argument("--verbosity", type=int, default=0, help="1: with traceback")
    options = parser.parse_args(arguments)
    if options.slugs and options.what != "carry":
        parser.error(f"{options.what} takes no names, and {options.slugs[0]} came")
    return options


def show_list(scale: str) -> list[tables.Row]:
    """Prints and returns the experiments."""
    rows = catalogue.listing(scale)
    for of, title in (("paper", "Of the paper"), ("ours", "Ours")):
        print(f"{title}\n{'=' * len(title)}")
        for row in rows:
            if row["of"] == of:
                print("\n".join(entry(row)) + "\n")
    counts = collections.Counter(row["status"] for row in rows)
    told = ", ".join(f"{num} {status}" for status, num in counts.items())
    print(f"At scale {scale}, of record: {told}.")
    if counts.keys() & {provenance.STALE, provenance.CARRIED}:
        print(_LEGEND)
    own = experiment.own_folder(scale)
    print(f"Your own go to {command_line.shown(own)}; --help of each says more.")
    return rows


def entry(row: tables.Row) -> list[str]:
    """Returns the lines of an experiment, at most `WIDTH` wide."""
    states = str(row["status"])
    if row["mine"] != provenance.UNRUN:
        states += f"; mine: {row['mine']}"
    lines = [f"{row['experiment']} [{states}]: {row['what']}"]
    told = str(row["paper"])
    if row["published"]:
        told += f": {row['published']}"
    for name, text in (("paper", told), ("takes", str(row["takes"]))):
        lines += folded(text, f"  {name}  ") if text else []
    for command in [*str(row["before"]).splitlines(), str(row["command"])]:
        lines += folded(command, "  $ ", " \\")
    return lines


def folded(text: str, begin: str, end: str = "") -> list[str]:
    """Breaks a text between words; `end` closes every line but the last."""
    lines = textwrap.wrap(
        text,
        WIDTH - len(end),
        initial_indent=begin,
        subsequent_indent=" " * (len(begin) + (4 if end else 0)),
        break_long_words=False,
        break_on_hyphens=False,
    )
    return [line + end for line in lines[:-1]] + lines[-1:]


def show_claims(folder: pathlib.Path) -> list[tables.Row]:
    """Prints and returns the claims."""
    rows = catalogue.check(folder)
    for row in rows:
        print(f"[{row['verdict']:>7}] {row['experiment']}: {row['claim']}")
        print(f"          {row['found']}")
    counts = collections.Counter(row["verdict"] for row in rows)
    told = ", ".join(f"{num} {verdict}" for verdict, num in counts.items())
    print(f"By {command_line.shown(folder)}: {told}.")
    return rows


def show_plots(folder: pathlib.Path) -> list[tables.Row]:
    """Draws the pictures of a folder's tables; returns what became of each.

    Raises:
      ValueError: it has no tables.
    """
    rows = [
        {"experiment": item.slug, "plot": item.redraw(folder)}
        for item in catalogue.every()
        if provenance.read(folder, item.slug)
    ]
    if not rows:
        raise ValueError(
            f"{command_line.shown(folder)} has no tables: run an experiment first, or "
            "name a folder by --out=DIR; that of record is "
            f"{command_line.shown(experiment.record_folder('cpu'))}."
        )
    for row in rows:
        print(f"{row['experiment']}: {row['plot']}")
    print(f"In {command_line.shown(folder)}.")
    return rows


def carry(slugs: list[str], scale: str, why: str) -> list[tables.Row]:
    """Carries tables over a change of code; prints and returns what became of each.

    Raises:
      ValueError: a slug is none, or none is given.
    """
    folder = experiment.record_folder(scale)
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


def compile_all(folder: pathlib.Path) -> list[tables.Row]:
    """Brings all tables that compilers make up to date; returns what became of each.

    Raises:
      ValueError: one ended with an error, which it has told.
    """
    rows = []
    for slug, *flags in catalogue.COMPILED:
        item = catalogue.declared(slug)
        stale = item.status_in(folder) in (provenance.STALE, provenance.UNDATED)
        # What is measured by cells keeps none of other code. Without, it sees itself
        # which rows are of other programs.
        if stale and item.cells is not None:
            flags = [*flags, "--again"]
        command = ["-m", f"experiments.{slug}", *flags, f"--out={folder}"]
        print(f"python {shlex.join(command)}", flush=True)
        status = subprocess.run([sys.executable, *command], check=False).returncode
        if status:
            raise ValueError(f"{slug} ended with status {status}: see above.")
        rows.append({"experiment": slug, "flags": " ".join(flags)})
    return rows


def do(options: argparse.Namespace) -> list[tables.Row]:
    """Does what is asked; returns what it printed."""
    if options.what == "tables":
        return pages.write()
    if options.what == "plots":
        return show_plots(options.out or experiment.own_folder(options.scale))
    if options.what == "carry":
        return carry(options.slugs, options.scale, options.why)
    if options.what == "compile":
        return compile_all(options.out or experiment.own_folder(options.scale))
    if options.what == "list":
        return show_list(options.scale)
    rows = show_claims(options.out or experiment.record_folder(options.scale))
    if options.strict and any(row["verdict"] == claims.FAILS for row in rows):
        sys.exit(1)
    return rows


def main(arguments: list[str] | None = None) -> list[tables.Row]:
    """Does what is asked; None: by the process's command line, see `command_line`."""
    options = parse_arguments(arguments)
    if arguments is not None:
        return do(options)
    with command_line.told(options.verbosity, lambda: _NOTHING_LOST):
        return do(options)


if __name__ == "__main__":
    main()
