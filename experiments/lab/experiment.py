"""An experiment as a declaration, and the one program that runs all of them.

A declaration's functions name what they take, and are given it: `options` (the command
line), `folder` (of the tables), `cell`, `context` (what `Experiment.context` makes,
once and only if a function names it), `closing` (an exit stack that ends with the
run), `record` (the provenance), `rows` and the other tables, `summary`, `stamp` (where
a plot's figures come from), and every setting of the record by its name.
"""

import argparse
import contextlib
import dataclasses
import functools
import inspect
import itertools
import json
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from experiments.lab import claims as claims_lib
from experiments.lab import command_line, freshness, plotting, provenance, tables

# Tables of record, by scale: only `--out` writes there.
RESULTS_DIR = freshness.FOLDER / "results"
# `cpu` runs on two cores, `one_gpu` needs one accelerator, `paper` what the paper used.
SCALES = ("cpu", "one_gpu", "paper")
A_TOOL, AS_CPU = "a tool", "as cpu"
_SUMMARY = "summary"
# What options of these names mean wherever they stand without words of their own.
_USUAL = {
    "config": "recipe, FILE.py or FILE.py:variant",
    "model": "directory, name of the hub, or one that comes with a package",
    "models": "names, separated by commas",
    "seeds": "runs of every case; with more a table is continued",
    "seed": "of what is drawn",
    "steps": "RL steps",
    "warm-steps": "first RL steps, which are not compared",
    "rounds": "turns of every case",
    "rollouts": "of a case",
    "new-tokens": "most tokens of an answer",
    "max-new-tokens": "most tokens of an answer",
    "num-prompts": "of an RL step, or to be answered",
    "temperature": "of sampling; 0: greedy",
    "temperatures": "of sampling, separated by commas; 0: greedy",
    "strategies": "D<draft_depth>K<topk>V<tokens_to_verify>, separated by commas",
    "batches": "rows at a time, separated by commas",
    "draft-vocab": "tokens that the drafter can propose",
    "max-rows": "rows at a time",
    "page-size": "positions of a page of the cache",
}
_Grid = Mapping[str, Iterable[object]]


@dataclasses.dataclass(frozen=True)
class Option:
    """A flag of the command line, named without its dashes; a default False: a switch.

    `kind` reads the text; None: the default's type. Where it is `recorded`, a table
    with another value of it is another table.
    """

    name: str
    default: object = ""
    help: str = ""
    kind: Callable[[str], object] | None = None
    required: bool = False
    recorded: bool = True
    choices: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """Its name among the options and settings."""
        return self.name.replace("-", "_")

    def add_to(self, parser: argparse.ArgumentParser) -> None:
        """Adds it to a parser."""
        told = self.help or _USUAL.get(self.name, "")
        if self.default not in (None, "", False):
            told = f"{told} (default {self.default})".strip()
        # argparse formats what follows a percent sign.
        told = told.replace("%", "%%") or None
        more: dict[str, Any] = {"help": told, "default": self.default}
        if self.default is False:
            more["action"] = "store_true"
        else:
            more["type"] = self.kind or type(self.default)
            more |= {"required": self.required, "choices": self.choices or None}
        parser.add_argument(f"--{self.name}", **more)


def plain(*, recorded: bool = True, **defaults: object) -> tuple[Option, ...]:
    """Returns options that need no more to be said than their defaults."""
    return tuple(
        Option(name.replace("_", "-"), value, recorded=recorded)
        for name, value in defaults.items()
    )


def seeds(count: int) -> Option:
    """Returns the option of how many seeds."""
    return Option("seeds", count, recorded=False)


# What all experiments understand, tools apart.
SHARED = (
    Option("scale", SCALES[0], "whose machine this is", choices=SCALES, recorded=False),
    Option(
        "out",
        None,
        "folder of tables and picture; default experiments/results/mine/SCALE, which "
        "git ignores. Tables of record are in experiments/results/SCALE",
        pathlib.Path,
    ),
    Option(
        "again",
        False,
        "measure anew what --out has already; without it cells that are there are kept "
        "and lacking ones added",
    ),
)
VERBOSITY = Option("verbosity", 0, "1: a traceback with an error")


def record_folder(scale: str) -> pathlib.Path:
    """Returns where a scale's tables of record are."""
    return RESULTS_DIR / scale


