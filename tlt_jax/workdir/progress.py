"""What a person sees while a run goes on: a live display, or one line per RL step."""

import collections
import contextlib
import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import rich.box
import rich.console
import rich.live
import rich.table
import rich.text

from tlt_jax.rl.workers import workers as workers_lib
from tlt_jax.specdec import chain
from tlt_jax.workdir import step_record

_SHOWN_STEPS = 10
_FIRST = "starting"
_PLAIN_EVERY_S = 30.0
_BAR = 24
_SPLIT = ("rollout", "wait", "reward", "inference", "update", "sync", "compile")
# What workers do, as the coordinator names it, with its mark and colour.
_LOOK = {
    "busy": ("●", "blue"),
    "compiling": ("◍", "red"),
    "training": ("◆", "green"),
    "idle": ("○", "dim"),
    "lost": ("✗", "red"),
}
_RARE = ("compiling", "lost")
_MANY_WORKERS = 32
_LEVELS = "▁▂▃▄▅▆▇█"
_CURVE = 48


@dataclasses.dataclass(frozen=True)
class Workers:
    """What the rollout workers do at a moment.

    Attributes:
      activities: of each worker: busy, compiling, training, idle or lost.
      drafter_version: of the drafter that they speculate with; -1: none.
    """

    activities: Sequence[str]
    drafter_version: int = -1

    def __str__(self) -> str:
        counts = collections.Counter(self.activities)
        shown = [name for name in _LOOK if counts[name] or name not in _RARE]
        parts = [f"{counts[name]} {name}" for name in shown]
        if self.drafter_version >= 0:
            parts.append(f"drafter v{self.drafter_version}")
        return ", ".join(parts)


def seen(team: workers_lib.Workers) -> Workers | None:
    """Return what a run's workers do at this moment; None between rollouts."""
    state = team.coordination.state
    if not state.rolling:
        return None
    found = {worker.number: str(worker.activity) for worker in state.workers}
    # Of other processes only the end of a rollout tells.
    for number, engine in enumerate(team.engines, team.first):
        if engine.pool.stats.num_waiting and found.get(number) == "busy":
            found[number] = "compiling"
    return Workers(tuple(found.values()), team.drafter_version)


class Progress(contextlib.AbstractContextManager):
    """Shows a run. Use as a context manager, or call `close`.

    On a terminal a display is redrawn in place: the run's bar and remaining time, the
    reward so far, the current step's stage and what the workers do at this moment, the
    latest steps. Elsewhere each step prints one line, a long stage a line every 30 s,
    and of the first step each stage.
    """

    def __init__(
        self,
        num_steps: int,
        first_step: int = 0,
        mode: Literal["auto", "plain", "off"] = "auto",
        console: rich.console.Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Start the display of a run of `num_steps`, `first_step` of them done before.

        In the mode `auto` it looks whether there is a terminal.
        """
        self._console = console or rich.console.Console(highlight=False)
        self._num_steps, self._done = num_steps, first_step
        self._clock = clock
        self._rows: collections.deque = collections.deque(maxlen=_SHOWN_STEPS)
        self._rewards: list[float] = []
        self._look: Callable[[], Workers | None] = lambda: None
        self._stage, self._detail, self._fraction = _FIRST, "", None
        self._stage_since = self._printed_at = clock()
        self._off = mode == "off"
        in_lines = mode == "plain" or not self._console.is_terminal
        self._plain = in_lines and not self._off
        self._live = None
        if not in_lines and not self._off:
            self._live = rich.live.Live(
                get_renderable=self._render, console=self._console, refresh_per_second=4
            )
            self._live.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave the last display standing and release the terminal."""
        if self._live:
            self._stage, self._detail, self._fraction = "", "", None
            self._live.stop()
            self._live = None

    def resume(self, step: int) -> None:
        """Say that `step` RL steps were done before this process."""
        self._done = step
        self.note(f"resuming after step {step} of {self._num_steps}")

    def watch(self, look: Callable[[], Workers | None]) -> None:
        """Show what the workers do, as `look` says it; None: nothing for the run.

        It is called from the display's thread, several times a second.
        """
        self._look = look

    def stage(self, name: str) -> None:
        """Say what the run does now: rollout, reward, update, ..."""
        # Until the first step is over there is nothing else to see, for minutes where
        # large programs are compiled. What cannot be used is found by the first stage,
        # and is to stand alone.
        if self._plain and not self._rows and self._stage not in (_FIRST, name):
            self._print(f"  {name} ...")
        self._stage, self._detail, self._fraction = name, "", None
        self._stage_since = self._printed_at = self._clock()

    def within(self, done: int, total: int, detail: str = "") -> None:
        """Say how far the current stage is: `done` of `total` completions, say."""
        self._fraction = done / total if total else 1.0
        self._detail = f"{done}/{total}  {detail}".rstrip()
        now = self._clock()
        if self._plain and now - self._printed_at > _PLAIN_EVERY_S:
            self._printed_at = now
            seen = self._look()
            self._print(
                f"  step {self._done + 1}: {self._stage} {self._detail} after "
                f"{duration(now - self._stage_since)}"
                + (f"; workers: {seen}" if seen else "")
            )

    def record(self, row: Mapping[str, Any]) -> None:
        """Show a finished step; its record may lack any of `metrics.NAMES`."""
        self._done += 1
        self._rows.append(dict(row))
        if row.get("reward/mean") is not None:
            self._rewards.append(float(row["reward/mean"]))
        self.stage("next step" if self._done < self._num_steps else "finishing")
        if self._plain:
            self._print(line(row, self._done, self._num_steps, self.remaining_s()))

    def note(self, text: str) -> None:
        """Print a line that stays."""
        if not self._off:
            self._print(text)

    def tell(self, text: str) -> None:
        """Print a line that answers the user, where nothing else is shown as well."""
        self._print(text)

    def remaining_s(self) -> float | None:
        """Return the estimated time to the end of the run in seconds, if known."""
        times = [
            row["time/step_s"] - (row.get("time/compile_s") or 0.0)
            for row in list(self._rows)
            if row.get("time/step_s") is not None
        ]
        if not times:
            return None
        return max(0.0, statistics.median(times)) * (self._num_steps - self._done)

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)

    def _render(self) -> rich.console.Group:
        remaining = self.remaining_s()
        head = rich.text.Text()
        head.append(f"step {self._done}/{self._num_steps} ", "bold")
        head.append(_bar(self._done / max(1, self._num_steps)), "cyan")
        if remaining is not None and self._done < self._num_steps:
            head.append(f"  {duration(remaining)} left")
        if len(self._rewards) > 1:
            low, high = min(self._rewards), max(self._rewards)
            head.append("\nreward ")
            head.append(curve(self._rewards, _CURVE), "cyan")
            head.append(f"  {low:.3f} to {high:.3f}", "dim")
        if self._stage:
            spent = duration(self._clock() - self._stage_since)
            head.append(f"\n{self._stage} {spent} ", "dim")
            if self._fraction is not None:
                head.append(_bar(self._fraction), "green")
            head.append(f" {self._detail}", "dim")
        if (seen := self._look()) is not None:
            head.append("\nworkers ")
            for activity in seen.activities[:_MANY_WORKERS]:
                head.append(*_LOOK[activity])
            head.append(f"  {seen}", "dim")
        return rich.console.Group(_table(list(self._rows)), head)


