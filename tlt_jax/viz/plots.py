"""PNG plots of the record of a run, or of a drafter's training, into `<workdir>/plots`.

`python -m tlt_jax.plots --workdir=DIR` redraws them at any time.
"""

import itertools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import axes as axes_lib
from matplotlib import cm, figure

from tlt_jax.specdec import rooms, verify
from tlt_jax.viz import readable, style, timeline
from tlt_jax.workdir import metrics, record_keys, step_record

Rows = Sequence[Mapping[str, Any]]

# What `draw_all` writes last, of every run.
_LAST = "plots/policy.png"
_STAGES = (
    ("time/rollout_s", "rollout", style.BLUE),
    ("time/wait_s", "waiting for the rollout", style.BLUE),
    ("time/reward_s", "reward", style.PURPLE),
    ("time/inference_s", "inference", style.SKY),
    ("time/update_s", "update", style.ORANGE),
    ("time/sync_s", "weight sync", style.GREEN),
    ("time/compile_s", "compilation", style.RED),
)
_LENGTHS = (
    ("length/max", "longest", style.RED, 1.2),
    ("length/p95", "95th percentile", style.ORANGE, 1.6),
    ("length/p50", "median", style.BLUE, 2),
)
_POLICY = (
    ("policy/entropy", "entropy, nats"),
    ("policy/kl", "KL from the initial policy"),
    ("policy/grad_norm", "gradient norm"),
    ("mismatch/logprob_max_abs", "largest log-prob mismatch"),
)
_DRAFTER = (
    ("specdec/accept_length", "tokens per verification"),
    ("drafter/top1_acc", "drafter's likeliest token is the target's"),
    ("drafter/loss", "drafter's loss"),
)
# Of a training of a drafter alone.
_TRAINING = (
    ("drafter/loss", "training loss"),
    ("drafter/top1_acc", "both laws' likeliest token agree, by step unrolled"),
    ("eval/coupled_rate_by_depth", "held out: accepted by depth, coupled"),
    ("eval/deterministic_rate_by_depth", "held out: accepted, deterministic"),
)


def draw_all(workdir: str | pathlib.Path) -> list[pathlib.Path]:
    """Draw what a record of at least one step has data for; return the files."""
    drawn = figures(workdir)
    directory = pathlib.Path(workdir) / "plots"
    directory.mkdir(exist_ok=True)
    written = []
    for name, one in drawn.items():
        written.append(directory / f"{name}.png")
        style.save(one, written[-1])
    return written


def complete(workdir: str | pathlib.Path) -> None:
    """Draw all of a run that is over, unless that was done behind its record.

    A process may be killed between its last checkpoint and the last plot.
    """
    record, last = pathlib.Path(workdir) / metrics.FILE, pathlib.Path(workdir) / _LAST
    if not last.exists() or last.stat().st_mtime_ns < record.stat().st_mtime_ns:
        draw_all(workdir)


def figures(workdir: str | pathlib.Path) -> dict[str, figure.Figure]:
    """Make every plot that the run's record has data for, by name.

    Raises:
      metrics.MetricsError: there is no record, or it is damaged.
    """
    workdir = pathlib.Path(workdir)
    rows = readable.rows(metrics.read(workdir))
    draws = (reward, lengths, time_split, accept_length, reliability)
    draws += (ranks, drafter_training, policy)
    made = {"timeline": timeline.draw(timeline.read(workdir))}
    made |= {draw.__name__: draw(rows) for draw in draws}
    return {name: drawn for name, drawn in made.items() if drawn is not None}