def own_folder(scale: str) -> pathlib.Path:
    """Returns where experiments write unless told otherwise; git ignores it."""
    return RESULTS_DIR / "mine" / scale


def find(options: argparse.Namespace, name: str) -> pathlib.Path:
    """Returns a file among the user's own results, else among those of record."""
    own = options.out / name
    return own if own.exists() else record_folder(options.scale) / name


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """A figure or a table, and how it is made.

    Attributes:
      slug: of its module.
      text: its module's docstring.
      title: the paper's item, or ours, in a line.
      published: the paper's figures; empty: ours alone.
      needs: flags and inputs beside `--scale` that its command needs.
      larger: the same by larger scale; empty: they have no figures of their own.
      before: commands that make what it needs, and the minutes of each.
      options: of its command line.
      constants: what else stands in the record: another value makes another table.
      settings: makes what stands in the record beside them, or in their place.
      check: refuses or completes options.
      context: makes what cells share.
      cells: what is measured: values by setting, each with each and with each seed that
        the options ask for; or what lists the cells.
      measure: measures a cell; returns its rows, or rows by table.
      others: names of the tables beside the rows that `measure` returns.
      sources: returns the tables of other experiments that are read: the picture names
        their machines, too.
      derived: makes tables that hang on no cell, by name.
      summary: reduces the rows; None: they are the result.
      plot: draws the tables; returns a figure.
      claims: what the result can refute.
      run: does everything in place of cells; returns the result.
      table: file of the result; empty: `<slug>.csv`, and of a tool none.
      is_derived: read from elsewhere and not measured, so that it is made anew always.
      is_tool: it answers questions, and has neither result nor the shared options.
    """

    slug: str
    text: str
    title: str
    published: str = ""
    needs: str = ""
    larger: Mapping[str, str] = dataclasses.field(default_factory=dict)
    before: Mapping[str, int] = dataclasses.field(default_factory=dict)
    options: tuple[Option, ...] = ()
    constants: Mapping[str, object] = dataclasses.field(default_factory=dict)
    settings: Callable[..., Mapping[str, object]] | None = None
    check: Callable[[argparse.Namespace], None] | None = None
    context: Callable[..., Any] | None = None
    cells: _Grid | Callable[..., Sequence[tables.Cell]] | None = None
    measure: Callable[..., Any] | None = None
    others: tuple[str, ...] = ()
    sources: Callable[..., Sequence[pathlib.Path]] | None = None
    derived: Callable[..., Mapping[str, Sequence[tables.Row]]] | None = None
    summary: Callable[..., list[tables.Row]] | None = None
    plot: Callable[..., Any] | None = None
    claims: claims_lib.Claims = dataclasses.field(default_factory=dict)
    run: Callable[..., Any] | None = None
    table: str = ""
    is_derived: bool = False
    is_tool: bool = False

    def parse(self, arguments: Sequence[str] | None = None) -> argparse.Namespace:
        """Reads the command line; None: that of the process."""
        options = self._read(arguments)
        if self.check:
            self.check(options)
        return options

    def _read(self, arguments: Sequence[str] | None) -> argparse.Namespace:
        parser = command_line.Parser(f"experiments.{self.slug}", self.text)
        shared = () if self.is_tool else SHARED
        for option in (*self.options, *shared, VERBOSITY):
            option.add_to(parser)
        options = parser.parse_args(arguments)
        if not self.is_tool:
            options.out = options.out or own_folder(options.scale)
        return options

    def main(self, arguments: Sequence[str] | None = None) -> Any:
        """Runs the experiment; returns the summary that it writes, or the rows.

        None: with the process's command line, and what a user can mend is a line and a
        status.
        """
        if arguments is not None:
            return self._run(self.parse(arguments))
        options = self._read(None)
        with command_line.told(options.verbosity, lambda: self.kept(options)):
            if self.check:
                self.check(options)
            return self._run(options)

    def _run(self, options: argparse.Namespace) -> Any:
        with contextlib.ExitStack() as closing:
            run = _Run(self, options, closing)
            result = run.take(self.run) if self.run else run.measure()
        if not self.is_tool:
            self.tell_where(options)
        return result

    def kept(self, options: argparse.Namespace) -> str:
        """Says what a run that was stopped leaves."""
        if self.is_tool and not self.table:
            return "nothing is lost, since nothing was kept."
        path = options.out / (self.table or f"{self.slug}.csv")
        if not path.exists():
            return "no cell was through, so that nothing is kept."
        where = command_line.shown(path)
        cells = provenance.read(options.out, self.slug).get("cells")
        if not cells:
            return f"what was written before is in {where}."
        told = f"{cells['done']} of {cells['wanted']} cells are kept in {where}"
        return f"{told}; the same command goes on from there."

    def tell_where(self, options: argparse.Namespace) -> None:
        """Says where the results are, and where those of record."""
        found = sorted(path.name for path in options.out.glob(f"{self.slug}*"))
        print(f"In {command_line.shown(options.out)}: {', '.join(found)}.")
        record, folder = {}, record_folder(options.scale)
        if folder.resolve() != options.out.resolve():
            record = provenance.read(folder, self.slug)
        if record:
            stamp = provenance.stamp(record)
            print(f"Those of record ({stamp}) are in {command_line.shown(folder)}.")

    def draw(self, folder: pathlib.Path, record: Mapping) -> None:
        """Draws the plot from the tables in a folder.

        Raises:
          LookupError: they lack what it needs.
        """
        stamp = provenance.stamp(record, is_read=self.is_derived)
        given = {**record["settings"], "stamp": stamp}
        for name in (*self.others, _SUMMARY, tables.ROWS):
            path = tables.path_of(folder, self.slug, name)
            if path.exists():
                given[name or "rows"] = tables.read(path)
        figure = self.plot(**{name: given[name] for name in _wanted(self.plot)})
        plotting.save(figure, folder / f"{self.slug}.png")

    def redraw(self, folder: pathlib.Path) -> str:
        """Draws the plot again; returns what became of it."""
        record = provenance.read(folder, self.slug)
        if self.plot is None:
            return "has no plot"
        if not record:
            return "has no results"
        try:
            self.draw(folder, record)
        except KeyError as error:
            return f"its tables are of other code and lack {error}: run it again"
        return "drawn"

    def check_claims(self, folder: pathlib.Path) -> list[tables.Row]:
        """Decides its claims by the table in a folder."""
        path = tables.path_of(folder, self.slug, _SUMMARY if self.summary else "")
        found = []
        for text, decide in self.claims.items():
            verdict, told = claims_lib.NO_DATA, f"{path.name} is not there"
            if path.exists():
                try:
                    holds, told = decide(tables.read(path))
                    verdict = claims_lib.HOLDS if holds else claims_lib.FAILS
                except (LookupError, TypeError, ValueError) as error:
                    told = f"{path.name} does not tell: {error}"
            row = {"experiment": self.slug, "claim": text}
            found.append(row | {"verdict": verdict, "found": told})
        return found

    def command(self, scale: str) -> str:
        """Returns the command that makes the result."""
        flags = self.needs
        if scale != "cpu" and self.larger:
            flags = self.larger[scale]
        elif not self.is_tool:
            scale = "cpu"
        scaled = "" if self.is_tool else f"--scale={scale}"
        words = filter(None, [scaled, flags])
        return " ".join(["python -m", f"experiments.{self.slug}", *words])

    def status(self, scale: str) -> str:
        """Tells whether the result is there, and made by today's code."""
        if self.is_tool:
            return A_TOOL
        if scale != "cpu" and not self.larger:
            return AS_CPU
        return self.status_in(record_folder(scale))

    def status_in(self, folder: pathlib.Path) -> str:
        """Tells the same of a folder, whatever the scale."""
        return provenance.status(self.slug, folder, self.table)


