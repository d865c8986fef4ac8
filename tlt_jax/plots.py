"""PNG plots of a run's record, into `<workdir>/plots`.

`python -m tlt_jax.plots --workdir=DIR` redraws them at any time.
"""

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import app, flags
from matplotlib import figure, ticker

from tlt_jax import metrics

Rows = Sequence[Mapping[str, Any]]

# Okabe and Ito's colours, which colour-blind readers can tell apart.
_BLUE, _ORANGE, _GREEN, _RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
_PURPLE, _SKY, _GREY = "#CC79A7", "#56B4E9", "#999999"

_STAGES = (
    ("time/rollout_s", "rollout", _BLUE),
    ("time/reward_s", "reward", _PURPLE),
    ("time/inference_s", "inference", _SKY),
    ("time/update_s", "update", _ORANGE),
    ("time/sync_s", "weight sync", _GREEN),
    ("time/compile_s", "compilation", _RED),
)


def draw_all(workdir: str | pathlib.Path) -> list[pathlib.Path]:
    """Draw every plot that the run's record has data for.

    Args:
      workdir: a run's directory with at least one recorded step.

    Returns:
      The files written.
    """
    workdir = pathlib.Path(workdir)
    rows = metrics.read(workdir)
    directory = workdir / "plots"
    directory.mkdir(exist_ok=True)
    written = []
    for name, draw in (
        ("reward", reward),
        ("lengths", lengths),
        ("time_split", time_split),
        ("accept_length", accept_length),
        ("policy", policy),
    ):
        drawn = draw(rows)
        if drawn is not None:
            path = directory / f"{name}.png"
            # Replaced whole, so that a viewer never loads half a picture.
            part = path.with_suffix(".part")
            drawn.savefig(part, format="png", dpi=130)
            os.replace(part, path)
            written.append(path)
    return written


