"""The look of all plots: colours, axes, legends, and files replaced whole."""

import dataclasses
import io
import os
import pathlib
from collections.abc import Iterable
from typing import Any

from matplotlib import axes as axes_lib
from matplotlib import figure as figure_lib
from matplotlib import ticker

# Okabe and Ito's colours, which colour-blind readers can tell apart.
BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, GREY, PALE = "#CC79A7", "#56B4E9", "#999999", "#DDDDDD"


def figure(title: str, ylabel: str) -> tuple[figure_lib.Figure, axes_lib.Axes]:
    """Make a figure of one panel over RL steps."""
    fig, axes = panels(7.5, 4.2)
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold")
    axes.set(xlabel="RL step", ylabel=ylabel)
    return fig, axes


def panels(
    width: float, height: float, *grid: int, **how: Any
) -> tuple[figure_lib.Figure, Any]:
    """Make a figure of so many inches and its panels, see `Figure.subplots`."""
    fig = figure_lib.Figure(figsize=(width, height), layout="constrained")
    return fig, fig.subplots(*grid, **how)


def open_frame(axes: axes_lib.Axes) -> None:
    """Leave of a panel's frame the two axes."""
    axes.spines[["top", "right"]].set_visible(False)


def no_frame(axes: axes_lib.Axes) -> None:
    """Leave of a panel's frame the labels."""
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def style(axes: axes_lib.Axes) -> None:
    """Style a panel over RL steps."""
    open_frame(axes)
    axes.grid(axis="y", color=PALE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True, min_n_ticks=1))
    low, high = axes.get_xlim()
    if high - low < 1:
        # A single step.
        axes.set_xlim((low + high) / 2 - 0.5, (low + high) / 2 + 0.5)


def stack(axes: axes_lib.Axes, steps: Any, base: Any, values: Any, color: str) -> None:
    """Put bars over the steps on top of others that reach up to `base`."""
    axes.bar(steps, values, 0.9 if len(steps) < 60 else 1.0, base, color=color, lw=0)


def legend(axes: axes_lib.Axes, size: float = 9) -> None:
    """Put a legend beside a panel."""
    axes.legend(
        frameon=False, fontsize=size, loc="upper left", bbox_to_anchor=(1.0, 1.0)
    )


def key(axes: axes_lib.Axes, looks: Iterable[tuple[str, str]], size: float = 8) -> None:
    """Put a legend of colours beside a panel: `(colour, meaning)` each."""
    for color, label in looks:
        axes.plot([], [], color=color, lw=6, label=label)
    legend(axes, size)


def finish(fig: figure_lib.Figure, axes: axes_lib.Axes) -> figure_lib.Figure:
    """Style a figure of one panel."""
    style(axes)
    legend(axes)
    return fig


@dataclasses.dataclass(frozen=True)
class Picture:
    """A figure as PNG; notebooks show it where it is the value of a cell."""

    png: bytes

    def _repr_png_(self) -> bytes:
        return self.png


def picture(drawn: figure_lib.Figure, dpi: int = 80) -> Picture:
    """Render a figure."""
    content = io.BytesIO()
    drawn.savefig(content, format="png", dpi=dpi)
    return Picture(content.getvalue())


def save(drawn: figure_lib.Figure, path: pathlib.Path) -> None:
    """Write a figure; it is replaced whole: a viewer never loads half a picture."""
    part = path.with_suffix(".part")
    try:
        drawn.savefig(part, format="png", dpi=130)
        os.replace(part, path)
    finally:
        # There where drawing has failed.
        part.unlink(missing_ok=True)