@dataclasses.dataclass
class _Run:
    """One call of an experiment's command."""

    experiment: Experiment
    options: argparse.Namespace
    closing: contextlib.ExitStack

    @property
    def folder(self) -> pathlib.Path:
        """Where tables go."""
        return self.options.out

    @functools.cached_property
    def context(self) -> Any:
        """What cells share."""
        return self.take(self.experiment.context)

    @functools.cached_property
    def settings(self) -> Mapping[str, object]:
        """What stands in the record, and tells one table from another."""
        recorded = {
            option.key: getattr(self.options, option.key)
            for option in self.experiment.options
            if option.recorded
        }
        more = self.experiment.settings
        made = self.take(more) if more else {}
        return {**recorded, **self.experiment.constants, **made}

    @functools.cached_property
    def record(self) -> provenance.Provenance:
        """The provenance, begun when it is first asked for."""
        made = provenance.Provenance(self.experiment.slug, self.settings)
        if self.experiment.sources:
            made.read_from(self.take(self.experiment.sources))
        return made

    def take(self, function: Callable[..., Any], **given: object) -> Any:
        """Calls a function with what its parameters name."""
        own = ("options", "folder", "context", "closing", "record")
        for name in _wanted(function):
            if name not in given:
                given[name] = (
                    getattr(self, name) if name in own else self.settings[name]
                )
        return function(**{name: given[name] for name in _wanted(function)})

    def cells(self) -> Sequence[tables.Cell]:
        """Lists what is to be measured."""
        wanted = self.experiment.cells
        if not isinstance(wanted, Mapping):
            return self.take(wanted)
        has_seeds = hasattr(self.options, "seeds")
        seeds = range(self.options.seeds) if has_seeds else [None]
        return [
            tables.Cell(dict(zip(wanted, values, strict=True)), seed)
            for seed in seeds
            for values in itertools.product(*wanted.values())
        ]

    def measure(self) -> list[tables.Row]:
        """Measures the cells that lack; writes, prints and draws what then is there."""
        experiment, slug, folder = self.experiment, self.experiment.slug, self.folder
        record = self.record
        found = tables.measure(
            folder,
            slug,
            record,
            self.cells(),
            lambda cell: self.take(experiment.measure, cell=cell),
            others=experiment.others,
            again=self.options.again or experiment.is_derived,
        )
        result = found["rows"] = found.pop(tables.ROWS)
        if experiment.derived:
            for name, rows in self.take(experiment.derived, **found).items():
                tables.write(tables.path_of(folder, slug, name), rows)
        if experiment.summary:
            result = self.take(experiment.summary, **found)
            tables.write(tables.path_of(folder, slug, _SUMMARY), result)
        print(tables.shown(result))
        if experiment.plot:
            experiment.draw(folder, json.loads(json.dumps(record.record)))
        return result


