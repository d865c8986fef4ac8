"""PNG plots of a run's record, into `<workdir>/plots`.

`python -m tlt_jax.plots --workdir=DIR` redraws them at any time.
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import figure

from tlt_jax.viz import drafter_plots, style, timeline
from tlt_jax.workdir import metrics

Rows = Sequence[Mapping[str, Any]]

_STAGES = (
    ("time/rollout_s", "rollout", style.BLUE),
    ("time/reward_s", "reward", style.PURPLE),
    ("time/inference_s", "inference", style.SKY),
    ("time/update_s", "update", style.ORANGE),
    ("time/sync_s", "weight sync", style.GREEN),
    ("time/compile_s", "compilation", style.RED),
)


def draw_all(workdir: str | pathlib.Path) -> list[pathlib.Path]:
    """Draw every plot that the run's record has data for.

    Args:
      workdir: a run's directory with at least one recorded step.

    Returns:
      The files written.
    """
    drawn = figures(workdir)
    directory = pathlib.Path(workdir) / "plots"
    directory.mkdir(exist_ok=True)
    written = []
    for name, one in drawn.items():
        written.append(directory / f"{name}.png")
        style.save(one, written[-1])
    return written


def figures(workdir: str | pathlib.Path) -> dict[str, figure.Figure]:
    """Make every plot that the run's record has data for, by name.

    Raises:
      metrics.MetricsError: there is no record, or it is damaged.
    """
    workdir = pathlib.Path(workdir)
    rows = metrics.read(workdir)

    def worker_timeline(_: Rows) -> figure.Figure | None:
        return timeline.draw(timeline.read(workdir))

    made = {}
    for name, draw in (
        ("reward", reward),
        ("lengths", lengths),
        ("time_split", time_split),
        ("accept_length", accept_length),
        ("policy", policy),
        ("drafter_training", drafter_training),
        ("timeline", worker_timeline),
    ):
        drawn = draw(rows)
        if drawn is not None:
            made[name] = drawn
    return made


def reward(rows: Rows) -> figure.Figure | None:
    """Draw the mean reward with its standard deviation, and the smoothed mean."""
    steps, mean = _series(rows, "reward/mean")
    if not len(steps):
        return None
    fig, axes = style.figure("Reward", "reward")
    # Rows without a deviation have a band of no width.
    by_step = dict(zip(*_series(rows, "reward/std"), strict=True))
    std = np.array([by_step.get(step, 0.0) for step in steps])
    axes.fill_between(
        steps,
        mean - std,
        mean + std,
        color=style.BLUE,
        alpha=0.12,
        linewidth=0,
        label="± 1 standard deviation",
    )
    window = max(1, min(10, len(steps) // 5))
    if window > 1:
        axes.plot(steps, mean, color=style.BLUE, alpha=0.35, linewidth=1, label="mean")
        axes.plot(
            steps,
            smooth(mean, window),
            color=style.BLUE,
            linewidth=2,
            label=f"mean of the last {window} steps",
        )
    else:
        axes.plot(
            steps,
            mean,
            color=style.BLUE,
            linewidth=2,
            marker="o",
            ms=3,
            label="mean",
        )
    colors = (
        style.GREEN,
        style.ORANGE,
        style.RED,
        style.PURPLE,
        style.SKY,
        style.GREY,
    )
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
    return style.finish(fig, axes)


def lengths(rows: Rows) -> figure.Figure | None:
    """Draw the median, 95th percentile and maximum completion length."""
    curves = (
        ("length/max", "longest", style.RED, 1.2),
        ("length/p95", "95th percentile", style.ORANGE, 1.6),
        ("length/p50", "median", style.BLUE, 2),
    )
    fig, axes = style.figure("Completion length", "tokens")
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
    return style.finish(fig, axes)


def time_split(rows: Rows) -> figure.Figure | None:
    """Draw what each step's time went into, stacked."""
    rows = [row for row in rows if row.get("time/step_s") is not None]
    if not rows:
        return None
    steps = np.array([row["step"] for row in rows])
    total = np.array([row["time/step_s"] for row in rows], float)
    fig, axes = style.figure("Time per step", "seconds")
    base = np.zeros(len(rows))
    for name, label, color in _STAGES:
        spent = np.array([row.get(name) or 0.0 for row in rows], float)
        if spent.any():
            _stack(axes, steps, base, spent, label, color)
            base = base + spent
    rest = np.maximum(0.0, total - base)
    if rest.sum() > 0.005 * total.sum():
        _stack(axes, steps, base, rest, "other", style.GREY)
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
    return style.finish(fig, axes)


def accept_length(rows: Rows) -> figure.Figure | None:
    """Draw the tokens gained per verification; nothing without speculation."""
    steps, values = _series(rows, "specdec/accept_length")
    if not len(steps):
        return None
    fig, axes = style.figure("Accept length", "tokens per verification")
    axes.plot(steps, values, color=style.GREEN, lw=2, marker="o", ms=3, label="mean")
    axes.axhline(1.0, color=style.GREY, lw=1, ls=":", label="plain decoding")
    axes.set_ylim(bottom=0)
    return style.finish(fig, axes)


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
        axes.plot(steps, values, color=style.BLUE, lw=1.5)
        axes.set_title(label, loc="left", fontsize=9)
        style.style(axes)
    grid[-1].set_xlabel("RL step")
    return fig


def drafter_training(rows: Rows) -> figure.Figure | None:
    """Draw how good the drafter is that a run trains: one panel for each number.

    A list holds a number for each unrolled step.
    """
    panels = (
        ("specdec/accept_length", "tokens per verification"),
        ("drafter/top1_acc", "drafter's likeliest token is the target's"),
        ("drafter/loss", "drafter's loss"),
    )
    there = [p for p in panels if any(row.get(p[0]) is not None for row in rows)]
    if not any(name.startswith("drafter/") for name, _ in there):
        return None
    fig = figure.Figure(figsize=(7.5, 2.2 * len(there) + 0.4), layout="constrained")
    grid = fig.subplots(len(there), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (name, label) in zip(grid, there, strict=True):
        drafter_plots.curves(axes, rows, name)
        axes.set_title(label, loc="left", fontsize=9)
        style.style(axes)
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