def line(
    row: Mapping[str, Any], done: int, num_steps: int, remaining_s: float | None = None
) -> str:
    """Return one step's record as one line of text."""
    cells = [f"step {done:>{len(str(num_steps))}}/{num_steps}"]
    for name, value in _cells(row).items():
        if value:
            cells.append(f"{name} {value}")
    if remaining_s is not None and done < num_steps:
        cells.append(f"{duration(remaining_s)} left")
    return " | ".join(cells)


def curve(values: Sequence[float], width: int) -> str:
    """Draw values as a line of bars, means of neighbours where there are too many."""
    values = [value for value in values if math.isfinite(value)]
    count = min(width, len(values))
    edges = [i * len(values) // count for i in range(count + 1)] if count else []
    means = [
        statistics.fmean(values[a:b]) for a, b in zip(edges, edges[1:], strict=False)
    ]
    low = min(means, default=0.0)
    span = max(means, default=0.0) - low
    top = len(_LEVELS) - 1
    return "".join(
        _LEVELS[round((mean - low) / span * top) if span else 0] for mean in means
    )


def duration(seconds: float) -> str:
    """Return a time in the two largest units that matter: 7.3 s, 2 m 05 s, 3 h 12 m."""
    if seconds < 99.95:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} m {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} m"


def _cells(row: Mapping[str, Any]) -> dict[str, str]:
    def number(name: str, spec: str) -> str:
        value = row.get(name)
        return "" if value is None else format(value, spec)

    reward, std = number("reward/mean", ".3f"), number("reward/std", ".2f")
    lengths = [number(f"length/{k}", ".0f") for k in ("mean", "p95", "max")]
    total = row.get("time/step_s")
    split = []
    for part in _SPLIT:
        seconds = row.get(f"time/{part}_s")
        if step_record.is_beside(f"time/{part}_s", row):
            continue
        if total and seconds and seconds / total >= 0.01:
            split.append(f"{part} {seconds / total:.0%}")
    rule = row.get("specdec/rule", chain.KEYED)
    version, idle = row.get("drafter/version"), row.get("workers/idle_frac")
    free_s, trained_s = row.get("workers/idle_s"), row.get("workers/trained_s")
    waited = ""
    if free_s:
        # Of the time without requests, what the drafter was trained in.
        waited = f"{idle:.0%} ({(trained_s or 0.0) / free_s:.0%})"
    return {
        "reward": f"{reward} ± {std}" if std else reward,
        "length": "/".join(lengths) if all(lengths) else lengths[0],
        # Without speculation the record has a 1, which would tell nothing.
        "accept": number("specdec/accept_length", ".2f")
        + (f" ({rule})" if rule != chain.KEYED else "")
        if row.get("specdec/num_accepted")
        else "",
        "drafter": "" if version is None else f"v{version}",
        "idle (trained)": waited,
        "tok/s": number("rollout/tokens_per_s", ",.0f"),
        "time": "" if total is None else duration(total),
        "of it": ", ".join(split),
    }


def _table(rows) -> rich.table.Table:
    box = rich.box.SIMPLE_HEAD
    table = rich.table.Table(box=box, pad_edge=False, collapse_padding=True)
    cells = [_cells(row) for row in rows]
    optional = ("accept", "drafter", "idle (trained)")
    names = [
        name
        for name in _cells({})
        if name not in optional or any(cell[name] for cell in cells)
    ]
    for name in ("step", *names):
        title = "length mean/p95/max" if name == "length" else name
        last = name == "of it"
        table.add_column(title, justify="left" if last else "right", no_wrap=not last)
    for row, cell in zip(rows, cells, strict=True):
        table.add_row(str(row.get("step", "")), *(cell[name] for name in names))
    return table


def _bar(fraction: float) -> str:
    full = round(min(1.0, max(0.0, fraction)) * _BAR)
    return "━" * full + "╌" * (_BAR - full)
