"""The look of all plots: colours, axes, legends, and files replaced whole."""

import dataclasses
import io
import os
import pathlib

from matplotlib import axes as axes_lib
from matplotlib import figure as figure_lib
from matplotlib import ticker

# Okabe and Ito's colours, which colour-blind readers can tell apart.
BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, GREY, PALE = "#CC79A7", "#56B4E9", "#999999", "#DDDDDD"


def figure(title: str, ylabel: str) -> tuple[figure_lib.Figure, axes_lib.Axes]:
    """Make a figure of one panel over RL steps."""
    fig = figure_lib.Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = fig.subplots()
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold")
    axes.set_xlabel("RL step")
    axes.set_ylabel(ylabel)
    return fig, axes


def style(axes: axes_lib.Axes) -> None:
    """Style a panel over RL steps."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=PALE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True, min_n_ticks=1))
    low, high = axes.get_xlim()
    if high - low < 1:
        # A single step.
        axes.set_xlim((low + high) / 2 - 0.5, (low + high) / 2 + 0.5)


def legend(axes: axes_lib.Axes, size: float = 9) -> None:
    """Put a legend beside a panel."""
    axes.legend(
        frameon=False, fontsize=size, loc="upper left", bbox_to_anchor=(1.0, 1.0)
    )


def finish(fig: figure_lib.Figure, axes: axes_lib.Axes) -> figure_lib.Figure:
    """Style a figure of one panel."""
    style(axes)
    legend(axes)
    return fig


@dataclasses.dataclass(frozen=True)
class Picture:
    """A figure as PNG; notebooks show it where it is the value of a cell.

    Attributes:
      png: the file's content.
    """

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
    drawn.savefig(part, format="png", dpi=130)
    os.replace(part, path)
