"""What is said at a run's end: where things are and what can be done next."""

import pathlib
import shlex
import statistics
from collections.abc import Mapping
from typing import Any

from tlt_jax import config
from tlt_jax.runtime import failures
from tlt_jax.workdir import checkpoint, metrics


def last_row(directory: pathlib.Path, run: Any) -> dict[str, Any] | None:
    """Return the last record of a run that is complete, or None."""
    if checkpoint.newest(directory) != run.num_steps:
        return None
    return metrics.read(directory)[-1]


def finished(directory: pathlib.Path, run: config.RunConfig) -> str:
    """Say what came of a complete run, where it is and what to do next."""
    workdir, total = shlex.quote(str(directory)), run.num_steps
    rows = metrics.read(directory)
    rewards = [row["reward/mean"] for row in rows if row.get("reward/mean") is not None]
    told = f"finished: step {total} of {total}"
    if rewards:
        # One step's is noise: as many as the plot takes together, where there are many.
        num = max(1, min(10, len(rewards) // 5))
        last = f"over the last {num}" if num > 1 else "in the last"
        told += f", reward {rewards[0]:.3f} in the first step, "
        told += f"{statistics.fmean(rewards[-num:]):.3f} {last}"
    return told + _lines(
        {
            "in": f"{workdir}: metrics.jsonl, plots, rollouts, checkpoints",
            "report": f"python -m tlt_jax.report --workdir={workdir}",
            "ask it": f"python -m tlt_jax.generate --model={workdir} --prompt=TEXT",
            "evaluate": f"python -m tlt_jax.evaluate --model={workdir}",
            "export": f"python -m tlt_jax.export --workdir={workdir} --out=DIR",
            "go on": f"the same command with --config.num_steps={2 * total}",
        }
    )


def drafter_finished(directory: pathlib.Path, num_steps: int) -> str:
    """Say where a trained drafter is and what to do next."""
    workdir = shlex.quote(str(directory))
    return f"finished: step {num_steps} of {num_steps}" + _lines(
        {
            "in": f"{workdir}: drafter, metrics.jsonl, plots, texts, checkpoints",
            "use it": "python -m tlt_jax.main ... --config.specdec.mode=tlt "
            f"--config.drafter.directory={workdir}/drafter",
            "export": f"python -m tlt_jax.export --workdir={workdir} "
            "--drafter_layout=tlt --out=DIR",
            "go on": f"the same command with --config.num_steps={2 * num_steps}",
        }
    )


def stopped(directory: pathlib.Path, num_steps: int) -> str:
    """Say in one line where a run of `num_steps` is that was stopped."""
    step = checkpoint.newest(directory)
    if step is None:
        return (
            f"stopped before a step was saved in {directory}: the same command begins "
            "again."
        )
    return (
        f"stopped: step {step} of {num_steps} is saved in "
        f"{directory / checkpoint.DIRECTORY / str(step)}; the same command resumes."
    )


def not_finite(
    error: failures.NotFiniteError, num_done: int, newest: int | None
) -> failures.TrainingError:
    """Say what may be done where updates are not finite any more.

    So many steps are done; `newest` is the newest checkpoint's, None: there is none.
    """
    there = "There is no checkpoint yet."
    if newest is not None:
        there = (
            f"The newest checkpoint is that of step {newest}; exported "
            "(tlt_jax.export) it is a model to begin from."
        )
    return failures.TrainingError(
        f"{error} (step {num_done + 1}): lower optimizer.learning_rate or check the "
        f"rewards and the weights, and begin again in another --workdir. {there}"
    )


def _lines(told: Mapping[str, str]) -> str:
    width = max(map(len, told))
    return "".join(f"\n  {name:<{width}}  {text}" for name, text in told.items())
