"""The record of an RL step, completed from what its parts have said of it."""

import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

from tlt_jax.rl.engine import stats as rollout_stats
from tlt_jax.rl.workers import coordinator, records
from tlt_jax.workdir import metrics


def complete(
    row: Mapping[str, Any], step: int, seconds: Mapping[str, float], started: float
) -> dict[str, Any]:
    """Complete a step's record: every name that stays, and what follows from counts.

    `row` is what the step's parts have said, `step` counts this one too; `seconds` are
    `time/<stage>_s` of `watch.Watch.row`, and it began at `started` by
    `time.perf_counter`. Where nothing else is known the record says: no speculation, no
    idle workers, and no update (of a step in which no group carried signal).
    """
    row = _absent() | {"step": step} | dict(row) | dict(seconds)
    if "specdec/num_accepted" in row:
        counts, tried = row["specdec/num_accepted"], row["specdec/num_tried"]
        row["specdec/accept_length"] = rollout_stats.accept_length(counts)
        row["specdec/accept_rate_by_depth"] = rollout_stats.accept_rates(counts, tried)
    row["time/step_s"] = time.perf_counter() - started
    rollout_s = max(row["time/rollout_s"], 1e-9)
    row["rollout/tokens_per_s"] = row["rollout/tokens"] / rollout_s
    return row


def of_workers(
    intervals: Sequence[records.Interval], lost: Mapping[int, str]
) -> dict[str, Any]:
    """Return what a step's record says of the workers; `lost` are reasons by number."""
    row = coordinator.sums(intervals) | {"workers/num_lost": len(lost)}
    if lost:
        told = [f"{worker} ({why})" for worker, why in lost.items()]
        row["workers/lost"] = ", ".join(told)
    return row


def is_beside(name: str, row: Mapping[str, Any]) -> bool:
    """Tell whether these seconds of a record were spent beside its step."""
    return "time/wait_s" in row and name in ("time/rollout_s", "time/reward_s")


def left_out(workdir: pathlib.Path, step: int) -> dict[str, Any] | None:
    """Return the record of this step, the newest, if an evaluation is missing there.

    A run that was stopped in an evaluation leaves such a one; of step 0 there is none
    before its evaluation. None: it is there.
    """
    if not step:
        return {"step": 0}
    for row in metrics.read(workdir)[-1:]:
        if row["step"] == step and not any(n.startswith("eval/") for n in row):
            return row
    return None


def _absent() -> dict[str, Any]:
    return dict.fromkeys(sorted(metrics.NAMES)) | {
        "specdec/accept_length": 1.0,
        "specdec/accept_rate_by_depth": [],
        "specdec/strategy": "none",
        "workers/idle_s": 0.0,
        "workers/trained_s": 0.0,
        "workers/idle_frac": 0.0,
    }
