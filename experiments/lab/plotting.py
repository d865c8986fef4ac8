"""The look of the experiments' plots."""

import pathlib
from collections.abc import Mapping, Sequence

from matplotlib import axes as axes_lib
from matplotlib import figure as figure_lib

from tlt_jax.viz import style

COLORS = (
    style.BLUE,
    style.ORANGE,
    style.GREEN,
    style.RED,
    style.PURPLE,
    style.SKY,
    style.GREY,
)
PALE, GREY = style.PALE, style.GREY
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
    title: str, count: int, stamp_text: str, *, width: float = 4.6, height: float = 4.0
) -> tuple[figure_lib.Figure, list[axes_lib.Axes]]:
    """Makes a figure of panels side by side, with its stamp."""
    fig = figure_lib.Figure(figsize=(width * count, height), layout="constrained")
    fig.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    found = fig.subplots(1, count, squeeze=False)[0]
    fig.supxlabel(stamp_text, x=0.99, ha="right", fontsize=7, color=GREY)
    for axes in found:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color=PALE, linewidth=0.8)
        axes.set_axisbelow(True)
    return fig, list(found)


def figure(
    title: str, xlabel: str, ylabel: str, stamp_text: str
) -> tuple[figure_lib.Figure, axes_lib.Axes]:
    """Makes a figure of one panel, with its stamp."""
    fig, (axes,) = panels(title, 1, stamp_text, width=7.5, height=4.4)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    return fig, axes


def bars(
    axes: axes_lib.Axes,
    names: Sequence[str],
    rows: Sequence[Mapping[str, object]],
    metric: str,
    label: str = "%.3g",
) -> None:
    """Draws medians with their ranges, as `paired.summarise` gives them.

    Args:
      axes: a panel.
      names: of the bars.
      rows: one for each.
      metric: the column before `/median`, `/min`, `/max`.
      label: how a median is written.
    """
    medians, lows, highs = (
        [row[f"{metric}/{what}"] for row in rows] for what in ("median", "min", "max")
    )
    below = [a - b for a, b in zip(medians, lows, strict=True)]
    above = [b - a for a, b in zip(medians, highs, strict=True)]
    drawn = axes.bar(
        names, medians, 0.6, yerr=[below, above], capsize=3, color=COLORS[0]
    )
    axes.bar_label(drawn, fmt=label, fontsize=8, padding=2)
    axes.margins(y=0.12)


def save(fig: figure_lib.Figure, path: pathlib.Path) -> None:
    """Gives panels with labels a legend, and writes the figure."""
    for axes in fig.axes:
        if axes.get_legend_handles_labels()[1] and axes.get_legend() is None:
            axes.legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    style.save(fig, path)