def reward(rows: Rows) -> figure.Figure | None:
    """Draw the mean reward with its standard deviation, and the smoothed mean.

    Of several reward functions each has a line, unweighted; held-out means have marks.
    """
    steps, mean = _series(rows, "reward/mean")
    if not len(steps):
        return None
    fig, axes = style.figure("Reward", "reward")
    # Rows without a deviation have a band of no width.
    by_step = dict(zip(*_series(rows, "reward/std"), strict=True))
    std = np.array([by_step.get(step, 0.0) for step in steps])
    look = dict(color=style.BLUE, lw=2)
    band, told = (mean - std, mean + std), "± 1 standard deviation"
    axes.fill_between(steps, *band, color=style.BLUE, alpha=0.12, lw=0, label=told)
    window = max(1, min(10, len(steps) // 5))
    if window > 1:
        axes.plot(steps, mean, color=style.BLUE, alpha=0.35, lw=1, label="mean")
        told = f"mean of the last {window} steps"
        axes.plot(steps, smooth(mean, window), label=told, **look)
    else:
        axes.plot(steps, mean, marker="o", ms=3, label="mean", **look)
    names = {name for row in rows for name in row}
    functions = sorted(filter(record_keys.is_function, names))
    for name, line in zip(functions, itertools.cycle((":", "-.", "--")), strict=False):
        label = name.removeprefix("reward/")
        look = dict(ls=line, lw=1.2, color=style.GREY)
        axes.plot(*_series(rows, name), label=label, **look)
    held_out = sorted(n for n in names if n.startswith(("eval/avg@", "eval/pass@")))
    colors = (style.GREEN, style.ORANGE, style.RED, style.PURPLE, style.SKY, style.GREY)
    # As many as there are colours.
    for name, color in zip(held_out, colors, strict=False):
        label = "held out, " + name.removeprefix("eval/")
        look = dict(ls="--", marker="D", ms=4, lw=1.2, color=color)
        axes.plot(*_series(rows, name), label=label, **look)
    return style.finish(fig, axes)


def lengths(rows: Rows) -> figure.Figure | None:
    """Draw the median, 95th percentile and maximum completion length."""
    fig, axes = style.figure("Completion length", "tokens")
    for name, label, color, width in _LENGTHS:
        steps, values = _series(rows, name)
        if len(steps):
            look = dict(color=color, lw=width, marker=_marker(steps), ms=3)
            axes.plot(steps, values, label=label, **look)
    if not axes.lines:
        return None
    axes.set_ylim(bottom=0)
    return style.finish(fig, axes)


def _seconds(row: Mapping[str, Any], name: str) -> float:
    """Return a stage's part of a step."""
    if step_record.is_beside(name, row):
        return 0.0
    return readable.number(row, name) or 0.0


def time_split(rows: Rows) -> figure.Figure | None:
    """Draw what each step's time went into, stacked."""
    rows = [row for row in rows if readable.number(row, "time/step_s") is not None]
    if not rows:
        return None
    steps = np.array([row["step"] for row in rows])
    total = np.array([row["time/step_s"] for row in rows], float)
    fig, axes = style.figure("Time per step", "seconds")
    parts = [
        (
            np.array([_seconds(row, name) for row in rows], float),
            color,
            label,
        )
        for name, label, color in _STAGES
    ]
    rest = np.maximum(0.0, total - sum(spent for spent, *_ in parts))
    if rest.sum() > 0.005 * total.sum():
        parts.append((rest, style.GREY, "other"))
    base, key = np.zeros(len(rows)), []
    for spent, *look in parts:
        if spent.any():
            style.stack(axes, steps, base, spent, look[0])
            key.append(look)
            base = base + spent
    ceiling = 1.15 * np.quantile(base, 0.95)
    if len(steps) >= 8 and base.max() > 2 * ceiling:
        # One step with compilation would squeeze all others flat.
        axes.set_ylim(0, ceiling)
        over = int((base > ceiling).sum())
        axes.text(
            *(0.01, 0.97),
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
    style.style(axes)
    style.key(axes, key, 9)
    return fig


def accept_length(rows: Rows) -> figure.Figure | None:
    """Draw the tokens gained per verification; nothing without speculation."""
    steps, values = _series(rows, "specdec/accept_length")
    # Plain decoding is recorded as 1.
    if not any(row.get("specdec/num_accepted") for row in rows) and (values == 1).all():
        return None
    fig, axes = style.figure("Accept length", "tokens per verification")
    axes.plot(steps, values, color=style.GREEN, lw=2, marker="o", ms=3, label="mean")
    axes.axhline(1.0, color=style.GREY, lw=1, ls=":", label="plain decoding")
    axes.set_ylim(bottom=0)
    return style.finish(fig, axes)


def reliability(rows: Rows) -> figure.Figure | None:
    """Draw how often drafts came true, over the chance that they were given.

    The whole run's; nothing where nothing was drafted.
    """
    names = [f"specdec/chance_{name}" for name in ("tried", "sum", "true")]
    counts = [[readable.numbers(row, name) for name in names] for row in rows]
    whole = [three for three in counts if set(map(len, three)) == {verify.NUM_TENTHS}]
    if not whole:
        return None
    tried, chance, true = np.sum(np.array(whole, float), axis=0)
    some = tried > 0
    if not some.any():
        return None
    fig, axes = style.figure("Reliability of drafts", "came true")
    shares = tried[some] / tried.sum()
    points = chance[some] / tried[some], true[some] / tried[some]
    axes.plot([0, 1], [0, 1], color=style.GREY, lw=1, ls=":", label="as it was said")
    axes.plot(*points, color=style.GREEN, lw=1.5)
    axes.scatter(
        *points, s=20 + 400 * shares, color=style.GREEN, label="by tenths; area: drafts"
    )
    axes.set(xlim=(0, 1), ylim=(0, 1))
    fig = style.finish(fig, axes)
    axes.set_xlabel("chance given")
    return fig


def ranks(rows: Rows) -> figure.Figure | None:
    """Draw by rank which drafts were verified, and how many of these were accepted.

    The whole run's; nothing where nothing was drafted.
    """
    names = [f"specdec/rank_{name}" for name in ("verified", "accepted")]
    counts = [[readable.numbers(row, name) for name in names] for row in rows]
    whole = [two for two in counts if set(map(len, two)) == {len(rooms.ROOMS)}]
    verified, accepted = np.sum(np.array(whole or [[[], []]], float), axis=0)
    if not verified.any():
        return None
    last = np.flatnonzero(verified)[-1] + 1
    verified, accepted = verified[:last], accepted[:last]
    fig, axes = style.figure("Accepted by rank", "fraction")
    look = {"color": style.GREEN, "alpha": 0.35, "label": "share of all accepted"}
    axes.bar(range(last), accepted / max(accepted.sum(), 1), width=0.8, **look)
    some = np.flatnonzero(verified)
    look = {"color": style.BLUE, "marker": "o", "ms": 4, "label": "accepted per column"}
    axes.plot(some, accepted[some] / verified[some], **look)
    axes.set_ylim(0, 1)
    fig = style.finish(fig, axes)
    axes.set_xticks(range(last), [f"{room:g}" for room in rooms.ROOMS[:last]])
    axes.set_xlabel("rank of the draft in the batch, per live row, up to")
    return fig


def policy(rows: Rows) -> figure.Figure | None:
    """Draw entropy, divergence, gradient norm and sampler mismatch, one panel each."""
    panels = [p for p in _POLICY if len(_series(rows, p[0])[0])]
    if not panels:
        return None
    fig, grid = _column(panels, 1.7 * len(panels) + 0.6)
    for axes, (name, _) in zip(grid, panels, strict=True):
        axes.plot(*_series(rows, name), color=style.BLUE, lw=1.5)
        style.style(axes)
    return fig


def drafter_training(rows: Rows) -> figure.Figure | None:
    """Draw how good the drafter is that a run trains: one panel for each number.

    A list holds a number for each unrolled step.
    """
    panels = [p for p in _DRAFTER if any(row.get(p[0]) is not None for row in rows)]
    if not any(name.startswith("drafter/") for name, _ in panels):
        return None
    fig, grid = _column(panels, 2.2 * len(panels) + 0.4)
    for axes, (name, _) in zip(grid, panels, strict=True):
        curves(axes, rows, name)
        style.style(axes)
    return fig


def draw_training(workdir: str | pathlib.Path) -> pathlib.Path:
    """Draw loss, accuracy and acceptance by depth of a `tlt_jax.train_drafter` run.

    Returns the file written, `<workdir>/plots/drafter.png`.
    """
    workdir = pathlib.Path(workdir)
    rows = readable.rows(metrics.read(workdir))
    drawn, grid = style.panels(10, 6.5, 2, 2)
    for axes, (name, title) in zip(grid.flat, _TRAINING, strict=True):
        curves(axes, rows, name)
        axes.set_title(title, loc="left", fontsize=9)
        axes.set_xlabel("step")
        style.open_frame(axes)
        axes.grid(axis="y", color=style.PALE, linewidth=0.8)
        if name != "drafter/loss":
            axes.set_ylim(0, 1)
    path = workdir / "plots" / "drafter.png"
    path.parent.mkdir(exist_ok=True)
    style.save(drawn, path)
    return path


def curves(axes: axes_lib.Axes, rows: Rows, name: str) -> None:
    """Draw a number over the steps, or one curve for each depth of a list."""
    found = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    steps, lists = [step for step, _ in found], [np.atleast_1d(x) for _, x in found]
    values = np.full((len(found), max(map(len, lists), default=0)), np.nan)
    for of_step, found_there in zip(values, lists, strict=True):
        of_step[: len(found_there)] = found_there
    several = values.shape[1] > 1
    colors = cm.viridis(np.linspace(0, 0.85, values.shape[1]))
    for depth, color in enumerate(colors):
        label = f"depth {depth + 1}" if several else None
        look = dict(color=color, lw=1.5, marker=_marker(steps), ms=3)
        axes.plot(steps, values[:, depth], label=label, **look)
    if several:
        axes.legend(frameon=False, fontsize=7)


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Return the mean of each value and up to `window - 1` values before it."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    end = np.arange(1, len(values) + 1)
    start = np.maximum(0, end - window)
    return (total[end] - total[start]) / (end - start)


def _series(rows: Rows, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return steps and values where `name` is recorded and finite."""
    points = [(row["step"], readable.number(row, name)) for row in rows]
    points = [(s, value) for s, value in points if value is not None]
    points = [(step, value) for step, value in points if np.isfinite(value)]
    steps, values = zip(*points, strict=True) if points else ((), ())
    return np.array(steps, int), np.array(values, float)


def _marker(steps: Sequence[int] | np.ndarray) -> str | None:
    """Let few points be seen as points."""
    return "o" if len(steps) < 30 else None


def _column(panels: Sequence[tuple[str, str]], height: float):
    """Make a figure of panels over RL steps, each with its title, and the panels."""
    size = (7.5, height, len(panels), 1)
    fig, grid = style.panels(*size, sharex=True, squeeze=False)
    for axes, (_, label) in zip(grid[:, 0], panels, strict=True):
        axes.set_title(label, loc="left", fontsize=9)
    grid[-1, 0].set_xlabel("RL step")
    return fig, grid[:, 0]
