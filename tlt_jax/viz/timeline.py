"""The plot of what rollout workers did and when, from `<workdir>/timeline.jsonl`.

One line per RL step: `{"step": 3, "workers": [{"worker": 0, "intervals":
[["busy", 0.0, 7.5], ["training", 7.6, 11.0], ["idle", 11.0, 11.2]]}, ...]}`, in seconds
from any moment that the step's workers share.
"""

import collections
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import figure, ticker

from tlt_jax.models.formats import json_file
from tlt_jax.viz import style
from tlt_jax.workdir import directory as workdir_lib

FILE = workdir_lib.TIMELINE
BUSY, COMPILING, TRAINING, IDLE = "busy", "compiling", "training", "idle"
_LOOK = {
    BUSY: (style.BLUE, "decoding"),
    COMPILING: (style.RED, "compiling"),
    TRAINING: (style.GREEN, "training the drafter"),
    IDLE: (style.PALE, "idle"),
}
# Steps shown worker by worker; all are in the panel of shares.
_NUM_SHOWN = 3
_LARGEST = 1e12  # seconds and steps of a record that is not damaged

Record = Mapping[str, Any]


def read(workdir: str | pathlib.Path) -> list[Record]:
    """Read a run's timeline: none if there is no file.

    A step that was taken again after a restart counts once; a line that was cut off, or
    does not say what the module does, does not count.
    """
    path = pathlib.Path(workdir) / FILE
    if not path.is_file():
        return []
    records = {}
    for line in path.read_bytes().splitlines():
        try:
            record = json_file.parse(line)
        except ValueError:
            continue
        if _is_record(record):
            records[record["step"]] = record
    return [records[step] for step in sorted(records)]


def _is_record(record: Any) -> bool:
    if not isinstance(record, dict) or type(record.get("step")) is not int:
        return False
    workers = record.get("workers")
    return 0 <= record["step"] < _LARGEST and (
        isinstance(workers, list)
        and all(isinstance(worker, dict) and "worker" in worker for worker in workers)
        and all(
            isinstance(worker.get("intervals"), list)
            and all(map(_is_interval, worker["intervals"]))
            for worker in workers
        )
    )


def _is_interval(interval: Any) -> bool:
    if not isinstance(interval, list) or len(interval) != 3:
        return False
    state, *ends = interval
    if not isinstance(state, str) or any(type(end) not in (int, float) for end in ends):
        return False
    return -_LARGEST < ends[0] <= ends[1] < _LARGEST


def seconds(record: Record) -> dict[str, float]:
    """Sum a step's seconds over its workers, by state."""
    total = collections.Counter({state: 0.0 for state in _LOOK})
    for state, start_s, stop_s in _intervals(record):
        total[state] += stop_s - start_s
    return dict(total)


def trained_frac(spent: Mapping[str, float]) -> float | None:
    """Return the share of the time without requests that went into training."""
    free = spent[TRAINING] + spent[IDLE]
    return spent[TRAINING] / free if free > 0 else None


def draw(records: Sequence[Record]) -> figure.Figure | None:
    """Draw the states' shares of every step, and some steps worker by worker.

    None without an interval, and of one worker that does nothing else than decode.
    """
    records = [record for record in records if list(_intervals(record))]
    alone = all(len(record["workers"]) == 1 for record in records)
    states = {state for record in records for state, *_ in _intervals(record)}
    if not records or (alone and states <= {BUSY, COMPILING}):
        return None
    shown = sorted({0, len(records) // 2, len(records) - 1})[-_NUM_SHOWN:]
    heights = [0.35 * len(records[i]["workers"]) + 0.75 for i in shown]
    several = len(records) > 1
    if several:
        heights.insert(0, 2.2)
    shape = (8.5, sum(heights) + 0.6, len(heights), 1)
    fig, grid = style.panels(*shape, height_ratios=heights, squeeze=False)
    panels = [axes for (axes,) in grid]
    if several:
        _draw_shares(panels.pop(0), records)
    for axes, index in zip(panels, shown, strict=True):
        _draw_step(axes, records[index], TRAINING in states)
    panels[-1].set_xlabel("seconds since the rollout's begin")
    style.key(fig.axes[0], [_LOOK[s] for s in _LOOK if s in states], 9)
    return fig


def _draw_shares(axes, records: Sequence[Record]) -> None:
    steps = np.array([record["step"] for record in records])
    spent = [seconds(record) for record in records]
    total = np.array([sum(s[state] for state in _LOOK) for s in spent])
    base = np.zeros(len(steps))
    for state, (color, _) in _LOOK.items():
        share = np.array([s[state] for s in spent]) / np.maximum(total, 1e-9)
        if share.any():
            style.stack(axes, steps, base, share, color)
            base = base + share
    axes.set_title("Workers' time", loc="left", fontsize=12, fontweight="bold")
    axes.set(xlabel="RL step", ylim=(0, 1))
    axes.yaxis.set_major_formatter(ticker.PercentFormatter(1.0))
    style.style(axes)


def _draw_step(axes, record: Record, trains: bool) -> None:
    first = min(start for _, start, _ in _intervals(record))
    workers = record["workers"]
    for row, worker in enumerate(workers):
        for state, start, stop in worker["intervals"]:
            color, _ = _LOOK.get(state, (style.GREY, state))
            span = [(start - first, stop - start)]
            axes.broken_barh(span, (row - 0.4, 0.8), color=color, lw=0)
    frac = trained_frac(seconds(record)) if trains else None
    told = "" if frac is None else f": {frac:.0%} of the free time trained"
    axes.set_title(f"step {record['step']}{told}", loc="left", fontsize=9)
    axes.set_yticks(range(len(workers)), [f"worker {w['worker']}" for w in workers])
    axes.set_ylim(len(workers) - 0.4, -0.6)
    axes.margins(x=0)
    style.open_frame(axes)
    axes.tick_params(axis="y", length=0)


def _intervals(record: Record):
    for worker in record["workers"]:
        yield from worker["intervals"]
