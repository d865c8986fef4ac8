"""The look of the experiments' plots."""

import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import axes as axes_lib
from matplotlib import figure as figure_lib

from experiments.lab import tables
from tlt_jax.viz import style

COLORS = (
    *(style.BLUE, style.ORANGE, style.GREEN, style.RED),
    *(style.PURPLE, style.SKY, style.GREY),
)
PALE, GREY = style.PALE, style.GREY
# Inches of every picture: a thousand pixels, of which a page shows nine hundred.
WIDTH = 7.69
Figure = figure_lib.Figure
# Of the stages of an RL step, in all plots.
STAGE_COLORS = {
    "rollout": style.BLUE,
    "drafter": style.GREEN,
    "reward": style.GREY,
    "inference": style.SKY,
    "update": style.ORANGE,
    "sync": style.PURPLE,
}


def panels(
    title: str,
    names: Sequence[str],
    stamp_text: str,
    *,
    xlabel: str = "",
    ylabel: str = "",
    columns: int = 2,
    height: float = 3.7,
) -> tuple[figure_lib.Figure, list[axes_lib.Axes]]:
    """Makes a figure of named panels, `height` inches each, with its stamp.

    As wide as a page shows it, whatever the number of panels: they stand in rows of
    `columns`. `xlabel` stands below each column, `ylabel` beside each row.
    """
    columns = min(columns, len(names))
    rows = -(-len(names) // columns)
    size = (WIDTH, 0.4 + rows * height)
    fig = figure_lib.Figure(figsize=size, layout="constrained")
    fig.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    grid = fig.subplots(rows, columns, squeeze=False)
    found = list(grid.flat)
    for unused in found[len(names) :]:
        unused.remove()
    del found[len(names) :]
    fig.supxlabel(stamp_text, x=0.99, ha="right", fontsize=7, color=GREY)
    for number, (axes, name) in enumerate(zip(found, names, strict=True)):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color=PALE, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.set_title(name, loc="left", fontsize=10)
        axes.set_xlabel(xlabel if number + columns >= len(names) else "")
        axes.set_ylabel("" if number % columns else ylabel)
    return fig, found


def figure(
    title: str, xlabel: str, ylabel: str, stamp_text: str
) -> tuple[figure_lib.Figure, axes_lib.Axes]:
    """Makes a figure of one panel, with its stamp."""
    labels = {"xlabel": xlabel, "ylabel": ylabel}
    fig, (axes,) = panels(title, [""], stamp_text, height=4.0, **labels)
    return fig, axes


def line(
    axes: axes_lib.Axes,
    rows: Sequence[tables.Row],
    x: str,
    y: str,
    style: str = "-",
    *,
    has_range: bool = False,
    **look: Any,
) -> None:
    """Draws the mean of a column over another; `has_range`: and its least and most."""
    found = {at: tables.column(its, y) for (at,), its in tables.groups(rows, x).items()}
    axes.plot(list(found), list(map(statistics.mean, found.values())), style, **look)
    if has_range:
        least, most = ([pick(v) for v in found.values()] for pick in (min, max))
        color = look["color"]
        axes.fill_between(
            list(found), least, most, color=color, alpha=0.15, linewidth=0
        )


def bars(
    axes: axes_lib.Axes,
    names: Sequence[str],
    rows: Sequence[Mapping[str, object]],
    metric: str,
    label: str = "%.3g",
) -> None:
    """Draws a metric's medians and ranges, as `paired.summarise` gives them."""
    medians, lows, highs = (
        np.array(tables.column(rows, f"{metric}/{what}"))
        for what in ("median", "min", "max")
    )
    spread = [medians - lows, highs - medians]
    drawn = axes.bar(names, medians, 0.6, yerr=spread, capsize=3, color=COLORS[0])
    axes.bar_label(drawn, fmt=label, fontsize=8, padding=2)
    axes.margins(y=0.12)


def save(fig: figure_lib.Figure, path: pathlib.Path) -> None:
    """Gives panels with labels a legend, and writes the figure."""
    for axes in fig.axes:
        if axes.get_legend_handles_labels()[1] and axes.get_legend() is None:
            axes.legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    style.save(fig, path)
