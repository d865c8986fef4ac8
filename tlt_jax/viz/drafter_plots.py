"""The plot of a drafter's training, `<workdir>/plots/drafter.png`."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import cm, figure

from tlt_jax.viz import style
from tlt_jax.workdir import metrics

_PANELS = (
    ("drafter/loss", "training loss", "step"),
    ("drafter/top1_acc", "both laws' likeliest token agree, by step unrolled", "step"),
    ("eval/coupled_rate_by_depth", "held out: accepted by depth, coupled", "step"),
    ("eval/deterministic_rate_by_depth", "held out: accepted, deterministic", "step"),
)


def draw(workdir: str | pathlib.Path) -> pathlib.Path:
    """Draw loss, accuracy and acceptance by depth over the steps.

    Args:
      workdir: of a run of `tlt_jax.train_drafter`.

    Returns:
      The file written.
    """
    workdir = pathlib.Path(workdir)
    rows = metrics.read(workdir)
    drawn = figure.Figure(figsize=(10, 6.5), layout="constrained")
    for axes, (name, title, label) in zip(
        drawn.subplots(2, 2).flat, _PANELS, strict=True
    ):
        curves(axes, rows, name)
        axes.set_title(title, loc="left", fontsize=9)
        axes.set_xlabel(label)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#DDDDDD", linewidth=0.8)
        if name != "drafter/loss":
            axes.set_ylim(0, 1)
    path = workdir / "plots" / "drafter.png"
    path.parent.mkdir(exist_ok=True)
    style.save(drawn, path)
    return path


def curves(axes: Any, rows: Sequence[Mapping[str, Any]], name: str) -> bool:
    """Draw a number over the steps, or one curve for each depth of a list.

    Returns:
      Whether there was anything to draw.
    """
    found = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    points = [(step, np.atleast_1d(value)) for step, value in found]
    if not points:
        return False
    steps = [step for step, _ in points]
    values = np.full((len(points), max(len(value) for _, value in points)), np.nan)
    for i, (_, value) in enumerate(points):
        values[i, : len(value)] = value
    colors = cm.viridis(np.linspace(0, 0.85, values.shape[1]))
    for depth, color in enumerate(colors):
        label = f"depth {depth + 1}" if len(colors) > 1 else None
        marker = "o" if len(steps) < 30 else None
        axes.plot(
            steps,
            values[:, depth],
            color=color,
            lw=1.5,
            marker=marker,
            ms=3,
            label=label,
        )
    if len(colors) > 1:
        axes.legend(frameon=False, fontsize=7)
    return True
