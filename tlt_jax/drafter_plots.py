"""The plot of a drafter's training, `<workdir>/plots/drafter.png`."""

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import cm, figure

from tlt_jax import metrics

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
        _curves(axes, rows, name)
        axes.set_title(title, loc="left", fontsize=9)
        axes.set_xlabel(label)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#DDDDDD", linewidth=0.8)
        if name != "drafter/loss":
            axes.set_ylim(0, 1)
    path = workdir / "plots" / "drafter.png"
    path.parent.mkdir(exist_ok=True)
    part = path.with_suffix(".part")
    drawn.savefig(part, format="png", dpi=130)
    os.replace(part, path)
    return path


def _curves(axes, rows: Sequence[Mapping[str, Any]], name: str) -> None:
    points = [(row["step"], np.atleast_1d(row[name])) for row in rows if name in row]
    if not points:
        return
    steps = [step for step, _ in points]
    values = np.stack([value for _, value in points])
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