def reward(rows: Rows) -> figure.Figure | None:
    """Draw the mean reward with its standard deviation, and the smoothed mean."""
    steps, mean = _series(rows, "reward/mean")
    if not len(steps):
        return None
    fig, axes = _figure("Reward", "reward")
    # Rows without a deviation have a band of no width.
    by_step = dict(zip(*_series(rows, "reward/std"), strict=True))
    std = np.array([by_step.get(step, 0.0) for step in steps])
    axes.fill_between(
        steps,
        mean - std,
        mean + std,
        color=_BLUE,
        alpha=0.12,
        linewidth=0,
        label="± 1 standard deviation",
    )
    window = max(1, min(10, len(steps) // 5))
    if window > 1:
        axes.plot(steps, mean, color=_BLUE, alpha=0.35, linewidth=1, label="mean")
        axes.plot(
            steps,
            smooth(mean, window),
            color=_BLUE,
            linewidth=2,
            label=f"mean of the last {window} steps",
        )
    else:
        axes.plot(steps, mean, color=_BLUE, linewidth=2, marker="o", ms=3, label="mean")
    colors = (_GREEN, _ORANGE, _RED, _PURPLE, _SKY, _GREY)
    held_out = sorted(_eval_names(rows))[: len(colors)]
    for (name, label), color in zip(held_out, colors, strict=False):
        eval_steps, values = _series(rows, name)
        axes.plot(
            eval_steps,
            values,
            ls="--",
            marker="D",
            ms=4,
            label=label,
            lw=1.2,
            color=color,
        )
    return _finish(fig, axes)


def lengths(rows: Rows) -> figure.Figure | None:
    """Draw the median, 95th percentile and maximum completion length."""
    curves = (
        ("length/max", "longest", _RED, 1.2),
        ("length/p95", "95th percentile", _ORANGE, 1.6),
        ("length/p50", "median", _BLUE, 2),
    )
    fig, axes = _figure("Completion length", "tokens")
    drawn = 0
    for name, label, color, width in curves:
        steps, values = _series(rows, name)
        if len(steps):
            marker = "o" if len(steps) < 30 else None
            axes.plot(
                steps, values, color=color, lw=width, label=label, marker=marker, ms=3
            )
            drawn += 1
    if not drawn:
        return None
    axes.set_ylim(bottom=0)
    return _finish(fig, axes)


def time_split(rows: Rows) -> figure.Figure | None:
    """Draw what each step's time went into, stacked."""
    rows = [row for row in rows if row.get("time/step_s") is not None]
    if not rows:
        return None
    steps = np.array([row["step"] for row in rows])
    total = np.array([row["time/step_s"] for row in rows], float)
    fig, axes = _figure("Time per step", "seconds")
    base = np.zeros(len(rows))
    for name, label, color in _STAGES:
        spent = np.array([row.get(name) or 0.0 for row in rows], float)
        if spent.any():
            _stack(axes, steps, base, spent, label, color)
            base = base + spent
    rest = np.maximum(0.0, total - base)
    if rest.sum() > 0.005 * total.sum():
        _stack(axes, steps, base, rest, "other", _GREY)
        base = base + rest
    ceiling = 1.15 * np.quantile(base, 0.95)
    if len(steps) >= 8 and base.max() > 2 * ceiling:
        # One step with compilation would squeeze all others flat.
        axes.set_ylim(0, ceiling)
        over = int((base > ceiling).sum())
        axes.text(
            0.01,
            0.97,
            f"{over} step{'s' * (over > 1)} beyond the scale "
            f"(highest {base.max():.0f} s)",
            transform=axes.transAxes,
            va="top",
            fontsize=8,
            color="#555555",
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 2},
        )
    else:
        axes.set_ylim(bottom=0)
    return _finish(fig, axes)


def accept_length(rows: Rows) -> figure.Figure | None:
    """Draw the tokens gained per verification; nothing without speculation."""
    steps, values = _series(rows, "specdec/accept_length")
    if not len(steps):
        return None
    fig, axes = _figure("Accept length", "tokens per verification")
    axes.plot(steps, values, color=_GREEN, lw=2, marker="o", ms=3, label="mean")
    axes.axhline(1.0, color=_GREY, lw=1, ls=":", label="plain decoding")
    axes.set_ylim(bottom=0)
    return _finish(fig, axes)


def policy(rows: Rows) -> figure.Figure | None:
    """Draw entropy, divergence, gradient norm and sampler mismatch, one panel each."""
    panels = (
        ("policy/entropy", "entropy, nats"),
        ("policy/kl", "KL from the initial policy"),
        ("policy/grad_norm", "gradient norm"),
        ("mismatch/logprob_max_abs", "largest log-prob mismatch"),
    )
    panels = [p for p in panels if len(_series(rows, p[0])[0])]
    if not panels:
        return None
    fig = figure.Figure(figsize=(7.5, 1.7 * len(panels) + 0.6), layout="constrained")
    grid = fig.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (name, label) in zip(grid, panels, strict=True):
        steps, values = _series(rows, name)
        axes.plot(steps, values, color=_BLUE, lw=1.5)
        axes.set_title(label, loc="left", fontsize=9)
        _style(axes)
    grid[-1].set_xlabel("RL step")
    return fig


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Return the mean of each value and up to `window - 1` values before it."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    end = np.arange(1, len(values) + 1)
    start = np.maximum(0, end - window)
    return (total[end] - total[start]) / (end - start)


def _series(rows: Rows, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return steps and values where `name` is recorded and finite."""
    points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    points = [(step, value) for step, value in points if np.isfinite(value)]
    steps, values = zip(*points, strict=True) if points else ((), ())
    return np.array(steps, int), np.array(values, float)


def _eval_names(rows: Rows) -> set[tuple[str, str]]:
    names = {name for row in rows for name in row if name.startswith("eval/")}
    shown = [n for n in names if n.startswith(("eval/avg@", "eval/pass@"))]
    return {(n, "held out, " + n.removeprefix("eval/")) for n in shown}


def _stack(axes, steps, base, spent, label, color) -> None:
    axes.bar(steps, spent, 0.9 if len(steps) < 60 else 1.0, base, color=color, lw=0)
    axes.plot([], [], color=color, lw=6, label=label)


def _figure(title: str, ylabel: str):
    fig = figure.Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = fig.subplots()
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold")
    axes.set_xlabel("RL step")
    axes.set_ylabel(ylabel)
    return fig, axes


def _style(axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True, min_n_ticks=1))
    low, high = axes.get_xlim()
    if high - low < 1:
        # A single step.
        axes.set_xlim((low + high) / 2 - 0.5, (low + high) / 2 + 0.5)


def _finish(fig: figure.Figure, axes) -> figure.Figure:
    _style(axes)
    axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return fig


def _main(argv: Sequence[str]) -> None:
    del argv
    for path in draw_all(flags.FLAGS.workdir):
        print(path)


if __name__ == "__main__":
    # Here, because the run's program defines a flag of this name too.
    flags.DEFINE_string("workdir", None, "The run's directory.", required=True)
    app.run(_main)