def _wanted(function: Callable[..., Any]) -> list[str]:
    """Names the parameters that have no default."""
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.default is p.empty]


def both(one_gpu: str, paper: str = "") -> Mapping[str, str]:
    """Flags of the larger scales; `paper` as `one_gpu` where it is left out."""
    return {"one_gpu": one_gpu, "paper": paper or one_gpu}


def recipes(more: str = "") -> Mapping[str, str]:
    """The same with a recipe of the scale's size."""
    names = ("configs/smollm2.py", "configs/grpo.py:qwen2.5-7b")
    return both(*(f"--config={name} {more}".strip() for name in names))


def models(more: str) -> Mapping[str, str]:
    """The same with a model of the scale's size."""
    names = ("Qwen/Qwen2.5-7B-Instruct", "Qwen/Qwen2.5-32B-Instruct")
    return both(*(f"--model={name} --drafter=DIR {more}".strip() for name in names))


def parse_pairs(text: str, argument: str) -> dict[str, str]:
    """Reads `name=value,name=value`.

    Raises:
      ValueError: an item has no `=`.
    """
    pairs = {}
    for item in filter(None, text.split(",")):
        name, sign, value = item.partition("=")
        if not sign or not value:
            raise ValueError(
                f"--{argument}={text}: {item!r} has no value; write name=value, "
                "items separated by commas."
            )
        pairs[name] = value
    return pairs


def numbers(text: str, argument: str, kind: Callable = int, by: str = ",") -> list:
    """Reads numbers.

    Raises:
      ValueError: an item is none.
    """
    found = []
    for item in text.split(by):
        try:
            found.append(kind(item))
        except ValueError:
            what = "whole number" if kind is int else "number"
            raise ValueError(
                f"--{argument}={text}: {item!r} is no {what}; separate them by {by!r}."
            ) from None
    return found


def known(text: str, choices: Sequence[str], argument: str, by: str = ",") -> list[str]:
    """Reads names.

    Raises:
      ValueError: one is not among the choices.
    """
    names = list(filter(None, text.split(by)))
    if unknown := [name for name in names if name not in choices]:
        raise ValueError(
            f"--{argument} names {', '.join(unknown)}; known are "
            f"{f'{by} '.join(choices)}."
        )
    return names
